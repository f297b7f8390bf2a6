"""native.cpp against fp64 formulas and torchvision, how it is built, and what happens where it cannot be."""

from __future__ import annotations

import itertools
import logging
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision.ops import roi_align

from gn_det import compiler
from gn_det.kernels import group_norm_act, native, reference, takes_kernels
from gn_det.modeling.poolers import RoIPooler

needs_compiler = pytest.mark.skipif(not native.available(), reason="needs a C++ compiler")
#: One chunk and several, RoIs, LN, IN, channels that fill no vector, a single row.
SHAPES = (
    ((2, 64, 30, 40), 32),
    ((1, 256, 33, 31), 32),
    ((40, 64, 7, 7), 32),
    ((3, 12, 5, 7), 4),
    ((2, 6, 300, 9), 1),
    ((2, 6, 3, 3), 6),
    ((2, 2048, 1, 5), 32),
)


def last(t: Tensor) -> Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def relative(a: Tensor, e: Tensor) -> float:
    return float((a.double() - e).abs().max() / e.abs().max().clamp(min=1e-30))


@needs_compiler
@pytest.mark.parametrize("shape, groups", SHAPES)
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 3e-6), (torch.bfloat16, 4e-3)])
@pytest.mark.parametrize("res, relu", list(itertools.product((False, True), repeat=2)))
def test_values_and_gradients_are_those_of_fp64(
    shape: tuple[int, ...], groups: int, dtype: torch.dtype, limit: float, res: bool, relu: bool
) -> None:
    """relu(GN(x) + residual) and its gradients of x, residual, gamma, beta; bf16 within half a unit of its last bit."""
    torch.manual_seed(0)
    x, r, dy = (last(torch.randn(shape).mul(2).add(1).to(dtype)) for _ in range(3))
    w, b = torch.randn(shape[1]) + 1, torch.randn(shape[1])
    y, mean, rstd = native.forward(x, w, b, r if res else None, groups, 1e-5, relu)
    w64, b64, x64, r64 = (t.double() for t in (w, b, x, r))
    exact, mean64, rstd64 = reference.forward(x64, w64, b64, r64 if res else None, groups, 1e-5, relu)
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    assert relative(y, exact) < limit and relative(rstd, rstd64) < 1e-6
    torch.testing.assert_close(mean.double(), mean64, rtol=1e-6, atol=1e-6)
    if not res:
        assert torch.equal(native.apply(x, mean, rstd, w, b, groups, relu), y)
    # What the ReLU let through is read off the same y on both sides: near 0 fp64 may decide otherwise.
    out = y if res and relu else None
    found = native.backward(dy, x, out, mean, rstd, w, b, groups, relu, (True, res, True))
    mask = None if out is None else out.double()
    wanted = reference.backward(dy.double(), x64, mask, mean64, rstd64, w64, b64, groups, relu, (True, res, True))
    for name, a, e in zip(("x", "residual", "gamma", "beta"), found, wanted):
        assert (a is None) == (e is None)
        if a is not None and e is not None:
            assert relative(a, e) < limit, name


@needs_compiler
def test_statistics_survive_a_large_offset() -> None:
    """Mean 1e4, variance 1, in fp32 and over several chunks: 1 / std within 1e-5 of fp64's."""
    torch.manual_seed(0)
    x = last(1e4 + torch.randn(1, 64, 60, 50))
    _, mean, rstd = native.forward(x, torch.ones(64), torch.zeros(64), None, 2, 1e-5, False)
    values = x.double().reshape(1, 2, -1)
    torch.testing.assert_close(mean.double(), values.mean(2), rtol=1e-7, atol=0)
    torch.testing.assert_close(rstd.double(), (values.var(2, unbiased=False) + 1e-5).rsqrt(), rtol=1e-5, atol=0)


@needs_compiler
def test_nan_and_inf_reach_the_result() -> None:
    """A ReLU that hid them would let a diverged run go on."""
    for bad in (float("nan"), float("inf")):
        for dtype in (torch.float32, torch.bfloat16):
            x = torch.randn(1, 8, 3, 3, dtype=dtype)
            x[0, 0, 1, 1] = bad
            y = native.forward(last(x), torch.ones(8), torch.zeros(8), None, 2, 1e-5, True)[0]
            assert bool(y[0, :4].isnan().all()) and bool(y[0, 4:].isfinite().all())


@needs_compiler
def test_same_bits_whatever_the_number_of_threads() -> None:
    torch.manual_seed(0)
    before, runs = torch.get_num_threads(), []
    x, dy = (last(torch.randn(2, 64, 60, 50)) for _ in range(2))
    rois = torch.tensor([[0, 3.0, 4.0, 30.0, 50.0], [1, 0.0, 0.0, 20.0, 20.0]])
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            inputs = [x.clone(memory_format=torch.preserve_format), torch.ones(64), torch.zeros(64)]
            for t in inputs:
                t.requires_grad_()
            y = group_norm_act(inputs[0], 32, inputs[1], inputs[2])
            pooled = native.roi_align(y, rois, 7, 0.5, 0, True)
            runs.append([y, pooled, *torch.autograd.grad((y, pooled), inputs, (dy, torch.ones_like(pooled)))])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, e) for run in runs[1:] for a, e in zip(run, runs[0]))


