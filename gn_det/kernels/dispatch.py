"""How GroupNorm + residual + ReLU is computed: by compiled kernels, with recomputation, or by plain torch."""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor
from torch.nn import functional as F

from gn_det.kernels import launch, native, recompute
from gn_det.kernels.reference import memory_format

logger = logging.getLogger(__name__)

ACTIVATIONS = ("relu", "none")
MODES = ("auto", "on", "off")

#: (device name, dtype) for which benchmarks/group_norm.py found the Triton kernels faster than torch's. Empty as long
#: as no GPU has been benchmarked: "auto" uses plain torch there. On a CPU it takes native.cpp for channels_last maps.
MEASURED_BETTER: frozenset[tuple[str, torch.dtype]] = frozenset()


def group_norm_act(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float = 1e-5,
    residual: Tensor | None = None,
    act: str = "relu",
    *,
    fused: str = "auto",
    recompute: bool = False,
) -> Tensor:
    """``act(group_norm(x) + residual)``.

    Plain torch is ``F.group_norm``, an in-place add and an in-place ReLU. The fused operator (Triton on a GPU,
    native.cpp on a CPU) computes in fp32 and rounds once; under autocast its result has the dtype of ``x``.

    Args:
        x: (N, C, ...), N may be 0; NCHW or channels_last, a layout that the fused operator keeps, as it does
            channels_last_3d.
        num_groups: G; divides C.
        weight, bias: gamma and beta (C,), any floating dtype, or None (plain torch).
        eps: added to the variance.
        residual: added before the activation, shape of ``x``.
        act: "relu" or "none".
        fused: "on" uses the kernels wherever they can run, "off" never, "auto" where they have been benchmarked as
            faster: for channels_last maps on a CPU, and on GPUs of :data:`MEASURED_BETTER`.
        recompute: with a ReLU and no residual, keep x instead of the result and compute it again in the backward pass;
            the layer that reads it needs :func:`gn_det.kernels.recompute.saving`.

    Raises:
        ValueError: unknown ``act`` or ``fused``.
    """
    if act not in ACTIVATIONS or fused not in MODES:
        raise ValueError(f"act={act!r}, fused={fused!r}: use one of {ACTIVATIONS} and one of {MODES}")
    relu = act == "relu"
    lean = recompute and relu and residual is None and not _exporting() and not torch.compiler.is_compiling()
    if weight is not None and bias is not None:
        if takes_kernels(x, fused) and (residual is None or residual.shape == x.shape):
            if x.dim() == 5:  # as images of T * H rows: the same numbers, and the same memory
                flat = None if residual is None else residual.flatten(2, 3)
                return _fused(x.flatten(2, 3), num_groups, weight, bias, eps, flat, relu, False).view(x.shape)
            return _fused(x, num_groups, weight, bias, eps, residual, relu, lean)
        if lean and x.shape[0] > 0:
            return _lean_plain(x, num_groups, weight, bias, eps)
    return plain(x, num_groups, weight, bias, eps, residual, relu)


def takes_kernels(x: Tensor, fused: str) -> bool:
    """Whether :func:`group_norm_act` launches kernels for ``x``."""
    if fused == "off" or _exporting():
        return False
    x = x.flatten(2, 3) if x.dim() == 5 else x
    if native.can_run(x):
        return True
    if fused == "auto" and not MEASURED_BETTER:
        return False  # the fast path: this runs for every layer
    return bool(_chosen(x.device, x.dtype, fused))


def takes_native_roi_align(x: Tensor, fused: str) -> bool:
    """Whether :func:`gn_det.kernels.native.roi_align` pools ``x``; else torchvision does."""
    return fused != "off" and not torch.compiler.is_compiling() and not _exporting() and native.can_run(x)


# A constant to torch.compile: looking for Triton and the device's name, and warning, would break the graph.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator, unused-ignore]
def _chosen(device: torch.device, dtype: torch.dtype, fused: str) -> bool:
    able = launch.can_launch_on(device.type, dtype)
    if fused == "auto":
        return able and (_name(device), dtype) in MEASURED_BETTER
    if not able:
        _warn_plain(device.type, dtype)
    return able


@functools.cache
def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@functools.cache
def _warn_plain(kind: str, dtype: torch.dtype) -> None:
    why = "Triton is not installed" if kind == "cuda" and not launch.has_triton() else f"device {kind}, {dtype}"
    if kind == "cpu" and dtype in native.DTYPES:
        why = "on a CPU it needs MODEL.CHANNELS_LAST True and a C++ compiler"
    logger.warning("MODEL.GN.FUSED on: no fused kernel can run (%s); using torch's GroupNorm.", why)


def _exporting() -> bool:
    """An exported graph must run where gn_det is not installed."""
    tracing = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call, unused-ignore]
    return bool(tracing or torch.onnx.is_in_onnx_export())


def _fused(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    residual: Tensor | None,
    relu: bool,
    lean: bool,
) -> Tensor:
    from gn_det.kernels import ops  # noqa: F401 - registers the operators

    y, mean, rstd = torch.ops.gn_det.group_norm_act(x, weight, bias, residual, groups, eps, relu)
    if lean and y.requires_grad:
        kept = [t.detach() for t in (x, mean, rstd, weight, bias)]
        recompute.Recipe(lambda: torch.ops.gn_det.group_norm_apply(*kept, groups, relu)).leave_on(y)
    result: Tensor = y
    return result


def _lean_plain(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    def again(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return plain(x, groups, weight, bias, eps, None, True)

    return recompute.keep_input(again, x, weight, bias)


def plain(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    """Apply torch's own operations one after the other."""
    y = group_norm(x, num_groups, weight, bias, eps)
    if residual is not None:
        y += residual
    return F.relu_(y) if relu else y


def group_norm(x: Tensor, num_groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """``F.group_norm`` that takes 0 samples and avoids torch's slow path on CPUs."""
    if x.shape[0] == 0:
        # Not every backend launches on an empty batch; the product keeps gamma and beta in the graph (DDP).
        return x if weight is None or bias is None else x + (weight.sum() + bias.sum()).to(x.dtype)
    if _slow_on_cpu(x):
        made = F.group_norm(x.contiguous(), num_groups, weight, bias, eps)
        return made.contiguous(memory_format=torch.channels_last)
    return F.group_norm(x, num_groups, weight, bias, eps)


def _slow_on_cpu(x: Tensor) -> bool:
    """Whether a detour over NCHW is faster: low precision in channels_last, for RoI-sized maps.

    Measured forward and backward on one core in process time (torch 2.15; medians of 9): at 128x256x7x7 4.2 times
    frozen BN's time, 2.8 this way; at 64x256x14x14 10.7 and 7.8. On maps of whole images it does not always pay.
    """
    if x.dtype not in (torch.bfloat16, torch.float16) or x.device.type != "cpu" or x.dim() != 4 or _exporting():
        return False
    return x.shape[0] >= 8 and x.shape[2] * x.shape[3] <= 256 and memory_format(x) is torch.channels_last
