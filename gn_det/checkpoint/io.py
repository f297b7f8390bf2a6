"""Checkpoint files: written atomically, read without running code from them.

A checkpoint is one ``torch.save`` archive ``{"model": state_dict, "iteration": int, ..., "gn_det": metadata}`` holding
tensors and plain values alone, so that ``torch.load(weights_only=True)`` and Detectron2's ``DetectionCheckpointer``
both read it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pickle
import re
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import torch

from gn_det.errors import TrainingError, WeightsError
from gn_det.files import StrPath
from gn_det.text import one_line

_PLAIN = (str, int, float, bool, type(None))
_CONTAINERS = (dict, OrderedDict, list, tuple)
_TENSORS = (torch.Tensor, torch.nn.Parameter)
_ZIP_MAGIC = b"PK\x03\x04"
_PICKLE_MAGIC = b"\x80"  # of files of torch < 1.6
# What people hand over by mistake, recognised by the first bytes, and what to tell them.
_NOT_WEIGHTS = (
    (b"<", "a web page or XML, probably a failed download; download it again"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; run `git lfs pull`"),
    (b"\x89PNG", "a picture"),
    (b"\xff\xd8\xff", "a picture"),
    (b"\x1f\x8b", "a gzip archive; unpack it first"),
)


# ----------------------------------------------------------------------------------------------------------- writing


def save_checkpoint(path: StrPath, payload: Mapping[str, Any]) -> None:
    """Write ``payload`` to ``path`` so that at every moment the old or the new file is there, whole.

    Args:
        path: target file; its folder is created when absent.
        payload: tensors, dicts, lists, tuples, strings, numbers, booleans and None, nested at will.

    Raises:
        TrainingError: the folder cannot be written or the disk is full; an older file of that name is kept.
        TypeError: the payload holds something that ``weights_only=True`` could not load (a defect of the caller).
    """
    check_payload(payload)
    atomic_write(path, lambda file: torch.save(dict(payload), file))


def check_payload(value: Any, where: str = "payload") -> None:
    """Refuse, by its place in the payload, anything that is not a tensor or a plain value."""
    if type(value) in _PLAIN or type(value) in _TENSORS:
        return
    if type(value) not in _CONTAINERS:
        raise TypeError(
            f"{where} is a {type(value).__module__}.{type(value).__qualname__}; a checkpoint holds only tensors, "
            "dicts, lists, tuples, strings, numbers, booleans and None, so that it loads with weights_only=True"
        )
    if isinstance(value, dict):
        for key, item in value.items():
            check_payload(key, f"a key of {where}")
            check_payload(item, f"{where}[{key!r}]")
    else:
        for index, item in enumerate(value):
            check_payload(item, f"{where}[{index}]")


def atomic_write(path: StrPath, write: Any) -> None:
    """Call ``write(binary file)`` on a temporary file beside ``path``, sync it, and rename it over ``path``.

    Raises:
        TrainingError: any failure of the file system; the temporary file is removed and the old file kept.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.tmp-{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # What lies under that name is of a process that is gone, or a link that somebody put there: never followed.
        temporary.unlink(missing_ok=True)
        with open(temporary, "wb", opener=_new_file) as raw:
            file = _ErrorKeeper(raw)
            try:
                write(file)
            except RuntimeError:
                # torch's archive writer turns the OSError of a full disk into a RuntimeError without errno.
                if file.error is not None:
                    raise file.error from None
                raise
            raw.flush()
            os.fsync(raw.fileno())
        os.replace(temporary, target)
        _sync_folder(target.parent)
    except OSError as error:
        _remove(temporary)
        raise TrainingError(_write_failure(target, error)) from error
    except BaseException:
        _remove(temporary)
        raise


def _new_file(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), 0o666)


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


def _write_failure(target: Path, error: OSError) -> str:
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        advice = "free space on that disk or set OUTPUT_DIR elsewhere, then go on with --resume"
    else:
        advice = "set OUTPUT_DIR to a folder that can be written"
    kept = "; the older file of that name is kept" if target.exists() else ""
    return f"{target}: cannot write the file ({error.strerror or error}){kept}: {advice}"


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable; not every file system lets a folder be opened for that."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    with contextlib.suppress(OSError):
        os.fsync(descriptor)
    os.close(descriptor)


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------------- reading


