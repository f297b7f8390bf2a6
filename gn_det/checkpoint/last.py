"""Find the newest checkpoint of an output folder, and delete old ones.

As in Detectron2, a text file ``last_checkpoint`` holds the base name of the newest checkpoint.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gn_det.checkpoint.io import read_checkpoint
from gn_det.errors import WeightsError
from gn_det.files import StrPath, atomic_write, inside, open_regular
from gn_det.text import one_line

LAST = "last_checkpoint"
_NUMBERED = re.compile(r"model_(\d+)\.pth$")

logger = logging.getLogger(__name__)


def write_last(folder: StrPath, name: str) -> None:
    """Record that ``folder/name`` is the newest checkpoint (atomic; raises WriteError as save_checkpoint does)."""
    atomic_write(Path(folder) / LAST, Path(name).name)


def last_name(folder: StrPath) -> str:
    """Return the content of ``last_checkpoint`` in ``folder``, unchecked; "" without that file."""
    with contextlib.suppress(OSError, ValueError), open_regular(inside(folder, LAST)) as file:
        return file.read(256).decode("utf-8", "replace").strip()
    return ""


def _read(folder: Path, name: str) -> dict[str, Any]:
    """Read a file of ``folder`` and verify its checksums."""
    try:
        if os.path.basename(name) != name:
            raise ValueError("it is not the name of a file in that folder")
        return read_checkpoint(inside(folder, name), mmap=True, verify=True)
    except (OSError, ValueError) as error:
        raise WeightsError(f"{one_line(os.fspath(folder / name), 300)}: cannot be used ({one_line(error)})") from None


def read_last(folder: StrPath) -> Path | None:
    """Return the newest readable checkpoint of ``folder``, or None if it has none.

    This is the one that ``last_checkpoint`` names. If that cannot be read (checksums included), it is the readable
    ``*.pth`` with the highest iteration, with a warning; one without optimizer only if there is no other.

    Raises:
        WeightsError: there are checkpoints, but none can be read.
    """
    folder = Path(folder)
    problem, name = f"{folder / LAST} is missing or empty", last_name(folder)
    if name:
        try:
            _read(folder, name)
            return folder / name
        except WeightsError as error:
            problem = f"{folder / LAST} names a checkpoint that cannot be used ({error})"
    # A saved batch (gn_det.engine.nonfinite) contains the weights that failed.
    files = sorted(f for f in folder.glob("*.pth") if not f.name.startswith("nonfinite_"))
    if not files and not name:
        return None
    ranked = []
    for file in files:
        try:
            content = _read(folder, file.name)
            # model_best.pth may be newer, but without momentum a run cannot continue exactly.
            iteration = content.get("iteration")
            rank = ("optimizer" in content, iteration if isinstance(iteration, int) else -1, file.stat().st_mtime)
            ranked.append((rank, file))
        except (WeightsError, OSError) as error:
            logger.warning("skipped: %s", error)
    if not ranked:
        raise WeightsError(f"{problem}; no other checkpoint there can be read: start without --resume")
    newest = max(ranked)[1]
    logger.warning("%s; resuming from %s instead", problem, newest)
    return newest


def prune(folder: StrPath, keep: int) -> list[Path]:
    """Delete all but the ``keep`` newest ``model_<iteration>.pth`` of ``folder``; return the deleted files.

    ``model_best.pth``, ``model_final.pth`` and the file named by ``last_checkpoint`` are always kept; ``keep <= 0``
    keeps all. A file that cannot be deleted only causes a warning.
    """
    numbered = sorted((int(m[1]), f) for f in Path(folder).glob("model_*.pth") if (m := _NUMBERED.match(f.name)))
    last = last_name(folder)
    return _delete(file for _, file in numbered[:-keep] if file.name != last) if keep > 0 else []


def remove_leftovers(folder: StrPath) -> list[Path]:
    """Delete temporary files that killed processes of this machine left in ``folder``; return them."""
    files = [(file.name.rpartition("-")[2], file) for file in Path(folder).glob(".*.tmp-*")]
    return _delete(file for number, file in files if number.isdigit() and not _is_alive(int(number)))


def _delete(files: Iterable[Path]) -> list[Path]:
    deleted = []
    for file in files:
        try:
            file.unlink()
            deleted.append(file)
        except OSError as error:
            logger.warning("cannot delete %s: %s", file, error)
    return deleted


def _is_alive(process: int) -> bool:
    if os.name == "nt":  # os.kill would end the process there
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # process of another user
        pass
    return process != os.getpid()  # our own number belonged to an earlier process
