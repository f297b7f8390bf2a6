"""Numbers of a run as they are collected, smoothed and written: metrics.json and TensorBoard.

Names and rules are Detectron2's: losses, lr, time and the model's own metrics are written every 20 iterations as the
median of the last 20 values; evaluation results are written as they are, at the iteration they belong to.
"""

from __future__ import annotations

import json
import math
import os
import statistics
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from gn_det.errors import TrainingError
from gn_det.files import open_append
from gn_det.text import one_line

WINDOW = 20
#: Times measure the machine that a run happens to be on; a resumed run measures its own.
_OF_THIS_MACHINE = ("time", "eta_seconds")


@dataclass
class History:
    """Values of one scalar: the last few for medians, a running mean over all."""

    smooth: bool
    values: deque[float] = field(default_factory=lambda: deque(maxlen=1000))
    iteration: int = -1
    count: int = 0
    mean: float = 0.0

    def add(self, value: float, iteration: int) -> None:
        self.values.append(value)
        self.iteration = iteration
        self.count += 1
        self.mean += (value - self.mean) / self.count

    def latest(self) -> float:
        return self.values[-1]

    def median(self, window: int = WINDOW) -> float:
        return statistics.median(list(self.values)[-window:])

    def average(self, window: int = WINDOW) -> float:
        return statistics.fmean(list(self.values)[-window:])


class EventLog:
    """Scalars by name, each with the 0-based iteration of its last value."""

    def __init__(self) -> None:
        self.histories: dict[str, History] = {}

    def put(self, name: str, value: float, iteration: int, *, smooth: bool = True) -> None:
        """Add one value; ``smooth`` False means that writers take it as it is."""
        if name not in self.histories:
            self.histories[name] = History(smooth)
        self.histories[name].add(float(value), iteration)

    def put_all(self, values: Mapping[str, float], iteration: int, *, smooth: bool = True) -> None:
        for name, value in values.items():
            self.put(name, value, iteration, smooth=smooth)

    def newer_than(self, iteration: int) -> dict[int, dict[str, float]]:
        """Scalars put after ``iteration``: {their iteration: {name: median of the window, or the latest value}}."""
        out: dict[int, dict[str, float]] = {}
        for name, history in self.histories.items():
            if history.iteration > iteration:
                value = history.median() if history.smooth else history.latest()
                out.setdefault(history.iteration, {})[name] = value
        return dict(sorted(out.items()))

    def dump(self) -> dict[str, Any]:
        """What a resumed run needs in order to write the same medians: the last window of every smoothed scalar."""
        kept = {k: h for k, h in self.histories.items() if (h.smooth or k == "lr") and k not in _OF_THIS_MACHINE}
        return {name: [h.smooth, list(h.values)[-WINDOW:], h.iteration, h.count, h.mean] for name, h in kept.items()}

    def restore(self, dumped: Mapping[str, Any]) -> None:
        """Inverse of :meth:`dump`, of a checked checkpoint."""
        for name, (smooth, values, iteration, count, mean) in dumped.items():
            if name not in _OF_THIS_MACHINE:
                self.histories[name] = History(smooth, iteration=iteration, count=count, mean=float(mean))
                self.histories[name].values.extend(map(float, values))


class EventWriter(Protocol):
    """Receives the event log now and then; ``written`` is the last iteration that it has."""

    written: int

    def write(self, log: EventLog) -> None: ...

    def close(self) -> None: ...


class JsonWriter:
    """One JSON object a line, appended. A value that is not a finite number is written as ``null`` (valid JSON).

    What lies up to iteration ``written`` is in the file already.
    """

    def __init__(self, path: str, written: int = -1) -> None:
        try:
            self._file = open_append(os.path.dirname(path) or ".", os.path.basename(path))
        except OSError as error:
            raise TrainingError(
                f"{path}: cannot be appended to ({one_line(error.strerror or error)}); move it away"
            ) from None
        self.written = written

    def write(self, log: EventLog) -> None:
        for iteration, scalars in log.newer_than(self.written).items():
            record = {k: (v if math.isfinite(v) else None) for k, v in scalars.items()}
            self._file.write(json.dumps({**record, "iteration": iteration}, sort_keys=True, ensure_ascii=False) + "\n")
            self.written = iteration
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class TensorBoardWriter:
    """TensorBoard scalars under the same names; the event file is made at the first write."""

    def __init__(self, folder: str, written: int = -1) -> None:
        self._folder = folder
        self.written = written
        self._purge = None if written < 0 else written + 1  # what a killed run drew beyond it is hidden
        self._writer: Any = None

    def write(self, log: EventLog) -> None:
        if any("\ud800" <= character <= "\udfff" for character in self._folder):
            return  # TensorBoard cannot name a folder that is not UTF-8; metrics.json has the same numbers
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(log_dir=self._folder, purge_step=self._purge)
        for iteration, scalars in log.newer_than(self.written).items():
            for name, value in scalars.items():
                self._writer.add_scalar(name, value, iteration)
            self.written = iteration
        self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
