"""Loggers beside metrics.json: one interface, imported on use, continued by a resumed run."""

from __future__ import annotations

import csv
import importlib.util
import io
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gn_det.cli import flags, parse
from gn_det.config import load_config
from gn_det.config.schema import KEYS
from gn_det.engine.loggers import (
    LOGGERS,
    MlflowLogger,
    TensorBoardLogger,
    WandbLogger,
    check_loggers,
    send_pictures,
)
from gn_det.engine.run import train
from gn_det.errors import ConfigError, TrainingError
from gn_det.values import InvalidValue
from tests.engine.cases import run
from tests.engine.test_detector_loop import lines, scripted, stop_at


def sent(folder: Path) -> list[tuple[int, str, float]]:
    """What a logger should have: all scalars of metrics.json."""
    return sorted((e["iteration"], k, v) for e in lines(folder) for k, v in e.items() if k != "iteration")


def cut_and_resumed(folder: Path, *names: str) -> None:
    """25 iterations with evaluations, interrupted after iteration 22."""
    keys = ["LOGGERS", names, "TEST.EVAL_PERIOD", 10, "SOLVER.STEPS", (20,)]
    with pytest.raises(Exception, match=r"interrupted \(SIGTERM\)"):
        run(folder, keys, max_iter=25, evaluate=scripted([1.0, 2.0]), make_loader=stop_at(22))
    run(folder, keys, max_iter=25, evaluate=scripted([3.0]), resume=True)


def test_the_names_are_those_of_the_key() -> None:
    for name in LOGGERS:
        KEYS["LOGGERS"].check((name,), "LOGGERS")
    with pytest.raises(InvalidValue, match=r"LOGGERS\[0\] is 'wandbb', did you mean 'wandb'"):
        KEYS["LOGGERS"].check(("wandbb",), "LOGGERS")
    assert all(repr(name) in KEYS["LOGGERS"].check.expected for name in LOGGERS)  # type: ignore[attr-defined]


def test_csv(tmp_path: Path) -> None:
    cut_and_resumed(tmp_path, "csv")
    rows = list(csv.reader((tmp_path / "metrics.csv").open()))
    assert rows[0] == ["iteration", "name", "value"]
    assert sorted((int(i), name, float(value)) for i, name, value in rows[1:]) == sent(tmp_path)
    assert not list(tmp_path.glob("events.out.tfevents.*"))


def test_a_missing_package_is_found_before_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: find_spec(name) if name == "csv" else None)
    cfg = load_config("quickstart.yaml", ["LOGGERS", "('csv', 'wandb')", "OUTPUT_DIR", str(tmp_path / "out")])
    with pytest.raises(ConfigError, match=r"names wandb, which is not installed: pip install wandb, or leave it out"):
        train(cfg)
    assert not (tmp_path / "out").exists()
    cfg.LOGGERS = ("csv",)
    check_loggers(cfg)


def test_wandb_gets_the_scalars_and_its_run_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the module: what it is asked to do."""
    asked: list[dict[str, Any]] = []
    logged: list[tuple[int, str, float]] = []

    def init(**options: Any) -> Any:
        asked.append(options)
        log = lambda scalars, step: logged.extend((step, k, v) for k, v in scalars.items())  # noqa: E731
        return SimpleNamespace(id="abc", log=log, finish=lambda: asked.append({"finished": True}))

    module = ModuleType("wandb")
    module.init = init  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    cut_and_resumed(tmp_path / "mine", "wandb")
    first, end, second, again = asked
    assert (first["id"], second["id"]) == (None, "abc") and end == again == {"finished": True}
    assert (first["project"], first["name"], first["dir"]) == ("gn_det", "mine", str(tmp_path / "mine"))
    assert set(sent(tmp_path / "mine")) <= set(logged)


def test_pictures_go_to_the_run_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for both modules; a service that refuses is one line, and csv gets nothing."""
    cfg = load_config("quickstart.yaml", ["LOGGERS", "('csv', 'wandb', 'mlflow')", "OUTPUT_DIR", str(tmp_path)])
    (tmp_path / "wandb_run").write_text("abc")
    (tmp_path / "mlflow_run").write_text("def")
    got: list[Any] = []
    run = SimpleNamespace(id="abc", log=lambda *a, step: got.append((*a, step)), finish=lambda: got.append("finished"))
    wandb: Any = ModuleType("wandb")
    wandb.init = lambda **options: got.append(options["id"]) or run
    wandb.Image = lambda path: path
    mlflow: Any = ModuleType("mlflow")
    client = SimpleNamespace(log_artifact=lambda *a: got.append(a), set_terminated=got.append)
    mlflow.MlflowClient = lambda **_: client
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    path = tmp_path / "curves.png"
    send_pictures(cfg, [path])
    assert got == ["abc", ({"curves": str(path)}, None), "finished", ("def", str(path), None), "def"]
    got.clear()
    for logger in (WandbLogger(tmp_path, 0), MlflowLogger(tmp_path, 0)):
        logger.picture("visualize", path, 7)
    assert got == ["abc", ({"visualize": str(path)}, 7), ("def", str(path), "visualize")]
    del mlflow.MlflowClient
    with pytest.raises(TrainingError, match="mlflow: cannot upload the pictures"):
        send_pictures(cfg, [path])
    send_pictures(cfg, [])


