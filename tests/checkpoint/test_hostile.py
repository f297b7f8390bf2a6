"""Files made to harm: bombs, false claims, mutations. One line, little memory, little time, nothing executed."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import random
import resource
import struct
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gn_det.checkpoint.compatibility import describe
from gn_det.checkpoint.convert import convert
from gn_det.checkpoint.io import read_checkpoint
from gn_det.checkpoint.open_weights import open_weights
from gn_det.cli import main
from gn_det.errors import WeightsError, WriteError
from tests.checkpoint import fuzz
from tests.faults.soak_weights import Pickle

STATE = {"stem.conv1.weight": torch.ones(2, 3), "res2.0.conv1.weight": torch.ones(7)}
TEN_GB = 10 << 30


def refused(path: Path, content: bytes) -> str:
    """The message; within 200 MiB."""
    path.write_bytes(content)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(WeightsError) as caught:
        open_weights(path)
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
    with pytest.raises(WeightsError, match=r"the config it stores line .*: more than 50000 values, aliases included"):
        open_weights(path)


# --------------------------------------------------------------------------------------------------------- structures

WRITER = Pickle(random.Random(0), [("0", 6)])
TOWER = WRITER.tower(60, shared=True)  # 2**60 places, whose hash and text take for ever
TENSOR = WRITER.named("torch._utils", "_rebuild_tensor_v2")
HOOKS = WRITER.named("collections", "OrderedDict") + b")R"


def rebuilt(
    size: tuple[int, ...],
    stride: tuple[int, ...],
    offset: int = 0,
    numel: int = 6,
    kind: str = "Float",
    key: str = "0",
) -> bytes:
    """Opcodes of a tensor over the storage ``key`` as torch writes them."""
    w = WRITER
    pid = w.tuple(w.text("storage"), w.named("torch", f"{kind}Storage"), w.text(key), w.text("cpu"), w.integer(numel))
    parts = (pid + b"Q", w.integer(offset), w.ints(*size), w.ints(*stride), b"\x89", HOOKS)
    return TENSOR + w.tuple(*parts) + b"R"


def pickled(value: bytes, key: bytes = WRITER.text("stem.conv1.weight")) -> bytes:
    return b"\x80\x02" + WRITER.dict([(WRITER.text("model"), WRITER.dict([(key, value)]))]) + b"."


def array(shape: bytes, dtype: bytes) -> bytes:
    w = WRITER
    made = w.named("numpy.core.multiarray", "_reconstruct") + w.tuple(w.named("numpy", "ndarray"), w.ints(0), b"C\x01b")
    return made + b"R" + w.tuple(b"K\x01", shape, dtype, b"\x89", b"C\x08" + b"\0" * 8) + b"b"


F4 = WRITER.named("numpy", "dtype") + WRITER.tuple(WRITER.text("f4"), b"\x89", b"\x88") + b"R"
HANGS = {
    "key": pickled(b"N", TOWER),
    "keys of an ordered dict": pickled(WRITER.named("collections", "OrderedDict") + b"](" + TOWER + b"K\x01\x86e\x85R"),
    "shape": pickled(array(TOWER, F4)),
    "dtype": pickled(WRITER.named("numpy", "dtype") + TOWER + b"\x89\x88\x87R"),
    "order": pickled(array(b"K\x02\x85", F4 + WRITER.tuple(b"K\x03", TOWER, b"N", b"N", b"N", b"K\x00") + b"b")),
    "levels": b"\x80\x02)" + b"\x85" * 3_000_000 + b".",
    "levels of marks": b"\x80\x02" + b"(" * 400_000 + b"t" * 400_000 + b".",
    "persistent id": pickled(TOWER + b"Q"),
    "parts of a persistent id": pickled(WRITER.tuple(TOWER, TOWER, TOWER, TOWER, TOWER) + b"Q"),
    "sizes of a tensor": pickled(TENSOR + WRITER.tuple(b"N", TOWER, TOWER, TOWER, b"\x89", HOOKS) + b"R"),
    "class names": pickled(TOWER, WRITER.text("class_names")).replace(b"model", b"gn_det"),
    "a list in itself": pickled(b"]q\x01h\x01a"),
    "a dict in itself": pickled(b"}q\x01" + WRITER.text("x") + b"h\x01s"),
    "an integer of a megabyte": pickled(b"\x8b" + struct.pack("<i", 1 << 20) + b"\x7f" * (1 << 20)),
    "a name of 20 MB": pickled(b"N", b"X" + struct.pack("<I", 20 << 20) + b"n" * (20 << 20)),
    "opcodes": b"\x80\x02(" + b"N" * 5_000_000 + b"t.",
    "lists": b"\x80\x02(" + b"]" * 400_000 + b"l(" + b"]" * 400_000 + b"l\x86.",
    "copies": b"\x80\x02(X" + struct.pack("<I", 1 << 20) + b"t" * (1 << 20) + b"q\x000"
    + (WRITER.named("_codecs", "encode") + b"h\x00\x85R") * 3000 + b"l.",
}  # fmt: skip
READ_ALL = """
import pathlib, re, resource, sys
from gn_det.checkpoint.open_weights import read_weights
from gn_det.errors import WeightsError, WriteError
resource.setrlimit(resource.RLIMIT_CPU, (100, 100))
for path in sorted(pathlib.Path(sys.argv[1]).iterdir()):
    before = sum(resource.getrusage(resource.RUSAGE_SELF)[:2])
    try:
        read_weights(path)
        print("READ", path)
    except WeightsError as error:
        assert "\\n" not in str(error) and len(str(error)) < 600, error
        used = sum(resource.getrusage(resource.RUSAGE_SELF)[:2]) - before
        print("refused" if used < 5 else f"{used:.1f} s of CPU", path)
