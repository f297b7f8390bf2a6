"""The safetensors container: a header of names, dtypes and offsets, then the bytes. It cannot hold code.

Our own files carry the ``gn_det`` block as JSON in the header's metadata; other files' metadata are kept as they are.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

import torch

from gn_det.checkpoint.unpickler import MAX_KEY, Refused, check_values
from gn_det.errors import WeightsError
from gn_det.files import StrPath, atomic_write, open_regular

# A ResNet-101 detector has some 60 kB of header; safetensors' own limit of 100 MB would become gigabytes of dicts.
_MAX_HEADER = 8 << 20
_META = "gn_det"


def read_safetensors(path: StrPath) -> dict[str, Any]:
    """Return ``{"model": tensors, "gn_det": block}``, or ``{"state_dict": ..., "metadata": ...}`` of a foreign file.

    The tensors are mapped from the file.

    Raises:
        Refused: a header that claims more than the file has, or too much; the message does not name the file.
        Exception: of any type, for damaged bytes.
    """
    try:
        from safetensors import safe_open
    except ImportError:
        raise Refused("install the package safetensors to read it (pip install safetensors)") from None
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        claimed = int.from_bytes(file.read(8), "little")
    if claimed > min(_MAX_HEADER, size - 8):
        raise Refused(
            f"is a truncated or damaged safetensors file (it claims a header of {claimed} bytes, the file has {size}); "
            "copy or download it again"
        )
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
    """Write tensors and the ``gn_det`` block atomically; the same content gives the same bytes.

    Args:
        path: target file.
        state: contiguous tensors that do not share memory.
        block: plain values.

    Raises:
        WeightsError: safetensors is not installed.
        WriteError: the file cannot be written; an older one of that name is kept.
    """
    try:
        from safetensors.torch import save
    except ImportError:
        raise WeightsError(f"{path}: install the package safetensors to write it (pip install safetensors)") from None
    data = save(dict(state), metadata={"format": "pt", _META: json.dumps(block, sort_keys=True)})
    # The library writes the metadata in the order of a hash table, which changes from run to run.
    begin = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(data[8:begin]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    atomic_write(path, (len(header).to_bytes(8, "little"), header, memoryview(data)[begin:]))
