"""MODEL.GN.RECOMPUTE: the same bits in every gradient, and one activation less for each GN + ReLU."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gn_det.kernels import group_norm_act, saving
from gn_det.kernels.recompute import Recipe, keep_input
from gn_det.modeling.heads import BoxHead, MaskHead
from gn_det.modeling.layers import ConvNorm
from gn_det.modeling.resnet import ResNet, freeze
from gn_det.norm import GroupNorm, GroupRule, NormFactory


class Trunk(nn.Module):
    """A small ResNet and both heads."""

    def __init__(self, rule: GroupRule, depth: int) -> None:
        super().__init__()
        norm = NormFactory("GN", rule)
        channels = 64 if depth < 50 else 32
        self.resnet = ResNet(
            depth=depth, out_features=["res3"], stem_channels=8 if depth >= 50 else 64, norm=norm,
            res2_channels=channels, width_per_group=8 if depth >= 50 else 64,
        )  # fmt: skip
        wide = self.resnet.feature_specs["res3"].channels
        self.box = BoxHead(wide, 4, conv_dims=[8, 8], fc_dims=[16], norm=norm)
        self.mask = MaskHead(wide, 2, conv_dims=[8, 8, 8], norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        features = self.resnet(x)["res3"]
        rois = features[:, :, :4, :4].contiguous()
        return features.square().mean() + self.box(rois).square().mean() + self.mask(rois).square().mean()


def train(model: nn.Module, x: Tensor) -> tuple[list[Tensor], int]:
    """Loss and gradients, and the bytes of distinct storages that the graph keeps, parameters left out."""
    kept: dict[int, Any] = {p.data_ptr(): p for p in model.parameters()}
    own, total = set(kept), 0

    def pack(t: Tensor) -> Tensor:
        nonlocal total
        where = t.untyped_storage().data_ptr()
        if where not in kept:
            kept[where] = t
            total += t.untyped_storage().nbytes()
        return t

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = model(x)
    assert own
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)], total


@pytest.mark.parametrize("depth, most", [(18, 0.85), (50, 0.85)])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_same_bits_less_kept(depth: int, most: float, kind: torch.dtype) -> None:
    """Every gradient has the same bits, fp32 and bf16 autocast; frozen stem included."""
    torch.manual_seed(0)
    rule = GroupRule(4)
    usual, lean = Trunk(rule, depth), Trunk(GroupRule(4, recompute=True), depth)
    lean.load_state_dict(usual.state_dict())
    for model in (usual, lean):
        freeze(model.resnet.stem)
    x = torch.randn(2, 3, 64, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=kind == torch.bfloat16):
        (expected, before), (got, after) = train(usual, x), train(lean, x)
    assert len(got) == len(expected) > 20
    assert all(torch.equal(a, b) for a, b in zip(got, expected))
    assert after <= most * before, (after, before)


def chain(**how: Any) -> nn.Sequential:
    torch.manual_seed(0)
    norm = NormFactory("GN", GroupRule(4, **how))
    convs = [ConvNorm(8, 8, kernel_size=3, padding=1, norm=norm, relu=True) for _ in range(4)]
    return nn.Sequential(*convs, nn.Conv2d(8, 8, 1))


def test_bytes_of_conv_norm_relu() -> None:
    """Usual: x, y and the statistics of each layer; lean: x alone. The last y has a reader that does not take part."""
    x = torch.randn(2, 8, 16, 16)
    one = x.numel() * 4
    _, before = train(nn.Sequential(chain(), Mean()), x)
    _, after = train(nn.Sequential(chain(recompute=True), Mean()), x)
    statistics = 4 * 2 * (2 * 4) * 4
    assert before == x.numel() * 4 + 4 * 2 * one + statistics
    assert after == x.numel() * 4 + 4 * one + one


class Mean(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean()


def test_fused_keeps_x_and_statistics(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the operator (its reference, here) y is applied again from the kept statistics."""
    for where in ("gn_det.kernels.dispatch.takes_kernels", "gn_det.norm.takes_kernels"):
        monkeypatch.setattr(where, lambda x, fused: fused == "on")
    x = torch.randn(2, 8, 16, 16)
    one, statistics = x.numel() * 4, 4 * 2 * (2 * 4) * 4
    expected, before = train(nn.Sequential(chain(fused="on"), Mean()), x)
    got, after = train(nn.Sequential(chain(fused="on", recompute=True), Mean()), x)
    assert all(torch.equal(a, b) for a, b in zip(got, expected))
    assert before == one + 4 * 2 * one + statistics and after == one + 4 * one + one + statistics


