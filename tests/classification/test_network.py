"""The network of the paper's recipe: initialization, zero gammas, what is decayed, groups."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from gn_det.classification import Settings
from gn_det.classification.network import build_classifier, build_optimizer, last_layers
from gn_det.errors import ConfigError
from gn_det.norm import GroupNorm


def settings(arch: str = "resnet18", norm: str = "GN", **changes: Any) -> Settings:
    data = "digits" if arch in ("resnet8", "resnet20") else "shapes"
    return Settings(arch=arch, norm=norm, data=data, output="out", **changes)


@pytest.mark.parametrize("arch, blocks", [("resnet18", 8), ("resnet50", 16), ("resnet8", 3), ("resnet20", 9)])
@pytest.mark.parametrize("norm", ["BN", "LN", "IN", "GN"])
def test_last_gamma_of_every_block_is_zero_and_all_others_one(arch: str, blocks: int, norm: str) -> None:
    groups = 8 if norm == "GN" and arch in ("resnet8", "resnet20") else None
    model = build_classifier(settings(arch, norm, groups=groups), 10)
    zero = last_layers(model)
    assert len(zero) == blocks
    norms = [m for m in model.modules() if isinstance(m, (nn.BatchNorm2d, nn.GroupNorm))]
    assert len(norms) == sum(isinstance(m, nn.Conv2d) for m in model.modules())
    for norm_layer in norms:
        assert torch.all(norm_layer.weight == float(not any(norm_layer is z for z in zero)))
        assert torch.all(norm_layer.bias == 0)


def test_zero_gammas_make_each_block_its_shortcut() -> None:
    """relu(norm(f(x)) + x) with gamma 0 is relu(x): bit for bit, wherever there is no projection."""
    model = build_classifier(settings("resnet50"), 4)
    block = model.trunk.res2[1]
    x = torch.randn(2, 256, 5, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(block(x), x.relu())


def test_he_initialization() -> None:
    """Standard deviation sqrt(2 / fan-out) in every convolution, within 4 standard errors; 0.01 in the linear layer."""
    torch.manual_seed(0)
    model = build_classifier(settings("resnet50"), 100)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            expected = math.sqrt(2 / (module.out_channels * module.kernel_size[0] ** 2))
            count = module.weight.numel()
            assert float(module.weight.detach().std()) == pytest.approx(expected, rel=4 / math.sqrt(2 * count)), name
            assert module.bias is None
    assert float(model.linear.weight.detach().std()) == pytest.approx(0.01, rel=0.01)
    assert torch.all(model.linear.bias == 0)


def test_same_seed_gives_all_norms_the_same_convolutions() -> None:
    states = []
    for norm in ("BN", "LN", "IN", "GN"):
        torch.manual_seed(3)
        state = build_classifier(settings("resnet18", norm), 5).state_dict()
        states.append({k: v for k, v in state.items() if ".norm." not in k})
    for other in states[1:]:
        assert other.keys() == states[0].keys()
        assert all(torch.equal(other[k], states[0][k]) for k in other)


@pytest.mark.parametrize("norm", ["BN", "GN"])
def test_weight_decay_holds_every_weight_with_gamma_and_beta(norm: str) -> None:
    """One SGD step with zero gradients shrinks every parameter by lr x decay and Nesterov's 1 + momentum."""
    model = build_classifier(settings("resnet18", norm), 5)
    for p in model.parameters():
        nn.init.constant_(p, 2.0)
        p.grad = torch.zeros_like(p)
    optimizer = build_optimizer(settings("resnet18", norm), model, lr=0.5)
    optimizer.step()
    expected = 2.0 * (1 - 0.5 * 1e-4 * 1.9)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p, torch.full_like(p, expected), rtol=1e-6, atol=0, msg=name)
    assert len(optimizer.param_groups) == 1 and optimizer.param_groups[0]["weight_decay"] == 1e-4


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({}, {64: 32, 128: 32, 256: 32, 512: 32}),
        ({"groups": 4}, {64: 4, 128: 4, 256: 4, 512: 4}),
        ({"channels_per_group": 16}, {64: 4, 128: 8, 256: 16, 512: 32}),
    ],
)
def test_group_rules(changes: dict[str, Any], expected: dict[int, int]) -> None:
    model = build_classifier(settings("resnet18", **changes), 5)
    found = {m.num_channels: m.num_groups for m in model.modules() if isinstance(m, GroupNorm)}
    assert found == expected


