"""A user's mistake is one line on stderr and exit status 2; flags and keys reach the config."""

from __future__ import annotations

from pathlib import Path

import pytest

from gn_det import __version__
from gn_det.cli import _train_parser, config_from_args, main


def parse(words: list[str]) -> object:
    return config_from_args(_train_parser("x").parse_intermixed_args(words))


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


def test_no_command_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main(["--version"]) == 0
    assert __version__ in capsys.readouterr().out


def test_configs_lists_every_experiment(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["configs"]) == 0
    out = capsys.readouterr().out
    assert "gn_fpn_long.yaml" in out and "40.8 / 36.1" in out and "Base-" not in out
