"""Weights files and URLs made by structure: nested and shared values, every kind of tensor, odd containers, odd places.

Each file is read by everything that reads weights. It must be read or refused in one line, in 5 s of CPU and 1 GB, and
whatever is printed must be printable. Each URL must name a place in the cache.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import pickle
import random
import resource
import struct
import sys
import time
import urllib.parse
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.faults.soak_case import Case, run_mutations, watch_mutations

GIGABYTE = 1 << 30
Items = list[tuple[bytes, bytes]]
_NAMES = (
    "stem.conv1.weight",
    "res2.0.conv1.weight",
    "backbone.bottom_up.res3.0.conv2.norm.weight",
    "conv1_w",
    "fc7_b",
    "res2_0_branch2a_w",
    "layer1.0.conv1.weight",
    "neck.fpn_convs.0.conv.weight",
    "cls_score_w",
    "pixel_mean",
    "roi_heads.box_predictor.cls_score.weight",
    "rpn_cls_logits_w",
    "rpn_bbox_pred_b",
    "mask_fcn_logits_w",
    "bbox_pred_w",
    "res2_0_branch2b_w",
    "layer4.0.downsample.1.weight",
)
_TEXTS = (
    "",
    "x",
    "cpu",
    "latin1",
    "\x1b[2J\x07",
    "a\nb\r\n",
    "\u202egnp.exe",
    "\ud800",
    "n" * 600,
    "ü" * 70_000,
    "\0",
    "res2." + "9" * 400 + ".conv1.weight",
    "MODEL: {}",
    "[" * 3000,
    "a: &a [1]\nb: [*a, *a]",
    "9" * 5000,
    "%s%n{0}{path}",
    "/etc/passwd",
    "data.pkl",
)
_GLOBALS = (
    *[
        ("torch._utils", f"_rebuild_{n}")
        for n in (
            "tensor",
            "tensor_v2",
            "tensor_v3",
            "parameter",
            "parameter_with_state",
            "sparse_tensor",
            "nested_tensor",
            "wrapper_subclass",
            "meta_tensor_no_storage",
            "qtensor",
            "device_tensor_from_numpy",
            "xla_tensor",
        )
    ],
    ("torch._tensor", "_rebuild_from_type_v2"),
    ("torch.nested._internal.nested_tensor", "_rebuild_njt"),
    *[
        ("torch", n)
        for n in (
            "FloatStorage",
            "LongStorage",
            "BoolStorage",
            "ComplexFloatStorage",
            "QInt8Storage",
            "Size",
            "device",
            "float32",
            "Tensor",
            "load",
            "UntypedStorage",
        )
    ],
    ("torch.storage", "UntypedStorage"),
    ("torch.storage", "TypedStorage"),
    ("torch.nn.parameter", "Parameter"),
    ("collections", "OrderedDict"),
    ("collections", "Counter"),
    ("collections", "defaultdict"),
    ("builtins", "set"),
    ("builtins", "bytearray"),
    ("builtins", "bytes"),
    ("__builtin__", "eval"),
    ("os", "system"),
    ("_codecs", "encode"),
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy.core.multiarray", "scalar"),
    ("numpy", "ndarray"),
    ("numpy._core.numeric", "_frombuffer"),
    ("numpy", "dtype"),
    ("copyreg", "_reconstructor"),
    ("builtins", "getattr"),
)


# ------------------------------------------------------------------------------------------- pickles, opcode by opcode


class Pickle:
    """Writes opcodes for values that no pickler would write."""

    def __init__(self, rng: random.Random, storages: list[tuple[str, int]]) -> None:
        self.rng, self.storages, self.memo = rng, storages, 0
        self.used: dict[str, int] = {}

    def text(self, text: str) -> bytes:
        data = text.encode("utf-8", "surrogatepass")
        return b"X" + struct.pack("<I", len(data)) + data

    def integer(self, value: int) -> bytes:
        if 0 <= value < 256 and self.rng.random() < 0.7:
            return b"K" + bytes([value])
        data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        return (b"\x8a" + bytes([len(data)]) if len(data) < 256 else b"\x8b" + struct.pack("<i", len(data))) + data

    def tuple(self, *parts: bytes) -> bytes:
        return b"(" + b"".join(parts) + b"t"

    def ints(self, *values: int) -> bytes:
        return self.tuple(*map(self.integer, values))

    def named(self, module: str, name: str) -> bytes:
        return b"c" + f"{module}\n{name}\n".encode()

    def tower(self, levels: int, shared: bool) -> bytes:
        """Tuples in tuples; shared, each holds the one below twice."""
        if not shared:
            return b")" + b"\x85" * levels if self.rng.random() < 0.5 else b"(" * levels + b"t" * levels
        out, at = [self.integer(1)], 1000 + self.memo
        self.memo += levels + 1
        for level in range(levels):
            put = b"r" + struct.pack("<I", at + level)
            out.append(put + b"0" + (b"j" + put[1:]) * 2 + b"\x86")
        return b"".join(out)

    def absurd(self) -> bytes:
        """A value that costs more than it weighs."""
        rng = self.rng
        return rng.choice(
            (
                lambda: self.tower(rng.choice((3, 20, 60, 63, 64, 200)), shared=True),
                lambda: self.tower(rng.choice((3, 60, 70, 5000, 200_000)), shared=False),
                lambda: self.integer(-(1 << rng.choice((31, 63, 64, 255, 256, 2000, 40_000)))),
                lambda: b"I" + b"7" * rng.choice((20, 79, 81, 5000)) + b"\n",
                lambda: b"F" + rng.choice((b"nan", b"inf", b"1e400", b"9" * 400)) + b"\n",
                lambda: b"]q\x01h\x01a",
                lambda: b"}q\x02" + self.text("x") + b"h\x02s",
                lambda: b"(" + b"N" * rng.choice((10, 60_000)) + b"l",
                lambda: b"(" + b"]" * 20_000 + b"t",
                lambda: self.text(rng.choice(_TEXTS)),
                lambda: b"C\x03\x00\xff\x80",
                lambda: self.named(*rng.choice(_GLOBALS)),
                lambda: (
                    self.named(*rng.choice(_GLOBALS))
                    + self.tuple(*[self.value(1) for _ in range(rng.randrange(4))])
                    + b"R"
                ),
                lambda: self.named("collections", "OrderedDict") + b")R" + self.value(1) + b"b",
                lambda: (
                    self.named("collections", "OrderedDict")
                    + self.tuple(b"](" + self.value(1) + self.value(1) + b"ta")
                    + b"R"
                ),
                lambda: b"P12\n",
                lambda: self.value(1) + b"Q",
            )
        )()

    def value(self, depth: int = 3) -> bytes:
        rng = self.rng
        kind = rng.randrange(8)
        if kind < 2 or depth <= 0:
            return rng.choice(
                (b"N", b"\x88", b"K\x05", b"G" + struct.pack(">d", 1.5), self.text(rng.choice(_TEXTS[:5])))
            )
        if kind == 2:
            return self.absurd()
        if kind == 3:
            return self.tuple(*[self.value(depth - 1) for _ in range(rng.randrange(4))])
        if kind == 4:
            return b"](" + b"".join(self.value(depth - 1) for _ in range(rng.randrange(4))) + b"e"
        if kind == 5:
            return self.dict([(self.key(), self.value(depth - 1)) for _ in range(rng.randrange(4))])
        return self.tensor() if kind == 6 else self.array()

    def dict(self, items: Items) -> bytes:
        return b"}(" + b"".join(key + value for key, value in items) + b"u"

    def key(self) -> bytes:
        rng = self.rng
        return self.text(rng.choice(_NAMES)) if rng.random() < 0.7 else self.value(1)

    def maybe(self, right: bytes, wrong: float = 0.01) -> bytes:
        """``right``, seldom something else."""
        return self.absurd() if self.rng.random() < wrong else right

    def tensor(self) -> bytes:
        """A tensor as torch writes it, with one thing or another wrong."""
        rng = self.rng
        key, numel = rng.choice(self.storages)
        self.used[key] = numel
        kind = rng.choice(("FloatStorage",) * 90 + ("LongStorage", "BoolStorage", "ComplexFloatStorage"))
        claimed = numel if rng.random() < 0.96 else rng.choice((0, -1, numel * 2, 2**31, 2**40, 2**62, 2**63, 2**200))
        size: tuple[int, ...] = rng.choice(((numel,), (1, numel), (numel // 2, 2), (), (0,)))
        if rng.random() < 0.04:
            size = rng.choice(((2**40, 2**40), (-1,), (1,) * 40, (0, 2**60, 9), (numel + 1,)))
        stride = (max(size[1], 1), 1) if len(size) == 2 else (1,) * len(size)
        if rng.random() < 0.04:
            stride = tuple(rng.choice((1, 0, -1, 2, 2**61)) for _ in size)
        pid = self.tuple(
            self.maybe(self.text("storage")),
            self.maybe(self.named("torch", kind)),
            self.maybe(self.text(key)),
            self.maybe(self.text("cpu")),
            self.maybe(self.integer(claimed)),
            *([b"N"] if rng.random() < 0.3 else []),
        )
        offset = rng.choice((0,) * 80 + (1, -1, numel, 2**62))
        made = (
            self.named("torch._utils", "_rebuild_tensor_v2")
            + self.tuple(
                self.maybe(pid + b"Q"),
                self.maybe(self.integer(offset)),
                self.maybe(self.ints(*size)),
                self.maybe(self.ints(*stride)),
                self.maybe(b"\x89"),
                self.maybe(self.named("collections", "OrderedDict") + b")R"),
            )
            + b"R"
        )
        if rng.random() < 0.1:
            made = self.named("torch._utils", "_rebuild_parameter") + self.tuple(made, b"\x88", b"N") + b"R"
        return made

    def array(self) -> bytes:
        rng = self.rng
        size = rng.choice(((2,), (2, 1)) * 20 + ((), (0,), (-2,), (2**40, 2**40), (1,) * 33))
        code = rng.choice(("f4",) * 80 + ("i8", "O", "V9999999", "M8", "c8", "b1"))
        dtype = (
            self.named("numpy", "dtype")
            + self.tuple(self.text(code), b"\x89", b"\x88")
            + b"R"
            + self.tuple(
                b"K\x03",
                self.maybe(self.text(rng.choice("<>|" * 20 + "!"))),
                b"N",
                b"N",
                b"N",
                b"J\xff\xff\xff\xff",
                b"J\xff\xff\xff\xff",
                b"K\x00",
            )
            + b"b"
        )
        contents = b"C" + bytes([8]) + b"\0" * 8
        made = (
            self.named("numpy.core.multiarray", "_reconstruct")
            + self.tuple(self.named("numpy", "ndarray"), self.ints(0), b"C\x01b")
            + b"R"
        )
        return (
            made
            + self.tuple(
                b"K\x01", self.maybe(self.ints(*size)), self.maybe(dtype), self.maybe(b"\x89"), self.maybe(contents)
            )
            + b"b"
        )

    def weights(self, entry: Callable[[], bytes]) -> bytes:
        """A file's dict: names and tensors, most of them good."""
        rng = self.rng
        items = [(self.maybe(self.text(name)), self.maybe(entry())) for name in rng.sample(_NAMES, rng.randint(1, 5))]
        if rng.random() < 0.1:
            self.memo += 1
            put = b"r" + struct.pack("<I", 500 + self.memo)
            items += [(self.text(f"res2.{i}.conv1.weight"), b"j" + put[1:]) for i in range(400)]
            items[0] = items[0][0], items[0][1] + put
        block = [
            (self.text(name), self.value(2)) for name in ("config", "class_names", "version", "provenance", "weights")
        ]
        top = [(self.text(rng.choice(("model", "state_dict", "blobs"))), self.dict(items))]
        top += [(self.text("gn_det"), self.dict(block))] if rng.random() < 0.4 else []
        top += [(self.key(), self.value())] if rng.random() < 0.4 else []
        return b"\x80\x02" + (self.dict(top) if rng.random() < 0.8 else self.dict(items)) + b"."


