"""Augmented images keep boxes and masks on their objects, and are a function of seed and draw alone."""

from __future__ import annotations

import itertools
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from gn_det.config import get_cfg, load_config
from gn_det.config.presets import AUGMENTATIONS, apply_augmentation
from gn_det.data.augment import copy_paste, jitter_color, tight_box
from gn_det.data.coco import CocoDataset, load_coco
from gn_det.data.loader import build_train_loader
from gn_det.data.mapper import TrainMapper
from gn_det.data.shapes import make_shapes
from gn_det.data.transforms import Pad, Resize, Rotate, apply_to_image, draw_jitter
from gn_det.errors import ConfigError
from gn_det.structures import Masks, Sample, Targets, rasterize_polygons


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> CocoDataset:
    return load_coco(make_shapes(tmp_path_factory.mktemp("shapes"), "train", 12), max_bad=0)


def _cfg(preset: str = "none", **given: Any) -> Any:
    cfg = get_cfg()
    cfg.INPUT.MIN_SIZE_TRAIN = (96,)
    cfg.MODEL.MASK_ON = True
    apply_augmentation(cfg, preset)
    for key, value in given.items():
        cfg.INPUT[key] = value
    return cfg


def _bitmaps(targets: Targets) -> list[np.ndarray]:
    assert targets.masks is not None
    return [rasterize_polygons(m, *targets.image_size) if isinstance(m, list) else m for m in targets.masks.masks]


def _equal(a: Sample, b: Sample) -> bool:
    boxes = torch.equal(a["targets"].boxes, b["targets"].boxes)
    masks = zip(_bitmaps(a["targets"]), _bitmaps(b["targets"]))
    return torch.equal(a["image"], b["image"]) and boxes and all(np.array_equal(x, y) for x, y in masks)


@pytest.mark.parametrize("preset", AUGMENTATIONS)
def test_boxes_fit_masks_under_every_preset(shapes: CocoDataset, preset: str) -> None:
    """Polygons, bitmaps and boxes go the same way: the box is that of the mask, to the pixel that rasterizing costs."""
    mapper, looked_at = TrainMapper(_cfg(preset)), 0
    for seed in range(3 * len(shapes)):
        record = shapes.records[seed % len(shapes)]
        sample = mapper(record, np.random.RandomState(seed), lambda rng: shapes.records[int(rng.randint(len(shapes)))])
        targets = sample["targets"]
        assert tuple(sample["image"].shape[1:]) == targets.image_size
        for box, bitmap in zip(targets.boxes.numpy(), _bitmaps(targets)):
            if bitmap.sum() >= 30:
                assert np.abs(box - tight_box(bitmap)).max() <= 2.0
                looked_at += 1
    assert looked_at > 50


@pytest.mark.parametrize("preset", ["strong", "lsj"])
def test_a_draw_depends_on_seed_and_number_alone(shapes: CocoDataset, preset: str) -> None:
    def batches(workers: int, start: int, augment: Any) -> list[list[Sample]]:
        cfg = _cfg(preset, COPY_PASTE=0.7)
        loader = build_train_loader(
            cfg, [shapes], images_per_rank=2, seed=3, num_workers=workers, start_batch=start, augment=augment
        )
        return list(itertools.islice(loader, 4 - start))

    for augment in (None, v2.RandomErasing(p=0.5)):
        straight = batches(0, 0, augment)
        for other, start in ((batches(2, 0, augment), 0), (batches(1, 2, augment), 2)):
            for a, b in zip(itertools.chain(*straight[start:]), itertools.chain(*other)):
                assert _equal(a, b)


def test_rotation_moves_points_as_pixels() -> None:
    """A bright square of the image lands where its corner points land; 90 degrees is exact."""
    image = np.zeros((40, 60, 3), np.uint8)
    image[10:14, 20:24] = 255
    corners = np.array([[20.0, 10], [24, 10], [24, 14], [20, 14]])
    turn = Rotate(40, 60, 90)
    found = turn.image(image)[..., 0] > 200
    moved = turn.coords(corners.copy())
    assert [*moved.min(0).round(6), *moved.max(0).round(6)] == tight_box(found).tolist()
    for degrees in (7.0, -31.0):
        turn = Rotate(40, 60, degrees)
        want = rasterize_polygons([p.ravel() for p in turn.polygons([corners.copy()])], 40, 60)
        assert (want & (turn.mask(image[..., 0]) > 0)).sum() >= 0.7 * want.sum()
    assert (turn.image(image)[0, 0] == 128).all()


