"""Files made to harm: bombs, false claims, mutations. One line, little memory, little time, nothing executed."""

from __future__ import annotations

import io
import json
import pickle
import random
import resource
import struct
import subprocess
import sys
import time
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import fuzz
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gn_det.checkpoint.sources import open_weights
from gn_det.errors import WeightsError

STATE = {"stem.conv1.weight": torch.ones(2, 3), "res2.0.conv1.weight": torch.ones(7)}
TEN_GB = 10 << 30


def refused(path: Path, content: bytes) -> str:
    """The message; within 3 s and 200 MiB."""
    path.write_bytes(content)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    with pytest.raises(WeightsError) as caught:
        open_weights(path)
    assert time.perf_counter() - start < 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10  # KiB
    message = str(caught.value)
    assert "\n" not in message and str(path) in message and len(message) < 600
    return message


def repacked(members: dict[str, bytes], how: int = zipfile.ZIP_STORED) -> bytes:
    """A torch archive with these members more, or instead."""
    source, buffer = zipfile.ZipFile(io.BytesIO(fuzz.torch_bytes(STATE))), io.BytesIO()
    root = source.namelist()[0].split("/")[0]
    contents = {name: source.read(name) for name in source.namelist()}
    contents |= {f"{root}/{name}": value for name, value in members.items()}
    with zipfile.ZipFile(buffer, "w", how) as target:
        for name, value in contents.items():
            target.writestr(name, value)
    return buffer.getvalue()


