"""The formulas of fused GroupNorm in plain torch: what the Triton kernels must compute, for any device.

Arithmetic is fp32, or fp64 for fp64 input, and is rounded once, at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor


def memory_format(x: Tensor) -> torch.memory_format:
    """Layout in which the operators compute and answer: channels_last where ``x`` has it, NCHW for everything else."""
    last = x.dim() == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def _grouped(x: Tensor, groups: int) -> Tensor:
    """(N, C, ...) to (N, G, C / G, P) in the type of the arithmetic."""
    n, c = x.shape[:2]
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.to(kind).reshape(n, groups, c // groups, -1)


def _normalized(x: Tensor, mean: Tensor, rstd: Tensor, groups: int) -> Tensor:
    return (_grouped(x, groups) - mean[:, :, None, None]) * rstd[:, :, None, None]


def _affine(x_hat: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    shape = (1, *x_hat.shape[1:3], 1)
    return x_hat * weight.to(x_hat.dtype).reshape(shape) + bias.to(x_hat.dtype).reshape(shape)


def _like(value: Tensor, x: Tensor) -> Tensor:
    """Shape and dtype of ``x``, in its :func:`memory_format`."""
    return torch.empty_like(x, memory_format=memory_format(x)).copy_(value.reshape(x.shape))


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, groups: int, eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y like ``x``, and mean and 1 / std (N, G) in the type of the arithmetic. ``x`` (N, C, ...) is not empty."""
    values = _grouped(x, groups).flatten(2)
    mean = values.mean(dim=2)
    rstd = ((values - mean[:, :, None]).square().mean(dim=2) + eps).rsqrt()
    y = _affine(_normalized(x, mean, rstd, groups), weight, bias)
    if residual is not None:
        y = y + residual.to(y.dtype).reshape(y.shape)
    return _like(y.relu() if relu else y, x), mean, rstd


def apply(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, groups: int, relu: bool) -> Tensor:
    """y again from ``x`` and the statistics."""
    y = _affine(_normalized(x, mean, rstd, groups), weight, bias)
    return _like(y.relu() if relu else y, x)


def backward(
    dy: Tensor,
    x: Tensor,
    out: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    relu: bool,
    need: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x, of the residual, of gamma and of beta; see :func:`gn_det.kernels.launch.backward`."""
    need_x, need_residual, need_parameters = need
    x_hat = _normalized(x, mean, rstd, groups)
    g = _grouped(dy, groups)
    if relu:
        passed = _affine(x_hat, weight, bias) if out is None else _grouped(out, groups)
        g = torch.where(passed <= 0, 0, g)
    dx = dw = db = None
    if need_x:
        scaled = g * weight.to(g.dtype).reshape(1, groups, -1, 1)
        means = scaled.mean(dim=(2, 3), keepdim=True), (scaled * x_hat).mean(dim=(2, 3), keepdim=True)
        dx = _like((scaled - means[0] - x_hat * means[1]) * rstd[:, :, None, None], x)
    if need_parameters:
        dw = (g * x_hat).sum(dim=(0, 3)).flatten().to(weight.dtype)
        db = g.sum(dim=(0, 3)).flatten().to(bias.dtype)
    return dx, _like(g, x) if need_residual else None, dw, db