def test_large_scale_jitter_fills_a_square() -> None:
    """Scaling and cutting at once gives the pixels of one after the other."""
    pixels = np.random.default_rng(0).integers(0, 256, (30, 90, 3), dtype=np.uint8)
    for seed in range(30):
        for given in (pixels, pixels[:, :, ::-1], pixels[:, :, :1]):
            resize, crop, pad = draw_jitter((30, 90), 64, (0.1, 2.0), np.random.RandomState(seed))
            assert isinstance(resize, Resize) and abs(resize.new_height * 3 - resize.new_width) <= 2
            assert 6 <= resize.new_width <= 128
            out = apply_to_image([resize, crop, pad], given)
            assert np.array_equal(out, pad.image(crop.image(resize.image(given))))
            assert out.shape == (64, 64, given.shape[2]) and (out[min(resize.new_height, 63) :, 0] == 128).all() == (
                resize.new_height < 64
            )
    assert Pad(4, 5).mask(np.ones((2, 3), np.uint8)).sum() == 6


def test_color_of_bgr_and_rgb_is_the_same() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    strengths = (0.4, 0.4, 0.4, 0.1)
    rgb = jitter_color(pixels, strengths, np.random.RandomState(1), bgr=False)
    bgr = jitter_color(pixels[:, :, ::-1], strengths, np.random.RandomState(1), bgr=True)
    assert np.array_equal(rgb, bgr[:, :, ::-1]) and not np.array_equal(rgb, pixels)
    assert jitter_color(pixels[:, :, :1], strengths, np.random.RandomState(1), bgr=True).shape == (8, 9, 1)


def _flat(color: int, masks: list[np.ndarray]) -> Sample:
    boxes = torch.from_numpy(np.array([tight_box(m) for m in masks]))
    classes = torch.arange(len(masks))
    height, width = masks[0].shape
    image = torch.full((3, height, width), color, dtype=torch.uint8)
    return Sample(image=image, targets=Targets((height, width), boxes, classes, Masks(masks)))


