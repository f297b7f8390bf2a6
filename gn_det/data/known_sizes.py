"""Sizes of image files that were checked before, remembered in the user's cache folder.

A file counts as the same while its length and its time of change are. What the cache file says is checked like any file
from outside; at worst it makes a damaged image go unnoticed until it is read.
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

#: A cache file of more bytes is ignored.
_LARGEST = 1 << 30
#: A file that changed so recently may change again within the resolution of its time (in nanoseconds).
_SETTLED = 2 * 10**9
_VERSION = 1

_Side = Annotated[int, msgspec.Meta(ge=1, le=2**31)]


class _Known(msgspec.Struct, forbid_unknown_fields=True):
    """``files``: name to length, time of change in nanoseconds, width and height."""

    version: int
    files: dict[str, tuple[int, int, _Side, _Side]]


class KnownSizes:
    """The sizes that are known of the files below one folder, for one way of reading them."""

    def __init__(self, root: str, reader: ImageReader) -> None:
        self._reader = reader
        key = repr((os.path.abspath(root), bool(reader.bit_depth), reader.max_pixels))
        cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
        name = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
        self.path = cache / "gn_det" / "image_sizes" / f"{name}.json"
        self._files = _read(self.path)
        self._found: dict[str, tuple[int, int, int, int]] = {}

    def size(self, name: str, path: str) -> tuple[int, int]:
        """:meth:`ImageReader.size` of the file ``name``, opened only where it is not known or has changed."""
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
        """Write what is new; a cache that cannot be written is none."""
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
