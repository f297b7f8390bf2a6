"""Settings: refused one by one with the field's name; the paper's rules that follow from them."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import Any

import pytest

from gn_det.classification import Settings
from gn_det.classification.settings import STANDARDIZATIONS, base_lr, lr_factor
from gn_det.config.schema import WEIGHT_STANDARDIZATIONS
from gn_det.errors import ConfigError

GOOD: dict[str, Any] = {"arch": "resnet50", "norm": "GN", "data": "imagenet", "output": "out"}


@pytest.mark.parametrize(
    "field, value",
    [
        ("arch", "resnet51"),
        ("norm", "gn"),
        ("norm", "WS"),
        ("r_max", 0.5),
        ("d_max", -1.0),
        ("renorm_ramp", (0.5, 0.1)),
        ("renorm_ramp", (0.5,)),
        ("amp", "half"),
        ("data", ""),
        ("output", 3),
        ("groups", 0),
        ("groups", 2.0),
        ("channels_per_group", -4),
        ("batch_size", 0),
        ("batch_size", True),
        ("epochs", 0),
        ("epochs", float("inf")),
        ("lr", 0.0),
        ("lr", "0.1"),
        ("lr", float("nan")),
        ("momentum", 1.1),
        ("weight_decay", -1e-4),
        ("gamma", 0.0),
        ("steps", (0.6, 0.3)),
        ("steps", (1.0,)),
        ("steps", "30"),
        ("seed", -1),
        ("workers", -1),
        ("image_size", 4),
        ("images", 5),
        ("augment", "cutout"),
        ("record", ""),
        ("color", 1),
        ("stride_in_1x1", None),
        ("ws", "mmcv"),
    ],
)
def test_bad_values_are_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        Settings(**{**GOOD, field: value})
    assert re.match(rf"classify {field}(\[0\])? is ", str(caught.value)) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"groups": 8, "channels_per_group": 8}, "give one of them"),
        ({"norm": "BN", "groups": 8}, "groups is 8, but norm BN has none"),
        ({"norm": "LN", "channels_per_group": 8}, "channels_per_group is 8, but norm LN"),
        ({"norm": "BN", "batch_size": 1}, "batch_size is 1"),
        ({"arch": "resnet8"}, "image_size is None, but resnet8 on a folder needs it"),
        ({"data": "digits", "arch": "resnet8", "images": 100}, "digits is always used whole"),
        ({"data": "digits"}, "arch is 'resnet50'"),
        ({"r_max": 2.0}, "r_max is 2.0, but it is of norm BR"),
        ({"norm": "BR", "batch_size": 1}, "batch_size is 1, but BR needs"),
        ({"data": "cifar10", "image_size": 64}, "cifar10 has images of 32 pixels"),
        ({"arch": "vgg16", "image_size": 24}, "vgg16 needs at least 32"),
        ({"arch": "resnet18", "stride_in_1x1": True}, "stride_in_1x1 is True"),
        ({"norm": "WN", "ws": "jhu"}, "ws is 'jhu', but only images with norm BN"),
        ({"arch": "i3d_r18", "ws": "jhu"}, "ws is 'jhu', but only images"),
    ],
)
def test_contradictions_are_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match="classify") as caught:
        Settings(**{**GOOD, **changes})
    assert told in str(caught.value)


def test_weight_standardization_has_the_formulas_of_the_config() -> None:
    assert STANDARDIZATIONS == WEIGHT_STANDARDIZATIONS


def test_dict_round_trip_and_unknown_fields() -> None:
    settings = Settings(**GOOD, groups=16, lr=0.2, steps=(0.5,))
    assert Settings.from_dict(settings.to_dict()) == settings
    with pytest.raises(ConfigError, match="classify learning_rate: no such setting"):
        Settings.from_dict({**GOOD, "learning_rate": 0.1})
    with pytest.raises(ConfigError, match="classify norm is missing"):
        Settings.from_dict({k: v for k, v in GOOD.items() if k != "norm"})


def test_learning_rate_is_linear_in_the_images_of_an_iteration() -> None:
    """The paper: 0.1 for 32 images on each of 8 GPUs; at 2 images a GPU, 0.1 x 2 / 32."""
    assert base_lr(Settings(**GOOD), 8) == pytest.approx(0.1, rel=1e-12)
    assert base_lr(Settings(**GOOD, batch_size=2), 8) == pytest.approx(0.1 * 2 / 32, rel=1e-12)
    assert base_lr(Settings(**GOOD), 1) == pytest.approx(0.1 / 8, rel=1e-12)
    assert base_lr(Settings(**GOOD, lr=0.3), 8) == 0.3


def test_vgg_warms_up_from_its_reference() -> None:
    """0.01 for 256 images; at 1024 linearly from 0.01 to 0.04 over 3 of 100 epochs, then x0.1 at 30, 60 and 80."""
    ours = Settings(**{**GOOD, "arch": "vgg16"})
    assert base_lr(ours, 8) == pytest.approx(0.01) and base_lr(ours, 32) == pytest.approx(0.04)
    rates = [0.04 * lr_factor(ours, 10 * epoch, 1000, 32) for epoch in range(100)]
    assert rates[:4] == pytest.approx([0.01, 0.02, 0.03, 0.04])
    assert [e for e in range(4, 100) if rates[e] < rates[e - 1]] == [30, 60, 80]
    assert all(lr_factor(ours, i, 1000, 8) == 1 for i in range(300))  # at the reference there is nothing to warm up
    assert lr_factor(Settings(**{**GOOD, "arch": "vgg16", "lr": 0.5}), 0, 1000, 32) == 1  # as given


def test_settings_of_batch_renorm_are_in_its_dict_alone() -> None:
    """An earlier version's checkpoints and suites have the same dict for all other norms."""
    assert "r_max" not in Settings(**GOOD).to_dict()
    ours = Settings(**{**GOOD, "norm": "BR"})
    assert (ours.r_max, ours.d_max, ours.renorm_ramp) == (1.5, 0.5, (0.04, 0.3))
    assert Settings.from_dict(ours.to_dict()) == ours and ours.to_dict()["renorm_ramp"] == [0.04, 0.3]