def test_graph_can_be_run_twice_and_is_freed() -> None:
    model, x = chain(recompute=True), torch.randn(2, 8, 6, 5, requires_grad=True)
    y = model(x)
    first = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], first)
    norm = GroupNorm(4, 8, recompute=True)
    inner = torch.randn(2, 8, 6, 5) * 1
    z = norm(inner, None, True)
    gone = weakref.ref(inner)
    del inner, z
    gc.collect()
    assert gone() is None


def test_a_changed_y_is_kept_as_it_is() -> None:
    """Who writes into y between maker and reader gets the ordinary gradients."""
    torch.manual_seed(0)
    norm, conv = GroupNorm(4, 8, recompute=True), nn.Conv2d(8, 4, 1)
    usual = copy.deepcopy(norm)
    usual.recompute = False
    x = torch.randn(2, 8, 5, 4)
    grads = []
    for layer in (norm, usual):
        y = layer(x, None, True).mul(1) if layer is usual else layer(x, None, True)
        with torch.no_grad():
            y.add_(1)
        with saving(y):
            z = conv(y)
        grads.append(torch.autograd.grad(z.square().sum(), conv.weight)[0])
    assert torch.equal(*grads)


def test_no_gradient_no_recipe() -> None:
    x, w, b = torch.randn(1, 4, 3, 3), torch.ones(4), torch.zeros(4)
    y = group_norm_act(x, 2, w, b, recompute=True)
    with torch.no_grad():
        z = group_norm_act(x, 2, w.requires_grad_(), b, recompute=True)
    assert torch.equal(y, z) and not hasattr(y, "_gn_det_recipe") and not hasattr(z, "_gn_det_recipe")


def test_activation_checkpointing() -> None:
    from torch.utils.checkpoint import checkpoint

    model, usual, x = chain(recompute=True), chain(), torch.randn(2, 8, 6, 5)
    checkpoint(model, x, use_reentrant=False).square().sum().backward()
    usual(x).square().sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), usual.parameters()))


def test_a_recipe_fits_its_y_alone() -> None:
    """Also a y that was written into before; not a part of it, and not once somebody has changed it."""
    y = torch.zeros(2, 3).add_(1)
    recipe = Recipe(lambda: y)
    recipe.leave_on(y)
    assert recipe.fits(y) and recipe.fits(y.view(6))
    assert not recipe.fits(y[1:]) and not recipe.fits(y.clone())
    y.add_(1)
    assert not recipe.fits(y)


def test_only_gamma_and_beta_need_gradients() -> None:
    """Behind a frozen layer x needs none, and y is left out all the same."""
    x, w, b = torch.randn(1, 4, 3, 3), torch.ones(4, requires_grad=True), torch.zeros(4)
    y = group_norm_act(x, 2, w, b, recompute=True)
    assert hasattr(y, "_gn_det_recipe")
    usual = torch.ones(4, requires_grad=True)
    expected = torch.autograd.grad(group_norm_act(x, 2, usual, b).square().sum(), usual)[0]
    assert torch.equal(torch.autograd.grad(y.square().sum(), w)[0], expected)


def test_y_is_made_again_under_the_autocast_of_the_forward_pass() -> None:
    """The backward pass usually runs outside of it."""
    x, w, b = torch.randn(3, 4), torch.randn(4, 4, requires_grad=True), torch.zeros(4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = keep_input(lambda x, w, b: (x @ w).relu() + b.to(x.dtype), x, w, b)
        low = keep_input(lambda x, w, b: (x @ w).relu(), x, w, b)
    assert low.dtype == torch.bfloat16 and y.dtype == torch.float32
    for made in (low, y):
        again = getattr(made, "_gn_det_recipe").y()  # noqa: B009 - no attribute that a tensor is known to have
        assert again.dtype == made.dtype and torch.equal(again, made)


@pytest.mark.filterwarnings("ignore:.torch.jit", "ignore:Converting a tensor to a Python boolean")
def test_an_exported_graph_has_no_function_of_ours() -> None:
    """It must run where gn_det is not installed, also where it is traced with gradients."""
    model, x = chain(recompute=True), torch.randn(2, 8, 6, 5)
    traced = torch.jit.trace(model, x)
    assert "PythonOp" not in str(traced.inlined_graph) and "KeepInput" not in str(traced.inlined_graph)
    assert torch.equal(traced(x), model(x))
