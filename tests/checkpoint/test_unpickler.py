"""The restricted unpickler: reads what weights files hold, refuses the rest by name, executes nothing."""

from __future__ import annotations

import mmap
import os
import pickle
import struct
import tracemalloc
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest

from gn_det.checkpoint.io import read_any
from gn_det.checkpoint.unpickler import Refused, Stream
from gn_det.errors import WeightsError


def refused(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    with pytest.raises(WeightsError) as caught:
        read_any(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_equals_pickle(tmp_path: Path, protocol: int) -> None:
    shared = np.arange(6, dtype=np.float32).reshape(2, 3)
    value = {
        "model": OrderedDict([("a", shared), ("again", shared)]),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "other order": np.arange(24.0).reshape(2, 3, 4).transpose(2, 0, 1),
        "big endian": np.arange(3, dtype=">i4"),
        "dtypes": [np.arange(3).astype(t) for t in ("bool", "u1", "i8", "f2", "f8")],
        "large": np.random.default_rng(0).random((50, 7)),
        "empty": np.zeros((0, 4), np.float32),
        "zero-d": np.array(3.5),
        "scalar": np.float32(2.5),
        "plain": (1, -2, 2**70, 2.5, True, None, "ü", b"\xff\x00", [], {}, (1,)),
    }
    path = tmp_path / "x.pkl"
    path.write_bytes(pickle.dumps(value, protocol))
    read = read_any(path)
    assert read["plain"] == value["plain"] and read["scalar"] == 2.5 and read["scalar"].dtype == np.float32
    assert isinstance(read["model"], OrderedDict) and read["model"]["a"] is read["model"]["again"]
    for a, b in [
        *[(read[k], value[k]) for k in ("fortran", "other order", "big endian", "large", "empty", "zero-d")],
        *zip(read["dtypes"], value["dtypes"]),
        (read["model"]["a"], shared),
    ]:
        assert a.dtype == b.dtype and a.shape == b.shape and np.array_equal(a, b)


def test_python2_pickle(tmp_path: Path) -> None:
    """Python 2's protocol 2: names and array contents are byte strings (opcodes U and T)."""

    def text(s: bytes) -> bytes:
        return b"U" + bytes([len(s)]) + s if len(s) < 256 else b"T" + struct.pack("<i", len(s)) + s

    def array(values: np.ndarray) -> bytes:
        (n,) = values.shape
        return (
            b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85" + text(b"b") + b"\x87R"
            b"(K\x01K" + bytes([n]) + b"\x85cnumpy\ndtype\n" + text(b"f4") + b"K\x00K\x01\x87R"
            b"(K\x03"
            + text(b"<")
            + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
            + text(values.tobytes())
            + b"tb"
        )

    # Short and long contents, and bytes above 127.
    a, b = np.array([-1.5, np.pi], np.float32), np.random.default_rng(1).random(200).astype(np.float32)
    content = b"\x80\x02}(" + text(b"conv1_w") + array(a) + text(b"long") + array(b) + text(b"caf\xe9") + b"K\x01u."
    path = tmp_path / "x.pkl"
    path.write_bytes(content)
    oracle = pickle.loads(content, encoding="latin1")
    read = read_any(path)
    assert read.keys() == oracle.keys() == {"conv1_w", "long", "café"}
    assert np.array_equal(read["conv1_w"], a) and np.array_equal(read["long"], b)
    assert np.array_equal(oracle["long"], b)


class _Calls:
    """Pickles to a call of ``function``."""

    def __init__(self, function: object, *args: object) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple:
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_code_is_named_and_not_run(tmp_path: Path, protocol: int) -> None:
    ran = tmp_path / "ran"
    for function, args, name in (
        (os.system, (f"touch {ran}",), "posix.system"),
        (eval, (f"open({str(ran)!r}, 'w')",), "builtins.eval"),
        (open, (str(ran), "w"), "io.open"),
        (getattr, (os, "getcwd"), "builtins.getattr"),
        (np.load, (str(ran),), "numpy.load"),
        (bytearray, (10**12,), "bytearray"),
    ):
        try:
            content = pickle.dumps({"model": _Calls(function, *args)}, protocol)
        except TypeError:  # modules do not pickle: write the call by hand
            content = b"cbuiltins\ngetattr\n."
        message = refused(tmp_path / "x.pkl", content)
        assert name in message.replace("__builtin__", "builtins"), message
    assert not ran.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"(S'touch /tmp/x'\nios\nsystem\n.",  # INST
        b"(cos\nsystem\nS'x'\no.",  # OBJ
        b"\x80\x02cos\nsystem\n)\x81.",  # NEWOBJ
        b"Pid\n.",  # PERSID
        b"\x82\x01.",  # EXT1
        b"\x80\x05\x8f.",  # EMPTY_SET
        b"cnumpy\nndarray\n(J\xff\xff\xff\x7ftR.",  # numpy.ndarray(2**31 - 1)
        b"cnumpy\ndtype\nS'O'\n\x85R.",  # object arrays hold arbitrary objects
        b"cnumpy\ndtype\nS'V999999999'\n\x85R.",
        b"cnumpy\nndarray\n}b.",  # state on a constructor
        b"cnumpy\nndarray\nN}S'__doc__'\nS'x'\ns\x86b.",
        b"]]b.",
        b"]\x85R.",  # calls a list
        b"c_codecs\nencode\nX\x01\x00\x00\x00aX\x05\x00\x00\x00utf16\x86R.",
    ],
)
def test_everything_else_is_refused(tmp_path: Path, content: bytes) -> None:
    refused(tmp_path / "x.pkl", content)


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x02T\xff\xff\xff\x7f.",  # BINSTRING of 2 GB
        b"\x80\x04\x8e" + struct.pack("<Q", 10**13) + b".",  # BINBYTES8 of 10 TB
        b"\x80\x05\x96" + struct.pack("<Q", 10**13) + b".",  # BYTEARRAY8
        b"\x80\x04\x95" + struct.pack("<Q", 10**13) + b".",  # FRAME
        b"\x80\x02\x8b\xff\xff\xff\x7f.",  # LONG4
        b"\x80\x02]r\xff\xff\xff\xff.",  # memo index 2**32 - 1: a table of 32 GB in the C unpickler
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n(J\xff\xff\xff\x7ftU\x01b\x87R.",
        b"(" * 100_000 + b".",
        b"]" * 100_000 + b"a" * 99_999 + b".",
    ],
)
def test_absurd_claims_cost_nothing(tmp_path: Path, content: bytes) -> None:
    """Nothing is made that the file does not have: the largest number of bytes in use stays small."""
    tracemalloc.start()
    try:
        refused(tmp_path / "x.pkl", content)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


