"""Record what real Detectron2 computes, for machines without it: ``python tests/golden/record.py``.

Writes one small ``<case>.npz`` per model family and ``parts.npz`` beside this file. Results are kept only if they do
not depend on the last bits: the same run with another convolution algorithm must give the same detections.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[2]))

from gn_det.config import get_cfg
from gn_det.modeling import build_model
from tests.golden.d2_side import build_detectron2, detectron2_detections, detectron2_losses
from tests.golden.model_cases import (
    BATCHES,
    CASES,
    apply_calibration,
    calibration_batch,
    configure,
    fill_weights,
    make_scene,
    measure_calibration,
    projection,
)

HERE = Path(__file__).parent
EVAL_BATCHES = ("two_sizes", "tiny_odd")
TRAIN_BATCHES = ("one_empty", "bitmaps")


@dataclass
class TrainRun:
    """One training forward and backward."""

    losses: dict[str, float]
    metrics: dict[str, float]
    grads: dict[str, torch.Tensor]

    def sizes(self) -> tuple[np.ndarray, np.ndarray]:
        """Losses and gradient norms, away from 0."""
        return (
            np.array(list(self.losses.values())) + 1e-9,
            np.array([float(g.norm()) for g in self.grads.values()]) + 1e-9,
        )


def train_once(model: nn.Module, calibration: dict[str, Any], batch: str, seed: int) -> TrainRun:
    """Detectron2's losses and gradients from the case's weights."""
    fill_weights(model)  # a BatchNorm case moves its statistics in training
    apply_calibration(model, calibration)
    losses, metrics = detectron2_losses(model, BATCHES[batch](), seed)
    model.zero_grad()
    sum(losses.values()).backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return TrainRun({n: float(v.detach()) for n, v in losses.items()}, metrics, grads)


def prepared_detectron2(case: str) -> tuple[nn.Module, dict[str, Any]]:
    """Detectron2's model with the case's weights, and the calibration that made them."""
    probe = build_model(configure(get_cfg(), case))
    fill_weights(probe)
    calibration = measure_calibration(probe, calibration_batch())
    model = build_detectron2(case)
    fill_weights(model)
    apply_calibration(model, calibration)
    return model, calibration


def record_case(case: str) -> dict[str, np.ndarray]:
    """All golden arrays of one case."""
    model, calibration = prepared_detectron2(case)
    state = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    arrays: dict[str, np.ndarray] = {}
    for batch in EVAL_BATCHES:
        scenes = BATCHES[batch]()
        _, detections = detectron2_detections(model, scenes)
        with torch.backends.mkldnn.flags(enabled=False):
            _, again = detectron2_detections(model, scenes)
        for i, (found, other) in enumerate(zip(detections, again)):
            key = f"{batch}/{i}"
            stable = len(found) == len(other) and torch.equal(found.pred_classes, other.pred_classes)
            if stable:
                noise = (
                    (found.pred_boxes.tensor - other.pred_boxes.tensor).abs().max(),
                    (found.scores - other.scores).abs().max(),
                )
                print(f"  {key}: {len(found)} detections, noise {noise[0]:.1e} px, score {noise[1]:.1e}")
            else:
                print(f"  {key}: depends on rounding, left out")
                continue
            arrays[f"{key}/boxes"] = found.pred_boxes.tensor.numpy()
            arrays[f"{key}/scores"] = found.scores.numpy()
            arrays[f"{key}/classes"] = found.pred_classes.numpy().astype(np.int16)
            if found.has("pred_masks"):
                masks = found.pred_masks.numpy()
                arrays[f"{key}/mask_area"] = masks.sum(axis=(1, 2)).astype(np.int32)
                arrays[f"{key}/mask_columns"] = masks.sum(axis=1).sum(axis=0).astype(np.int32)
    meta: dict[str, Any] = {"state": state, "calibration": calibration, "seeds": {}, "losses": {}, "metrics": {}}
    for batch in TRAIN_BATCHES:
        for seed in range(5, 25):
            run = train_once(model, calibration, batch, seed)
            with torch.backends.mkldnn.flags(enabled=False):
                other = train_once(model, calibration, batch, seed)
            loss_noise, grad_noise = (np.abs(a / b - 1).max() for a, b in zip(run.sizes(), other.sizes()))
            print(f"  {batch}, seed {seed}: noise {loss_noise:.1e} in losses, {grad_noise:.1e} in gradients")
            # Gradients jump where a ReLU input changes sign; losses jump only if other samples were chosen.
            if loss_noise < 1e-5 and grad_noise < 5e-3:
                break
        else:
            raise SystemExit(f"{case} {batch}: no seed gives the same result with another convolution algorithm")
        meta["seeds"][batch] = seed
        meta["losses"][batch] = run.losses
        meta["metrics"][batch] = run.metrics
        meta["grad_names"] = list(run.grads)
        arrays[f"{batch}/grad_norm"] = np.array([float(g.norm()) for g in run.grads.values()], dtype=np.float32)
        arrays[f"{batch}/grad_projection"] = np.array(
            [projection(n, g) for n, g in run.grads.items()], dtype=np.float32
        )
    meta["versions"] = {"torch": torch.__version__, "numpy": np.__version__}
    arrays["meta"] = np.frombuffer(json.dumps(meta, separators=(",", ":")).encode(), dtype=np.uint8)
    return arrays


def record_parts() -> dict[str, np.ndarray]:
    """Anchors, mask targets and pasted masks of single functions."""
    from detectron2.layers import paste_masks_in_image
    from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
    from detectron2.structures import BitMasks, PolygonMasks

    arrays = {}
    generator = DefaultAnchorGenerator(
        sizes=[[32], [64], [128]], aspect_ratios=[[0.5, 1.0, 2.0]], strides=[4, 8, 16], offset=0.5
    )
    features = [torch.zeros(1, 1, 7, 5), torch.zeros(1, 1, 4, 3), torch.zeros(1, 1, 2, 2)]
    arrays["anchors"] = torch.cat([b.tensor for b in generator(features)]).numpy()
    for kind in ("polygon", "bitmap"):
        scene = make_scene(21, 90, 120, 6, bitmaps=kind == "bitmap")
        masks = PolygonMasks(scene.masks) if kind == "polygon" else BitMasks(torch.from_numpy(np.stack(scene.masks)))
        boxes = torch.from_numpy(scene.boxes) + torch.tensor([-3.3, 2.1, 4.7, -1.9])
        arrays[f"targets/{kind}"] = np.packbits(masks.crop_and_resize(boxes, 28).numpy())
    rng = np.random.RandomState(22)
    soft = torch.from_numpy(rng.uniform(size=(6, 28, 28)).astype(np.float32))
    pasted = paste_masks_in_image(soft, torch.from_numpy(make_scene(21, 90, 120, 6).boxes), (90, 120))
    arrays["pasted"] = np.packbits(pasted.numpy())
    return arrays


def main() -> None:
    """Record every case and print the sizes."""
    torch.set_num_threads(1)
    np.savez_compressed(HERE / "parts.npz", **record_parts())
    for case in sys.argv[1:] or CASES:
        print(case)
        np.savez_compressed(HERE / f"{case}.npz", **record_case(case))
    total = sum(f.stat().st_size for f in HERE.glob("*.npz"))
    print(f"{total / 1000:.0f} kB in all")


if __name__ == "__main__":
    main()