def read_checkpoint(path: StrPath, *, mmap: bool = False, verify: bool = False) -> dict[str, Any]:
    """Read a ``torch.save`` file on the CPU with ``weights_only=True``; nothing in it is executed.

    Args:
        path: a local file (see :func:`gn_det.checkpoint.catalog.local_path` for URIs).
        mmap: map the tensors from the file instead of reading them; right when they are copied at once and dropped.
        verify: compare every record with the checksum in the archive, which torch does not: one flipped bit is found.
            Reads the file once more (about 1 s a GB).

    Returns:
        The saved dict; a dict of another layout is returned as it is.

    Raises:
        WeightsError: the file is missing, empty, truncated, not a checkpoint, or holds more than tensors and values.
    """
    head = read_head(path)
    is_zip = head.startswith(_ZIP_MAGIC)
    for magic, what in _NOT_WEIGHTS:
        if head.lstrip().startswith(magic):
            raise WeightsError(f"{path}: not a checkpoint but {what}")
    if is_zip:
        _check_archive(path, verify=verify)
    elif not head.startswith(_PICKLE_MAGIC):
        raise WeightsError(f"{path}: not a checkpoint: torch.save did not write it; copy or download it again")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on pickle protocols and torch's own storage classes: nothing to act on
            # Only archives can be mapped; files of torch < 1.6 are one stream of pickles.
            loaded = torch.load(os.fspath(path), map_location="cpu", weights_only=True, mmap=mmap and is_zip)
    except Exception as error:  # whatever the bytes of a foreign file provoke in the reader is the file's fault
        raise WeightsError(_read_failure(path, error)) from error
    if not isinstance(loaded, dict):
        raise WeightsError(f"{path}: holds a {type(loaded).__name__}, not a dict of weights")
    return loaded


def read_head(path: StrPath, size: int = 64) -> bytes:
    """The first bytes of a file that must exist and hold something.

    Raises:
        WeightsError: no such file, a folder, unreadable, or empty.
    """
    try:
        with open(path, "rb") as file:
            head = file.read(size)
    except FileNotFoundError:
        raise WeightsError(f"{path}: no such file; give an existing checkpoint (MODEL.WEIGHTS)") from None
    except IsADirectoryError:
        raise WeightsError(f"{path}: is a folder; give the checkpoint file in it, such as model_best.pth") from None
    except (OSError, ValueError) as error:
        raise WeightsError(f"{path}: cannot be read ({error})") from None
    if not head:
        raise WeightsError(f"{path}: is empty; copy or download it again")
    return head


def _check_archive(path: StrPath, *, verify: bool = False) -> None:
    """torch stores its records uncompressed: an archive that unpacks to more than itself is damaged or a bomb."""
    broken = None
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            if verify and all(r.compress_type == zipfile.ZIP_STORED for r in records):
                broken = archive.testzip()
        size = os.path.getsize(path)
    except Exception as error:  # zipfile raises many types on damaged archives
        raise WeightsError(
            f"{path}: is truncated or damaged ({one_line(error)}); copy, download or train it again"
        ) from None
    if broken is not None:
        raise WeightsError(
            f"{path}: is damaged (checksum of {one_line(broken)} is wrong); copy, download or train it again"
        )
    if any(r.compress_type != zipfile.ZIP_STORED for r in records) or sum(r.file_size for r in records) > size:
        raise WeightsError(f"{path}: is not a checkpoint written by torch.save (it unpacks to more than its size)")


def _read_failure(path: StrPath, error: Exception) -> str:
    text = str(error)
    foreign = re.search(r"(?:GLOBAL|unsupported class) ([\w.]+)", text)
    if foreign and isinstance(error, pickle.UnpicklingError):
        return (
            f"{path}: holds {one_line(foreign.group(1))}, which is not loaded because it could run code; "
            "save the weights alone, as in torch.save({'model': model.state_dict()}, path)"
        )
    if "TorchScript" in text:
        return f"{path}: is a TorchScript program, not a checkpoint; save its state_dict() with torch.save"
    # torch's own advice (load it without weights_only) is what nobody should follow here.
    reason = type(error).__name__ if "weights_only" in text else one_line(error)
    return f"{path}: is not a checkpoint or is damaged ({reason}); copy, download or train it again"
