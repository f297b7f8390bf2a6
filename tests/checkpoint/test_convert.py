"""Conversion: names and container change, no bit of a tensor does; what a reader must know travels along."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from gn_det.about import __version__
from gn_det.checkpoint.convert import convert
from gn_det.checkpoint.io import save_checkpoint
from gn_det.checkpoint.meta import build_meta
from gn_det.checkpoint.open_weights import open_weights
from gn_det.checkpoint.preprocessing import CAFFE, TORCH
from gn_det.checkpoint.weights import load_weights
from gn_det.cli import main
from gn_det.errors import UserError, WeightsError
from tests.checkpoint import layouts
from tests.checkpoint.layouts import real_shapes, write_pickle
from tests.checkpoint.skeleton import backbone_shapes, caffe2_blobs, config, detector_shapes, module, random_state


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def tensors(path: Path) -> dict[str, torch.Tensor]:
    """Of any file, by the names in the file, read without our readers."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    loaded = torch.load(path, weights_only=True)
    return loaded.get("model", loaded.get("state_dict", loaded))


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a)


def torchvision_model(norm: str) -> nn.Module:
    """Names are those of torchvision and timm; few classes and narrow 3x3 convolutions keep the file small."""
    from torchvision.models import resnet50

    torch.manual_seed(0)
    return resnet50(norm_layer=partial(nn.GroupNorm, 8) if norm == "GN" else None, num_classes=10, width_per_group=8)


@pytest.mark.parametrize("norm", ["GN", "BN"])
def test_round_trips_are_bit_exact(tmp_path: Path, norm: str) -> None:
    """torchvision -> Detectron2 -> safetensors -> timm -> torchvision, each loadable by its own library."""
    model = torchvision_model(norm)
    start = tmp_path / "0.pth"
    torch.save(model.state_dict(), start)
    steps = [("1.pth", ""), ("2.safetensors", "safetensors"), ("3.safetensors", "timm"), ("4.pth", "torchvision")]
    path = start
    for name, to in steps:
        done = convert(path, tmp_path / name, to)
        assert done.path == tmp_path / name and done.tensors == len(model.state_dict()) and not done.left_out
        assert done.preprocessing == TORCH
        path = done.path
    assert same(tensors(path), dict(model.state_dict()))
    assert same(tensors(tmp_path / "1.pth"), tensors(tmp_path / "2.safetensors"))
    assert same(tensors(tmp_path / "3.safetensors"), tensors(path))
    torchvision_model(norm).load_state_dict(tensors(path), strict=True)
    weights = open_weights(path)
    assert weights.meta is not None
    provenance = weights.meta["provenance"]
    assert [step["source"] for step in provenance] == ["0.pth", "1.pth", "2.safetensors", "3.safetensors"]
    assert [step["sha256"] for step in provenance] == [sha256(tmp_path / step["source"]) for step in provenance]
    assert sorted(os.listdir(tmp_path)) == ["0.pth", "1.pth", "2.safetensors", "3.safetensors", "4.pth"]


def test_safetensors_are_the_same_bytes_each_time(tmp_path: Path) -> None:
    torch.save(torchvision_model("GN").state_dict(), tmp_path / "a.pth")
    for name in ("b.safetensors", "c.safetensors"):
        convert(tmp_path / "a.pth", tmp_path / name)
    assert sha256(tmp_path / "b.safetensors") == sha256(tmp_path / "c.safetensors")