# ---------------------------------------------------------------------------------------------------------- containers


def hostile_archive(rng: random.Random) -> bytes:
    storages = [(str(n), rng.choice((2, 4, 16))) for n in range(3)]
    writer = Pickle(rng, storages)
    records = [
        ("data.pkl", writer.weights(writer.tensor)),
        ("version", b"3\n"),
        ("byteorder", rng.choice((b"little",) * 5 + (b"big", b"x"))),
    ]
    records += [(f"data/{key}", np.ones(numel, np.float32).tobytes()) for key, numel in storages if rng.random() < 0.97]
    if rng.random() < 0.05:
        records.append(rng.choice(records))
    if rng.random() < 0.03:
        records += [(f"data/x{n}", b"") for n in range(rng.choice((10, 3000)))]
    if rng.random() < 0.05:
        rng.shuffle(records)
    buffer = io.BytesIO()
    how = zipfile.ZIP_DEFLATED if rng.random() < 0.03 else zipfile.ZIP_STORED
    with zipfile.ZipFile(buffer, "w", how) as archive:
        for name, content in records:
            with _quiet():
                archive.writestr(f"{rng.choice(('archive',) * 30 + ('other', '..'))}/{name}", content)
    data = bytearray(buffer.getvalue())
    if rng.random() < 0.15:  # the directory claims other counts, sizes or places
        end = data.rfind(b"PK\x05\x06")
        at, form = rng.choice(((8, "<H"), (10, "<H"), (12, "<I"), (16, "<I")))
        struct.pack_into(
            form, data, end + at, rng.choice((0, 1, 0xFFFF, 9) if form == "<H" else (0, 60, 0xFFFFFFFF, 2**31))
        )
    if rng.random() < 0.15:  # a record that lies elsewhere, or is longer
        entry = data.find(b"PK\x01\x02")
        for _ in range(rng.randrange(4)):
            entry = max(entry, data.find(b"PK\x01\x02", entry + 4))
        struct.pack_into("<I", data, entry + rng.choice((20, 24, 42)), rng.choice((0, 64, 500, 2**31, 0xFFFFFFFF)))
    return bytes(data)


