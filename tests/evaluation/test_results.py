"""Detections become COCO results; results of ranks merge; the loop reports progress."""

from __future__ import annotations

import json
import math
import re
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torch import nn

from gn_det.errors import DataError
from gn_det.evaluation import results as results_module
from gn_det.evaluation.inference import run_inference
from gn_det.evaluation.results import (
    CocoResults,
    ImageResults,
    detections_to_coco,
    encode_masks,
    format_results,
    write_results,
)
from gn_det.structures import Detections


def detections(n: int, *, masks: bool = True, size: tuple[int, int] = (7, 9)) -> Detections:
    corners = torch.rand(n, 2) * 3
    boxes = torch.cat([corners, corners + 1 + torch.rand(n, 2)], 1)
    bitmaps = torch.rand(n, *size) > 0.5 if masks else None
    return Detections(size, boxes, torch.rand(n), torch.arange(n) % 3, bitmaps)


def test_one_entry_per_detection() -> None:
    """XYWH, json category ids, masks that decode to the same pixels."""
    det = detections(4)
    out = detections_to_coco(77, det, (5, 8, 13))
    assert [r["category_id"] for r in out] == [5, 8, 13, 5]
    assert {r["image_id"] for r in out} == {77}
    for r, box, score, mask in zip(out, det.boxes, det.scores, det.masks):
        x, y, w, h = r["bbox"]
        assert torch.allclose(torch.tensor([x, y, x + w, y + h]), box, atol=1e-6)
        assert r["score"] == score.item() and isinstance(r["segmentation"]["counts"], str)
        assert np.array_equal(coco_mask.decode(r["segmentation"]).astype(bool), mask.numpy())


def test_no_detections_and_no_masks() -> None:
    assert detections_to_coco(1, detections(0), (1,)) == []
    assert "segmentation" not in detections_to_coco(1, detections(2, masks=False), (1, 2))[0]
    assert encode_masks(torch.zeros(0, 4, 5, dtype=torch.bool)) == []


def test_encoding_is_pycocotools_own() -> None:
    """Text for text: noise, empty, full, one pixel in each corner, a column, a single-row and single-column image."""
    cases = [torch.rand(9, 13) > 0.5, torch.zeros(9, 13), torch.ones(9, 13), torch.zeros(9, 13), torch.ones(1, 5)]
    cases += [torch.ones(5, 1), torch.rand(1, 7) > 0.5, torch.rand(300, 200) > 0.999]
    cases[3][:, 4] = 1
    for y, x in ((0, 0), (0, -1), (-1, 0), (-1, -1)):
        corner = torch.zeros(9, 13)
        corner[y, x] = 1
        cases.append(corner)
    for case in cases:
        bitmap = case.bool()
        expected = coco_mask.encode(np.asfortranarray(bitmap.numpy().astype(np.uint8)))
        assert encode_masks(bitmap[None]) == [{"size": list(bitmap.shape), "counts": expected["counts"].decode()}]


def test_more_classes_than_categories_is_explained() -> None:
    with pytest.raises(DataError, match=r"NUM_CLASSES 2"):
        detections_to_coco(1, detections(3), (1, 2))


@pytest.mark.parametrize("masks", [True, False])
def test_compact_results_are_the_same_sequence(masks: bool) -> None:
    """Iteration, every index and slice, and the file equal those of the list of entries, also with empty images."""
    shots = [(k, detections(n, masks=masks, size=(7 + k, 9))) for k, n in enumerate((2, 0, 5, 1, 0))]
    plain = [entry for k, det in shots for entry in detections_to_coco(k, det, (5, 8, 13))]
    packed = CocoResults(ImageResults.of(k, det, (5, 8, 13)) for k, det in shots)
    assert list(packed) == plain and len(packed) == len(plain) == 8
    assert [packed[k] for k in range(-8, 8)] == plain + plain
    assert packed[1:7:2] == plain[1:7:2] and packed[:0] == []
    with pytest.raises(IndexError):
        packed[8]


def test_an_image_of_two_ranks_counts_once() -> None:
    a, b, c = (ImageResults.of(k, detections(2), (1, 2, 3)) for k in (1, 2, 1))
    assert list(CocoResults([a, b, c])) == [*a, *b]


def test_results_file_in_parts(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = detections_to_coco("ä", detections(7), (1, 2, 3))
    for part in (3, 7, 100):
        monkeypatch.setattr(results_module, "_PART", part)
        assert Path(write_results(plain, tmp_path)).read_text("utf-8") == json.dumps(plain, ensure_ascii=False)
    assert Path(write_results([], tmp_path)).read_text("utf-8") == "[]"


def test_ten_times_less_memory_than_entries() -> None:
    det = detections(100, size=(30, 40))
    sizes = []
    for make in (ImageResults.of, detections_to_coco):
        tracemalloc.start()
        kept = [make(k, det, (1, 2, 3)) for k in range(50)]
        sizes.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        assert len(kept) == 50
    texts = 50 * sum(len(r["segmentation"]["counts"]) for r in detections_to_coco(0, det, (1, 2, 3)))
    assert 5 * (sizes[0] - texts) < sizes[1] - texts


def test_inference_puts_the_model_in_eval_mode_and_reports() -> None:
    """An image that the sampler repeats counts once; train mode comes back."""

    class Model(nn.Module):
        def forward(self, samples):
            assert not self.training and torch.is_inference_mode_enabled()
            return [detections(2) for _ in samples]

    model, seen = Model().train(), []
    batches = [[{"image_id": 1}, {"image_id": 2}], [{"image_id": 3}, {"image_id": 1}]]
    out = run_inference(model, batches, (1, 2, 3), on_progress=seen.append, total=4)
    assert [r["image_id"] for r in out] == [1, 1, 2, 2, 3, 3]
    assert model.training
    assert [(p.images, p.total) for p in seen] == [(2, 4), (4, 4)] and seen[-1].eta_seconds == 0


def test_tables() -> None:
    metrics = {"AP": 12.34567, "AP50": 50.0, "AP75": 0.0, "APs": math.nan, "APm": 1.0, "APl": 2.0}
    text = format_results({"bbox": metrics | {"AP-cat": 1.5, "AP-dog": math.nan}})
    assert re.search(r"\|\s+AP\s+\|\s+AP50\s+\|", text) and re.search(r"\| 12\.346 \| 50\.000 \|", text)
    assert "| category   | AP    | category   | AP   |" in text
    assert text.endswith(
        "copypaste: Task: bbox\ncopypaste: AP,AP50,AP75,APs,APm,APl\n"
        "copypaste: 12.3457,50.0000,0.0000,nan,1.0000,2.0000"
    )


def test_categories_stand_three_a_row() -> None:
    """Whatever the number of categories, each once, in order, and rows are filled up."""
    names = [f"c{k}" for k in range(4)]
    text = format_results({"bbox": {"AP": 1.0} | {f"AP-{name}": float(k) for k, name in enumerate(names)}})
    rows = [re.findall(r"c\d", line) for line in text.splitlines() if re.search(r"c\d", line)]
    assert rows == [["c0", "c1", "c2"], ["c3"]]
