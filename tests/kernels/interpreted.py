"""Cases of the Triton kernels, run by test_triton.py in a process of its own where TRITON_INTERPRET=1 was set.

The interpreter costs about a millisecond per program and operation: tensors are tiny, and plans are forced by shrinking
the tiles. It truncates when it stores bf16, so one unit in the last place is allowed there.
"""

from __future__ import annotations

import itertools
import json
import sys
import traceback
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

CASES: dict[str, Callable[[], None]] = {}

#: relative to the largest value: rounding of the result, and of sums over a channel
TOLERANCE = {torch.float32: (2e-6, 5e-6), torch.float16: (1e-3, 2e-3), torch.bfloat16: (8e-3, 1e-2)}


def case(function: Callable[[], None]) -> Callable[[], None]:
    CASES[function.__name__] = function
    return function


def op(x: Tensor, w: Tensor, b: Tensor, res: Tensor | None, groups: int, relu: bool) -> Tensor:
    from gn_det.kernels import ops  # noqa: F401

    y: Tensor = torch.ops.gn_det.group_norm_act(x, w, b, res, groups, 1e-5, relu)[0]
    return y


def check(shape: tuple[int, ...], groups: int, dtype: torch.dtype, last: bool, res: bool, relu: bool) -> None:
    """Output and all gradients against nn.functional in fp64 on the same inputs."""
    torch.manual_seed(sum(shape) + groups)
    layout = torch.channels_last if last else torch.contiguous_format

    def draw() -> Tensor:
        value = torch.randn(shape).to(dtype)
        return (value.to(memory_format=layout) if value.dim() == 4 else value).requires_grad_()

    inputs = [draw(), (1 + torch.randn(shape[1])).requires_grad_(), torch.randn(shape[1]).requires_grad_()]
    inputs += [draw()] if res else []
    y = op(*inputs[:3], inputs[3] if res else None, groups, relu)
    exact = [t.detach().double().requires_grad_() for t in inputs]
    z = F.group_norm(exact[0], groups, *exact[1:3], 1e-5)
    z = z + exact[3] if res else z
    dy = draw().detach()
    if relu:
        # Where rounding decides what the ReLU lets through there is nothing to compare.
        dy = dy * (z.detach().abs() > 0.05).to(dtype)
        z = z.relu()
    assert y.dtype == dtype and y.shape == z.shape
    x_per_group = inputs[0][0].numel() // groups
    names = ("y", "dx", "dgamma", "dbeta", "dresidual")
    got = (y, *torch.autograd.grad(y, inputs, dy))
    wanted = (z, *torch.autograd.grad(z, exact, dy.double()))
    for name, a, b in zip(names, got, wanted):
        own = TOLERANCE[torch.float32 if name in ("dgamma", "dbeta") and dtype != torch.bfloat16 else dtype]
        error = float((a.detach().double() - b.detach()).abs().max() / b.detach().abs().max().clamp(min=1))
        limit = own[name != "y"] * (4 if name[:2] == "dg" or name == "dbeta" else 1)
        # Of few values the variance can be near 0, and 1 / std magnifies the rounding of x - mean.
        limit *= 20 if x_per_group <= 4 else 1
        assert error <= limit, f"{name} of {shape} {dtype} last={last} res={res} relu={relu}: {error} > {limit}"


def shrink(programs: int = 12, tiles: tuple[tuple[int, int], tuple[int, int]] = ((1, 64), (8, 32))) -> None:
    """Small tiles, and no whole-group kernel: a map of a few hundred pixels is split as a large one is."""
    from gn_det.kernels import launch

    launch.PROGRAMS, launch.SMALL_TILES = programs, ()
    launch.TILES = {False: tiles[0], True: tiles[1]}


FORMS = ((False, False), (False, True), (True, True), (True, False))