@contextlib.contextmanager
def _quiet() -> Any:
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def hostile_stream(rng: random.Random) -> bytes:
    """A file of torch < 1.6."""
    storages = [(str(n), rng.choice((2, 4))) for n in range(2)]
    writer = Pickle(rng, storages)
    parts = [pickle.dumps(0x1950A86A20F9469CFC6C, 2), pickle.dumps(1001, 2), pickle.dumps({"little_endian": True}, 2)]
    parts += [writer.weights(writer.tensor), b""]
    parts[4] = pickle.dumps(list(writer.used), 2)
    if rng.random() < 0.1:
        parts[rng.randrange(5)] = b"\x80\x02" + writer.value() + b"."
    contents = [struct.pack("<q", rng.choice((n,) * 20 + (2**62, -1))) + b"\0" * 4 * n for n in writer.used.values()]
    return b"".join(parts + contents)


def hostile_pickle(rng: random.Random) -> bytes:
    writer = Pickle(rng, [("0", 2)])
    return writer.weights(writer.array if rng.random() < 0.95 else writer.tensor)


def hostile_safetensors(rng: random.Random) -> bytes:
    header: dict[str, Any] = {}
    for at, name in enumerate(rng.sample(_NAMES, count := rng.randint(0, 4))):
        wrong = rng.choice(
            ((8 * at, 8 * at + 8),) * 60 + ((4, 12), (-1, 8), (8, 0), (0, 2**63), (0, 2**70), (0.5, 8), ("0", 8))
        )
        shape = rng.choice(([2],) * 60 + ([2**40, 2**40], [-2], [], [0], [2**63], ["2"], [[2]]))
        header[name] = {
            "dtype": rng.choice(("F32",) * 60 + ("F64", "I8", "BF16", "F8_E4M3", "C64", "X", 3)),
            "shape": shape,
            "data_offsets": list(wrong),
        }
    if rng.random() < 0.6:
        deep = rng.choice((3, 63, 70, 3000, 100_000))
        block = rng.choice(
            (
                "{}",
                "[",
                "9" * 5000,
                "[" * deep + "]" * deep,
                '{"a":' * deep + "1" + "}" * deep,
                '{"best_metric": 1e999}',
                '{"best_metric": ' + "9" * 400 + "}",
                json.dumps({"class_names": list(_TEXTS), "version": "\x1b[0m"}),
                json.dumps({"class_names": ["x"] * 30_000}),
                json.dumps({"config": rng.choice(_TEXTS)}),
                json.dumps(
                    {
                        "weights": {
                            "groups": [10**70, 0],
                            "preprocessing": {"format": "\x1b", "pixel_mean": [1e308] * 9},
                        },
                        "provenance": [{"source": "\x07" * 99, "top1_error": 1e300, "trained": True}, 3, None],
                    }
                ),
            )
        )
        header["__metadata__"] = rng.choice(({"gn_det": block},) * 5 + ({"gn_det": 3}, 7, {"a": {"b": "c"}}))
    text = json.dumps(header).encode()
    size = rng.choice((len(text),) * 60 + (0, len(text) + 5, 2**63, 2**64 - 1, 100))
    return struct.pack("<Q", size) + text + b"\0" * rng.choice((8 * count,) * 20 + (8, 0))


