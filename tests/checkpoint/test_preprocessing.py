"""Preprocessing folded into the stem: the source library's own model on its own preprocessing gives our features."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gn_det.checkpoint.preprocessing import CAFFE, TORCH, Preprocessing, fold
from gn_det.checkpoint.weights import format_report, load_weights
from gn_det.config import load_config
from gn_det.errors import WeightsError
from gn_det.modeling.build import build_model

STEM = "backbone.bottom_up.stem.conv1.weight"
# How a config may feed the model: all must give the same features.
FEEDS = {
    "BGR 0-255": ["INPUT.FORMAT", "BGR"],
    "BGR std": ["MODEL.PIXEL_STD", "[57.375, 57.12, 58.395]"],
    "RGB std": [
        *("INPUT.FORMAT", "RGB", "MODEL.PIXEL_MEAN", "[123.675, 116.28, 103.53]"),
        *("MODEL.PIXEL_STD", "[58.395, 57.12, 57.375]"),
    ],
}


def config(norm: str = "GN", *keys: str) -> Any:
    name = "gn_fpn.yaml" if norm == "GN" else "bn_fpn.yaml"
    stride = ["MODEL.RESNETS.STRIDE_IN_1X1", "False", "MODEL.RESNETS.NORM", norm]
    return load_config(name, [*stride, "MODEL.ROI_HEADS.NUM_CLASSES", "2", "MODEL.DEVICE", "cpu", *keys])


def randomized(model: nn.Module) -> nn.Module:
    """Norms away from their identity, so that a swapped gamma or statistic shows."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, value in model.state_dict().items():
            if value.dim() == 1 and value.is_floating_point():
                value.uniform_(0.5, 1.5) if name.endswith(("weight", "var")) else value.uniform_(-0.3, 0.3)
    return model.eval()


def images() -> tuple[torch.Tensor, torch.Tensor]:
    """One uint8 image as RGB (3, 67, 90), and as torchvision and timm feed it."""
    rgb = torch.from_numpy(np.random.default_rng(5).integers(0, 256, (3, 67, 90), dtype=np.uint8))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return rgb, ((rgb.float() / 255 - mean) / std)[None]


def ours(path: Path | str, cfg: Any, rgb: torch.Tensor) -> tuple[dict[str, torch.Tensor], Any]:
    torch.manual_seed(2)
    model = build_model(cfg).eval()
    report = load_weights(model, path, cfg)
    pixels = rgb.float() if cfg.INPUT.FORMAT == "RGB" else rgb.flip(0).float()
    x = (pixels - model.pixel_mean) / model.pixel_std
    with torch.inference_mode():
        return model.backbone.bottom_up(x[None]), report


def same_features(found: dict[str, torch.Tensor], expected: list[torch.Tensor]) -> None:
    """fp32: largest difference relative to the largest value."""
    assert len(found) == len(expected) == 4
    for feature, theirs in zip(found.values(), expected):
        assert feature.shape == theirs.shape
        assert float((feature - theirs).abs().max()) <= 1e-4 * float(theirs.abs().max())


@pytest.mark.parametrize(("suffix", "feed"), [("safetensors", "BGR 0-255"), *(("pth", feed) for feed in FEEDS)])
def test_timm_resnet50_gn(tmp_path: Path, suffix: str, feed: str) -> None:
    timm = pytest.importorskip("timm", reason="timm is the reference of this test (pip install .[test])")
    model = randomized(timm.create_model("resnet50_gn", pretrained=False))
    needs = timm.data.resolve_model_data_config(model)
    assert (needs["mean"], needs["std"]) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    if suffix == "pth":
        torch.save(model.state_dict(), tmp_path / "m.pth")
    else:
        from safetensors.torch import save_file

        save_file(model.state_dict(), tmp_path / "m.safetensors", metadata={"format": "pt"})  # as on timm's hub
    rgb, x = images()
    with torch.inference_mode():
        expected = model.forward_intermediates(x, intermediates_only=True)[1:]
    found, report = ours(tmp_path / f"m.{suffix}", config("GN", *FEEDS[feed]), rgb)
    same_features(found, expected)
    assert sorted(report.ignored) == ["fc.bias", "fc.weight"] and not report.unexpected
    assert ("folded into the stem" in format_report(report)) == (feed != "RGB std")


def torchvision_features(model: Any, x: torch.Tensor) -> list[torch.Tensor]:
    with torch.inference_mode():
        x = model.maxpool(model.relu(model.bn1(model.conv1(x))))
        return [x := layer(x) for layer in (model.layer1, model.layer2, model.layer3, model.layer4)]


@pytest.mark.parametrize(
    ("norm", "wrapping"), [("GN", "DistributedDataParallel"), ("GN", "bare"), ("BN", "bare"), ("FrozenBN", "bare")]
)
def test_torchvision_resnet(tmp_path: Path, norm: str, wrapping: str) -> None:
    from torchvision.models import resnet50

    layer = partial(nn.GroupNorm, 32) if norm == "GN" else None
    model = randomized(resnet50(norm_layer=layer))
    state: Any = model.state_dict()
    if wrapping != "bare":
        state = {"state_dict": {f"module.{name}": value for name, value in state.items()}, "epoch": 90}
    torch.save(state, tmp_path / "m.pth")
    rgb, x = images()
    found, report = ours(tmp_path / "m.pth", config(norm), rgb)
    same_features(found, torchvision_features(model, x))
    assert not report.unexpected and "torchvision or timm ResNet, ResNet-50" in report.kind


