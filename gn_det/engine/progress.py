"""What a person sees while training: one moving line on a terminal, plain periodic lines in a log file."""

from __future__ import annotations

import datetime
import logging
import os
import sys
import time

import torch

from gn_det.engine.events import EventLog
from gn_det.engine.log import FILE_ONLY

logger = logging.getLogger(__name__)


def peak_memory_mb() -> float:
    """Peak memory in MiB: of this process's GPU tensors where there is a GPU, else of the process itself."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ImportError:  # not on Windows
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def progress_line(log: EventLog, iteration: int) -> str:
    """Detectron2's log line: losses as medians of 20, times as means, in a form that its parsers read."""
    histories = log.histories
    parts = []
    if "eta_seconds" in histories:
        parts.append(f"eta: {datetime.timedelta(seconds=int(histories['eta_seconds'].latest()))}")
    parts.append(f"iter: {iteration}")
    parts += [f"{name}: {h.median():.4g}" for name, h in histories.items() if "loss" in name]
    if "time" in histories:
        parts += [f"time: {histories['time'].mean:.4f}", f"last_time: {histories['time'].latest():.4f}"]
    if "data_time" in histories:
        parts.append(f"data_time: {histories['data_time'].average():.4f}")
        parts.append(f"last_data_time: {histories['data_time'].latest():.4f}")
    if "lr" in histories:
        parts.append(f"lr: {histories['lr'].latest():.5g}")
    parts.append(f"max_mem: {peak_memory_mb():.0f}M")
    return "  ".join(parts)


class Progress:
    """A tqdm line on a terminal; one log line every ``period`` iterations in log.txt, elsewhere on screen too."""

    def __init__(self, start: int, total: int, *, period: int = 20, terminal: bool | None = None) -> None:
        self._period = period
        self._total = total
        self._bar = None
        self._since = 0.0
        if _is_terminal() if terminal is None else terminal:
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=start, dynamic_ncols=True, unit="it", mininterval=0.5, desc="train")

    def update(self, log: EventLog, iteration: int) -> None:
        """Called after every iteration (0-based)."""
        if self._bar is not None:
            now = time.monotonic()
            if now - self._since > 0.5:
                self._bar.set_postfix_str(_short(log), refresh=False)
                self._since = now
            self._bar.update(1)
        if (iteration + 1) % self._period == 0 or iteration + 1 == self._total:
            logger.info(progress_line(log, iteration), extra=None if self._bar is None else FILE_ONLY)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def _is_terminal() -> bool:
    """A terminal with a size: those of CI services claim to be one, but have 0 lines."""
    try:
        return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).lines > 0
    except (OSError, ValueError):
        return False


def _short(log: EventLog) -> str:
    """Losses under short names, lr and memory: what fits on one terminal line beside tqdm's own rate and ETA."""
    h = log.histories
    shown = []
    for name, short in (
        ("total_loss", "loss"),
        ("loss_cls", "cls"),
        ("loss_box_reg", "box"),
        ("loss_mask", "mask"),
        ("loss_rpn_cls", "rpn"),
        ("loss_rpn_loc", "loc"),
    ):
        if name in h:
            shown.append(f"{short} {h[name].median():.3g}")
    if "lr" in h:
        shown.append(f"lr {h['lr'].latest():.2g}")
    if "time" in h:
        shown.append(f"{h['time'].median():.2f} s/it")
    shown.append(f"{peak_memory_mb():.0f} MB")
    return " ".join(shown)