class Subclass(torch.Tensor):
    pass


def honest(rng: random.Random) -> tuple[str, bytes]:
    """A file that its own library writes, of values that people have and some that they should not have."""
    tensors: list[Callable[[], Any]] = [
        lambda: torch.ones(3, 4),
        lambda: torch.ones(4, 3).t(),
        lambda: torch.arange(9.0)[1:8:2],
        lambda: torch.tensor(3),
        lambda: torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last),
        lambda: torch.zeros(0, 3),
        lambda: torch.ones(2, dtype=rng.choice((torch.float16, torch.float64, torch.int8, torch.bool))),
        lambda: torch.nn.Parameter(torch.ones(2)),
        lambda: torch.ones(2, requires_grad=True),
    ]
    odd: list[Callable[[], Any]] = [
        lambda: torch.ones(1).expand(10**6, 10**6),
        lambda: torch.ones(3).as_strided((2, 2), (1, 1)),
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.eye(3).to_sparse_csr(),
        lambda: torch.ones(2, device="meta"),
        lambda: torch.ones(2, dtype=torch.complex64),
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        lambda: torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8),
        lambda: torch.ones(2).as_subclass(Subclass),
        lambda: torch.ones(2).to(torch.float8_e4m3fn),
        lambda: torch.nn.Linear(1, 1),
        lambda: {1, 2},
        lambda: {(1, 2): 3},
    ]
    what = "odd" if rng.random() < 0.4 else "plain"
    state = OrderedDict((name, rng.choice(tensors)()) for name in rng.sample(_NAMES[:3], rng.randint(1, 3)))
    if what == "odd":
        with _quiet():
            state[rng.choice(_NAMES)] = rng.choice(odd)()
    container = rng.choice(("pth", "legacy", "pkl", "safetensors"))
    buffer = io.BytesIO()
    try:
        if container == "safetensors":
            from safetensors.torch import save

            return f"{what} safetensors", save({n: v.detach().contiguous() for n, v in state.items()})
        if container == "pkl":
            return f"{what} pkl", pickle.dumps(
                {"model": {n: v.detach().numpy() for n, v in state.items()}}, rng.randint(0, 5)
            )
        extra = rng.choice(
            ({}, {"iteration": 3, "list": [1, (2, None)]}, {"c": Counter("aab"), "size": torch.Size([1])})
        )
        torch.save({"model": state, **extra}, buffer, _use_new_zipfile_serialization=container == "pth")
    except Exception:  # the library itself refuses it
        return "plain pkl", pickle.dumps({"model": {"res2.0.conv1.weight": np.ones(3)}})
    return f"{what} {container}", buffer.getvalue()


