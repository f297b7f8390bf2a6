"""Files of the outside world in their real layout: every name written down from the source's own naming, by hand.

Independent of the tables under test: a name goes in as ``(their name, our name)`` and both sides are spelled out here.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
import torch

BLOCKS = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
Pairs = list[tuple[str, str]]
Shapes = dict[str, tuple[int, ...]]


@cache
def real_shapes(config: str, *overrides: str) -> Shapes:
    """Names and shapes of the model of a shipped config, built without memory for its weights."""
    from gn_det.config import load_config
    from gn_det.modeling.build import build_model

    with torch.device("meta"):
        model = build_model(load_config(config, ["MODEL.ROI_HEADS.NUM_CLASSES", "80", *overrides]))
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


#: Blobs of the norm after a convolution, and our names, by the kind of file.
CAFFE2_NORMS = {
    "gn": {"gn_s": "weight", "gn_b": "bias"},
    "affine": {"bn_s": "weight", "bn_b": "bias"},
    "stats": {"bn_gamma": "weight", "bn_beta": "bias"}
    | {f"bn_{name}": name for name in ("running_mean", "running_var")},
}


def caffe2_backbone(depth: int = 50, norm: str = "gn") -> Pairs:
    """An ImageNet pickle without the classifier; ours without prefix.

    ``norm``: "gn" (R-50-GN.pkl), "affine" (MSRA of the catalog: folded BN), "stats" (detectron2://).
    """

    def normed(their: str, our: str, norm_of: str) -> Pairs:
        leaves = CAFFE2_NORMS[norm].items()
        return [(f"{their}_w", f"{our}.weight"), *((f"{norm_of}_{a}", f"{our}.norm.{b}") for a, b in leaves)]

    pairs = normed("conv1", "stem.conv1", "conv1" if norm == "gn" else "res_conv1")
    branches = [("branch2a", "conv1"), ("branch2b", "conv2"), ("branch2c", "conv3")]
    for stage, blocks in zip((2, 3, 4, 5), BLOCKS[depth]):
        for block in range(blocks):
            for theirs, ours in [("branch1", "shortcut")] * (block == 0) + branches:
                their = f"res{stage}_{block}_{theirs}"
                pairs += normed(their, f"res{stage}.{block}.{ours}", their)
    return pairs


def caffe2_detector(depth: int = 50) -> Pairs:
    """model_final.pkl of projects/GN (04_2018_gn_baselines) without momentum; ours with prefixes."""
    pairs = [(theirs, f"backbone.bottom_up.{ours}") for theirs, ours in caffe2_backbone(depth)]

    def gn(their: str, our: str) -> Pairs:
        return [
            (f"{their}_w", f"{our}.weight"),
            (f"{their}_gn_s", f"{our}.norm.weight"),
            (f"{their}_gn_b", f"{our}.norm.bias"),
        ]

    def biased(their: str, our: str) -> Pairs:
        return [(f"{their}_w", f"{our}.weight"), (f"{their}_b", f"{our}.bias")]

    last = [n - 1 for n in BLOCKS[depth]]
    pairs += gn(f"fpn_inner_res5_{last[3]}_sum", "backbone.fpn_lateral5")
    pairs += gn(f"fpn_inner_res4_{last[2]}_sum_lateral", "backbone.fpn_lateral4")
    pairs += gn(f"fpn_inner_res3_{last[1]}_sum_lateral", "backbone.fpn_lateral3")
    pairs += gn(f"fpn_inner_res2_{last[0]}_sum_lateral", "backbone.fpn_lateral2")
    for stage in (5, 4, 3, 2):
        pairs += gn(f"fpn_res{stage}_{last[stage - 2]}_sum", f"backbone.fpn_output{stage}")
    pairs += biased("conv_rpn_fpn2", "proposal_generator.rpn_head.conv")
    pairs += biased("rpn_cls_logits_fpn2", "proposal_generator.rpn_head.objectness_logits")
    pairs += biased("rpn_bbox_pred_fpn2", "proposal_generator.rpn_head.anchor_deltas")
    for i in (1, 2, 3, 4):
        pairs += gn(f"head_conv{i}", f"roi_heads.box_head.conv{i}")
    pairs += biased("fc6", "roi_heads.box_head.fc1")
    pairs += biased("cls_score", "roi_heads.box_predictor.cls_score")
    pairs += biased("bbox_pred", "roi_heads.box_predictor.bbox_pred")
    for i in (1, 2, 3, 4):
        pairs += gn(f"_[mask]_fcn{i}", f"roi_heads.mask_head.mask_fcn{i}")
    pairs += biased("conv5_mask", "roi_heads.mask_head.deconv")
    return pairs + biased("mask_fcn_logits", "roi_heads.mask_head.predictor")


def layered_backbone(depth: int = 50, norm: str = "bn", running: bool = False) -> Pairs:
    """torchvision and timm (``bn`` also for GN), mmdetection (``gn``); ours without prefix."""
    leaves = ["weight", "bias"] + ["running_mean", "running_var", "num_batches_tracked"] * running
    pairs = [("conv1.weight", "stem.conv1.weight")] + [(f"{norm}1.{x}", f"stem.conv1.norm.{x}") for x in leaves]
    for layer, blocks in zip((1, 2, 3, 4), BLOCKS[depth]):
        for block in range(blocks):
            their, our = f"layer{layer}.{block}", f"res{layer + 1}.{block}"
            for i in (1, 2, 3):
                pairs.append((f"{their}.conv{i}.weight", f"{our}.conv{i}.weight"))
                pairs += [(f"{their}.{norm}{i}.{x}", f"{our}.conv{i}.norm.{x}") for x in leaves]
            if block == 0:
                pairs.append((f"{their}.downsample.0.weight", f"{our}.shortcut.weight"))
                pairs += [(f"{their}.downsample.1.{x}", f"{our}.shortcut.norm.{x}") for x in leaves]
    return pairs


def mmdet_detector(depth: int = 50, version: int = 2) -> Pairs:
    """configs/gn of mmdetection; version 1 has no ``roi_head.``."""
    roi = "" if version == 1 else "roi_head."
    pairs = [(f"backbone.{t}", f"backbone.bottom_up.{o}") for t, o in layered_backbone(depth, "gn")]
    gn = [("conv.weight", "weight"), ("gn.weight", "norm.weight"), ("gn.bias", "norm.bias")]
    biased = [("weight", "weight"), ("bias", "bias")]
    rows = [(f"neck.lateral_convs.{i}", f"backbone.fpn_lateral{i + 2}", gn) for i in range(4)]
    rows += [(f"neck.fpn_convs.{i}", f"backbone.fpn_output{i + 2}", gn) for i in range(4)]
    rows += [
        ("rpn_head.rpn_conv", "proposal_generator.rpn_head.conv", biased),
        ("rpn_head.rpn_cls", "proposal_generator.rpn_head.objectness_logits", biased),
        ("rpn_head.rpn_reg", "proposal_generator.rpn_head.anchor_deltas", biased),
        (f"{roi}bbox_head.fc_cls", "roi_heads.box_predictor.cls_score", biased),
        (f"{roi}bbox_head.fc_reg", "roi_heads.box_predictor.bbox_pred", biased),
    ]
    rows += [(f"{roi}bbox_head.shared_convs.{i}", f"roi_heads.box_head.conv{i + 1}", gn) for i in range(4)]
    rows += [(f"{roi}bbox_head.shared_fcs.0", "roi_heads.box_head.fc1", biased)]
    rows += [(f"{roi}mask_head.convs.{i}", f"roi_heads.mask_head.mask_fcn{i + 1}", gn) for i in range(4)]
    rows += [
        (f"{roi}mask_head.upsample", "roi_heads.mask_head.deconv", biased),
        (f"{roi}mask_head.conv_logits", "roi_heads.mask_head.predictor", biased),
    ]
    return pairs + [(f"{their}.{a}", f"{our}.{b}") for their, our, leaves in rows for a, b in leaves]


def arrays(
    pairs: Pairs, shapes: Mapping[str, tuple[int, ...]], prefix: str = "", seed: int = 0
) -> dict[str, np.ndarray]:
    """Random numbers by their names with our shapes: convolutions of He's scale, gammas near 1."""
    rng = np.random.default_rng(seed)
    found = {}
    for theirs, ours in pairs:
        shape = shapes[prefix + ours]
        fan_in = max(1, int(np.prod(shape[1:])))
        value = rng.standard_normal(shape, dtype=np.float32) * np.float32(
            (2 / fan_in) ** 0.5 if len(shape) > 1 else 0.1
        )
        if ".norm." in ours and ours.endswith(("weight", "running_var")):
            value = np.abs(value) + np.float32(0.9)
        found[theirs] = value
    return found


def background_first(blobs: dict[str, np.ndarray], boxes: str, masks: str, leaves: tuple[str, str]) -> None:
    """Give boxes and masks the rows of a background class that Detectron has and we do not, in place."""
    for leaf in leaves:
        for name, rows in ((boxes + leaf, 4), (masks + leaf, 1)):
            value = blobs[name]
            blobs[name] = np.concatenate([np.full((rows, *value.shape[1:]), 7, np.float32), value])


def write_pickle(path: Path, value: object, protocol: int = 2) -> Path:
    path.write_bytes(pickle.dumps(value, protocol))
    return path
