"""Read torch's files without torch's unpickler: archives, and the stream of pickles of torch < 1.6.

Every tensor is checked against the bytes that are there before it is made. The result holds dense tensors of real
numbers on the CPU and plain values. ``torch.load(weights_only=True)`` gives the same for honest files, but believes
what a file claims.
"""

from __future__ import annotations

import mmap
import os
import sys
import zipfile
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

import torch

from gn_det.checkpoint.unpickler import Refused, Stream, Table, Unpickler, check_shape, plain_constructors
from gn_det.files import StrPath, open_regular
from gn_det.text import one_line

_NOT_SAVED = "is not a checkpoint: torch.save did not write it; copy or download it again"
_MAX_DIRECTORY = 4 << 20  # bytes; a checkpoint has some 100 bytes for each tensor
_LEGACY_MAGIC, _LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
#: The types a tensor of weights may have.
DTYPES = {
    "Half": torch.float16, "BFloat16": torch.bfloat16, "Float": torch.float32, "Double": torch.float64,
    "Char": torch.int8, "Short": torch.int16, "Int": torch.int32, "Long": torch.int64, "Byte": torch.uint8,
    "Bool": torch.bool,
}  # fmt: skip

#: Gives the bytes of a storage, by its key, their number, and the bytes of an item.
Content = Callable[[str, int, int], torch.Tensor]


def read_archive(path: StrPath, *, map_tensors: bool) -> Any:
    """Return the value in an archive of torch.save.

    Args:
        path: the file.
        map_tensors: map tensors from the file instead of reading them.

    Raises:
        Refused: the content is damaged or not allowed; the message does not name the file.
        Exception: of any type, for damaged bytes.
    """
    with open_regular(path) as file:
        # A private map: tensors may be written to, the file stays as it is.
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY if map_tensors else mmap.ACCESS_READ)
        records = _records(file, mapped)
        root = next(iter(records), "").split("/")[0]
        if f"{root}/data.pkl" not in records:
            raise Refused(_NOT_SAVED)
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

        stream = Stream(mapped, *records[f"{root}/data.pkl"])
        return _unpickler(stream, len(mapped), content, swapped).load()


def read_legacy(path: StrPath) -> Any:
    """Return the value in a file of torch < 1.6; see :func:`read_archive`.

    Its storages follow the pickle that names them, so they are made first and filled later.
    """
    with open_regular(path) as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        promised = 0
        made: dict[str, tuple[torch.Tensor, int]] = {}

        def content(key: str, size: int, itemsize: int) -> torch.Tensor:
            nonlocal promised
            promised += size
            if promised > len(mapped):
                raise Refused(f"is damaged: its tensors claim {promised} bytes, the file has {len(mapped)}")
            made[key] = torch.empty(size, dtype=torch.uint8), itemsize
            return made[key][0]

        stream = Stream(mapped)
        pickles = _unpickler(stream, len(mapped), content)
        if pickles.load() != _LEGACY_MAGIC or pickles.load() != _LEGACY_PROTOCOL:
            raise Refused(_NOT_SAVED)
        system = pickles.load()
        if not isinstance(system, dict) or system.get("little_endian") is not True or sys.byteorder != "little":
            raise Refused("was written on a machine of another byte order; save it again with a newer torch")
        value, keys = pickles.load(), pickles.load()
        if type(keys) is not list or len(keys) != len(made) or {k for k in keys if type(k) is str} != set(made):
            raise Refused("is damaged: its tensors and their contents do not agree; copy or download it again")
        for key in keys:
            tensor, itemsize = made[key]
            if int.from_bytes(stream.read(8), "little") * itemsize != tensor.numel():
                raise Refused("is damaged: a tensor has another length than its contents; copy or download it again")
            _read(file, tensor, stream.at)
            stream.read(tensor.numel())
        return value


def _read(file: BinaryIO, tensor: torch.Tensor, begin: int) -> torch.Tensor:
    if tensor.numel():
        file.seek(begin)
        if file.readinto(tensor.numpy()) != tensor.numel():  # type: ignore[attr-defined]
            raise Refused("is truncated; copy or download it again")
    return tensor


