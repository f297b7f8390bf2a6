"""A classifier's weights in a detector: loaded strictly, and the backbone computes what the classifier's trunk did."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gn_det.checkpoint.compatibility import describe
from gn_det.checkpoint.convert import convert
from gn_det.checkpoint.io import read_checkpoint
from gn_det.checkpoint.open_weights import open_weights
from gn_det.checkpoint.preprocessing import CAFFE
from gn_det.checkpoint.weights import load_weights
from gn_det.classification import Settings
from gn_det.classification.classifier_loop import Normalize, write_weights
from gn_det.classification.image_sources import Input
from gn_det.classification.network import Classifier, build_classifier
from gn_det.config import load_config
from gn_det.errors import WeightsError
from gn_det.modeling.build import build_model

R18 = ["MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64]
INPUT = Input("BGR", CAFFE.pixel_mean or (), CAFFE.pixel_std or ())


class NoSource:
    class_names = ("a", "b", "c")
    input = INPUT


def trained(settings: Settings) -> Classifier:
    """Weights as if trained: nothing is 0 or 1, and BN has running statistics."""
    torch.manual_seed(5)
    model = build_classifier(settings, 3)
    for m in model.modules():
        if isinstance(m, (nn.BatchNorm2d, nn.GroupNorm)):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            nn.init.normal_(m.bias, std=0.1)
    model.train()(Normalize(INPUT)(pixels()))
    return model.eval()


def pixels() -> torch.Tensor:
    return torch.randint(0, 256, (2, 3, 64, 96), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def exported(tmp_path: Path, arch: str, norm: str, **changes: Any) -> tuple[Classifier, Path]:
    settings = Settings(arch=arch, norm=norm, data="some/imagenet", output=str(tmp_path), **changes)
    model = trained(settings)
    path = tmp_path / "model_final.pth"
    write_weights(path, model, settings, NoSource(), {"top1_error": 24.0})  # type: ignore[arg-type]
    return model, path


@torch.no_grad()
def features(model: nn.Module, cfg: Any) -> torch.Tensor:
    """res5 of the detector's bottom-up network on the pixels as the detector normalizes them."""
    mean = torch.tensor(list(cfg.MODEL.PIXEL_MEAN)).view(1, 3, 1, 1)
    std = torch.tensor(list(cfg.MODEL.PIXEL_STD)).view(1, 3, 1, 1)
    return model.eval().backbone.bottom_up((pixels().float() - mean) / std)["res5"]


CASES = [
    ("resnet18", "GN", {}, "gn_fpn.yaml", R18),
    ("resnet18", "GN", {"channels_per_group": 16}, "gn_fpn.yaml", [*R18, "MODEL.GN.CHANNELS_PER_GROUP", 16]),
    ("resnet18", "GN", {"ws": "jhu"}, "gn_fpn.yaml", [*R18, "MODEL.WS.RESNETS", "jhu"]),
    ("resnet18", "LN", {}, "gn_fpn.yaml", [*R18, "MODEL.RESNETS.NORM", "LN"]),
    ("resnet18", "BN", {}, "bn_fpn.yaml", R18),
    ("resnet18", "BN", {}, "bn_fpn.yaml", [*R18, "MODEL.RESNETS.NORM", "BN"]),
    ("resnet50", "GN", {}, "gn_fpn.yaml", []),
    ("resnet50", "BN", {"stride_in_1x1": True}, "bn_fpn.yaml", []),
    ("resnet50", "BN", {}, "bn_fpn.yaml", ["MODEL.RESNETS.STRIDE_IN_1X1", False]),
]


@pytest.mark.parametrize("arch, norm, changes, config, overrides", CASES)
def test_detector_features_equal_the_trunk(
    tmp_path: Path, arch: str, norm: str, changes: dict[str, Any], config: str, overrides: list[Any]
) -> None:
    """0 difference; FrozenBN is another expression than BN in eval mode, hence 1e-5 of the largest value there."""
    classifier, path = exported(tmp_path, arch, norm, **changes)
    cfg = load_config(config, ["MODEL.WEIGHTS", str(path), "MODEL.ROI_HEADS.NUM_CLASSES", 2, *overrides])
    model = build_model(cfg)
    report = load_weights(model, path, cfg)
    loaded = set(report.loaded)
    for name, _ in [*model.named_parameters(), *model.named_buffers()]:
        if name.startswith("backbone.bottom_up.") and not name.endswith("num_batches_tracked"):
            assert name in loaded, name
    with torch.no_grad():
        expected = classifier.trunk(Normalize(INPUT)(pixels()))["res5"]
    found = features(model, cfg)
    assert float(expected.abs().max()) > 0.1
    tolerance = 1e-5 * float(expected.abs().max()) if norm == "BN" else 0.0
    assert float((found - expected).abs().max()) <= tolerance


