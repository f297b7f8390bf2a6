"""Drawings: right size, marks where they belong, any name, nothing outside."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from pycocotools import mask as coco_mask

from gn_det.data.records import Record
from gn_det.structures import Detections, Masks, Sample, Targets, rasterize_polygons
from gn_det.visualize import draw
from gn_det.visualize.colors import class_color
from gn_det.visualize.draw import _eroded, draw_annotations, draw_detections, draw_grid, draw_sample


def one(box: list[float], size: tuple[int, int], label: int = 0, masks: bool = True) -> Detections:
    bitmap = torch.zeros(1, *size, dtype=torch.bool)
    bitmap[0, int(box[1]) : int(box[3]), int(box[0]) : int(box[2])] = True
    return Detections(size, torch.tensor([box]), torch.tensor([0.87]), torch.tensor([label]), bitmap if masks else None)


def test_marks_the_object_and_leaves_the_rest() -> None:
    image = np.full((700, 800, 3), 100, np.uint8)
    drawn = draw_detections(image, one([300, 300, 500, 500], (700, 800)), ["thing"])
    assert drawn.shape == image.shape and drawn.dtype == np.uint8
    assert tuple(drawn[300, 400]) == class_color(0)  # outline
    assert not np.array_equal(drawn[400, 400], image[400, 400])  # translucent fill
    assert np.array_equal(drawn[600:], image[600:]) and np.array_equal(drawn[:, :250], image[:, :250])
    assert (image == 100).all()  # the input is not changed


def test_small_images_are_scaled_up() -> None:
    drawn = draw_detections(np.zeros((30, 40, 3), np.uint8), one([3, 3, 20, 20], (30, 40)), ["a"])
    assert drawn.shape == (480, 640, 3)
    big = np.zeros((900, 1200, 3), np.uint8)
    assert draw_detections(big, one([3, 3, 20, 20], (900, 1200)), ["a"]).shape == big.shape


@pytest.mark.parametrize("box", [[-20.0, -5, 15, 12], [90.0, 40, 130, 70], [5.0, 5, 5, 5], [0.0, 0, 100, 50]])
@pytest.mark.parametrize("name", ["日本語 🐈", "x" * 300, "", "a\nb"])
def test_any_name_and_any_box_stay_in_the_picture(box: list[float], name: str) -> None:
    """Pillow raises on inverted rectangles, and draws labels outside without complaint: the label must be seen."""
    image = np.zeros((50, 100, 3), np.uint8)
    drawn = draw_detections(image, one(box, (50, 100), masks=False), [name])
    assert (np.abs(drawn.astype(int) - class_color(0)).sum(-1) == 0).sum() > 300


def test_nothing_found_and_class_without_name() -> None:
    image = np.full((64, 64, 3), 7, np.uint8)
    nothing = Detections((64, 64), torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    assert (draw_detections(image, nothing, []) == 7).all()
    draw_detections(image, one([1, 1, 9, 9], (64, 64), label=99), ["only"])


def test_grid() -> None:
    pictures = [np.full((h, w, 3), 50, np.uint8) for h, w in ((40, 80), (80, 40), (10, 10))]
    sheet = draw_grid(pictures, ["one", "two", "three"], columns=2, cell=100)
    assert sheet.shape[1] == 2 * 100 + 3 * 12 and (sheet == 50).any() and (sheet[:, :12] == 255).all()


def polygon(x: float, y: float, w: float, h: float) -> dict[str, object]:
    corners = np.array([x, y, x + w, y + h / 5, x + 0.8 * w, y + h, x, y + 0.7 * h])
    return {"bbox": [x, y, w, h], "category_id": 0, "segmentation": [corners]}


def record(height: int, width: int, annotations: list[dict[str, object]]) -> Record:
    return Record(file_name="x.png", width=width, height=height, annotations=cast(Any, annotations))


def test_annotations_are_drawn_as_ground_truth_of_the_same_masks() -> None:
    """Polygons, RLE and objects without a mask, on a picture that is scaled up and one that is not."""
    rng = np.random.default_rng(0)
    for height, width in ((60, 90), (700, 500)):
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        bitmap = np.asfortranarray(rng.random((height, width)) < 0.7)
        rle = {"bbox": [3, 4, 30, 20], "category_id": 1, "segmentation": coco_mask.encode(bitmap.astype(np.uint8))}
        bare = {"bbox": [1, 1, 12, 9], "category_id": 2}
        objects = [polygon(10, 8, 40, 30), rle, bare, polygon(30.5, 20.25, 25, 35)]
        masks = [rasterize_polygons(o.get("segmentation", []), height, width) for o in (objects[0], bare, objects[3])]
        boxes = torch.tensor([[x, y, x + w, y + h] for x, y, w, h in (o["bbox"] for o in objects)])
        truth = Masks([masks[0], bitmap, *masks[1:]])
        targets = Targets((height, width), boxes, torch.tensor([0, 1, 2, 0]), truth)
        sample = Sample(image=torch.from_numpy(image.transpose(2, 0, 1)), targets=targets)
        expected = draw_sample(sample, ["a", "日本", "c"], bgr=False)
        assert np.array_equal(draw_annotations(image, record(height, width, objects), ["a", "日本", "c"]), expected)


def test_outline_is_that_of_a_minimum_filter() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        mask = rng.random(rng.integers(1, 40, 2)) < 0.95
        reach = int(rng.integers(1, 9))
        filtered = Image.fromarray(mask.astype(np.uint8) * 255).filter(ImageFilter.MinFilter(2 * reach + 1))
        assert np.array_equal(_eroded(mask, reach), np.asarray(filtered) > 0)


def peak(work: Callable[[], np.ndarray]) -> int:
    """Most bytes that are held at once while drawing, beyond those before."""
    work()  # fonts and imports
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_is_that_of_one_mask() -> None:
    """Forty masks would be 13 copies of the picture."""
    height, width = 240, 400
    image = np.zeros((height, width, 3), np.uint8)
    found = record(height, width, [polygon(0, 0, width, height)] * 40)
    assert peak(lambda: draw_annotations(image, found, ["a"], min_size=1)) < 5 * image.nbytes
    masks = torch.ones(1, height, width, dtype=torch.bool).expand(40, -1, -1)
    boxes = torch.tensor([[0.0, 0, width, height]]).expand(40, -1)
    many = Detections((height, width), boxes, torch.ones(40), torch.zeros(40, dtype=torch.int64), masks)
    assert peak(lambda: draw_detections(image, many, ["a"], min_size=1)) < 5 * image.nbytes


def test_large_images_are_scaled_down_before_anything_is_drawn() -> None:
    image = np.full((900, 1600, 3), 90, np.uint8)
    found = record(900, 1600, [polygon(400, 200, 800, 500)])
    drawn = draw_annotations(image, found, ["a"], min_size=100, max_size=400)
    full = draw_annotations(image, found, ["a"], min_size=100)
    assert drawn.shape == (225, 400, 3) and full.shape == image.shape
    tinted, places = (drawn != 90).any(2), (full != 90).any(2)[::4, ::4]
    assert (tinted & places).sum() > 0.9 * (tinted | places).sum()
    bitmap = np.asfortranarray(rasterize_polygons(found["annotations"][0]["segmentation"], 900, 1600))
    rle = {**polygon(400, 200, 800, 500), "segmentation": coco_mask.encode(bitmap.astype(np.uint8))}
    same = draw_annotations(image, record(900, 1600, [rle]), ["a"], min_size=100, max_size=400)
    assert ((same != drawn).any(2)).mean() < 0.01  # the edge alone
    assert peak(lambda: draw_annotations(image, found, ["a"], max_size=400)) < image.nbytes


def test_a_name_of_a_million_characters_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[int] = []
    font_for = draw._font_for
    monkeypatch.setattr(draw, "_font_for", lambda text, size: (measured.append(len(text)), font_for(text, size))[1])
    image = np.zeros((64, 64, 3), np.uint8)
    draw_detections(image, one([1, 1, 9, 9], (64, 64)), ["x" * 10**6])
    assert measured and max(measured) < 300


def test_a_mask_has_an_outline_and_small_objects_lie_on_large_ones() -> None:
    """The outline has the class's own color, the fill a part of it; the large object is painted first."""
    masks = torch.zeros(2, 700, 800, dtype=torch.bool)
    masks[0, 380:420, 380:420] = True
    masks[1, 200:600, 200:600] = True
    boxes = torch.tensor([[100.0, 100, 110, 110], [90.0, 90, 120, 120]])  # elsewhere: boxes are drawn over masks
    boxes = torch.cat([boxes[:1], torch.tensor([[0.0, 0, 799, 699]])])
    both = Detections((700, 800), boxes, torch.ones(2), torch.tensor([0, 1]), masks)
    drawn = draw_detections(np.zeros((700, 800, 3), np.uint8), both, ["a", "b"])
    small, large = (np.array(class_color(k), dtype=float) for k in (0, 1))
    assert tuple(drawn[380, 400]) == class_color(0) and tuple(drawn[200, 400]) == class_color(1)
    assert np.abs(drawn[300, 400] - 0.45 * large).max() <= 1
    assert np.abs(drawn[400, 400] - (0.45 * small + 0.55 * 0.45 * large)).max() <= 2