def test_tensorboard_makes_no_file_before_there_is_something_to_show(tmp_path: Path) -> None:
    """A run that stops in its first iterations, or has nothing left to train, adds no empty run to TensorBoard."""
    logger = TensorBoardLogger(tmp_path)
    logger.flush()
    logger.close()
    assert not list(tmp_path.iterdir())
    logger.write(3, {"lr": 0.1})
    logger.close()
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 1


def test_tensorboard_shows_the_picture_of_an_iteration(tmp_path: Path) -> None:
    """The pixels of the file, under its name and iteration."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, (path,) = a_picture(tmp_path, "csv")
    logger = TensorBoardLogger(tmp_path)
    logger.picture("visualize", path, 40)
    logger.close()
    events = EventAccumulator(str(tmp_path)).Reload()
    (found,) = events.Images("visualize")
    assert found.step == 40
    assert np.array_equal(Image.open(io.BytesIO(found.encoded_image_string)), Image.open(path))


def a_picture(folder: Path, name: str) -> tuple[Any, list[Path]]:
    """What send_pictures takes: the config of a run in ``folder``, and a PNG."""
    Image.new("RGB", (8, 8), "red").save(folder / "curves.png")
    cfg = load_config("quickstart.yaml", ["LOGGERS", f"('{name}',)", "OUTPUT_DIR", str(folder)])
    return cfg, [folder / "curves.png"]


@pytest.mark.slow
def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="needs wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    cut_and_resumed(tmp_path, "wandb")
    assert (tmp_path / "wandb_run").read_text() and list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    send_pictures(*a_picture(tmp_path, "wandb"))
    assert list((tmp_path / "wandb").glob("offline-run-*/files/media/images/curves_*.png"))


@pytest.mark.slow
def test_mlflow_into_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The values of metrics.json, in one run."""
    mlflow = pytest.importorskip("mlflow", reason="needs mlflow")
    for name in [n for n in os.environ if n.startswith("MLFLOW_")]:
        monkeypatch.delenv(name)
    cut_and_resumed(tmp_path, "mlflow")
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "mlruns").as_uri())
    (found,) = client.search_runs([client.get_experiment_by_name("gn_det").experiment_id])
    assert found.info.run_id == (tmp_path / "mlflow_run").read_text() and found.info.status == "FINISHED"
    history = client.get_metric_history(found.info.run_id, "total_loss")
    assert {(19, "total_loss"), (24, "total_loss")} <= {(m.step, m.key) for m in history}
    assert {(m.step, m.key, m.value) for m in history} >= {s for s in sent(tmp_path) if s[1] == "total_loss"}
    send_pictures(*a_picture(tmp_path, "mlflow"))
    assert [artifact.path for artifact in client.list_artifacts(found.info.run_id)] == ["curves.png"]


def test_the_flag() -> None:
    """``--logger csv,wandb`` sets the key; an unknown name is refused by it."""

    def loggers(words: str) -> Any:
        _, args = parse("train", ["--config", "quickstart.yaml", "--logger", words])
        return flags.config_from_args(args, "embedded").LOGGERS

    assert loggers("csv,wandb") == ("csv", "wandb") and loggers("") == ()
    with pytest.raises(ConfigError, match=r"LOGGERS.* is 'tensorbord', did you mean 'tensorboard'"):
        loggers("tensorbord")
