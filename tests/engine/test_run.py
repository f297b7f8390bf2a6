"""The engine on real parts: dry run without data, training and evaluation of a tiny detector on shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gn_det.config import load_config
from gn_det.engine import run as engine
from gn_det.engine.engines import Engine
from gn_det.errors import ConfigError, DataError, TrainingError, WeightsError

SMALL = [
    "MODEL.DEVICE", "cpu", "MODEL.FPN.OUT_CHANNELS", "32", "MODEL.ROI_BOX_HEAD.NUM_CONV", "1",
    "MODEL.ROI_BOX_HEAD.CONV_DIM", "32", "MODEL.ROI_BOX_HEAD.FC_DIM", "32", "MODEL.ROI_MASK_HEAD.CONV_DIM", "32",
    "MODEL.ROI_MASK_HEAD.NUM_CONV", "1", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "16", "MODEL.RPN.PRE_NMS_TOPK_TRAIN",
    "50", "MODEL.RPN.POST_NMS_TOPK_TRAIN", "30", "MODEL.RPN.PRE_NMS_TOPK_TEST", "30", "MODEL.RPN.POST_NMS_TOPK_TEST",
    "10", "INPUT.MIN_SIZE_TRAIN", "(64,)", "INPUT.MIN_SIZE_TEST", "64", "INPUT.MAX_SIZE_TRAIN", "96",
    "INPUT.MAX_SIZE_TEST", "96", "DATALOADER.NUM_WORKERS", "0", "SOLVER.IMS_PER_BATCH", "2", "TEST.EVAL_PERIOD", "0",
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST", "0.0", "TEST.DETECTIONS_PER_IMAGE", "5",
]  # fmt: skip


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    from gn_det.data.shapes import make_shapes

    root = tmp_path_factory.mktemp("shapes")
    keys = []
    for split, short in (("train", "TRAIN"), ("val", "VAL")):
        source = make_shapes(root, split, num_images=8)
        keys += [f"DATASETS.{short}_JSON", source.json_file, f"DATASETS.{short}_IMAGES", source.image_root]
    return keys


def small(shapes: list[str], folder: Path, *more: str) -> Any:
    return load_config("quickstart.yaml", [*SMALL, *shapes, "OUTPUT_DIR", str(folder), *more])


def test_dry_run_of_the_papers_long_schedule(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither data nor weights are there; the schedule is shown as written and as it would run here."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "nowhere"))
    monkeypatch.chdir(tmp_path)
    engine.dry_run(load_config("gn_fpn_long.yaml"), Engine())
    text = capsys.readouterr().out
    assert "270000 iterations" in text and "epochs" in text
    assert "118287 images assumed for coco_2017_train" in text
    assert "138 gamma/beta tensors: 116 trained with weight decay 0, 22 frozen by MODEL.BACKBONE.FREEZE_AT" in text
    assert "running on 1" in text and "0.02 -> 0.0025" in text
    assert list(tmp_path.iterdir()) == []


def test_dry_run_reads_the_json_as_the_run_would(shapes: list[str], tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(DataError, match=r"list\.json: holds a list"):
        engine.dry_run(small(shapes, tmp_path / "out", "DATASETS.TRAIN_JSON", str(tmp_path / "list.json")), Engine())
    assert not (tmp_path / "out").exists()


def test_train_resume_evaluate(shapes: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run of 4 iterations equals one of 2 that is resumed with MAX_ITER 4, to the bit, on the real model and data."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    constant = ["SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR", "SOLVER.WARMUP_ITERS", "0"]
    engine.train(small(shapes, whole, "SOLVER.MAX_ITER", "4", *constant))
    engine.train(small(shapes, cut, "SOLVER.MAX_ITER", "2", *constant))
    results = engine.train(small(shapes, cut, "SOLVER.MAX_ITER", "4", *constant), resume=True)
    a, b = (torch.load(f / "model_final.pth", weights_only=True) for f in (whole, cut))
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    assert a["gn_det"]["class_names"] == ["circle", "square", "triangle", "star", "ring"]
    assert {"bbox/AP", "segm/AP", "segm/AP-circle"} <= results.keys()
    last = json.loads((whole / "metrics.json").read_text().splitlines()[-1])
    assert "bbox/AP" in last and "segm/AP" in last
    for name in ("config.yaml", "log.txt", "last_checkpoint", "inference/coco_instances_results.json"):
        assert (whole / name).is_file()
    assert "Seed 1." in capsys.readouterr().out
    text = (whole / "log.txt").read_text()
    assert "Seed 1." in text and "gamma/beta" in text and "copypaste" in text
    weights, page = whole / "model_final.pth", tmp_path / "page.html"
    cfg = small(shapes, tmp_path / "eval", "MODEL.WEIGHTS", str(weights))
    again = engine.evaluate(cfg, html=page, save_thresholds=True)
    for name, value in results.items():
        assert again[name] == value or value != value
    assert json.loads((tmp_path / "eval" / "inference" / "metrics.json").read_text()) == pytest.approx(
        again, nan_ok=True
    )
    assert "Labels to check" in page.read_text() or "Images with most errors" in page.read_text()
    assert page.with_suffix(".csv").read_text().count("\n") == 6
    stored = torch.load(weights, weights_only=True)
    assert all(torch.equal(a["model"][k], stored["model"][k]) for k in a["model"])  # the weights stay
    assert len(stored["gn_det"]["thresholds"]) == 5 and all(0 <= t <= 1 for t in stored["gn_det"]["thresholds"])
    with pytest.raises(TrainingError, match="--overwrite"):
        engine.train(small(shapes, whole, "SOLVER.MAX_ITER", "4"))


@pytest.mark.parametrize(
    ("keys", "error", "word"),
    [
        (["MODEL.BACKBONE.FREEZE_AT", "2"], ConfigError, "FREEZE_AT 0"),
        (["MODEL.ROI_HEADS.NUM_CLASSES", "3"], DataError, "NUM_CLASSES"),
        (
            ["SOLVER.ACCUMULATE", "2", "MODEL.WEIGHTS", "gone.pth"],
            WeightsError,
            "gone.pth",
        ),
    ],
)
def test_mistakes_are_found_before_anything_is_replaced(
    shapes: list[str], tmp_path: Path, keys: list[str], error: type, word: str
) -> None:
    (tmp_path / "metrics.json").write_text("{}\n")
    with pytest.raises(error, match=word) as caught:
        engine.train(small(shapes, tmp_path, *keys))
    assert "\n" not in str(caught.value)
    assert (tmp_path / "metrics.json").read_text() == "{}\n"


def test_evaluation_needs_weights(shapes: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"MODEL\.WEIGHTS"):
        engine.evaluate(small(shapes, tmp_path))


def test_test_set_with_other_classes_is_refused(shapes: list[str], tmp_path: Path) -> None:
    path = Path(shapes[shapes.index("DATASETS.VAL_JSON") + 1])
    content = json.loads(path.read_text())
    content["categories"][0]["name"] = "blob"
    other = tmp_path / "other.json"
    other.write_text(json.dumps(content))
    keys = list(shapes)
    keys[keys.index("DATASETS.VAL_JSON") + 1] = str(other)
    with pytest.raises(DataError, match="it has 'blob', which the model does not know"):
        engine.train(small(keys, tmp_path / "out"))


def test_expected_results_are_verified(shapes: list[str], tmp_path: Path) -> None:
    from gn_det.engine.evaluator import verify_expected

    cfg = small(shapes, tmp_path, "TEST.EXPECTED_RESULTS", '[["bbox", "AP", 40.0, 0.5]]')
    verify_expected(cfg, {"bbox/AP": 40.4})
    for results in ({"bbox/AP": 39.4}, {"bbox/AP": float("nan")}, {}):
        with pytest.raises(TrainingError, match=r"bbox/AP is .* expected 40\.0"):
            verify_expected(cfg, results)


@pytest.mark.parametrize(
    ("keys", "word"),
    [(["TEST.BEST_METRIC", "AP"], "segm/ with AP"), (["TEST.PATIENCE", "3", "TEST.EVAL_PERIOD", "0"], "EVAL_PERIOD")],
)
def test_metric_that_never_comes_is_refused(shapes: list[str], tmp_path: Path, keys: list[str], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        engine.train(small(shapes, tmp_path, *keys))


def test_log_file_has_what_the_screen_does_not_show(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import logging

    from gn_det.engine.log import FILE_ONLY, run_log

    with run_log(tmp_path):
        logging.getLogger("gn_det.x").info("seen")
        logging.getLogger("gn_det.x").info("kept", extra=FILE_ONLY)
    text = capsys.readouterr().out
    assert "seen" in text and "kept" not in text
    assert "kept" in (tmp_path / "log.txt").read_text()


def test_full_disk_is_found_before_training(
    shapes: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No file of the run is written, an earlier one is kept."""
    import shutil
    from types import SimpleNamespace

    old = tmp_path / "model_final.pth"
    old.write_bytes(b"0" * 1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5 * 2**20))
    with pytest.raises(TrainingError, match=r"5 MiB are free, a checkpoint takes \d\d"):
        engine.train(small(shapes, tmp_path), overwrite=True)
    assert old.is_file() and {p.name for p in tmp_path.iterdir()} == {"model_final.pth", "log.txt", ".gn_det.lock"}
    assert "iter:" not in capsys.readouterr().out


def test_log_on_a_full_disk_is_silent(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lines are lost; logging's own stack traces would hide the message that says why the run stopped."""
    import logging

    from gn_det.engine import log

    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs /dev/full")
    monkeypatch.setattr(log, "open_append", lambda folder, name: full.open("a"))
    with log.run_log(tmp_path):
        logging.getLogger("gn_det.test").info("a line")
    assert "Traceback" not in capfd.readouterr().err


def test_fp16_needs_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="fp16 needs a GPU"):
        engine.train(small([], tmp_path, "SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", "fp16"))