@needs_compiler
@pytest.mark.parametrize("aligned, ratio", list(itertools.product((True, False), (0, 2))))
@pytest.mark.parametrize("dtype, limit", [(torch.float32, 1e-5), (torch.bfloat16, 8e-3)])
def test_roi_align_is_torchvisions(aligned: bool, ratio: int, dtype: torch.dtype, limit: float) -> None:
    """Values and gradients; boxes that leave the map, are thin, or lie outside of it."""
    torch.manual_seed(0)
    x = last(torch.randn(2, 24, 30, 40).to(dtype)).requires_grad_()
    boxes = torch.rand(60, 4) * 300
    boxes[:, 2:] += boxes[:, :2] - 20
    boxes[0], boxes[1] = torch.tensor([-500.0, -500, -300, -300]), torch.tensor([10.0, 10, 10, 90])
    rois = torch.cat([torch.randint(0, 2, (60, 1)).float(), boxes], dim=1)
    y = native.roi_align(x, rois, 7, 1 / 8, ratio, aligned)
    z = x.detach().float().contiguous().requires_grad_()
    wanted = roi_align(z, rois, (7, 7), 1 / 8, ratio, aligned)
    assert y.dtype == dtype and relative(y.detach(), wanted.detach().double()) < limit
    dy = torch.randn_like(wanted).to(dtype)
    (dx,), (dz,) = torch.autograd.grad(y, x, dy), torch.autograd.grad(wanted, z, dy.float())
    assert relative(dx, dz.double()) < limit
    assert native.roi_align(x, rois[:0], 7, 1 / 8, ratio, aligned).shape == (0, 24, 7, 7)


@needs_compiler
@pytest.mark.parametrize("count", [0, 1, 9])
def test_pooler_is_the_same_in_both_layouts(count: int) -> None:
    """Several levels, whose rows are put back in order; gradients of every level."""
    torch.manual_seed(0)
    maps = [torch.randn(2, 8, 64 // s, 48 // s) for s in (1, 2, 4)]
    corner = torch.rand(2 * count, 2) * 100
    boxes = list(torch.cat([corner, corner + 1 + torch.rand(2 * count, 2) * 300], dim=1).split(count))
    made = []
    for fused, layout in (("off", torch.contiguous_format), ("auto", torch.channels_last)):
        levels = [m.contiguous(memory_format=layout).requires_grad_() for m in maps]
        pooled = RoIPooler(5, strides=(4, 8, 16), fused=fused)(levels, boxes if count else [torch.zeros(0, 4)] * 2)
        grads = torch.autograd.grad(pooled.square().sum(), levels, allow_unused=True)
        made.append([pooled, *(torch.zeros_like(m) if g is None else g for g, m in zip(grads, maps))])
    for a, e in zip(*made):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)


@needs_compiler
def test_auto_takes_channels_last_alone() -> None:
    """NCHW keeps torch's bits, which equality with Detectron2 needs; fp64 and other ranks stay with torch."""
    x = torch.randn(2, 8, 5, 4)
    assert takes_kernels(last(x), "auto") and takes_kernels(last(x.bfloat16()), "on")
    for other in (x, last(x.double()), last(x.half()), x[0], last(x[:, :1])):
        assert not takes_kernels(other, "auto")
    assert not takes_kernels(last(x), "off")


@pytest.fixture
def unbuilt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A machine on which nothing has been compiled yet; its cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native._library.cache_clear()
    yield tmp_path / "gn_det_kernels"
    native._library.cache_clear()


def test_without_a_compiler_torch_runs(
    unbuilt: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The same values by torch's operations, and one line, once."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("gn_det.compiler.shutil.which", lambda name: None)
    x = last(torch.randn(2, 8, 5, 4))
    for _ in range(2):
        assert torch.equal(group_norm_act(x, 4, torch.ones(8), torch.zeros(8)), torch.group_norm(x, 4).relu())
    assert caplog.text.count("No C++ compiler") == 1


def test_a_compiler_that_fails_is_named(
    unbuilt: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = tmp_path / "broken-c++"
    broken.write_text("#!/bin/sh\necho 'fatal error: no space' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    assert not native.available()
    assert "broken-c++ cannot build gn_det's native.cpp (fatal error: no space)" in caplog.text


@needs_compiler
def test_a_library_is_built_once_and_from_no_foreign_folder(unbuilt: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A second process loads the file; a folder that others can write to is not loaded from."""
    caplog.set_level(logging.INFO)
    assert native.available() and len(list(unbuilt.glob("*.so"))) == 1
    native._library.cache_clear()
    assert native.available() and caplog.text.count("Compiling") == 1
    os.chmod(unbuilt, stat.S_IRWXU | stat.S_IWOTH)
    assert compiler.private_folder() != unbuilt
