"""The choice of engine: cheap, open, and one line where Detectron2 is absent, broken or too old. Needs no Detectron2.

Broken installations are stood in for by packages on ``PYTHONPATH``, before any that is installed.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gn_det.cli import main
from gn_det.config import load_config
from gn_det.config.check import check_config
from gn_det.engine import choice as engines
from gn_det.engine.choice import INSTALL_PAGE, Choice, EngineError, choose
from gn_det.errors import ConfigError


def fake(root: Path, **files: str) -> Path:
    """A package ``detectron2`` with these modules."""
    for name, text in {"__init__": "__version__ = '0.6'", **files}.items():
        path = root / "detectron2" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def gn_det(*words: str, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(path or ""), os.environ.get("PYTHONPATH")]))}
    command = [sys.executable, "-m", "gn_det", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env, cwd=path)


DRY = ("train", "--config", "quickstart.yaml", "--dry-run", "MODEL.DEVICE", "cpu")


@pytest.mark.parametrize(
    ("files", "cause", "fix"),
    [
        (
            {"_C": "raise ImportError('/x/_C.so: undefined symbol: _ZN3c105ErrorC2', name=__name__)"},
            "undefined symbol: _ZN3c105ErrorC2",
            "rebuild Detectron2 with this torch",
        ),
        ({}, "No module named 'detectron2._C'", "rebuild Detectron2"),
        (
            {"__init__": "import a_library_that_is_not_there"},
            "No module named 'a_library_that_is_not_there'",
            "pip install a_library_that_is_not_there",
        ),
        (
            {
                "_C": "",
                "modeling": "raise ModuleNotFoundError(\"No module named 'pkg_resources'\", name='pkg_resources')",
            },
            "No module named 'pkg_resources'",
            "pip install 'setuptools<81'",
        ),
        (
            {"_C": "", "modeling": "from iopath.common import a_name_that_is_gone"},
            "iopath.common",
            "pip install 'iopath>=0.1.7,<0.1.10'",
        ),
        (
            {"_C": "", "modeling": "import PIL.Image; PIL.Image.A_NAME_THAT_IS_GONE"},
            "module 'PIL.Image' has no attribute 'A_NAME_THAT_IS_GONE'",
            "this Detectron2 is too old: install its current source",
        ),
        (
            {"_C": "", "modeling": "raise ImportError('libGL.so.1: cannot open shared object file', name='cv2')"},
            "libGL.so.1",
            "pip install opencv-python-headless",
        ),
        (
            {"_C": "", "modeling": "class Backbone: pass", "engine": ""},
            "too old: detectron2.modeling.Backbone has no padding_constraints",
            "install its current source",
        ),
        (
            {"_C": "", "modeling": "raise RuntimeError('first line\\nsecond line')"},
            "RuntimeError: first line",
            "install it again",
        ),
    ],
)
def test_broken_detectron2_is_one_line_and_never_passed_over(
    tmp_path: Path,
    files: dict[str, str],
    cause: str,
    fix: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """auto does not fall back to embedded; cause, fix, page and way around stand in one line; exit status 2."""
    installed = {n: m for n, m in sys.modules.items() if n.split(".")[0] == "detectron2"}
    for name in installed:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(fake(tmp_path, **files))
    try:
        assert main([*DRY]) == 2
    finally:
        for name in [n for n in sys.modules if n.split(".")[0] == "detectron2"]:
            del sys.modules[name]
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("gn-det: error: Detectron2 ") and err.count("\n") == 1
    for part in ("is installed, but cannot be used", cause, fix, INSTALL_PAGE, "--engine embedded runs without it"):
        assert part in err, part


def test_embedded_runs_beside_a_broken_detectron2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(engines, "is_installed", lambda: True)
    monkeypatch.setattr(engines, "import_detectron2", lambda: pytest.fail("Detectron2 is not asked for"))
    monkeypatch.chdir(tmp_path)
    assert main([*DRY, "--engine", "embedded"]) == 0
    assert "Engine: embedded (torch " in capsys.readouterr().out


def test_help_is_quick_and_looks_at_nothing(tmp_path: Path) -> None:
    """Packages that take long to import, or kill the interpreter as a broken Detectron2 can, are not imported."""
    deadly = fake(tmp_path, __init__="import os; os._exit(3)")
    for name in ("torch", "torchvision", "lightning", "numpy", "scipy", "matplotlib"):
        (deadly / f"{name}.py").write_text("import os; os._exit(4)")
    result = gn_det("train", "--help", path=deadly)
    assert result.returncode == 0 and "--engine {auto,embedded,detectron2}" in result.stdout


def test_a_folder_of_that_name_is_no_installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Detectron2's checkout beside the working directory: a namespace package that has nothing in it."""
    (tmp_path / "detectron2").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in [n for n in sys.modules if n.split(".")[0] == "detectron2"]:
        monkeypatch.delitem(sys.modules, name)
    assert not engines.is_installed()
    assert choose() == Choice("embedded", "because Detectron2 is not installed")


def test_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "is_installed", lambda: True)
    assert [choose(e).name for e in engines.ENGINES] == ["detectron2", "embedded", "detectron2"]
    monkeypatch.setattr(engines, "is_installed", lambda: False)
    assert choose().name == choose("embedded").name == "embedded"
    with pytest.raises(EngineError, match="--engine detectron2: Detectron2 is not installed") as error:
        choose("detectron2")
    assert INSTALL_PAGE in str(error.value) and "--engine embedded" in str(error.value)
    assert engines.load(Choice("embedded", "x")).name == "embedded"


@pytest.mark.parametrize("command", [DRY, ("eval", "--weights", "w.pth"), ("quickstart",)])
def test_absent_detectron2_on_every_command(
    command: tuple[str, ...],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(engines, "is_installed", lambda: False)
    assert main([*command, "--engine", "detectron2"]) == 2
    err = capsys.readouterr().err
    assert "Detectron2 is not installed" in err and INSTALL_PAGE in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("keys", "there"),
    [
        (["MODEL.RETINANET.NORM", "GN"], True),
        (["MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES", "True"], True),
        (["MODEL.RETINANET.NUM_CONVS", "3"], True),
        (["MODEL.KEYPOINT_ON", "True"], False),
        (["MODEL.RPN.BBOX_REG_LOSS_TYPE", "gIoU"], False),
        (["MODEL.PANOPTIC_FPN.INSTANCE_LOSS_WEIGHT", "2.0"], False),
    ],
)
def test_a_key_that_one_engine_lacks_names_the_other(keys: list[str], there: bool) -> None:
    """The embedded engine points to the other one exactly where that one takes the value."""
    cfg = load_config("gn_fpn.yaml", keys, check=False)
    with pytest.raises(ConfigError) as refused:
        check_config(cfg, "embedded")
    text = str(refused.value)
    assert text.startswith(f"{keys[0]} is ") and "not implemented by the embedded engine" in text and "\n" not in text
    assert text.endswith("; --engine detectron2 runs it") == there
    if there:
        check_config(cfg, "detectron2")
    else:
        with pytest.raises(ConfigError, match="not implemented by the detectron2 engine"):
            check_config(cfg, "detectron2")
