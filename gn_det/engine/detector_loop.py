"""Assemble the training loop of a detector: model, data, hooks and evaluation."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn

from gn_det.checkpoint.meta import build_meta
from gn_det.engine import dist
from gn_det.engine.advice import explain_oom
from gn_det.engine.engines import Engine
from gn_det.engine.hooks import Checkpoint, Evaluate, Evaluator, PreciseBN, Schedule, Signals, TimeLimit, Visualize
from gn_det.engine.loggers import Logger, open_loggers
from gn_det.engine.loop import Hook, Loop, make_scaler, parallel
from gn_det.engine.optimizer import clip_gradients
from gn_det.engine.precision import DTYPES, lay_out
from gn_det.engine.scalars import Metrics
from gn_det.engine.schedule import images_per_rank
from gn_det.engine.state import ModelMeta, Resume, TrainState, WeightAverage, restore

logger = logging.getLogger(__name__)

#: ``make_loader(start_batch, seed)``: endless batches of this rank; batch k depends only on the seed and k.
LoaderFactory = Callable[[int, int], Iterable[Any]]


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
    hooks: Sequence[Hook] = (),
) -> dict[str, float]:
    """Train ``model`` from iteration 0, or from ``resume``, to ``SOLVER.MAX_ITER``.

    Args:
        cfg: after :func:`gn_det.engine.schedule.scale_schedule`.
        model: model of the engine, on the CPU.
        seed: seed of the data stream; a resumed run uses the checkpoint's.
        evaluate: called on every rank; None never evaluates.
        hooks: hooks of the user.

    Returns:
        Metrics of the last evaluation, such as ``{"bbox/AP": 41.2, ...}``; empty without evaluation.

    Raises:
        TrainingError: non-finite loss, full disk, no memory left, or a signal.
        WeightsError: the checkpoint does not fit.
    """
    torch.backends.cudnn.benchmark = bool(cfg.CUDNN_BENCHMARK)
    lay_out(model.train().to(dist.local_device(cfg.MODEL.DEVICE)), cfg)
    optimizer = engine.build_optimizer(cfg, model)
    state = TrainState(model, optimizer, engine.build_scheduler(cfg, optimizer), seed)
    if resume is not None:
        restore(resume, state, cfg)
    own = [*engine.hooks(), Schedule(), *hooks]
    if cfg.TEST.PRECISE_BN.ENABLED:
        # Batches that training does not see in this order; the same ones after a resume.
        own.append(PreciseBN(cfg, lambda: engine.inputs(make_loader(first_batch(cfg, state), state.seed + 1))))
    loop = make_loop(cfg, state, parallel(model), own, meta, evaluate, resume)
    loop.autocast_cache = engine.autocast_cache
    with explain_oom(cfg, loop):
        loop.run(lambda: engine.inputs(make_loader(first_batch(cfg, state), state.seed)))
    return state.results


def make_loop(
    cfg: CfgNode,
    state: TrainState,
    forward: Callable[[Any], Mapping[str, Tensor]],
    own: Sequence[Hook],
    meta: ModelMeta,
    evaluate: Evaluator | None,
    resume: Resume | None,
    *,
    clip: bool = True,
) -> Loop:
    """Build the loop that continues from ``state``; opens files in OUTPUT_DIR, which ``loop.end()`` closes.

    Args:
        state: after :func:`gn_det.engine.state.restore`; scaler and average are added.
        own: hooks that run before those of a detection run.
        clip: False if the optimizer clips gradients itself.
    """
    payload, solver = resume.payload if resume is not None else {}, cfg.SOLVER
    autocast = DTYPES[solver.AMP.DTYPE] if solver.AMP.ENABLED else None
    state.scaler = make_scaler(autocast, next(state.model.parameters()).device.type)
    if payload.get("grad_scaler"):
        state.scaler.load_state_dict(dict(payload["grad_scaler"]))
    if solver.EMA.ENABLED:
        average = state.average = WeightAverage(state.model, float(solver.EMA.DECAY))
        if payload.get("ema"):
            average.restore(payload["model"], payload["ema"]["steps"])
        how = f"continues after {average.steps} steps" if average.steps else "starts at these weights"
        logger.info("SOLVER.EMA: the average (decay %g) is evaluated and saved; it %s.", average.decay, how)
    folder = Path(cfg.OUTPUT_DIR)
    logs = payload.get("logs") or {}  # a file of another tool has none
    loggers: list[Logger] = []
    dist.on_first_rank(lambda: loggers.extend(open_loggers(cfg, state.iteration, logs.get("written"))))
    metrics = Metrics(loggers)
    if logs:
        metrics.restore(logs)
    checkpoint = Checkpoint(folder, meta, metrics, period=solver.CHECKPOINT_PERIOD, keep=solver.CHECKPOINT_KEEP)
    signals, limit = Signals(checkpoint), TimeLimit(float(solver.MAX_HOURS), checkpoint)
    drawing = [Visualize(cfg, meta.class_names, metrics.loggers)] if cfg.VIS_PERIOD > 0 else []
    evaluating = [Evaluate(cfg, evaluate, signals, limit)] if evaluate is not None else []
    return Loop(
        state,
        forward,
        [*own, *drawing, metrics, signals, limit, checkpoint, *evaluating],
        total=int(solver.MAX_ITER),
        accumulate=int(solver.ACCUMULATE),
        images=int(solver.IMS_PER_BATCH),
        autocast=autocast,
        clip=partial(clip_gradients, cfg) if clip and solver.CLIP_GRADIENTS.ENABLED else None,
        folder=folder,
        about={"gn_det": build_meta(cfg, meta.class_names, meta.category_ids)},
    )


def first_batch(cfg: CfgNode, state: TrainState) -> int:
    """Return the number of the next micro-batch of each rank after those that ``state`` has seen."""
    return state.images_seen // (images_per_rank(cfg, dist.world_size()) * dist.world_size())
