"""Models, weights and batches that are the same wherever they are made: shared by the recorder and by the tests.

Weights come from a formula: a frozen NumPy generator seeded with each tensor's name, then a calibration. Plain random
weights hide errors (square anchors dominate, few classes fire), so objectness is centered and scaled per anchor type
and scores per class, with scales and shifts that the recorder writes down.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gn_det.structures import Masks, Sample, Targets

NUM_CLASSES = 24

_NARROW: dict[str, Any] = {
    "MODEL.DEVICE": "cpu",
    "MODEL.MASK_ON": True,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 32,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 32,
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 400,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 200,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 120,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 60,
    "MODEL.RPN.BATCH_SIZE_PER_IMAGE": 64,
    "MODEL.ROI_HEADS.NUM_CLASSES": NUM_CLASSES,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 32,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.1,
    "MODEL.ROI_MASK_HEAD.CONV_DIM": 64,
    "TEST.DETECTIONS_PER_IMAGE": 40,
}

_FPN: dict[str, Any] = {
    **_NARROW,
    "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
    "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.FPN.OUT_CHANNELS": 64,
    "MODEL.ANCHOR_GENERATOR.SIZES": [[16], [32], [64], [128], [256]],
    "MODEL.RPN.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
    "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
    "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3", "p4", "p5"],
    "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 7,
    "MODEL.ROI_BOX_HEAD.NUM_FC": 1,
    "MODEL.ROI_BOX_HEAD.CONV_DIM": 64,
    "MODEL.ROI_BOX_HEAD.FC_DIM": 64,
    "MODEL.ROI_MASK_HEAD.NUM_CONV": 4,
}

_C4: dict[str, Any] = {
    **_NARROW,
    "MODEL.BACKBONE.NAME": "build_resnet_backbone",
    "MODEL.ANCHOR_GENERATOR.SIZES": [[16, 32, 64, 128]],
    "MODEL.RPN.IN_FEATURES": ["res4"],
    "MODEL.ROI_HEADS.NAME": "Res5ROIHeads",
    "MODEL.ROI_HEADS.IN_FEATURES": ["res4"],
    "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 8,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 30,
}

_GN = {"MODEL.RESNETS.NORM": "GN", "MODEL.RESNETS.STRIDE_IN_1X1": False}
_GN_HEADS = {"MODEL.FPN.NORM": "GN", "MODEL.ROI_BOX_HEAD.NORM": "GN", "MODEL.ROI_MASK_HEAD.NORM": "GN"}
_R18 = {
    "MODEL.RESNETS.DEPTH": 18,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 64,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
    "MODEL.RESNETS.NORM": "BN",
}

#: name -> keys and values over Detectron2's defaults.
CASES: dict[str, dict[str, Any]] = {
    "gn_fpn": {**_FPN, **_GN, **_GN_HEADS, "MODEL.ROI_BOX_HEAD.NUM_CONV": 4},
    "gn_fpn_2fc": {**_FPN, **_GN, "MODEL.FPN.NORM": "GN", "MODEL.ROI_BOX_HEAD.NUM_FC": 2},
    "gn_scratch": {
        **_FPN,
        **_GN,
        **_GN_HEADS,
        "MODEL.ROI_BOX_HEAD.NUM_CONV": 4,
        "MODEL.BACKBONE.FREEZE_AT": 0,
        "MODEL.PIXEL_STD": [57.375, 57.12, 58.395],
    },
    "bn_fpn": {**_FPN, "MODEL.ROI_BOX_HEAD.NUM_FC": 2},
    "bn_fpn_4conv1fc": {**_FPN, "MODEL.ROI_BOX_HEAD.NUM_CONV": 4, "MODEL.RPN.BBOX_REG_LOSS_WEIGHT": 0.5},
    "bn_fpn_gn_head": {**_FPN, **_GN_HEADS, "MODEL.ROI_BOX_HEAD.NUM_CONV": 4, "MODEL.BACKBONE.FREEZE_AT": 0},
    "gn_c4": {**_C4, **_GN, "MODEL.ROI_MASK_HEAD.NUM_CONV": 0},
    "bn_c4": {**_C4, "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA": 0.1, "MODEL.RPN.SMOOTH_L1_BETA": 0.1},
    "bn_c4_boxes": {**_C4, "MODEL.MASK_ON": False, "MODEL.PROPOSAL_GENERATOR.MIN_SIZE": 8},
    "resnext": {
        **_FPN,
        **_GN,
        **_GN_HEADS,
        "MODEL.RESNETS.NUM_GROUPS": 4,
        "MODEL.RESNETS.WIDTH_PER_GROUP": 8,
        "MODEL.FPN.FUSE_TYPE": "avg",
        "MODEL.ROI_BOX_HEAD.NUM_FC": 2,
        "MODEL.ANCHOR_GENERATOR.OFFSET": 0.5,
        "MODEL.BACKBONE.FREEZE_AT": 1,
    },
    "cascade": {
        **_FPN,
        **_GN,
        **_GN_HEADS,
        "MODEL.ROI_HEADS.NAME": "CascadeROIHeads",
        "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG": True,
        "MODEL.ROI_BOX_HEAD.NUM_CONV": 2,
        "MODEL.RPN.POST_NMS_TOPK_TRAIN": 400,
    },
    "r18": {**_FPN, **_R18, "MODEL.ROI_BOX_HEAD.NUM_FC": 2, "MODEL.PIXEL_STD": [57.4, 57.1, 58.4]},
}


def configure(cfg: Any, case: str, **changes: Any) -> Any:
    """Apply a case to a fresh cfg of either engine. ``changes`` are dotted keys with "." written as "__"."""
    values = {**CASES[case], **{key.replace("__", "."): value for key, value in changes.items()}}
    cfg.merge_from_list([part for item in values.items() for part in item])
    return cfg


# ---------------------------------------------------------------- weights


def _normal(name: str, shape: torch.Size) -> np.ndarray:
    return np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape))


def fill_weights(model: nn.Module) -> None:
    """Overwrite every parameter and buffer of the state dict by its formula; every gamma and beta is perturbed."""
    norms = {name for name, module in model.named_modules() if name.endswith("norm")}
    state = model.state_dict()
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            continue
        value = _normal(name, tensor.shape)
        owner, kind = name.rsplit(".", 1)
        if owner in norms:
            value = {
                "weight": 1 + 0.2 * value,
                "bias": 0.2 * value,
                "running_mean": 0.2 * value,
                "running_var": np.exp(0.2 * value),
            }[kind]
            if kind == "weight" and owner.endswith(("conv3.norm", "res2.0.conv2.norm")):
                value = 0.5 * value  # keeps the sum over many residual blocks in range
        elif kind == "bias":
            value = 0.1 * value
        else:
            value = value * np.sqrt(2.0 / max(1, tensor[0].numel()))
        tensor.copy_(torch.from_numpy(value))


#: Layers that are calibrated, with the wanted standard deviation of their outputs.
CALIBRATED = {
    "proposal_generator.rpn_head.objectness_logits": 2.0,
    "proposal_generator.rpn_head.anchor_deltas": 0.25,
    "roi_heads.box_predictor.cls_score": 1.5,
    "roi_heads.box_predictor.bbox_pred": 0.8,
    **{f"roi_heads.box_predictor.{k}.cls_score": 1.5 for k in range(3)},
    **{f"roi_heads.box_predictor.{k}.bbox_pred": 0.8 for k in range(3)},
    "roi_heads.mask_head.predictor": 1.5,
}

#: Per layer: factor and shift of each output channel.
Calibration = dict[str, tuple[list[float], list[float]]]


@torch.no_grad()
def measure_calibration(model: nn.Module, batch: list[Sample]) -> Calibration:
    """Factors and shifts (rounded: they are written down) that give every channel mean 0 and the wanted spread."""
    modules = dict(model.named_modules())
    calibration: Calibration = {}
    model.eval()
    for name, wanted in CALIBRATED.items():
        if name not in modules:
            continue
        layer = modules[name]
        seen: list[Tensor] = []
        handle = layer.register_forward_hook(lambda _m, _i, out, seen=seen: seen.append(out.detach()))
        model(batch)
        handle.remove()
        rows = torch.cat([x.movedim(1, -1).flatten(0, -2) for x in seen])
        factor = [float(f"{v:.3g}") for v in (wanted / rows.std(dim=0).clamp(min=1e-3)).tolist()]
        mean = [float(f"{v:.3g}") for v in rows.mean(dim=0).tolist()]
        shift = [-m * f for m, f in zip(mean, factor)]
        if name.endswith("cls_score"):
            shift[-1] += 1.0  # background
        calibration[name] = (factor, shift)
        apply_calibration(model, {name: calibration[name]})
    return calibration


@torch.no_grad()
def apply_calibration(model: nn.Module, calibration: Calibration) -> None:
    """Scale and shift the output channels of the calibrated layers."""
    modules = dict(model.named_modules())
    for name, (factor, shift) in calibration.items():
        layer = modules[name]
        f, s = torch.tensor(factor), torch.tensor(shift)
        layer.weight *= f.view(-1, *[1] * (layer.weight.dim() - 1))
        layer.bias.copy_(layer.bias * f + s)


# ---------------------------------------------------------------- batches


@dataclass
class Scene:
    """One image and its ground truth, before either engine's types.

    ``masks[i]`` is a list of polygons, or a (H, W) bool bitmap. ``output`` is the (height, width) of detections.
    """

    image: np.ndarray
    output: tuple[int, int]
    boxes: np.ndarray
    classes: np.ndarray
    masks: list[Any] = field(default_factory=list)

    @property
    def size(self) -> tuple[int, int]:
        return self.image.shape[1], self.image.shape[2]


def _polygon(rng: np.random.RandomState, box: np.ndarray) -> np.ndarray:
    """A star-shaped polygon inside the box, touching neither evenly."""
    angles = np.sort(rng.uniform(0, 2 * np.pi, 9))
    radii = rng.uniform(0.5, 1.0, 9)
    cx, cy, rx, ry = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2, (box[2] - box[0]) / 2, (box[3] - box[1]) / 2
    points = np.stack([cx + rx * radii * np.cos(angles), cy + ry * radii * np.sin(angles)], axis=1)
    return points.reshape(-1).astype(np.float64)


def make_scene(seed: int, height: int, width: int, num_objects: int, *, bitmaps: bool = False) -> Scene:
    """A smooth random image with objects of many shapes; polygons (some in two parts) or bitmaps."""
    rng = np.random.RandomState(seed)
    coarse = rng.uniform(0, 255, (3, height // 8 + 2, width // 8 + 2))
    image = coarse.repeat(8, axis=1).repeat(8, axis=2)[:, :height, :width] + rng.uniform(-20, 20, (3, height, width))
    sizes = np.exp(rng.uniform(np.log(8), np.log(0.9 * min(height, width)), (num_objects, 2)))
    corner = rng.uniform(0, 1, (num_objects, 2)) * (np.array([width, height]) - sizes)
    boxes = np.concatenate([corner, corner + sizes], axis=1).astype(np.float32)
    masks: list[Any] = []
    for k, box in enumerate(boxes):
        polygons = [_polygon(rng, box)]
        if k % 3 == 2:
            polygons.append(_polygon(rng, box * np.float32(0.9)))
        if bitmaps:
            y, x = np.mgrid[:height, :width] + 0.5
            cx, cy = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
            inside = ((x - cx) / (box[2] - box[0])) ** 2 + ((y - cy) / (box[3] - box[1])) ** 2 < 0.25
            masks.append(inside & (rng.uniform(size=inside.shape) < 0.9))
        else:
            masks.append(polygons)
    return Scene(
        image=image.clip(0, 255).astype(np.uint8),
        output=(int(height * 1.37), int(width * 1.37)),
        boxes=boxes,
        classes=rng.randint(0, NUM_CLASSES, num_objects),
        masks=masks,
    )


def to_sample(scene: Scene) -> Sample:
    """The scene as gn_det's sample with targets."""
    return Sample(
        image=torch.from_numpy(scene.image),
        height=scene.output[0],
        width=scene.output[1],
        targets=Targets(
            scene.size,
            torch.from_numpy(scene.boxes),
            torch.from_numpy(scene.classes).long(),
            Masks(scene.masks),
        ),
    )


