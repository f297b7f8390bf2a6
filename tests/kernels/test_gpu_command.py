"""benchmarks/gpu.py on the CPU: order, time limit, resuming, verdicts, and what follows for MEASURED_BETTER."""

from __future__ import annotations

import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
NORMS = "met   all 69 norms: 0.9 of eager frozen BN\n{} box head: 5 us, nn.GroupNorm + ReLU 9 us\n"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("gpu")


class Fake:
    """Stands for the GPU: what each command prints."""

    def __init__(self, head: str = "met   ", fails: str = "", hangs: str = "") -> None:
        self.head, self.fails, self.hangs = head, fails, hangs
        self.ran: list[str] = []

    def __call__(self, command: Sequence[str], seconds: float) -> tuple[int | None, str]:
        words = " ".join(command)
        self.ran.append(words)
        if self.hangs and self.hangs in words:
            return None, "half"
        if self.fails and self.fails in words:
            return 1, "Traceback"
        if command[2] == "pytest":
            return 0, "\n40 passed, 1 skipped in 9 s\n"
        if "quickstart" in words:
            return 0, "Done in 1.2 min, box AP 66.8, mask AP 60.7\n"
        return (0, NORMS.format(self.head)) if "group_norm" in words else (0, "fpn training step: 42 waits\n")


def call(gpu: ModuleType, folder: Path, fake: Any, *arguments: str) -> tuple[int, dict[str, Any]]:
    output = folder / "gpu.json"
    status = gpu.main(["--quick", "--folder", str(folder / "steps"), "--output", str(output), *arguments], run=fake)
    return status, json.loads(output.read_text())


def test_all_met_gives_an_entry(gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake = Fake()
    status, result = call(gpu, tmp_path, fake)
    assert status == 0 and len(fake.ran) == len(result["steps"]) == 9 and "-m pytest" in fake.ran[0]
    assert result["measured_better"].startswith('MEASURED_BETTER: enter ("')
    assert {"device", "torch", "date"} <= set(result["environment"])
    assert "met    quickstart bf16: box and mask AP [66.8, 60.7], target 60" in capsys.readouterr().out
    assert call(gpu, tmp_path, fake)[0] == 0 and len(fake.ran) == 9  # all done: nothing runs again


def test_a_missed_target_gives_none(gpu: ModuleType, tmp_path: Path) -> None:
    status, result = call(gpu, tmp_path, Fake(head="MISSED"))
    assert status == 1 and "no entry" in result["measured_better"] and "box head" in result["measured_better"]
    status, result = call(gpu, tmp_path / "b", Fake(fails="tests/kernels"))
    assert status == 1 and "no entry" in result["measured_better"] and "kernel tests" in result["measured_better"]


def test_what_did_not_end_runs_again(gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A step that was stopped, and those for which there was no time."""
    status, result = call(gpu, tmp_path, Fake(hangs="train_step"))
    assert status == 1 and len(result["steps"]) == 6
    assert "train step: stopped at the time limit" in capsys.readouterr().out
    later = Fake()
    status, result = call(gpu, tmp_path, later)
    assert status == 0 and len(later.ran) == 3 and len(result["steps"]) == 9
    none = Fake()
    status, result = call(gpu, tmp_path / "b", none, "--minutes", "0.1")
    assert status == 1 and not none.ran and "open" in result["measured_better"]


def test_missing_wheels_are_named(
    gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu, "_installed", lambda name: name != "faster_coco_eval")
    assert gpu.main(["--quick", "--folder", str(tmp_path)]) == 2
    assert "missing packages: faster-coco-eval" in capsys.readouterr().out


@pytest.mark.parametrize("only", ["norms nchw", "kernel"])
def test_commands_run_on_a_cpu(gpu: ModuleType, tmp_path: Path, only: str) -> None:
    """The commands themselves, at tiny sizes."""
    status, result = call(gpu, tmp_path, gpu.run_command, "--only", only)
    (record,) = result["steps"].values()
    assert record["verdicts"] and record["status"] == 0, (tmp_path / "steps").glob("*.log")
    assert status == int(only == "kernel")  # without a GPU every test is skipped, which is no pass


@pytest.mark.slow
@pytest.mark.parametrize("only", ["train step compiled", "quickstart", "host waits"])
def test_slow_commands_run_on_a_cpu(gpu: ModuleType, tmp_path: Path, only: str) -> None:
    result = call(gpu, tmp_path, gpu.run_command, "--only", only)[1]
    assert all(record["status"] == 0 for record in result["steps"].values()), result
