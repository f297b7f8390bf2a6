"""Percentiles of a layer over training: the values of that layer, and a training that they do not change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gn_det.checkpoint.io import read_checkpoint, save_checkpoint
from gn_det.classification import Settings, pretrain
from gn_det.classification import recording as room
from gn_det.classification.network import build_classifier
from gn_det.classification.pretraining import dry_run
from gn_det.errors import ConfigError
from tests.classification.test_run import tiny, weights

NAMES = ("p1", "p20", "p80", "p99")


def test_percentiles_are_those_of_all_values_and_of_an_even_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    values = torch.randn(3, 7, 5, 5, generator=torch.Generator().manual_seed(0))
    assert room.percentiles(values) == pytest.approx(np.percentile(values.numpy(), (1, 20, 80, 99)), rel=1e-5)
    monkeypatch.setattr(room, "_VALUES", 100)  # every sixth of 525
    assert room.percentiles(values) == pytest.approx(np.percentile(values.flatten()[::6], (1, 20, 80, 99)), rel=1e-5)


@pytest.mark.parametrize("norm", ["GN", "none", "WN"])
def test_what_is_looked_at_comes_before_norm_and_relu(norm: str) -> None:
    """The plain convolution of its input: with negative values, and unlike what norm and ReLU make of it."""
    torch.manual_seed(0)
    given = Settings(arch="vgg16", norm=norm, data="cifar10", output="-")
    layer: Any = room.layer_of(build_classifier(given, 2).trunk, "conv2_1")
    nn.init.constant_(layer.bias, 0.3)
    recorder = room.Recorder(layer, [], total=100, per_epoch=10)
    layer.register_forward_hook(recorder._look)
    x = torch.randn(2, 64, 8, 8)
    assert layer(x).min() >= 0
    weight = layer.weight.detach().double()
    expected = torch.nn.functional.conv2d(x.double(), weight, layer.bias.detach().double(), padding=1)
    assert recorder._found == pytest.approx(np.percentile(expected.numpy(), (1, 20, 80, 99)), abs=1e-4)
    assert recorder._found[0] < 0


def test_a_recorded_run_trains_the_same_to_the_bit_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """5 steps an epoch, every second recorded from the first on; the checkpoint after epoch 2 keeps its points."""
    monkeypatch.setattr(room, "_LEAST_STEPS", 2)
    plain = pretrain(tiny(tmp_path / "plain"))
    recorded = pretrain(tiny(tmp_path / "recorded", record="res3.0.conv1"))
    ours, theirs = weights(tmp_path / "recorded"), weights(tmp_path / "plain")
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert plain["recorded"] == []
    assert [row["epoch"] for row in recorded["recorded"]] == [k / 5 for k in range(1, 21, 2)]
    assert all([row[n] for n in NAMES] == sorted(row[n] for n in NAMES) for row in recorded["recorded"])

    class Killed(Exception): ...

    def die(*args: Any) -> None:
        raise Killed

    given = tiny(tmp_path / "killed", record="res3.0.conv1")
    with monkeypatch.context() as patch:
        patch.setattr("gn_det.classification.pretraining.write_weights", die)
        with pytest.raises(Killed):
            pretrain(given)
    payload = read_checkpoint(tmp_path / "killed" / "last.ckpt")
    assert payload["done"]["recorded"] == recorded["recorded"]
    del payload["done"]["recorded"]  # written before there was recording
    save_checkpoint(tmp_path / "killed" / "last.ckpt", payload)
    assert pretrain(given, resume=True)["recorded"] == []


def test_unknown_layer_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    given = Settings(arch="vgg16", norm="BN", data="cifar10", output=str(tmp_path / "out"), record="conv5_4")
    for start in (pretrain, dry_run):
        with pytest.raises(ConfigError, match=r"classify record is 'conv5_4', but .* did you mean 'conv5_.'\?"):
            start(given)
    assert not (tmp_path / "out").exists()
