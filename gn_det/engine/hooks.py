"""Hooks of a detection run: schedule, signals, time limit, checkpoints and evaluation."""

from __future__ import annotations

import logging
import math
import os
import re
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import numpy as np
from fvcore.common.config import CfgNode
from torch import nn
from torch.utils.hooks import RemovableHandle

from gn_det.checkpoint.io import save_checkpoint
from gn_det.checkpoint.last import prune, write_last
from gn_det.engine import dist
from gn_det.engine.loggers import Logger
from gn_det.engine.loop import Hook, Loop
from gn_det.engine.output import BEST, FINAL
from gn_det.engine.scalars import Metrics
from gn_det.engine.state import ModelMeta, build_checkpoint, build_payload, capture_rng, restore_rng
from gn_det.errors import TrainingError, WriteError
from gn_det.files import atomic_write
from gn_det.modeling.mask_rcnn import MaskRCNN
from gn_det.modeling.precise_bn import precise_bn
from gn_det.modeling.rpn import Proposals
from gn_det.structures import Sample, to_numpy
from gn_det.visualize.draw import draw_grid, draw_sample, jpeg_bytes

logger = logging.getLogger(__name__)

_PICTURE = re.compile(r"iter_(\d{7,})\.jpg")

#: ``evaluate(model, on_progress)`` returns flat metrics; the model is in evaluation mode.
Evaluator = Callable[[nn.Module, Callable[[Any], None]], Mapping[str, float]]


class Interrupted(TrainingError):
    """A signal ended the run after a checkpoint was saved; ``exit_code`` is 128 + the signal number."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class Schedule(Hook):
    """Steps the learning rate schedule."""

    def after_step(self, loop: Loop) -> None:
        loop.state.scheduler.step()


class Checkpoint(Hook):
    """Saves a checkpoint every ``period`` iterations and at the end, and again with the results after an evaluation."""

    def __init__(self, folder: Path, meta: ModelMeta, metrics: Metrics, *, period: int, keep: int) -> None:
        self.folder, self.meta, self.metrics, self.period, self.keep = folder, meta, metrics, period, keep

    def after_step(self, loop: Loop) -> None:  # before the evaluation, in case it fails
        if loop.stopping or loop.due(self.period):
            self.save(loop)

    def after_eval(self, loop: Loop) -> None:
        if loop.stopping or self.saved(loop):
            self.save(loop)

    def path(self, loop: Loop) -> Path:
        """Return the file of the iteration that just ended."""
        return self.folder / (FINAL if loop.finished else f"model_{loop.state.iteration:07d}.pth")

    def saved(self, loop: Loop) -> bool:
        """Return whether this iteration already has a checkpoint."""
        return loop.state.saved == os.fspath(self.path(loop))

    def save(self, loop: Loop, *, collective: bool = True) -> None:
        """Write the checkpoint of this iteration and make it the one to resume from, or raise TrainingError.

        If not ``collective``, the other ranks take no part; their random streams are re-seeded on resuming.
        """
        rng, path = dist.gather_objects(capture_rng()) if collective else [capture_rng()], self.path(loop)

        def write() -> None:
            with _naming_resume():
                save_checkpoint(path, build_checkpoint(loop.state, self.meta, rng, self.metrics.dump()))
                write_last(self.folder, path.name)
            prune(self.folder, self.keep)

        if collective:
            dist.on_first_rank(write)
        elif dist.rank() == 0:
            write()
        loop.state.saved = os.fspath(path)


@contextmanager
def _naming_resume() -> Iterator[None]:
    try:
        yield
    except WriteError as error:
        raise TrainingError(f"{error}, then rerun with --resume") from None


class Signals(Hook):
    """Ends the run with a checkpoint after the current iteration on SIGINT or SIGTERM; a second signal ends it now."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._old: dict[signal.Signals, Any] = {}

    def before_train(self, loop: Loop) -> None:
        loop.flags["signal"] = 0

        def request(number: int, frame: FrameType | None) -> None:
            if loop.flags["signal"]:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            loop.flags["signal"] = number
            if dist.rank() == 0:
                logger.info("%s received; stopping after this iteration.", signal.Signals(number).name)

        if dist.in_main_thread():
            self._old = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}

    def after_step(self, loop: Loop) -> None:
        if loop.agreed.get("signal") and not loop.last:
            self.interrupt(loop)

    def after_train(self, loop: Loop) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old = {}

    def interrupt(self, loop: Loop, *, collective: bool = True) -> NoReturn:
        """Save a checkpoint, unless this iteration has one, and raise Interrupted."""
        if not self.checkpoint.saved(loop):
            self.checkpoint.save(loop, collective=collective)
        self.checkpoint.metrics.write()
        number = int(loop.flags["signal"] or loop.agreed.get("signal", signal.SIGTERM))
        name, path = signal.Signals(number).name, self.checkpoint.path(loop)
        done = f"interrupted ({name}) after iteration {loop.state.iteration}; saved {path}"
        raise Interrupted(f"{done}. Rerun with --resume to continue", 128 + number)