HOSTILE = {"pth": hostile_archive, "legacy": hostile_stream, "pkl": hostile_pickle, "safetensors": hostile_safetensors}


def one_file(number: int) -> tuple[str, bytes]:
    """Kind and content of file ``number``."""
    rng = random.Random(number)
    if number % 5 == 0:
        return honest(rng)
    kind = rng.choice(tuple(HOSTILE))
    return f"hostile {kind}", HOSTILE[kind](rng)


def read_by_all(path: Path) -> str:
    """ "read" or "refused"; everything that reads weights must agree that it is one of them."""
    from gn_det.checkpoint.convert import convert
    from gn_det.checkpoint.io import check_payload, read_any, read_checkpoint
    from gn_det.checkpoint.open_weights import open_weights
    from gn_det.cli import parse
    from gn_det.errors import UserError

    results = Counter[str]()
    size, target = path.stat().st_size, path.parent / f"to.{'safetensors' if path.stat().st_size % 2 else 'pth'}"

    def walk() -> None:  # what a schema of a resumed payload does
        with contextlib.suppress(TypeError):
            check_payload(read_any(path))

    def values() -> None:
        total = 0
        for value in open_weights(path, must_know=False).state.values():
            value.double().sum()
            total += value.numel() * value.element_size()
        assert total <= 5 * size + 1024, f"{total} bytes from {size}"

    def command(name: str, *words: str) -> None:
        module, args = parse(name, words)
        module.run(args)

    calls = (
        walk,
        values,
        partial(command, "weights", str(path)),
        partial(command, "convert", str(path), str(target), *["--fold"] * (size % 3 == 0)),
        partial(read_checkpoint, path),
        partial(convert, path, target.with_name("t.pth"), "torchvision"),
    )
    for call in calls:
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said):
                call()
            results["read"] += 1
        except UserError as error:
            message = str(error)
            assert message.isprintable() and len(message) < 2000, repr(message[:300])
            results["refused"] += 1
        assert all(line.isprintable() and len(line) < 3000 for line in said.getvalue().split("\n")), said.getvalue()[
            :300
        ]
    left = {f.name for f in path.parent.iterdir()} - {path.name, target.name, "t.pth"}
    assert not left, left
    for made in (target, target.with_name("t.pth")):
        if made.exists():
            assert made.stat().st_size <= 5 * size + 200_000, f"{made.stat().st_size} bytes from {size}"
            made.unlink()
    return "read" if results["read"] >= 3 else "refused"


