"""Checkpoint files: written atomically, read without running code from them.

A checkpoint is one ``torch.save`` archive ``{"model": state_dict, "iteration": int, ..., "gn_det": metadata}`` holding
tensors and plain values alone, so that ``torch.load(weights_only=True)`` and Detectron2's ``DetectionCheckpointer``
both read it.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch

from gn_det.checkpoint.archives import DTYPES, check_view, read_archive, read_legacy, wrong_record
from gn_det.checkpoint.heads import PICKLE, ZIP, known_mistake, read_head
from gn_det.checkpoint.pickles import Refused
from gn_det.errors import WeightsError
from gn_det.files import StrPath, atomic_write
from gn_det.text import one_line

_PLAIN = (str, int, float, bool, type(None))
_CONTAINERS = (dict, OrderedDict, list, tuple)
_TENSORS = (torch.Tensor, torch.nn.Parameter)
# Tied weights stand under two names, seldom more; what is read may be this many times the file.
_SHARED = 4


# ----------------------------------------------------------------------------------------------------------- writing


def save_checkpoint(path: StrPath, payload: Mapping[str, Any]) -> None:
    """Write ``payload`` to ``path`` so that at every moment the old or the new file is there, whole.

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
    if isinstance(value, dict):
        for key, item in value.items():
            check_payload(key, f"a key of {where}")
            check_payload(item, f"{where}[{key!r}]")
    else:
        for index, item in enumerate(value):
            check_payload(item, f"{where}[{index}]")


# ----------------------------------------------------------------------------------------------------------- reading


def read_checkpoint(path: StrPath, *, mmap: bool = False, verify: bool = False) -> dict[str, Any]:
    """Read a ``torch.save`` file on the CPU; nothing in it is executed, and nothing it claims is believed.

    Args:
        path: a local file (see :func:`gn_det.checkpoint.catalog.local_path` for URIs).
        mmap: map the tensors from the file instead of reading them; right when they are copied at once and dropped.
        verify: compare every record with the checksum in the archive, which torch does not: one flipped bit is found.
            Reads the file once more (about 1 s a GB).

    Returns:
        The saved dict; a dict of another layout is returned as it is. It holds dense tensors of real numbers, and plain
        values in at most :data:`gn_det.checkpoint.pickles.MAX_PLACES` places and ``MAX_DEPTH`` levels.

    Raises:
        WeightsError: the file is missing, empty, truncated, not a checkpoint, or holds more than tensors and values.
    """
    head = read_head(path)
    where = one_line(str(path), 400)
    if mistake := known_mistake(head):
        raise WeightsError(f"{where}: not a checkpoint but {mistake}")
    try:
        if head.startswith(ZIP):
            if verify and (broken := wrong_record(path)):
                raise Refused(
                    f"is damaged (checksum of {one_line(broken, 100)} is wrong); copy, download or train it again"
                )
            loaded = read_archive(path, map_tensors=mmap)
        elif head.startswith(PICKLE):
            loaded = read_legacy(path)
        else:
            raise Refused("is not a checkpoint: torch.save did not write it; copy or download it again")
    except Refused as error:
        raise WeightsError(f"{where}: {error}") from None
    except Exception as error:  # whatever the bytes of a foreign file provoke in the reader is the file's fault
        raise WeightsError(
            f"{where}: is not a checkpoint or is damaged ({one_line(error)}); copy or download it again"
        ) from error
    if not isinstance(loaded, dict):
        raise WeightsError(f"{where}: holds a {type(loaded).__name__}, not a dict of weights")
    return loaded


def check_tensors(path: StrPath, tensors: Mapping[str, Any]) -> None:
    """Refuse whatever is not a dense tensor of real numbers, or claims more than the file holds.

    Args:
        path: the file they were read from.
        tensors: as they are to be used, by name; one that stands under several names counts each time.

    Raises:
        WeightsError: the message names the file and the entry.
    """
    where, claimed, size = one_line(str(path), 400), 0, os.path.getsize(path)
    for name, value in tensors.items():
        entry = f"{where}: entry {one_line(name, 60)!r}"
        if type(value) not in _TENSORS:
            raise WeightsError(f"{entry} is a {type(value).__name__}, not a tensor")
        plain = value.layout == torch.strided and not value.is_nested and value.dtype in DTYPES.values()
        if not plain or value.device.type != "cpu":
            raise WeightsError(f"{entry} is not a plain tensor of real numbers on the CPU")
        try:
            items = value.untyped_storage().nbytes() // value.element_size()
            check_view(items, value.storage_offset(), tuple(value.shape), value.stride())
        except Refused as error:
            raise WeightsError(f"{entry}: {error}") from None
        claimed += value.numel() * value.element_size()
        if claimed > _SHARED * size + 1024:
            raise WeightsError(
                f"{where}: its entries share their contents so often that they are more than {_SHARED} times the file; "
                "no model does that"
            )