class TimeLimit(Hook):
    """Ends training after ``hours`` (SOLVER.MAX_HOURS; 0: never), in time for a last evaluation and checkpoint."""

    def __init__(self, hours: float, checkpoint: Checkpoint) -> None:
        self.hours, self.checkpoint = hours, checkpoint
        self.reserve = 0.0  # seconds for the final evaluation: the longest one so far
        self._start = time.monotonic()

    def before_train(self, loop: Loop) -> None:
        loop.flags["time is up"] = False

    def after_step(self, loop: Loop) -> None:
        if loop.agreed.get("time is up") and not loop.last:
            loop.stop(finished=False)

    def end_step(self, loop: Loop) -> None:
        if self.hours > 0 and time.monotonic() - self._start + self.reserve >= self.hours * 3600:
            loop.flags["time is up"] = True
        if loop.agreed.get("time is up") and not loop.finished:
            logger.info(
                "Time limit of %g h (SOLVER.MAX_HOURS) reached at iteration %d/%d; saved %s. Rerun with --resume to "
                "continue.",
                *(self.hours, loop.state.iteration, loop.total, self.checkpoint.path(loop)),
            )


class PreciseBN(Hook):
    """Recomputes BN's running statistics every ``TEST.EVAL_PERIOD`` iterations and at the end (TEST.PRECISE_BN).

    Args:
        make_batches: training batches of another random stream than the run's; called each time, if there is BN.
    """

    def __init__(self, cfg: CfgNode, make_batches: Callable[[], Iterable[Any]]) -> None:
        self.period, self.batches = int(cfg.TEST.EVAL_PERIOD), int(cfg.TEST.PRECISE_BN.NUM_ITER)
        self.make_batches = make_batches

    def after_step(self, loop: Loop) -> None:
        if not loop.due(self.period):
            return
        rng, model = capture_rng(), loop.state.model
        try:
            with getattr(model, "metrics_apart", nullcontext)(), loop.mixed_precision():
                layers = precise_bn(model, model, islice(self._stream(), self.batches))
        finally:
            restore_rng(rng)
        logger.info("TEST.PRECISE_BN: statistics of %d trained BN layers from %d batches.", layers, self.batches)

    def _stream(self) -> Iterator[Any]:
        """The batches; a loader is started only when the first one is needed."""
        yield from self.make_batches()


class Visualize(Hook):
    """Draws ground truth beside the 20 best proposals every VIS_PERIOD iterations, like Detectron2, from iteration 0.

    Shown is the first image of rank 0's (micro-)batch. The picture is written to ``visualize`` in OUTPUT_DIR, where
    the newest ``KEPT`` remain, and to the loggers that take pictures. A model with ``loop.take_picture`` draws itself.
    """

    FOLDER = "visualize"
    KEPT = 100  #: newest pictures in the folder
    PROPOSALS = 20
    SIDE = 800  #: of each half, in pixels

    def __init__(self, cfg: CfgNode, class_names: Sequence[str], loggers: Sequence[Logger]) -> None:
        self.period, self.folder = int(cfg.VIS_PERIOD), Path(cfg.OUTPUT_DIR) / self.FOLDER
        self.bgr, self.class_names, self.loggers = cfg.INPUT.FORMAT == "BGR", class_names, loggers
        self._due = False
        self._seen: tuple[Sample, Proposals] | None = None
        self._handle: RemovableHandle | None = None

    def before_train(self, loop: Loop) -> None:
        if dist.rank() != 0:
            return
        self._prune(loop.state.iteration)

        def see(module: nn.Module, args: Any, output: Any) -> None:
            if self._due and loop.current is not None:
                self._due, self._seen = False, (loop.current.batch[0], output[0][0])

        model = loop.state.model
        if isinstance(model, MaskRCNN):
            self._handle = model.proposal_generator.register_forward_hook(see)

    def before_step(self, loop: Loop) -> None:
        self._due = (loop.state.iteration + 1) % self.period == 0

    def after_step(self, loop: Loop) -> None:
        picture = self._draw(*self._seen) if self._seen else loop.take_picture() if loop.take_picture else None
        self._seen = None
        if picture is None or dist.rank() != 0:
            return
        path = self.folder / f"iter_{loop.state.iteration:07d}.jpg"
        try:
            atomic_write(path, jpeg_bytes(picture))
        except WriteError as error:
            logger.warning("VIS_PERIOD: %s", error)
            return
        for one in self.loggers:
            one.picture(self.FOLDER, path, loop.state.iteration)
        self._prune(loop.state.iteration)

    def after_train(self, loop: Loop) -> None:
        if self._handle is not None:
            self._handle.remove()

    def _draw(self, sample: Sample, proposals: Proposals) -> np.ndarray:
        boxes = to_numpy(proposals.boxes[: self.PROPOSALS])
        halves = [draw_sample(sample, self.class_names, bgr=self.bgr, proposals=p) for p in (None, boxes)]
        return draw_grid(halves, ("ground truth", f"{len(boxes)} best proposals"), columns=2, cell=self.SIDE)

    def _prune(self, last: int) -> None:
        """Delete pictures beyond iteration ``last`` (an earlier run's, or drawn again), and all but the newest."""
        files = {int(m[1]): file for file in self.folder.glob("iter_*.jpg") if (m := _PICTURE.fullmatch(file.name))}
        kept = sorted(number for number in files if number <= last)[-self.KEPT :]
        for number in files.keys() - set(kept):
            with suppress(OSError):
                files[number].unlink()


