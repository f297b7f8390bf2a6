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
    assert result["quick"] and result["environment"]["fused"] == "native.cpp or plain torch"
    return result


@pytest.mark.slow
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


@pytest.mark.slow
def test_train_step(tmp_path: Path) -> None:
    (row,) = run("train_step.py", tmp_path / "b.json", "--dtypes", "float32")["rows"]
    assert set(row["train_s"]) == {"bn*", "gn", "gn recompute", "gn torch"}
    assert all(0 < s < 2 for s in row["norm_share"].values())


def test_pictures(tmp_path: Path) -> None:
    """Drawn from results; what a CPU or --quick made is refused, and so is another benchmark's file."""
    environment = {"device": "a GPU", "torch": "2.15", "cuda": "13.2", "date": "2026-11-21"}
    times = {way: [2.0, 1.0, 3.0] for way in ("fused", "frozen BN", "nn.GroupNorm")}
    norm = {"name": "stem", "count": 1, "shape": [1, 64, 8, 8], "dtype": "bfloat16", "layout": "nchw"}
    sides = {side: [0.1, 0.1, 0.1] for side in ("bn*", "gn", "gn recompute", "gn torch")}
    step = {"model": "fpn", "dtype": "bfloat16", "batch": 2, "train_s": sides, "inference_s": sides}
    files = {"group_norm": norm | {"forward_us": times, "backward_us": times}}
    files["train_step"] = step | {"peak_gb": dict.fromkeys(sides, 3.5)}

    def draw(**changes: str | None) -> subprocess.CompletedProcess[str]:
        paths = []
        for name, row in files.items():
            paths.append(tmp_path / f"{name}.json")
            paths[-1].write_text(json.dumps({"environment": environment | changes, "quick": False, "rows": [row]}))
        command = [sys.executable, str(FOLDER / "pictures.py"), *map(str, paths), "--output", str(tmp_path)]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    refused = draw(cuda=None)
    assert refused.returncode == 1 and "without a GPU" in refused.stderr and not (tmp_path / "train_step.png").exists()
    done = draw()
    assert done.returncode == 0, done.stderr
    assert all((tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG" for name in files)
    files["group_norm"] = files["train_step"]
    assert "is not a result of benchmarks/group_norm.py" in draw().stderr


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


@pytest.mark.parametrize(("config", "levels"), [("gn_fpn.yaml", 5), ("gn_c4.yaml", 1)])
def test_host_waits_where_it_must(config: str, levels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms, convolutions and losses wait for nothing; proposals, sampling and polygons do, so many times.

    The host must wait where it needs a number or the size of a result: NMS, the sampled indices, the boxes of each
    level, the masks of chosen objects. It needs neither to mark boxes, so nothing is indexed by a boolean tensor, which
    some versions of torch turn into a search for the true ones: not even with BOUNDARY_THRESH, which marks anchors.
    """
    monkeypatch.syspath_prepend(str(FOLDER))
    import syncs
    from engine import load_cfg, make_steps

    small = [*syncs.SMALL, "MODEL.RESNETS.RES2_OUT_CHANNELS", "32", "MODEL.RESNETS.STEM_OUT_CHANNELS", "32"]
    cfg = load_cfg(config, [*small, "MODEL.RPN.BOUNDARY_THRESH", "0"])
    places = syncs.of_the_model(syncs.waits(make_steps("embedded", cfg, (96, 96), 2)["training step"]))
    files: dict[str, int] = {}
    for (_, place), count in places.items():
        name = place.split("/")[1].split(":")[0]
        files[name] = files.get(name, 0) + count
    # Two images. RPN: whether all proposals are good (two more if not), NMS (torchvision's loops over levels when there
    # are many boxes), the sample. Matcher: foreground and background of anchors and RoIs.
    assert not [place for name, place in places if name == "index by a boolean tensor"]
    assert set(files) <= {"rpn.py", "matcher.py", "poolers.py", "heads.py", "structures.py"}
    assert files["rpn.py"] <= 2 * (3 + 1 + 2 * levels + 2) + 1
    assert files["matcher.py"] == 8 and files["heads.py"] == 1 and files["structures.py"] <= 2
    assert files.get("poolers.py", 0) <= 4


@pytest.mark.slow
@pytest.mark.parametrize("config", ["gn_fpn.yaml", "gn_c4.yaml"])
@pytest.mark.parametrize("fused", ["on", "auto"])
def test_compiled_parts_give_the_same_losses(config: str, fused: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """--compile: whole graphs without breaks, for two image sizes; same losses and gradients (1e-5).

    "auto" stands for a device on which the kernels were found to be better: the fused operator is in the graph (on a
    CPU in its plain form); "on" is a machine that has no kernels and says so.
    """
    import torch

    from gn_det.kernels import dispatch, launch

    if fused == "auto":
        monkeypatch.setattr(dispatch, "MEASURED_BETTER", frozenset({("cpu", torch.float32)}))
        monkeypatch.setattr(launch, "can_launch_on", lambda kind, dtype: True)
        monkeypatch.setattr(launch, "can_launch", lambda x: False)  # the operator itself launches nothing

    monkeypatch.syspath_prepend(str(FOLDER))
    import syncs
    from engine import load_cfg, make_batch
    from train_step import compile_parts

    from gn_det.modeling import build_model

    small = ["MODEL.RESNETS.RES2_OUT_CHANNELS", "32", "MODEL.RESNETS.STEM_OUT_CHANNELS", "32"]
    cfg = load_cfg(config, [*syncs.SMALL, *small, "MODEL.GN.FUSED", fused])
    torch.manual_seed(0)
    net = build_model(cfg)
    batches = [make_batch("embedded", size, 1, 80) for size in ((96, 96), (64, 128))]

    def step(samples: list[dict[str, Any]]) -> list[torch.Tensor]:
        torch.manual_seed(1)
        net.zero_grad()
        losses = net(samples)
        torch.stack(list(losses.values())).sum().backward()
        gradient = net.backbone.get_parameter(
            next(n for n, p in net.backbone.named_parameters() if p.requires_grad)
        ).grad
        assert gradient is not None
        return [torch.stack(list(losses.values())).detach(), gradient.clone()]

    eager = [step(b) for b in batches]
    compile_parts(net, backend="aot_eager")
    for samples, expected in zip(batches, eager):
        for made, wanted in zip(step(samples), expected):
            assert torch.allclose(made, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))