# ru_maxrss would count the process that started this one, too
grown = int(re.search("VmHWM:\\s*([0-9]+) kB", pathlib.Path("/proc/self/status").read_text())[1])
print("memory" if grown < 1 << 20 else f"{grown} KiB", path)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the memory of a process in /proc")
def test_small_files_that_hang_other_readers(tmp_path: Path) -> None:
    """Each as a pickle, in an archive, and in the stream of old torch; 5 s of CPU for each, 1 GB for all."""
    legacy = b"".join(pickle.dumps(v, 2) for v in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    for number, content in enumerate(HANGS.values()):
        (tmp_path / f"{number}.pth").write_bytes(repacked({"data.pkl": content}))
        if len(content) < 300_000:  # the long ones cost some time; they need not do it three times
            (tmp_path / f"{number}.pkl").write_bytes(content)
            (tmp_path / f"{number}.old.pth").write_bytes(legacy + content)
    command = [sys.executable, "-c", READ_ALL, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout[-300:] + done.stderr[-1000:]
    assert Counter(line.split()[0] for line in done.stdout.splitlines()) == {
        "refused": len(list(tmp_path.iterdir())),
        "memory": 1,
    }


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (rebuilt((2, 3), (3, 1)), ""),
        (rebuilt((3, 2), (1, 3)), ""),
        (rebuilt((0, 3), (3, 1)), ""),
        (rebuilt((2, 3), (3, 1), offset=1), "more than the file holds"),
        (rebuilt((2, 3), (1, 1)), "more than the file holds"),
        (rebuilt((2, 3), (0, 0)), "more than the file holds"),
        (rebuilt((2, 3), (-3, 1)), "more than the file holds"),
        (rebuilt((2, -3), (3, 1)), "more than the file holds"),
        (rebuilt((2,), (3, 1)), "more than the file holds"),
        (rebuilt((2**40, 2**40), (2**40, 1)), "more than the file holds"),
        (rebuilt((0, 2**40, 2**40), (1, 1, 1)), "more than the file holds"),
        (rebuilt((1,) * 40, (1,) * 40), "more than the file holds"),
        (rebuilt((2, 3), (3, 1), offset=-1), "more than the file holds"),
        (rebuilt((2, 3), (3, 1), offset=2**62), "more than the file holds"),
        (rebuilt((2, 3), (3, 1), numel=7), "claims 28 bytes, its record has 24"),
        (rebuilt((2, 3), (3, 1), numel=-1), "claims -4 bytes"),
        (rebuilt((2, 3), (3, 1), numel=2**200), "claims 6427752177"),
        (rebuilt((2, 3), (3, 1), kind="Double"), "claims 48 bytes, its record has 24"),
        (rebuilt((2, 3), (3, 1), kind="ComplexFloat"), "is not a plain tensor"),
        (WRITER.named("torch._utils", "_rebuild_wrapper_subclass") + b")R", "is not a plain tensor"),
        (WRITER.named("torch._utils", "_rebuild_nested_tensor") + b")R", "is not a plain tensor"),
        (WRITER.named("torch._tensor", "_rebuild_from_type_v2") + b")R", "is not a plain tensor"),
        (WRITER.named("torch", "FloatStorage") + b")R", "not callable"),
        (WRITER.named("builtins", "set") + b"]\x85R", "could run code"),
        (WRITER.named("collections", "OrderedDict") + b"]K\x01a\x85R", "not iterable"),
        (WRITER.named("collections", "Counter") + b"]K\x01a\x85R", "no attribute 'items'"),
    ],
)
def test_what_a_file_of_torch_may_claim(tmp_path: Path, value: bytes, expected: str) -> None:
    content = repacked({"data.pkl": pickled(value), "data/0": np.arange(6, dtype=np.float32).tobytes()})
    if expected:
        assert expected in refused(tmp_path / "x.pth", content)
        return
    (tmp_path / "x.pth").write_bytes(content)
    read = open_weights(tmp_path / "x.pth").state["stem.conv1.weight"]
    numbers = np.arange(6.0).reshape(2, 3)
    assert read.tolist() in (numbers.tolist(), numbers.ravel().reshape(2, 3).T.tolist(), [])


