"""``gn-det train --engine detectron2``: flags, files and behavior are those of the embedded engine."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("detectron2.config", reason="needs an installed Detectron2")

from gn_det.checkpoint.io import read_checkpoint
from gn_det.cli import main
from gn_det.engine.scalars import Metrics
from gn_det.errors import UserError
from gn_det.prediction.images import PREDICTIONS_FILE
from tests.detectron2.cases import TINY, lines, own_data, state, tiny

pytestmark = pytest.mark.detectron2


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return own_data(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="module")
def whole(data: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six iterations with an evaluation every three, nothing in the way."""
    output = tmp_path_factory.mktemp("whole")
    assert main(tiny(data, output, "SOLVER.MAX_ITER", "6", "TEST.EVAL_PERIOD", "3")) == 0
    return output


def equal(a: Path, b: Path) -> bool:
    x, y = state(a), state(b)
    return list(x) == list(y) and all(torch.equal(x[k], y[k]) for k in x)


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["SOLVER.ACCUMULATE", "2", "SOLVER.IMS_PER_BATCH", "4"],
        ["SOLVER.CLIP_GRADIENTS.ENABLED", "True", "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "full_model"],
        ["SOLVER.CLIP_GRADIENTS.ENABLED", "True", "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "value"],
        ["INPUT.CROP.ENABLED", "True", "DATALOADER.NUM_WORKERS", "1"],
        ["SOLVER.EMA.ENABLED", "True", "SOLVER.EMA.DECAY", "0.8"],
    ],
    ids=["plain", "accumulate", "clip_full_model", "clip_value", "crop_in_a_worker", "ema"],
)
def test_both_engines_write_the_same_numbers(data: list[str], tmp_path: Path, more: list[str]) -> None:
    """The same seed: metrics.json line by line, AP and weights, to the last bit (float32, one thread).

    Accuracies are averaged in float64 by Detectron2 and in float32 by gn_det: 1e-6.
    """
    runs = {}
    for engine in ("embedded", "detectron2"):
        words = tiny(data, tmp_path / engine, "SOLVER.MAX_ITER", "4", "TEST.EVAL_PERIOD", "2", *more, engine=engine)
        assert main(words) == 0
        runs[engine] = lines(tmp_path / engine)
    ours, theirs = runs["embedded"], runs["detectron2"]
    assert [e["iteration"] for e in ours] == [e["iteration"] for e in theirs]
    assert any("loss_mask" in e for e in ours) and any("segm/AP" in e for e in ours)
    for a, b in zip(ours, theirs):
        assert a.keys() == b.keys()
        for key in a.keys() - {"time", "data_time", "eta_seconds"}:
            if key.startswith(("mask_rcnn/", "fast_rcnn/")):
                assert a[key] == pytest.approx(b[key], abs=1e-6), key
            else:
                assert a[key] == b[key], key
    assert equal(tmp_path / "embedded" / "model_final.pth", tmp_path / "detectron2" / "model_final.pth")


def test_files_and_sentences(data: list[str], tmp_path: Path) -> None:
    """Engine and reason, census, optimizer groups, scaled schedule; the files that the README names."""
    words = tiny(data, tmp_path, "SOLVER.REFERENCE_BATCH", "8", "SOLVER.CHECKPOINT_PERIOD", "1", "--epochs", "1")
    assert main([*words, "SOLVER.CHECKPOINT_KEEP", "2"]) == 0
    out = (tmp_path / "log.txt").read_text()
    for text in (
        "Engine: detectron2 (Detectron2 ",
        "as --engine says",
        "Norm layers",
        " GN in backbone + ",
        "Optimizer groups",
        "gamma/beta tensors: ",
        "trained with weight decay 0",
        "learning rate scaled linearly",
        "SOLVER.EPOCHS 1 over 8 images",
        "Training from scratch",
        "is the best so far",
        "iter: 3  total_loss",
    ):
        assert text in out, text
    names = {p.name for p in tmp_path.iterdir()}
    assert names >= {"model_best.pth", "model_final.pth", "metrics.json", "last_checkpoint", "config.yaml", "log.txt"}
    assert len(list(tmp_path.glob("model_0*.pth"))) == 2
    payload = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert payload["gn_det"]["class_names"] == ["circle", "square", "triangle", "star", "ring"]
    assert {"optimizer", "scheduler", "rng", "iteration", "trainer"} <= payload.keys()


def test_dry_run_needs_neither_data_nor_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "nothing"))
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--engine", "detectron2", "--config", "bn_fpn.yaml", "--dry-run"]) == 0
    out = capsys.readouterr().out
    for word in ("Engine: detectron2", "53 FrozenBN in backbone", "118287 images assumed", "Dry run: nothing was"):
        assert word in out, word
    assert list(tmp_path.iterdir()) == []


