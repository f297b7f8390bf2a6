"""Collect and smooth the scalars of every iteration for the loggers and the progress line.

Names and rules are Detectron2's. Losses, lr, time and the model's own metrics are written every 20 iterations as the
median of the last 20 values. Evaluation results are written unchanged at their iteration.
"""

from __future__ import annotations

import datetime
import logging
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

import torch
from fvcore.common.history_buffer import HistoryBuffer

from gn_det.engine import dist
from gn_det.engine.log import FILE_ONLY, on_screen
from gn_det.engine.loggers import Logger
from gn_det.engine.loop import Hook, Loop
from gn_det.errors import TrainingError

logger = logging.getLogger(__name__)

WINDOW = 20
#: Times depend on the machine, so a resumed run measures its own.
_OF_THIS_MACHINE = ("time", "eta_seconds")


class EventLog:
    """Scalars by name, each value with its 0-based iteration; those in ``exact`` are not smoothed."""

    def __init__(self) -> None:
        self.histories: dict[str, HistoryBuffer] = {}
        self.exact: set[str] = set()

    def put(self, values: Mapping[str, float], iteration: int, *, smooth: bool = True) -> None:
        """Add one value of each scalar; writers use the median of a window unless ``smooth`` is False."""
        for name, value in values.items():
            self.histories.setdefault(name, HistoryBuffer(1000)).update(float(value), iteration)
        if not smooth:
            self.exact |= values.keys()

    def newer_than(self, iteration: int) -> dict[int, dict[str, float]]:
        """Return scalars put after ``iteration``: {iteration: {name: median of the window, or the latest value}}."""
        out: dict[int, dict[str, float]] = {}
        for name, history in self.histories.items():
            latest, at = history.values()[-1]
            if at > iteration:
                out.setdefault(int(at), {})[name] = latest if name in self.exact else float(history.median(WINDOW))
        return dict(sorted(out.items()))

    def dump(self) -> dict[str, Any]:
        """Return what a resumed run needs for equal medians: the last window of lr and every smoothed scalar."""
        out = {}
        for name, history in self.histories.items():
            if (name not in self.exact or name == "lr") and name not in _OF_THIS_MACHINE:
                values = history.values()[-WINDOW:]
                # count and mean are for earlier versions
                out[name] = [name not in self.exact, [v for v, _ in values], values[-1][1], 0, 0.0]
        return out

    def restore(self, dumped: Mapping[str, Any]) -> None:
        """Invert :meth:`dump` for a checked checkpoint."""
        for name, (smooth, values, iteration, *_) in dumped.items():
            if name not in _OF_THIS_MACHINE:
                for value in values:
                    self.put({name: value}, iteration, smooth=smooth)


def peak_memory_mb() -> float:
    """Return the peak memory in MiB of this process's GPU tensors, or of the process if there is no GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ImportError:  # not on Windows
        return float("nan")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def progress_line(log: EventLog, iteration: int) -> str:
    """Format Detectron2's log line, readable by its parsers: losses as medians of 20, times as means."""
    found = log.histories
    parts = [f"iter: {iteration}", *(f"{name}: {h.median(WINDOW):.4g}" for name, h in found.items() if "loss" in name)]
    if "time" in found:
        parts.insert(0, f"eta: {_remaining(log)}")
        parts.append(f"time: {found['time'].global_avg():.4f}  last_time: {found['time'].latest():.4f}")
    times, lr = found["data_time"], found["lr"].latest()
    parts.append(f"data_time: {times.avg(WINDOW):.4f}  last_data_time: {times.latest():.4f}  lr: {lr:.5g}")
    return "  ".join([*parts, f"max_mem: {peak_memory_mb():.0f}M"])


def _remaining(log: EventLog) -> datetime.timedelta:
    return datetime.timedelta(seconds=int(log.histories["eta_seconds"].latest()))


def _is_terminal() -> bool:
    """Return whether stderr is a terminal with a size; those of CI services claim to be one, but have 0 lines."""
    try:
        return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).lines > 0
    except (OSError, ValueError):
        return False


def short_line(log: EventLog) -> str:
    """Return loss, learning rate and time per iteration on one short line."""
    found = log.histories
    pace = f"  {found['time'].median(WINDOW):.2f} s/it" if "time" in found else ""
    return f"loss {found['total_loss'].median(WINDOW):.4g}  lr {found['lr'].latest():.3g}{pace}"


