"""benchmarks/classifier.py runs, and its numbers are ratios of what was timed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "classifier.py"


@pytest.mark.slow
def test_benchmark_of_the_classifier(tmp_path: Path) -> None:
    output = tmp_path / "classifier.json"
    subprocess.run([sys.executable, str(SCRIPT), "--quick", "--output", str(output)], capture_output=True, check=True)
    found = json.loads(output.read_text())
    ratio = np.median(np.array(found["loop"]["bare"]) / np.array(found["loop"]["ours"]))
    assert found["loop"]["relative_speed"][1] == pytest.approx(ratio, abs=1e-3) and len(found["loop"]["ours"]) == 2
    assert [row["batch"] for row in found["norms"]] == [32, 4] and len(found["record"]) == 3
    for row in found["record"]:
        assert row["share"] == pytest.approx(np.median(row["look"]) / np.median(row["step"]) / row["every"])
