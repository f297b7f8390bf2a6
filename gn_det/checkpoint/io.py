"""Weights files: written atomically, read without running code from them.

A checkpoint is one ``torch.save`` archive ``{"model": state_dict, "iteration": int, ..., "gn_det": metadata}`` holding
tensors and plain values alone, so that ``torch.load(weights_only=True)`` and Detectron2's ``DetectionCheckpointer``
both read it.
"""

from __future__ import annotations

import os
import re
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch

from gn_det.checkpoint.numpy_pickle import read_pickle
from gn_det.checkpoint.safetensors_file import read_safetensors
from gn_det.checkpoint.torch_archive import DTYPES, check_view, read_archive, read_legacy, wrong_record
from gn_det.checkpoint.unpickler import Refused
from gn_det.errors import WeightsError
from gn_det.files import NotRegularFile, StrPath, atomic_write, open_regular
from gn_det.text import one_line

_PLAIN = (str, int, float, bool, type(None))
_CONTAINERS = (dict, OrderedDict, list, tuple)
_TENSORS = (torch.Tensor, torch.nn.Parameter)
# Tied weights have two names, seldom more; what is read may be this many times the file.
_SHARED = 4

_ZIP = b"PK\x03\x04"  # torch.save since 1.6
_LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # before, a magic number as the first pickle
_PICKLE = b"\x80"  # pickles since protocol 2
_NOT_WEIGHTS = (
    (b"<", "a web page or XML, probably a failed download; download it again"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; run `git lfs pull`"),
    (b"\x89PNG", "a picture"),
    (b"\xff\xd8\xff", "a picture"),
    (b"\x1f\x8b", "a gzip archive; unpack it first"),
)
# Pickles of protocol 0 and 1 have no mark: an empty dict, or a mark and a dict, or a dict's class.
_OLD_PICKLE = re.compile(rb"\(d[p.]|\}[q.(]|ccollections\n")


def save_checkpoint(path: StrPath, payload: Mapping[str, Any]) -> None:
    """Write ``payload`` atomically.

    Args:
        path: target file; its folder is created when absent.
        payload: tensors, dicts, lists, tuples, strings, numbers, booleans and None, nested at will.

    Raises:
        WriteError: the folder cannot be written or the disk is full; an older file of that name is kept.
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
    for key in value if isinstance(value, dict) else ():
        check_payload(key, f"a key of {where}")
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        check_payload(item, f"{where}[{key!r}]")


def read_checkpoint(path: StrPath, *, mmap: bool = False, verify: bool = False) -> dict[str, Any]:
    """Read a ``torch.save`` file on the CPU; nothing in it is executed, and nothing it claims is believed.

    Args:
        path: a local file (see :func:`gn_det.checkpoint.weights_uri.local_path` for URIs).
        mmap: map the tensors from the file instead of reading them; right when they are copied at once and dropped.
        verify: compare every record with the checksum in the archive, which torch does not: one flipped bit is found.
            Reads the file once more (about 1 s a GB).

    Returns:
        The saved dict; a dict of another layout is returned as it is. It holds dense tensors of real numbers, and plain
        values that pass :func:`gn_det.checkpoint.unpickler.check_values`.

    Raises:
        WeightsError: the file is missing, empty, truncated, not a checkpoint, or holds more than tensors and values.
    """
    return _guarded(path, lambda head: _read_torch(path, head, mmap=mmap, verify=verify))


def read_any(path: StrPath) -> dict[str, Any]:
    """Read the top-level dict of a torch file, a pickle of arrays, or a safetensors file, told apart by content.

    Raises:
        WeightsError: see :func:`read_checkpoint`.
    """

    def read(head: bytes) -> Any:
        if looks_like_safetensors(head):
            return read_safetensors(path)
        if head.startswith((_ZIP, _LEGACY)) or not (head.startswith(_PICKLE) or str(path).endswith(".pkl")):
            return _read_torch(path, head, mmap=True)
        return read_pickle(path)

    return _guarded(path, read)


def _read_torch(path: StrPath, head: bytes, *, mmap: bool, verify: bool = False) -> Any:
    if head.startswith(_PICKLE):
        return read_legacy(path)
    if not head.startswith(_ZIP):
        raise Refused("is not a checkpoint: torch.save did not write it; copy or download it again")
    if verify and (broken := wrong_record(path)):
        raise Refused(f"is damaged (checksum of {one_line(broken, 100)} is wrong); copy, download or train it again")
    return read_archive(path, map_tensors=mmap)


def _guarded(path: StrPath, read: Callable[[bytes], Any]) -> dict[str, Any]:
    """The dict that ``read`` makes of a file that begins with the given bytes; whatever it raises names the file."""
    head, where = read_head(path), one_line(str(path), 400)
    if mistake := known_mistake(head):
        raise WeightsError(f"{where}: not a checkpoint but {mistake}")
    try:
        loaded = read(head)
    except Refused as error:
        raise WeightsError(f"{where}: {error}") from None
    except Exception as error:  # whatever the bytes of a foreign file provoke in the reader is the file's fault
        raise WeightsError(
            f"{where}: is not a weights file or is damaged ({one_line(error)}); copy or download it again"
        ) from error
    if not isinstance(loaded, dict):
        raise WeightsError(f"{where}: holds a {type(loaded).__name__}, not a dict of weights")
    return loaded


# ------------------------------------------------------------ the first bytes of a file


def read_head(path: StrPath, size: int = 64) -> bytes:
    """Return the first bytes of a regular file that must hold something.

    Raises:
        WeightsError: no such file, a folder, pipe or device, unreadable, or empty.
    """
    try:
        with open_regular(path) as file:
            head = file.read(size)
        problem = "" if head else "is empty; copy or download it again"
    except FileNotFoundError:
        problem = "no such file; give an existing checkpoint (MODEL.WEIGHTS)"
    except IsADirectoryError:
        problem = "is a folder; give the checkpoint file in it, such as model_best.pth"
    except NotRegularFile as error:
        problem = f"{error.strerror}; give a checkpoint file (MODEL.WEIGHTS)"
    except (OSError, ValueError) as error:
        problem = f"cannot be read ({one_line(getattr(error, 'strerror', '') or error)})"
    if problem:
        raise WeightsError(f"{one_line(str(path), 400)}: {problem}")
    return head


def looks_like_safetensors(head: bytes) -> bool:
    """Whether the first bytes are a header's length and its opening brace."""
    return head[8:9] == b"{" and not head.startswith(_ZIP)


def known_mistake(head: bytes) -> str:
    """Return what a file that is not weights seems to be, and what to do; "" when it looks like nothing known."""
    return next((what for magic, what in _NOT_WEIGHTS if head.lstrip().startswith(magic)), "")


def not_weights(head: bytes) -> str:
    """Return what a file is instead of weights, by its first bytes; "" where it can be weights."""
    pickled = re.match(rb"\x80[\x01-\x05]", head) or _OLD_PICKLE.match(head)
    if head.startswith(_ZIP) or looks_like_safetensors(head) or pickled:
        return ""
    return known_mistake(head) or f"something that begins with {one_line(head[:16], 80)}"


# ------------------------------------------------------------ tensors


def tensor_problem(value: Any) -> str:
    """Return what is wrong with a value that should be a dense tensor of real numbers on the CPU; "" if nothing is."""
    if type(value) not in _TENSORS:
        return f"is a {type(value).__name__}, not a tensor"
    plain = value.layout == torch.strided and not value.is_nested and value.dtype in DTYPES.values()
    return "" if plain and value.device.type == "cpu" else "is not a plain tensor of real numbers on the CPU"


def check_tensors(path: StrPath, tensors: Mapping[str, Any]) -> None:
    """Refuse whatever is not a dense tensor of real numbers, or claims more than the file holds.

    Args:
        path: the file they were read from.
        tensors: as they are to be used, by name; one that has several names counts each time.

    Raises:
        WeightsError: the message names the file and the entry.
    """
    where, claimed, size = one_line(str(path), 400), 0, os.path.getsize(path)
    for name, value in tensors.items():
        problem = tensor_problem(value)
        if not problem:
            items = value.untyped_storage().nbytes() // value.element_size()
            try:
                check_view(items, value.storage_offset(), tuple(value.shape), value.stride())
            except Refused as error:
                problem = str(error)
            claimed += value.numel() * value.element_size()
        if problem:
            raise WeightsError(f"{where}: entry {one_line(name, 60)!r} {problem}")
        if claimed > _SHARED * size + 1024:
            raise WeightsError(
                f"{where}: its entries share their contents so often that they are more than {_SHARED} times the file; "
                "no model does that"
            )
