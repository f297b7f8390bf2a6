"""Open, place and lock files when the path comes from outside.

A path from a user, a config or a checkpoint may name a pipe that never answers, a device that never ends, or a place
outside the folder it belongs to.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

StrPath = str | os.PathLike[str]


class NotRegularFile(OSError):
    """The path names a pipe, device, socket or folder where a file is needed."""


def open_regular(path: StrPath) -> BinaryIO:
    """Open a regular file for reading; a link to one is followed.

    Opening never waits: a named pipe without a writer is refused instead.

    Raises:
        NotRegularFile: the path is a pipe, device, socket or folder; ``strerror`` says which.
        OSError: it does not exist or may not be read.
        ValueError: the name holds a NUL character.
    """
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        _require_regular(os.fstat(descriptor).st_mode, path)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def check_regular(path: StrPath) -> None:
    """Raise what :func:`open_regular` would, for libraries that open a path themselves."""
    _require_regular(os.stat(path).st_mode, path)


def _require_regular(mode: int, path: StrPath) -> None:
    if stat.S_ISREG(mode):
        return
    kinds = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"))
    kind = next((name for test, name in kinds if test(mode)), "a device")
    number = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
    raise NotRegularFile(number, f"it is {kind}, not a regular file", os.fspath(path))


def inside(folder: StrPath, relative: str) -> Path:
    """Return ``folder/relative`` after checking that it stays inside ``folder``, links included.

    Args:
        folder: need not exist.
        relative: from a URL or a file's content, with "/" between parts.

    Raises:
        ValueError: the place is outside ``folder`` or is ``folder`` itself, or the name is empty or holds a NUL
            character.
    """
    parts = relative.split("/")
    if not relative or "\0" in relative or "\\" in relative or any(part in ("", ".", "..") for part in parts):
        raise ValueError("the name is not a plain relative path")
    base = Path(folder).resolve()
    path = base.joinpath(*parts)
    if not path.resolve().is_relative_to(base) or path.resolve() == base:
        raise ValueError("the name leads out of its folder")
    return path


class Busy(OSError):
    """Another process holds the lock."""


@contextlib.contextmanager
def lock(path: StrPath) -> Iterator[None]:
    """Hold an exclusive lock on the file ``path`` (made where absent) while the context lasts.

    The kernel releases the lock when its process ends, however it ends, so a killed run never blocks the next one.

    Raises:
        Busy: another process, or another context of this one, holds it.
        OSError: the file cannot be made.
    """
    import portalocker

    # No link is followed and nothing is truncated: the name lies in a folder that others may write to.
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    with os.fdopen(descriptor, "r+b") as file:
        try:
            portalocker.lock(file, portalocker.LockFlags.EXCLUSIVE | portalocker.LockFlags.NON_BLOCKING)
        except portalocker.LockException as error:
            raise Busy(errno.EWOULDBLOCK, "in use by another process", os.fspath(path)) from error
        yield
