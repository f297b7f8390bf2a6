"""The wheel: every file is in it, and it runs where no source checkout is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest

from gn_det.data.shapes import make_shapes

ROOT = Path(__file__).resolve().parent.parent


def test_setup_cfg_lists_every_package() -> None:
    setup = ConfigParser()
    setup.read(ROOT / "setup.cfg")
    found = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "gn_det").rglob("__init__.py")}
    assert set(setup["options"]["packages"].split()) == found | {"gn_det.configs", "gn_det.experiments"}


def run(*words: object, cwd: Path, path: Path | None = None) -> str:
    env = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PYTHONPATH": str(path or "")}
    done = subprocess.run(list(map(str, words)), cwd=cwd, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources with a version of its own, which tells it from this checkout."""
    pytest.importorskip("setuptools", minversion="70.1", reason="building a wheel needs setuptools 70.1")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    for name in ("gn_det", "configs", "experiments"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    version = source / "gn_det" / "about.py"
    text = version.read_text(encoding="utf-8").replace('__version__ = "', '__version__ = "99.')
    version.write_text(text, encoding="utf-8")
    pip = (sys.executable, "-m", "pip", "--quiet")
    run(*pip, "wheel", "--no-build-isolation", "--no-deps", "--no-index", "-w", folder, source, cwd=folder)
    return next(folder.glob("*.whl"))


def test_wheel_holds_every_file(wheel: Path) -> None:
    held = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("gn_det/")}
    wanted = {p.relative_to(ROOT).as_posix() for p in (ROOT / "gn_det").rglob("*.*") if "__pycache__" not in p.parts}
    for folder in ("configs", "experiments"):
        wanted |= {f"gn_det/{folder}/{p.name}" for p in (ROOT / folder).glob("*.yaml")}
    assert held == wanted


def test_quickstart_from_the_wheel(wheel: Path, tmp_path: Path) -> None:
    """Through the installed script, on a small set so that it takes seconds."""
    site = tmp_path / "site"
    pip = (sys.executable, "-m", "pip", "--quiet")
    run(*pip, "install", "--no-deps", "--no-index", "--target", site, wheel, cwd=tmp_path)
    keys: list[str] = []
    for split in ("train", "val"):
        made = make_shapes(tmp_path, split, 4)
        keys += [f"DATASETS.{split.upper()}_JSON", made.json_file, f"DATASETS.{split.upper()}_IMAGES", made.image_root]
    keys += ["SOLVER.MAX_ITER", "2", "SOLVER.IMS_PER_BATCH", "1", "TEST.DETECTIONS_PER_IMAGE", "2"]
    keys += ["MODEL.DEVICE", "cpu", "DATALOADER.NUM_WORKERS", "0"]
    out = run(site / "bin" / "gn-det", "quickstart", "--engine", "embedded", *keys, cwd=tmp_path, path=site)
    assert "gn_det 99." in out and "box AP" in out
    written = {p.name for p in (tmp_path / "output" / "quickstart").iterdir()}
    assert {"model_best.pth", "predictions.png", "curves.png", "metrics.json"} <= written