@pytest.mark.parametrize(("more", "good"), [(b"", True), (b"N", True), (b"K\x01", False), (b"NN", False)])
def test_a_storage_is_named_as_torch_names_it(tmp_path: Path, more: bytes, good: bool) -> None:
    """Five parts, or None as a sixth, which old versions write for a view."""
    pid = rebuilt((6,), (1,)).replace(b"tQ", more + b"tQ")
    (tmp_path / "x.pth").write_bytes(repacked({"data.pkl": pickled(pid), "data/0": bytes(24)}))
    if good:
        assert open_weights(tmp_path / "x.pth").state["stem.conv1.weight"].tolist() == [0.0] * 6
    else:
        with pytest.raises(WeightsError, match="refers to a storage in a way that torch"):
            open_weights(tmp_path / "x.pth")


def test_limits_hold_at_their_edges(tmp_path: Path) -> None:
    """What is just inside a limit is read."""
    for name, good, bad in (
        ("levels", b")" + b"\x85" * 62, b")" + b"\x85" * 64),
        ("integer", WRITER.integer(2**254), WRITER.integer(2**256)),
        ("key", b"}" + WRITER.text("k" * 512) + b"Ns", b"}" + WRITER.text("k" * 513) + b"Ns"),
        ("number as key", b"}" + WRITER.integer(2**63 - 1) + b"Ns", b"}" + WRITER.integer(2**63) + b"Ns"),
        ("float as key", b"}K\x01Ns", b"}G" + b"\0" * 8 + b"Ns"),
    ):
        for value in (good, bad):
            items = [(WRITER.text("w"), rebuilt((6,), (1,))), (WRITER.text("x"), value)]
            content = b"\x80\x02" + WRITER.dict(items) + b"."
            path = tmp_path / "x.pth"
            path.write_bytes(repacked({"data.pkl": content, "data/0": bytes(24)}))
            if value is good:
                assert list(read_checkpoint(path)) == ["w", "x"], name
            else:
                with pytest.raises(WeightsError, match=r"no weights file does|keys are short"):
                    read_checkpoint(path)


def test_places_behind_counters_count(tmp_path: Path) -> None:
    """30 levels of a Counter that holds the one before twice."""
    item = WRITER.named("collections", "Counter") + b"}" + b"".join(WRITER.text(k) + b"h\x01s" for k in "ab") + b"\x85R"
    content = pickled(b"K\x01q\x010" + (item + b"q\x010") * 30 + b"h\x01")
    assert "holds more than 500000 values" in refused(tmp_path / "x.pth", repacked({"data.pkl": content}))


def test_a_record_that_lacks_one_byte(tmp_path: Path) -> None:
    content = {"data.pkl": pickled(rebuilt((2, 3), (3, 1))), "data/0": bytes(23)}
    assert "claims 24 bytes, its record has 23" in refused(tmp_path / "x.pth", repacked(content))


