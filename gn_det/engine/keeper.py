"""What happens between iterations, whichever engine runs them: evaluation, checkpoints, early stop, signals."""

from __future__ import annotations

import logging
import math
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode
from torch import nn

from gn_det.checkpoint.io import save_checkpoint
from gn_det.checkpoint.last import prune, write_last
from gn_det.checkpoint.meta import build_meta
from gn_det.engine import dist
from gn_det.engine.average import weight_average
from gn_det.engine.budget import TimeBudget
from gn_det.engine.events import WINDOW
from gn_det.engine.learner import Learner
from gn_det.engine.output import BEST, FINAL, numbered
from gn_det.engine.recorder import Recorder
from gn_det.engine.state import ModelMeta, RunState, build_payload, capture_rng, restore_rng
from gn_det.errors import TrainingError, WriteError

logger = logging.getLogger(__name__)

#: ``evaluate(model, on_progress)`` gives flat metrics; the model is in evaluation mode.
Evaluator = Callable[[nn.Module, Callable[[Any], None]], Mapping[str, float]]


class Interrupted(TrainingError):
    """The run was asked to stop by a signal; a checkpoint was written. ``exit_code`` is 128 + the signal's number."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code

    def __reduce__(self) -> Any:
        return (Interrupted, (str(self), self.exit_code))


class Keeper:
    """Metrics, checkpoints, evaluation, best model, early stop and signals of a run.

    An engine's loop calls :meth:`start`, :meth:`before_first_batch` when the first batch is there, and
    :meth:`after_iteration` when optimizer and schedule have stepped; whoever made the keeper calls :meth:`close`.
    """

    def __init__(
        self,
        cfg: CfgNode,
        meta: ModelMeta,
        state: RunState,
        learner: Learner,
        recorder: Recorder,
        evaluate: Evaluator | None,
        resumed: Mapping[str, Any] | None = None,
    ) -> None:
        self.cfg, self.meta, self.state, self.learner, self.recorder = cfg, meta, state, learner, recorder
        self.evaluate = evaluate
        self.folder = Path(cfg.OUTPUT_DIR)
        resumed = resumed or {}
        self._resumed_rng, self._scaler_state = _rng_of(resumed), resumed.get("grad_scaler")
        learner.keep_in = self.folder
        learner.about = {"gn_det": build_meta(cfg, meta.class_names, meta.category_ids)}
        self._batch = int(cfg.SOLVER.IMS_PER_BATCH)
        self.average = weight_average(cfg, learner.model)
        if self.average is not None:
            known = self.average.restore(resumed)
            start = f"goes on after {self.average.steps} steps" if known else "starts at these weights"
            logger.info(
                "SOLVER.EMA: evaluated and saved is the average of the weights (decay %g); it %s.",
                self.average.decay,
                start,
            )
        self.budget = TimeBudget(float(cfg.SOLVER.MAX_HOURS))
        self._signal = 0
        # before the loop's library puts its own in place: ours replace those while training, these come back afterwards
        main = dist.in_main_thread()
        self._old_handlers = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)} if main else {}

    # ------------------------------------------------------------ start, end

    def start(self, scaler: Any = None) -> None:
        """The loop is set up; ``scaler`` is its gradient scaler, if it has one."""
        self._install_signals()
        self.learner.scaler = scaler
        if scaler is not None and self._scaler_state:
            scaler.load_state_dict(dict(self._scaler_state))
        self.recorder.start()

    def before_first_batch(self) -> None:
        """Last moment to put the random streams of a resumed run back: building loaders draws from them too."""
        self._restore_rng()
        self._resumed_rng = []

    def _restore_rng(self) -> None:
        if dist.rank() < len(self._resumed_rng):
            restore_rng(self._resumed_rng[dist.rank()])

    def close(self) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        self._old_handlers = {}
        self.recorder.close()

    # ------------------------------------------------------------ every iteration

    def after_iteration(self, metrics: Mapping[str, float]) -> bool:
        """Record the iteration and do what is due after it; True where training should end early.

        Args:
            metrics: scalars of the model, beside the losses that the learner has.

        Raises:
            Interrupted: a signal came; a checkpoint is written.
        """
        early = self.finish_iteration(metrics)
        self.conclude_iteration(early)
        return early

    def finish_iteration(self, metrics: Mapping[str, float]) -> bool:
        """The first half of :meth:`after_iteration`: all but writing the log; True where training should end early."""
        self.learner.finish_iteration()
        self.state.iteration += 1
        self.state.images_seen += self._batch
        if self.average is not None:
            self.average.update(self.learner.model)
        if dist.rank() == 0:
            self.recorder.record(self.learner, metrics, self.state.iteration)
        done, total = self.state.iteration + 1, int(self.cfg.SOLVER.MAX_ITER)
        last = done >= total
        period = int(self.cfg.SOLVER.CHECKPOINT_PERIOD)
        early = self.learner.time_is_up_everywhere and not last
        saved = last or early or (period > 0 and done % period == 0)
        if self.learner.stop_everywhere and not last:
            self._interrupt()
        if saved:  # before the evaluation, so that a failing one costs nothing
            self.save(FINAL if last else numbered(self.state.iteration))
        if self.evaluation_due(done, last or early):
            self.run_evaluation()
            if self._patience_is_over() and not last:
                early = last = saved = True
                self._say_early_stop()
            if saved:  # again: with what the evaluation found (best metric, patience)
                self.save(FINAL if last else numbered(self.state.iteration))
        return early

    def conclude_iteration(self, early: bool, metrics: Mapping[str, float] | None = None) -> None:
        """The second half: ``metrics`` came after the first one."""
        done, total = self.state.iteration + 1, int(self.cfg.SOLVER.MAX_ITER)
        last = done >= total or (early and self._patience_is_over())
        if metrics and dist.rank() == 0:
            self.recorder.events.put_all(metrics, self.state.iteration)
        if done % WINDOW == 0 or last or early:
            self.recorder.write()
        if self.learner.stop_everywhere and not last:
            self._interrupt()
        if early and not last:
            self._say_time_is_up()
        self.learner.time_is_up = self.budget.used_up()
        self.recorder.rest()

    def evaluation_due(self, done: int, last: bool) -> bool:
        period = int(self.cfg.TEST.EVAL_PERIOD)
        return self.evaluate is not None and (last or (period > 0 and done % period == 0))

    def catch_up(self) -> bool:
        """The evaluation that an interrupted run owes, and what follows from it; True where training ends with it."""
        self._restore_rng()  # the checkpoint is written anew
        self.run_evaluation()
        last = self.state.iteration + 1 >= int(self.cfg.SOLVER.MAX_ITER)
        early = self._patience_is_over() and not last
        self.save(FINAL if last or early else numbered(self.state.iteration))
        if early:
            self._say_early_stop()
            self.recorder.write()
        return early

    def _patience_is_over(self) -> bool:
        return 0 < int(self.cfg.TEST.PATIENCE) <= self.state.stale

    def _say_early_stop(self) -> None:
        logger.info(
            "Stopped early: %d evaluations without a better %s than %.4f (iteration %d); TEST.PATIENCE 0 never stops.",
            self.state.stale,
            metric_name(self.cfg),
            self.state.best if self.state.best is not None else math.nan,
            self.state.best_iteration,
        )

    def _say_time_is_up(self) -> None:
        logger.info(
            "The %g hours of SOLVER.MAX_HOURS (--max-hours) end after iteration %d of %d: %s is written%s; the same "
            "command with --resume goes on.",
            self.budget.hours,
            self.state.iteration,
            int(self.cfg.SOLVER.MAX_ITER),
            self.folder / numbered(self.state.iteration),
            " and evaluated" if self.evaluate is not None else "",
        )

    # ------------------------------------------------------------ evaluation

    def run_evaluation(self) -> None:
        """Evaluate on all ranks; the training's random streams come out untouched."""
        assert self.evaluate is not None
        rng, average = capture_rng(), self.average
        model = self.learner.model

        def on_progress(_: Any) -> None:
            if self._signal:
                restore_rng(rng)
                if average is not None:
                    average.put_back(model)
                self._interrupt(collective=False)

        was_training = model.training
        model.eval()
        start = time.monotonic()
        if average is not None:
            average.put_in(model)
        try:
            results = dict(self.evaluate(model, on_progress))
        finally:
            if average is not None:
                average.put_back(model)
        self.budget.note_evaluation(time.monotonic() - start)
        model.train(was_training)
        restore_rng(rng)
        state = self.state
        state.results, state.evaluated_at = results, state.iteration
        # Detectron2 writes the last evaluation under MAX_ITER, one beyond the last iteration.
        at = state.iteration + (state.iteration + 1 >= int(self.cfg.SOLVER.MAX_ITER))
        self.recorder.events.put_all(results, at, smooth=False)
        self.recorder.write()  # now: the log keeps only the latest evaluation
        self._judge()

    def _judge(self) -> None:
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
            payload = build_payload(self.learner.model, state, self.meta, average=self.average)
            save_checkpoint(self.folder / BEST, payload)
        logger.info("%s %.4f is the best so far: %s written.", name, value, self.folder / BEST)

    # ------------------------------------------------------------ checkpoints

    def save(self, name: str, *, collective: bool = True) -> None:
        """Write ``name`` and make it the one to resume from."""
        rng = dist.gather_objects(capture_rng()) if collective else [capture_rng()]
        problem: TrainingError | None = None
        if dist.rank() == 0:
            learner = self.learner
            try:
                payload = build_payload(
                    learner.model,
                    self.state,
                    self.meta,
                    optimizer=learner.optimizer,
                    scheduler=learner.scheduler,
                    scaler=learner.scaler.state_dict() if learner.scaler is not None else None,
                    rng=rng,
                    logs=self.recorder.dump(),
                    average=self.average,
                )
                save_checkpoint(self.folder / name, payload)
                write_last(self.folder, name)
                prune(self.folder, int(self.cfg.SOLVER.CHECKPOINT_KEEP))
            except TrainingError as error:
                problem = error
            except WriteError as error:
                problem = TrainingError(f"{error}, then rerun with --resume")
        if collective:
            problem = dist.broadcast(problem)
        if problem is not None:
            raise problem
        self.learner.last_good = os.fspath(self.folder / name)

    # ------------------------------------------------------------ signals

    def _install_signals(self) -> None:
        def request(number: int, frame: Any) -> None:
            if self._signal:  # a second one: the user means now
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            self._signal = number
            self.learner.stop_requested = True
            if dist.rank() == 0:
                logger.info("%s received; stopping after this iteration.", signal.Signals(number).name)

        for number in self._old_handlers:
            signal.signal(number, request)

    def _interrupt(self, *, collective: bool = True) -> None:
        name = numbered(self.state.iteration)
        if self.learner.last_good != os.fspath(self.folder / name):
            self.save(name, collective=collective)
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


def _rng_of(payload: Mapping[str, Any]) -> list[Any]:
    states = payload.get("rng") or []
    if states and len(states) != dist.world_size():
        logger.info(
            "The run had %d process(es) and now has %d: random streams start anew.", len(states), dist.world_size()
        )
        return []
    return list(states)
