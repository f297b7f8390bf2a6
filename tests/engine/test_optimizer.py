"""Optimizer groups and clipping."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gn_det.config import get_cfg
from gn_det.engine.optimizer import build_optimizer, clip_gradients, format_groups
from gn_det.errors import ConfigError
from tests.engine.cases import Tiny


def decay_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    of = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    return {name: of[id(p)] for name, p in model.named_parameters() if id(p) in of}


def test_gamma_and_beta_do_not_decay_whatever_their_name() -> None:
    """By class: a GroupNorm subclass and LayerNorm are norms; a convolution's bias is not."""
    model = Tiny()
    decay = decay_of(model, build_optimizer(get_cfg(), model))
    assert {n for n, d in decay.items() if d == 0.0} == {"gn.weight", "gn.bias", "ln.weight", "ln.bias"}
    assert decay["conv.bias"] == decay["fc.weight"] == 1e-4
    assert "bn.weight" not in decay  # frozen


def test_bias_rules_win_over_norm_rules() -> None:
    cfg = get_cfg()
    cfg.merge_from_list(["SOLVER.WEIGHT_DECAY_BIAS", 0.5, "SOLVER.BIAS_LR_FACTOR", 2.0])
    model = Tiny()
    optimizer = build_optimizer(cfg, model)
    decay = decay_of(model, optimizer)
    assert decay["conv.bias"] == decay["gn.bias"] == 0.5
    assert decay["gn.weight"] == 0.0
    lr = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    assert lr[id(model.fc.bias)] == 2 * lr[id(model.fc.weight)]


class WithBackbone(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = Tiny()
        self.head = nn.Linear(8, 2)


def test_backbone_rate_is_a_factor_of_every_other_rule() -> None:
    cfg, model = get_cfg(), WithBackbone()
    cfg.merge_from_list(["SOLVER.BACKBONE_LR_FACTOR", 0.1, "SOLVER.BIAS_LR_FACTOR", 2.0, "SOLVER.BASE_LR", 1.0])
    lr = {id(p): g["lr"] for g in build_optimizer(cfg, model).param_groups for p in g["params"]}
    parts = (model.head, model.backbone.fc)
    assert [(lr[id(m.weight)], lr[id(m.bias)]) for m in parts] == [(1.0, 2.0), (0.1, 0.2)]
    assert lr[id(model.backbone.gn.weight)] == 0.1
    assert "  weight             2          280       0.1        0.0001" in format_groups(cfg, model)[0]


def test_adamw_decays_weights_beside_the_gradient_and_no_norm() -> None:
    """One step is ``w (1 - lr decay) - lr sign(g)`` up to eps; gamma and beta have the second term alone."""
    cfg, model = get_cfg(), Tiny()
    cfg.merge_from_list(["SOLVER.OPTIMIZER", "ADAMW", "SOLVER.WEIGHT_DECAY", 0.5, "SOLVER.BASE_LR", 0.01])
    optimizer = build_optimizer(cfg, model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.full_like(p, -3.0) if p.requires_grad else None
    optimizer.step()
    for name, p in model.named_parameters():
        kept = 1.0 if name.startswith(("gn", "ln")) else 1 - 0.01 * 0.5
        expected = before[name] * kept + 0.01 if p.requires_grad else before[name]
        torch.testing.assert_close(p.detach(), expected, rtol=0, atol=1e-6)
    assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)


def test_shared_parameter_is_optimized_once() -> None:
    model = Tiny()
    model.again = model.fc
    optimizer = build_optimizer(get_cfg(), model)
    params = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert len(params) == len(set(params))


def test_table_counts_gamma_beta_and_frozen() -> None:
    table, sentence = format_groups(get_cfg(), Tiny())
    assert sentence == "6 gamma/beta tensors: 4 trained with weight decay 0, 2 frozen by MODEL.BACKBONE.FREEZE_AT."
    assert table.splitlines()[-1].strip() == sentence


def test_all_frozen_is_an_error() -> None:
    model = Tiny().requires_grad_(False)
    with pytest.raises(ConfigError, match="FREEZE_AT"):
        build_optimizer(get_cfg(), model)


@pytest.mark.parametrize(("kind", "expected"), [("value", [0.5, -0.5, 0.5]), ("norm", [0.3, -0.4, 0.5])])
def test_clipping_treats_tensors_alone(kind: str, expected: list[float]) -> None:
    cfg = get_cfg()
    cfg.merge_from_list(["SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", kind,
                         "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.5])  # fmt: skip
    a, b, no_grad = (nn.Parameter(torch.zeros(n)) for n in (2, 1, 1))
    a.grad, b.grad = torch.tensor([3.0, -4.0]), torch.tensor([10.0])
    clip_gradients(cfg, [a, b, no_grad])
    assert torch.cat([a.grad, b.grad]).tolist() == pytest.approx(expected, abs=1e-5)


def test_full_model_clipping_keeps_the_direction() -> None:
    cfg = get_cfg()
    cfg.merge_from_list(["SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full_model"])
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1))
    a.grad, b.grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    clip_gradients(cfg, [a, b])
    assert torch.cat([a.grad, b.grad]).tolist() == pytest.approx([0.6, 0.0, 0.8], abs=1e-5)


def test_a_bias_decay_of_zero_is_a_decay() -> None:
    """0 is a value, None leaves the choice to the other rules."""
    cfg, model = get_cfg(), Tiny()
    cfg.SOLVER.WEIGHT_DECAY_BIAS = 0.0
    assert decay_of(model, build_optimizer(cfg, model))["conv.bias"] == 0.0
    cfg.SOLVER.WEIGHT_DECAY_BIAS = None
    assert decay_of(model, build_optimizer(cfg, model))["conv.bias"] == 1e-4
