"""Every shipped config is built; gamma and beta never decay; the paper's layer counts hold."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gn_det.config import load_config, shipped_configs
from gn_det.modeling.build import build_model
from gn_det.training.optim import build_optimizer

NORMS = (nn.GroupNorm, nn.BatchNorm2d, nn.LayerNorm)


def build(name: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    cfg = load_config(name)
    if cfg.MODEL.ROI_HEADS.NUM_CLASSES == 0:
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = 80
    with torch.device("meta"):
        model = build_model(cfg)
    return model, build_optimizer(cfg, model)


@pytest.mark.parametrize("name", shipped_configs())
def test_every_gamma_and_beta_is_in_a_group_without_weight_decay(name: str) -> None:
    model, optimizer = build(name)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    norm_params = [p for m in model.modules() if isinstance(m, NORMS) for p in m.parameters(recurse=False)]
    trained = [p for p in norm_params if p.requires_grad]
    assert all(decay[id(p)] == 0.0 for p in trained)
    weights = [p for m in model.modules() if isinstance(m, nn.Conv2d) for p in [m.weight] if p.requires_grad]
    assert weights and all(decay[id(p)] == 1e-4 for p in weights)
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


@pytest.mark.parametrize("name", [n for n in shipped_configs() if n.startswith("bn_")])
def test_baselines_freeze_batch_norm(name: str) -> None:
    model, _ = build(name)
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    has_gn = any(isinstance(m, nn.GroupNorm) for m in model.modules())
    assert has_gn == ("gn_head" in name)


@pytest.mark.parametrize("name", [n for n in shipped_configs() if "scratch" in n or n == "quickstart.yaml"])
def test_from_scratch_freezes_nothing(name: str) -> None:
    model, _ = build(name)
    assert all(p.requires_grad for p in model.parameters())
