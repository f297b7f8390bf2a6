"""Read torch's files without torch's unpickler: archives, and the stream of pickles of torch < 1.6.

Nothing of a file is believed: every tensor is checked against the bytes that are there before it is made. What comes
out is dense tensors of real numbers on the CPU and plain values. ``torch.load(weights_only=True)`` gives the same for
the files of honest people, but follows keys without a hash in sight, claims without bytes and levels without end.
"""

from __future__ import annotations

import mmap
import os
import re
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

from gn_det.checkpoint.pickles import Bounded, Machine, Refused, Table, check_shape, plain_constructors
from gn_det.files import StrPath, open_regular
from gn_det.text import one_line

_ABOUT = "save the weights alone, as in torch.save({'model': model.state_dict()}, path)"
_NOT_PLAIN = "which is not a plain tensor of real numbers on the CPU"
_MAX_DIRECTORY = 4 << 20  # bytes; a checkpoint has some 100 bytes for each tensor
_LEGACY_MAGIC, _LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
#: The types a tensor of weights may have.
DTYPES = {
    "Half": torch.float16, "BFloat16": torch.bfloat16, "Float": torch.float32, "Double": torch.float64,
    "Char": torch.int8, "Short": torch.int16, "Int": torch.int32, "Long": torch.int64, "Byte": torch.uint8,
    "Bool": torch.bool,
}  # fmt: skip
# Everything torch offers to make a tensor that is not dense, or not of real numbers, or not torch's own class.
_OTHER_TENSORS = re.compile(r"_rebuild_\w+$|\w*Storage$|q?u?int\d+(?:x\d)?$|(?:b?complex|float)\w+$|Tensor$")


def read_archive(path: StrPath, *, map_tensors: bool) -> Any:
    """Return the value in an archive of torch.save; ``map_tensors``: map them from the file instead of reading them.

    Raises:
        Refused: the content is damaged or not allowed; the message does not name the file.
        Exception: of any type, for damaged bytes.
    """
    with open_regular(path) as file:
        # A private map: tensors may be written to, the file stays as it is.
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY if map_tensors else mmap.ACCESS_READ)
        records = _records(file, len(mapped), mapped)
        root = next(iter(records), "").split("/")[0]
        if f"{root}/data.pkl" not in records:
            raise Refused("is not a checkpoint: torch.save did not write it; copy or download it again")
        if f"{root}/constants.pkl" in records:
            raise Refused("is a TorchScript program, not a checkpoint; save its state_dict() with torch.save")
        order = records.get(f"{root}/byteorder")
        swapped = order is not None and order[1] < 10 and mapped[order[0] : sum(order)] != sys.byteorder.encode()

        def content(key: str, size: int, itemsize: int) -> torch.Tensor:
            begin, length = records[f"{root}/data/{key}"]
            if length < size:
                raise Refused(f"is damaged: a tensor claims {one_line(size)} bytes, its record has {length}")
            if size and map_tensors and begin % itemsize == 0:
                return torch.frombuffer(mapped, dtype=torch.uint8, count=size, offset=begin)
            return _read(file, torch.empty(size, dtype=torch.uint8), begin)

        machine = _machine(Bounded(mapped, *records[f"{root}/data.pkl"]), len(mapped), content, swapped)
        return machine.load()


def read_legacy(path: StrPath) -> Any:
    """Return the value in a file of torch < 1.6; see :func:`read_archive`.

    Its storages come behind the pickle that names them, so they are made first and filled later.
    """
    with open_regular(path) as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        stream = Bounded(mapped)
        promised = 0
        made: dict[str, tuple[torch.Tensor, int]] = {}

        def content(key: str, size: int, itemsize: int) -> torch.Tensor:
            nonlocal promised
            promised += size
            if promised > len(mapped):
                raise Refused(f"is damaged: its tensors claim {promised} bytes, the file has {len(mapped)}")
            made[key] = torch.empty(size, dtype=torch.uint8), itemsize
            return made[key][0]

        for expected in (_LEGACY_MAGIC, _LEGACY_PROTOCOL):
            if _machine(stream, len(mapped), content).load() != expected:
                raise Refused("is not a checkpoint: torch.save did not write it; copy or download it again")
        system = _machine(stream, len(mapped), content).load()
        if not isinstance(system, dict) or system.get("little_endian") is not True or sys.byteorder != "little":
            raise Refused("was written on a machine of another byte order; save it again with a newer torch")
        value = _machine(stream, len(mapped), content).load()
        keys = _machine(stream, len(mapped), content).load()
        if type(keys) is not list or len(keys) != len(made) or {k for k in keys if type(k) is str} != set(made):
            raise Refused("is damaged: its tensors and their contents do not agree; copy or download it again")
        for key in keys:
            tensor, itemsize = made[key]
            if int.from_bytes(stream.read(8), "little") * itemsize != tensor.numel():
                raise Refused("is damaged: a tensor has another length than its contents; copy or download it again")
            begin = stream.at
            stream.read(tensor.numel())
            _read(file, tensor, begin)
        return value


