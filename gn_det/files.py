"""Open, place and lock files when the path comes from outside, and write files atomically.

A path from a user, a config or a checkpoint may name a pipe that never answers, a device that never ends, or a place
outside the folder it belongs to.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any, BinaryIO, TextIO

from gn_det.errors import WriteError
from gn_det.text import one_line, printable

fcntl: Any
try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

StrPath = str | os.PathLike[str]


class NotRegularFile(OSError):
    """The path names a pipe, device, socket or folder where a file is needed."""


def open_regular(path: StrPath) -> BinaryIO:
    """Open a regular file for reading; a link to one is followed.

    Opening never waits: a named pipe without a writer is refused instead.

    Raises:
        NotRegularFile: the path is a pipe, device, socket or folder, named in ``strerror``.
        OSError: it does not exist or may not be read.
        ValueError: the name holds a NUL character.
    """
    file: BinaryIO = _open(path, os.O_RDONLY, "rb")
    return file


def _open(path: StrPath, flags: int, mode: str, **options: Any) -> Any:
    flags |= getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags, 0o666)
    try:
        _require_regular(os.fstat(descriptor).st_mode, path)
        return os.fdopen(descriptor, mode, **options)
    except BaseException:
        os.close(descriptor)
        raise


def digest(path: StrPath, hasher: Any) -> bytes:
    """Return the digest of a regular file's content by a hash of ``hashlib``; errors as :func:`open_regular`."""
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            hasher.update(block)
    return bytes(hasher.digest())


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


def open_append(folder: StrPath, name: str) -> TextIO:
    """Open the regular file ``folder/name`` for appending text; OSError if a link leads out of the folder."""
    try:
        path = inside(folder, name)
    except ValueError as error:
        raise OSError(errno.ELOOP, str(error), os.fspath(Path(folder) / name)) from None
    file: TextIO = _open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, "a", encoding="utf-8")
    return file


def check_writable(folder: StrPath, key: str = "OUTPUT_DIR") -> Path:
    """Return ``folder``, which the user calls ``key``, after creating it and writing to it, or raise WriteError."""
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as probe:
            probe.write(b"0")
            probe.flush()
    except OSError as error:
        reason = error.strerror or error
        raise WriteError(f"{key} {path}: cannot be written ({reason}); set {key} to another folder") from None
    return path


def shipped_folder(name: str) -> Path:
    """Return a folder of shipped files, in the installed package or beside it in the checkout."""
    package = Path(__file__).resolve().parent
    return next(folder.resolve() for folder in (package / name, package.parent / name) if folder.is_dir())


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
    base = Path(os.path.realpath(folder))
    path = base.joinpath(*parts)
    real = Path(os.path.realpath(path))  # not Path.resolve, which raises RuntimeError for a loop of links
    if not real.is_relative_to(base) or real == base:
        raise ValueError("the name leads out of its folder")
    if any(place.is_symlink() for place in (real, *real.parents)):  # what realpath could not follow
        raise ValueError("the name is a loop of links")
    return path


Content = str | bytes | Iterable[bytes | memoryview] | Callable[[IO[bytes]], object]


