"""Identity: the graph gives the detections of MaskRCNN, without being exported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.ops import nms

from gn_det.deploy.graph import GraphDetector, best_of, onnx_nms, paste, portable_nms
from gn_det.deploy.parity import match
from gn_det.modeling.postprocess import paste_masks
from gn_det.structures import Detections
from tests.deploy.cases import golden_model
from tests.golden.model_cases import BATCHES, CASES, flatten


def inputs(model: Any, samples: list[Any], image_format: str = "BGR") -> tuple[Tensor, Tensor]:
    """Image and size as the graph takes them; what is outside of an image is noise, which must not count."""
    padded, sizes = model.preprocess(samples)
    image = torch.randint(0, 256, (len(samples), *padded.shape[2:], 3), dtype=torch.uint8)
    for part, sample, (h, w) in zip(image, samples, sizes):
        pixels = sample["image"].flip(0) if image_format == "BGR" else sample["image"]
        part[:h, :w] = pixels.permute(1, 2, 0)
    return image, torch.tensor(sizes)


@torch.no_grad()
def compare(model: Any, graph: GraphDetector, samples: list[Any], *, box: float = 4e-3, score: float = 1e-4) -> int:
    """Check the graph's outputs, in any order of nearly equal scores; returns the number of detections.

    The tolerances are those of tests/modeling/test_golden.py: these weights amplify the last bit.
    """
    _, expected = model.detect_raw(samples)
    out = dict(zip(graph.outputs, graph(*inputs(model, samples))))
    assert out["counts"].tolist() == [len(d) for d in expected]
    parts = {name: torch.split(value, out["counts"].tolist()) for name, value in out.items() if name != "counts"}
    for i, left in enumerate(expected):
        right = Detections(left.image_size, *(parts[name][i] for name in ("boxes", "scores", "classes")))
        assert bool((right.scores[:-1] >= right.scores[1:]).all())
        pairs, alone = match(left, right, 0.0)
        assert alone == 0 and len(pairs) == len(left)
        a, b = pairs.T
        torch.testing.assert_close(right.boxes[b], left.boxes[a], atol=box, rtol=0)
        torch.testing.assert_close(right.scores[b], left.scores[a], atol=score, rtol=0)
        if left.masks is not None:
            torch.testing.assert_close(parts["masks"][i][b], left.masks[a], atol=1e-3, rtol=0)
    return len(out["scores"])


@pytest.mark.parametrize("case", CASES)
def test_same_detections(case: str) -> None:
    """FPN and C4; GN, frozen BN and BN; two images of different size, and a tiny one."""
    cfg, model = golden_model(case)
    graph = GraphDetector(model, cfg.INPUT.FORMAT)
    assert compare(model, graph, flatten(BATCHES["two_sizes"]())) > 10
    assert compare(model, graph, flatten(BATCHES["tiny_odd"]())) > 0
    assert ("masks" in graph.outputs) == cfg.MODEL.MASK_ON


def test_notices_one_gamma() -> None:
    """The comparison fails where one parameter differs."""
    cfg, model = golden_model("gn_fpn")
    graph = GraphDetector(model, cfg.INPUT.FORMAT)
    with torch.no_grad():
        next(m for m in graph.modules() if type(m).__name__ == "_PlainGroupNorm").weight[0] += 0.1
    with pytest.raises(AssertionError):
        compare(model, graph, flatten(BATCHES["two_sizes"]()))


@pytest.mark.parametrize("norm", ["LN", "IN", "BN"])
def test_other_norms_of_the_backbone(norm: str) -> None:
    cfg, model = golden_model("gn_fpn", MODEL__RESNETS__NORM=norm, MODEL__BACKBONE__FREEZE_AT=0)
    compare(model, GraphDetector(model, cfg.INPUT.FORMAT), flatten(BATCHES["two_sizes"]()))


def test_no_detections_beside_an_image_with_some() -> None:
    """Images of a batch do not touch each other, and an image without detections has a count of 0."""
    cfg, model = golden_model("gn_fpn_2fc", MODEL__ROI_HEADS__SCORE_THRESH_TEST=0.9)
    graph = GraphDetector(model, cfg.INPUT.FORMAT)
    assert compare(model, graph, flatten(BATCHES["tiny_odd"]())) == 0
    model.roi_heads.box_predictor.score_thresh = graph.roi_heads.box_predictor.score_thresh = 0.1
    model.roi_heads.box_predictor.topk = graph.topk = 3
    assert compare(model, graph, flatten(BATCHES["two_sizes"]())) == 6


def test_rgb_model_and_unlimited_detections() -> None:
    _, model = golden_model("gn_fpn_2fc", TEST__DETECTIONS_PER_IMAGE=-1)
    samples = flatten(BATCHES["two_sizes"]())
    graph = GraphDetector(model, "RGB")
    _, expected = model.detect_raw(samples)
    with torch.no_grad():
        boxes, *_, counts = graph(*inputs(model, samples, "RGB"))
    assert counts.tolist() == [len(d) for d in expected] and counts.sum() > 80
    torch.testing.assert_close(boxes.sum(0), torch.cat([d.boxes for d in expected]).sum(0), atol=0.5, rtol=1e-5)


def test_half_precision_stays_near() -> None:
    """Boxes are decoded and pooled in float32: in float16 corners of a 1,000 px image would move by half a pixel."""
    cfg, model = golden_model("gn_fpn_2fc")
    samples = flatten(BATCHES["tiny_odd"]())
    _, expected = model.detect_raw(samples)
    with torch.no_grad():
        boxes, scores, *_ = GraphDetector(model, cfg.INPUT.FORMAT, half=True)(*inputs(model, samples))
    assert boxes.dtype == scores.dtype == torch.float32
    nearest = [(boxes - box).abs().amax(1).min().item() for box in expected[0].boxes[:5]]
    assert 0 < max(nearest) < 1.0


@pytest.mark.parametrize("suppress", [portable_nms, onnx_nms])
def test_suppression_within_groups_only(suppress: Callable[[Tensor, Tensor, float], Tensor]) -> None:
    """Equal to torchvision's nms on each group and list, with -inf left out."""
    rng = np.random.RandomState(0)
    corner = rng.uniform(0, 50, (3, 40, 2))
    boxes = torch.from_numpy(np.concatenate([corner, corner + rng.uniform(5, 40, (3, 40, 2))], 2)).float()
    scores = torch.from_numpy(rng.uniform(0, 1, (3, 2, 40))).float()
    scores[:, :, ::5] = float("-inf")
    expected = set()
    for g in range(3):
        for c in range(2):
            rows = (scores[g, c] > float("-inf")).nonzero().squeeze(1)
            expected |= {(g, c, int(r)) for r in rows[nms(boxes[g, rows], scores[g, c, rows], 0.3)]}
    found = suppress(boxes, scores, 0.3)
    assert set(map(tuple, found.tolist())) == expected and len(found) == len(expected) < 6 * 32
    empty = suppress(torch.zeros(2, 0, 4), torch.zeros(2, 1, 0), 0.5)
    assert empty.shape == (0, 3)


def test_best_of_each_image() -> None:
    scores = torch.tensor([0.1, 0.9, 0.5, 0.7, 0.2])
    owner = torch.tensor([2, 0, 2, 0, 0])
    image, position = best_of(scores, owner, 3, 2)
    assert image.tolist() == [0, 0, 2, 2] and position.tolist() == [1, 3, 2, 0]


def test_paste_equals_grid_sample() -> None:
    """Masks at the size of the input are those of paste_masks, up to pixels on the threshold."""
    rng = np.random.RandomState(1)
    masks = torch.from_numpy(rng.uniform(0, 1, (6, 28, 28))).float()
    corner = rng.uniform(0, 60, (6, 2))
    boxes = torch.from_numpy(np.concatenate([corner, corner + rng.uniform(0.5, 40, (6, 2))], 1)).float()
    expected = paste_masks(masks, boxes, 83, 101)
    found = paste(masks, boxes, 83, 101)
    assert expected.any(dim=(1, 2)).sum() >= 5
    assert (found != expected).sum() <= 2
