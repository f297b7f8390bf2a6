"""The kernels compile for a real GPU (Hopper), which needs none: 16-byte loads where sizes allow, and no atomics."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton.compiler", reason="Triton is not installed")

SCRIPT = """
import inspect, json, sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from gn_det.kernels import triton_kernels
found = {}
for name, case, constants in json.loads(sys.argv[1]):
    kernel = getattr(triton_kernels, name)
    maps = ("x_ptr", "res_ptr", "y_ptr", "dy_ptr", "out_ptr", "dres_ptr", "dx_ptr")
    kinds = {n: "*bf16" if n in maps else "*fp32" if n.endswith("_ptr") else "fp32" if n == "eps" else "i32"
             for n in kernel.arg_names}
    kinds |= {n: "constexpr" for n in constants}
    aligned = {(k,): [["tt.divisibility", 16]] for k, n in enumerate(kernel.arg_names) if n.endswith("_ptr")}
    if "constexprs" in inspect.signature(ASTSource).parameters:
        source = ASTSource(fn=kernel, signature=kinds, constexprs=constants, attrs=aligned)
    else:  # Triton 3.2, the one of torch 2.6
        from triton.backends.compiler import AttrsDescriptor
        kinds = {n: kind for n, kind in kinds.items() if n not in constants}
        hints = AttrsDescriptor.from_hints({place: 16 for (place,) in aligned})
        source = ASTSource(fn=kernel, signature=kinds, constants=constants, attrs=hints)
    found[case] = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]
print(json.dumps(found))
"""
NCHW = {"LAST": False, "VEC": True, "BC": 1, "BP": 2048}
LAST = {"LAST": True, "VEC": True, "BC": 64, "BP": 32}
ROI = {"LAST": True, "VEC": True, "BC": 64, "BP": 64}
CASES = [
    ("stats_kernel", "stats nchw", NCHW),
    ("apply_kernel", "apply nchw", NCHW | {"MERGE": True, "RES": True, "RELU": True, "BK": 128}),
    ("backward_sums_kernel", "sums channels_last", LAST | {"MASK": 2, "DRES": True}),
    ("backward_dx_kernel", "dx channels_last", LAST | {"MASK": 1}),
    ("small_backward_kernel", "roi channels_last", ROI | {"MASK": 1, "DRES": False, "SUMS": True}),
    ("merge_kernel", "merge", {"BK": 128}),
    ("backward_merge_kernel", "backward merge", {"BK": 128, "BC": 16}),
]


def test_loads_are_vectors_and_nothing_is_atomic(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", SCRIPT, json.dumps(CASES)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for case, ptx in json.loads(done.stdout).items():
        assert not re.search(r"\b(atom|red)\.", ptx), case
        if "merge" not in case:
            assert "ld.global.v4.b32" in ptx, case
            assert not re.search(r"(ld|st)\.global\.b16", ptx), case
