"""The safetensors container: a header of names, dtypes and offsets, then the bytes. It cannot hold code.

Our own files carry the ``gn_det`` block as JSON in the header's metadata; other files' metadata are kept as they are.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import torch

from gn_det.checkpoint.pickles import MAX_DEPTH, MAX_KEY, MAX_PLACES, MAX_TENSORS, Refused
from gn_det.errors import WeightsError
from gn_det.files import StrPath, atomic_write, open_regular
from gn_det.text import one_line

# A ResNet-101 detector has some 60 kB of header; safetensors' own limit of 100 MB would become gigabytes of dicts.
_MAX_HEADER = 8 << 20
_META = "gn_det"


def read_safetensors(path: StrPath) -> dict[str, Any]:
    """``{"model": tensors by name, "gn_det": block}``, or ``{"state_dict": ..., "metadata": ...}`` of a foreign file.

    The tensors are mapped from the file.

    Raises:
        WeightsError: truncated, damaged, or a header that claims more than the file has.
    """
    try:
        from safetensors import safe_open
    except ImportError:
        raise WeightsError(
            f"{path}: is a safetensors file; install the package safetensors to read it (pip install safetensors)"
        ) from None
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        claimed = int.from_bytes(file.read(8), "little")
    if claimed > min(_MAX_HEADER, size - 8):
        raise WeightsError(
            f"{path}: is a truncated or damaged safetensors file (it claims a header of {claimed} bytes, the file has "
            f"{size}); copy or download it again"
        )
    try:
        with safe_open(os.fspath(path), framework="pt", device="cpu") as file:
            metadata = dict(file.metadata() or {})
            names = list(file.keys())
            if len(names) > MAX_TENSORS or any(len(name) > MAX_KEY for name in names):
                raise Refused(f"more than {MAX_TENSORS} tensors, or a name of more than {MAX_KEY} characters")
            tensors = {name: file.get_tensor(name) for name in names}
    except Exception as error:  # SafetensorError, and whatever the bytes of a foreign file provoke
        raise WeightsError(
            f"{path}: is a damaged safetensors file ({one_line(error)}); copy or download it again"
        ) from None
    if _META not in metadata:
        return {"state_dict": tensors, "metadata": metadata}
    try:
        block = json.loads(metadata[_META], parse_int=_integer)
        check_levels(block)
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: its gn_det metadata is damaged ({one_line(error)})") from None
    return {"model": tensors, _META: block}


def _integer(text: str) -> int:
    if len(text) > 78:  # as pickles: 256 bits
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text)


def check_levels(value: Any) -> None:
    """Check that a value of dicts and lists has few levels and places, so that others may walk through it.

    Raises:
        ValueError: it has not.
    """
    level, places = [value], 0
    for _ in range(MAX_DEPTH):
        level = [
            item
            for container in level
            if isinstance(container, (dict, list))
            for item in (container.values() if isinstance(container, dict) else container)
        ]
        places += len(level)
        if not level:
            return
        if places > MAX_PLACES:
            raise ValueError(f"more than {MAX_PLACES} values")
    raise ValueError(f"more than {MAX_DEPTH} levels")


def write_safetensors(path: StrPath, state: Mapping[str, torch.Tensor], block: Mapping[str, Any]) -> None:
    """Write tensors and the ``gn_det`` block atomically; the same content gives the same bytes.

    Raises:
        WeightsError: safetensors is not installed.
        WriteError: the file cannot be written; an older one of that name is kept.
    """
    try:
        from safetensors.torch import save
    except ImportError:
        raise WeightsError(f"{path}: install the package safetensors to write it (pip install safetensors)") from None
    data = save(
        {name: value.detach().contiguous().clone() for name, value in state.items()},
        metadata={"format": "pt", _META: json.dumps(block, sort_keys=True)},
    )
    # The library writes the metadata in the order of a hash table, another one each time.
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:begin]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)

    def write(file: Any) -> None:
        file.write(len(header).to_bytes(8, "little") + header)
        file.write(memoryview(data)[begin:])

    atomic_write(path, write)
