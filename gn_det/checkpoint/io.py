"""Read and write weights files: atomic writes, and reads that execute no code.

A checkpoint is a ``torch.save`` archive ``{"model": state_dict, "iteration": int, ..., "gn_det": metadata}`` of tensors
and plain values, so both ``torch.load(weights_only=True)`` and Detectron2's ``DetectionCheckpointer`` read it. Our
safetensors files have the metadata as JSON in the header.
"""

from __future__ import annotations

import json
import os
import re
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch

from gn_det.checkpoint.torch_archive import DTYPES, NOT_SAVED, read_archive, read_legacy
from gn_det.checkpoint.unpickler import MAX_KEY, Refused, check_values, read_pickle
from gn_det.errors import WeightsError
from gn_det.files import StrPath, atomic_write, open_regular
from gn_det.text import one_line

_PLAIN = (str, int, float, bool, type(None))
_CONTAINERS = (dict, OrderedDict, list, tuple)
_TENSORS = (torch.Tensor, torch.nn.Parameter)
# Tied weights rarely have more than two names; tensors may add up to this multiple of the file size.
_SHARED = 4
# The header of a ResNet-101 detector has about 60 kB; safetensors' limit of 100 MB could become gigabytes of dicts.
_MAX_HEADER = 8 << 20
_META = "gn_det"

_ZIP = b"PK\x03\x04"  # torch.save since 1.6
_LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # before, a magic number as the first pickle
# Protocols 0 and 1 have no magic number: an empty dict, a mark and a dict, or a dict's class.
_PICKLE = re.compile(rb"\x80[\x01-\x05]|\(d[p.]|\}[q.(]|ccollections\n")
_NOT_WEIGHTS = (
    (rb"<[!?a-z]", "a web page or XML, probably a failed download; download it again"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself; run `git lfs pull`"),
    (rb"\x89PNG|\xff\xd8\xff", "a picture"),
    (b"\x1f\x8b", "a gzip archive; unpack it first"),
)


def save_checkpoint(path: StrPath, payload: Mapping[str, Any]) -> None:
    """Write ``payload`` atomically.

    Args:
        path: target file; its folder is created if missing.
        payload: nested tensors, dicts, lists, tuples, strings, numbers, booleans and None.

    Raises:
        WriteError: the folder cannot be written or the disk is full; an existing file is kept.
        TypeError: the payload contains something that ``weights_only=True`` cannot load (a bug in the caller).
    """
    check_payload(payload)
    atomic_write(path, lambda file: torch.save(dict(payload), file))


def check_payload(value: Any, where: str = "payload") -> None:
    """Refuse anything that is not a tensor or a plain value, naming its place in the payload."""
    if type(value) in _PLAIN or type(value) in _TENSORS:
        return
    if type(value) not in _CONTAINERS:
        raise TypeError(
            f"{where} is a {type(value).__module__}.{type(value).__qualname__}; a checkpoint holds only tensors, "
            "dicts, lists, tuples, strings, numbers, booleans and None, so that it loads with weights_only=True"
        )
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        check_payload(key, f"a key of {where}")
        check_payload(item, f"{where}[{key!r}]")


def read_checkpoint(path: StrPath, *, mmap: bool = False, verify: bool = False) -> dict[str, Any]:
    """Read a ``torch.save`` file on the CPU without executing or trusting its content.

    Args:
        path: a local file (see :func:`gn_det.checkpoint.weights_uri.local_path` for URIs).
        mmap: map the tensors from the file instead of reading them, for tensors that are copied and dropped at once.
        verify: compare every record with its checksum in the archive, which torch does not. Finds a single flipped bit,
            but reads the file once more (about 1 s per GB).

    Returns:
        The saved dict, whatever its layout. It contains dense tensors of real numbers, and plain values that pass
        :func:`gn_det.checkpoint.unpickler.check_values`.

    Raises:
        WeightsError: the file is missing, empty, truncated, not a checkpoint, or contains other objects.
    """
    return _read(path, mmap=mmap, verify=verify)


def read_any(path: StrPath) -> dict[str, Any]:
    """Read the top-level dict of a torch file, a pickle of arrays, or a safetensors file, recognized by content.

    Raises:
        WeightsError: see :func:`read_checkpoint`.
    """
    return _read(path, mmap=True, foreign=True)


def _read(path: StrPath, *, mmap: bool, verify: bool = False, foreign: bool = False) -> dict[str, Any]:
    """Read the dict of a torch file or, if ``foreign``, of another container; errors name the file."""
    head, where = read_head(path), one_line(str(path), 400)
    if mistake := _known_mistake(head):
        raise WeightsError(f"{where}: not a checkpoint but {mistake}")
    other = foreign and not head.startswith((_ZIP, _LEGACY))
    try:
        if other and _looks_like_safetensors(head):
            loaded = _read_safetensors(path)
        elif other and (head.startswith(b"\x80") or str(path).endswith(".pkl")):
            loaded = read_pickle(path)
        elif head.startswith(b"\x80"):
            loaded = read_legacy(path)
        elif head.startswith(_ZIP):
            loaded = read_archive(path, map_tensors=mmap, verify=verify)
        else:
            raise Refused(NOT_SAVED)
    except Refused as error:
        raise WeightsError(f"{where}: {error}") from None
    except Exception as error:  # any exception here is caused by the file's content
        reason = f"is not a weights file or is damaged ({one_line(error)})"
        raise WeightsError(f"{where}: {reason}; copy or download it again") from error
    if not isinstance(loaded, dict):
        raise WeightsError(f"{where}: holds a {type(loaded).__name__}, not a dict of weights")
    return loaded


# ------------------------------------------------------------ safetensors


def _read_safetensors(path: StrPath) -> dict[str, Any]:
    """Return ``{"model": tensors, "gn_det": block}``, or ``{"state_dict": ..., "metadata": ...}`` of a foreign file.

    The tensors are mapped from the file; the library checks that they are inside it and do not overlap.
    """
    from safetensors import safe_open

    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        claimed = int.from_bytes(file.read(8), "little")
    if claimed > min(_MAX_HEADER, size - 8):
        claims = f"it claims a header of {claimed} bytes, the file has {size}"
        raise Refused(f"is a truncated or damaged safetensors file ({claims}); copy or download it again")
    with safe_open(os.fspath(path), framework="pt", device="cpu") as file:
        metadata = dict(file.metadata() or {})
        names = list(file.keys())
        if any(len(name) > MAX_KEY for name in names):
            raise Refused(f"holds a tensor with a name of more than {MAX_KEY} characters")
        tensors = {name: file.get_tensor(name) for name in names}
    if _META not in metadata:
        return {"state_dict": tensors, "metadata": metadata}
    block = json.loads(metadata[_META])
    check_values(block)
    return {"model": tensors, _META: block}


def write_safetensors(path: StrPath, state: Mapping[str, torch.Tensor], block: Mapping[str, Any]) -> None:
    """Write tensors and the ``gn_det`` block atomically; equal content gives equal bytes.

    Args:
        path: target file.
        state: contiguous tensors that do not share memory.
        block: plain values.

    Raises:
        WriteError: the file cannot be written; an existing file is kept.
    """
    from safetensors.torch import save

    data = save(dict(state), metadata={"format": "pt", _META: json.dumps(block, sort_keys=True)})
    # The library writes metadata in hash table order, which differs between runs.
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:begin]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    atomic_write(path, (len(header).to_bytes(8, "little"), header, memoryview(data)[begin:]))


