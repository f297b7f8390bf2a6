"""Image, box, polygon and bitmap move together; sizes round as Detectron2 rounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gn_det.config import get_cfg
from gn_det.data.augment import tight_box
from gn_det.data.coco import load_coco
from gn_det.data.mapper import InferenceMapper, TrainMapper
from gn_det.data.transforms import (
    Crop,
    Flip,
    Resize,
    apply_to_box,
    draw_crop,
    draw_flip,
    draw_resize,
    resized_shape,
)
from gn_det.errors import ConfigError
from tests.data.own_coco import write


@pytest.mark.parametrize(
    ("height", "width", "side", "limit", "want"),
    [
        (480, 640, 800, 1333, (800, 1067)),
        (2, 3000, 800, 1333, (1, 1333)),
        (1, 5000, 800, 1333, (1, 1333)),  # 0 rows in Detectron2, which fails on it
        (640, 480, 800, 1333, (1067, 800)),
        (500, 1500, 800, 1333, (444, 1333)),
        (33, 70, 800, 1333, (628, 1333)),
        (100, 100, 50, 40, (40, 40)),
        (427, 640, 640, 10**9, (640, 959)),
    ],
)
def test_resized_shape(height: int, width: int, side: int, limit: int, want: tuple[int, int]) -> None:
    assert resized_shape(height, width, side, limit) == want


def test_boxes_follow() -> None:
    box = np.array([2.0, 3.0, 6.0, 5.0])
    assert apply_to_box([Flip(1, 10)], box).tolist() == [4, 3, 8, 5]
    assert apply_to_box([Flip(0, 8)], box).tolist() == [2, 3, 6, 5]
    assert apply_to_box([Resize(8, 10, 16, 30)], box).tolist() == [6, 6, 18, 10]
    assert apply_to_box([Crop(1, 2, 5, 5)], box).tolist() == [1, 1, 5, 3]
    assert apply_to_box([], box).tolist() == box.tolist()
    assert box.tolist() == [2, 3, 6, 5]  # the argument is kept


def test_whole_numbers_are_truncated_as_in_detectron2() -> None:
    assert apply_to_box([Resize(10, 10, 15, 15)], np.array([1, 1, 3, 3])).tolist() == [1, 1, 4, 4]
    assert apply_to_box([Resize(10, 10, 15, 15)], np.array([1.0, 1, 3, 3])).tolist() == [1.5, 1.5, 4.5, 4.5]


def test_draws_are_reproducible_and_within_bounds() -> None:
    for seed in range(40):
        first, second = np.random.RandomState(seed), np.random.RandomState(seed)
        for kind, size in (
            ("relative", [0.5, 0.25]),
            ("relative_range", [0.3, 0.3]),
            ("absolute", [20, 99]),
            ("absolute_range", [5, 12]),
        ):
            [crop] = draw_crop((40, 60), kind, size, first)
            assert [crop] == draw_crop((40, 60), kind, size, second)
            assert 0 <= crop.x0 <= 60 - crop.width and 0 <= crop.y0 <= 40 - crop.height
        [resize] = draw_resize((40, 60), (30, 50), 1000, "range", first)
        assert 30 <= resize.new_height <= 50
        assert draw_resize((40, 60), (0,), 1000, "choice", first) == []
        assert draw_flip((40, 60), "vertical", first) in ([], [Flip(0, 40)])


def _cfg(**values: object):
    cfg = get_cfg()
    cfg.INPUT.MIN_SIZE_TRAIN = (60,)
    cfg.INPUT.MIN_SIZE_TEST = 45
    cfg.MODEL.MASK_ON = True
    cfg.INPUT.RANDOM_FLIP = "none"
    for key, value in values.items():
        cfg.INPUT[key] = value
    return cfg


def test_train_sample(tmp_path) -> None:
    """Twice as large: boxes and masks scale with the image, crowds are left out, polygon and RLE are mixed."""
    data = load_coco(write(tmp_path), max_bad=0)
    sample = TrainMapper(_cfg())(data.records[0], np.random.RandomState(0))
    targets = sample["targets"]
    assert sample["image"].shape == (3, 60, 80) and sample["image"].dtype == torch.uint8
    assert (sample["height"], sample["width"], sample["image_id"]) == (30, 40, 5)
    assert targets.image_size == (60, 80)
    assert targets.boxes.tolist() == [[4, 6, 24, 22], [40, 20, 50, 32]]
    assert targets.classes.tolist() == [1, 0]
    polygon, bitmap = targets.masks.masks
    assert polygon[0].tolist() == [4, 6, 24, 6, 24, 22, 4, 22]
    assert bitmap.dtype == bool and bitmap.shape == (60, 80) and bitmap.sum() == 30 * 4
    assert bitmap[20:32, 40:50].all()
    crowd_only = TrainMapper(_cfg())(data.records[2], np.random.RandomState(0))["targets"]
    assert len(crowd_only) == len(crowd_only.masks) == 0 and crowd_only.boxes.shape == (0, 4)
    as_bitmaps = TrainMapper(_cfg(MASK_FORMAT="bitmask"))(data.records[0], np.random.RandomState(0))["targets"].masks
    assert as_bitmaps.masks[0].sum() == 20 * 16


def test_flip_moves_image_and_targets_together(tmp_path) -> None:
    data = load_coco(write(tmp_path), max_bad=0)
    plain = TrainMapper(_cfg())(data.records[0], np.random.RandomState(0))
    mapper = TrainMapper(_cfg(RANDOM_FLIP="horizontal"))
    flipped = next(
        s
        for s in (mapper(data.records[0], np.random.RandomState(i)) for i in range(30))
        if not torch.equal(s["image"], plain["image"])
    )
    assert torch.equal(flipped["image"].flip(2), plain["image"])
    assert flipped["targets"].boxes.tolist() == [[56, 6, 76, 22], [30, 20, 40, 32]]
    assert np.array_equal(flipped["targets"].masks.masks[1][:, ::-1], plain["targets"].masks.masks[1])


def test_boxes_alone_without_masks(tmp_path) -> None:
    data = load_coco(write(tmp_path, lambda c: [a.pop("segmentation") for a in c["annotations"]]), max_bad=0)
    cfg = _cfg()
    cfg.MODEL.MASK_ON = False
    targets = TrainMapper(cfg)(data.records[0], np.random.RandomState(0))["targets"]
    assert targets.masks is None and len(targets) == 2


def test_test_sample(tmp_path) -> None:
    data = load_coco(write(tmp_path), max_bad=0)
    sample = InferenceMapper(_cfg())(data.records[0])
    assert sample["image"].shape == (3, 45, 60) and "targets" not in sample
    assert (sample["height"], sample["width"]) == (30, 40)
    by_path = InferenceMapper(_cfg())(tmp_path / "im 5é.png")
    assert torch.equal(by_path["image"], sample["image"]) and by_path["height"] == 30
    full_size = InferenceMapper(_cfg(MIN_SIZE_TEST=0))(data.records[0])
    assert full_size["image"].shape == (3, 30, 40)


def test_a_range_needs_two_ends() -> None:
    with pytest.raises(ConfigError, match=r"INPUT.MIN_SIZE_TRAIN \(60,\) needs \(low, high\)"):
        TrainMapper(_cfg(MIN_SIZE_TRAIN_SAMPLING="range"))


def test_both_ends_of_a_range_are_drawn_and_half_of_the_images_flipped() -> None:
    rng = np.random.RandomState(0)
    resizes = [draw_resize((10, 20), (5, 7), 100, "range", rng) for _ in range(200)]
    assert {r.new_height for [r] in resizes} == {5, 6, 7}
    flips = [draw_flip((10, 20), "horizontal", rng) for _ in range(1000)]
    assert sum(map(len, flips)) == pytest.approx(500, abs=80)  # 5 standard deviations


def test_box_of_a_mask_holds_its_pixels() -> None:
    """Continuous coordinates: pixel i covers [i, i + 1). The corners of a polygon are its own."""
    bitmap = np.zeros((5, 7), dtype=bool)
    bitmap[2, 3] = True
    assert tight_box(bitmap).tolist() == [3, 2, 4, 3]
    bitmap[4, 6] = True
    assert tight_box(bitmap).tolist() == [3, 2, 7, 5]
    assert tight_box([np.array([1.5, 2.0, 4.0, 2.5, 3.0, 6.0])]).tolist() == [1.5, 2, 4, 6]
    assert tight_box(np.zeros((5, 7), dtype=bool)).tolist() == tight_box([]).tolist() == [0, 0, 0, 0]
