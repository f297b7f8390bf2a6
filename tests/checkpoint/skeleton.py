"""Modules and files with real names and tiny tensors: what loading needs, without a forward.

Shapes keep what the code looks at (depth, basic or bottleneck, grouped or not, class rows), at width 4 instead of 64.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from gn_det.config import get_cfg
from tests.checkpoint.layouts import caffe2_backbone

BLOCKS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}
Shapes = dict[str, tuple[int, ...]]
W = 4  # channels of the stem


def norm_shapes(prefix: str, channels: int, norm: str) -> Shapes:
    tensors = {"": (), "GN": ("weight", "bias"), "LN": ("weight", "bias")}.get(
        norm, ("weight", "bias", "running_mean", "running_var")
    )
    shapes = {f"{prefix}.norm.{t}": (channels,) for t in tensors}
    if norm in ("BN", "SyncBN"):
        shapes[f"{prefix}.norm.num_batches_tracked"] = ()
    return shapes


def backbone_shapes(depth: int = 50, norm: str = "GN", groups: int = 1) -> Shapes:
    """Bare names: stem.conv1.weight, res2.0.conv1.weight ..."""
    shapes: Shapes = {"stem.conv1.weight": (W, 3, 7, 7), **norm_shapes("stem.conv1", W, norm)}
    bottleneck = depth >= 50
    last = W
    for stage, blocks in enumerate(BLOCKS[depth], start=2):
        mid = W << (stage - 2)
        out = mid * 4 if bottleneck else mid
        for block in range(blocks):
            prefix = f"res{stage}.{block}"
            convs = {"conv1": (mid, last, 1, 1), "conv2": (mid, mid // groups, 3, 3), "conv3": (out, mid, 1, 1)}
            if not bottleneck:
                convs = {"conv1": (out, last, 3, 3), "conv2": (out, out, 3, 3)}
            if block == 0 and last != out:
                convs["shortcut"] = (out, last, 1, 1)
            for conv, shape in convs.items():
                shapes[f"{prefix}.{conv}.weight"] = shape
                shapes |= norm_shapes(f"{prefix}.{conv}", shape[0], norm)
            last = out
    return shapes


def detector_shapes(
    depth: int = 50, norm: str = "GN", style: str = "FPN", classes: int = 3, head: str = "GN"
) -> Shapes:
    """The names of a Mask R-CNN with a 4conv1fc-like (one conv, one fc) box head."""
    if style == "FPN":
        shapes = {f"backbone.bottom_up.{n}": s for n, s in backbone_shapes(depth, norm).items()}
        for level in range(2, 6):
            for conv in ("lateral", "output"):
                shapes[f"backbone.fpn_{conv}{level}.weight"] = (W, W, 1, 1)
                shapes |= norm_shapes(f"backbone.fpn_{conv}{level}", W, head)
    else:
        shapes = {
            ("roi_heads." if n.startswith("res5") else "backbone.") + n: s
            for n, s in backbone_shapes(depth, norm).items()
        }
    shapes |= {
        "proposal_generator.rpn_head.conv.weight": (W, W, 3, 3),
        "proposal_generator.rpn_head.conv.bias": (W,),
        "proposal_generator.rpn_head.objectness_logits.weight": (3, W, 1, 1),
        "proposal_generator.rpn_head.objectness_logits.bias": (3,),
        "roi_heads.box_predictor.cls_score.weight": (classes + 1, W),
        "roi_heads.box_predictor.cls_score.bias": (classes + 1,),
        "roi_heads.box_predictor.bbox_pred.weight": (4 * classes, W),
        "roi_heads.box_predictor.bbox_pred.bias": (4 * classes,),
        "roi_heads.mask_head.predictor.weight": (classes, W, 1, 1),
        "roi_heads.mask_head.predictor.bias": (classes,),
    }
    if style == "FPN":
        for name in ("roi_heads.box_head.conv1", "roi_heads.mask_head.mask_fcn1"):
            shapes[f"{name}.weight"] = (W, W, 3, 3)
            shapes |= norm_shapes(name, W, head)
        shapes["roi_heads.box_head.fc1.weight"] = (W, W)
        shapes["roi_heads.box_head.fc1.bias"] = (W,)
    return shapes


def module(shapes: Shapes) -> nn.Module:
    """Nested modules whose state dict has exactly these names; values are -1, so that what is not loaded shows."""
    root = nn.Module()
    for name, shape in shapes.items():
        *path, leaf = name.split(".")
        parent = root
        for part in path:
            if part not in parent._modules:
                parent.add_module(part, nn.Module())
            parent = parent._modules[part]
        if leaf == "num_batches_tracked":
            parent.register_buffer(leaf, torch.tensor(-1))
        elif leaf.startswith("running"):
            parent.register_buffer(leaf, torch.full(shape, -1.0))
        else:
            parent.register_parameter(leaf, nn.Parameter(torch.full(shape, -1.0)))
    return root


def random_state(shapes: Shapes, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        n: torch.tensor(7) if n.endswith("tracked") else torch.rand(s, generator=generator) for n, s in shapes.items()
    }


def config(norm: str = "GN", depth: int = 50, classes: int = 3, **keys: object):
    cfg = get_cfg()
    cfg.MODEL.RESNETS.NORM = norm
    cfg.MODEL.RESNETS.DEPTH = depth
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = classes
    cfg.merge_from_list([x for key, value in keys.items() for x in (key.replace("__", "."), value)])
    return cfg


def caffe2_blobs(depth: int, norm: str, shapes: Mapping[str, tuple[int, ...]], seed: int = 0) -> dict[str, np.ndarray]:
    """Random blobs of a published ImageNet pickle with the shapes of ``shapes`` (bare Detectron2 names).

    ``norm``: see :func:`tests.checkpoint.layouts.caffe2_backbone`; "affine" also has the biases of its convolutions.
    """
    rng = np.random.default_rng(seed)
    blobs = {}
    for theirs, ours in caffe2_backbone(depth, norm):
        shape = shapes[re.sub(r"(\.norm)?\.\w+$", ".weight", ours)]
        blobs[theirs] = rng.random(shape if theirs.endswith("_w") else shape[:1], dtype=np.float32)
        if norm == "affine" and theirs.endswith("_w"):
            blobs[theirs[:-1] + "b"] = rng.random(shape[:1], dtype=np.float32)
    classifier = "pred" if norm == "gn" else "fc1000"
    return blobs | {f"{classifier}_{x}": rng.random(s, np.float32) for x, s in (("w", (10, 8)), ("b", (10,)))}
