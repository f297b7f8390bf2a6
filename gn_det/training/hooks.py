"""What happens around the iterations: metrics, evaluation, checkpoints, early stop, signals."""

from __future__ import annotations

import logging
import math
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from fvcore.common.config import CfgNode

from gn_det.checkpoint.io import save_checkpoint
from gn_det.checkpoint.last import prune, write_last
from gn_det.errors import TrainingError
from gn_det.training import dist
from gn_det.training.events import WINDOW, EventLog, EventWriter
from gn_det.training.module import DetectionModule
from gn_det.training.output import BEST, FINAL, numbered
from gn_det.training.progress import Progress
from gn_det.training.state import ModelMeta, RunState, build_payload, capture_rng, restore_rng

logger = logging.getLogger(__name__)

Evaluator = Callable[[torch.nn.Module, Callable[[Any], None]], Mapping[str, float]]
_TIME_WARMUP = 3  # iterations whose time is not counted


class Interrupted(TrainingError):
    """The run was asked to stop by a signal; a checkpoint was written. ``exit_code`` is 128 + the signal's number."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code

    def __reduce__(self) -> Any:
        return (Interrupted, (str(self), self.exit_code))


class Batches(Iterable[Any]):
    """A loader cut to ``count`` micro-batches, with the time waited for each noted on the module."""

    def __init__(self, loader: Iterable[Any], count: int, module: DetectionModule) -> None:
        self.loader, self.count, self.module = loader, count, module

    def __iter__(self) -> Iterator[Any]:
        batches = iter(self.loader)
        for _ in range(self.count):
            start = time.perf_counter()
            batch = next(batches)
            self.module.waited += time.perf_counter() - start
            yield batch


class Recorder(pl.Callback):
    """Losses, lr and times of every iteration into the event log, the progress line and the files."""

    def __init__(
        self, cfg: CfgNode, log: EventLog, writers: list[EventWriter], start: int, *, terminal: bool | None
    ) -> None:
        # not "self.log": Lightning puts a method of that name on every callback
        self.events, self.writers, self.start = log, writers, start
        self.total, self.accumulate = int(cfg.SOLVER.MAX_ITER), int(cfg.SOLVER.ACCUMULATE)
        self._terminal = terminal
        self._progress: Progress | None = None
        self._mark = 0.0

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        self._mark = time.perf_counter()
        if dist.rank() == 0:
            self._progress = Progress(self.start, self.total, period=WINDOW, terminal=self._terminal)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % self.accumulate:
            return
        module.finish_iteration()
        metrics: dict[str, float] = getattr(module.model, "pop_metrics", dict)()
        if dist.rank() == 0:
            self.record(module, metrics, self.start + (batch_idx + 1) // self.accumulate - 1)

    def record(self, module: DetectionModule, metrics: Mapping[str, float], iteration: int) -> None:
        log = self.events
        log.put("data_time", module.data_time, iteration)
        log.put("total_loss", sum(module.losses.values()), iteration)
        if len(module.losses) > 1:
            log.put_all(module.losses, iteration)
        log.put_all(metrics, iteration)
        log.put("lr", module.lr, iteration, smooth=False)
        if iteration - self.start >= _TIME_WARMUP:
            log.put("time", time.perf_counter() - self._mark, iteration)
            left = self.total - iteration - 1
            log.put("eta_seconds", log.histories["time"].median(1000) * left, iteration, smooth=False)
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

    def rest(self) -> None:
        """Start timing the next iteration here: what came before (evaluation, checkpoints) is not counted."""
        self._mark = time.perf_counter()

    def close(self) -> None:
        if self._progress is not None:
            self._progress.close()
            self._progress = None


class Keeper(pl.Callback):
    """Checkpoints, evaluation, best model, early stop and signals; must come after :class:`Recorder`."""

    def __init__(
        self,
        cfg: CfgNode,
        meta: ModelMeta,
        state: RunState,
        recorder: Recorder,
        evaluate: Evaluator | None,
        resumed_rng: list[Any],
        scaler_state: Mapping[str, Any] | None = None,
    ) -> None:
        self.cfg, self.meta, self.state, self.recorder = cfg, meta, state, recorder
        self.evaluate = evaluate
        self.folder = Path(cfg.OUTPUT_DIR)
        self.stopped_early = False
        self._resumed_rng, self._scaler_state = resumed_rng, scaler_state
        self._batches = int(cfg.SOLVER.IMS_PER_BATCH)
        self._signal = 0
        # before Lightning puts its own in place: ours replace those while training, these come back afterwards
        main = dist.in_main_thread()
        self._old_handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)} if main else {}

    # ------------------------------------------------------------ start, end

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        self._install_signals(module)
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        if scaler is not None and self._scaler_state:
            scaler.load_state_dict(dict(self._scaler_state))

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0 and self._resumed_rng:  # last moment: building loaders draws from the generators too
            if dist.rank() < len(self._resumed_rng):
                restore_rng(self._resumed_rng[dist.rank()])
            self._resumed_rng = []

    def close(self) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        self._old_handlers = {}
        self.recorder.close()

    # ------------------------------------------------------------ every iteration

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if (batch_idx + 1) % int(self.cfg.SOLVER.ACCUMULATE):
            return
        self.state.iteration += 1
        self.state.images_seen += self._batches
        done, total = self.state.iteration + 1, int(self.cfg.SOLVER.MAX_ITER)
        last = done >= total
        period = int(self.cfg.SOLVER.CHECKPOINT_PERIOD)
        saved = last or (period > 0 and done % period == 0)
        if module.stop_everywhere and not last:
            self._interrupt(trainer, module)
        if saved:  # before the evaluation, so that a failing one costs nothing
            self.save(trainer, module, FINAL if last else numbered(self.state.iteration))
        if self.evaluation_due(done, last):
            self.run_evaluation(trainer, module)
            patience = int(self.cfg.TEST.PATIENCE)
            if patience > 0 and self.state.stale >= patience and not last:
                self.stopped_early, last = True, True
                trainer.should_stop = True
                saved = True
                self._say_early_stop()
            if saved:  # again: with what the evaluation found (best metric, patience)
                self.save(trainer, module, FINAL if last else numbered(self.state.iteration))
        if done % WINDOW == 0 or last:
            self.recorder.write()
        if module.stop_everywhere and not last:
            self._interrupt(trainer, module)
        self.recorder.rest()

    def evaluation_due(self, done: int, last: bool) -> bool:
        period = int(self.cfg.TEST.EVAL_PERIOD)
        return self.evaluate is not None and (last or (period > 0 and done % period == 0))

    def _say_early_stop(self) -> None:
        logger.info(
            "Stopped early: %d evaluations without a better %s than %.4f (iteration %d); TEST.PATIENCE 0 never stops.",
            self.state.stale,
            metric_name(self.cfg),
            self.state.best if self.state.best is not None else math.nan,
            self.state.best_iteration,
        )

    # ------------------------------------------------------------ evaluation

    def run_evaluation(self, trainer: Any, module: Any) -> None:
        """Evaluate on all ranks; the training's random streams come out untouched."""
        assert self.evaluate is not None
        rng = capture_rng()

        def on_progress(_: Any) -> None:
            if self._signal:
                restore_rng(rng)
                self._interrupt(trainer, module, collective=False)

        was_training = module.model.training
        module.model.eval()
        results = dict(self.evaluate(module.model, on_progress))
        module.model.train(was_training)
        restore_rng(rng)
        state = self.state
        state.results, state.evaluated_at = results, state.iteration
        # Detectron2 writes the last evaluation under MAX_ITER, one beyond the last iteration.
        at = state.iteration + (state.iteration + 1 >= int(self.cfg.SOLVER.MAX_ITER))
        self.recorder.events.put_all(results, at, smooth=False)
        self.recorder.write()  # now: the log keeps only the latest evaluation
        self._judge(module)

    def _judge(self, module: Any) -> None:
        """Keep the model if its metric is the best so far."""
        state, name = self.state, metric_name(self.cfg)
        value = state.results.get(name)
        if value is None and state.results:
            value = next((v for k, v in state.results.items() if k.endswith(f"/{name}")), None)
            if value is None:
                logger.warning("TEST.BEST_METRIC %s is not among the results (%s ...).", name, min(state.results))
        if value is None or not math.isfinite(value):
            state.stale += 1
            logger.info("%s is undefined; %s is not written for iteration %d.", name, BEST, state.iteration)
            return
        if state.best is not None and value <= state.best:
            state.stale += 1
            logger.info("%s %.4f; the best stays %.4f (iteration %d).", name, value, state.best, state.best_iteration)
            return
        state.best, state.best_iteration, state.stale = float(value), state.iteration, 0
        if dist.rank() == 0:
            save_checkpoint(self.folder / BEST, build_payload(module.model, state, self.meta))
        logger.info("%s %.4f is the best so far: %s written.", name, value, self.folder / BEST)

    # ------------------------------------------------------------ checkpoints

    def save(self, trainer: Any, module: Any, name: str, *, collective: bool = True) -> None:
        """Write ``name`` and make it the one to resume from."""
        rng = dist.gather_objects(capture_rng()) if collective else [capture_rng()]
        problem: TrainingError | None = None
        if dist.rank() == 0:
            scaler = getattr(getattr(trainer, "precision_plugin", None), "scaler", None)
            try:
                payload = build_payload(
                    module.model,
                    self.state,
                    self.meta,
                    optimizer=module._optimizer,
                    scheduler=module._scheduler,
                    scaler=scaler.state_dict() if scaler is not None else None,
                    rng=rng,
                )
                save_checkpoint(self.folder / name, payload)
                write_last(self.folder, name)
                prune(self.folder, int(self.cfg.SOLVER.CHECKPOINT_KEEP))
            except TrainingError as error:
                problem = error
        if collective:
            problem = dist.broadcast(problem)
        if problem is not None:
            raise problem
        module.last_good = os.fspath(self.folder / name)

    # ------------------------------------------------------------ signals

    def _install_signals(self, module: Any) -> None:
        def request(number: int, frame: Any) -> None:
            if self._signal:  # a second one: the user means now
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            self._signal = number
            module.stop_requested = True
            if dist.rank() == 0:
                logger.info("%s received; stopping after this iteration.", signal.Signals(number).name)

        for number in self._old_handlers:
            signal.signal(number, request)

    def _interrupt(self, trainer: Any, module: Any, *, collective: bool = True) -> None:
        name = numbered(self.state.iteration)
        if module.last_good != os.fspath(self.folder / name):
            self.save(trainer, module, name, collective=collective)
        self.recorder.write()
        number = self._signal or signal.SIGTERM
        raise Interrupted(
            f"stopped by {signal.Signals(number).name} after iteration {self.state.iteration}; {self.folder / name} is "
            "written: continue by the same command with --resume",
            128 + number,
        )


def metric_name(cfg: CfgNode) -> str:
    """``TEST.BEST_METRIC``, with boxes in place of masks for a model without a mask head."""
    name = str(cfg.TEST.BEST_METRIC)
    return name.replace("segm/", "bbox/") if not cfg.MODEL.MASK_ON else name