def _of_files(folder: Path, first: int, count: int) -> dict[str, Any]:
    """Outcomes of some files; a hang in C is ended by the kernel."""
    torch.set_num_threads(1)
    used = int(time.process_time())
    resource.setrlimit(resource.RLIMIT_CPU, (used + 60 + count, used + 60 + count))
    slowest = 0.0
    path = folder / "x"

    def one(number: int) -> Callable[[], str]:
        kind, data = one_file(number)
        path.unlink(missing_ok=True)
        place = folder / f"x.{'pth' if kind.endswith('legacy') else kind.split()[1]}"
        for old in folder.iterdir():
            old.unlink()
        place.write_bytes(data)

        def outcome() -> str:
            nonlocal slowest
            begun = time.process_time()
            result = read_by_all(place)
            elapsed = time.process_time() - begun
            slowest = max(slowest, elapsed)
            assert elapsed < 5, f"{elapsed:.1f} s of CPU"
            assert result == "read" or not kind.startswith("plain"), "a file that people have is refused"
            return f"{kind}: {result}"

        return outcome

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = watch_mutations(range(first, first + count), 60, one)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    return found | {"peaks": {"most CPU of all readers together, s": slowest, "most memory, MB": grown}}


def structures(case: Case) -> None:
    """10,000 files by structure."""
    sys.path.insert(0, str(Path(__file__).parents[2]))
    import gn_det.checkpoint.compatibility
    import gn_det.checkpoint.convert  # noqa: F401 (imported before the memory is limited)

    folder = case.folder / "files"
    folder.mkdir()
    run_mutations(case, "weights files", case.count(10_000), 500, GIGABYTE, partial(_of_files, folder))


# ---------------------------------------------------------------------------------------------------------------- URLs

_SCHEMES = ("http", "https", "HTTPS", "detectron2", "hf", "timm", "catalog", "open-mmlab", "ftp", "file2", "javascript")
_PARTS = (
    "a",
    "b.pth",
    "w.safetensors",
    "..",
    ".",
    "",
    "...",
    "%2e%2e",
    "%2E.",
    "%252e%252e",
    "%25252e%25252e",
    "..%2f..",
    "..%5c..",
    "..\\..",
    "%5c",
    "\\",
    "a%00.pth",
    "a\0.pth",
    "%",
    "%zz",
    "ü",
    "%c3%bc",
    "%ff",
    "n" * 201,
    "n" * 300,
    "link",
    "loop",
    "up",
    "a b",
    "\t..",
    ".\t.",
    "..;x",
    "..?x",
    "%2f",
    "%2fetc",
    "C:",
    "con",
    "~",
    "~root",
    "-",
    "\u2024\u2024",
    "\uff0e\uff0e",
    "\u202e",
    "\x1b[2J",
    "..\u200b",
    ".lock",
    "a.pth.lock",
    "owner",
    "name",
    "@",
    "::",
)
_HOSTS = ("host", "h@h", "[::1]", "[", "", "u:p@h:80", "h:99999", "..", "%2e%2e", "ü.example", "h" * 300, "127.0.0.1")
_ENDS = (
    "",
    "",
    "",
    "?preprocessing=torch",
    "?allow_partial=True",
    "?x=../..",
    "#sha256=" + "A" * 64,
    "#SHA256=zz",
    "#x",
    "#sha256=",
    "?matching_heuristics=True#sha256=" + "0" * 64,
    "/",
    "?",
    "#",
    "#sha256=0#sha256=1",
)