def test_long_texts_are_read_and_long_numbers_refused(tmp_path: Path) -> None:
    """Old pickles keep arrays as latin1 text; parsing a decimal number takes quadratic time."""
    path, letters = tmp_path / "x.pkl", b"a" * (1 << 20)
    for text in (b"V\xff" + letters + b"\n", b"X" + struct.pack("<I", (1 << 20) + 2) + "\xff".encode() + letters):
        path.write_bytes(b"\x80\x02}K\x01" + text + b"s.")
        assert read_any(path) == {1: "\xff" + letters.decode()}
    for number in (b"I", b"L"):
        refused(path, number + b"1" * 1_000_000 + b"\n.")


def test_a_part_of_a_file_ends_where_it_ends(tmp_path: Path) -> None:
    """To the byte: what follows a record of an archive is not the record's."""
    path = tmp_path / "x"
    path.write_bytes(b"0123456789\n")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        assert Stream(mapped, 2, 5).read(5) == b"23456"
        for read in (lambda stream: stream.read(6), lambda stream: stream.readline()):
            with pytest.raises(Refused):
                read(Stream(mapped, 2, 5))
        assert Stream(mapped).readline() == b"0123456789\n"


def test_shape_and_contents_must_agree(tmp_path: Path) -> None:
    good = pickle.dumps({"w": np.ones((2, 3), np.float32)}, 2)
    bad = good.replace(b"K\x02K\x03\x86", b"K\x02K\x04\x86")
    assert bad != good
    assert "size 6 into shape (2,4)" in refused(tmp_path / "x.pkl", bad)
    bad = good.replace(b"K\x02K\x03\x86", b"K\x01K\x03\x86")
    assert "size 6 into shape (1,3)" in refused(tmp_path / "x.pkl", bad)
    refused(tmp_path / "x.pkl", pickle.dumps({"w": np.array([object, None], dtype=object)}, 2))
    refused(tmp_path / "x.pkl", pickle.dumps({"w": np.zeros(2, dtype=[("a", "f4")])}, 2))


def test_a_dtype_that_changes_after_its_array_leaves_the_array_alone(tmp_path: Path) -> None:
    """And numpy's own dtype, which every array of the process shares."""
    order = b"h\x05(K\x03X\x01\x00\x00\x00>NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85C\x01btR(K\x01K\x02\x85h\x05\x89C\x08"
    array += np.ones(2, "<f4").tobytes() + b"tb"
    dtype = b"\x80\x02cnumpy\ndtype\n(X\x02\x00\x00\x00f4K\x00K\x01tRq\x050"
    path = tmp_path / "x.pkl"
    path.write_bytes(dtype + b"}(X\x01\x00\x00\x00w" + array + b"X\x01\x00\x00\x00d" + order + b"u.")
    read = read_any(path)
    assert read["w"].tolist() == [1.0, 1.0] and read["d"] == np.dtype(">f4")
    assert np.frombuffer(np.ones(1, "<f4").tobytes(), "f4").tolist() == [1.0]


def test_not_a_dict_and_damaged(tmp_path: Path) -> None:
    assert "list, not a dict" in refused(tmp_path / "x.pkl", pickle.dumps([1], 2))
    refused(tmp_path / "x.pkl", b"not a pickle")
    assert "empty" in refused(tmp_path / "x.pkl", b"")


def test_control_characters_stay_out_of_messages(tmp_path: Path) -> None:
    message = refused(tmp_path / "x.pkl", b"\x80\x04\x8c\x04o\n\x1b[\x8c\x06sys\ttm\x93.")
    assert "holds o \\x1b[.sys tm, which" in message


def test_an_attribute_set_by_one_file_is_gone_in_the_next(tmp_path: Path) -> None:
    """A file may not leave anything behind in the process."""
    path = tmp_path / "x.pkl"
    poisoned = b"cnumpy\ndtype\n}S'__kwdefaults__'\n}ss" + b"b" + b"."
    refused(path, poisoned)
    value = {"w": np.ones(3)}
    path.write_bytes(pickle.dumps(value, 2))
    assert np.array_equal(read_any(path)["w"], value["w"])
