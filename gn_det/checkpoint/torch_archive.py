"""Read torch's files without torch's unpickler: archives, and the stream of pickles of torch < 1.6.

Every tensor is checked against the bytes in the file before it is created. The result contains dense CPU tensors of
real numbers and plain values. ``torch.load(weights_only=True)`` returns the same for honest files, but trusts a file's
claims.
"""

from __future__ import annotations

import math
import mmap
import sys
import zipfile
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

import torch

from gn_det.checkpoint.unpickler import Refused, Stream, Table, Unpickler
from gn_det.files import StrPath, open_regular
from gn_det.text import one_line

NOT_SAVED = "is not a checkpoint: torch.save did not write it; copy or download it again"
_MAX_DIRECTORY = 4 << 20  # bytes; a checkpoint has some 100 bytes for each tensor
_LEGACY_MAGIC, _LEGACY_PROTOCOL = 0x1950A86A20F9469CFC6C, 1001
#: Allowed dtypes of weights.
DTYPES = {
    "Half": torch.float16, "BFloat16": torch.bfloat16, "Float": torch.float32, "Double": torch.float64,
    "Char": torch.int8, "Short": torch.int16, "Int": torch.int32, "Long": torch.int64, "Byte": torch.uint8,
    "Bool": torch.bool,
}  # fmt: skip


def read_archive(path: StrPath, *, map_tensors: bool, verify: bool = False) -> Any:
    """Return the value in an archive of torch.save.

    Args:
        path: the file.
        map_tensors: map tensors from the file instead of reading them.
        verify: compare every record with its checksum first.

    Raises:
        Refused: the content is damaged or not allowed; the message does not name the file.
        Exception: of any type, for damaged bytes.
    """
    with open_regular(path) as file:
        # A private map: writing to tensors does not change the file.
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY if map_tensors else mmap.ACCESS_READ)
        records = _records(file, mapped, verify)
        root = next(iter(records), "").split("/")[0]
        if f"{root}/data.pkl" not in records:
            raise Refused(NOT_SAVED)
        if f"{root}/constants.pkl" in records:
            raise Refused("is a TorchScript program, not a checkpoint; save its state_dict() with torch.save")
        order = records.get(f"{root}/byteorder")
        swapped = order is not None and mapped[order[0] : sum(order)] != sys.byteorder.encode()

        def content(key: str, size: int, dtype: torch.dtype) -> torch.Tensor:
            begin, length = records[f"{root}/data/{key}"]
            if length < size:
                raise Refused(f"is damaged: a tensor claims {size} bytes, its record has {length}")
            if size and map_tensors and begin % dtype.itemsize == 0 and not swapped:
                return torch.frombuffer(mapped, dtype=torch.uint8, count=size, offset=begin)
            found = _read(file, torch.empty(size, dtype=torch.uint8), begin)
            if swapped:
                found.untyped_storage().byteswap(dtype)  # type: ignore[no-untyped-call, unused-ignore]
            return found

        return _Tensors(Stream(mapped, *records[f"{root}/data.pkl"]), len(mapped), content).load()


def read_legacy(path: StrPath) -> Any:
    """Return the value in a file of torch < 1.6; see :func:`read_archive`.

    Its storages follow the pickle that names them, so they are created first and filled later.
    """
    with open_regular(path) as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        promised = 0
        made: dict[str, tuple[torch.Tensor, int]] = {}

        def content(key: str, size: int, dtype: torch.dtype) -> torch.Tensor:
            nonlocal promised
            promised += size
            if promised > len(mapped):
                raise Refused(f"is damaged: its tensors claim {promised} bytes, the file has {len(mapped)}")
            made[key] = torch.empty(size, dtype=torch.uint8), dtype.itemsize
            return made[key][0]

        stream = Stream(mapped)
        pickles = _Tensors(stream, len(mapped), content)
        if pickles.load() != _LEGACY_MAGIC or pickles.load() != _LEGACY_PROTOCOL:
            raise Refused(NOT_SAVED)
        system = pickles.load()
        if not isinstance(system, dict):
            raise Refused(NOT_SAVED)
        if system.get("little_endian") is not (sys.byteorder == "little"):
            raise Refused("was written on a machine of another byte order; save it again with a newer torch")
        value, keys = pickles.load(), pickles.load()
        good = len(keys) == len(made) and {k for k in keys if type(k) is str} == set(made)
        for key in keys if good else ():
            tensor, itemsize = made[key]
            good = good and int.from_bytes(stream.read(8), "little") * itemsize == tensor.numel()
            _read(file, tensor, stream.at)
            stream.read(tensor.numel())
        if not good:
            raise Refused("is damaged: its tensors and their contents do not agree; copy or download it again")
        return value


def _read(file: BinaryIO, tensor: torch.Tensor, begin: int) -> torch.Tensor:
    file.seek(begin)
    if tensor.numel() and file.readinto(tensor.numpy()) != tensor.numel():  # type: ignore[attr-defined]
        raise Refused("is truncated; copy or download it again")
    return tensor