def test_torchvision_resnet101_with_groupnorm(tmp_path: Path) -> None:
    from torchvision.models import resnet101

    model = randomized(resnet101(norm_layer=partial(nn.GroupNorm, 32)))
    torch.save(model.state_dict(), tmp_path / "m.pth")
    rgb, x = images()
    found, _ = ours(tmp_path / "m.pth", config("GN", "MODEL.RESNETS.DEPTH", "101"), rgb)
    same_features(found, torchvision_features(model, x))
    assert "set MODEL.RESNETS.DEPTH 101" in refusal(tmp_path / "m.pth", config("GN"))


def test_mmdetection_backbone_is_torchvisions_with_gn_in_the_names(tmp_path: Path) -> None:
    """mmdetection's ResNet of style pytorch computes what torchvision's does."""
    from torchvision.models import resnet50

    model = randomized(resnet50(norm_layer=partial(nn.GroupNorm, 32)))
    renamed = {name.replace("bn", "gn"): value for name, value in model.state_dict().items() if "fc" not in name}
    torch.save({"state_dict": renamed, "meta": {}}, tmp_path / "m.pth")
    rgb, x = images()
    found, _ = ours(f"{tmp_path}/m.pth?preprocessing=torch", config("GN"), rgb)
    same_features(found, torchvision_features(model, x))


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        (["MODEL.PIXEL_MEAN", "[102.9801, 115.9465, 122.7717]"], "need: MODEL.PIXEL_MEAN [103.53,116.28,123.675]"),
        (["MODEL.PIXEL_MEAN", "[123.675, 116.28, 103.53]"], "need: MODEL.PIXEL_MEAN [103.53,116.28,123.675]"),
        (["INPUT.FORMAT", "RGB"], "need: MODEL.PIXEL_MEAN [123.675,116.28,103.53]"),
        (["MODEL.RESNETS.STRIDE_IN_1X1", "True"], "need: MODEL.RESNETS.STRIDE_IN_1X1 False"),
        (["MODEL.RESNETS.NORM", "BN"], "set MODEL.RESNETS.NORM 'GN'"),
    ],
)
def test_contradictions_name_the_keys(resnet50_gn: Path, keys: list[str], expected: str) -> None:
    assert expected in refusal(resnet50_gn, config("GN", *keys))


@pytest.fixture(scope="module")
def resnet50_gn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from torchvision.models import resnet50

    path = tmp_path_factory.mktemp("weights") / "m.pth"
    torch.save(resnet50(norm_layer=partial(nn.GroupNorm, 32)).state_dict(), path)
    return path


def refusal(path: Path, cfg: Any) -> str:
    """What loading says; it refuses before anything is copied, so the model needs no memory."""
    with torch.device("meta"):
        model = build_model(cfg)
    with pytest.raises(WeightsError) as caught:
        load_weights(model, path, cfg)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ----------------------------------------------------------------------------------------------------------- the rule


def test_the_rule_in_numbers() -> None:
    weight = torch.arange(1.0, 7.0).view(2, 3, 1, 1)
    state = {"stem.conv1.weight": weight.clone()}
    target = Preprocessing("BGR", (103.53, 116.28, 123.675), (1.0, 2.0, 1.0))
    now = fold(state, TORCH, target)
    assert now == Preprocessing("BGR", (103.53, 116.28, 123.675), (1.0, 2.0, 1.0), stride_in_1x1=False)
    expected = [[3 / 57.375, 2 * 2 / 57.12, 1 / 58.395], [6 / 57.375, 5 * 2 / 57.12, 4 / 58.395]]
    torch.testing.assert_close(state["stem.conv1.weight"].view(2, 3), torch.tensor(expected), rtol=1e-7, atol=0)


def test_nothing_to_fold_changes_no_bit() -> None:
    weight = torch.rand(4, 3, 7, 7)
    state = {"backbone.stem.conv1.weight": weight}
    assert fold(state, CAFFE, CAFFE) == CAFFE and torch.equal(state["backbone.stem.conv1.weight"], weight)


@pytest.mark.parametrize(
    ("shape", "needs", "target"),
    [
        ((4, 1, 7, 7), TORCH, CAFFE),
        ((4, 3), TORCH, CAFFE),
        ((4, 3, 7, 7), Preprocessing("RGB"), CAFFE),
        ((4, 3, 7, 7), Preprocessing(None, None, (1.0, 1.0, 1.0)), CAFFE),
        ((4, 3, 7, 7), Preprocessing("RGB", None, (0.0, 1.0, 1.0)), CAFFE),
        ((4, 3, 7, 7), Preprocessing("RGB", None, (1.0, 1.0)), CAFFE),
        ((4, 3, 7, 7), TORCH, Preprocessing("GRAY", None, (1.0, 1.0, 1.0))),
    ],
)
def test_what_cannot_be_folded_stays(shape: tuple[int, ...], needs: Preprocessing, target: Preprocessing) -> None:
    state = {"stem.conv1.weight": torch.ones(shape)}
    assert fold(state, needs, target) == needs
    assert torch.equal(state["stem.conv1.weight"], torch.ones(shape))


def test_another_mean_shows_at_the_border_alone() -> None:
    """Why a mean cannot be folded: inside, a bias would do; where zeros pad, it would not."""
    conv = nn.Conv2d(3, 4, 7, padding=3, bias=False).double()
    x = torch.rand(1, 3, 20, 20, dtype=torch.float64) * 255
    shift = torch.tensor([0.55, 0.33, 0.9], dtype=torch.float64).view(1, 3, 1, 1)
    difference = (conv(x - shift) - conv(x)).detach()
    inside = difference[..., 3:-3, 3:-3]
    assert float((inside - inside[..., :1, :1]).abs().max()) < 1e-10
    assert float((difference - inside[..., :1, :1]).abs().max()) > 1e-3
