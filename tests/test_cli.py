"""A user's mistake is one line on stderr and exit status 2; flags and keys reach the config."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from gn_det import __version__
from gn_det.cli import config_from_args, main
from gn_det.flags import train_parser


def parse(words: list[str]) -> object:
    return config_from_args(train_parser("x").parse_intermixed_args(words))


def test_flags_and_overrides_mix_in_any_order() -> None:
    words = ["MODEL.WEIGHTS", "w.pth", "--config", "gn_fpn.yaml", "--train-json", "a.json", "--train-images", "imgs"]
    cfg = parse(words + ["SOLVER.MAX_ITER", "2000", "--output", "out", "SEED", "-1"])
    assert cfg.MODEL.WEIGHTS == "w.pth" and cfg.DATASETS.TRAIN_JSON == "a.json"
    assert cfg.SOLVER.MAX_ITER == 2000 and cfg.OUTPUT_DIR == "out" and cfg.SEED == -1
    assert "SOLVER.MAX_ITER" in cfg.SOLVER.NO_RESCALE


def test_config_file_is_an_alias() -> None:
    assert parse(["--config-file", "gn_c4"]).MODEL.RESNETS.NORM == "GN"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--config", "nothing.yaml"], "neither a file nor a shipped config"),
        (["train", "--config", "gn_fpn", "SOLVER.BASELR", "1"], "did you mean SOLVER.BASE_LR"),
        (["train", "--config", "gn_fpn", "--train-json", "a.json"], "DATASETS.TRAIN_IMAGES is missing"),
        (["predict", "--weights", "w", "--output", "o", "--threshold", "2", "a.jpg"], "between 0 and 1"),
        (["predict", "--weights", "nowhere.pth", "--output", "o", "a.jpg"], "a.jpg: no such image"),
        (["eval", "--weights", "nowhere.pth"], "nowhere.pth"),
        (["trian"], "unknown command 'trian'"),
        (
            ["train", "--config", "quickstart", "MODEL.DEVICE", "cpu", "SOLVER.ACCUMULATE", "4", "--num-gpus", "3"],
            "of 12",
        ),
        (["train", "--config", "quickstart", "MODEL.DEVICE", "cpu", "SOLVER.AMP.ENABLED=1"], "SOLVER.AMP.ENABLED must"),
        (["train", "--config", "quickstart", "TEST.BEST_METRIC", "AP"], "TEST.BEST_METRIC is 'AP'"),
    ],
)
def test_mistakes(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    err = capsys.readouterr().err
    assert message in err and err.startswith("gn-det: error: ") and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["--lr", "1"], ["--num-gpus", "x"], []])
def test_mistaken_flags_are_one_line(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", *words])
    err = capsys.readouterr().err
    assert ended.value.code == 2 and err.count("\n") == 1 and "error: " in err and "train --help" in err


def test_own_training_set_alone_leaves_the_configs_test_set_out() -> None:
    own = ["--config", "gn_fpn", "--train-json", "a.json", "--train-images", "imgs"]
    assert tuple(parse(own).DATASETS.TEST) == ()
    assert parse([*own, "DATASETS.TEST", "b.json@imgs"]).DATASETS.TEST == ("b.json@imgs",)
    assert parse(["--config", "gn_fpn"]).DATASETS.TEST == ("coco_2017_val",)


def test_sigterm_unwinds(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cleaning up happens, the shell gets 143, and the handler that was there comes back."""
    cleaned = []

    def predict(*_: object, **__: object) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:
            cleaned.append(True)

    monkeypatch.setattr("gn_det.predict.predict", predict)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as ended:
        main(["predict", "--weights", "w", "--output", str(tmp_path), "a.jpg"])
    assert ended.value.code == 143 and cleaned and signal.getsignal(signal.SIGTERM) is before
    assert capsys.readouterr().err == "gn-det: terminated\n"


def test_no_command_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main(["--version"]) == 0
    assert __version__ in capsys.readouterr().out


def test_configs_lists_every_experiment(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs"]) == 0
    out = capsys.readouterr().out
    assert "gn_fpn_long.yaml" in out and "40.8 / 36.1" in out and "Base-" not in out
