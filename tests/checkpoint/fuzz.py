"""Mutated weights files for the readers: seeds in every real layout, mutations, and a long run with figures.

``python tests/checkpoint/fuzz.py 6000`` tries that many files and prints what became of them. Nothing may crash, hang,
run code, write a file or take memory that the file does not have.
"""

from __future__ import annotations

import io
import json
import pickle
import pickletools
import random
import resource
import struct
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save

from gn_det.checkpoint.open_weights import open_weights
from gn_det.errors import WeightsError
from tests.checkpoint.skeleton import W, backbone_shapes, caffe2_blobs, detector_shapes, random_state

_OPCODES = bytes(ord(op.code) for op in pickletools.opcodes)
# Numbers that claim too much, as they stand in pickles, zip directories and headers.
_CLAIMS = [b"\xff\xff\xff\x7f", b"\xff" * 8, struct.pack("<Q", 10 << 30), struct.pack("<I", 1 << 30), b"\x00" * 8]
#: Audit events that no reading of a file may cause.
_FORBIDDEN = (
    "os.system",
    "subprocess.Popen",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "socket.",
    "os.remove",
    "shutil.",
)


def torch_bytes(value: object, legacy: bool = False) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


@cache
def seeds() -> dict[str, bytes]:
    """A small valid file in each container and layout."""
    few = {n: s for n, s in backbone_shapes().items() if n.startswith(("stem", "res2.0", "res3.0"))}
    blobs = {n: v for n, v in caffe2_blobs(50, "gn", backbone_shapes()).items() if n.startswith(("conv1", "res2_0"))}
    state = random_state({f"backbone.bottom_up.{n}": s for n, s in few.items()})
    arrays = {n: v.numpy() for n, v in state.items()}
    layered = {
        "conv1.weight": torch.ones(W, 3, 7, 7),
        "bn1.weight": torch.ones(W),
        "layer1.0.conv1.weight": torch.ones(W, W, 1, 1),
    }
    mm = {f"backbone.{n}": v for n, v in layered.items()} | {"neck.lateral_convs.0.conv.weight": torch.ones(W, W, 1, 1)}
    meta = {"config": "mean=[1, 2, 3], std=[1, 1, 1], to_rgb=True", "CLASSES": ("a", "b")}
    head = {"rpn_cls_logits_fpn2_w": np.ones((3, W, 1, 1), np.float32), "cls_score_w": np.ones((4, W), np.float32)}
    cfg = "MODEL:\n  X: 1\nPIXEL_MEANS:\n- - - 1.0\n    - 2.0\n    - 3.0\n"
    block = {"gn_det": json.dumps({"version": "0", "class_names": ["a"], "weights": {"groups": [32, 0]}})}
    return {
        "caffe2 p2": pickle.dumps(blobs, 2),
        "caffe2 p0": pickle.dumps({n: blobs[n] for n in list(blobs)[:3]}, 0),
        "caffe2 detector": pickle.dumps({"blobs": blobs | head, "cfg": cfg}, 2),
        "detectron2 pkl": pickle.dumps({"model": arrays, "__author__": "x", "matching_heuristics": True}, 4),
        "torch zip": torch_bytes({"model": state, "iteration": 3, "gn_det": {"version": "0", "config": "MODEL: {}"}}),
        "torch legacy": torch_bytes({"model": state}, legacy=True),
        "layered": torch_bytes(layered),
        "mmdet": torch_bytes({"state_dict": mm, "meta": meta}),
        "safetensors": save(layered, {"format": "pt"}),
        "our safetensors": save(state, block),
    }


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to four edits: bytes, opcodes, claims, cuts, repeats, swaps; sometimes inside a zip's records."""
    if data[:2] == b"PK" and rng.random() < 0.5:
        return _mutate_record(data, rng)
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(out)) if len(out) > 1 else 0
        # Structure sits at the ends: the first and the last kilobyte get half of the edits.
        at = rng.choice((at, at, min(at, rng.randrange(1024)), max(0, len(out) - 1 - rng.randrange(1024))))
        kind = rng.randrange(7)
        if kind == 0:
            out[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            out[at : at + 1] = bytes([rng.choice(_OPCODES)])
        elif kind == 2:
            out[at:at] = bytes(rng.choice(_OPCODES) for _ in range(rng.randint(1, 4)))
        elif kind == 3:
            claim = rng.choice(_CLAIMS)
            out[at : at + len(claim)] = claim
        elif kind == 4:
            del out[at : at + rng.choice((1, 2, 8, 100, 10_000))]
        elif kind == 5:
            out[at:at] = out[max(0, at - rng.randint(1, 200)) : at]
        else:
            other = rng.randrange(len(out)) if out else 0
            n = rng.randint(1, 16)
            out[at : at + n], out[other : other + n] = out[other : other + n], out[at : at + n]
        if not out:
            break
    return bytes(out)


def _mutate_record(data: bytes, rng: random.Random) -> bytes:
    """Edit the records and pack them anew, so that the archive's checksums stay right."""
    source, buffer = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    pickled = [n for n in source.namelist() if n.endswith("data.pkl")]
    edited = rng.choice(pickled if rng.random() < 0.8 else source.namelist())
    how = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(buffer, "w", how) as target:
        for name in source.namelist():
            content = source.read(name)
            if name == edited and content:
                content = mutate(content, rng)
            if not (name == edited and rng.random() < 0.03):
                target.writestr(name, content)
    return buffer.getvalue()


def outcome(path: Path) -> str:
    """How reading ended: "read", or the refusal's gist; anything but a WeightsError in one line is a defect."""
    try:
        weights = open_weights(path, must_know=False)
    except WeightsError as error:
        message = str(error)
        assert "\n" not in message and len(message) < 2000, message
        return "refused"
    size = path.stat().st_size
    for name, value in weights.state.items():
        assert value.numel() * value.element_size() <= size, f"{name}: {tuple(value.shape)} from {size} bytes"
        value.double().sum()  # what loading does with it: must neither hang nor fault
    return "read"


def watch() -> list[str]:
    """Record forbidden audit events from now on."""
    seen: list[str] = []

    def hook(event: str, args: tuple[object, ...]) -> None:
        writes = event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")
        if (event.startswith(_FORBIDDEN) or writes) and not seen_by_us[0]:
            seen.append(f"{event} {args}")

    sys.addaudithook(hook)
    return seen


seen_by_us = [True]  # our own writing of the files is not watched


def run(files: int, seed: int = 0, say: Callable[[str], None] = print) -> Counter[str]:
    """Try ``files`` mutated files; returns counts by seed file and outcome.

    Raises:
        AssertionError: a crash, an execution, a hang over 5 s, or memory beyond a constant.
    """
    rng, corpus, counts = random.Random(seed), seeds(), Counter[str]()
    detector = random_state(detector_shapes())
    assert detector  # the readers' own imports happen before the watch
    slowest, names = 0.0, sorted(corpus)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.pkl"
        for name in names:
            path.write_bytes(corpus[name])
            assert outcome(path) == "read", name
        events = watch()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number in range(files):
            name = names[number % len(names)]
            path = Path(folder) / ("x.pkl" if rng.random() < 0.5 else "x.pth")
            data = mutate(corpus[name], rng)
            seen_by_us[0] = True
            path.write_bytes(data)
            seen_by_us[0] = False
            start = time.process_time()
            try:
                result = outcome(path)
            except BaseException:
                Path("fuzz_failure.bin").write_bytes(data)
                say(f"file {number} of {name}: kept as fuzz_failure.bin")
                raise
            finally:
                seen_by_us[0] = True
            elapsed = time.process_time() - start
            slowest = max(slowest, elapsed)
            assert elapsed < 5, f"{name}: {elapsed:.1f} s of CPU"
            assert not events, events[:3]
            counts[f"{name}: {result}"] += 1
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 500, f"{grown:.0f} MiB"
    total = Counter({k: sum(v for n, v in counts.items() if n.endswith(k)) for k in ("read", "refused")})
    say(
        f"{files} files: {total['read']} read, {total['refused']} refused, 0 other; "
        f"slowest {slowest:.2f} s of CPU, {grown:.0f} MiB grown"
    )
    for name in names:
        say(f"  {name:18s}{counts[f'{name}: read']:6d} read {counts[f'{name}: refused']:6d} refused")
    return counts


if __name__ == "__main__":
    # A claim that is believed fails at once instead of filling the machine.
    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
    run(int(sys.argv[1]) if len(sys.argv) > 1 else 6000, int(sys.argv[2]) if len(sys.argv) > 2 else 0)
