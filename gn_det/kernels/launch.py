"""Plans and launches the Triton kernels: tensors in, tensors out, no autograd. Triton is imported at the first launch.

The plan depends on shapes alone, never on the number of multiprocessors, so a result does not depend on the GPU model.
Tiles and the wanted number of programs come from byte counts, not from tuning: no GPU has timed them yet.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gn_det.kernels.reference import memory_format

#: (BC, BP): channels x pixels of a tile of the split kernels; whole rows of NCHW, whole vectors of channels_last
TILES = {False: (1, 2048), True: (64, 32)}
#: tiles of the kernels that hold whole groups: the first that is large enough is taken
SMALL_TILES = ((64, 64), (32, 256))
#: programs that a large map is split into
PROGRAMS = 1024
#: slots merged at a time; two numbers are kept for each slot
MERGE_LANES = 128
#: channels of one program that adds up dgamma and dbeta
PARAMETER_CHANNELS = 16

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def interpreted() -> bool:
    """Whether Triton runs on the CPU, for tests (TRITON_INTERPRET=1 before Triton is imported)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.lru_cache(maxsize=1)
def has_triton() -> bool:
    """Whether the package is there; it is not imported."""
    return importlib.util.find_spec("triton") is not None


def can_launch(x: Tensor) -> bool:
    """Whether the kernels take ``x``: a GPU (or the interpreter), Triton, a dtype of :data:`DTYPES`."""
    return can_launch_on(x.device.type, x.dtype)


def can_launch_on(kind: str, dtype: torch.dtype) -> bool:
    """:func:`can_launch` for tensors of ``dtype`` on devices of the type ``kind``."""
    on_device = kind == "cuda" or (kind == "cpu" and interpreted())
    return on_device and dtype in DTYPES and has_triton()


@dataclass(frozen=True)
class Plan:
    """How a tensor is cut into programs.

    Attributes:
        n, c, p: samples, channels, pixels.
        last: channels_last.
        small: whole groups fit a tile: one launch, one read.
        tile: channels x pixels.
        blocks: tiles over the channels.
        slices, chunk: pixels are cut into ``slices`` of ``chunk``, a multiple of the tile's; 1 and p if small.
        vec: the contiguous dimension is a multiple of 16 (if small: channels_last, and the groups fill the tile).
    """

    n: int
    c: int
    p: int
    groups: int
    last: bool
    small: bool
    tile: tuple[int, int]
    blocks: int
    slices: int
    chunk: int
    vec: bool


