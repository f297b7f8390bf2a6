"""Drawings: right size, marks where they belong, any name, nothing outside; curves from a real-looking log."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from gn_det.curves import _smooth, read_metrics
from gn_det.draw import class_color, draw_curves, draw_detections, draw_grid
from gn_det.errors import DataError
from gn_det.structures import Detections


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


def test_colors_are_distinct_and_stable() -> None:
    colors = [class_color(i) for i in range(80)]
    assert len(set(colors)) == 80 and colors == [class_color(i) for i in range(80)]


def test_grid() -> None:
    pictures = [np.full((h, w, 3), 50, np.uint8) for h, w in ((40, 80), (80, 40), (10, 10))]
    sheet = draw_grid(pictures, ["one", "two"], columns=2, cell=100)
    assert sheet.shape[1] == 2 * 100 + 3 * 12 and (sheet == 50).any() and (sheet[:, :12] == 255).all()
    with pytest.raises(ValueError):
        draw_grid([])


def test_curves(tmp_path) -> None:
    """A resumed run's later values win; the half line of a killed run and nan are no obstacle."""
    log = tmp_path / "metrics.json"
    lines = [{"iteration": i, "total_loss": 9.0, "loss_cls": 3.0, "lr": 0.01} for i in (19, 39, 59)]
    lines += [
        {"iteration": 39, "total_loss": 1.0, "lr": 0.02},
        {"iteration": 59, "bbox/AP": 10.0, "segm/AP": float("nan")},
    ]
    log.write_text("\n".join(json.dumps(line) for line in lines) + '\n{"iterat')
    entries = read_metrics(log)
    assert [e["iteration"] for e in entries] == [19, 39, 59] and entries[1]["total_loss"] == 1.0
    draw_curves(log, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.width > 1200
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curves.png", "metrics.json"]


def test_curves_without_metrics(tmp_path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        draw_curves(tmp_path / "metrics.json", tmp_path / "x.png")
    (tmp_path / "metrics.json").write_text("\n")
    with pytest.raises(DataError, match="no metrics"):
        draw_curves(tmp_path / "metrics.json", tmp_path / "x.png")


def test_a_mask_has_an_outline_and_small_objects_lie_on_large_ones() -> None:
    """The outline has the class's own colour, the fill a part of it; the large object is painted first."""
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


def test_lines_of_one_iteration_come_together_and_the_later_value_counts(tmp_path) -> None:
    """Losses and AP of an iteration stand in two lines; a resumed run writes an iteration again."""
    log = tmp_path / "metrics.json"
    entries = [{"iteration": 1, "lr": 0.1, "loss": 3.0}, {"iteration": 1, "AP": 7.0}, {"iteration": 1, "loss": 2.0}]
    log.write_text("".join(json.dumps(e) + "\n" for e in entries))
    assert read_metrics(log) == [{"iteration": 1, "lr": 0.1, "loss": 2.0, "AP": 7.0}]


def test_smoothing_keeps_a_line_straight_to_its_ends() -> None:
    """80 values are averaged over 5, fewer towards the ends, so that a straight line stays one."""
    line = np.arange(80.0)
    assert _smooth(line) == pytest.approx(line)
    jump = np.zeros(80)
    jump[40] = 5.0
    assert _smooth(jump)[36:45].tolist() == pytest.approx([0, 0, 1, 1, 1, 1, 1, 0, 0])
