"""Identity: the embedded engine computes what Detectron2 computed when tests/golden/record.py ran.

Tolerances are a few times the differences that another convolution algorithm makes inside Detectron2 itself (recorded:
up to 1e-3 px and 3e-5 score, on weights calibrated to be sensitive); real differences are far larger, which
``test_golden_notices_one_gamma`` shows.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gn_det.config import get_cfg
from gn_det.modeling import MaskRCNN, build_model
from gn_det.modeling.anchors import AnchorGenerator
from gn_det.modeling.postprocess import paste_masks
from gn_det.structures import Masks
from tests.golden.model_cases import (
    BATCHES,
    CASES,
    apply_calibration,
    configure,
    fill_weights,
    flatten,
    make_scene,
    projection,
)

GOLDEN = Path(__file__).parents[1] / "golden"
EVAL_BATCHES = ("two_sizes", "tiny_odd")
BOX_ATOL = 4e-3  # pixels
SCORE_ATOL = 1e-4
LOSS_RTOL = 2e-5
GRAD_RTOL = 2e-2  # of any one parameter: a ReLU input near 0 may change sign
GRAD_RTOL_MEDIAN = 2e-3


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> tuple[MaskRCNN, dict[str, np.ndarray], dict[str, Any]]:
    """Our model with the recorded weights, the recorded arrays, and their description."""
    arrays = dict(np.load(GOLDEN / f"{request.param}.npz"))
    meta = json.loads(arrays["meta"].tobytes())
    model = build_model(configure(get_cfg(), request.param))
    fill_weights(model)
    apply_calibration(model, meta["calibration"])
    return model, arrays, meta


def differences(model: MaskRCNN, arrays: dict[str, np.ndarray], batch: str) -> tuple[float, float, float]:
    """Largest differences of boxes (pixels), scores and mask pixels (share); inf where detections do not pair up.

    Images whose detections depend on rounding are not recorded (record.py) and are left out.
    """
    model.eval()
    worst = [0.0, 0.0, 0.0]
    for i, found in enumerate(model.detect(flatten(BATCHES[batch]()))):
        key = f"{batch}/{i}"
        if f"{key}/classes" not in arrays:
            continue
        if not np.array_equal(found.classes.numpy(), arrays[f"{key}/classes"]):
            return float("inf"), float("inf"), float("inf")
        worst[0] = max(worst[0], float(np.abs(found.boxes.numpy() - arrays[f"{key}/boxes"]).max(initial=0)))
        worst[1] = max(worst[1], float(np.abs(found.scores.numpy() - arrays[f"{key}/scores"]).max(initial=0)))
        if f"{key}/mask_area" in arrays:
            assert found.masks is not None
            masks = found.masks.numpy()
            area, columns = masks.sum(axis=(1, 2)), masks.sum(axis=1).sum(axis=0)
            wrong = (
                np.abs(area - arrays[f"{key}/mask_area"]).sum() + np.abs(columns - arrays[f"{key}/mask_columns"]).sum()
            )
            worst[2] = max(worst[2], float(wrong / max(1, area.sum())))
    return worst[0], worst[1], worst[2]


def test_state_dict_is_that_of_detectron2(case: Any) -> None:
    """Names, order and shapes: a checkpoint of either engine loads strictly on the other."""
    model, _, meta = case
    assert [(k, list(v.shape)) for k, v in model.state_dict().items()] == list(map(tuple, meta["state"].items()))


@pytest.mark.parametrize("batch", EVAL_BATCHES)
def test_detections(case: Any, batch: str) -> None:
    model, arrays, _ = case
    assert f"{batch}/0/classes" in arrays
    box, score, mask = differences(model, arrays, batch)
    assert box <= BOX_ATOL
    assert score <= SCORE_ATOL
    assert mask <= 2e-3  # a pixel on the threshold may flip


@pytest.mark.parametrize("batch", ["one_empty", "bitmaps"])
def test_losses_and_gradients(case: Any, batch: str) -> None:
    """Five losses, every gradient's norm and projection, and the logged scalars, under the recorded seed."""
    model, arrays, meta = case
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    model.zero_grad()
    model.pop_metrics()
    torch.manual_seed(meta["seeds"][batch])
    losses = model(flatten(BATCHES[batch]()))
    sum(losses.values()).backward()
    model.load_state_dict(before)  # BatchNorm statistics moved
    expected = meta["losses"][batch]
    assert list(losses) == list(expected)
    for name, value in losses.items():
        assert value.item() == pytest.approx(expected[name], rel=LOSS_RTOL, abs=1e-6), name
    assert model.pop_metrics() == pytest.approx(meta["metrics"][batch], rel=1e-5, abs=2e-3)
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert list(grads) == meta["grad_names"]
    norms = arrays[f"{batch}/grad_norm"]
    projections = arrays[f"{batch}/grad_projection"]
    norm_off = np.abs([float(g.norm()) for g in grads.values()] - norms) / (norms + 1e-6)
    projection_off = np.abs([projection(n, g) for n, g in grads.items()] - projections) / (norms + 1e-6)
    for off in (norm_off, projection_off):
        assert off.max() <= GRAD_RTOL, list(grads)[int(off.argmax())]
        assert np.median(off) <= GRAD_RTOL_MEDIAN


def test_golden_notices_one_gamma() -> None:
    """One gamma of the stem, off by 1e-4, moves the detections beyond the tolerances above."""
    arrays = dict(np.load(GOLDEN / "gn_fpn.npz"))
    model = build_model(configure(get_cfg(), "gn_fpn"))
    fill_weights(model)
    apply_calibration(model, json.loads(arrays["meta"].tobytes())["calibration"])
    with torch.no_grad():
        model.backbone.bottom_up.stem.conv1.norm.weight[3] += 1e-4
    box, score, _ = differences(model, arrays, "two_sizes")
    assert box > BOX_ATOL or score > SCORE_ATOL


def test_anchors() -> None:
    generator = AnchorGenerator(
        sizes=[[32], [64], [128]], aspect_ratios=[[0.5, 1.0, 2.0]], strides=[4, 8, 16], offset=0.5
    )
    anchors = torch.cat(generator([(7, 5), (4, 3), (2, 2)])).numpy()
    np.testing.assert_array_equal(anchors, np.load(GOLDEN / "parts.npz")["anchors"])


@pytest.mark.parametrize("kind", ["polygon", "bitmap"])
def test_mask_targets(kind: str) -> None:
    scene = make_scene(21, 90, 120, 6, bitmaps=kind == "bitmap")
    boxes = torch.from_numpy(scene.boxes) + torch.tensor([-3.3, 2.1, 4.7, -1.9])
    targets = Masks(scene.masks).crop_and_resize(boxes, 28)
    np.testing.assert_array_equal(np.packbits(targets.numpy()), np.load(GOLDEN / "parts.npz")[f"targets/{kind}"])


def test_pasted_masks() -> None:
    soft = torch.from_numpy(np.random.RandomState(22).uniform(size=(6, 28, 28)).astype(np.float32))
    pasted = paste_masks(soft, torch.from_numpy(make_scene(21, 90, 120, 6).boxes), 90, 120)
    np.testing.assert_array_equal(np.packbits(pasted.numpy()), np.load(GOLDEN / "parts.npz")["pasted"])
