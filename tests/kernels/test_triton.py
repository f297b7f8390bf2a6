"""The Triton kernels under Triton's interpreter on the CPU; tests/kernels/interpreted.py holds the cases.

TRITON_INTERPRET must be set before Triton is imported, and would change what other tests of this process run on: the
cases run in one process of their own.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels.interpreted import CASES

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
if tuple(map(int, importlib.metadata.version("triton").split(".")[:2])) < (3, 3):
    pytest.skip("the interpreter of this Triton does not run with a present NumPy", allow_module_level=True)


@pytest.fixture(scope="module")
def results() -> dict[str, str]:
    """{case: traceback, or "" where it passed}."""
    script = Path(__file__).with_name("interpreted.py")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, str] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("name", CASES)
def test_interpreted(name: str, results: dict[str, str]) -> None:
    assert not results[name], results[name]