def test_timm_takes_what_we_write(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm", reason="timm is the reference of this test (pip install .[test])")
    blobs = layouts.arrays(layouts.caffe2_backbone(), real_shapes("gn_fpn.yaml"), "backbone.bottom_up.")
    blobs |= {"pred_w": np.ones((1000, 2048), np.float32), "pred_b": np.zeros(1000, np.float32)}
    write_pickle(tmp_path / "R-50-GN.pkl", blobs)
    convert(tmp_path / "R-50-GN.pkl", tmp_path / "r50.safetensors", "timm", fold_stem=True)
    model = timm.create_model("resnet50_gn", checkpoint_path=str(tmp_path / "r50.safetensors"))
    assert np.array_equal(model.layer3[5].bn2.bias.detach().numpy(), blobs["res4_5_branch2b_gn_b"])
    # Folded: timm's user feeds RGB / 255 with ImageNet's mean and std.
    pixels = torch.rand(1, 3, 40, 40) * 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (TORCH.pixel_mean, TORCH.pixel_std))
    with torch.inference_mode():
        theirs = model.conv1((pixels - mean) / std)
        ours = nn.functional.conv2d((pixels - mean).flip(1), torch.from_numpy(blobs["conv1_w"]), stride=2, padding=3)
    assert float((theirs - ours).abs().max()) <= 1e-5 * float(ours.abs().max())


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_preprocessing_travels(tmp_path: Path, suffix: str) -> None:
    """A converted file loads as its source would: folded where that was folded, refused where that was refused."""
    model_cfg = config("GN")
    shapes = {n: s for n, s in backbone_shapes(50, "GN").items()}
    pairs = layouts.layered_backbone(50, "bn")
    torch.save({theirs: random_state(shapes)[ours] for theirs, ours in pairs}, tmp_path / "tv.pth")
    write_pickle(tmp_path / "c2.pkl", caffe2_blobs(50, "gn", shapes))
    for name in ("tv.pth", "c2.pkl"):
        converted = tmp_path / f"{name}.{suffix}"
        convert(tmp_path / name, converted)
        a, b = module(detector_shapes()), module(detector_shapes())
        load_weights(a, tmp_path / name, model_cfg)
        load_weights(b, converted, model_cfg)
        assert same(a.state_dict(), b.state_dict())
        assert open_weights(converted).foldable == (name == "tv.pth")
        with pytest.raises(WeightsError, match="STRIDE_IN_1X1 False"):
            load_weights(b, converted, config("GN", MODEL__RESNETS__STRIDE_IN_1X1=True))
    with pytest.raises(WeightsError, match=r"INPUT\.FORMAT BGR"):
        load_weights(b, tmp_path / f"c2.pkl.{suffix}", config("GN", INPUT__FORMAT="RGB"))


def test_folding_on_request(tmp_path: Path) -> None:
    """--fold makes a Detectron2 file for BGR 0-255; folding back gives the source within one rounding each."""
    model = torchvision_model("GN")
    torch.save(model.state_dict(), tmp_path / "tv.pth")
    done = convert(tmp_path / "tv.pth", tmp_path / "d2.pth", fold_stem=True)
    assert done.preprocessing == CAFFE
    expected = model.state_dict()["conv1.weight"].flip(1) / torch.tensor([57.375, 57.12, 58.395]).view(1, 3, 1, 1)
    folded = tensors(tmp_path / "d2.pth")["stem.conv1.weight"]
    torch.testing.assert_close(folded, expected, rtol=1e-6, atol=0)
    back = convert(tmp_path / "d2.pth", tmp_path / "back.pth", "torchvision", fold_stem=True)
    assert back.preprocessing == TORCH
    torch.testing.assert_close(
        tensors(back.path)["conv1.weight"], model.state_dict()["conv1.weight"], rtol=2e-7, atol=0
    )


def own_checkpoint(path: Path, classes: int = 3) -> Path:
    cfg = config("GN", classes=classes)
    meta = build_meta(cfg, ["ä", "b", "c"], [7, 8, 11], iteration=42, best_metric=31.5)
    save_checkpoint(path, {"model": random_state(detector_shapes(classes=classes)), "iteration": 42, "gn_det": meta})
    return path


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_our_checkpoints_keep_classes_and_config(tmp_path: Path, suffix: str) -> None:
    source = own_checkpoint(tmp_path / "model_best.pth")
    target = tmp_path / f"out.{suffix}"
    done = convert(source, target)
    assert same(tensors(target), tensors(source)) and not done.left_out
    before, after = open_weights(source), open_weights(target)
    assert before.meta is not None and after.meta is not None
    for key in ("class_names", "category_ids", "config", "iteration", "best_metric"):
        assert after.meta[key] == before.meta[key], key
    assert after.meta["class_names"] == ("ä", "b", "c") and after.groups == (32, 0)
    model = module(detector_shapes())
    load_weights(model, target, config("GN"), require_all=True)
    assert same(model.state_dict(), tensors(source))


def test_a_folded_file_carries_no_stored_config(tmp_path: Path) -> None:
    """The config of the source names a preprocessing that the folded weights no longer expect; its classes stay."""
    meta = build_meta(config("GN"), ["ä", "b", "c"], [7, 8, 11])
    needs = {"format": TORCH.format, "pixel_mean": TORCH.pixel_mean, "pixel_std": TORCH.pixel_std}
    block = {**meta, "weights": {"preprocessing": {**asdict(TORCH), **needs}, "foldable": True}}
    save_checkpoint(tmp_path / "m.pth", {"model": random_state(detector_shapes()), "gn_det": block})
    convert(tmp_path / "m.pth", tmp_path / "folded.pth", fold_stem=True)
    convert(tmp_path / "m.pth", tmp_path / "whole.pth")
    before, folded, whole = (open_weights(tmp_path / name).meta for name in ("m.pth", "folded.pth", "whole.pth"))
    assert before is not None and folded is not None and whole is not None
    assert folded["config"] == "" and whole["config"] == before["config"] != ""
    assert folded["class_names"] == ("ä", "b", "c")


