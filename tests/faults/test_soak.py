"""A few mutations of each kind through ``make soak``'s own code; the kills have a short version in ``test_kill``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.faults import soak, soak_images, soak_json, soak_structures, soak_weights
from tests.faults.soak_case import Case, Failure

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


@pytest.mark.parametrize(
    ("part", "size"),
    [
        (soak_json.mutations, 0.01),
        (soak_images.mutations, 0.0125),
        (soak_weights.structures, 0.01),
        (soak_weights.urls, 0.05),
    ],
)
def test_mutations_end_in_one_line_or_in_the_right_values(
    part: Callable[[Case], None], size: float, tmp_path: Path
) -> None:
    case = Case("mutations", size, tmp_path, tmp_path)
    part(case)
    _all_refused_or_right(case.figures)


def test_payload_mutations_end_in_one_line_or_are_used(tmp_path: Path) -> None:
    """In a process of its own: a fork of one that has started threads of autograd cannot run a backward pass."""
    subprocess.run([sys.executable, soak.__file__, "payloads", "--size", "0.012", "--output", tmp_path], check=True)
    _all_refused_or_right(json.loads((tmp_path / "payloads.json").read_text())["figures"])


def _all_refused_or_right(figures: Sequence[Sequence[str]]) -> None:
    outcomes = [(what, int(count)) for what, count in figures if what.startswith("  ")]
    tried = sum(int(count) for what, count in figures if what.startswith("mutations of"))
    assert sum(count for _, count in outcomes) == tried >= 30
    assert any("refused" in what for what, _ in outcomes)
    assert not any("OTHER" in what for what, _ in outcomes)


def test_hostile_structures_end_in_one_line(tmp_path: Path) -> None:
    case = Case("structures", 0.02, tmp_path, tmp_path)
    soak_structures.structures(case)
    outcomes = {what.strip(): int(count) for what, count in case.figures if what.startswith("  ")}
    assert sum(outcomes.values()) == 200 and not any("OTHER" in what for what in outcomes)
    assert {what.partition(":")[0] for what in outcomes} == {"config", "stored config", "bases", "overrides", "suite"}


def test_a_failing_part_is_told_and_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(case: Case) -> None:
        case.say("tried", 3)
        raise Failure("it differs")

    monkeypatch.setattr(soak_json, "mutations", fails)
    found = soak.run_part("json", 1.0, tmp_path)
    assert found["failed"] == "it differs" and found["figures"] == [("tried", "3")]
    text = soak.table({"json": found})
    assert "json: FAILED" in text and "it differs" in text and "not run: kills" in text
