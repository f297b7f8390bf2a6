"""Norm layers: what each name means, the rule for groups, empty batches, frozen BatchNorm."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn

from gn_det.errors import ConfigError
from gn_det.norm import FrozenBatchNorm2d, GroupNorm, GroupRule, NormFactory, freeze_batch_norm, get_norm, norm_act


def by_definition(x: torch.Tensor, groups: int, weight: torch.Tensor, bias: torch.Tensor, eps: float) -> torch.Tensor:
    """GN written out: mean and variance over the channels of a group and all positions, per sample."""
    n, c, h, w = x.shape
    grouped = x.reshape(n, groups, -1)
    mean = grouped.mean(dim=2, keepdim=True)
    variance = grouped.var(dim=2, unbiased=False, keepdim=True)
    normal = ((grouped - mean) / torch.sqrt(variance + eps)).view(n, c, h, w)
    return normal * weight.view(1, c, 1, 1) + bias.view(1, c, 1, 1)


@pytest.mark.parametrize("name, groups", [("GN", 4), ("LN", 1), ("IN", 12)])
def test_equals_definition(name: str, groups: int) -> None:
    """Output and every gradient; LN is one group, IN one channel a group."""
    torch.manual_seed(0)
    norm = NormFactory(name, GroupRule(num_groups=4, eps=1e-3))(12).double()
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = (3 + 2 * torch.randn(2, 12, 5, 7, dtype=torch.float64)).requires_grad_()
    inputs = (x, norm.weight, norm.bias)
    out, expected = norm(x), by_definition(x, groups, norm.weight, norm.bias, 1e-3)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    seed = torch.randn_like(out)
    for a, b in zip(torch.autograd.grad(out, inputs, seed), torch.autograd.grad(expected, inputs, seed)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_low_precision_and_channels_last(dtype: torch.dtype, tolerance: float) -> None:
    torch.manual_seed(0)
    norm = get_norm("GN", 64).to(dtype)
    x = torch.randn(2, 64, 6, 5, dtype=dtype)
    expected = by_definition(x.double(), 32, norm.weight.double(), norm.bias.double(), 1e-5)
    for layout in (torch.contiguous_format, torch.channels_last):
        out = norm(x.to(memory_format=layout))
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["GN", "LN", "IN", "BN", "FrozenBN"])
def test_no_samples(name: str) -> None:
    """0 RoIs: the shape is kept, and parameters get zero gradients, not none (DDP waits for them)."""
    norm = get_norm(name, 32)
    x = torch.zeros(0, 32, 7, 7, requires_grad=True)
    out = norm(x)
    assert out.shape == x.shape
    out.sum().backward()
    assert x.grad is not None
    for p in norm.parameters():
        assert p.grad is not None and not p.grad.any()


def test_weight_decay_rules_find_gamma_by_class() -> None:
    for name in ("GN", "LN", "IN"):
        assert isinstance(get_norm(name, 32), nn.GroupNorm)


def test_group_rule() -> None:
    assert GroupRule().groups(256) == 32
    assert GroupRule(channels_per_group=16).groups(256) == 16
    assert GroupRule(num_groups=7, channels_per_group=8).groups(64) == 8


@pytest.mark.parametrize("rule, key", [(GroupRule(), "NUM_GROUPS"), (GroupRule(channels_per_group=32), "CHANNELS_PER")])
def test_groups_that_do_not_divide(rule: GroupRule, key: str) -> None:
    """The message names the key that asks for it, the layer's channels, the key to set and the counts that work."""
    with pytest.raises(ConfigError) as error:
        NormFactory("GN", rule, "MODEL.RESNETS.NORM")(40)
    text = str(error.value)
    for part in ("MODEL.RESNETS.NORM GN", "40 channels", f"set MODEL.GN.{key}", "1, 2, 4, 5, 8, 10, 20, 40"):
        assert part in text
    assert "\n" not in text