def test_only_the_backbone_goes_to_torchvision(tmp_path: Path) -> None:
    done = convert(own_checkpoint(tmp_path / "m.pth"), tmp_path / "r50.pth", "torchvision")
    assert done.tensors == 159 and "proposal_generator.rpn_head.conv.weight" in done.left_out
    state, original = tensors(tmp_path / "r50.pth"), tensors(tmp_path / "m.pth")
    assert torch.equal(state["layer4.2.bn3.bias"], original["backbone.bottom_up.res5.2.conv3.norm.bias"])
    weights = open_weights(tmp_path / "r50.pth")
    assert weights.meta is not None and weights.meta["config"] == "" and weights.class_names == ("ä", "b", "c")
    assert weights.preprocessing is not None and weights.preprocessing.format == "BGR" and weights.norm == "GN"


@pytest.mark.parametrize(
    ("target", "to", "fold", "expected"),
    [
        ("x.pkl", "", False, "name the new file .pth or .pt or .bin or .safetensors"),
        ("x.pth", "safetensors", False, "name the new file .safetensors"),
        ("x.pth", "onnx", False, "one of detectron2, safetensors, torchvision, timm"),
        ("x.pth", "timm", False, "has its stride in the 1x1 convolutions"),
        ("source.pth", "", False, "would overwrite its source"),
        ("folder/x.pth", "", False, "cannot be written"),
    ],
)
def test_refusals(tmp_path: Path, target: str, to: str, fold: bool, expected: str) -> None:
    write_pickle(tmp_path / "source.pth", caffe2_blobs(50, "affine", backbone_shapes(50, "FrozenBN")))
    (tmp_path / "folder").write_text("in the way")
    with pytest.raises(UserError) as caught:
        convert(tmp_path / "source.pth", tmp_path / target, to, fold_stem=fold)
    assert expected in str(caught.value) and "\n" not in str(caught.value)
    assert sorted(os.listdir(tmp_path)) == ["folder", "source.pth"]


def test_what_cannot_be_folded_or_is_no_resnet(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(2)}, tmp_path / "a.pth")
    with pytest.raises(WeightsError, match="has no ResNet of stem"):
        convert(tmp_path / "a.pth", tmp_path / "b.pth", "timm")
    with pytest.raises(WeightsError, match="nothing can be folded"):
        convert(tmp_path / "a.pth", tmp_path / "b.pth", fold_stem=True)
    blobs = caffe2_blobs(50, "gn", backbone_shapes()) | {"rpn_cls_logits_fpn2_b": np.ones(3, np.float32)}
    write_pickle(tmp_path / "d.pkl", {"blobs": blobs})
    with pytest.raises(WeightsError, match="a mean cannot be folded exactly"):
        convert(tmp_path / "d.pkl", tmp_path / "b.pth", fold_stem=True)
    assert not (tmp_path / "b.pth").exists()


def test_folded_batch_norm_becomes_an_identity_one_for_torchvision(tmp_path: Path) -> None:
    shapes = backbone_shapes(50, "FrozenBN", groups=2)  # grouped: strides in the 3x3
    write_pickle(tmp_path / "x.pkl", caffe2_blobs(50, "affine", shapes))
    convert(tmp_path / "x.pkl", tmp_path / "x.pth", "torchvision")
    state = tensors(tmp_path / "x.pth")
    assert bool((state["layer2.0.bn1.running_mean"] == 0).all()) and bool((state["bn1.running_var"] == 1).all())


# ------------------------------------------------------------------------------------------------------- command line


def test_weights_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = own_checkpoint(tmp_path / "m.pth")
    assert main(["weights", str(path)]) == 0
    out = capsys.readouterr().out
    for part in (
        f"sha256 {sha256(path)}",
        f"gn_det {__version__}, ResNet-50, GN",
        "stem 3, res2 30, res3 39, res4 57, res5 30, fpn 24, rpn 4, box head 9, mask head 5",
        "3: ä, b, c",
        "an FPN detector",
        "BGR, mean [103.53,116.28,123.675], std [1,1,1] (of 0-255); stride in the 3x3",
        "MODEL.RESNETS.DEPTH 50 MODEL.RESNETS.NORM GN INPUT.FORMAT BGR MODEL.PIXEL_MEAN [103.53,116.28,123.675]",
        "MODEL.RESNETS.STRIDE_IN_1X1 False MODEL.GN.NUM_GROUPS 32 MODEL.GN.CHANNELS_PER_GROUP 0",
    ):
        assert part in out, part