def _read(file: BinaryIO, tensor: torch.Tensor, begin: int) -> torch.Tensor:
    if tensor.numel():
        file.seek(begin)
        if file.readinto(tensor.numpy()) != tensor.numel():  # type: ignore[attr-defined]
            raise Refused("is truncated; copy or download it again")
    return tensor


def _records(file: BinaryIO, size: int, mapped: mmap.mmap) -> dict[str, tuple[int, int]]:
    """Offset and size of each record, by its name.

    Raises:
        Refused: compressed, ambiguous, outside the file, or larger together than it.
    """
    found: dict[str, tuple[int, int]] = {}
    for record in directory(file, size):
        begin = record.header_offset
        head = mapped[begin : begin + 30]
        if len(head) < 30 or head[:4] != b"PK\x03\x04":
            raise Refused("is truncated or damaged (a record has no header); copy or download it again")
        begin += 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
        if record.filename in found or begin + record.file_size > size:
            raise Refused(f"is damaged (record {one_line(record.filename, 60)!r}); copy or download it again")
        found[record.filename] = begin, record.file_size
    return found


def directory(file: BinaryIO, size: int) -> list[zipfile.ZipInfo]:
    """Return the records of an archive, after checking that reading them is cheap and they are stored as they are."""
    end: Any = zipfile._EndRecData(file)  # type: ignore[attr-defined]  # the very place that ZipFile reads next
    if not end:
        raise Refused("is truncated or damaged (no directory at its end); copy, download or train it again")
    if end[5] > _MAX_DIRECTORY:
        raise Refused(f"is not a checkpoint (the directory of the archive has {end[5]} bytes)")
    try:
        with zipfile.ZipFile(file) as archive:
            records = archive.infolist()
    except Exception as error:  # zipfile raises many types on damaged archives
        raise Refused(f"is truncated or damaged ({one_line(error)}); copy, download or train it again") from None
    stored = all(r.compress_type == zipfile.ZIP_STORED and r.compress_size == r.file_size for r in records)
    if not stored or sum(r.file_size for r in records) > size:
        raise Refused("is not a checkpoint written by torch.save (it unpacks to more than its size)")
    return records


def wrong_record(path: StrPath) -> str:
    """Return the name of the first record whose checksum is wrong, or "".

    Raises:
        Refused: see :func:`directory`.
    """
    with open_regular(path) as file:
        directory(file, os.fstat(file.fileno()).st_size)
        with zipfile.ZipFile(file) as archive:
            return archive.testzip() or ""


# ------------------------------------------------------------------------------------------------------------- tensors


@dataclass(frozen=True)
class _Kind:
    """Stands for a storage class of torch while the pickle is read."""

    dtype: torch.dtype

    def __call__(self, *args: Any) -> Any:
        raise Refused("calls a storage class, which no weights file does")


@dataclass(frozen=True)
class _Storage:
    """Numbers that tensors are views of."""

    dtype: torch.dtype
    content: torch.Tensor


class _TorchMachine(Machine):
    """Adds persistent ids, by which torch refers to storages outside the pickle."""

    storages: Callable[[Any], _Storage]

    def persistent_load(self, pid: Any) -> Any:
        return self.storages(pid)

    def find_class(self, module: str, name: str) -> Any:
        known = (module, name) in self._allowed
        if not known and module.split(".")[0] == "torch" and _OTHER_TENSORS.match(name):
            raise Refused(f"holds {one_line(module, 60)}.{one_line(name, 60)}, {_NOT_PLAIN}; {_ABOUT}")
        return super().find_class(module, name)