def test_none_callable_and_unknown() -> None:
    assert get_norm("", 8) is None
    assert get_norm(None, 8) is None
    made = get_norm(lambda channels: GroupNorm(2, channels), 8)
    assert isinstance(made, GroupNorm) and made.num_groups == 2
    with pytest.raises(ConfigError, match=r"MODEL\.FPN\.NORM: unknown norm 'XN'; use one of 'GN', "):
        NormFactory("XN", key="MODEL.FPN.NORM")(8)


def test_frozen_bn_is_bn_in_evaluation() -> None:
    """Converted layer = BatchNorm with fixed statistics, with and without gradients; nothing in it trains."""
    torch.manual_seed(0)
    bn = nn.BatchNorm2d(6, eps=1e-3)
    for tensor in (bn.weight, bn.bias, bn.running_mean):
        nn.init.normal_(tensor)
    nn.init.uniform_(bn.running_var, 0.5, 2)
    holder = freeze_batch_norm(nn.Sequential(nn.Conv2d(6, 6, 1), bn))
    frozen = holder[1]
    assert isinstance(frozen, FrozenBatchNorm2d) and not list(frozen.parameters())
    x = torch.randn(2, 6, 4, 4)
    expected = bn.eval()(x)
    torch.testing.assert_close(frozen(x), expected)
    torch.testing.assert_close(frozen(x.requires_grad_()), expected)
    assert "num_batches_tracked" in frozen.state_dict()


def test_fresh_frozen_bn_is_the_identity_and_reads_caffe2_weights() -> None:
    """Caffe2 files have gamma and beta only."""
    frozen = FrozenBatchNorm2d(5)
    x = torch.randn(2, 5, 3, 3)
    torch.testing.assert_close(frozen(x), x)
    frozen.load_state_dict({"weight": torch.full((5,), 2.0), "bias": torch.ones(5)})
    torch.testing.assert_close(frozen(x), 2 * x + 1, rtol=1e-4, atol=1e-4)


def test_freezing_keeps_group_norm() -> None:
    norm = freeze_batch_norm(nn.Sequential(GroupNorm(2, 4)))[0]
    assert isinstance(norm, GroupNorm)


def test_cpu_takes_the_faster_way_for_rois_in_low_precision() -> None:
    """Without kernels: bf16, channels_last, RoI-sized goes over NCHW, and is answered in channels_last."""
    torch.manual_seed(0)
    norm = NormFactory("GN", GroupRule(8, fused="off"))(32)
    x = torch.randn(8, 32, 7, 7)
    low = x.bfloat16().contiguous(memory_format=torch.channels_last).requires_grad_()
    seen = []
    real = torch.nn.functional.group_norm

    def spy(x: torch.Tensor, *args: object) -> torch.Tensor:
        seen.append(x.is_contiguous())
        return real(x, *args)

    torch.nn.functional.group_norm = spy
    try:
        out = norm(low)
    finally:
        torch.nn.functional.group_norm = real
    assert seen == [True] and out.dtype == torch.bfloat16
    assert out.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out.float(), norm(low.detach().float()), rtol=1e-2, atol=1e-2)
    out.sum().backward()
    assert low.grad is not None


@pytest.mark.parametrize("name", ["GN", "FrozenBN", ""])
@pytest.mark.parametrize("how", [{}, {"fused": "on"}, {"recompute": True}])
def test_norm_act(name: str, how: dict[str, object]) -> None:
    """Norm, add and ReLU in one call have the bits of the three, whatever the switch says on a CPU."""
    torch.manual_seed(0)
    norm = NormFactory(name, GroupRule(4, **how))(8) if name else None
    x, shortcut = torch.randn(2, 8, 5, 3), torch.randn(2, 8, 5, 3)
    normal = x if norm is None else norm(x)
    for residual in (None, shortcut):
        for relu in (False, True):
            expected = normal if residual is None else normal + residual
            expected = expected.relu() if relu else expected
            assert torch.equal(norm_act(norm, x.clone(), residual, relu), expected)