def test_the_keys_that_the_weights_command_names_make_them_load(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(torchvision_model("GN").state_dict(), tmp_path / "tv.pth")
    arguments = ["weights", str(tmp_path / "tv.pth"), "--config", "bn_fpn.yaml", "MODEL.RESNETS.WIDTH_PER_GROUP", "8"]
    arguments += ["MODEL.GN.NUM_GROUPS", "8"]
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert "set MODEL.RESNETS.NORM 'GN'" in captured.err and captured.err.count("\n") == 1
    keys = next(line for line in captured.out.splitlines() if line.startswith("  config keys")).split()[2:]
    assert main([*arguments, *keys]) == 0
    out = capsys.readouterr().out
    assert re.search(r"res5 +30/30", out) and "folded into the stem convolution" in out


def test_the_weights_command_names_the_norm_of_weights_without_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The default is not that of this file."""
    torch.save({"model": random_state(detector_shapes(50, ""))}, tmp_path / "d2.pth")
    assert main(["weights", str(tmp_path / "d2.pth")]) == 0
    keys = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  config keys")).split()[2:]
    assert keys[:4] == ["MODEL.RESNETS.DEPTH", "50", "MODEL.RESNETS.NORM", "''"]
    cfg = config("GN")
    cfg.merge_from_list(keys[:4])
    assert cfg.MODEL.RESNETS.NORM == ""


def test_weights_command_of_a_file_that_does_not_tell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shapes = backbone_shapes()
    pairs = layouts.layered_backbone(50, "gn")
    torch.save({theirs: random_state(shapes)[ours] for theirs, ours in pairs}, tmp_path / "mm.pth")
    assert main(["weights", str(tmp_path / "mm.pth")]) == 0
    assert "append ?preprocessing=caffe or ?preprocessing=torch to the name" in capsys.readouterr().out
    assert main(["weights", f"{tmp_path}/mm.pth?preprocessing=caffe"]) == 0
    assert "BGR, mean [103.53,116.28,123.675]" in capsys.readouterr().out


def test_convert_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = own_checkpoint(tmp_path / "m.pth")
    assert main(["convert", str(source), str(tmp_path / "out.safetensors"), "--to", "timm"]) == 0
    out = capsys.readouterr().out
    assert "out.safetensors: 159 tensors of" in out and "left out: " in out and "expects BGR" in out
    assert main(["convert", str(tmp_path / "none.pth"), str(tmp_path / "out.pth")]) == 2
    assert "no such file" in capsys.readouterr().err


def test_options_behind_a_name(tmp_path: Path) -> None:
    shapes: dict[str, Any] = detector_shapes()
    lost = {n: s for n, s in shapes.items() if n != "backbone.bottom_up.res3.1.conv2.weight"}
    save_checkpoint(tmp_path / "m.pth", {"model": random_state(lost)})
    with pytest.raises(WeightsError, match="res3: not in the file"):
        load_weights(module(shapes), tmp_path / "m.pth", config())
    report = load_weights(module(shapes), f"{tmp_path}/m.pth?allow_partial=True", config())
    assert report.missing == ["backbone.bottom_up.res3.1.conv2.weight"] and report.source == f"{tmp_path}/m.pth"
    load_weights(module(shapes), f"{tmp_path}/m.pth?matching_heuristics=True&allow_partial=True", config())
    with pytest.raises(WeightsError, match="allow_partial must be True or False"):
        load_weights(module(shapes), f"{tmp_path}/m.pth?allow_partial=yes", config())
    save_checkpoint(tmp_path / "odd?name=1.pth", {"model": random_state(shapes)})
    load_weights(module(shapes), tmp_path / "odd?name=1.pth", config())


def test_allow_partial_reaches_the_config() -> None:
    from gn_det.cli import parse
    from gn_det.cli.flags import config_from_args

    words = ["--config", "gn_fpn.yaml", "--weights", "a.pth", "--allow-partial"]
    cfg = config_from_args(parse("train", words)[1])
    assert cfg.MODEL.WEIGHTS == "a.pth?allow_partial=True"
    scratch = config_from_args(parse("train", [*words[:2], "--weights", "", words[-1]])[1])
    assert scratch.MODEL.WEIGHTS == ""


def test_overwrite_spares_the_initial_weights_whatever_stands_behind_their_name(tmp_path: Path) -> None:
    from gn_det.engine.output import start_afresh

    for name in ("model_best.pth", "model_final.pth"):
        save_checkpoint(tmp_path / name, {"model": {"a": torch.ones(1)}})
    start_afresh(tmp_path, keep=f"{tmp_path}/model_best.pth?allow_partial=True")
    assert os.listdir(tmp_path) == ["model_best.pth"]