def test_a_storage_has_one_length(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    floats, numbers = rebuilt((6,), (1,)), rebuilt((6,), (1,), kind="Int")
    big = {"byteorder": b"big", "data/0": bytes(24)}
    for second, more, expected in (
        (numbers, {"data/0": bytes(24)}, ""),
        (floats, big, ""),
        (numbers, big, ""),
        (rebuilt((2,), (1,), numel=2), {"data/0": bytes(24)}, "gives two lengths to one storage"),
    ):
        items = [(WRITER.text(name), value) for name, value in (("a", floats), ("b", second))]
        path.write_bytes(repacked({"data.pkl": b"\x80\x02" + WRITER.dict(items) + b".", **more}))
        if expected:
            with pytest.raises(WeightsError, match=expected):
                read_checkpoint(path)
        else:
            assert list(read_checkpoint(path)) == ["a", "b"]


def test_storages_of_an_old_file_are_no_more_than_it_has(tmp_path: Path) -> None:
    """Each claims less than the file has; they are made before their contents are read."""
    legacy = b"".join(pickle.dumps(v, 2) for v in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}))
    items = [(WRITER.text(str(n)), rebuilt((1000,), (1,), numel=1000, key=str(n))) for n in range(3)]
    content = legacy + b"\x80\x02" + WRITER.dict([(WRITER.text("model"), WRITER.dict(items))]) + b"." + bytes(6000)
    assert "its tensors claim 8000 bytes, the file has" in refused(tmp_path / "x.pth", content)
    other = legacy.replace(b"\x88s.", b"\x89s.")
    assert other != legacy and "another byte order" in refused(tmp_path / "x.pth", other + content[len(legacy) :])
    strange = b"".join(pickle.dumps(v, 2) for v in (0x1950A86A20F9469CFC6C, 1001, ["little_endian"]))
    assert "torch.save did not write it" in refused(tmp_path / "x.pth", strange + content[len(legacy) :])


def test_programs_and_records_that_share_their_bytes(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    assert "is a TorchScript program" in refused(path, repacked({"constants.pkl": b"\x80\x02)."}))
    buffer = io.BytesIO(repacked({"data/0": bytes(100_000)}))
    with zipfile.ZipFile(buffer, "a") as archive:
        whole = next(record for record in archive.filelist if record.file_size == 100_000)
        for number in range(3):
            archive.filelist.append(copy.copy(whole))
            archive.filelist[-1].filename = f"{whole.filename}{number}"
        archive._didModify = True  # type: ignore[attr-defined]
    assert "it unpacks to more than its size" in refused(path, buffer.getvalue())


class _Subclass(torch.Tensor):
    pass


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (lambda: torch.ones(2, dtype=torch.complex64), "is not a plain tensor"),
        (lambda: torch.eye(3).to_sparse(), "is not a plain tensor"),
        (lambda: torch.ones(2, device="meta"), "is not a plain tensor"),
        (lambda: torch.ones(3).as_strided((2, 2), (1, 1)), ""),
        (lambda: torch.eye(3).to_sparse_csr(), ""),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8), ""),
        (lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), ""),
        (lambda: torch.ones(2).as_subclass(_Subclass), ""),
        (lambda: torch.ones(2).to(torch.float8_e4m3fn), ""),
        (lambda: np.float64(3), ""),
    ],
    ids=["complex", "sparse", "meta", "overlapping", "csr", "quantized", "nested", "subclass", "float8", "numpy"],
)
def test_only_tensors_of_numbers(tmp_path: Path, value: Callable[[], object], expected: str) -> None:
    assert expected in refused(tmp_path / "x.pth", fuzz.torch_bytes(STATE | {"stem.conv1.weight": value()}))


@pytest.mark.parametrize("how", ["pth", "pkl"])
def test_one_tensor_under_400_names(tmp_path: Path, how: str) -> None:
    """20 GB out of 40 MB, in the small. Tied weights under two names are read."""
    big = torch.ones(1000)
    for names in (2, 400):
        state = {"stem.conv1.weight": big} | {f"res2.{n}.conv1.weight": big for n in range(1, names)}
        arrays = dict.fromkeys(state, big.numpy())
        path = tmp_path / f"x.{how}"
        path.write_bytes(fuzz.torch_bytes(state) if how == "pth" else pickle.dumps({"model": arrays}))
        if names == 2:
            assert convert(path, tmp_path / "y.pth").tensors == 2
            continue
        with pytest.raises(WeightsError, match="claim more than 4 times its size"):
            convert(path, tmp_path / "z.pth")
    assert not (tmp_path / "z.pth").exists()


