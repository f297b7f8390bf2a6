"""Put model, data and evaluation together under an engine's loop, resumable at every checkpoint."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode
from torch import nn

from gn_det.checkpoint.io import read_checkpoint
from gn_det.checkpoint.last import read_last
from gn_det.engine import dist
from gn_det.engine.advice import memory_told
from gn_det.engine.events import EventLog, EventWriter, JsonWriter, TensorBoardWriter
from gn_det.engine.interface import Engine
from gn_det.engine.keeper import Evaluator, Keeper
from gn_det.engine.learner import Learner
from gn_det.engine.output import METRICS, trim_metrics
from gn_det.engine.recorder import Batches, Recorder
from gn_det.engine.schedule import images_per_rank
from gn_det.engine.state import (
    ModelMeta,
    RunState,
    changed_keys,
    restore,
)

logger = logging.getLogger(__name__)

#: ``make_loader(start_batch, seed)``: batches of this rank from ``start_batch`` on, forever.
LoaderFactory = Callable[[int, int], Iterable[Any]]


@dataclass
class Resume:
    """A checkpoint to go on from."""

    path: Path
    payload: dict[str, Any]


def find_resume(cfg: CfgNode) -> Resume | None:
    """The newest checkpoint of OUTPUT_DIR, read; None (and a sentence) when there is none."""
    folder = Path(cfg.OUTPUT_DIR)
    path = read_last(folder) if folder.is_dir() else None
    if path is None:
        logger.info("--resume: OUTPUT_DIR %s holds no checkpoint; the run starts from the beginning.", folder)
        return None
    return Resume(path, read_checkpoint(path))


def fit(
    engine: Engine,
    cfg: CfgNode,
    *,
    model: nn.Module,
    make_loader: LoaderFactory,
    meta: ModelMeta,
    seed: int,
    evaluate: Evaluator | None = None,
    resume: Resume | None = None,
    terminal: bool | None = None,
) -> dict[str, float]:
    """Train ``model`` from iteration 0, or from ``resume``, to ``SOLVER.MAX_ITER``.

    Args:
        engine: builds optimizer and schedule, and loops.
        cfg: resolved (:func:`gn_det.engine.schedule.scale_schedule` applied).
        model: the engine's, on the CPU.
        make_loader: see :data:`LoaderFactory`; batch k must depend on the seed and k alone.
        meta: classes and configuration for the checkpoints.
        seed: of the data stream; a resumed run takes the checkpoint's.
        evaluate: ``evaluate(model, on_progress)`` gives flat metrics, called on every rank; None never evaluates.
        resume: checkpoint to continue; its weights replace the model's.
        terminal: show a progress bar; None finds out.

    Returns:
        Metrics of the last evaluation, such as ``{"bbox/AP": 41.2, ...}``; empty without evaluation.

    Raises:
        TrainingError: non-finite loss, full disk, no memory left, or a signal.
        WeightsError: the checkpoint does not fit.
    """
    device = dist.resolve_device(cfg.MODEL.DEVICE)
    model.train().to(local_device(device))
    optimizer = engine.build_optimizer(cfg, model)
    learner = Learner(model, optimizer, engine.build_scheduler(cfg, optimizer))
    state = restore_run(resume, cfg, learner, seed)
    keeper = make_keeper(cfg, learner, state, meta, evaluate, resume, terminal=terminal)
    try:
        left = iterations_left(cfg, keeper)
        if left > 0:
            loader = make_loader(first_batch(cfg, state), state.seed)
            with memory_told(cfg, learner):
                engine.loop(cfg, device, keeper, Batches(loader, left * int(cfg.SOLVER.ACCUMULATE), learner))
    finally:
        keeper.close()
    return state.results


def restore_run(resume: Resume | None, cfg: CfgNode, learner: Learner, seed: int) -> RunState:
    """Counters of the run; weights, momentum, schedule and iteration of ``resume`` are put into the learner.

    Raises:
        WeightsError: the checkpoint does not fit.
    """
    state = RunState(seed)
    if resume is None:
        return state
    source = os.fspath(resume.path)
    state, momentum = restore(
        resume.payload,
        learner.model,
        learner.optimizer,
        learner.scheduler,
        state,
        batch=int(cfg.SOLVER.IMS_PER_BATCH),
        processes=dist.world_size(),
        source=source,
    )
    learner.iteration, learner.last_good = state.iteration + 1, source
    _say_resumed(resume, state, cfg, momentum)
    return state


def make_keeper(
    cfg: CfgNode,
    learner: Learner,
    state: RunState,
    meta: ModelMeta,
    evaluate: Evaluator | None,
    resume: Resume | None,
    *,
    terminal: bool | None = None,
) -> Keeper:
    """The keeper of a run from ``state`` on; opens the files of OUTPUT_DIR, so it must be closed."""
    logs = resume.payload.get("logs") if resume is not None else None  # a file of another tool has none
    writers = _writers(cfg, state.iteration, logs["written"] if logs else None)
    recorder = Recorder(cfg, EventLog(), writers, learner.iteration, terminal=terminal)
    if logs:
        recorder.restore(logs)
    return Keeper(cfg, meta, state, learner, recorder, evaluate, resume.payload if resume is not None else None)


def first_batch(cfg: CfgNode, state: RunState) -> int:
    """Number of the micro-batch, of each rank, that comes after those which ``state`` has seen."""
    return state.images_seen // (images_per_rank(cfg, dist.world_size()) * dist.world_size())


def iterations_left(cfg: CfgNode, keeper: Keeper) -> int:
    """Iterations to go; an evaluation that an interrupted run still owes is made up for."""
    state = keeper.state
    left = int(cfg.SOLVER.MAX_ITER) - state.iteration - 1
    missed = state.iteration >= 0 and state.evaluated_at != state.iteration
    if missed and keeper.evaluation_due(state.iteration + 1, left <= 0):
        logger.info("The evaluation due after iteration %d did not finish; it runs now.", state.iteration)
        if keeper.catch_up():
            return 0
    if state.iteration >= 0:
        keeper.recorder.write_if_due(state.iteration)
    if left <= 0:
        logger.info(
            "Nothing left to train: iteration %d is done and SOLVER.MAX_ITER is %d; raise SOLVER.MAX_ITER to go on.",
            state.iteration,
            cfg.SOLVER.MAX_ITER,
        )
    return left


def local_device(device: str) -> str:
    """``device`` with the number of this process's GPU."""
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and dist.world_size() > 1 else device


def _writers(cfg: CfgNode, iteration: int, written: int | None) -> list[EventWriter]:
    """Of rank 0: the files go on after ``written``, or where that is not known after ``iteration``."""
    if dist.rank() != 0:
        return []
    folder = Path(cfg.OUTPUT_DIR)
    if iteration >= 0:
        trim_metrics(folder, iteration, written)
    # the last evaluation of a finished run stands one beyond its last iteration
    start = min(written if written is not None else iteration, iteration)
    return [JsonWriter(os.fspath(folder / METRICS), start), TensorBoardWriter(os.fspath(folder), start)]


def _say_resumed(resume: Resume, state: RunState, cfg: CfgNode, momentum: str) -> None:
    logger.info(
        "Resumed from %s: iteration %d done, %d to go.",
        resume.path,
        state.iteration,
        max(int(cfg.SOLVER.MAX_ITER) - state.iteration - 1, 0),
    )
    if momentum:
        logger.info(momentum)
    changed = changed_keys(resume.payload, cfg)
    if changed:
        logger.info("Changed since that checkpoint, and used as given now: %s.", "; ".join(changed))
