"""SIGKILL at any moment, --resume: to the last bit the run that was left alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")


def survive(folder: Path, engine: str, workers: str, kills: int, seed: int) -> dict[str, Any]:
    script = str(Path(__file__).with_name("killed_runs.py"))
    words = [sys.executable, script, str(folder), engine, workers, str(kills), str(seed)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=env, timeout=1500)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def check(report: dict[str, Any], kills: int) -> None:
    """Weights, momentum, schedule, random streams, best metric and metrics.json are equal; no file is left behind."""
    assert report["kills"] == kills
    assert report["differ"] == [], report
    assert report["lines"] == 6  # iterations 9, 19, 29, 39, 45, and the last evaluation: none twice, none lost
    assert not any(".tmp-" in name for name in report["files"][1])


def test_killed_runs_end_as_the_one_left_alone(tmp_path: Path) -> None:
    """Half of the kills at a random time, half at a random write, sync, rename or deletion of a file."""
    check(survive(tmp_path, "embedded", "0,2,2,0", 4, seed=1), 4)


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "seed"), [("0", 11), ("2", 12), ("8,0", 13)])
def test_many_kills(tmp_path: Path, workers: str, seed: int) -> None:
    check(survive(tmp_path, "embedded", workers, 40, seed), 40)


@pytest.mark.detectron2
def test_killed_runs_of_the_detectron2_engine(tmp_path: Path) -> None:
    pytest.importorskip("detectron2.config", reason="needs an installed Detectron2")
    check(survive(tmp_path, "detectron2", "0,2,2,0", 4, seed=2), 4)