def test_odd_archives(tmp_path: Path) -> None:
    whole = repacked({})
    path = tmp_path / "x.pth"
    end, entry = whole.rfind(b"PK\x05\x06"), whole.find(b"PK\x01\x02")

    def changed(at: int, form: str, value: int) -> bytes:
        out = bytearray(whole)
        struct.pack_into(form, out, at, value)
        return bytes(out)

    path.write_bytes(whole)
    assert open_weights(path).state
    for at, form, value in (
        (end + 12, "<I", 2**31), (end + 16, "<I", 2**31), (entry + 42, "<I", 2**31), (entry + 24, "<I", 2**31),
        (entry + 20, "<I", 5), (entry + 42, "<I", 1), (entry + 10, "<H", 8),
    ):  # fmt: skip
        refused(path, changed(at, form, value))
    buffer = io.BytesIO(whole)
    with zipfile.ZipFile(buffer, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(archive.namelist()[0], b"\x80\x02}.")
    assert "is damaged (record " in refused(path, buffer.getvalue())
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for number in range(1000):
            archive.writestr(f"{number:05000}", b"")
    assert "the directory of the archive has" in refused(path, buffer.getvalue())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_only_regular_files(tmp_path: Path) -> None:
    pipe, good = tmp_path / "pipe.pth", tmp_path / "x.pth"
    os.mkfifo(pipe)
    good.write_bytes(fuzz.torch_bytes(STATE))
    for path, what in ((pipe, "a named pipe"), (Path("/dev/zero"), "a device"), (tmp_path, "is a folder")):
        for read in (
            open_weights,
            read_checkpoint,
            partial(convert, target=tmp_path / "y.pth"),
            lambda p: describe(str(p)),
        ):
            with pytest.raises(WeightsError, match=what):
                read(path)
    for target in (pipe, tmp_path / "y.pth" / "\0.pth", tmp_path / ("n" * 300 + ".pth")):
        with pytest.raises(WriteError, match="cannot be written"):
            convert(good, target)
    assert pipe.is_fifo() and not (tmp_path / "y.pth").exists()


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        ({"class_names": ["x"] * 20_001}, "has 20001 class names, the longest of 1 characters"),
        ({"class_names": ["x" * 1001]}, "has 1 class names, the longest of 1001 characters"),
        ({"provenance": ["x" * 100_000] * 100}, "more than 8388608 characters of text"),
        ({"weights": torch.ones(2)}, "Object of type Tensor is not JSON serializable"),
        ({"config": "a: " + "9" * 5000}, "a number of 5000 characters"),
        ({"config": "[" * 40 + "]" * 40}, "more than 32 levels of nesting"),
        ({"config": "x" * 600_001}, "is larger than 512 kB"),
    ],
)
def test_metadata_are_bounded(tmp_path: Path, block: dict[str, Any], expected: str) -> None:
    assert expected in refused(tmp_path / "x.pth", fuzz.torch_bytes({"model": STATE, "gn_det": block}))


def test_metadata_never_reach_the_terminal_raw(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = "\x1b[2J\r\nfake line\u202e"
    needs = {"format": evil, "pixel_mean": [1.0] * 3, "pixel_std": [1.0] * 3}
    block = {
        "version": evil,
        "class_names": [evil, "ü"],
        "weights": {"preprocessing": needs, "norm": evil, "groups": [32, 0]},
        "provenance": [{"source": evil, "sha256": evil, "kind": evil}, {"trained": True, "kind": evil, "epoch": evil}],
    }
    path = tmp_path / "x.pth"
    path.write_bytes(fuzz.torch_bytes({"model": STATE | {f"res3.{evil}.conv1.weight": torch.ones(1)}, "gn_det": block}))
    assert main(["weights", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "fake line" in printed and "ü" in printed
    assert all(line.isprintable() and not line.startswith("fake") for line in printed.splitlines())


def test_integers_in_json(tmp_path: Path) -> None:
    """float(10**400) raises what nobody expects."""
    header = {"__metadata__": {"gn_det": '{"best_metric": 1' + "0" * 400 + "}"}, "stem.conv1.weight": entry([2], 8)}
    assert "an integer of more than 256 bits" in refused(tmp_path / "x.safetensors", safetensors(header, b"\0" * 8))


# ---------------------------------------------------------------------------------------------------------- mutations


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
