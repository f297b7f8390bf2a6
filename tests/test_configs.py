"""Every experiment of the paper's COCO section has a config; every config is built, and says what it must.

Both engines: the tests marked ``detectron2`` build the same configs there, and Detectron2's own YAMLs on both.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gn_det import config_file
from gn_det.config import load_config, shipped_configs
from gn_det.config.defaults import get_value
from gn_det.engine.optimizer import build_optimizer
from gn_det.modeling.build import build_model

NORMS = (nn.GroupNorm, nn.BatchNorm2d, nn.SyncBatchNorm, nn.LayerNorm)

#: Configs that the embedded engine builds; Detectron2's takes all.
EMBEDDED = [name for name in shipped_configs() if name != "gn_retinanet.yaml"]

#: Keys that tell one experiment from another.
DECIDING = {
    "norm": "MODEL.RESNETS.NORM",
    "depth": "MODEL.RESNETS.DEPTH",
    "fpn_norm": "MODEL.FPN.NORM",
    "convs": "MODEL.ROI_BOX_HEAD.NUM_CONV",
    "fcs": "MODEL.ROI_BOX_HEAD.NUM_FC",
    "box_norm": "MODEL.ROI_BOX_HEAD.NORM",
    "mask_norm": "MODEL.ROI_MASK_HEAD.NORM",
    "freeze_at": "MODEL.BACKBONE.FREEZE_AT",
    "batch": "SOLVER.IMS_PER_BATCH",
    "lr": "SOLVER.BASE_LR",
    "steps": "SOLVER.STEPS",
    "iterations": "SOLVER.MAX_ITER",
}
_2X = {"batch": 16, "lr": 0.02, "steps": (120000, 160000), "iterations": 180000}
_LONG = {**_2X, "steps": (210000, 250000), "iterations": 270000}
#: Section 4.2: 1 image per GPU on 8 GPUs.
_1_IMAGE = {"batch": 8, "lr": 0.01, "steps": (240000, 320000), "iterations": 360000}
_C4 = {"depth": 50, "fpn_norm": "", "convs": 0, "fcs": 0, "box_norm": "", "mask_norm": "", "freeze_at": 2, **_1_IMAGE}
_BN = {"norm": "FrozenBN", "depth": 50, "fpn_norm": "", "convs": 0, "fcs": 2, "box_norm": "", "mask_norm": "",
       "freeze_at": 2, **_2X}  # fmt: skip
_CONVS = {**_BN, "convs": 4, "fcs": 1}
_GN = {"norm": "GN", "depth": 50, "fpn_norm": "GN", "convs": 4, "fcs": 1, "box_norm": "GN", "mask_norm": "GN",
       "freeze_at": 2, **_2X}  # fmt: skip
_SCRATCH = {**_GN, **_LONG, "freeze_at": 0}
_SYNC = {"norm": "SyncBN", "fpn_norm": "SyncBN", "box_norm": "SyncBN", "mask_norm": "SyncBN"}

#: The COCO experiments, row by row: where it stands, box and mask AP (None: not published), config, deciding values.
EXPERIMENTS: dict[str, tuple[str, float | None, float | None, str, dict[str, Any]]] = {
    "c4_bn": ("Table 4", 37.7, 32.8, "bn_c4.yaml", {**_C4, "norm": "FrozenBN"}),
    "c4_gn": ("Table 4", 38.8, 33.6, "gn_c4.yaml", {**_C4, "norm": "GN"}),
    "c4_ln": ("Table 4", 36.9, None, "ln_c4.yaml", {**_C4, "norm": "LN"}),
    "c4_bn_tuned": ("text", None, None, "bn_c4_tuned.yaml", {**_C4, "norm": "BN", **_2X}),
    "fpn_bn_2fc": ("text", 38.5, None, "bn_fpn.yaml", _BN),
    "fpn_bn_4conv1fc": ("Table 5", 38.6, 34.2, "bn_fpn_4conv1fc.yaml", _CONVS),
    "fpn_bn_gnhead": ("Table 5", 39.5, 34.4, "bn_fpn_gn_head.yaml", {**_CONVS, "box_norm": "GN"}),
    "fpn_bn_bnhead": ("text", None, None, "bn_fpn_bn_head.yaml", {**_CONVS, "box_norm": "BN"}),
    "fpn_gn_gnhead": ("Table 5", 40.0, 34.8, "gn_fpn_gn_head.yaml", {**_GN, "mask_norm": ""}),
    "fpn_bn": ("Table 6", 38.6, 34.5, "bn_fpn.yaml", _BN),
    "fpn_bn_long": ("Detectron", 38.9, 34.3, "bn_fpn_long.yaml", {**_BN, **_LONG}),
    "fpn_gn": ("Table 6", 40.3, 35.7, "gn_fpn.yaml", _GN),
    "fpn_gn_long": ("Table 6", 40.8, 36.1, "gn_fpn_long.yaml", {**_GN, **_LONG}),
    "fpn_bn_r101": ("Table 6", 40.9, 36.4, "bn_fpn_r101.yaml", {**_BN, "depth": 101}),
    "fpn_gn_r101": ("Table 6", 41.8, 36.8, "gn_fpn_r101.yaml", {**_GN, "depth": 101}),
    "fpn_gn_r101_long": ("Table 6", 42.3, 37.2, "gn_fpn_r101_long.yaml", {**_GN, **_LONG, "depth": 101}),
    "scratch_bn": ("Table 7", 34.5, None, "syncbn_fpn_scratch.yaml", {**_SCRATCH, **_SYNC}),
    "scratch_gn": ("Table 7", 39.5, 35.2, "gn_fpn_scratch.yaml", _SCRATCH),
    "scratch_gn_r101": ("Table 7", 41.0, 36.4, "gn_fpn_r101_scratch.yaml", {**_SCRATCH, "depth": 101}),
    "d2_fpn_gn_3x": ("Detectron2", 42.6, 38.6, "Misc/mask_rcnn_R_50_FPN_3x_gn.yaml", {**_GN, **_LONG}),
    "d2_scratch_gn_3x": ("Detectron2", 39.9, 36.6, "Misc/scratch_mask_rcnn_R_50_FPN_3x_gn.yaml", _SCRATCH),
    "d2_scratch_gn_9x": (
        "Detectron2", 43.7, 39.6, "gn_fpn_scratch_9x.yaml",
        {**_SCRATCH, "batch": 64, "lr": 0.08, "steps": (187500, 197500), "iterations": 202500},
    ),
}  # fmt: skip


_WS_2X = {"norm": "GN", "ws": "jhu", "steps": (117264, 161238), "iterations": 175896, "batch": 16, "lr": 0.02}
_WS_24E = {**_WS_2X, "steps": (146580, 168567)}
_CASCADE = {"norm": "GN", "heads": "CascadeROIHeads", "batch": 64, "lr": 0.08, "iterations": 202500, "freeze_at": 0}
_X50, _X101 = ({"depth": depth, "groups": 32, "width": 4} for depth in (50, 101))


def _lsj(depth: int, times: int) -> dict[str, Any]:
    steps = (163889 * times, 177546 * times)
    return {"norm": "GN", "depth": depth, "batch": 64, "lr": 0.1, "iterations": 184375 * times, "steps": steps,
            "lsj": True, "freeze_at": 0, "rpn": (-1, -1), "decay": 4e-5}  # fmt: skip


#: After the paper: config, source, box and mask AP of it (None: not published), deciding values.
BEYOND: dict[str, tuple[str, float | None, float | None, dict[str, Any]]] = {
    "gn_ws_fpn.yaml": ("MMDetection", 40.6, 36.6, {**_WS_2X, "depth": 50}),
    "gn_ws_fpn_24e.yaml": ("MMDetection", 41.1, 37.1, {**_WS_24E, "depth": 50}),
    "gn_ws_fpn_r101.yaml": ("MMDetection", 42.0, 37.7, {**_WS_2X, "depth": 101}),
    "gn_ws_fpn_r101_24e.yaml": ("MMDetection", 43.1, 38.6, {**_WS_24E, "depth": 101}),
    "gn_ws_fpn_x50.yaml": ("MMDetection", 41.1, 37.0, {**_WS_2X, **_X50}),
    "gn_ws_fpn_x50_24e.yaml": ("MMDetection", 42.1, 38.0, {**_WS_24E, **_X50}),
    "gn_ws_fpn_x101.yaml": ("MMDetection", 42.1, 37.9, {**_WS_2X, **_X101}),
    "gn_ws_fpn_x101_24e.yaml": ("MMDetection", 42.7, 38.5, {**_WS_24E, **_X101}),
    "gn_fpn_scratch_6x.yaml": ("MMDetection", 41.2, 37.4, {"steps": (476385, 520359), "freeze_at": 0, "norm": "GN"}),
    "gn_cascade_scratch_9x.yaml": ("tensorpack", None, None, {**_CASCADE, "depth": 50}),
    "gn_cascade_r101_scratch_9x.yaml": ("tensorpack", 47.7, 41.7, {**_CASCADE, "depth": 101}),
    **{
        f"gn_fpn{'_r101' * (depth == 101)}_lsj_{times}00ep.yaml": ("new_baselines", None, None, _lsj(depth, times))
        for depth in (50, 101)
        for times in (1, 2, 4)
    },
    "gn_retinanet.yaml": ("Detectron2", None, None, {"norm": "GN", "fpn_norm": "GN", "head_norm": "GN", "lr": 0.01}),
}
DECIDING_BEYOND = {
    **DECIDING,
    "ws": "MODEL.WS.RESNETS",
    "heads": "MODEL.ROI_HEADS.NAME",
    "groups": "MODEL.RESNETS.NUM_GROUPS",
    "width": "MODEL.RESNETS.WIDTH_PER_GROUP",
    "lsj": "INPUT.LSJ.ENABLED",
    "rpn": "MODEL.RPN.CONV_DIMS",
    "decay": "SOLVER.WEIGHT_DECAY",
    "head_norm": "MODEL.RETINANET.NORM",
}


@pytest.mark.parametrize("name", BEYOND)
def test_what_came_after_the_paper(name: str) -> None:
    """The deciding keys, the source and its APs; no AP is claimed where none is published."""
    source, box, mask, deciding = BEYOND[name]
    cfg = load_config(name, check=name in EMBEDDED)
    assert {short: value_of(cfg, DECIDING_BEYOND[short]) for short in deciding} == deciding
    head = [line for line in Path(config_file(name)).read_text().splitlines() if line.startswith("#")]
    assert source in head[0] and f"--config {name} --num-gpus 8" in head[2]
    assert head[1].startswith(f"# Expected COCO AP (box / mask): {box} / {mask}." if box else "# No AP is published")


def value_of(cfg: Any, key: str) -> Any:
    value = get_value(cfg, key)
    return tuple(value) if isinstance(value, list) else value


@pytest.mark.parametrize("row", [k for k, v in EXPERIMENTS.items() if "/" not in v[3]])
def test_every_experiment_has_its_config(row: str) -> None:
    """The deciding keys, and the source and the APs in the comment on top."""
    where, box, mask, name, deciding = EXPERIMENTS[row]
    cfg = load_config(name)
    assert {short: value_of(cfg, DECIDING[short]) for short in deciding} == deciding
    assert set(deciding) == set(DECIDING)
    head = "".join(line for line in Path(config_file(name)).read_text().splitlines(True) if line.startswith("#"))
    assert re.search(r"paper, |detectron2's|detectron, ", head, re.IGNORECASE)
    assert where in head and all(f"{ap}" in head for ap in (box, mask) if ap is not None)
    assert f"--config {name} --num-gpus 8" in head


def test_no_config_without_an_experiment() -> None:
    """Beside the rows above there are the quickstart and the R-101 variants of Table 5, which nobody published."""
    rows = {v[3] for v in EXPERIMENTS.values() if "/" not in v[3]}
    others = {
        "quickstart.yaml",
        "gn_small.yaml",
        "gn_fpn_finetune.yaml",
        "bn_fpn_r101_4conv1fc.yaml",
        "bn_fpn_r101_gn_head.yaml",
    }
    assert set(shipped_configs()) == rows | others | set(BEYOND)


#: FrozenBN in the backbone and no norm anywhere else.
WITHOUT_NORM = ("bn_fpn_4conv1fc.yaml", "bn_fpn_r101_4conv1fc.yaml")


def build(name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    cfg = load_config(name)
    if cfg.MODEL.ROI_HEADS.NUM_CLASSES == 0:
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = 80
    with torch.device("meta"):
        model = build_model(cfg)
    return model, build_optimizer(cfg, model)


@pytest.mark.parametrize("name", EMBEDDED)
def test_every_gamma_and_beta_is_in_a_group_without_weight_decay(name: str) -> None:
    model, optimizer = build(name)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    norm_params = [p for m in model.modules() if isinstance(m, NORMS) for p in m.parameters(recurse=False)]
    trained = [p for p in norm_params if p.requires_grad]
    assert bool(trained) == (
        name not in ("bn_c4.yaml", "bn_fpn.yaml", "bn_fpn_long.yaml", "bn_fpn_r101.yaml", *WITHOUT_NORM)
    )
    assert all(decay[id(p)] == 0.0 for p in trained)
    weights = [p for m in model.modules() if isinstance(m, nn.Conv2d) for p in [m.weight] if p.requires_grad]
    assert weights and all(decay[id(p)] == (4e-5 if "lsj" in name else 1e-4) for p in weights)
    assert {id(p) for p in model.parameters() if p.requires_grad} == set(decay)


@pytest.mark.parametrize(("name", "backbone"), [("gn_fpn_long.yaml", 53), ("gn_fpn_r101.yaml", 104)])
def test_layer_counts_of_the_paper(name: str, backbone: int) -> None:
    """R-50 has 53 convolutions with a norm, R-101 104; FPN 8, the 4conv1fc box head 4, the mask head 4."""
    model, _ = build(name)
    names = [n for n, m in model.named_modules() if isinstance(m, nn.GroupNorm)]
    count = {
        "backbone": sum("bottom_up" in n for n in names),
        "fpn": sum(n.startswith("backbone.fpn_") for n in names),
        "box": sum("box_head" in n for n in names),
        "mask": sum("mask_head" in n for n in names),
    }
    assert count == {"backbone": backbone, "fpn": 8, "box": 4, "mask": 4} and sum(count.values()) == len(names)
    assert all(m.num_groups == 32 for m in model.modules() if isinstance(m, nn.GroupNorm))


@pytest.mark.parametrize(
    "name", [n for n in shipped_configs() if n.startswith("bn_") and not n.endswith(("tuned.yaml", "bn_head.yaml"))]
)
def test_baselines_freeze_batch_norm(name: str) -> None:
    model, _ = build(name)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    has_gn = any(isinstance(m, nn.GroupNorm) for m in model.modules())
    assert has_gn == ("gn_head" in name)


@pytest.mark.parametrize("name", [n for n in EMBEDDED if "scratch" in n or "lsj" in n or n == "quickstart.yaml"])
def test_from_scratch_freezes_nothing(name: str) -> None:
    model, _ = build(name)
    assert all(p.requires_grad for p in model.parameters())


def test_negative_controls() -> None:
    """BN with live statistics in res3 to res5, or in the box head alone; SyncBN in every normed layer."""

    def count(name: str, kind: type[nn.Module]) -> dict[str, int]:
        names = [n for n, m in build(name)[0].named_modules() if type(m) is kind]
        return {part: sum(part in n for n in names) for part in ("backbone", "res5", "box_head", "mask_head")}

    # Stem and res2 (1 + 3 * 3 + 1 layers) are frozen by FREEZE_AT 2, so 43 - 11 of the C4 backbone are tuned.
    assert count("bn_c4_tuned.yaml", nn.BatchNorm2d) == {"backbone": 32, "res5": 10, "box_head": 0, "mask_head": 0}
    assert count("bn_fpn_bn_head.yaml", nn.BatchNorm2d) == {"backbone": 0, "res5": 0, "box_head": 4, "mask_head": 0}
    assert count("syncbn_fpn_scratch.yaml", nn.SyncBatchNorm) == {
        "backbone": 53 + 8,
        "res5": 10,
        "box_head": 4,
        "mask_head": 4,
    }


#: Everything small but the structure.
SMALL = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "MODEL.ROI_HEADS.NUM_CLASSES", "4"]
SMALL += ["MODEL.RESNETS.STEM_OUT_CHANNELS", "32", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"]
SMALL += ["MODEL.RESNETS.WIDTH_PER_GROUP", "32", "MODEL.FPN.OUT_CHANNELS", "32", "MODEL.ROI_BOX_HEAD.CONV_DIM", "32"]
SMALL += ["MODEL.ROI_BOX_HEAD.FC_DIM", "32", "MODEL.ROI_MASK_HEAD.CONV_DIM", "32"]
SMALL += ["MODEL.RPN.POST_NMS_TOPK_TRAIN", "20", "MODEL.RPN.POST_NMS_TOPK_TEST", "10"]
SMALL += ["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "8"]


@pytest.mark.parametrize(
    "name",
    [
        *("ln_c4.yaml", "bn_c4_tuned.yaml", "bn_fpn_bn_head.yaml", "syncbn_fpn_scratch.yaml"),
        *("gn_ws_fpn_x50.yaml", "gn_cascade_scratch_9x.yaml", "gn_fpn_lsj_100ep.yaml"),
    ],
)
def test_models_train_and_detect_on_the_cpu(name: str) -> None:
    """Forward, backward and inference of the configs whose models no other test runs; SyncBN without processes too."""
    from tests.golden.model_cases import BATCHES, flatten

    torch.manual_seed(0)
    model = build_model(load_config(name, SMALL))
    samples = flatten(BATCHES["two_sizes"]())
    for sample in samples:
        sample["targets"].classes %= 4
    losses = model(samples)
    total = sum(losses.values())
    assert len(losses) == (9 if "cascade" in name else 5) and torch.isfinite(total)
    total.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    model.eval()
    assert len(model.detect(samples)) == 2
