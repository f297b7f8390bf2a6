"""Builds native.cpp where a C++ compiler is installed, and calls it: fused GroupNorm and RoIAlign on a CPU.

It takes channels_last maps in float32 and bfloat16; everything else, and machines without a compiler, stay with plain
torch. :mod:`gn_det.compiler` builds the library at its first use.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gn_det import compiler
from gn_det.kernels.reference import memory_format

DTYPES = {torch.float32: "f32", torch.bfloat16: "bf16"}
#: Elements of a chunk, which stays in a core's cache between the passes over it.
_CHUNK = 1 << 16
_SOURCE = Path(__file__).with_name("native.cpp")


def can_run(x: Tensor) -> bool:
    """Whether :func:`forward` and :func:`roi_align` take ``x``; builds the library at the first map that fits."""
    return x.device.type == "cpu" and x.dtype in DTYPES and memory_format(x) is torch.channels_last and available()


# A constant to torch.compile, which cannot trace a compiler.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator, unused-ignore]
def available() -> bool:
    """Return whether the library is built and loaded; log once why not."""
    return _library() is not None


@functools.cache
def _library() -> ctypes.CDLL | None:
    return compiler.load(_SOURCE, "GN and RoIAlign run on torch's kernels")


def _pointer(t: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if t is None else t.data_ptr())


def _call(name: str, x: Tensor, tensors: tuple[Tensor | None, ...], numbers: tuple[Any, ...]) -> None:
    function = getattr(_library(), f"{name}_{DTYPES[x.dtype]}")
    kinds = {int: ctypes.c_int64, float: ctypes.c_float, bool: ctypes.c_int, ctypes.c_int: lambda n: n}
    function(*map(_pointer, tensors), *(kinds[type(n)](n) for n in numbers))


def _threads() -> ctypes.c_int:
    return ctypes.c_int(torch.get_num_threads())


def _map(t: Tensor, x: Tensor) -> Tensor:
    return t.to(x.dtype).contiguous(memory_format=torch.channels_last)


def _cut(x: Tensor, groups: int) -> tuple[int, int, int, int, int]:
    """N, C, pixels, groups, pixels of a chunk."""
    n, c, h, w = x.shape
    rows = max(_CHUNK // c, 16)
    return n, c, h * w, groups, min(rows, h * w)


def _scratch(cut: tuple[int, int, int, int, int]) -> Tensor:
    n, c, pixels, groups, rows = cut
    return torch.empty(2 * n * (-(-pixels // rows) * c + groups), dtype=torch.float32)


# ------------------------------------------------------------ GroupNorm: the signatures of gn_det.kernels.reference


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, groups: int, eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y like ``x``, and fp32 mean and 1 / std (N, G). ``x`` is not empty; ``residual`` has its shape."""
    residual = None if residual is None else _map(residual, x)
    weight, bias, cut = weight.float().contiguous(), bias.float().contiguous(), _cut(x, groups)
    y, mean = torch.empty_like(x), torch.empty((len(x), groups), dtype=torch.float32)
    rstd = torch.empty_like(mean)
    tensors = (x, residual, weight, bias, y, mean, rstd, _scratch(cut))
    _call("gn_forward", x, tensors, (*cut, _threads(), float(eps), bool(relu)))
    return y, mean, rstd


def apply(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, groups: int, relu: bool) -> Tensor:
    """y again, from ``x`` and the statistics of :func:`forward`."""
    weight, bias, y = weight.float().contiguous(), bias.float().contiguous(), torch.empty_like(x)
    _call("gn_apply", x, (x, weight, bias, y, mean, rstd), (*_cut(x, groups), _threads(), bool(relu)))
    return y


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
    dy, cut = _map(dy, x), _cut(x, groups)
    w, b = weight.float().contiguous(), bias.float().contiguous()
    dx = torch.empty_like(x) if need[0] else None
    dres = torch.empty_like(x) if need[1] else None
    dw, db = (torch.empty_like(w), torch.empty_like(b)) if need[2] else (None, None)
    mask = 0 if not relu else 1 if out is None else 2
    tensors = (dy, x, out, w, b, mean, rstd, dx, dres, dw, db, _scratch(cut))
    _call("gn_backward", x, tensors, (*cut, _threads(), ctypes.c_int(mask)))
    return dx, dres, None if dw is None else dw.to(weight.dtype), None if db is None else db.to(bias.dtype)


# ------------------------------------------------------------ RoIAlign


class _RoIAlign(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rois: Tensor, size: int, scale: float, ratio: int, aligned: bool) -> Tensor:
        _, c, h, w = x.shape
        ctx.save_for_backward(rois)
        ctx.shape, ctx.numbers = x.shape, (len(rois), h, w, c, size, _threads(), float(scale), ratio, aligned)
        shape = (len(rois), c, size, size)
        y = torch.empty(shape, dtype=x.dtype, memory_format=torch.channels_last)
        _call("roi_align", x, (x, rois, y), ctx.numbers)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (rois,) = ctx.saved_tensors
        dy = grads[0].contiguous(memory_format=torch.channels_last)
        dx = torch.empty(ctx.shape, dtype=torch.float32, memory_format=torch.channels_last).zero_()
        _call("roi_align_backward", dy, (dy, rois, dx), ctx.numbers)
        return dx.to(dy.dtype), None, None, None, None, None


def roi_align(x: Tensor, rois: Tensor, size: int, scale: float, ratio: int, aligned: bool) -> Tensor:
    """``torchvision.ops.roi_align`` of a map that :func:`can_run`; the result has its dtype and layout.

    Args:
        rois: (K, 5) float32, index of the sample and x0, y0, x1, y1.
    """
    y: Tensor = _RoIAlign.apply(x, rois.contiguous(), size, scale, ratio, aligned)
    return y