def _square(size: int, x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    bitmap = np.zeros((size, size), bool)
    bitmap[y0:y1, x0:x1] = True
    return bitmap


def test_pasted_objects_cover_what_is_behind_them() -> None:
    """No pixel belongs to two objects afterwards; a hidden object goes, a cut one gets a smaller box."""
    below = _flat(10, [_square(20, 0, 0, 10, 10), _square(20, 5, 5, 15, 15), _square(20, 16, 16, 18, 18)])
    above = _flat(200, [_square(20, 5, 5, 15, 15)])
    seed = next(s for s in range(50) if np.random.RandomState(s).rand(1)[0] < 0.5)
    out = copy_paste(below, above, np.random.RandomState(seed))
    targets = out["targets"]
    assert targets.boxes.tolist() == [[0, 0, 10, 10], [16, 16, 18, 18], [5, 5, 15, 15]]
    assert targets.classes.tolist() == [0, 2, 0]
    covered = np.sum(_bitmaps(targets), axis=0)
    assert covered.max() == 1 and _bitmaps(targets)[0].sum() == 100 - 25
    assert ((out["image"][0] == 200).numpy() == _bitmaps(targets)[2]).all()
    assert (below["image"] == 10).all()  # the argument is kept
    none = next(s for s in range(50) if np.random.RandomState(s).rand(1)[0] >= 0.5)
    assert copy_paste(below, above, np.random.RandomState(none)) is below


def test_pasting_draws_one_polygon_at_a_time() -> None:
    """Hundreds of objects of an image would take a byte per pixel each."""
    side, number = 512, 200
    corners = [np.array([i, 0.0, i + 9, 0, i + 9, 9, i, 9]) for i in range(number)]
    many = Targets((side, side), torch.zeros(number, 4), torch.zeros(number).long(), Masks([[p] for p in corners]))
    below = Sample(image=torch.zeros(3, side, side, dtype=torch.uint8), targets=many)
    above = _flat(200, [_square(side, 300, 300, 309, 309)])
    seed = next(s for s in range(50) if np.random.RandomState(s).rand(1)[0] < 0.5)
    tracemalloc.start()
    assert len(copy_paste(below, above, np.random.RandomState(seed))["targets"]) == number + 1
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < number * side**2 / 4


def test_pasted_from_an_image_of_another_size() -> None:
    small, large = _flat(10, [_square(8, 1, 1, 3, 3)]), _flat(200, [_square(20, 0, 0, 20, 20)])
    seeds = [s for s in range(60) if np.random.RandomState(s).rand(1)[0] < 0.5]
    for seed in seeds:
        assert copy_paste(small, large, np.random.RandomState(seed))["targets"].boxes.tolist() == [[0, 0, 8, 8]]
        onto = copy_paste(large, small, np.random.RandomState(seed))["targets"]
        assert onto.image_size == (20, 20)
        box = onto.boxes[-1]
        assert (box[2:] - box[:2]).tolist() == [2, 2] and _bitmaps(onto)[0].sum() == 400 - 4


def test_own_transform(shapes: CocoDataset) -> None:
    """A certain flip of torchvision's equals the mapper's own; global random states are untouched."""
    plain = TrainMapper(_cfg())(shapes.records[0], np.random.RandomState(0))
    before = torch.get_rng_state()
    own = TrainMapper(_cfg(), v2.RandomHorizontalFlip(p=1.0))(shapes.records[0], np.random.RandomState(0))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(own["image"], plain["image"].flip(2))
    width = plain["targets"].image_size[1]
    x0, y0, x1, y1 = plain["targets"].boxes.unbind(1)
    assert torch.equal(own["targets"].boxes, torch.stack([width - x1, y0, width - x0, y1], 1))
    for a, b in zip(_bitmaps(own["targets"]), _bitmaps(plain["targets"])):
        assert np.array_equal(a, b[:, ::-1])


def _see_red(image: Any, target: Any) -> Any:
    assert image[0].sum() > image[2].sum()
    return image, target


def test_own_transform_gets_rgb(tmp_path: Path) -> None:
    red = _flat(0, [_square(8, 1, 1, 3, 3)])
    red["image"][2] = 255  # BGR
    from gn_det.data.augment import apply_own

    assert torch.equal(apply_own(red, _see_red, np.random.RandomState(0), bgr=True)["image"], red["image"])


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (lambda image, target: image, "failed"),
        (lambda image, target: (image.float(), target), "keep uint8"),
        (lambda image, target: (image, {**target, "labels": target["labels"][:0]}), "0 labels for"),
        (lambda image, target: (image[:, :5], target), "masks that differ in size"),
    ],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_an_own_transform_that_fails_stops_the_run(
    shapes: CocoDataset, transform: Any, message: str, workers: int
) -> None:
    """It is no bad image, which would be replaced; from a worker, too, it is one line."""
    loader = build_train_loader(_cfg(), [shapes], images_per_rank=1, seed=0, num_workers=workers, augment=transform)
    with pytest.raises(ConfigError, match=f"^augment: your transform .*{message}.*$"):
        next(iter(loader))


def test_presets_leave_what_the_user_gave() -> None:
    cfg = load_config("gn_fpn.yaml", {"INPUT.MIN_SIZE_TRAIN": (400,), "INPUT.ROTATION": 3.0})
    apply_augmentation(cfg, "strong", {"INPUT.MIN_SIZE_TRAIN", "INPUT.ROTATION"})
    assert cfg.INPUT.MIN_SIZE_TRAIN == (200, 400) and cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING == "range"
    assert cfg.INPUT.ROTATION == 3.0 and cfg.INPUT.COPY_PASTE == 0.3
    apply_augmentation(cfg, "lsj")
    assert cfg.INPUT.LSJ.SIZE == 512 and cfg.INPUT.ROTATION == cfg.INPUT.COPY_PASTE == 0
    with pytest.raises(ConfigError, match="unknown preset 'storng'; known are none, light, strong, lsj"):
        apply_augmentation(cfg, "storng")


def test_copy_paste_needs_masks() -> None:
    with pytest.raises(ConfigError, match=r"INPUT.COPY_PASTE 0.5 pastes objects by .* is False; set COPY_PASTE 0$"):
        load_config("gn_fpn.yaml", {"MODEL.MASK_ON": False, "INPUT.COPY_PASTE": 0.5})
