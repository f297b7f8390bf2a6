"""Identity: each formula is that of its source, in value and gradient."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gn_det.kernels.weight_standardization import FORMULAS, standardize


def jhu(w: Tensor) -> Tensor:
    """joe-siyuan-qiao/WeightStandardization and mmcv's ConvWS: unbiased deviation plus 1e-5."""
    rows = w.flatten(1) - w.flatten(1).mean(1, keepdim=True)
    return (rows / (rows.std(1, keepdim=True) + 1e-5)).view(w.shape)


def bit(w: Tensor) -> Tensor:
    """google-research/big_transfer: square root of the biased variance plus 1e-10."""
    variance, mean = torch.var_mean(w, dim=[1, 2, 3], keepdim=True, unbiased=False)
    return (w - mean) / torch.sqrt(variance + 1e-10)


def timm(w: Tensor) -> Tensor:
    """timm's StdConv2d as its BiT models use it."""
    return F.batch_norm(w.reshape(1, len(w), -1), None, None, training=True, momentum=0.0, eps=1e-8).view(w.shape)


SOURCES: dict[str, Callable[[Tensor], Tensor]] = {"jhu": jhu, "bit": bit, "timm": timm}


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("scale", [1.0, 1e-4])  # at which the epsilons show
@pytest.mark.parametrize("shape", [(6, 5, 3, 3), (7, 4, 1, 1), (4, 2, 7, 7)])
def test_formula(formula: str, scale: float, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    w = scale * (torch.randn(shape, dtype=torch.float64) + 0.3)
    grad = torch.randn(shape, dtype=torch.float64)
    for layout in (torch.contiguous_format, torch.channels_last):
        ours, theirs = (w.clone(memory_format=layout).requires_grad_() for _ in range(2))
        y, expected = standardize(ours, formula), SOURCES[formula](theirs)
        torch.testing.assert_close(y, expected, rtol=1e-9, atol=1e-9)
        assert y.is_contiguous(memory_format=layout)
        y.backward(grad)
        expected.backward(grad)
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-7, atol=1e-7 / scale)
        assert torch.equal(y, standardize(w.to(memory_format=layout), formula))


def test_formulas_differ() -> None:
    w = 1e-4 * torch.randn(4, 3, 3, 3)
    a, b, c = (standardize(w, formula) for formula in FORMULAS)
    assert (a - b).abs().max() > 1e-3 and (b - c).abs().max() > 1e-3


@pytest.mark.parametrize("formula", FORMULAS)
def test_weights_that_are_all_the_same(formula: str) -> None:
    """They become 0, with finite gradients."""
    w = torch.full((2, 3, 1, 1), 0.25, requires_grad=True)
    y = standardize(w, formula)
    y.backward(torch.randn(2, 3, 1, 1))
    assert torch.equal(y, torch.zeros_like(y)) and w.grad is not None and bool(w.grad.isfinite().all())
