"""Fused GroupNorm as torch operators: ``torch.ops.gn_det.group_norm_act`` and its backward.

As operators they carry a fake version (torch.compile, meta tensors) and a gradient. They have no autocast rule on
purpose: under autocast they take bf16 or fp16 x beside fp32 gamma and beta, and nothing is cast up. On a GPU and under
Triton's interpreter they launch the kernels, for what :mod:`gn_det.kernels.native` takes they call that, and elsewhere
they run :mod:`gn_det.kernels.reference`.

An operator's outputs are tensors: what was not asked for comes back with 0 elements. There is no second derivative.
"""

# mypy: disallow-untyped-calls=False

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gn_det.kernels import launch, native, reference

_LIBRARY = torch.library.Library("gn_det", "DEF")
_LIBRARY.define(
    "group_norm_act(Tensor x, Tensor weight, Tensor bias, Tensor? residual, int num_groups, float eps, bool relu)"
    " -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "group_norm_act_backward(Tensor dy, Tensor x, Tensor? out, Tensor mean, Tensor rstd, Tensor weight, Tensor bias,"
    " int num_groups, bool relu, bool need_x, bool need_residual, bool need_parameters)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "group_norm_apply(Tensor x, Tensor mean, Tensor rstd, Tensor weight, Tensor bias, int num_groups, bool relu)"
    " -> Tensor"
)

_KEY = "CompositeExplicitAutograd"


def _way(x: Tensor) -> Any:
    """The module that computes."""
    return launch if launch.can_launch(x) else native if native.can_run(x) else reference


def _empty(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=reference.memory_format(x))


def _statistics(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    shape = (x.shape[0], groups)
    return torch.zeros(shape, dtype=kind, device=x.device), torch.zeros(shape, dtype=kind, device=x.device)


def _forward(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, num_groups: int, eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    if x.numel() == 0:
        return _empty(x), *_statistics(x, num_groups)
    way = _way(x)
    y, mean, rstd = way.forward(x, weight, bias, residual, num_groups, eps, relu)
    return y, mean, rstd


def _fake_forward(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, num_groups: int, eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty(x), *_statistics(x, num_groups)


def _apply(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, num_groups: int, relu: bool) -> Tensor:
    if x.numel() == 0:
        return _empty(x)
    way = _way(x)
    y: Tensor = way.apply(x, mean, rstd, weight, bias, num_groups, relu)
    return y


def _fake_apply(
    x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, num_groups: int, relu: bool
) -> Tensor:
    return _empty(x)


def _fake_backward(
    dy: Tensor,
    x: Tensor,
    out: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    relu: bool,
    need_x: bool,
    need_residual: bool,
    need_parameters: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        _empty(x) if need_x else x.new_empty(0),
        _empty(x) if need_residual else x.new_empty(0),
        torch.empty_like(weight) if need_parameters else weight.new_empty(0),
        torch.empty_like(bias) if need_parameters else bias.new_empty(0),
    )


def _backward(
    dy: Tensor,
    x: Tensor,
    out: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    num_groups: int,
    relu: bool,
    need_x: bool,
    need_residual: bool,
    need_parameters: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if x.numel() == 0:
        like = (x, x, weight, bias)
        needs = (need_x, need_residual, need_parameters, need_parameters)
        made = [torch.zeros_like(t) if need else t.new_empty(0) for t, need in zip(like, needs)]
        return made[0], made[1], made[2], made[3]
    way = _way(x)
    need = (need_x, need_residual, need_parameters)
    grads = way.backward(dy, x, out, mean, rstd, weight, bias, num_groups, relu, need)
    dx, dres, dw, db = (t.new_empty(0) if g is None else g for g, t in zip(grads, (x, x, weight, bias)))
    return dx, dres, dw, db


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, bias, residual, ctx.num_groups, _, ctx.relu = inputs
    y, mean, rstd = output
    ctx.set_materialize_grads(False)
    # Without a residual the ReLU's mask comes from x: y need not be kept.
    ctx.save_for_backward(x, weight, bias, mean, rstd, y if ctx.relu and residual is not None else None)
    ctx.residual_dtype = None if residual is None else residual.dtype


def _autograd(ctx: Any, dy: Tensor | None, _dmean: Any, _drstd: Any) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 7
    x, weight, bias, mean, rstd, out = ctx.saved_tensors
    need_x, need_w, need_b, need_residual = ctx.needs_input_grad[:4]
    # Without a ReLU the residual's gradient is dy itself.
    written = need_residual and ctx.relu
    dx, dres, dw, db = torch.ops.gn_det.group_norm_act_backward(
        dy, x, out, mean, rstd, weight, bias, ctx.num_groups, ctx.relu, need_x, written, need_w or need_b
    )
    if need_residual:
        dres = (dres if written else dy).to(ctx.residual_dtype)
    return (
        dx if need_x else None,
        dw if need_w else None,
        db if need_b else None,
        dres if need_residual else None,
        None,
        None,
        None,
    )


_LIBRARY.impl("group_norm_act", _forward, _KEY)
_LIBRARY.impl("group_norm_act_backward", _backward, _KEY)
_LIBRARY.impl("group_norm_apply", _apply, _KEY)
torch.library.register_fake("gn_det::group_norm_act", _fake_forward, lib=_LIBRARY)
torch.library.register_fake("gn_det::group_norm_act_backward", _fake_backward, lib=_LIBRARY)
torch.library.register_fake("gn_det::group_norm_apply", _fake_apply, lib=_LIBRARY)
torch.library.register_autograd("gn_det::group_norm_act", _autograd, setup_context=_setup_context, lib=_LIBRARY)