@pytest.mark.parametrize("epochs, per_epoch", [(100, 5004), (10, 7), (2.5, 40)])
def test_steps_keep_their_proportion(epochs: float, per_epoch: int) -> None:
    """Epochs 30, 60, 90 of 100 are iterations 0.3, 0.6, 0.9 of any total, each the first with the lower rate."""
    settings = Settings(**GOOD, epochs=epochs)
    total = round(epochs * per_epoch)
    rates = [lr_factor(settings, i, total) for i in range(total)]
    drops = [i for i in range(1, total) if rates[i] < rates[i - 1]]
    assert drops == [round(0.3 * total), round(0.6 * total), round(0.9 * total)]
    assert rates[0] == 1.0 and rates[-1] == pytest.approx(1e-3, rel=1e-9)
    if epochs == 100:
        assert drops == [30 * per_epoch, 60 * per_epoch, 90 * per_epoch]


def test_settings_need_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from gn_det.classification.settings import Settings\n"
        "print(Settings('resnet18', 'BN', 'shapes', 'out').side)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "32", done.stderr


@pytest.mark.parametrize(("norm", "good"), [("GN", True), ("LN", True), ("BN", False)])
def test_a_batch_of_one_has_no_batch_statistics(norm: str, good: bool) -> None:
    """GN and LN take them of the image."""
    settings = {"arch": "resnet8", "norm": norm, "data": "digits", "output": "o", "batch_size": 1}
    if norm == "GN":
        settings["groups"] = 4
    if good:
        assert Settings(**settings).batch_size == 1
    else:
        with pytest.raises(ConfigError, match="batch_size is 1, but BN needs"):
            Settings(**settings)
