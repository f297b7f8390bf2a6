"""The output folder of a run: checked before work starts, and never silently overwritten."""

from __future__ import annotations

import errno
import itertools
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from torch import nn

from gn_det.checkpoint.last import LAST
from gn_det.checkpoint.weights_uri import split_options
from gn_det.data.workers import script_in_worker
from gn_det.engine import dist
from gn_det.errors import TrainingError
from gn_det.files import Busy, atomic_write, lock
from gn_det.text import count, one_line

METRICS = "metrics.json"
BEST = "model_best.pth"
FINAL = "model_final.pth"
LOCK = ".gn_det.lock"
#: Seconds for the ranks of a run to notice that their parent process was killed.
PATIENCE = 10.0
_OURS = re.compile(r"model_(\d{7}|best|final)\.pth$")

logger = logging.getLogger(__name__)


def check_output_name(folder: str | os.PathLike[str]) -> None:
    """Raise TrainingError for a path that cannot become a folder, without creating it."""
    path = Path(folder)
    there = next((p for p in (path, *path.parents) if os.path.lexists(p)), None)
    if there is not None and not there.is_dir():
        raise TrainingError(f"OUTPUT_DIR {path}: {there} is not a folder; set OUTPUT_DIR to another folder")


class InUse(TrainingError):
    """Another run writes to the folder."""


@contextmanager
def alone_in(folder: str | os.PathLike[str], *, key: str = "OUTPUT_DIR") -> Iterator[None]:
    """Keep other runs out of the existing ``folder`` within the context; all ranks must call this.

    Rank 0 holds the lock, after waiting up to PATIENCE for processes of a killed run to exit. A file system without
    locks causes a warning.

    Args:
        key: the user's name for the folder.

    Raises:
        InUse: another run writes there; raised on every rank.
        DataError: the other run is this one, because a data loading process imported its script.
        TrainingError: the lock file cannot be created.
    """
    with ExitStack() as stack:

        def take_lock() -> None:
            path = Path(folder) / LOCK
            try:
                stack.enter_context(lock(path, patience=PATIENCE))
            except Busy as error:
                raise script_in_worker() or InUse(
                    f"{key} {folder} is in use by another run ({error.holder or 'unknown'}); wait for it to end, or "
                    f"set {key} to another folder"
                ) from None
            except OSError as error:
                if error.errno in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
                    logger.warning("%s %s: this file system has no locks; do not start another run there.", key, folder)
                    return
                reason = one_line(error.strerror or error)
                remedy = f"delete it, or set {key} to a folder that can be written"
                raise TrainingError(f"{path}: cannot be locked ({reason}); {remedy}") from None

        dist.on_first_rank(take_lock)
        yield


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of an earlier run in ``folder``."""
    return sorted(f for f in folder.glob("model_*.pth") if _OURS.match(f.name))


def refuse_old_run(folder: Path, *, overwrite: bool) -> None:
    """Raise TrainingError if ``folder`` holds checkpoints of an earlier run, unless ``overwrite``."""
    found = checkpoints(folder)
    if found and not overwrite:
        raise TrainingError(
            f"OUTPUT_DIR {folder} holds {count(len(found), 'checkpoint')} of an earlier run (such as {found[0].name}): "
            "continue it with --resume, replace it with --overwrite, or set OUTPUT_DIR to a new folder"
        )


def start_afresh(folder: Path, *, keep: str = "") -> None:
    """Move metrics.json of an earlier run aside and delete its checkpoints, except ``keep`` (MODEL.WEIGHTS)."""
    keep, _ = split_options(keep)
    done = []
    metrics = folder / METRICS
    if metrics.exists() and metrics.stat().st_size:
        number = next(n for n in itertools.count(1) if not (folder / f"{METRICS}.{n}").exists())
        metrics.rename(folder / f"{METRICS}.{number}")
        done.append(f"{METRICS} moved to {METRICS}.{number}")
    for file in [*checkpoints(folder), folder / LAST]:
        if file.exists() and not (keep and os.path.exists(keep) and os.path.samefile(file, keep)):
            file.unlink()
            done.append(f"{file.name} deleted")
    if done:
        logger.info("Earlier run in %s: %s.", folder, ", ".join(done))


def check_space(folder: Path, model: nn.Module, *, replaced: bool) -> None:
    """Raise TrainingError if there is no space for one checkpoint; those of an earlier run count if ``replaced``."""
    tensors = [*model.parameters(), *model.buffers(), *(p for p in model.parameters() if p.requires_grad)]
    needed = sum(t.numel() * t.element_size() for t in tensors)
    free = shutil.disk_usage(folder).free
    if replaced:
        free += sum(file.stat().st_size for file in checkpoints(folder))
    if free < needed:
        raise TrainingError(
            f"OUTPUT_DIR {folder}: {free / 2**20:.0f} MiB are free, a checkpoint takes {needed / 2**20:.0f}: free "
            "space on that disk, or set OUTPUT_DIR elsewhere"
        )


def trim_metrics(folder: Path, iteration: int, written: int | None = None) -> None:
    """Drop the lines of metrics.json that a run resumed after ``iteration`` will write again.

    ``written`` is the last iteration in the file when the checkpoint was saved, if known.
    """

    def keep(line: str) -> bool:
        record = json.loads(line)
        # the last evaluation of a finished run is logged one iteration later
        return bool(record["iteration"] <= (iteration + ("total_loss" not in record) if written is None else written))

    trim_lines(folder / METRICS, keep)


def trim_lines(path: Path, keep: Callable[[str], bool]) -> None:
    """Drop the lines of a file for which ``keep`` returns False, or raises because they are truncated."""
    if not path.is_file():
        return
    lines, kept = path.read_text(encoding="utf-8", errors="replace").splitlines(), []
    for line in lines:
        with suppress(ValueError, KeyError, TypeError, RecursionError):
            if keep(line):
                kept.append(line)
    if len(kept) < len(lines):
        atomic_write(path, "".join(f"{line}\n" for line in kept))
        logger.info("Dropped %s of %s, which are written again.", count(len(lines) - len(kept), "line"), path)
