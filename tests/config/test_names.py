"""Which file a name means: a path, a shipped config, or one of Detectron2's own where it is installed."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from gn_det.config import load_config
from gn_det.config.load import resolve_config
from gn_det.errors import ConfigError


@pytest.fixture
def zoo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Detectron2 that cannot be imported, with two YAML files in its model zoo."""
    folder = tmp_path / "site" / "detectron2" / "model_zoo" / "configs"
    (folder / "Misc").mkdir(parents=True)
    (tmp_path / "site" / "detectron2" / "__init__.py").write_text("raise RuntimeError('config must not import this')\n")
    (folder / "Base.yaml").write_text("SOLVER: {MAX_ITER: 7, BASE_LR: 0.5}\n")
    (folder / "Misc" / "mask_gn.yaml").write_text('_BASE_: "../Base.yaml"\nSOLVER: {MAX_ITER: 8}\n')
    monkeypatch.delitem(sys.modules, "detectron2", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    return folder


def test_zoo_names_resolve_without_importing_detectron2(zoo: Path) -> None:
    assert resolve_config("Misc/mask_gn.yaml") == resolve_config("Misc/mask_gn") == zoo / "Misc" / "mask_gn.yaml"
    cfg = load_config("Misc/mask_gn.yaml", ["SEED", "3"])
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR, cfg.SEED) == (8, 0.5, 3)
    assert "detectron2" not in sys.modules


def test_files_and_shipped_names_come_first(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Misc").mkdir()
    (tmp_path / "Misc" / "mask_gn.yaml").write_text("SEED: 5\n")
    assert load_config("Misc/mask_gn.yaml").SEED == 5
    assert resolve_config("gn_fpn.yaml") == resolve_config("configs/gn_fpn.yaml")
    assert zoo not in resolve_config("gn_fpn.yaml").parents


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Misc/mask_gnn.yaml", "neither a file nor in Detectron2's model zoo; did you mean Misc/mask_gn.yaml?"),
        ("Misc/zzz", "neither a file nor in Detectron2's model zoo"),
        ("runs/mask_gn.yaml", "config 'runs/mask_gn.yaml' does not exist"),
        ("Misc/../../secret.yaml", "neither a file nor in"),
        ("/nowhere/Misc/mask_gn.yaml", "does not exist"),
        ("mask_gn.yaml", "neither a file nor a shipped config"),
        ("Misc/" + "x" * 5000, "(5005 characters) is neither a file nor in"),
        ("x" * 5000, "(5000 characters) is neither a file nor a shipped config"),
        ("Misc/a\0b.yaml", "neither a file nor in"),
        ("/dev/zero", "is a pipe or device"),
    ],
)
def test_unknown_names_are_one_line(zoo: Path, name: str, message: str) -> None:
    (zoo.parent / "secret.yaml").write_text("SEED: 1\n")
    with pytest.raises(ConfigError) as e:
        resolve_config(name)
    assert message in str(e.value) and "\n" not in str(e.value)


def test_without_detectron2_the_line_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "detectron2", None)  # blocked: find_spec raises ValueError
    with pytest.raises(ConfigError, match=r"does not exist .*need Detectron2 installed"):
        resolve_config("Misc/mask_rcnn_R_50_FPN_3x_gn.yaml")