class Metrics(Hook):
    """Writes losses, lr, times and further scalars with Detectron2's names, on rank 0 only.

    A terminal shows a progress bar; log.txt and other outputs get a line every :data:`WINDOW` iterations. The loggers
    are closed at the end of training.
    """

    WARMUP = 3  #: iterations whose time is not counted
    DIVERGED = 3.0  #: times the lowest loss

    def __init__(self, loggers: list[Logger]) -> None:
        self.log, self.loggers = EventLog(), loggers
        self.lowest: tuple[float, int] | None = None
        self._bar: Any = None
        self._mark, self._first, self._warned = 0.0, 0, False

    def before_train(self, loop: Loop) -> None:
        self._mark, self._first = time.perf_counter(), loop.state.iteration + 1
        if dist.rank() == 0 and _is_terminal():
            from tqdm import tqdm

            layout = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}, {remaining} left{postfix}"
            self._bar = tqdm(
                total=loop.total, initial=self._first, dynamic_ncols=True, mininterval=0.5, bar_format=layout
            )

    def after_step(self, loop: Loop) -> None:
        loop.scalars |= getattr(loop.state.model, "pop_metrics", dict)()
        if dist.rank() != 0:
            return
        log, iteration = self.log, loop.state.iteration
        log.put({"data_time": loop.data_time, "total_loss": sum(loop.losses.values())}, iteration)
        if len(loop.losses) > 1:
            log.put(loop.losses, iteration)
        self._take_scalars(loop)
        log.put({"lr": loop.lr}, iteration, smooth=False)
        if iteration - self._first >= self.WARMUP:
            log.put({"time": time.perf_counter() - self._mark}, iteration)
            left = loop.total - iteration - 1
            log.put({"eta_seconds": log.histories["time"].median(1000) * left}, iteration, smooth=False)
        if (iteration + 1) % WINDOW == 0:
            self._look_for_divergence(iteration, loop.lr)
        if self._bar is not None:
            self._bar.set_postfix_str(short_line(log), refresh=False)
            self._bar.update(1)
        if (iteration + 1) % WINDOW == 0 or loop.last:
            short = f"iter {iteration + 1}/{loop.total}  {short_line(log)}"
            if "time" in log.histories:
                short += f"  {_remaining(log)} left"
            logger.info(progress_line(log, iteration), extra=on_screen(short) if self._bar is None else FILE_ONLY)

    def after_eval(self, loop: Loop) -> None:
        # Detectron2 writes the last evaluation at MAX_ITER, one after the last iteration.
        self.log.put(loop.state.results, loop.state.iteration + loop.last, smooth=False)
        self.write()  # immediately, because the log keeps only the latest evaluation

    def end_step(self, loop: Loop) -> None:
        if dist.rank() == 0:
            self._take_scalars(loop)
            if (loop.state.iteration + 1) % WINDOW == 0 or loop.last or loop.stopping:
                self.write()
        self._mark = time.perf_counter()  # do not count evaluation and checkpoints in the next iteration

    def after_train(self, loop: Loop) -> None:
        if self._bar is not None:
            self._bar.close()
        for one in self.loggers:
            one.close()

    def write(self) -> None:
        """Write what is new to each logger, or raise TrainingError."""
        try:
            for one in self.loggers:
                for iteration, scalars in self.log.newer_than(one.written).items():
                    one.write(iteration, scalars)
                    one.written = iteration
                one.flush()
        except OSError as error:
            reason = f"metrics cannot be written to OUTPUT_DIR ({error.strerror or error})"
            raise TrainingError(f"{reason}: free space there, then continue with --resume") from error

    def dump(self) -> dict[str, Any]:
        """Return the scalars' windows and the last written iterations, for the checkpoint."""
        written = max((one.written for one in self.loggers), default=-1)
        return {"scalars": self.log.dump(), "written": written, "lowest": self.lowest}

    def restore(self, dumped: Mapping[str, Any]) -> None:
        """Invert :meth:`dump`, except for the last written iterations, which the loggers know."""
        self.log.restore(dumped["scalars"])
        self.lowest = dumped["lowest"]

    def _take_scalars(self, loop: Loop) -> None:
        self.log.put(loop.scalars, loop.state.iteration)
        loop.scalars = {}

    def _look_for_divergence(self, iteration: int, lr: float) -> None:
        """Warn once if the loss has risen far above its lowest median."""
        median = float(self.log.histories["total_loss"].median(WINDOW))
        if self.lowest is None or median < self.lowest[0]:
            self.lowest = (median, iteration)
        low, at = self.lowest
        if not self._warned and 0 < low * self.DIVERGED <= median:
            self._warned = True
            logger.warning(
                f"total_loss has risen to {median:.3g} at iteration {iteration}, {median / low:.1f} times its lowest "
                f"({low:.3g} at iteration {at}): training diverges; lower SOLVER.BASE_LR (now {lr:.3g}), lengthen "
                "SOLVER.WARMUP_ITERS or set SOLVER.CLIP_GRADIENTS.ENABLED True, and start again from a checkpoint "
                "before that."
            )
