"""I3D: its size, its maps, and that it is what inflation of a 2-D network says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from gn_det.classification import Settings
from gn_det.classification.inflated import ConvNorm3d, InflatedResNet, inflate_
from gn_det.classification.network import build_classifier, build_optimizer
from gn_det.classification.settings import base_lr, lr_factor
from gn_det.errors import ConfigError, WeightsError
from gn_det.kernels import group_norm_act
from gn_det.modeling.layers import ConvNorm
from gn_det.norm import GroupNorm, NormFactory


def settings(arch: str = "i3d_r18", norm: str = "GN", **changes: Any) -> Settings:
    return Settings(arch=arch, norm=norm, data="motions", output="out", **changes)


def random_norms(model: nn.Module) -> nn.Module:
    """Fresh norms hide mistakes: gamma 1, beta 0 and statistics 0 and 1 are drawn anew."""
    for module in model.modules():
        if isinstance(module, (nn.GroupNorm, nn.BatchNorm3d)):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.1)
        if isinstance(module, nn.BatchNorm3d):
            nn.init.normal_(module.running_mean, std=0.1)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
    return model


def test_size_and_maps_of_the_paper() -> None:
    """28.04 M parameters with 400 classes; 32x224x224 becomes 8x55x55, 8x55x55, 4x28x28, 4x14x14, 4x7x7."""
    with torch.device("meta"):
        model = build_classifier(settings("i3d_r50"), 400)
        clip = torch.zeros(1, 3, 32, 224, 224)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == 28.04
    sizes: list[tuple[int, ...]] = []
    for name in ("res2", "res3", "res4", "res5"):
        stage = getattr(model.trunk, name)
        stage.register_forward_hook(lambda _, x, y: sizes.extend([tuple(x[0].shape[2:]), tuple(y.shape[2:])]))
    assert model(clip).shape == (1, 400)
    assert [*sizes[:2], *sizes[3::2]] == [(8, 55, 55), (8, 55, 55), (4, 28, 28), (4, 14, 14), (4, 7, 7)]


#: Temporal kernels of the first convolution of every block, to the digit from Wang et al. 2018.
KERNELS = {
    50: {"res2": (3, 3, 3), "res3": (3, 1, 3, 1), "res4": (3, 1, 3, 1, 3, 1), "res5": (1, 3, 1)},
    18: {"res2": (3, 3), "res3": (3, 1), "res4": (3, 1), "res5": (1, 3)},
}


def reference(state: dict[str, Tensor], x: Tensor, depth: int, norm: str) -> Tensor:
    """The same network from its table, on plain tensors and torch's functions alone."""

    def conv(name: str, x: Tensor, stride: tuple[int, int, int] = (1, 1, 1), relu: bool = True) -> Tensor:
        w = state[f"{name}.weight"]
        x = F.conv3d(x, w, None, stride, [k // 2 for k in w.shape[2:]])
        gamma, beta = state[f"{name}.norm.weight"], state[f"{name}.norm.bias"]
        if norm == "GN":
            x = F.group_norm(x, 32, gamma, beta, 1e-5)
        else:
            mean, var = (state[f"{name}.norm.running_{what}"] for what in ("mean", "var"))
            x = F.batch_norm(x, mean, var, gamma, beta, False, 0.0, 1e-5)
        return x.relu() if relu else x

    x = F.max_pool3d(conv("stem.conv1", x, (2, 2, 2)), (2, 3, 3), (2, 2, 2))
    for stage, kernels in KERNELS[depth].items():
        for number, kernel in enumerate(kernels):
            at = f"{stage}.{number}"
            assert state[f"{at}.conv1.weight"].shape[2] == kernel
            stride = (1, 2, 2) if number == 0 and stage != "res2" else (1, 1, 1)
            short = conv(f"{at}.shortcut", x, stride, False) if f"{at}.shortcut.weight" in state else x
            if depth == 50:
                x = conv(f"{at}.conv3", conv(f"{at}.conv2", conv(f"{at}.conv1", x), stride), relu=False)
            else:
                x = conv(f"{at}.conv2", conv(f"{at}.conv1", x, stride), relu=False)
            x = (x + short).relu()
        if stage == "res2":
            x = F.max_pool3d(x, (2, 1, 1))
    return x


@pytest.mark.parametrize("depth, norm", [(50, "GN"), (50, "BN"), (18, "GN")])
def test_forward_is_that_of_the_table(depth: int, norm: str) -> None:
    model = build_classifier(settings(f"i3d_r{depth}", norm), 5)
    random_norms(model).double().eval()  # in float32, the deep network of BN magnifies rounding
    clip = torch.randn(2, 3, 16, 48, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with torch.no_grad():
        ours, theirs = model.trunk(clip)["res5"], reference(model.trunk.state_dict(), clip, depth, norm)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
        scores = F.linear(theirs.mean((2, 3, 4)), model.linear.weight, model.linear.bias)
        torch.testing.assert_close(model(clip), scores, rtol=1e-9, atol=1e-9)


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    torch.manual_seed(1)
    path = tmp_path / "r18.pth"
    torch.save(torchvision.models.resnet18().state_dict(), path)
    return path


def test_still_clip_gives_what_the_2d_network_gives(flat: Path) -> None:
    """Every inflated convolution on one frame repeated equals the 2-D one, wherever its window is inside the clip."""
    network = InflatedResNet(depth=18, norm=nn.BatchNorm3d)
    given = inflate_(network, str(flat), "BN", (32, 0))
    assert given.order == "RGB" and given.mean == (123.675, 116.28, 103.53)
    state = torch.load(flat)
    names = {"stem.conv1": "conv1", "res2.0.conv1": "layer1.0.conv1", "res3.0.shortcut": "layer2.0.downsample.0"}
    for ours, theirs in names.items():
        conv: Any = network.get_submodule(ours)
        assert isinstance(conv, ConvNorm3d)
        frame = torch.randn(2, conv.in_channels, 14, 13)
        clip = frame[:, :, None].expand(-1, -1, 9, -1, -1)
        deep = F.conv3d(clip, conv.weight, None, conv.stride, conv.padding)
        plain = F.conv2d(frame, state[f"{theirs}.weight"], None, conv.stride[1:], conv.padding[1:])
        inside = slice(1, -1)
        torch.testing.assert_close(
            deep[:, :, inside], plain[:, :, None].expand_as(deep[:, :, inside]), atol=1e-4, rtol=1e-4
        )
    assert torch.equal(network.res2[0].conv1.norm.running_var, state["layer1.0.bn1.running_var"])


def test_backbone_of_a_detector_is_inflated(flat: Path, tmp_path: Path) -> None:
    from gn_det.checkpoint.open_weights import open_weights

    bare = open_weights(flat)
    block = {"version": "0", "weights": {"norm": "BN", "preprocessing": vars(bare.preprocessing)}}
    state = {f"backbone.bottom_up.{k}": v for k, v in bare.state.items()}
    torch.save({"model": state, "gn_det": block}, tmp_path / "detector.pth")
    networks = [InflatedResNet(depth=18, norm=nn.BatchNorm3d) for _ in range(2)]
    for network, path in zip(networks, (flat, tmp_path / "detector.pth")):
        inflate_(network, str(path), "BN", (32, 0))
    first, second = (network.state_dict() for network in networks)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    "depth, norm, message",
    [(18, "GN", "is a backbone with BN, the network has GN: use --norm BN"), (50, "BN", "of the same depth")],
)
def test_weights_that_cannot_be_inflated(flat: Path, depth: int, norm: str, message: str) -> None:
    with torch.device("meta"):
        network = InflatedResNet(depth=depth, norm=nn.BatchNorm3d)
    with pytest.raises(WeightsError, match=message):
        inflate_(network, str(flat), norm, (32, 0))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize(
    ("kernel", "side", "stride"),
    [(1, 3, (1, 1)), (1, 3, (1, 2)), (3, 1, (1, 1)), (3, 1, (2, 1)), (3, 1, (1, 2)), (1, 3, (2, 1)), (3, 3, (2, 2))],
)
def test_convolution_is_that_in_three_dimensions(
    kernel: int, side: int, stride: tuple[int, int], layout: torch.memory_format
) -> None:
    """Output and all gradients of F.conv3d, whichever of its dimensions have size 1; strides in time and space."""
    torch.manual_seed(0)
    flat = ConvNorm(4, 6, kernel_size=side, stride=stride[1], padding=side // 2, bias=True)
    conv = ConvNorm3d(flat, kernel, stride[0]).double()
    x = torch.randn(2, 4, 5, 6, 7, dtype=torch.float64).contiguous(memory_format=layout).requires_grad_()
    padding = (kernel // 2, side // 2, side // 2)
    results = []
    for y in (conv(x), F.conv3d(x, conv.weight, conv.bias, (stride[0], stride[1], stride[1]), padding)):
        assert conv.bias is not None
        torch.manual_seed(1)
        results.append([y.detach(), *torch.autograd.grad(y, [x, conv.weight, conv.bias], torch.randn_like(y))])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    assert conv(x[:0]).shape == (0, *y.shape[1:])  # no clips


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("kind", ["GN", "LN", "IN"])
def test_norm_of_clips_is_group_norm_over_time_and_space(layout: torch.memory_format, kind: str) -> None:
    """Output and all gradients of relu(norm(x) + residual) as torch's own operations give them on 5-D tensors."""
    g = torch.Generator().manual_seed(2)
    results = []
    values = [torch.randn(2, 8, 3, 4, 5, generator=g, dtype=torch.float32) for _ in range(3)]
    norm: Any = NormFactory(kind)(32) if kind == "GN" else NormFactory(kind)(8)
    if kind == "GN":
        values = [v.repeat(1, 4, 1, 1, 1) + 0.1 * torch.randn(2, 32, 3, 4, 5, generator=g) for v in values]
    assert isinstance(norm, GroupNorm)
    random_norms(norm)
    for own in (True, False):
        x, residual = (v.clone().contiguous(memory_format=layout).requires_grad_() for v in values[:2])
        norm.zero_grad()
        if own:
            y = group_norm_act(x, norm.num_groups, norm.weight, norm.bias, norm.eps, residual)
            assert y.is_contiguous(memory_format=layout)
        else:
            y = (F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps) + residual).relu()
        y.backward(values[2])
        results.append([y.detach(), x.grad, residual.grad, norm.weight.grad.clone(), norm.bias.grad.clone()])
    for ours, theirs in zip(*results):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_learning_rate_at_every_iteration() -> None:
    """0.01 for 64 clips, linear in the batch; x 0.1 after 150k and 300k of 400k iterations."""
    of_paper = settings("i3d_r50")
    assert of_paper.iterations == 400_000 and of_paper.batch_size == 8
    assert base_lr(of_paper, 8) == 0.01 and base_lr(settings("i3d_r50", batch_size=4), 8) == 0.005
    drops = [i for i in range(1, 400_000) if lr_factor(of_paper, i, 400_000) != lr_factor(of_paper, i - 1, 400_000)]
    assert drops == [150_000, 300_000]
    factors = [lr_factor(of_paper, i, 400_000) for i in (0, 150_000, 300_000)]
    assert factors == pytest.approx([1, 0.1, 0.01])


@pytest.mark.parametrize("norm", ["BN", "GN"])
def test_weight_decay_leaves_norms_out(norm: str) -> None:
    model = build_classifier(settings(norm=norm), 3)
    decayed, free = build_optimizer(settings(norm=norm), model, 0.1).param_groups
    norms = [p for m in model.modules() if isinstance(m, (nn.GroupNorm, nn.BatchNorm3d)) for p in m.parameters()]
    assert (decayed["weight_decay"], free["weight_decay"]) == (1e-4, 0.0)
    assert {id(p) for p in free["params"]} == {id(p) for p in norms}
    assert len(decayed["params"]) + len(norms) == len(list(model.parameters()))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"arch": "resnet18", "data": "shapes", "frames": 8}, "frames is 8, but it is of clips"),
        ({"arch": "resnet18"}, "data is 'motions', but arch is resnet18"),
        ({"data": "shapes"}, "data is 'shapes', but arch is i3d_r18"),
        ({"norm": "WN"}, "norm is 'WN', but clips have BN"),
        ({"precise_bn": 5}, "precise_bn is 5, but norm GN needs none"),
        ({"iterations": 5, "epochs": 1}, "iterations is 5, but epochs is given"),
        ({"train_list": "a.csv"}, "train_list is 'a.csv', but val_list is None"),
    ],
)
def test_contradictions_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings(**{"arch": "i3d_r18", **changes}) if "data" not in changes else Settings(
            **{"arch": "i3d_r18", "norm": "GN", "output": "o", **changes}
        )


def test_options_of_clips_are_not_in_the_settings_of_images() -> None:
    """Recorded runs of image classifiers keep their keys, and clips survive the way through JSON."""
    image = Settings(arch="resnet18", norm="GN", data="shapes", output="out")
    assert not {"frames", "iterations", "weights", "max_bad"} & set(image.to_dict())
    assert Settings.from_dict(settings(norm="BN").to_dict()) == settings(norm="BN")