def test_config_with_another_std_gets_it_folded_into_the_stem(tmp_path: Path) -> None:
    """quickstart.yaml divides by 57; its res4 is the classifier's within float32 rounding. res5 is left out there."""
    classifier, path = exported(tmp_path, "resnet18", "GN")
    cfg = load_config("quickstart.yaml", ["MODEL.WEIGHTS", str(path), "MODEL.ROI_HEADS.NUM_CLASSES", 2])
    model = build_model(cfg)
    load_weights(model, path, cfg)
    classifier.trunk.feature_specs["res4"] = classifier.trunk.feature_specs["res5"]
    mean, std = (torch.tensor(list(v)).view(1, 3, 1, 1) for v in (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD))
    with torch.no_grad():
        expected = classifier.trunk(Normalize(INPUT)(pixels()))["res4"]
        found = model.eval().backbone.bottom_up((pixels().float() - mean) / std)["res4"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize(
    "arch, norm, config, overrides, told",
    [
        ("resnet18", "BN", "gn_fpn.yaml", R18, "MODEL.RESNETS.NORM"),
        ("resnet18", "LN", "gn_fpn.yaml", R18, "set MODEL.RESNETS.NORM 'LN'"),
        ("resnet18", "GN", "gn_fpn.yaml", [*R18, "MODEL.GN.NUM_GROUPS", 16], "need: MODEL.GN.NUM_GROUPS 32"),
        ("resnet18", "GN", "gn_fpn.yaml", [], "MODEL.RESNETS.DEPTH 18"),
        ("resnet18", "GN", "gn_fpn.yaml", [*R18, "MODEL.WS.RESNETS", "jhu"], "need: MODEL.WS.RESNETS ''"),
        ("resnet50", "BN", "bn_fpn.yaml", [], "MODEL.RESNETS.STRIDE_IN_1X1 False"),
    ],
)
def test_config_that_computes_something_else_is_refused(
    tmp_path: Path, arch: str, norm: str, config: str, overrides: list[Any], told: str
) -> None:
    _, path = exported(tmp_path, arch, norm)
    cfg = load_config(config, ["MODEL.WEIGHTS", str(path), "MODEL.ROI_HEADS.NUM_CLASSES", 2, *overrides])
    with torch.device("meta"):
        model = build_model(cfg)
    with pytest.raises(WeightsError) as caught:
        load_weights(model, path, cfg)
    assert told in str(caught.value)


def test_file_tells_where_it_comes_from_and_keeps_no_paths(tmp_path: Path) -> None:
    _, path = exported(tmp_path, "resnet18", "GN")
    weights = open_weights(path)
    assert weights.kind.startswith("resnet18 GN classifier of imagenet, trained by gn_det")
    assert weights.preprocessing is not None and weights.preprocessing.format == "BGR"
    assert weights.groups == (32, 0) and weights.norm == "GN"
    step = read_checkpoint(path)["gn_det"]["provenance"][-1]
    assert step["top1_error"] == 24.0 and step["settings"]["batch_size"] == 32 and step["classes"] == ["a", "b", "c"]
    assert str(tmp_path) not in str(step)
    assert any(
        "resnet18 GN classifier of imagenet (epoch ?, top-1 error 24.00 %)" in line for line in describe(str(path))
    )


def test_converts_to_torchvision_with_its_classifier(tmp_path: Path) -> None:
    """torchvision's own ResNet-18 gives the classifier's scores on its own preprocessing, within float32 rounding."""
    import torchvision

    classifier, path = exported(tmp_path, "resnet18", "BN")
    convert(path, tmp_path / "tv.pth", "torchvision", fold_stem=True)
    theirs = torchvision.models.resnet18(num_classes=3)
    theirs.load_state_dict(read_checkpoint(tmp_path / "tv.pth")["state_dict"])
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        expected = classifier(Normalize(INPUT)(pixels()))
        found = theirs.eval()((pixels().flip(1) / 255 - mean) / std)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
