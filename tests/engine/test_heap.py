"""Freed memory stays with the process, unless its user has chosen otherwise."""

from __future__ import annotations

import subprocess
import sys

import pytest

from gn_det.engine import heap

#: Page faults that the second of two equal allocations costs, in a fresh process.
_FAULTS = """
import ctypes, resource, sys
from gn_det.engine.heap import keep_freed_memory
kept = keep_freed_memory("cpu") if sys.argv[1] == "kept" else False
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def use():
    block = ctypes.c_void_p(libc.malloc(ctypes.c_size_t(100 << 20)))
    ctypes.memset(block, 1, 100 << 20)
    libc.free(block)
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
use()
print(int(kept), resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> tuple[int, int]:
    done = subprocess.run([sys.executable, "-c", _FAULTS, how], capture_output=True, text=True, check=True)
    kept, count = done.stdout.split()
    return int(kept), int(count)


def test_a_second_allocation_gets_no_new_pages() -> None:
    kept, count = faults("kept")
    if not kept:
        pytest.skip("needs glibc's mallopt, and an environment that sets no allocator")
    assert count < 10 < faults("plain")[1]


def test_what_a_user_has_set_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """And GPUs do not read the heap at every step."""
    assert not heap.keep_freed_memory("cuda:0")
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert not heap.keep_freed_memory("cpu")