def safetensors(header: Any, body: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def entry(shape: list[int], end: int, begin: int = 0, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


# ------------------------------------------------------------------------------------------------------------- claims


@pytest.mark.parametrize("legacy", [False, True])
def test_a_view_larger_than_the_file(tmp_path: Path, legacy: bool) -> None:
    """torch.load gives it readily: a stride of 0 makes 4 TB of one number, and summing it takes hours."""
    state = STATE | {"stem.conv1.weight": torch.ones(1).expand(10**6, 10**6)}
    assert "more than the file holds" in refused(tmp_path / "x.pth", fuzz.torch_bytes(state, legacy))


def test_claims_of_ten_gigabytes(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    legacy = fuzz.torch_bytes(STATE, legacy=True)
    at = legacy.rfind(struct.pack("<q", 6))  # the length before a storage's bytes
    refused(path, legacy[:at] + struct.pack("<q", TEN_GB) + legacy[at + 8 :])
    number = legacy.find(b"K\x06", legacy.find(b"cpu"))  # the length in the pickle of a storage
    # Whether the allocator believes it or not: nothing of it is touched.
    refused(path, legacy[:number] + b"\x8a\x05" + struct.pack("<Q", TEN_GB)[:5] + legacy[number + 2 :])
    for length in (TEN_GB, 2**63, 2**64 - 1):
        assert "claims a header" in refused(path, safetensors(b"{}", length=length))
    refused(path, safetensors({"stem.conv1.weight": entry([TEN_GB // 4], TEN_GB)}, b"\0" * 8))
    blobs = pickle.dumps({"conv1_w": np.ones((2, 3), np.float32)}, 2)
    refused(tmp_path / "x.pkl", blobs.replace(b"K\x02K\x03\x86", b"J\x00\x00\x00\x7fK\x03\x86"))


def test_bombs(tmp_path: Path) -> None:
    assert "unpacks to more" in refused(
        tmp_path / "x.pth", repacked({"data/9": bytes(100 << 20)}, zipfile.ZIP_DEFLATED)
    )
    laughs = b"".join(b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(200))
    refused(tmp_path / "x.pkl", b"\x80\x02U\x01aq\x00" + laughs + b"}U\x01bh\xc8s.")
    refused(tmp_path / "x.pkl", b"\x80\x02}U\x01aI" + b"9" * 3_000_000 + b"\ns.")
    refused(tmp_path / "x.pth", safetensors(b'{"a":' + b"[" * 1_000_000 + b"]" * 1_000_000 + b"}"))


@pytest.mark.parametrize(
    "content",
    [
        b"\x01\0\0",
        safetensors({"stem.conv1.weight": entry([2], 8)}, b"\0" * 4),
        safetensors({"stem.conv1.weight": entry([2**40, 2**40], 8)}, b"\0" * 8),
        safetensors({"stem.conv1.weight": entry([2], 8), "b": entry([2], 8)}, b"\0" * 8),
        safetensors({"stem.conv1.weight": entry([2], 16, 8)}, b"\0" * 16),
        safetensors({"stem.conv1.weight": entry([-2], 8)}, b"\0" * 8),
        safetensors({"stem.conv1.weight": entry([2], 8, dtype="O")}, b"\0" * 8),
        safetensors({"stem.conv1.weight": 3}),
        safetensors({"__metadata__": {"gn_det": "{"}, "stem.conv1.weight": entry([2], 8)}, b"\0" * 8),
        safetensors({"__metadata__": {"gn_det": "[" * 100_000}, "stem.conv1.weight": entry([2], 8)}, b"\0" * 8),
        safetensors(b"{not json}"),
        safetensors({}),
    ],
)
def test_damaged_safetensors(tmp_path: Path, content: bytes) -> None:
    refused(tmp_path / "x.safetensors", content)


@pytest.mark.parametrize("kind", ["complex", "sparse", "meta"])
def test_only_plain_tensors(tmp_path: Path, kind: str) -> None:
    value = {
        "complex": torch.ones(2, dtype=torch.complex64),
        "sparse": torch.eye(3).to_sparse(),
        "meta": torch.ones(2, device="meta"),
    }[kind]
    message = refused(tmp_path / "x.pth", fuzz.torch_bytes(STATE | {"stem.conv1.weight": value}))
    assert "is not a plain tensor" in message


@pytest.mark.parametrize("name", sorted(fuzz.seeds()))
def test_every_truncation(tmp_path: Path, name: str) -> None:
    whole = fuzz.seeds()[name]
    for size in [0, 1, 2, 7, 8, 9, *range(10, len(whole), max(1, len(whole) // 40)), len(whole) - 1]:
        refused(tmp_path / "x.pth", whole[:size])


def test_a_config_of_references_in_a_checkpoint(tmp_path: Path) -> None:
    """YAML's version of the bomb: each entry names the one before nine times."""
    lines = ["- &a [x, x, x]"] + [f"- &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]" for i in range(20)]
    text = "MODEL:\n" + "\n".join(lines)
    path = tmp_path / "x.pth"
    path.write_bytes(fuzz.torch_bytes({"model": STATE, "gn_det": {"version": "1", "config": text}}))
    with pytest.raises(WeightsError, match=r"the config it stores cannot be used: it uses references"):
        open_weights(path)


# ---------------------------------------------------------------------------------------------------------- mutations


@settings(max_examples=150, deadline=5000, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(sorted(fuzz.seeds())), seed=st.integers(0, 2**32), suffix=st.sampled_from(["pkl", "pth"]))
def test_mutations(tmp_path: Path, name: str, seed: int, suffix: str) -> None:
    """Any mutated file is read or refused in one line (a long run: python tests/checkpoint/fuzz.py 20000)."""
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(fuzz.mutate(fuzz.seeds()[name], random.Random(seed)))
    assert fuzz.outcome(path) in ("read", "refused")


def test_the_mutations_reach_both_outcomes(tmp_path: Path) -> None:
    path, outcomes, corpus = tmp_path / "x.pth", Counter[str](), fuzz.seeds()
    for number, name in enumerate(sorted(corpus) * 12):
        path.write_bytes(fuzz.mutate(corpus[name], random.Random(number)))
        outcomes[fuzz.outcome(path)] += 1
    assert outcomes["read"] >= 5 and outcomes["refused"] >= 60, outcomes


@pytest.mark.slow
def test_thousands_of_mutations_under_watch() -> None:
    """In a process of its own, where an audit hook sees any execution, deletion, connection and writing."""
    script = Path(fuzz.__file__)
    result = subprocess.run([sys.executable, str(script), "6000", "7"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "6000 files: " in result.stdout and " 0 other" in result.stdout


@pytest.mark.slow
def test_the_watch_sees_what_it_should(tmp_path: Path) -> None:
    code = (
        "import fuzz, os; seen = fuzz.watch(); fuzz.seen_by_us[0] = False\n"
        f"os.system('true'); open({str(tmp_path / 'x')!r}, 'w'); print(len(seen))"
    )
    folder = Path(fuzz.__file__).parent
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, check=True)
    assert int(result.stdout) >= 2