def atomic_write(path: StrPath, content: Content) -> None:
    """Write a file so that at every moment the old or the new one is there, whole, even after a power cut.

    Args:
        path: target; its folder is created when absent. A link is replaced, never followed.
        content: text (UTF-8), bytes, pieces of bytes, or a function that writes to a binary file.

    Raises:
        WriteError: the file system refuses, or ``path`` is a folder, pipe or device; nothing is left behind.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    try:
        with contextlib.suppress(FileNotFoundError):
            check_regular(target)  # renaming would replace a device by a file
        target.parent.mkdir(parents=True, exist_ok=True)
        # A file of that name is left from a dead process, or a link that somebody put there.
        temporary.unlink(missing_ok=True)
        with open(temporary, "xb") as raw:
            file = _ErrorKeeper(raw)
            try:
                if callable(content):
                    content(file)  # type: ignore[arg-type]
                else:
                    for piece in [content] if isinstance(content, (str, bytes)) else content:
                        file.write(piece.encode() if isinstance(piece, str) else piece)
            except RuntimeError as error:
                # torch's archive writer turns the OSError of a full disk into a RuntimeError without errno.
                raise file.error or error from None
            raw.flush()
            os.fsync(raw.fileno())
        os.replace(temporary, target)
        _sync_folder(target.parent)
    except (OSError, ValueError) as error:  # ValueError: a name with a NUL character
        where, reason = one_line(os.fspath(path), 400), one_line(getattr(error, "strerror", None) or error)
        odd = isinstance(error, NotRegularFile)
        remedy = "give the name of a file" if odd else "free space or choose another place"
        raise WriteError(f"{where}: cannot be written ({reason}); {remedy}") from error
    finally:
        with contextlib.suppress(OSError, ValueError):
            temporary.unlink(missing_ok=True)


class _ErrorKeeper:
    """A write-only file that remembers the first OSError, for writers that swallow it."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except OSError as error:
            self.error = self.error or error
            raise

    def flush(self) -> None:
        self._file.flush()


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable; not every file system lets a folder be opened for that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def json_bytes(data: Any, **options: Any) -> bytes:
    """Return ``data`` as UTF-8 json; ``options`` as of json.dumps.

    File names that are not UTF-8 hold surrogates, which UTF-8 cannot encode: then all of the json is ASCII, with
    escapes (``\\udcff``) that read back as the names that open the files.
    """
    try:
        return json.dumps(data, ensure_ascii=False, **options).encode("utf-8")
    except UnicodeEncodeError:
        return json.dumps(data, **options).encode("ascii")


class Busy(OSError):
    """Another run holds the lock.

    Attributes:
        holder: what it wrote into the lock file about itself; "" where that cannot be read.
    """

    def __init__(self, path: StrPath, holder: str) -> None:
        super().__init__(errno.EWOULDBLOCK, "in use by another process", os.fspath(path))
        self.holder = holder


#: Locked files of this process, by device and number: the kernel's locks tell processes apart, not parts of one.
_held: set[tuple[int, int]] = set()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_held.clear)


@contextlib.contextmanager
def lock(path: StrPath, *, patience: float = 0.0) -> Iterator[None]:
    """Hold an exclusive lock on the file ``path`` (made where absent) while the context lasts.

    The kernel releases the lock when its process ends, however it ends, so a killed run never blocks the next one; a
    process that it forked (a loader's worker) and that outlives it does not hold the lock.

    Args:
        patience: seconds to wait for a holder that is about to end.

    Raises:
        Busy: another process, or another context of this one, holds it.
        OSError: the file cannot be made, or the file system has no locks (``errno.ENOLCK``, ``ENOSYS``, ``ENOTSUP``).
    """
    with contextlib.suppress(FileNotFoundError):
        status = os.stat(path, follow_symlinks=False)
        if (status.st_dev, status.st_ino) in _held:  # to open and close the file would release the lock
            raise Busy(path, f"process {os.getpid()}")
    # Do not follow links or truncate: others may be able to write to the folder.
    with _open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), "r+b", buffering=0) as file:
        deadline = time.monotonic() + patience
        while not _try_lock(file):
            if time.monotonic() >= deadline:
                raise Busy(path, _holder(file))
            time.sleep(0.05)
        status = os.fstat(file.fileno())
        key = (status.st_dev, status.st_ino)
        _held.add(key)
        try:
            with contextlib.suppress(OSError):  # a full disk: the lock holds all the same
                file.truncate(0)
                file.write(f"process {os.getpid()} on {platform.node()}".encode())
            yield
        finally:
            _held.discard(key)
            with contextlib.suppress(OSError):
                file.truncate(0)


def _holder(file: BinaryIO) -> str:
    try:
        return printable(file.read(100).decode("utf-8", "replace"), keep="")
    except OSError:  # Windows does not let it be read
        return ""


def _try_lock(file: BinaryIO) -> bool:
    if fcntl is not None:
        try:
            # A record lock, which belongs to the process: flock's would pass on to forked workers.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                return False
            raise
        return True
    import portalocker

    try:
        portalocker.lock(file, portalocker.LockFlags.EXCLUSIVE | portalocker.LockFlags.NON_BLOCKING)
    except portalocker.LockException:
        return False
    return True
