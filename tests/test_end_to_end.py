"""Train, resume, evaluate and predict through the command line, on a generated set and a toy model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image

import gn_det
from gn_det.checkpoint.io import read_checkpoint
from gn_det.cli import main
from gn_det.cli.outcome import draw_comparison
from gn_det.config import load_config
from gn_det.data.sets import load_first_test_set
from gn_det.data.shapes import make_shapes
from gn_det.errors import DataError
from gn_det.prediction.images import PREDICTIONS_FILE, load_predictor

TOY = [
    *("MODEL.FPN.OUT_CHANNELS", "32", "MODEL.ROI_BOX_HEAD.CONV_DIM", "32", "MODEL.ROI_BOX_HEAD.FC_DIM", "32"),
    *("MODEL.ROI_MASK_HEAD.CONV_DIM", "32", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "16"),
    *("INPUT.MIN_SIZE_TRAIN", "96", "INPUT.MIN_SIZE_TEST", "96", "SOLVER.IMS_PER_BATCH", "2"),
    *("DATALOADER.NUM_WORKERS", "0", "SOLVER.WARMUP_ITERS", "1", "SOLVER.CHECKPOINT_PERIOD", "2"),
    *("MODEL.DEVICE", "cpu", "SEED", "3", "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0"),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("shapes")
    make_shapes(root, "train", 8)
    make_shapes(root, "val", 4)
    return root


def flags(data: Path, output: Path) -> list[str]:
    words = ["--engine", "embedded", "--config", "quickstart.yaml", "--output", str(output)]
    for split in ("train", "val"):
        words += [f"--{split}-json", str(data / split / "instances.json")]
        words += [f"--{split}-images", str(data / split / "images")]
    return words


@pytest.fixture(scope="module")
def trained(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("run")
    assert main(["train", *flags(data, output), *TOY, "SOLVER.MAX_ITER", "4", "TEST.EVAL_PERIOD", "2"]) == 0
    return output


def test_a_run_leaves_what_the_readme_names(trained: Path) -> None:
    names = {p.name for p in trained.iterdir()}
    assert {"model_best.pth", "model_final.pth", "last_checkpoint", "metrics.json"} <= names
    for drawing in ("curves.png", "predictions.png"):
        assert np.asarray(Image.open(trained / drawing)).std() > 1
    last = json.loads((trained / "metrics.json").read_text().splitlines()[-1])
    assert {"iteration", "bbox/AP", "segm/AP", "bbox/AP50", "segm/APs"} <= set(last)


def test_python_trains_and_evaluates_like_the_command_line(trained: Path, data: Path, tmp_path: Path) -> None:
    """Same keys, same bits; a hook of the caller sees every iteration; the checkpoint evaluates to the same AP."""

    class Count(gn_det.Hook):
        seen: ClassVar[list[int]] = []

        def after_step(self, loop: Any) -> None:
            self.seen.append(loop.state.iteration)

    overrides = dict(zip(TOY[::2], TOY[1::2])) | {
        "SOLVER.MAX_ITER": 4,
        "TEST.EVAL_PERIOD": 2,
        "OUTPUT_DIR": tmp_path / "a",
    }
    for split in ("train", "val"):
        overrides[f"DATASETS.{split.upper()}_JSON"] = data / split / "instances.json"
        overrides[f"DATASETS.{split.upper()}_IMAGES"] = data / split / "images"
    metrics = gn_det.train("quickstart.yaml", overrides, engine="embedded", hooks=[Count()])
    assert Count.seen == [0, 1, 2, 3]
    ours, theirs = (read_checkpoint(folder / "model_final.pth")["model"] for folder in (tmp_path / "a", trained))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    val = {key: value for key, value in overrides.items() if key.startswith("DATASETS.VAL")}
    again = gn_det.evaluate(
        weights=tmp_path / "a" / "model_final.pth", overrides={**val, "OUTPUT_DIR": tmp_path / "b"}, engine="embedded"
    )
    assert again == metrics and "segm/AP" in again


def test_checkpoint_is_plain_data_and_carries_the_classes(trained: Path) -> None:
    payload = torch.load(trained / "model_final.pth", weights_only=True)
    assert set(payload) >= {"model", "gn_det"}
    scores = payload["model"]["roi_heads.box_predictor.cls_score.bias"]
    assert len(payload["gn_det"]["class_names"]) == scores.numel() - 1
    assert "backbone.bottom_up.stem.conv1.norm.weight" in payload["model"]


def test_eval_gives_the_ap_of_the_run(trained: Path, data: Path, tmp_path: Path) -> None:
    val = ["--val-json", str(data / "val" / "instances.json"), "--val-images", str(data / "val" / "images")]
    weights = str(trained / "model_final.pth")
    command = ["eval", "--engine", "embedded", "--weights", weights, "--output", str(tmp_path / "eval"), *val]
    assert main(command) == 0
    results = json.loads((tmp_path / "eval" / "inference" / "coco_instances_results.json").read_text())
    again = json.loads((trained / "inference" / "coco_instances_results.json").read_text())
    assert results == again and len(results) > 0


def test_resume_after_a_longer_max_iter_goes_on(trained: Path, data: Path) -> None:
    """Without --resume a finished run is not overwritten; with it, training goes on from the last iteration."""
    before = read_checkpoint(trained / "model_final.pth")["iteration"]
    longer = [*flags(data, trained), *TOY, "SOLVER.MAX_ITER", "6"]
    assert main(["train", *longer]) == 2
    assert main(["train", *longer, "--resume"]) == 0
    assert read_checkpoint(trained / "model_final.pth")["iteration"] == before + 2


def test_predict_draws_and_writes_json(trained: Path, data: Path, tmp_path: Path) -> None:
    weights, images = str(trained / "model_best.pth"), str(data / "val" / "images")
    words = ["predict", "--weights", weights, images, "--output", str(tmp_path / "drawn"), "--threshold", "0.0"]
    assert main(words) == 0
    document = json.loads((tmp_path / "drawn" / PREDICTIONS_FILE).read_text())
    assert len(document["images"]) == 4 and document["annotations"]
    assert len(list((tmp_path / "drawn").glob("*.png"))) == 4


def test_weights_of_another_architecture_are_refused(
    trained: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", *flags(data, tmp_path / "other"), *TOY, "MODEL.WEIGHTS", str(trained / "model_best.pth")]
    assert main([*words, "MODEL.RESNETS.DEPTH", "34"]) == 2
    assert "MODEL.RESNETS.DEPTH" in capsys.readouterr().err


def test_wrong_number_of_classes_is_refused_before_training(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *flags(data, tmp_path / "run"), *TOY, "MODEL.ROI_HEADS.NUM_CLASSES", "3"]) == 2
    assert "NUM_CLASSES" in capsys.readouterr().err


def test_dry_run_needs_neither_data_nor_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """53 backbone + 8 FPN + 4 box + 4 mask GN layers, all gamma and beta without weight decay, 270000 iterations."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "nothing"))
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--engine", "embedded", "--config", "gn_fpn_long.yaml", "--dry-run"]) == 0
    out = capsys.readouterr().out
    for word in ("53", "138", "270000", "weight decay 0", "FREEZE_AT"):
        assert word in out, word
    assert list(tmp_path.iterdir()) == []


