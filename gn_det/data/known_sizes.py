"""Cache, in the user's cache folder, of the sizes of image files that were checked before.

A file counts as unchanged while its length and modification time are. The cache file is validated like any outside
file; at worst, a damaged image goes unnoticed until it is read.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import msgspec

from gn_det.data.image import ImageReader
from gn_det.errors import WriteError
from gn_det.files import atomic_write, open_regular

#: Larger cache files (bytes) are ignored.
_LARGEST = 1 << 30
#: A file modified this recently may change again without a new time stamp (nanoseconds).
_SETTLED = 2 * 10**9
_VERSION = 1

_Side = Annotated[int, msgspec.Meta(ge=1, le=2**31)]


class _Known(msgspec.Struct, forbid_unknown_fields=True):
    """``files``: name to length, modification time in nanoseconds, width and height."""

    version: int
    files: dict[str, tuple[int, int, _Side, _Side]]


class KnownSizes:
    """Known sizes of the files below one folder, for one image reader."""

    def __init__(self, root: str, reader: ImageReader) -> None:
        self._reader = reader
        key = repr((os.path.abspath(root), bool(reader.bit_depth), reader.max_pixels))
        cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
        name = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
        self.path = cache / "gn_det" / "image_sizes" / f"{name}.json"
        self._files = _read(self.path)
        self._found: dict[str, tuple[int, int, int, int]] = {}

    def size(self, name: str, path: str) -> tuple[int, int]:
        """Return :meth:`ImageReader.size` of the file ``name``; opens it only if it is new or has changed."""
        try:
            status = os.stat(path)
        except (OSError, ValueError):
            return self._reader.size(path)
        length, changed, width, height = self._files.get(name, (-1, 0, 1, 1))
        if (length, changed) == (status.st_size, status.st_mtime_ns) and width * height <= self._reader.max_pixels:
            return width, height
        size = self._reader.size(path)
        if name.isprintable() and time.time_ns() - status.st_mtime_ns > _SETTLED:
            self._found[name] = (status.st_size, status.st_mtime_ns, *size)
        return size

    def write(self) -> None:
        """Write new entries; ignore a cache that cannot be written."""
        if self._found:
            content = msgspec.json.encode(_Known(_VERSION, {**self._files, **self._found}))
            with suppress(WriteError):
                atomic_write(self.path, content)


def _read(path: Path) -> Mapping[str, tuple[int, int, int, int]]:
    try:
        with open_regular(path) as file:
            data = file.read(_LARGEST + 1)
        known = msgspec.json.decode(data, type=_Known) if len(data) <= _LARGEST else None
    except (OSError, ValueError, RecursionError, msgspec.MsgspecError):
        return {}
    return known.files if known is not None and known.version == _VERSION else {}
