"""One copy of large data for all processes of a machine."""

from __future__ import annotations

import io
import mmap
import os
import pickle
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from gn_det.engine import dist
from gn_det.errors import UserError

T = TypeVar("T")

#: Arrays below this many bytes are copied; a mapping begins at a multiple of it.
_PAGE = 4096


def load_once(load: Callable[[], T]) -> T:
    """The value of ``load()``, called on one rank of each machine; the others map the same arrays and tensors.

    Whoever writes into them changes a copy of the page. All ranks take part.

    Raises:
        UserError: ``load`` raised it on any machine; the same one on every rank.
    """
    if dist.world_size() == 1:
        return load()
    if not hasattr(os, "memfd_create"):  # only Linux has files without a name
        loaded: list[T] = []
        dist.on_first_rank(lambda: loaded.append(load()))  # before the others, because it writes generated sets
        return loaded[0] if loaded else load()
    local = int(os.environ["LOCAL_RANK"])
    outcome: UserError | tuple[str, bytes, list[int]] | None = None
    file = -1
    if local == 0:
        try:
            value = load()
            file = os.memfd_create("gn_det")
            outcome = (f"/proc/{os.getpid()}/fd/{file}", *_write(value, file))
            del value  # the mapping takes its place
        except UserError as error:
            outcome = error
    outcomes: list[Any] = dist.broadcast(dist.gather_objects(outcome))
    try:
        for found in outcomes:
            if isinstance(found, UserError):
                raise found
        result: T = _read(*outcomes[dist.rank() - local])
        dist.broadcast(dist.gather_objects(None))  # all have opened the file
        return result
    finally:
        if file >= 0:
            os.close(file)


class _Pickler(pickle.Pickler):
    """Takes tensors for arrays, whose bytes stay out of the pickle."""

    def reducer_override(self, value: Any) -> Any:
        return (torch.from_numpy, (value.numpy(),)) if isinstance(value, torch.Tensor) else NotImplemented


def _write(value: Any, file: int) -> tuple[bytes, list[int]]:
    """Write the arrays of ``value`` into ``file``; the rest as a pickle, and the size of each array."""
    arrays: list[memoryview] = []

    def keep_out(buffer: pickle.PickleBuffer) -> bool:
        small = buffer.raw().nbytes < _PAGE
        if not small:
            arrays.append(buffer.raw())
        return small

    stream = io.BytesIO()
    _Pickler(stream, protocol=5, buffer_callback=keep_out).dump(value)
    with os.fdopen(os.dup(file), "wb") as out:
        for array in arrays:
            out.write(array)
            out.write(bytes(-array.nbytes % _PAGE))
    return stream.getvalue(), [array.nbytes for array in arrays]


def _read(path: str, rest: bytes, sizes: list[int]) -> Any:
    if not sizes:
        return pickle.loads(rest)
    with open(path, "rb") as file:
        memory = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY))
    arrays, at = [], 0
    for size in sizes:
        arrays.append(memory[at : at + size])
        at += size + -size % _PAGE
    return pickle.loads(rest, buffers=arrays)
