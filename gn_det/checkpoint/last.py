"""Which checkpoint of an output folder is the latest, and which old ones can go.

Detectron2's convention: a text file ``last_checkpoint`` holds the base name of the newest checkpoint.
"""

from __future__ import annotations

import logging
import os
import re
import time
from pathlib import Path
from typing import Any

from gn_det.checkpoint.io import read_checkpoint
from gn_det.errors import WeightsError
from gn_det.files import StrPath, atomic_write, check_regular, inside, open_regular
from gn_det.text import one_line

LAST = "last_checkpoint"
_NUMBERED = re.compile(r"model_(\d+)\.pth$")
_STALE_SECONDS = 3600.0
_LONGEST_NAME = 255

logger = logging.getLogger(__name__)


def write_last(folder: StrPath, name: str) -> None:
    """Record that ``folder/name`` is the newest checkpoint (atomic; raises WriteError as save_checkpoint does)."""
    atomic_write(Path(folder) / LAST, Path(name).name)


def last_name(folder: StrPath) -> str:
    """What ``last_checkpoint`` of ``folder`` says, as untrusted as any file; "" where there is no such file."""
    try:
        with open_regular(inside(folder, LAST)) as file:
            return file.read(_LONGEST_NAME + 1).decode("utf-8", "replace").strip()
    except (OSError, ValueError):
        return ""


def _readable(folder: Path, name: str) -> tuple[Path, dict[str, Any]]:
    """A file of ``folder`` and its content, checksums included.

    Raises:
        WeightsError: it cannot be read, is not a regular file, or the name or a link leads out of the folder.
    """
    try:
        if "/" in name or len(name) > _LONGEST_NAME:
            raise ValueError("it is not the name of a file in that folder")
        path = inside(folder, name)
        check_regular(path)
    except (OSError, ValueError) as error:
        reason = error.strerror or error if isinstance(error, OSError) else error
        raise WeightsError(f"{one_line(os.fspath(folder / name), 300)}: cannot be used ({one_line(reason)})") from None
    return folder / name, read_checkpoint(path, mmap=True, verify=True)


def read_last(folder: StrPath) -> Path | None:
    """The newest readable checkpoint of ``folder``, or None when it has none at all.

    It is the one ``last_checkpoint`` names; when that file is missing or what it names cannot be read (checksums
    included), the readable ``*.pth`` with the highest iteration, with a warning; one without optimizer only if there is
    no other.

    Raises:
        WeightsError: there are checkpoints, but none can be read.
    """
    folder = Path(folder)
    marker = folder / LAST
    name = last_name(folder)
    if name:
        try:
            return _readable(folder, name)[0]
        except WeightsError as error:
            problem = f"{marker} names a checkpoint that cannot be used ({error})"
    else:
        problem = f"{marker} is missing or empty"
    # a kept batch (gn_det.engine.nonfinite) holds the weights that failed on it: no checkpoint to go on from
    files = sorted(f for f in folder.glob("*.pth") if not f.name.startswith("nonfinite_"))
    if not files:
        if name:
            raise WeightsError(f"{problem}; no other checkpoint is there: start without --resume")
        return None
    newest = _newest_readable(folder, files)
    if newest is None:
        raise WeightsError(f"{folder}: none of its {len(files)} checkpoints can be read; start without --resume")
    logger.warning("%s; going on from %s instead", problem, newest)
    return newest


def _newest_readable(folder: Path, files: list[Path]) -> Path | None:
    best: tuple[bool, int, float] | None = None
    newest = None
    for file in files:
        try:
            content = _readable(folder, file.name)[1]
            iteration = content.get("iteration")
            changed = file.stat().st_mtime
        except (WeightsError, OSError) as error:
            logger.warning("skipped: %s", error)
            continue
        # model_best.pth may be newer, but a run cannot go on from it as if nothing had happened
        rank = ("optimizer" in content, iteration if isinstance(iteration, int) else -1, changed)
        if best is None or rank > best:
            best, newest = rank, file
    return newest


def prune(folder: StrPath, keep: int) -> list[Path]:
    """Delete all but the ``keep`` newest ``model_<iteration>.pth`` of ``folder``; returns what was deleted.

    ``model_best.pth``, ``model_final.pth`` and the file ``last_checkpoint`` names always stay; ``keep <= 0`` keeps all.
    Temporary files that a killed run left behind more than an hour ago go too. A file that cannot be deleted is
    reported as a warning: a run does not stop for it.
    """
    folder = Path(folder)
    doomed = [f for f in folder.glob(".*.tmp-*") if time.time() - _changed(f) > _STALE_SECONDS]
    if keep > 0:
        last = last_name(folder)
        numbered = [(int(m.group(1)), f) for f in folder.glob("model_*.pth") if (m := _NUMBERED.match(f.name))]
        doomed += [f for _, f in sorted(numbered)[:-keep] if f.name != last]
    deleted = []
    for file in doomed:
        try:
            file.unlink()
            deleted.append(file)
        except OSError as error:
            logger.warning("cannot delete the old checkpoint %s: %s", file, error)
    return deleted


def remove_leftovers(folder: StrPath) -> list[Path]:
    """Delete the temporary files that killed processes of this machine left in ``folder``; returns them.

    A run that is killed while it writes, again and again, must not fill the disk with halves of checkpoints.
    """
    deleted = []
    for file in Path(folder).glob(".*.tmp-*"):
        number = file.name.rpartition("-")[2]
        if number.isdigit() and not _is_alive(int(number)):
            try:
                file.unlink()
                deleted.append(file)
            except OSError as error:
                logger.warning("cannot delete the temporary file %s: %s", file, error)
    return deleted


def _is_alive(process: int) -> bool:
    if os.name == "nt":  # there is no such question there, and asking it would end the process
        return True
    if process == os.getpid():
        return False  # it starts only now: an earlier process had the same number
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is there, but another user's
        return True
    return True


def _changed(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:  # deleted meanwhile: not stale, not ours to touch
        return time.time()