def _records(file: BinaryIO, mapped: mmap.mmap, verify: bool) -> dict[str, tuple[int, int]]:
    """Return offset and size of each record by name, after checking that reading them is cheap."""
    end: Any = zipfile._EndRecData(file)  # type: ignore[attr-defined]  # the same position that ZipFile reads next
    if not end:
        raise Refused("is truncated or damaged (no directory at its end); copy, download or train it again")
    if end[5] > _MAX_DIRECTORY:
        raise Refused(f"is not a checkpoint (the directory of the archive has {end[5]} bytes)")
    found: dict[str, tuple[int, int]] = {}
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        packed = any(record.compress_type or record.compress_size != record.file_size for record in records)
        if packed or sum(record.file_size for record in records) > len(mapped):
            raise Refused("is not a checkpoint written by torch.save (it unpacks to more than its size)")
        if verify and (broken := archive.testzip()):
            raise Refused(f"is damaged (wrong checksum of {one_line(broken, 100)}); copy, download or train it again")
    for record in records:
        begin = record.header_offset
        head = mapped[begin : begin + 30]
        begin += 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
        if head[:4] != b"PK\x03\x04" or record.filename in found or begin + record.file_size > len(mapped):
            raise Refused(f"is damaged (record {one_line(record.filename, 60)!r}); copy or download it again")
        found[record.filename] = begin, record.file_size
    return found


class _Storage(NamedTuple):
    """Storage that tensors are views of."""

    dtype: torch.dtype
    content: torch.Tensor


class _Tensors(Unpickler):
    """Unpickler of torch's tensors.

    Args:
        stream: holds the pickle.
        size: bytes of the whole file.
        content: returns the bytes of a storage by key, number of bytes and dtype.
    """

    def __init__(self, stream: Stream, size: int, content: Callable[[str, int, torch.dtype], torch.Tensor]) -> None:
        table: Table = {
            ("torch._utils", "_rebuild_tensor_v2"): _tensor,
            ("torch._utils", "_rebuild_tensor"): _tensor,
            ("torch._utils", "_rebuild_parameter"): _parameter,
            ("torch", "Size"): _shape,
            ("torch", "device"): lambda *_: "cpu",
        }
        for name, dtype in DTYPES.items():
            table["torch", f"{name}Storage"] = dtype
            table["torch", str(dtype).removeprefix("torch.")] = dtype  # a plain value, as in hyperparameters
        super().__init__(stream, table)
        self._size, self._content = size, content
        self._known: dict[str, torch.Tensor] = {}

    def persistent_load(self, pid: Any) -> _Storage:
        """Return the storage that torch refers to."""
        plain = type(pid) is tuple and len(pid) >= 5 and pid[5:] in ((), (None,)) and isinstance(pid[1], torch.dtype)
        if not plain or pid[0] != "storage" or type(pid[2]) is not str or type(pid[4]) is not int:
            raise Refused("is damaged: it refers to a storage in a way that torch.save does not")
        dtype, key, nbytes = pid[1], pid[2], pid[4] * pid[1].itemsize
        if not 0 <= nbytes <= self._size:
            raise Refused(f"is damaged: a tensor claims {one_line(nbytes)} bytes, the file has {self._size}")
        if key not in self._known:
            self._known[key] = self._content(key, nbytes, dtype)
        if self._known[key].numel() != nbytes:
            raise Refused("is damaged: it gives two lengths to one storage")
        return _Storage(dtype, self._known[key])


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, grad: Any = False, *_: Any) -> torch.Tensor:
    if not isinstance(storage, _Storage):
        raise Refused("makes a tensor of something that is not a storage")
    _check_view(storage.content.numel() // storage.dtype.itemsize, offset, size, stride)
    made = torch.empty(0, dtype=storage.dtype)
    made.set_(storage.content.untyped_storage(), offset, size, stride)
    return made.requires_grad_(grad is True and made.is_floating_point())


def _parameter(data: Any, grad: Any = True, *_: Any) -> torch.nn.Parameter:
    if type(data) is not torch.Tensor:
        raise Refused("makes a parameter of something that is not a tensor")
    return torch.nn.Parameter(data.detach(), grad is True and data.is_floating_point())


def _shape(value: Any = ()) -> tuple[int, ...]:
    if not _are_sizes(value):
        raise Refused("holds a torch.Size of something that is not sizes")
    return tuple(value)


def _are_sizes(value: Any) -> bool:
    return type(value) is tuple and len(value) <= 32 and all(type(n) is int and 0 <= n < 1 << 48 for n in value)


def _check_view(items: int, offset: Any, size: Any, stride: Any) -> None:
    """Check that a view of a storage of ``items`` numbers stays inside it, and that its elements do not overlap."""
    good = _are_sizes(size) and _are_sizes(stride) and len(size) == len(stride) and type(offset) is int and offset >= 0
    good = good and math.prod(max(n, 1) for n in size) < 1 << 60
    last = 0
    for step, length in sorted(zip(stride, size)) if good and 0 not in size else ():
        good = good and (step > last or length == 1)
        last += step * (length - 1)
    if not good or offset + last >= items + (0 in size):
        view = f"shape {one_line(size, 60)} and strides {one_line(stride, 60)}"
        raise Refused(f"holds a tensor of {view}, which is more than the file holds ({items} numbers in its storage)")