def plan(n: int, c: int, p: int, groups: int, last: bool) -> Plan:
    """Cut (n, c, p), none of them 0, into programs."""
    per_group = c // groups
    for bc, bp in SMALL_TILES:
        if per_group <= bc and p <= bp:
            vec = last and c % 16 == 0 and bc % per_group == 0
            return Plan(n, c, p, groups, last, True, (bc, bp), -(-groups // (bc // per_group)), 1, p, vec)
    return split(n, c, p, groups, last)


def split(n: int, c: int, p: int, groups: int, last: bool) -> Plan:
    """The plan of the split kernels, whatever the size."""
    bc, bp = TILES[last]
    blocks = -(-c // bc)
    tiles = -(-p // bp)
    chunk = -(-tiles // max(1, min(PROGRAMS // (n * blocks), tiles))) * bp
    vec = (c if last else p) % 16 == 0
    return Plan(n, c, p, groups, last, False, (bc, bp), blocks, -(-p // chunk), chunk, vec)


def _plan_of(x: Tensor, groups: int) -> Plan:
    n, c = x.shape[:2]
    return plan(n, c, x.numel() // (n * c), groups, memory_format(x) is torch.channels_last)


def _ready(t: Tensor, fmt: torch.memory_format) -> Tensor:
    """Return the tensor in the layout and aligned: Triton recompiles for pointers that are not multiples of 16."""
    t = t.contiguous(memory_format=fmt)
    return t if t.data_ptr() % 16 == 0 else t.clone(memory_format=torch.preserve_format)


@contextlib.contextmanager
def _on(device: torch.device) -> Iterator[None]:
    """Triton launches on the current device; it must be the tensor's."""
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            yield
    else:
        yield


def _slots(cut: Plan, device: torch.device) -> Tensor:
    """Two numbers for each (n, c, s); rows are multiples of 16 bytes, for the alignment of both."""
    return torch.empty((2, -(-cut.n * cut.c * cut.slices // 4) * 4), dtype=torch.float32, device=device)


def _kernels() -> Any:
    from gn_det.kernels import triton_kernels

    return triton_kernels


def _tile(plan: Plan) -> dict[str, Any]:
    bc, bp = plan.tile
    return {"LAST": plan.last, "VEC": plan.vec, "BC": bc, "BP": bp, "num_warps": 4 if bc * bp <= 4096 else 8}


def forward(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, groups: int, eps: float, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y like ``x``, and fp32 mean and 1 / std (N, G). ``x`` is not empty; ``residual`` has its shape."""
    fmt = memory_format(x)
    x, weight, bias = _ready(x, fmt), _ready(weight, torch.contiguous_format), _ready(bias, torch.contiguous_format)
    res = x if residual is None else _ready(residual, fmt)
    y = torch.empty_like(x, memory_format=fmt)
    cut = _plan_of(x, groups)
    mean = torch.empty((cut.n, groups), dtype=torch.float32, device=x.device)
    rstd = torch.empty_like(mean)
    k, flags = _kernels(), {"RES": residual is not None, "RELU": relu}
    with _on(x.device):
        if cut.small:
            k.small_forward_kernel[(cut.n * cut.blocks,)](
                x, res, weight, bias, y, mean, rstd, cut.c, groups, cut.p, cut.blocks, eps, **flags, **_tile(cut)
            )
            return y, mean, rstd
        slots = _slots(cut, x.device)
        grid = (cut.n * cut.blocks, cut.slices)
        k.stats_kernel[grid](
            x, slots[0], slots[1], cut.c, cut.p, cut.slices, cut.chunk, cut.blocks, **_tile(cut)
        )  # fmt: skip
        merge = cut.tile[0] == 1
        if not merge:
            k.merge_kernel[(cut.n * groups,)](
                slots[0], slots[1], mean, rstd, cut.c, groups, cut.p, cut.slices, cut.chunk, eps, BK=MERGE_LANES
            )
        k.apply_kernel[grid](
            x, res, weight, bias, y, slots[0], slots[1], mean, rstd,
            cut.c, groups, cut.p, cut.slices, cut.chunk, cut.blocks, eps,
            MERGE=merge, BK=MERGE_LANES, **flags, **_tile(cut),
        )  # fmt: skip
    return y, mean, rstd


def apply(x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor, groups: int, relu: bool) -> Tensor:
    """y again, from ``x`` and the statistics of :func:`forward`: one read, one write."""
    fmt = memory_format(x)
    x, weight, bias = _ready(x, fmt), _ready(weight, torch.contiguous_format), _ready(bias, torch.contiguous_format)
    y = torch.empty_like(x, memory_format=fmt)
    n, c = x.shape[:2]
    cut = split(n, c, x.numel() // (n * c), groups, fmt is torch.channels_last)
    with _on(x.device):
        _kernels().apply_kernel[(n * cut.blocks, cut.slices)](
            x, x, weight, bias, y, mean, mean, mean, rstd,
            c, groups, cut.p, cut.slices, cut.chunk, cut.blocks, 0.0,
            MERGE=False, RES=False, RELU=relu, BK=MERGE_LANES, **_tile(cut),
        )  # fmt: skip
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
    """Gradients of x, of the residual, of gamma and of beta.

    Args:
        dy: gradient of y.
        out: y, where a residual was added before the ReLU: only it tells what the ReLU let through.
        need: whether x, the residual, gamma and beta need theirs; what is not needed comes as None.
    """
    need_x, need_residual, need_parameters = need
    fmt = memory_format(x)
    x, dy = _ready(x, fmt), _ready(dy, fmt)
    mask = 0 if not relu else 1 if out is None else 2
    out = x if out is None else _ready(out, fmt)
    weight, bias = _ready(weight, torch.contiguous_format), _ready(bias, torch.contiguous_format)
    cut = _plan_of(x, groups)
    dx = torch.empty_like(x, memory_format=fmt)
    dres = torch.empty_like(x, memory_format=fmt) if need_residual else None
    slots = _slots(cut, x.device)
    dw, db = torch.empty_like(weight), torch.empty_like(bias)
    k, sizes = _kernels(), (cut.c, groups, cut.p)
    flags = {"DRES": need_residual, "MASK": mask}
    common = (weight, bias, mean, rstd)
    to = x if dres is None else dres
    with _on(x.device):
        coefficient = torch.empty(2 * cut.n * groups, dtype=torch.float32, device=x.device)
        if cut.small:
            k.small_backward_kernel[(cut.n * cut.blocks,)](
                dy, x, out, *common, dx, to, slots[0], slots[1], *sizes, cut.blocks,
                SUMS=need_parameters, **flags, **_tile(cut),
            )  # fmt: skip
            first = 0
        else:
            split = (cut.slices, cut.chunk, cut.blocks)
            grid = (cut.n * cut.blocks, cut.slices)
            k.backward_sums_kernel[grid](
                dy, x, out, *common, to, slots[0], slots[1], *sizes, *split, **flags, **_tile(cut)
            )
            first = cut.n * groups if need_x else 0
        programs = first + (-(-cut.c // PARAMETER_CHANNELS) if need_parameters else 0)
        if programs:
            k.backward_merge_kernel[(programs,)](
                slots[0], slots[1], weight, coefficient, dw, db, cut.n, *sizes, cut.slices, first,
                BK=MERGE_LANES, BC=PARAMETER_CHANNELS,
            )  # fmt: skip
        if not cut.small and need_x:
            # The gradient behind the ReLU is stored already where the residual needs it.
            source, mask = (dy, mask) if dres is None else (dres, 0)
            k.backward_dx_kernel[grid](
                source, x, out, *common, coefficient, dx, *sizes, *split, MASK=mask, **_tile(cut)
            )
    return dx if need_x else None, dres, dw if need_parameters else None, db if need_parameters else None
