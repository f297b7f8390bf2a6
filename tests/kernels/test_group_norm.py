"""Fused GroupNorm's formulas, operator and dispatch on the CPU, without Triton."""

from __future__ import annotations

import itertools
import os
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gn_det.kernels import group_norm_act, launch, ops, reference, saving
from gn_det.norm import GroupNorm, norm_act

assert ops and "TRITON_INTERPRET" not in os.environ


def operator(x: Tensor, w: Tensor, b: Tensor, res: Tensor | None, groups: int, relu: bool) -> Tensor:
    y: Tensor = torch.ops.gn_det.group_norm_act(x, w, b, res, groups, 1e-5, relu)[0]
    return y


def composed(x: Tensor, w: Tensor, b: Tensor, res: Tensor | None, groups: int, relu: bool) -> Tensor:
    y = F.group_norm(x, groups, w, b, 1e-5)
    y = y if res is None else y + res
    return y.relu() if relu else y


def draw(shape: tuple[int, ...], kind: torch.dtype = torch.float64, last: bool = False) -> list[Tensor]:
    """x, gamma, beta, residual, dy."""
    torch.manual_seed(1)
    layout = torch.channels_last if last else torch.contiguous_format
    maps = [torch.randn(shape).to(kind) for _ in range(3)]
    maps = [m.to(memory_format=layout).requires_grad_() if m.dim() == 4 else m.requires_grad_() for m in maps]
    w, b = ((torch.randn(shape[1]) + k).to(kind).requires_grad_() for k in (1, 0))
    return [maps[0], w, b, maps[1], maps[2].detach()]


SHAPES = (
    ((2, 12, 5, 7), 4),
    ((1, 6, 1, 1), 2),
    ((3, 6, 2, 9), 1),
    ((2, 6, 3, 3), 6),
    ((2, 8), 4),
    ((2, 4, 3, 2, 5), 2),
)


@pytest.mark.parametrize("shape, groups", SHAPES)
@pytest.mark.parametrize("res, relu", list(itertools.product((False, True), repeat=2)))
def test_operator_is_group_norm_add_relu(shape: tuple[int, ...], groups: int, res: bool, relu: bool) -> None:
    """fp64, both layouts, output and every gradient."""
    for last in (False, True) if len(shape) == 4 else (False,):
        x, w, b, r, dy = draw(shape, last=last)
        inputs = [x, w, b] + ([r] if res else [])
        y, z = (f(x, w, b, r if res else None, groups, relu) for f in (operator, composed))
        torch.testing.assert_close(y, z, rtol=1e-11, atol=1e-11)
        for a, e in zip(torch.autograd.grad(y, inputs, dy), torch.autograd.grad(z, inputs, dy)):
            torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-10)