def test_sixteen_bit_gray_in_one_channel(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """INPUT.FORMAT L and INPUT.BIT_DEPTH are part of the checkpoint: train, evaluate and predict read alike."""
    folder, output = tmp_path / "data", tmp_path / "run"
    shutil.copytree(data, folder)
    for path in folder.glob("*/images/*"):
        gray = np.asarray(Image.open(path).convert("L")).astype(np.uint16) * 16
        Image.fromarray(gray).save(path, "PNG")
    gray_keys = ["INPUT.FORMAT", "L", "MODEL.PIXEL_MEAN", "[103.53]", "MODEL.PIXEL_STD", "[1.0]"]
    words = ["train", *flags(folder, output), *TOY, *gray_keys, "SOLVER.MAX_ITER", "1"]
    assert main(words) == 2
    assert "(mode I;16) with values from" in capsys.readouterr().err and not (output / "model_final.pth").exists()
    assert main([*words, "INPUT.BIT_DEPTH", "0,4080", "TEST.MAX_DETS", "300"]) == 0
    weights = output / "model_final.pth"
    assert read_checkpoint(weights)["model"]["backbone.bottom_up.stem.conv1.weight"].shape[1] == 1
    val = ["--val-json", str(folder / "val" / "instances.json"), "--val-images", str(folder / "val" / "images")]
    assert main(["eval", "--weights", str(weights), *val, "--output", str(tmp_path / "eval"), "--device", "cpu"]) == 0
    assert main(["predict", "--weights", str(weights), str(folder / "val"), "--output", str(tmp_path / "found"),
                 "--device", "cpu"]) == 0  # fmt: skip
    # pictures of results: quickstart's and those of a comparison read the set in the same way
    cfg = load_config(str(output / "config.yaml"))
    draw_comparison(load_first_test_set(cfg), weights, tmp_path / "predictions.png")
    assert np.asarray(Image.open(tmp_path / "predictions.png")).std() > 1
    # the same picture in 8 bits, from a file and from memory
    predictor = load_predictor(weights, device="cpu")
    path = next((folder / "val" / "images").iterdir())
    small = (np.asarray(Image.open(path)) // 16).astype(np.uint8)
    Image.fromarray(small).save(tmp_path / "small.png")
    found = [predictor.detect(p) for p in (path, tmp_path / "small.png", np.repeat(small[:, :, None], 3, axis=2))]
    assert len(found[0]) and all(torch.equal(f.scores, found[0].scores) for f in found)
    with pytest.raises(DataError, match=r"must be an \(H, W, 3\) uint8 array in RGB order"):
        predictor.detect(small)


def test_one_channel_needs_one_mean_and_its_own_weights(
    data: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["train", *flags(data, tmp_path / "run"), *TOY, "INPUT.FORMAT", "L"]
    assert main(words) == 2
    assert "MODEL.PIXEL_MEAN must have one number" in capsys.readouterr().err
    keys = ["MODEL.PIXEL_MEAN", "[103.53]", "MODEL.PIXEL_STD", "[1.0]", "--weights", str(trained / "model_final.pth")]
    assert main([*words[:-2], *keys[-2:], "INPUT.FORMAT", "L", *keys[:-2]]) == 2
    told = capsys.readouterr().err
    assert "INPUT.FORMAT is L" in told and "need: INPUT.FORMAT BGR MODEL.PIXEL_MEAN [103.53,116.28,123.675]" in told