def _records(file: BinaryIO, mapped: mmap.mmap) -> dict[str, tuple[int, int]]:
    """Offset and size of each record, by its name.

    Raises:
        Refused: compressed, ambiguous, outside the file, or larger together than it.
    """
    found: dict[str, tuple[int, int]] = {}
    for record in directory(file):
        begin = record.header_offset
        head = mapped[begin : begin + 30]
        if len(head) < 30 or head[:4] != b"PK\x03\x04":
            raise Refused("is truncated or damaged (a record has no header); copy or download it again")
        begin += 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
        if record.filename in found or begin + record.file_size > len(mapped):
            raise Refused(f"is damaged (record {one_line(record.filename, 60)!r}); copy or download it again")
        found[record.filename] = begin, record.file_size
    return found


def directory(file: BinaryIO) -> list[zipfile.ZipInfo]:
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
    if not stored or sum(r.file_size for r in records) > os.fstat(file.fileno()).st_size:
        raise Refused("is not a checkpoint written by torch.save (it unpacks to more than its size)")
    return records


def wrong_record(path: StrPath) -> str:
    """Return the name of the first record whose checksum is wrong, or "".

    Raises:
        Refused: see :func:`directory`.
    """
    with open_regular(path) as file:
        directory(file)
        with zipfile.ZipFile(file) as archive:
            return archive.testzip() or ""


class _Storage(NamedTuple):
    """Numbers that tensors are views of."""

    dtype: torch.dtype
    content: torch.Tensor


def _unpickler(stream: Stream, size: int, content: Content, swapped: bool = False) -> Unpickler:
    """An unpickler of torch's tensors.

    Args:
        stream: holds the pickle.
        size: bytes of the whole file.
        content: gives the bytes behind a key.
        swapped: they are in the other byte order.
    """
    known: dict[str, _Storage] = {}

    def storages(pid: Any) -> _Storage:
        plain = type(pid) is tuple and len(pid) >= 5 and pid[5:] in ((), (None,)) and isinstance(pid[1], torch.dtype)
        if not plain or pid[0] != "storage" or type(pid[2]) is not str or type(pid[4]) is not int:
            raise Refused("is damaged: it refers to a storage in a way that torch.save does not")
        dtype, key, nbytes = pid[1], pid[2], pid[4] * pid[1].itemsize
        if not 0 <= nbytes <= size:
            raise Refused(f"is damaged: a tensor claims {one_line(nbytes)} bytes, the file has {size}")
        if key not in known:
            found = content(key, nbytes, dtype.itemsize)
            if swapped and nbytes:
                found = found.clone()
                found.untyped_storage().byteswap(dtype)  # type: ignore[no-untyped-call, unused-ignore]
            known[key] = _Storage(dtype, found)
        if known[key].content.numel() != nbytes or (swapped and known[key].dtype != dtype):
            raise Refused("is damaged: it gives two lengths to one storage")
        return _Storage(dtype, known[key].content)

    def tensor(storage: Any, offset: Any, size: Any, stride: Any, grad: Any = False, *_: Any) -> torch.Tensor:
        if not isinstance(storage, _Storage):
            raise Refused("makes a tensor of something that is not a storage")
        check_view(storage.content.numel() // storage.dtype.itemsize, offset, size, stride)
        made = torch.empty(0, dtype=storage.dtype)
        made.set_(storage.content.untyped_storage(), offset, size, stride)
        return made.requires_grad_(grad is True and made.is_floating_point())

    def parameter(data: Any, grad: Any = True, *_: Any) -> torch.nn.Parameter:
        if type(data) is not torch.Tensor:
            raise Refused("makes a parameter of something that is not a tensor")
        return torch.nn.Parameter(data.detach(), grad is True and data.is_floating_point())

    table: Table = {
        ("torch._utils", "_rebuild_tensor_v2"): tensor,
        ("torch._utils", "_rebuild_tensor"): tensor,
        ("torch._utils", "_rebuild_parameter"): parameter,
        ("torch", "Size"): lambda value=(): check_shape(value),
        ("torch", "device"): lambda *_: "cpu",
        **plain_constructors(stream),
    }
    for name, dtype in DTYPES.items():
        table["torch", f"{name}Storage"] = dtype
        table["torch", str(dtype).removeprefix("torch.")] = dtype  # a plain value, as in hyperparameters
    return Unpickler(stream, table, storages=storages)


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
