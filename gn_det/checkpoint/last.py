"""Which checkpoint of an output folder is the latest, and which old ones can go.

Detectron2's convention: a text file ``last_checkpoint`` holds the base name of the newest checkpoint.
"""

from __future__ import annotations

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
    """What ``last_checkpoint`` of ``folder`` says, as untrusted as any file; "" where there is no such file."""
    try:
        with open_regular(inside(folder, LAST)) as file:
            return file.read(256).decode("utf-8", "replace").strip()
    except (OSError, ValueError):
        return ""


def _read(folder: Path, name: str) -> dict[str, Any]:
    """Content of a file of ``folder``, checksums included."""
    try:
        if os.path.basename(name) != name:
            raise ValueError("it is not the name of a file in that folder")
        return read_checkpoint(inside(folder, name), mmap=True, verify=True)
    except (OSError, ValueError) as error:
        raise WeightsError(f"{one_line(os.fspath(folder / name), 300)}: cannot be used ({one_line(error)})") from None


def read_last(folder: StrPath) -> Path | None:
    """Return the newest readable checkpoint of ``folder``, or None when it has none at all.

    It is the one ``last_checkpoint`` names; when that file is missing or what it names cannot be read (checksums
    included), the readable ``*.pth`` with the highest iteration, with a warning; one without optimizer only if there is
    no other.

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
    # A kept batch (gn_det.engine.nonfinite) holds the weights that failed on it.
    files = sorted(f for f in folder.glob("*.pth") if not f.name.startswith("nonfinite_"))
    if not files and not name:
        return None
    ranked = []
    for file in files:
        try:
            content = _read(folder, file.name)
            # model_best.pth may be newer, but without momentum a run cannot continue as if nothing had happened.
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
    """Delete all but the ``keep`` newest ``model_<iteration>.pth`` of ``folder``; returns what was deleted.

    ``model_best.pth``, ``model_final.pth`` and the file ``last_checkpoint`` names always stay; ``keep <= 0`` keeps all.
    A file that cannot be deleted is a warning: a run does not stop for it.
    """
    numbered = sorted((int(m[1]), f) for f in Path(folder).glob("model_*.pth") if (m := _NUMBERED.match(f.name)))
    last = last_name(folder)
    return _delete(file for _, file in numbered[:-keep] if file.name != last) if keep > 0 else []


def remove_leftovers(folder: StrPath) -> list[Path]:
    """Delete the temporary files that killed processes of this machine left in ``folder``; returns them."""
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
    if os.name == "nt":  # asking would end the process there
        return True
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's
        pass
    return process != os.getpid()  # ours starts only now: an earlier process had the same number