def test_how_it_is_computed_is_no_part_of_the_rule_or_the_state() -> None:
    assert GroupRule(fused="on", recompute=True) == GroupRule()
    norms = [NormFactory("GN", GroupRule(4, fused=f, recompute=r))(8) for f, r in (("auto", False), ("on", True))]
    assert isinstance(norms[1], GroupNorm) and norms[1].fused == "on" and norms[1].recompute
    assert list(norms[0].state_dict()) == list(norms[1].state_dict()) == ["weight", "bias"]


def test_config_switches_reach_every_layer() -> None:
    """MODEL.GN.FUSED and RECOMPUTE, in backbone, FPN and heads; other values are refused by name."""
    from gn_det.config import load_config
    from gn_det.config.check import check_config
    from gn_det.modeling import build_model

    keys = ["MODEL.ROI_HEADS.NUM_CLASSES", "3", "MODEL.GN.FUSED", "on", "MODEL.GN.RECOMPUTE", "True"]
    norms = [m for m in build_model(load_config("quickstart", keys)).modules() if isinstance(m, GroupNorm)]
    assert len(norms) > 20 and all(m.fused == "on" and m.recompute for m in norms)
    with pytest.raises(ConfigError, match=r"MODEL\.GN\.FUSED is 'fast'"):
        check_config(load_config("quickstart", ["MODEL.GN.FUSED", "fast"]))


@pytest.mark.parametrize("channels", [1, 4])
def test_one_channel_a_group(channels: int) -> None:
    """CHANNELS_PER_GROUP 1 is IN, however many channels there are."""
    assert GroupRule(num_groups=1, channels_per_group=1).groups(channels) == channels


def test_a_norm_knows_its_name() -> None:
    assert [getattr(get_norm(name, 32), "kind", None) for name in ("GN", "LN", "IN")] == ["GN", "LN", "IN"]


def test_fresh_frozen_bn_is_the_identity_with_any_eps() -> None:
    """running_var is 1 - eps, as in Detectron2, whose files hold that value."""
    frozen, x = FrozenBatchNorm2d(5, eps=0.25), torch.randn(2, 5, 3, 3)
    assert torch.equal(frozen.running_var, torch.full((5,), 0.75))
    torch.testing.assert_close(frozen(x), x)


def test_only_old_frozen_bn_may_lack_statistics() -> None:
    """Version 1 and files without a version have scale and shift alone; in a newer file that is a damage."""
    scale = {"weight": torch.full((5,), 2.0), "bias": torch.ones(5)}
    for version in (None, 1):
        state = OrderedDict(scale)
        state._metadata = {"": {} if version is None else {"version": version}}  # type: ignore[attr-defined]
        frozen = FrozenBatchNorm2d(5)
        frozen.load_state_dict(state)
        assert torch.equal(frozen.running_var, torch.ones(5))
    state = OrderedDict(scale)
    state._metadata = {"": {"version": 2}}  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="running_mean"):
        FrozenBatchNorm2d(5).load_state_dict(state)


def test_synchronized_bn_is_frozen_too() -> None:
    assert isinstance(freeze_batch_norm(nn.Sequential(nn.SyncBatchNorm(4)))[0], FrozenBatchNorm2d)


@pytest.mark.parametrize("relu", [False, True])
def test_a_layer_that_takes_over_is_given_the_add_and_the_relu(relu: bool) -> None:
    seen = []

    class Recording(GroupNorm):
        def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None, relu: bool = False) -> torch.Tensor:
            seen.append((residual is not None, relu))
            return super().forward(x, residual, relu)

    x = torch.randn(2, 4, 3, 3)
    norm = Recording(2, 4, recompute=True)
    assert norm.takes_over(x) and not GroupNorm(2, 4).takes_over(x)
    norm_act(norm, x, x.clone(), relu)
    assert seen == [(True, relu)]


@pytest.mark.filterwarnings("ignore:.torch.jit")
def test_scripted_norm_is_the_norm() -> None:
    """TorchScript compiles a branch of its own."""
    norm = GroupNorm(2, 4)
    nn.init.normal_(norm.weight)
    scripted = torch.jit.script(norm)
    x, residual = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    for arguments in ((None, False), (None, True), (residual, False), (residual, True)):
        assert torch.equal(scripted(x, *arguments), norm(x, *arguments))