# ------------------------------------------------------------ the first bytes of a file


def read_head(path: StrPath) -> bytes:
    """Return the first 64 bytes of a regular, non-empty file.

    Raises:
        WeightsError: no such file, a folder, pipe or device, unreadable, or empty.
    """
    try:
        with open_regular(path) as file:
            head = file.read(64)
        problem = "" if head else "is empty; copy or download it again"
    except FileNotFoundError:
        problem = "no such file; give an existing checkpoint (MODEL.WEIGHTS)"
    except (OSError, ValueError) as error:
        reason = one_line(getattr(error, "strerror", "") or error)
        problem = f"cannot be read ({reason}); give a checkpoint file, such as model_best.pth (MODEL.WEIGHTS)"
    if problem:
        raise WeightsError(f"{one_line(str(path), 400)}: {problem}")
    return head


def _looks_like_safetensors(head: bytes) -> bool:
    """Return whether the first bytes are a header length and an opening brace."""
    return head[8:9] == b"{" and not head.startswith(_ZIP)


def _known_mistake(head: bytes) -> str:
    """Return what a file seems to be instead of weights, and what to do; "" if unknown."""
    if _looks_like_safetensors(head) and head[5:8] == b"\0\0\0":  # its length of the header may look like anything
        return ""
    return next((what for pattern, what in _NOT_WEIGHTS if re.match(pattern, head.lstrip(), re.IGNORECASE)), "")


def not_weights(head: bytes) -> str:
    """Return what a file is instead of weights, by its first bytes; "" if it may be weights."""
    if head.startswith(_ZIP) or _looks_like_safetensors(head) or _PICKLE.match(head):
        return ""
    return _known_mistake(head) or f"something that begins with {one_line(head[:16], 80)}"


# ------------------------------------------------------------ tensors


def tensor_problem(value: Any) -> str:
    """Return what is wrong with a value that should be a dense tensor of real numbers on the CPU; "" if nothing is."""
    if type(value) not in _TENSORS:
        return f"is a {type(value).__name__}, not a tensor"
    plain = value.layout == torch.strided and not value.is_nested and value.dtype in DTYPES.values()
    return "" if plain and value.device.type == "cpu" else "is not a plain tensor of real numbers on the CPU"


def check_tensors(path: StrPath, tensors: Mapping[str, Any]) -> None:
    """Refuse anything but dense tensors of real numbers, and tensors that claim more than the file contains.

    Args:
        path: the file they were read from.
        tensors: tensors by name; one with several names counts each time.

    Raises:
        WeightsError: the message names the file and the entry.
    """
    where, claimed, size = one_line(str(path), 400), 0, os.path.getsize(path)
    for name, value in tensors.items():
        if problem := tensor_problem(value):
            raise WeightsError(f"{where}: entry {one_line(name, 60)!r} {problem}")
        claimed += value.numel() * value.element_size()
        if claimed > _SHARED * size + 1024:
            raise WeightsError(f"{where}: its entries share contents and claim more than {_SHARED} times its size")