def test_ends_are_layer_norm_and_instance_norm() -> None:
    """One group: LayerNorm over C, H, W; one channel a group: InstanceNorm."""
    x, w, b, _, _ = draw((2, 6, 4, 5))
    shape = (1, 6, 1, 1)
    layer = F.layer_norm(x, x.shape[1:], None, None, 1e-5) * w.view(shape) + b.view(shape)
    torch.testing.assert_close(operator(x, w, b, None, 1, False), layer, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(
        operator(x, w, b, None, 6, False), F.instance_norm(x, weight=w, bias=b, eps=1e-5), rtol=1e-11, atol=1e-11
    )


@pytest.mark.parametrize("kind, limit", [(torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)])
def test_low_precision_rounds_once(kind: torch.dtype, limit: float) -> None:
    """x in low precision, gamma and beta in fp32: within one rounding of fp64, relative to the largest value."""
    x, w, b, r, _ = draw((2, 8, 6, 5), kind)
    w, b = w.detach().float(), b.detach().float()
    y = operator(x, w, b, r, 4, True)
    exact = composed(x.double(), w.double(), b.double(), r.double(), 4, True)
    assert y.dtype == kind
    assert float((y.double() - exact).detach().abs().max() / exact.abs().max()) < limit / 2 + 1e-6


@pytest.mark.parametrize("res, relu", [(False, True), (True, True), (True, False)])
def test_gradcheck(res: bool, relu: bool) -> None:
    """Against finite differences in fp64, away from the ReLU's kink."""
    x, w, b, r, _ = draw((2, 4, 3, 2))
    with torch.no_grad():
        z = composed(x, w, b, r if res else None, 2, False)
        assert not relu or float(z.abs().min()) > 1e-4
    inputs = (x, w, b) + ((r,) if res else ())
    assert torch.autograd.gradcheck(
        lambda *t: operator(t[0], t[1], t[2], t[3] if res else None, 2, relu), inputs, eps=1e-6, atol=1e-6
    )


@pytest.mark.parametrize("res", [False, True])
def test_opcheck(res: bool) -> None:
    """Schema, fake version, autograd registration, and tracing with dynamic shapes."""
    x, w, b, r, dy = draw((2, 4, 3, 2), torch.float32, last=True)
    args = (x, w, b, r if res else None, 2, 1e-5, True)
    torch.library.opcheck(torch.ops.gn_det.group_norm_act, args)
    y, mean, rstd = (t.detach() for t in torch.ops.gn_det.group_norm_act(*args))
    plain = [t.detach() for t in (dy, x, mean, rstd, w, b)]
    for need in ((True, True, True), (True, False, False), (False, False, True)):
        back = (plain[0], plain[1], y if res else None, *plain[2:], 2, True, *need)
        torch.library.opcheck(
            torch.ops.gn_det.group_norm_act_backward, back, test_utils=("test_schema", "test_faketensor")
        )
    torch.library.opcheck(
        torch.ops.gn_det.group_norm_apply, (*plain[1:], 2, True), test_utils=("test_schema", "test_faketensor")
    )


def test_frozen_inputs_get_no_gradient() -> None:
    x, w, b, r, dy = draw((2, 4, 3, 3))
    y = operator(x, w.detach(), b.detach(), r.detach(), 2, True)
    (dx,) = torch.autograd.grad(y, x, dy)
    asked: list[tuple[bool, ...]] = []
    real = reference.backward

    def spy(*args: Any) -> Any:
        asked.append(args[-1])
        return real(*args)

    reference.backward = spy
    try:
        (again,) = torch.autograd.grad(operator(x, w.detach(), b.detach(), r.detach(), 2, True), x, dy)
        torch.autograd.grad(operator(x.detach(), w, b, r, 2, True), (w, r), dy)
    finally:
        reference.backward = real
    assert torch.equal(dx, again)
    assert asked == [(True, False, False), (False, True, True)]


def test_autocast_does_not_cast_up() -> None:
    x, w, b, r, _ = draw((2, 8, 4, 4), torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = operator(x.bfloat16(), w, b, r.bfloat16(), 4, True)
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
    assert w.grad is not None and w.grad.dtype == torch.float32


class Tower(nn.Module):
    """conv - norm - relu, twice, the second one with a shortcut; the norm's way as in a model."""

    def __init__(self, **how: Any) -> None:
        super().__init__()
        self.conv1, self.conv2 = (nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(2))
        self.norm1, self.norm2 = (GroupNorm(4, 8, **how) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = norm_act(self.norm1, self.conv1(x), None, True)
        with saving(y):
            z = self.conv2(y)
        return norm_act(self.norm2, z, x, True)


@pytest.fixture
def kernels_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """``fused="on"`` takes the operator on the CPU, too, where it runs the reference."""
    from gn_det.kernels import dispatch

    monkeypatch.setattr(dispatch, "takes_kernels", lambda x, fused: fused == "on")
    monkeypatch.setattr("gn_det.norm.takes_kernels", lambda x, fused: fused == "on")


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    loss = model(x).square().sum()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("fused", ["on", "auto"])
@pytest.mark.parametrize("able", [True, False])
def test_the_choice_breaks_no_graph(fused: str, able: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled model is one graph and equal, where kernels were measured to be better and where there are none."""
    from torch._dynamo.backends.debugging import aot_eager

    from gn_det.kernels import dispatch

    monkeypatch.setattr(dispatch, "MEASURED_BETTER", frozenset({("cpu", torch.float32)}))
    monkeypatch.setattr(launch, "can_launch_on", lambda kind, dtype: able)
    monkeypatch.setattr(launch, "can_launch", lambda x: False)  # the operator itself launches nothing on a CPU
    torch.manual_seed(0)
    model, x = Tower(fused=fused), torch.randn(2, 8, 6, 5)
    assert model.norm1.takes_over(x) == able
    eager = gradients(model, x)
    compiled = gradients(torch.compile(model, backend=aot_eager, fullgraph=True), x)
    torch.testing.assert_close(compiled, eager, rtol=1e-4, atol=1e-4)  # torch.compile takes nn.GroupNorm apart


@pytest.mark.usefixtures("kernels_everywhere")
def test_compile_checkpoint_and_ddp() -> None:
    """torch.compile traces one graph for any size; activation checkpointing and DDP change nothing."""
    torch.manual_seed(0)
    model, x = Tower(fused="on"), torch.randn(2, 8, 6, 5)
    eager = gradients(model, x)
    assert len(eager) == 7
    counter: list[int] = []

    def backend(graph: Any, inputs: Any) -> Any:
        counter.append(1)
        return graph.forward

    from torch._dynamo.backends.debugging import aot_eager

    compiled = torch.compile(model, backend=aot_eager, fullgraph=True, dynamic=True)
    torch.testing.assert_close(gradients(compiled, x), eager)
    counting = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    for size in ((2, 8, 6, 5), (1, 8, 7, 9), (3, 8, 11, 4)):
        counting(torch.randn(size))
    assert len(counter) <= 2

    from torch.utils.checkpoint import checkpoint

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, x: Tensor) -> Tensor:
            made: Tensor = checkpoint(self.inner, x, use_reentrant=False)
            return made

    assert all(torch.equal(a, b) for a, b in zip(gradients(Checkpointed(), x), eager))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(model)
        assert all(torch.equal(a, b) for a, b in zip(gradients(parallel, x), eager))
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("kernels_everywhere")
def test_switch_changes_no_result_and_no_state() -> None:
    torch.manual_seed(0)
    off, on = Tower(fused="off").double(), Tower(fused="on").double()
    on.load_state_dict(off.state_dict())
    x = torch.randn(2, 8, 6, 5, dtype=torch.float64)
    for a, b in zip(gradients(on, x), gradients(off, x)):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_auto_is_torch_until_measured(caplog: pytest.LogCaptureFixture) -> None:
    """The bits of F.group_norm, add, ReLU; "on" says so where there is no kernel; 0 samples; wrong words."""
    from gn_det.kernels import dispatch

    dispatch._warn_plain.cache_clear()  # it warns once, perhaps in an earlier test
    x, w, b, r, _ = draw((2, 4, 3, 3), torch.float32)
    want = F.relu(F.group_norm(x, 2, w, b, 1e-5) + r)
    for fused in ("auto", "off", "on"):
        assert torch.equal(group_norm_act(x, 2, w, b, 1e-5, r, fused=fused), want)
    assert torch.equal(group_norm_act(x, 2, None, None, act="none"), F.group_norm(x, 2))
    assert not launch.can_launch(x)
    assert "no fused kernel can run" in caplog.text
    assert group_norm_act(x[:0], 2, w, b, 1e-5, r[:0]).shape == (0, 4, 3, 3)
    with pytest.raises(ValueError, match="act='gelu'"):
        group_norm_act(x, 2, w, b, act="gelu")


def test_exports_hold_torch_operations_only() -> None:
    torch.manual_seed(0)
    model, x = Tower(fused="on"), torch.randn(1, 8, 6, 5)
    with torch.no_grad():
        traced = torch.jit.trace(model, x)
        assert "gn_det::" not in str(traced.inlined_graph)
        assert torch.equal(traced(x), model(x))


def test_plan() -> None:
    """Slices cover every pixel once, chunks are whole tiles, and RoI-sized maps take one launch."""
    for n, c, p, last in itertools.product((1, 2, 512), (64, 256, 2048), (49, 196, 1050, 67200), (False, True)):
        cut = launch.plan(n, c, p, 32, last)
        assert cut.small == (p <= 64 or (p <= 256 and c // 32 <= 32))
        assert (cut.slices - 1) * cut.chunk < p <= cut.slices * cut.chunk
        if not cut.small:
            assert cut.chunk % cut.tile[1] == 0 and cut.blocks * cut.tile[0] >= c
            assert cut.slices == 1 or cut.slices * n * cut.blocks <= launch.PROGRAMS
    variants = {
        (cut.small, cut.tile, cut.vec) for p in range(50, 5000, 7) for cut in [launch.plan(1, 256, p, 32, False)]
    }
    assert sum(small for small, *_ in variants) <= 2 and sum(not small for small, *_ in variants) <= 2


def test_statistics_of_a_large_offset() -> None:
    """Mean 1e4, variance 1 in fp32: the variance within 1e-6 of fp64's."""
    torch.manual_seed(0)
    x = 1e4 + torch.randn(1, 4, 40, 40)
    _, mean, rstd = reference.forward(x, torch.ones(4), torch.zeros(4), None, 2, 1e-5, False)
    values = x.double().reshape(1, 2, -1)
    torch.testing.assert_close(mean.double(), values.mean(2), rtol=1e-7, atol=0)
    torch.testing.assert_close(rstd.double(), (values.var(2, unbiased=False) + 1e-5).rsqrt(), rtol=1e-6, atol=0)


def test_auto_takes_kernels_for_what_was_measured_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device and a type; another type on that device, or another device, has not been measured."""
    from gn_det.kernels import dispatch

    monkeypatch.setattr(launch, "can_launch_on", lambda kind, dtype: True)
    x = torch.zeros(1, 4, 2, 2)
    for measured, takes in (
        (("cpu", torch.float32), True),
        (("cpu", torch.bfloat16), False),
        (("a GPU", x.dtype), False),
    ):
        monkeypatch.setattr(dispatch, "MEASURED_BETTER", frozenset({measured}))
        assert dispatch.takes_kernels(x, "auto") == takes
        assert dispatch.takes_kernels(x, "on") and not dispatch.takes_kernels(x, "off")


@pytest.mark.usefixtures("kernels_everywhere")
def test_a_residual_of_another_shape_is_left_to_torch() -> None:
    """The operator takes maps of one shape; a residual that torch would broadcast gives the same sum."""
    x, w, b, r, _ = draw((2, 4, 3, 3))
    small = r[:, :, :1, :1]
    assert torch.equal(group_norm_act(x, 2, w, b, 1e-5, small, fused="on"), composed(x, w, b, small, 2, True))


@pytest.mark.parametrize(
    ("shape", "slow"), [((8, 4, 16, 16), True), ((7, 4, 16, 16), False), ((8, 4, 16, 17), False), ((8, 4, 256), False)]
)
def test_the_way_over_nchw_is_for_rois(shape: tuple[int, ...], slow: bool) -> None:
    """At least 8 maps of at most 256 pixels, in low precision, in channels_last."""
    from gn_det.kernels.dispatch import _slow_on_cpu

    x = torch.zeros(shape, dtype=torch.bfloat16)
    last = x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x
    assert _slow_on_cpu(last) == slow
    assert not _slow_on_cpu(x) and not _slow_on_cpu(last.float())
