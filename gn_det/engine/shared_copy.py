"""Share one copy of large data between all processes of a machine."""

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

#: Smaller arrays (bytes) are copied; a mapping starts at a multiple of this.
_PAGE = 4096


def load_once(load: Callable[[], T]) -> T:
    """Return the value of ``load()``, called on one rank per machine; the others map the same arrays and tensors.

    Writing to them changes a private copy of the page. All ranks must call this, and raise its UserError together.
    """
    if dist.world_size() == 1:
        return load()
    if not hasattr(os, "memfd_create"):  # only Linux has anonymous files
        return dist.on_first_rank(load)
    local = int(os.environ["LOCAL_RANK"])
    outcome: UserError | tuple[str, bytes, list[int]] | None = None
    file = -1
    if local == 0:
        try:
            value = load()
            file = os.memfd_create("gn_det")
            outcome = (f"/proc/{os.getpid()}/fd/{file}", *_write(value, file))
            del value  # the mapping replaces it
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
    """Pickles tensors like arrays, whose bytes are kept out of the pickle."""

    def reducer_override(self, value: Any) -> Any:
        return (torch.from_numpy, (value.numpy(),)) if isinstance(value, torch.Tensor) else NotImplemented


def _write(value: Any, file: int) -> tuple[bytes, list[int]]:
    """Write the arrays of ``value`` to ``file``; return a pickle of the rest, and the size of each array."""
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