class Evaluate(Hook):
    """Evaluates every ``TEST.EVAL_PERIOD`` iterations and at the end; keeps the best model and stops early."""

    def __init__(self, cfg: CfgNode, evaluate: Evaluator, signals: Signals, limit: TimeLimit) -> None:
        self.evaluate, self.signals, self.limit = evaluate, signals, limit
        self.period, self.patience = int(cfg.TEST.EVAL_PERIOD), int(cfg.TEST.PATIENCE)
        self.metric = str(cfg.TEST.BEST_METRIC)
        if not cfg.MODEL.MASK_ON:
            self.metric = self.metric.replace("segm/", "bbox/")

    def before_train(self, loop: Loop) -> None:
        """Run the evaluation that an interrupted run did not finish."""
        state = loop.state
        if state.iteration >= 0 and state.evaluated_at != state.iteration and self._due(loop):
            logger.info("Running the unfinished evaluation after iteration %d.", state.iteration)
            if state.rng is not None:
                restore_rng(state.rng)  # the checkpoint is written again
            self.run(loop)

    def after_step(self, loop: Loop) -> None:
        if self._due(loop):
            self.run(loop)

    def _due(self, loop: Loop) -> bool:
        return loop.stopping or loop.due(self.period)

    def run(self, loop: Loop) -> None:
        """Evaluate without changing the weights and random streams of training."""
        state, model = loop.state, loop.state.model
        rng, start, training = capture_rng(), time.monotonic(), model.training

        def on_progress(_: Any) -> None:
            if loop.flags["signal"]:
                raise _Left

        model.eval()
        results: Mapping[str, float] | None = None
        try:
            with suppress(_Left), state.average.swapped_in(model) if state.average is not None else nullcontext():
                results = self.evaluate(model, on_progress)
        finally:
            restore_rng(rng)
        if results is None:
            self.signals.interrupt(loop, collective=False)
        model.train(training)
        self.limit.reserve = max(self.limit.reserve, time.monotonic() - start)
        state.results, state.evaluated_at = dict(results), state.iteration
        self._judge(loop)
        if 0 < self.patience <= state.stale and not loop.last:
            logger.info(
                "Stopped early (TEST.PATIENCE): %d evaluations without a better %s than %.4f (iteration %d).",
                *(state.stale, self.metric, math.nan if state.best is None else state.best, state.best_iteration),
            )
            loop.stop()
        loop.call("after_eval")

    def _judge(self, loop: Loop) -> None:
        """Keep the model if its metric is the best so far."""
        state, name = loop.state, self.metric
        of_sets = (value for key, value in state.results.items() if key.endswith(f"/{name}"))
        value = state.results.get(name, next(of_sets, None))
        if value is None and state.results:
            logger.warning("TEST.BEST_METRIC %s is not among the results (%s ...).", name, min(state.results))
        if value is None or not math.isfinite(value):
            state.stale += 1
            logger.info("%s is undefined; %s is not written for iteration %d.", name, BEST, state.iteration)
        elif state.best is not None and value <= state.best:
            state.stale += 1
            logger.info("%s %.4f; the best stays %.4f (iteration %d).", name, value, state.best, state.best_iteration)
        else:
            state.best, state.best_iteration, state.stale = float(value), state.iteration, 0
            checkpoint = self.signals.checkpoint
            if dist.rank() == 0:
                with _naming_resume():
                    save_checkpoint(checkpoint.folder / BEST, build_payload(state, checkpoint.meta))
            logger.info("%s %.4f is the best so far: %s written.", name, value, checkpoint.folder / BEST)


class _Left(Exception):
    """Raised to leave an evaluation after a signal."""
