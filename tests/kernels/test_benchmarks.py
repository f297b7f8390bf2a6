"""benchmarks/group_norm.py and train_step.py run, with --quick, and their tables hold what they claim."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def run(script: str, output: Path, *arguments: str) -> dict[str, Any]:
    command = [sys.executable, str(FOLDER / script), "--quick", "--device", "cpu", "--output", str(output), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "no target is judged" in done.stdout
    result: dict[str, Any] = json.loads(output.read_text())
    assert result["quick"] and result["environment"]["fused"] == "reference formulas in plain torch"
    return result


def test_group_norm(tmp_path: Path) -> None:
    rows = run("group_norm.py", tmp_path / "a.json", "--dtypes", "float32,bfloat16", "--layouts", "channels_last")[
        "rows"
    ]
    assert {r["dtype"] for r in rows} == {"float32", "bfloat16"} and len(rows) == 6
    for row in rows:
        assert row["same_bits_10_runs"] and max(row["error_ulp"].values()) < (1.0 if row["dtype"] == "bfloat16" else 8)
        assert set(row["forward_us"]) == set(row["backward_us"]) >= {"fused", "frozen BN", "nn.GroupNorm"}
        median, low, high = row["forward_us"]["fused"]
        assert 0 < low <= median <= high


def test_train_step(tmp_path: Path) -> None:
    (row,) = run("train_step.py", tmp_path / "b.json", "--dtypes", "float32")["rows"]
    assert set(row["train_s"]) == {"bn*", "gn", "gn recompute", "gn torch"}
    assert all(0 < s < 2 for s in row["norm_share"].values())


def test_layers_are_the_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    """69 norms and the shapes of a real forward pass, on the meta device."""
    import torch

    monkeypatch.syspath_prepend(str(FOLDER))
    import group_norm

    from gn_det.modeling.fpn import FPN
    from gn_det.modeling.resnet import ResNet
    from gn_det.norm import GroupNorm

    layers = group_norm.layers(64, 96)
    assert sum(layer.count for layer in group_norm.layers()) == 69
    with torch.device("meta"):
        net = FPN(ResNet(norm="GN"), in_features=["res2", "res3", "res4", "res5"], out_channels=256, norm="GN")
        seen: list[tuple[int, ...]] = []
        for module in net.modules():
            if isinstance(module, GroupNorm):
                module.register_forward_pre_hook(lambda _m, inputs: seen.append(tuple(inputs[0].shape)))
        net(torch.zeros(1, 3, 64, 96))
    listed = [layer.shape for layer in layers if "head" not in layer.name for _ in range(layer.count)]
    assert sorted(listed) == sorted(seen)