def combinations() -> Iterator[tuple[torch.dtype, bool, bool, bool]]:
    """Every dtype; fp32 and bf16 in both layouts; fp32 in all forms, the others with ReLU, in turn with a residual."""
    for k, (dtype, last) in enumerate(itertools.product(TOLERANCE, (False, True))):
        if dtype == torch.float16 and not last:
            continue
        for res, relu in FORMS[2 * last : 2 * last + 2] if dtype == torch.float32 else (FORMS[1 + k % 2],):
            yield dtype, last, res, relu


@case
def small() -> None:
    """RoI-sized: whole groups in one tile."""
    for dtype, last, res, relu in combinations():
        check((2, 12, 5, 7), 4, dtype, last, res, relu)
    check((1, 128, 3, 3), 64, torch.float32, True, False, True)  # vectors of channels, two blocks


@case
def split() -> None:
    """Large maps: several slices, the last one shorter, odd sizes."""
    shrink()
    for dtype, last, res, relu in combinations():
        check((1, 6, 9, 23), 3, dtype, last, res, relu)


@case
def sizes() -> None:
    """One pixel, one group (LN), one channel a group (IN), many samples, other numbers of dimensions."""
    for shape, groups in (
        ((2, 6, 1, 1), 3),
        ((1, 6, 3, 3), 1),
        ((1, 6, 3, 3), 6),
        ((3, 6), 2),
        ((2, 4, 5), 2),
        ((1, 4, 2, 3, 2), 2),
    ):
        check(shape, groups, torch.float32, len(shape) == 4, True, True)


@case
def split_sizes() -> None:
    shrink()
    for shape, groups, last in (((1, 6, 9, 9), 1, True), ((2, 6, 9, 9), 6, False), ((1, 16, 4, 24), 2, True)):
        check(shape, groups, torch.float32, last, False, True)


@case
def real_tiles() -> None:
    """The tiles that a GPU gets, a width of 16 (vectorized loads) and one that is not."""
    for shape, last in (((1, 4, 16, 130), False), ((1, 2, 2, 1031), False), ((1, 64, 5, 53), True)):
        check(shape, 2, torch.float32, last, True, True)


@case
def not_contiguous() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 7, 6, 8).transpose(1, 3)[:, :, 1:]
    w, b = torch.randn(16)[::2], torch.randn(9)[1:]
    dy = torch.randn(7, 8, 5, 2).permute(3, 1, 2, 0)
    for fmt in (None, torch.channels_last):
        a = x.detach().requires_grad_() if fmt is None else x.contiguous(memory_format=fmt).requires_grad_()
        z = x.detach().double().requires_grad_()
        y, exact = op(a, w, b, dy, 4, True), (F.group_norm(z, 4, w.double(), b.double()) + dy).relu()
        torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5)
        (da,), (dz,) = torch.autograd.grad(y, a, dy), torch.autograd.grad(exact, z, dy.double())
        torch.testing.assert_close(da.double(), dz, rtol=1e-5, atol=1e-5)


@case
def empty() -> None:
    x = torch.zeros(0, 8, 7, 7, requires_grad=True)
    w, b = torch.ones(8, requires_grad=True), torch.zeros(8, requires_grad=True)
    y = op(x, w, b, None, 4, True)
    grads = torch.autograd.grad(y.sum(), (x, w, b))
    assert y.shape == x.shape and grads[0].shape == x.shape and not grads[1].any() and not grads[2].any()