#: Batches by name: two sizes, an image without objects, a tiny odd image, many objects (quota of positives is full).
BATCHES: dict[str, Callable[[], list[Scene]]] = {
    "two_sizes": lambda: [make_scene(11, 97, 131, 4), make_scene(12, 130, 90, 3)],
    "one_empty": lambda: [make_scene(13, 80, 101, 0), make_scene(14, 96, 96, 2)],
    "tiny_odd": lambda: [make_scene(15, 33, 70, 2)],
    "bitmaps": lambda: [make_scene(16, 90, 122, 4, bitmaps=True)],
    "crowded": lambda: [make_scene(17, 110, 110, 30)],
    "all_empty": lambda: [make_scene(18, 64, 90, 0)],
}


def calibration_batch() -> list[Sample]:
    """Images for :func:`measure_calibration`."""
    return [to_sample(s) for s in (make_scene(k, 128, 160, 0) for k in range(1, 5))]


def projection(name: str, tensor: Tensor) -> float:
    """Inner product with a fixed random direction: changes with sign and order, unlike a norm."""
    direction = _normal("direction of " + name, tensor.shape) / np.sqrt(max(1, tensor.numel()))
    return float((tensor.detach().double().numpy() * direction).sum())


def flatten(scenes: Iterable[Scene]) -> list[Sample]:
    """Samples of several scenes."""
    return [to_sample(s) for s in scenes]