def stop(monkeypatch: pytest.MonkeyPatch, after: int, number: int = signal.SIGTERM) -> None:
    """Send this process a signal while iteration ``after`` is trained."""
    original = Metrics.end_step

    def hooked(self: Metrics, loop: Any) -> None:
        original(self, loop)
        if loop.state.iteration == after - 1:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Metrics, "end_step", hooked)


@pytest.mark.parametrize("second", ["detectron2", "embedded"])
def test_stopped_and_resumed_is_bit_identical(
    data: list[str],
    whole: Path,
    tmp_path: Path,
    second: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """SIGTERM: a checkpoint, one line, status 143. --resume, on either engine: weights and momentum as if uncut."""
    keys = ("SOLVER.MAX_ITER", "6", "TEST.EVAL_PERIOD", "3")
    with monkeypatch.context() as patch:
        stop(patch, 4)
        assert main(tiny(data, tmp_path, *keys)) == 143
    err = capsys.readouterr().err
    assert "interrupted (SIGTERM) after iteration 4" in err and "--resume" in err and err.count("\n") == 1
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000004.pth"
    assert main(tiny(data, tmp_path, *keys, "--resume", engine=second)) == 0
    assert "momentum starts at zero" not in capsys.readouterr().out
    assert equal(whole / "model_final.pth", tmp_path / "model_final.pth")
    a, b = (read_checkpoint(f / "model_final.pth") for f in (whole, tmp_path))
    for index, slot in a["optimizer"]["state"].items():
        assert torch.equal(slot["momentum_buffer"], b["optimizer"]["state"][index]["momentum_buffer"])
    assert torch.equal(a["rng"][0]["torch"], b["rng"][0]["torch"]) and a["scheduler"] == b["scheduler"]
    assert a["gn_det"]["best_metric"] == b["gn_det"]["best_metric"]


def test_averaged_weights_resume_on_either_engine(
    data: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle: averages and the weights that learn, as if uncut and to the last bit."""
    keys = ("SOLVER.MAX_ITER", "5", "SOLVER.EMA.ENABLED", "True", "SOLVER.EMA.DECAY", "0.8")
    assert main(tiny(data, tmp_path / "whole", *keys)) == 0
    for second in ("detectron2", "embedded"):
        with monkeypatch.context() as patch:
            stop(patch, 3)
            assert main(tiny(data, tmp_path / second, *keys)) == 143
        assert main(tiny(data, tmp_path / second, *keys, "--resume", engine=second)) == 0
        assert equal(tmp_path / "whole" / "model_final.pth", tmp_path / second / "model_final.pth")
        a, b = (read_checkpoint(tmp_path / f / "model_final.pth")["ema"] for f in ("whole", second))
        assert a["steps"] == b["steps"] == 5
        assert all(torch.equal(v, b["learning"][k]) for k, v in a["learning"].items())


@pytest.mark.parametrize("engine", ["detectron2", "embedded"])
def test_hours_that_are_over_end_with_an_evaluated_checkpoint(
    data: list[str], tmp_path: Path, engine: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = tiny(data, tmp_path, "SOLVER.MAX_ITER", "9", engine=engine)
    assert main([*words, "--max-hours", "1e-7"]) == 0
    assert "reached at iteration 1/9" in capsys.readouterr().out
    last = read_checkpoint(tmp_path / "model_0000001.pth")
    assert last["gn_det"]["evaluated_at"] == 1 and "segm/AP" in last["gn_det"]["results"]
    assert not (tmp_path / "model_final.pth").exists()


def test_a_run_of_the_embedded_engine_goes_on_here(data: list[str], whole: Path, tmp_path: Path) -> None:
    keys = ("SOLVER.CHECKPOINT_PERIOD", "3", "TEST.EVAL_PERIOD", "3", "SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR")
    for folder, engine in (("one", "embedded"), ("two", "embedded"), ("one", "detectron2"), ("two", "embedded")):
        first = not (tmp_path / folder).exists()
        words = tiny(data, tmp_path / folder, *keys, "SOLVER.MAX_ITER", "3" if first else "5", engine=engine)
        assert main([*words] if first else [*words, "--resume"]) == 0
    assert equal(tmp_path / "one" / "model_final.pth", tmp_path / "two" / "model_final.pth")


def test_overwrite_and_an_earlier_run(
    data: list[str], whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = ("SOLVER.MAX_ITER", "1", "DATASETS.VAL_JSON", "", "DATASETS.VAL_IMAGES", "")
    assert main(tiny(data, tmp_path, *keys)) == 0
    capsys.readouterr()
    assert main(tiny(data, tmp_path, *keys)) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(tiny(data, tmp_path, *keys, "--overwrite")) == 0
    assert (tmp_path / "metrics.json.1").is_file()


@pytest.mark.parametrize("engine", ["detectron2", "embedded"])
def test_evaluation_and_prediction_on_either_engine(data: list[str], whole: Path, tmp_path: Path, engine: str) -> None:
    """eval and train --eval-only give the run's own AP to the last digit; predict draws from the checkpoint."""
    weights = str(whole / "model_final.pth")
    words = ["eval", "--engine", engine, "--weights", weights, "--output", str(tmp_path / "e"), *data[4:]]
    assert main(words) == 0
    only = tiny(data, tmp_path / "t", "--eval-only", "--weights", weights, engine=engine)
    assert main(only) == 0
    results = [
        json.loads((folder / "inference" / "coco_instances_results.json").read_text())
        for folder in (whole, tmp_path / "e", tmp_path / "t")
    ]
    assert results[0] == results[1] == results[2] and len(results[0]) > 0
    logs = "".join((tmp_path / folder / "log.txt").read_text() for folder in "et")
    rows = re.findall(r"copypaste: (\d.*)", logs)
    assert len(rows) == 4 and rows[:2] == rows[2:]
    if engine == "embedded":
        words = ["predict", "--weights", weights, data[7], "--output", str(tmp_path / "p"), "--threshold", "0.0"]
        assert main(words) == 0 and (tmp_path / "p" / PREDICTIONS_FILE).is_file()


def test_best_and_patience(
    data: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    values = iter([1.0, 3.0, 2.0, float("nan"), 9.0])
    monkeypatch.setattr("gn_det.engine.run.evaluate_model", lambda *_: {"segm/AP": next(values)})
    keys = ("SOLVER.MAX_ITER", "9", "TEST.EVAL_PERIOD", "1", "TEST.PATIENCE", "2")
    assert main(tiny(data, tmp_path, *keys)) == 0
    best, final = (read_checkpoint(tmp_path / f"model_{name}.pth") for name in ("best", "final"))
    assert best["iteration"] == 1 and best["gn_det"]["best_metric"] == 3.0 and "optimizer" not in best
    assert final["iteration"] == 3 and final["gn_det"]["stale"] == 2
    captured = capsys.readouterr()
    assert "Stopped early (TEST.PATIENCE): 2 evaluations without a better segm/AP" in captured.out
    assert "Traceback" not in captured.err + captured.out


class Poisoned:
    """Makes the losses of one iteration nan, or raises as Detectron2's RPN does when training has diverged."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, raised: bool) -> None:
        from detectron2.modeling import GeneralizedRCNN

        original, calls = GeneralizedRCNN.forward, iter(range(1000))

        def forward(model: Any, inputs: Any) -> Any:
            out = original(model, inputs)
            if model.training and next(calls) == at:
                if raised:
                    raise FloatingPointError("Predicted boxes or scores contain Inf/NaN.")
                out["loss_mask"] = out["loss_mask"] * float("nan")
            return out

        monkeypatch.setattr(GeneralizedRCNN, "forward", forward)


@pytest.mark.parametrize("raised", [False, True])
def test_non_finite_loss_names_the_images(
    data: list[str], tmp_path: Path, raised: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Poisoned(monkeypatch, 2, raised)
    assert main(tiny(data, tmp_path, "SOLVER.MAX_ITER", "5", "SOLVER.CHECKPOINT_PERIOD", "2")) == 2
    err = capsys.readouterr().err
    assert "loss is not finite at iteration 2: loss_" in err and err.count("\n") == 1
    assert len(re.findall(r"\d+ \([^)]*\.jpg\)", err)) == 2 and "model_0000001.pth" in err
    assert all(torch.isfinite(v).all() for v in state(tmp_path / "model_0000001.pth").values() if v.is_floating_point())
    assert "stopped: loss is not finite" in (tmp_path / "log.txt").read_text()


def test_bf16_trains(data: list[str], tmp_path: Path) -> None:
    """bf16 autocast on the CPU: the first loss is near that of the embedded engine (tolerance of bf16)."""
    keys = ("SOLVER.MAX_ITER", "1", "SOLVER.AMP.ENABLED", "True", "DATASETS.VAL_JSON", "", "DATASETS.VAL_IMAGES", "")
    losses = []
    for engine in ("detectron2", "embedded"):
        assert main(tiny(data, tmp_path / engine, *keys, engine=engine)) == 0
        losses.append(lines(tmp_path / engine)[0]["total_loss"])
        assert all(v.dtype == torch.float32 for v in state(tmp_path / engine / "model_final.pth").values())
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


def mistakes() -> Iterator[Any]:
    yield ["MODEL.ROI_HEADS.NUM_CLASSES", "3"], "NUM_CLASSES"
    yield ["MODEL.BACKBONE.FREEZE_AT", "2"], "FREEZE_AT 0"
    yield ["MODEL.WEIGHTS", "gone.pth"], "gone.pth"
    yield ["SOLVER.AMP.ENABLED", "True", "SOLVER.AMP.DTYPE", "fp16"], "fp16 needs a GPU"
    yield ["MODEL.KEYPOINT_ON", "True"], "MODEL.KEYPOINT_ON is True, which is not implemented by the detectron2 engine"
    yield ["TEST.BEST_METRIC", "AP"], "TEST.BEST_METRIC is 'AP'"
    yield ["--num-gpus", "3"], "SOLVER.IMS_PER_BATCH"


@pytest.mark.parametrize(("keys", "message"), list(mistakes()))
def test_mistakes_are_one_line(
    data: list[str], tmp_path: Path, keys: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(tiny(data, tmp_path, *keys)) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and err.startswith("gn-det: error: ")
    assert not list(tmp_path.glob("*.pth"))


def test_classes_are_matched_by_name(data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Test categories in another order and under other ids do no harm; another name is refused."""
    content = json.loads(Path(data[5]).read_text())
    ids = {c["id"]: 900 + c["id"] for c in content["categories"]}
    for item in (*content["categories"], *content["annotations"]):
        key = "category_id" if "category_id" in item else "id"
        item[key] = ids[item[key]]
    content["categories"].reverse()
    other = tmp_path / "other.json"
    other.write_text(json.dumps(content))
    words = [*data[:5], str(other), *data[6:]]
    assert main(tiny(words, tmp_path / "run", "SOLVER.MAX_ITER", "1")) == 0
    results = json.loads((tmp_path / "run" / "inference" / "coco_instances_results.json").read_text())
    assert {r["category_id"] for r in results} <= set(ids.values())
    content["categories"][0]["name"] = "blob"
    other.write_text(json.dumps(content))
    assert main(tiny(words, tmp_path / "refused")) == 2
    assert "the model" in capsys.readouterr().err


def test_two_processes_equal_the_embedded_engine(data: list[str], tmp_path: Path) -> None:
    """gloo on the CPU: the same weights as two processes of the embedded engine, and both ranks evaluate."""
    for engine in ("detectron2", "embedded"):
        words = tiny(data, tmp_path / engine, "SOLVER.MAX_ITER", "3", "--num-gpus", "2", engine=engine)
        assert main([*words, "SOLVER.ACCUMULATE", "2", "SOLVER.IMS_PER_BATCH", "8"]) == 0
    assert equal(tmp_path / "embedded" / "model_final.pth", tmp_path / "detectron2" / "model_final.pth")
    ours, theirs = (lines(tmp_path / engine)[-1] for engine in ("embedded", "detectron2"))
    assert ours == theirs and "segm/AP" in ours


def test_models_that_only_detectron2_has(data: list[str], tmp_path: Path) -> None:
    """Cascade with GIoU on GN heads, and RetinaNet on a GN backbone: trained, evaluated, resumed by the same flags."""
    cascade = ["MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", "True",
               "MODEL.RPN.BBOX_REG_LOSS_TYPE", "giou"]  # fmt: skip
    retina = ["MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone",
              "MODEL.RESNETS.OUT_FEATURES", "('res3','res4','res5')", "MODEL.FPN.IN_FEATURES",
              "('res3','res4','res5')", "MODEL.ANCHOR_GENERATOR.SIZES",
              "[[8],[16],[32],[64],[128]]", "MODEL.MASK_ON", "False", "TEST.BEST_METRIC", "bbox/AP"]  # fmt: skip
    for name, keys, loss in (("cascade", cascade, "loss_box_reg_stage2"), ("retina", retina, "loss_cls")):
        assert main(tiny(data, tmp_path / name, "SOLVER.MAX_ITER", "2", *keys)) == 0
        assert loss in lines(tmp_path / name)[0] and "bbox/AP" in lines(tmp_path / name)[-1]
        assert main(tiny(data, tmp_path / name, "SOLVER.MAX_ITER", "3", "--resume", *keys)) == 0
        weights = str(tmp_path / name / "model_final.pth")
        assert main(["eval", "--engine", "detectron2", "--weights", weights, *data[4:], "--output", str(tmp_path)]) == 0
        drawn = str(tmp_path / f"{name}-drawn")
        assert main(["predict", "--weights", weights, data[7], "--output", drawn, "--threshold", "0.0"]) == 0
        assert len(list(Path(drawn).glob("*.png"))) == 4
    with pytest.raises(UserError, match="--engine detectron2 runs it"):
        from gn_det.config import load_config

        load_config("quickstart.yaml", retina)


def test_auto_takes_detectron2_where_it_is(data: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--config", "quickstart.yaml", *data, *TINY, "--dry-run"]) == 0
    assert "Engine: detectron2 (Detectron2 " in capsys.readouterr().out
