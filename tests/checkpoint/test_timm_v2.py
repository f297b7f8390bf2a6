"""Identity: timm's pre-activation ResNets give timm's own features, and nothing else is taken for them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gn_det.checkpoint.compatibility import check_keys
from gn_det.checkpoint.convert import convert
from gn_det.checkpoint.open_weights import open_weights
from gn_det.checkpoint.weights import load_weights
from gn_det.config import load_config
from gn_det.errors import WeightsError
from gn_det.modeling.build import build_model

timm = pytest.importorskip("timm", reason="timm is the reference of these tests (pip install .[test])")

HALF = ["INPUT.FORMAT", "RGB", "MODEL.PIXEL_MEAN", "[127.5, 127.5, 127.5]", "MODEL.PIXEL_STD", "[127.5, 127.5, 127.5]"]
SMALL = ["MODEL.ROI_HEADS.NUM_CLASSES", "3", "MODEL.FPN.OUT_CHANNELS", "32", "MODEL.ROI_BOX_HEAD.FC_DIM", "32"]
BIT = ["MODEL.RESNETS.VARIANT", "bit", "MODEL.WS.RESNETS", "timm"]
DEEP = ["MODEL.RESNETS.VARIANT", "v2d"]


def saved(path: Path, name: str) -> Any:
    """timm's model with random weights, norms included, and its file."""
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter) * (parameter.std() if parameter.numel() > 1 else 1)
    torch.save(model.state_dict(), path)
    return model


def load(path: Path, *keys: str) -> Any:
    cfg = load_config("gn_fpn.yaml", [*SMALL, *keys])
    model = build_model(cfg).eval()
    load_weights(model, path, cfg)
    return model


@pytest.mark.parametrize(("name", "keys"), [("resnetv2_50x1_bit", BIT), ("resnetv2_50d_gn", DEEP)])
@pytest.mark.parametrize("size", [(96, 128), (75, 101)])
def test_features_are_timms(name: str, keys: list[str], size: tuple[int, int], tmp_path: Path) -> None:
    theirs = saved(tmp_path / "w.pth", name)
    ours = load(tmp_path / "w.pth", *HALF, *keys).backbone.bottom_up
    x = torch.randn(2, 3, *size)
    with torch.no_grad():
        expected = theirs.forward_intermediates(x, intermediates_only=True)[1:]
        found = ours(x)
    assert list(found) == ["res2", "res3", "res4", "res5"]
    for feature, other in zip(found.values(), expected, strict=True):
        assert feature.shape == other.shape
        assert float((feature - other).abs().max()) <= 1e-4 * float(other.abs().max())


def test_what_the_config_must_say(tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    saved(path, "resnetv2_50x1_bit")
    for keys, named in (
        ((), r"pre-activation ResNet \(BiT\), but .* post-activation ResNet: set MODEL\.RESNETS\.VARIANT bit$"),
        (DEEP, r"a pre-activation ResNet with a deep stem: set MODEL\.RESNETS\.VARIANT bit$"),
        ((*HALF, *BIT[:2]), r"MODEL\.WS\.RESNETS is '', but .* need: MODEL\.WS\.RESNETS timm$"),
        (BIT[:2], r"need: INPUT\.FORMAT RGB MODEL\.PIXEL_MEAN .* MODEL\.WS\.RESNETS timm$"),
        ((*HALF, *BIT[:3], "jhu"), r"MODEL\.WS\.RESNETS is jhu, but .* need: MODEL\.WS\.RESNETS timm$"),
        (BIT, r"need: INPUT\.FORMAT RGB MODEL\.PIXEL_MEAN \[127\.5,127\.5,127\.5\] MODEL\.PIXEL_STD"),
        ((*HALF, *BIT, "MODEL.GN.NUM_GROUPS", "16"), r"need: MODEL\.GN\.NUM_GROUPS 32"),
    ):
        with pytest.raises(WeightsError, match=named):
            load(path, *keys)
    load(path, *HALF, *BIT[:3], "bit")
    # a config of Detectron2's own keys
    with pytest.raises(WeightsError, match=r"need: MODEL\.WS\.RESNETS timm$"):
        check_keys("w.pth", open_weights(path), {"MODEL": {"RESNETS": {}}}, allow_partial=False, norms=False)


def test_with_batch_norm(tmp_path: Path) -> None:
    saved(tmp_path / "w.pth", "resnetv2_50")
    with pytest.raises(WeightsError, match="pre-activation ResNet with BatchNorm, which is not read"):
        load(tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("name", "what"), [("resnetv2_50x1_bit", "a pre-activation"), ("resnetv2_50d_gn", "a pre-activ")]
)
def test_conversion_to_a_layout_that_has_no_such_network(name: str, what: str, tmp_path: Path) -> None:
    saved(tmp_path / "w.pth", name)
    with pytest.raises(WeightsError, match=f"{what}.* use --to detectron2"):
        convert(tmp_path / "w.pth", tmp_path / "out.pth", "torchvision")
    convert(tmp_path / "w.pth", tmp_path / "ours.pth", "detectron2")
    keys = BIT if "bit" in name else DEEP
    with pytest.raises(WeightsError, match=r"set MODEL\.RESNETS\.VARIANT"):
        load(tmp_path / "ours.pth", *HALF)
    load(tmp_path / "ours.pth", *HALF, *keys)