def _machine(
    stream: Bounded, size: int, content: Callable[[str, int, int], torch.Tensor], swapped: bool = False
) -> Machine:
    """The machine for a pickle of torch; ``content(key, bytes, bytes of an item)`` gives the numbers behind a key."""
    machine = _TorchMachine(stream, size, _ABOUT)
    known: dict[str, tuple[torch.Tensor, torch.dtype]] = {}

    def storages(pid: Any) -> _Storage:
        plain = type(pid) is tuple and len(pid) in (5, 6) and isinstance(pid[1], _Kind) and pid[5:] in ((), (None,))
        if not plain or pid[0] != "storage" or type(pid[2]) is not str or type(pid[4]) is not int:
            raise Refused("is damaged: it refers to a storage in a way that torch.save does not")
        dtype, key, numel = pid[1].dtype, pid[2], pid[4]
        nbytes = numel * dtype.itemsize
        if not 0 <= nbytes <= size:
            raise Refused(f"is damaged: a tensor claims {one_line(nbytes)} bytes, the file has {size}")
        if key not in known:
            found = content(key, nbytes, dtype.itemsize)
            if swapped and nbytes:
                found = found.clone()
                found.untyped_storage().byteswap(dtype)
            known[key] = found, dtype
        if known[key][0].numel() != nbytes or (swapped and known[key][1] != dtype):
            raise Refused("is damaged: it gives two lengths to one storage")
        return _Storage(dtype, known[key][0])

    machine.storages = storages
    machine.admit(_constructors(machine))
    return machine


def _constructors(machine: Machine) -> Table:
    """Return the names a torch file may use and the constructors that replace them; one table per file."""

    def tensor(storage: Any, offset: Any, size: Any, stride: Any, grad: Any = False, *_: Any) -> torch.Tensor:
        if not isinstance(storage, _Storage):
            raise Refused("makes a tensor of something that is not a storage")
        machine.one_more_tensor()
        made = torch.empty(0, dtype=storage.dtype)
        items = storage.content.numel() // storage.dtype.itemsize
        check_view(items, offset, size, stride)
        made.set_(storage.content.untyped_storage(), offset, size, stride)
        return made.requires_grad_(grad is True and made.is_floating_point())

    def parameter(data: Any, grad: Any = True, *_: Any) -> torch.nn.Parameter:
        if type(data) is not torch.Tensor:
            raise Refused("makes a parameter of something that is not a tensor")
        machine.one_more_tensor()
        return torch.nn.Parameter(data.detach(), grad is True and data.is_floating_point())

    def shape(value: Any = ()) -> tuple[int, ...]:
        return value if value == () else machine.enter(tuple(check_shape(value)), value)

    def device(*args: Any) -> str:
        return "cpu"

    table: Table = {
        ("torch._utils", "_rebuild_tensor_v2"): tensor,
        ("torch._utils", "_rebuild_tensor"): tensor,
        ("torch._utils", "_rebuild_parameter"): parameter,
        ("torch", "Size"): shape,
        ("torch", "device"): device,
        **plain_constructors(machine),
    }
    for name, dtype in DTYPES.items():
        table["torch", f"{name}Storage"] = _Kind(dtype)
        table["torch", str(dtype).removeprefix("torch.")] = dtype  # a plain value, as in hyperparameters
    return table


def check_view(items: int, offset: Any, size: Any, stride: Any) -> None:
    """Check that a view of a storage of ``items`` numbers is inside it, and that no two of its elements overlap.

    Raises:
        Refused: it does not.
    """
    check_shape(size)
    good = type(stride) is tuple and len(stride) == len(size) and all(type(n) is int for n in stride)
    if not good or type(offset) is not int or not 0 <= offset <= items:
        raise Refused(f"is damaged: a tensor of shape {one_line(size, 60)} has no place in its storage")
    if 0 in size:
        if any(not 0 <= n < 1 << 62 for n in stride):
            raise Refused("is damaged: a tensor without numbers has impossible strides")
        return
    last = 0
    for step, length in sorted(zip(stride, size)):
        if length == 1 and 0 <= step < 1 << 62:
            continue
        if step <= last:
            raise Refused(
                f"holds a tensor of shape {one_line(size, 60)} that is more than the file holds (strides "
                f"{one_line(stride, 60)} name a number several times)"
            )
        last += step * (length - 1)
    if offset + last >= items:
        raise Refused(
            f"holds a tensor of shape {one_line(size, 60)}, which is more than the file holds ({items} numbers in its "
            "storage)"
        )