@case
def frozen_gamma_and_beta() -> None:
    """Their sums are not launched, and dx is the same; gamma alone trains where x needs no gradient."""
    from gn_det.kernels import launch, triton_kernels

    for prepare in (lambda: None, shrink):
        prepare()
        torch.manual_seed(0)
        x = torch.randn(1, 4, 6, 11, requires_grad=True)
        w, b = torch.randn(4, requires_grad=True), torch.randn(4, requires_grad=True)
        dy = torch.randn(1, 4, 6, 11)
        full = torch.autograd.grad(op(x, w, b, None, 2, True), (x, w, b), dy)
        (dx,) = torch.autograd.grad(op(x, w.detach(), b.detach(), None, 2, True), x, dy)
        assert torch.equal(dx, full[0])
        (dw,) = torch.autograd.grad(op(x.detach(), w, b.detach(), None, 2, True), w, dy)
        assert torch.equal(dw, full[1])
    grids: list[int] = []
    kernel = triton_kernels.backward_merge_kernel

    class Counting:
        def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
            grids.append(grid[0])
            return kernel[grid]

    triton_kernels.backward_merge_kernel = Counting()
    torch.autograd.grad(op(x, w.detach(), b.detach(), None, 2, True), x, dy)
    torch.autograd.grad(op(x, w, b, None, 2, True), x, dy)
    torch.autograd.grad(op(x, w, b, None, 2, True), (x, w), dy)
    assert grids == [2, 2 + 1, 2 + 1], grids  # N * G, and one program of 16 channels
    assert launch.PARAMETER_CHANNELS == 16


@case
def large_offset() -> None:
    """Mean 1e4 and variance 1: as exact as fp32 can hold the mean (half a unit in the last place is 5e-4)."""
    for prepare in (lambda: None, shrink):
        prepare()
        for last in (False, True):
            torch.manual_seed(0)
            from gn_det.kernels import ops  # noqa: F401

            x = (1e4 + torch.randn(1, 4, 8, 20)).contiguous(
                memory_format=torch.channels_last if last else torch.contiguous_format
            )
            w, b = torch.ones(4), torch.zeros(4)
            y, mean, rstd = torch.ops.gn_det.group_norm_act(x, w, b, None, 2, 1e-5, False)
            exact = F.group_norm(x.double(), 2)
            values = x.double().reshape(1, 2, -1)
            std = values.var(dim=2, unbiased=False).add(1e-5).sqrt()
            torch.testing.assert_close(mean.double(), values.mean(dim=2), rtol=1e-7, atol=0)
            torch.testing.assert_close(rstd.double(), 1 / std, rtol=3e-5, atol=0)
            torch.testing.assert_close(y.double(), exact, rtol=0, atol=1e-3)


@case
def same_bits() -> None:
    for prepare in (lambda: None, shrink):
        prepare()
        torch.manual_seed(0)
        x = torch.randn(1, 6, 9, 13, requires_grad=True)
        w, b = torch.randn(6, requires_grad=True), torch.randn(6, requires_grad=True)
        runs = []
        for _ in range(3):
            y = op(x, w, b, None, 3, True)
            runs.append((y, *torch.autograd.grad(y, (x, w, b), y.detach())))
        assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run))


@case
def applied_again() -> None:
    """y from x and the statistics has the bits of the first y, whichever kernel made that."""
    for prepare in (lambda: None, shrink):
        for last in (False, True):
            prepare()
            torch.manual_seed(0)
            from gn_det.kernels import ops  # noqa: F401

            x = torch.randn(2, 8, 6, 9).contiguous(
                memory_format=torch.channels_last if last else torch.contiguous_format
            )
            w, b = torch.randn(8), torch.randn(8)
            y, mean, rstd = torch.ops.gn_det.group_norm_act(x, w, b, None, 4, 1e-5, True)
            assert torch.equal(torch.ops.gn_det.group_norm_apply(x, mean, rstd, w, b, 4, True), y)


@case
def nan_is_seen() -> None:
    x = torch.randn(1, 4, 3, 3)
    x[0, 0, 1, 1] = torch.nan
    y = op(x, torch.ones(4), torch.zeros(4), None, 2, True)
    assert y[0, :2].isnan().all() and y[0, 2:].isfinite().all()


def main() -> None:
    """Run the named cases, or all; print {name: traceback, or "" if it passed}."""
    from gn_det.kernels import launch

    torch.set_num_threads(1)
    defaults = launch.PROGRAMS, launch.SMALL_TILES, launch.TILES
    results = {}
    for name in sys.argv[1:] or CASES:
        launch.PROGRAMS, launch.SMALL_TILES, launch.TILES = defaults
        try:
            CASES[name]()
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc()
    print(json.dumps(results))


if __name__ == "__main__":
    main()
