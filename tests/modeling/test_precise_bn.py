"""Precise BN: the statistics of all values together, and fvcore's numbers."""

from __future__ import annotations

import copy
import warnings

import torch
from torch import nn

from gn_det.modeling.precise_bn import precise_bn


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5))


def batches() -> list[torch.Tensor]:
    """Of different sizes, which fvcore weighs, too."""
    g = torch.Generator().manual_seed(1)
    return [3 * torch.randn(n, 3, 6, 5, generator=g) + 1 for n in (2, 4, 1)]


def test_statistics_are_those_of_all_batches_together() -> None:
    """For the first layer, whose input does not depend on other statistics: mean and biased variance of all values."""
    model = network()
    assert precise_bn(model, model, batches()) == 2
    seen = torch.cat([model[0](b) for b in batches()]).transpose(0, 1).flatten(1)
    torch.testing.assert_close(model[1].running_mean, seen.mean(1))
    torch.testing.assert_close(model[1].running_var, seen.var(1, correction=0))
    assert model[1].momentum == 0.1 and model.training


def test_equal_to_fvcore() -> None:
    """The same floating-point operations in the same order: difference 0."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fvcore.nn.precise_bn import update_bn_stats
    ours, theirs = network(), copy.deepcopy(network())
    precise_bn(ours, ours, batches())
    update_bn_stats(theirs, batches(), 3)
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name


def test_without_bn_no_batch_is_read() -> None:
    def never() -> list[torch.Tensor]:
        raise AssertionError

    model = network().eval()
    assert precise_bn(model, model, (b for _ in range(1) for b in never())) == 0
