"""Numbers of every iteration into the event log, the progress line and the files; batches with the time they took."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fvcore.common.config import CfgNode

from gn_det.engine import dist
from gn_det.engine.advice import Divergence
from gn_det.engine.events import WINDOW, EventLog, EventWriter
from gn_det.engine.learner import Learner
from gn_det.engine.progress import Progress
from gn_det.errors import TrainingError

logger = logging.getLogger(__name__)

_TIME_WARMUP = 3  # iterations whose time is not counted


class Batches(Iterable[Any]):
    """A loader cut to ``count`` micro-batches, with the time waited for each noted on the learner."""

    def __init__(self, loader: Iterable[Any], count: int, learner: Learner) -> None:
        self.loader, self.count, self.learner = loader, count, learner

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.loader)
        for _ in range(self.count):
            start = time.perf_counter()
            batch = next(batches)
            self.learner.waited += time.perf_counter() - start
            yield batch


class Recorder:
    """Losses, lr and times of every iteration, under Detectron2's names."""

    def __init__(
        self, cfg: CfgNode, log: EventLog, writers: list[EventWriter], start: int, *, terminal: bool | None
    ) -> None:
        self.events, self.writers, self.first = log, writers, start
        self.total = int(cfg.SOLVER.MAX_ITER)
        self.divergence = Divergence()
        self._terminal = terminal
        self._progress: Progress | None = None
        self._mark = 0.0

    def start(self) -> None:
        """The first iteration begins."""
        self._mark = time.perf_counter()
        if dist.rank() == 0:
            self._progress = Progress(self.first, self.total, period=WINDOW, terminal=self._terminal)

    def record(self, learner: Learner, metrics: Mapping[str, float], iteration: int) -> None:
        """The numbers of one finished iteration; rank 0 only."""
        log = self.events
        log.put("data_time", learner.data_time, iteration)
        log.put("total_loss", sum(learner.losses.values()), iteration)
        if len(learner.losses) > 1:
            log.put_all(learner.losses, iteration)
        log.put_all(metrics, iteration)
        log.put("lr", learner.lr, iteration, smooth=False)
        if iteration - self.first >= _TIME_WARMUP:
            log.put("time", time.perf_counter() - self._mark, iteration)
            left = self.total - iteration - 1
            log.put("eta_seconds", log.histories["time"].median(1000) * left, iteration, smooth=False)
        if (iteration + 1) % WINDOW == 0:
            warning = self.divergence.look(log.histories["total_loss"].median(), iteration, learner.lr)
            if warning:
                logger.warning(warning)
        if self._progress is not None:
            self._progress.update(log, iteration)

    def write(self) -> None:
        try:
            for writer in self.writers:
                writer.write(self.events)
        except OSError as error:
            raise TrainingError(
                f"metrics cannot be written to OUTPUT_DIR ({error.strerror or error}): free space there, then go "
                "on with --resume"
            ) from error

    def dump(self) -> dict[str, Any]:
        """For the checkpoint: the scalars' windows, and what the files hold already."""
        written = max((w.written for w in self.writers), default=-1)
        return {"scalars": self.events.dump(), "written": written, "lowest": self.divergence.lowest}

    def restore(self, dumped: Mapping[str, Any]) -> None:
        """Inverse of :meth:`dump`; what is written is the writers' own."""
        self.events.restore(dumped["scalars"])
        self.divergence.lowest = dumped["lowest"]

    def write_if_due(self, iteration: int) -> None:
        """What a killed run did not get to: the lines due after the last iteration of its checkpoint."""
        if (iteration + 1) % WINDOW == 0 or iteration + 1 >= self.total:
            self.write()

    def rest(self) -> None:
        """Start timing the next iteration here: what came before (evaluation, checkpoints) is not counted."""
        self._mark = time.perf_counter()

    def close(self) -> None:
        if self._progress is not None:
            self._progress.close()
            self._progress = None
        for writer in self.writers:
            writer.close()
