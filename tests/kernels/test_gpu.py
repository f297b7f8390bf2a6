"""The kernels on a GPU: what the interpreter cannot show. ``pytest -m gpu tests/kernels``."""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from torch.nn import functional as F

from gn_det.kernels import group_norm_act, launch, ops
from tests.kernels.interpreted import FORMS, check

assert ops
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="measures compiled kernels"),
]
SHAPES = (
    ((2, 256, 7, 7), 32),
    ((2, 256, 14, 14), 32),
    ((1, 64, 201, 335), 32),
    ((1, 256, 200, 336), 32),
    ((2, 2048, 25, 42), 32),
    ((1, 96, 33, 31), 1),
    ((1, 96, 33, 31), 96),
    ((3, 12, 5, 70), 4),
)


@pytest.mark.parametrize("shape, groups", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values(shape: tuple[int, ...], groups: int, dtype: torch.dtype) -> None:
    """Against fp64, both layouts, every form."""
    with torch.device("cuda"):
        for last, (res, relu) in itertools.product((False, True), FORMS):
            check(shape, groups, dtype, last, res, relu)


def test_same_bits_in_ten_runs() -> None:
    torch.manual_seed(0)
    for shape, last in itertools.product(((2, 256, 100, 168), (64, 256, 14, 14)), (False, True)):
        layout = torch.channels_last if last else torch.contiguous_format
        x = torch.randn(shape, device="cuda", dtype=torch.bfloat16).contiguous(memory_format=layout).requires_grad_()
        w, b = (torch.randn(256, device="cuda", requires_grad=True) for _ in range(2))
        dy, runs = torch.randn_like(x), []
        for _ in range(10):
            y = group_norm_act(x, 32, w, b, fused="on")
            runs.append((y.detach(), *torch.autograd.grad(y, (x, w, b), dy)))
        assert all(torch.equal(a, e) for run in runs[1:] for a, e in zip(run, runs[0]))


@pytest.mark.parametrize("last", [False, True])
def test_at_most_two_variants(last: bool) -> None:
    """50 random image sizes, for each kernel."""
    from gn_det.kernels import triton_kernels

    names = [n for n in dir(triton_kernels) if n.endswith("_kernel")]

    def count() -> dict[str, int]:
        caches = {n: getattr(triton_kernels, n).device_caches.values() for n in names}
        return {n: sum(len(e[0] if isinstance(e, tuple) else e) for e in c) for n, c in caches.items()}

    before, layout = count(), torch.channels_last if last else torch.contiguous_format
    for h, w in torch.randint(3, 300, (50, 2), generator=torch.Generator().manual_seed(0)).tolist():
        # 128 channels: no other test of this process has compiled for them and for fp16 gamma.
        x = torch.randn(1, 128, h, w, device="cuda", dtype=torch.float16).contiguous(memory_format=layout)
        gamma = torch.ones(128, device="cuda", dtype=torch.float16, requires_grad=True)
        group_norm_act(x.requires_grad_(), 32, gamma, gamma, fused="on").sum().backward()
    made = {n: number - before[n] for n, number in count().items()}
    assert max(made.values()) <= 2 and sum(made.values()) > 0, made


def test_more_than_2_to_the_31_elements() -> None:
    """int64 offsets: the last sample of a tensor of 2^31 + elements equals that sample alone."""
    n, c, side = 33, 64, 1024
    if torch.cuda.mem_get_info()[0] < 6 * n * c * side * side:
        pytest.skip("needs 14 GB of free memory")
    for last in (False, True):
        layout = torch.channels_last if last else torch.contiguous_format
        x = torch.empty((n, c, side, side), dtype=torch.bfloat16, device="cuda", memory_format=layout)
        x[:-1] = 0
        x[-1].normal_()
        assert x.numel() > 2**31
        w, b = torch.randn(c, device="cuda"), torch.randn(c, device="cuda")
        y = group_norm_act(x, 32, w, b, fused="on")
        alone = F.group_norm(x[-1:].float(), 32, w, b).relu()
        torch.testing.assert_close(y[-1:].float(), alone, rtol=1e-2, atol=1e-2)
        del x, y


def test_second_gpu_is_launched_on() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x = torch.randn(2, 64, 9, 9, device="cuda:1")
    ones = torch.ones(64, device="cuda:1")
    y = group_norm_act(x, 32, ones, ones, fused="on")
    torch.testing.assert_close(y, F.group_norm(x, 32, ones, ones).relu(), rtol=1e-5, atol=1e-5)


def test_autocast_answers_in_low_precision() -> None:
    x, ones = torch.randn(2, 64, 9, 9, device="cuda", dtype=torch.bfloat16), torch.ones(64, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert group_norm_act(x, 32, ones, ones, fused="on").dtype == torch.bfloat16
    assert launch.can_launch(x)