@pytest.mark.parametrize(
    "changes, field", [({"groups": 24}, "groups"), ({"channels_per_group": 6}, "channels_per_group")]
)
def test_groups_that_do_not_divide_name_channels_and_field(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        build_classifier(settings("resnet18", **changes), 5)
    text = str(caught.value)
    assert text.startswith(f"classify {field}: ") and "64 channels" in text and f"set {field} to one of" in text


@pytest.mark.parametrize("norm", ["WN", "none"])
def test_without_norms_blocks_begin_as_their_shortcuts_and_have_biases(norm: str) -> None:
    model = build_classifier(settings("resnet50", norm), 4)
    block = model.trunk.res2[1]
    x = torch.randn(2, 256, 5, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(block(x), x.relu())
    assert all(m.bias is not None for m in model.modules() if isinstance(m, nn.Conv2d))


@pytest.mark.parametrize("norm", ["none", "BN", "GN"])
def test_vgg16_is_the_recipes(norm: str) -> None:
    """13 convolutions with biases, 138.4 M parameters for ImageNet; He's fan-in, 0.001, 0.01; biases do not decay."""
    ours = settings("vgg16", norm, image_size=224)
    with torch.device("meta"):
        model = build_classifier(ours, 1000)
    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    norms = [m for m in model.modules() if isinstance(m, (nn.BatchNorm2d, nn.GroupNorm))]
    assert len(convs) == 13 and all(c.bias is not None for c in convs) and len(norms) == (13 if norm != "none" else 0)
    count = sum(p.numel() for p in model.parameters())
    assert count - sum(p.numel() for m in norms for p in m.parameters()) == 138_357_544
    decayed, others = build_optimizer(ours, model, lr=0.01).param_groups
    assert decayed["weight_decay"] == 5e-4 and others["weight_decay"] == 0.0
    assert len(decayed["params"]) == 13 + 3 and all(p.dim() == 1 for p in others["params"])
    assert (ours.steps, ours.weight_decay) == ((0.3, 0.6, 0.8), 5e-4)


@pytest.mark.slow
def test_vgg16s_linear_layers_at_224_pixels() -> None:
    """0.001, as in the recipe."""
    model = build_classifier(settings("vgg16", "none", image_size=224), 10)
    for linear in (model.trunk.fc6, model.trunk.fc7):
        assert float(linear.weight.detach().std()) == pytest.approx(0.001, rel=0.01)


def test_vgg16_at_32_pixels() -> None:
    """Shapes, initialization within 4 standard errors, and dropout in training alone."""
    torch.manual_seed(0)
    model = build_classifier(settings("vgg16", "none", image_size=32), 10)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            expected, count = math.sqrt(2 / (module.in_channels * 9)), module.weight.numel()
            assert float(module.weight.detach().std()) == pytest.approx(expected, rel=4 / math.sqrt(2 * count)), name
    for linear in (model.trunk.fc6, model.trunk.fc7):
        assert float(linear.weight.detach().std()) == pytest.approx(0.01, rel=0.01)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert model(x).shape == (2, 10) and not torch.equal(model.trunk(x)["fc7"], model.trunk(x)["fc7"])
        assert torch.equal(model.eval()(x), model(x))


@pytest.mark.parametrize("arch, layers", [("resnet32", 32), ("resnet44", 44), ("resnet56", 56), ("resnet110", 110)])
def test_deeper_cifar_resnets(arch: str, layers: int) -> None:
    with torch.device("meta"):
        model = build_classifier(Settings(arch=arch, norm="BN", data="shapes", output="o"), 10)
    assert sum(isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) for m in model.modules()) + 1 == layers


def test_small_resnet_has_he_et_al_sizes() -> None:
    """6n + 2 layers of 16, 32, 64 channels; 0.27 M parameters in ResNet-20 (their Table 6)."""
    model = build_classifier(settings("resnet20", "BN"), 10, in_channels=3)
    assert sum(isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) for m in model.modules()) + 1 == 20
    assert 0.265e6 < sum(p.numel() for p in model.parameters()) < 0.28e6
    assert model.trunk(torch.zeros(1, 3, 32, 32))["res4"].shape == (1, 64, 8, 8)
