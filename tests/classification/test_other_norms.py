"""Weight Norm and Batch Renorm against formulas of their own, with gradients; their limits over the training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gn_det.classification import Settings, classifier_loop, pretrain
from gn_det.classification.network import build_classifier
from gn_det.classification.other_norms import BatchRenorm2d, plain_weights
from gn_det.classification.settings import renorm_limits
from tests.classification.test_run import tiny, weights


def pair(channels: int = 5) -> tuple[BatchRenorm2d, nn.BatchNorm2d]:
    """The same parameters and running statistics, far from those of the batches."""
    g = torch.Generator().manual_seed(1)
    layers = BatchRenorm2d(channels), nn.BatchNorm2d(channels)
    values = [torch.rand(channels, generator=g) + 0.5 for _ in range(4)]
    for layer in layers:
        with torch.no_grad():
            for own, value in zip((layer.weight, layer.bias, layer.running_mean, layer.running_var), values):
                own.copy_(value)  # type: ignore[union-attr]
    return layers


def outcome(layer: nn.Module, forward: Any, x: Tensor) -> list[Tensor]:
    """Output and all gradients."""
    x = x.clone().requires_grad_()
    y = forward(x)
    parameters = [layer.weight, layer.bias]
    grads = torch.autograd.grad((y * torch.arange(y.numel()).view_as(y).sin()).sum(), [x, *parameters])  # type: ignore[arg-type]
    return [y, *grads]


def test_without_room_it_is_batch_norm() -> None:
    """r_max 1 and d_max 0: the same bits, in output, gradients and running statistics; and always in evaluation."""
    renorm, norm = pair()
    x = torch.randn(4, 5, 3, 2, generator=torch.Generator().manual_seed(2))
    for a, b in zip(outcome(renorm, renorm, x), outcome(norm, norm, x)):
        assert torch.equal(a, b)
    assert all(torch.equal(a, b) for a, b in zip(renorm.buffers(), norm.buffers()))
    renorm.r_max, renorm.d_max = 3.0, 5.0
    assert torch.equal(renorm.eval()(x), norm.eval()(x))


@pytest.mark.parametrize(("r_max", "d_max"), [(1.5, 0.5), (100.0, 100.0), (1.0, 0.5), (1.5, 0.0)])
def test_batch_renorm_follows_its_formula(r_max: float, d_max: float) -> None:
    """Ioffe's equations in float64, r and d constants to the gradient; the running statistics are batch norm's."""
    renorm, norm = pair()
    renorm.r_max, renorm.d_max = r_max, d_max
    x = torch.randn(4, 5, 3, 2, generator=torch.Generator().manual_seed(2)) * 3 + 1

    def formula(x: Tensor) -> Tensor:
        x = x.double()
        mean, std = x.mean((0, 2, 3)), (x.var((0, 2, 3), correction=0) + renorm.eps).sqrt()
        running_std = (norm.running_var.double() + renorm.eps).sqrt()  # type: ignore[union-attr]
        r = (std / running_std).clamp(1 / r_max, r_max).detach()
        d = ((mean - norm.running_mean) / running_std).clamp(-d_max, d_max).detach()
        wide = lambda v: v.view(1, -1, 1, 1)  # noqa: E731
        y = (x - wide(mean)) / wide(std) * wide(r) + wide(d)
        return wide(norm.weight) * y + wide(norm.bias)

    expected = outcome(norm, formula, x)
    for a, b in zip(outcome(renorm, renorm, x), expected):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-5)
    norm(x)
    assert all(torch.equal(a, b) for a, b in zip(renorm.buffers(), norm.buffers()))


def test_with_all_the_room_the_batch_does_not_matter() -> None:
    """Without limits, training normalizes by the running statistics, as evaluation does."""
    renorm, norm = pair()
    renorm.r_max, renorm.d_max = 1e6, 1e6
    x = torch.randn(2, 5, 3, 2, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(renorm(x), norm.eval()(x), rtol=1e-4, atol=1e-5)


def settings(**changes: Any) -> Settings:
    return Settings(**{"arch": "resnet8", "norm": "BR", "data": "shapes", "output": "o", **changes})


def test_the_limits_grow_from_batch_norms() -> None:
    ours = settings(r_max=3.0, d_max=5.0, renorm_ramp=(0.1, 0.3))
    found = [renorm_limits(ours, iteration, 100) for iteration in (0, 10, 20, 30, 99)]
    assert found == [(1.0, 0.0), (1.0, 0.0), (2.0, 2.5), (3.0, 5.0), (3.0, 5.0)]
    assert renorm_limits(settings(renorm_ramp=(0.5, 0.5)), 49, 100) == (1.0, 0.0)
    assert renorm_limits(settings(renorm_ramp=(0.0, 0.0)), 0, 100) == (1.5, 0.5)


def test_weight_norm_follows_its_formula() -> None:
    """w = g v / |v| of each output channel, in the network's own convolutions; gradients of g and v in float64."""
    torch.manual_seed(1)
    model = build_classifier(settings(norm="WN"), 3)
    conv: Any = model.trunk.get_submodule("res3.0.conv1")
    g, v = conv.parametrizations.weight.original0, conv.parametrizations.weight.original1
    x = torch.randn(2, 16, 6, 6)
    upstream = torch.randn(2, 32, 3, 3)
    found = torch.autograd.grad((conv(x) * upstream).sum(), [g, v, conv.bias])
    g2, v2, b2 = (p.detach().double().requires_grad_() for p in (g, v, conv.bias))
    weight = g2 * v2 / v2.pow(2).sum((1, 2, 3), keepdim=True).sqrt()
    y = torch.nn.functional.conv2d(x.double(), weight, b2, stride=2, padding=1).relu()
    expected = torch.autograd.grad((y * upstream).sum(), [g2, v2, b2])
    for a, b in zip(found, expected):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


def test_plain_weights_compute_the_same() -> None:
    """What is written for WN loads into a network without it, and gives the same scores."""
    torch.manual_seed(1)
    model, plain = build_classifier(settings(norm="WN"), 3), build_classifier(settings(norm="none"), 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    plain.trunk.load_state_dict(plain_weights(model.trunk))
    plain.linear.load_state_dict(model.linear.state_dict())
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(plain(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"norm": "WN"},
        {"norm": "BR", "renorm_ramp": (0.0, 0.5)},
        pytest.param({"arch": "vgg16", "norm": "none", "image_size": 32}, marks=pytest.mark.slow),
    ],
)
def test_an_interrupted_run_is_resumed_to_the_bit(
    changes: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Limits of BR, reparametrized weights and dropout go on where they were after epoch 1."""
    options = {"groups": None, "epochs": 2, "lr": 0.01, **changes}
    pretrain(tiny(tmp_path / "whole", **options))
    original, calls = classifier_loop.save_checkpoint, 0

    def stops(*arguments: Any) -> None:
        nonlocal calls
        calls += Path(arguments[0]).name == "last.ckpt"
        if calls == 2:
            raise KeyboardInterrupt
        original(*arguments)

    monkeypatch.setattr(classifier_loop, "save_checkpoint", stops)
    with pytest.raises(KeyboardInterrupt):
        pretrain(tiny(tmp_path / "cut", **options))
    monkeypatch.undo()
    pretrain(tiny(tmp_path / "cut", **options), resume=True)
    ours, theirs = weights(tmp_path / "cut"), weights(tmp_path / "whole")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