def one_url(number: int) -> str:
    rng = random.Random(number)
    parts = [rng.choice(_PARTS) for _ in range(rng.randint(0, 7))]
    if rng.random() < 0.2:
        parts = [".."] * rng.randint(1, 20) + parts
    path = "/".join(parts)
    for _ in range(rng.choice((0, 0, 0, 0, 1, 2, 3))):
        path = urllib.parse.quote(path, safe=rng.choice(("/", "", "/.")), errors="surrogatepass")
    scheme = rng.choice(_SCHEMES)
    host = f"{rng.choice(_HOSTS)}/" if scheme.lower().startswith("http") or rng.random() < 0.2 else ""
    return f"{scheme}://{host}{path}{rng.choice(_ENDS)}"


def _of_urls(folder: Path, first: int, count: int) -> dict[str, Any]:
    from gn_det.checkpoint import download, weights_uri
    from gn_det.errors import WeightsError

    cache, mirror, outside = (folder / name for name in ("deep/cache", "deep/mirror", "outside"))

    def fetch(url: str, target: Path, **more: Any) -> Path:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(b"PK\x03\x04")
        return target

    download.fetch = fetch
    os.environ["FVCORE_CACHE"] = str(cache)
    before = sorted(str(p) for p in folder.rglob("*") if not p.is_relative_to(cache))

    def one(number: int) -> Callable[[], str]:
        url = one_url(number)
        os.environ["GN_DET_MIRROR"] = str(mirror) if number % 7 == 0 else ""

        def outcome() -> str:
            results = set()
            for call in (
                weights_uri.local_path,
                lambda u: weights_uri.cache_path(weights_uri.resolve_url(u) or ""),
                weights_uri.cache_path,
            ):
                try:
                    place = call(url)
                    assert any(place.resolve().is_relative_to(f.resolve()) for f in (cache, mirror)), (
                        f"{url!r}: {place}"
                    )
                    assert place.resolve() not in (cache.resolve(), mirror.resolve()), url
                    results.add("inside the cache")
                except WeightsError as error:
                    assert str(error).isprintable() and len(str(error)) < 6000, repr(str(error))
                    results.add("refused")
                except OSError as error:
                    # The stand-in for the download writes without asking; the real one turns these into refusals.
                    kinds = (FileExistsError, NotADirectoryError, IsADirectoryError)
                    assert isinstance(error, kinds) or error.errno == errno.ENAMETOOLONG, repr(error)
                    results.add("refused")
            return "a place inside the cache" if "inside the cache" in results else "refused in one line"

        return outcome

    found = watch_mutations(range(first, first + count), 10, one)
    after = sorted(str(p) for p in folder.rglob("*") if not p.is_relative_to(cache))
    if before != after or list(outside.iterdir()):
        found["others"].append(f"from {first} on: something was written outside the cache")
    return found


def urls(case: Case) -> None:
    """10,000 URLs against the cache, with links in it that lead out."""
    folder = case.folder / "places"
    for name in ("deep/cache/a", "deep/mirror/a", "outside"):
        (folder / name).mkdir(parents=True)
    for base in (folder / "deep/cache", folder / "deep/mirror"):
        (base / "link").symlink_to(folder / "outside")
        (base / "up").symlink_to("..")
        (base / "loop").symlink_to("loop")
    run_mutations(case, "URLs", case.count(10_000), 1000, GIGABYTE, partial(_of_urls, folder))
