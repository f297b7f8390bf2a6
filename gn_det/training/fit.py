"""The loop itself: model, data and evaluation put into Lightning's trainer, resumable at every checkpoint."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from fvcore.common.config import CfgNode
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from gn_det.checkpoint.io import read_checkpoint
from gn_det.checkpoint.last import read_last
from gn_det.errors import ConfigError
from gn_det.training import dist
from gn_det.training.events import EventLog, EventWriter, JsonWriter, TensorBoardWriter
from gn_det.training.hooks import Batches, Evaluator, Keeper, Recorder
from gn_det.training.module import DetectionModule
from gn_det.training.optim import build_optimizer
from gn_det.training.output import METRICS, trim_metrics
from gn_det.training.schedule import build_lr_scheduler, images_per_rank
from gn_det.training.state import (
    ModelMeta,
    RunState,
    changed_keys,
    restore_optimizer,
    restore_state,
    restore_weights,
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
        cfg: resolved (:func:`gn_det.training.schedule.scale_schedule` applied).
        model: on the CPU; ``model(list[Sample])`` gives a dict of losses in training mode.
        make_loader: see :data:`LoaderFactory`; batch k must depend on the seed and k alone.
        meta: classes and configuration for the checkpoints.
        seed: of the data stream; a resumed run takes the checkpoint's.
        evaluate: ``evaluate(model, on_progress)`` gives flat metrics, called on every rank; None never evaluates.
        resume: checkpoint to continue; its weights replace the model's.
        terminal: show a progress bar; None finds out.

    Returns:
        Metrics of the last evaluation, such as ``{"bbox/AP": 41.2, ...}``; empty without evaluation.

    Raises:
        TrainingError: non-finite loss, full disk, or a signal (:class:`gn_det.training.hooks.Interrupted`).
        WeightsError: the checkpoint does not fit.
    """
    device = dist.resolve_device(cfg.MODEL.DEVICE)
    state = RunState(seed)
    if resume is not None:
        state = restore_state(resume.payload, state)
        restore_weights(resume.payload, model, os.fspath(resume.path))
    model.train().to(_torch_device(device))
    optimizer = build_optimizer(cfg, model)
    scheduler = build_lr_scheduler(cfg, optimizer)
    start = state.iteration + 1
    if resume is not None:
        had_optimizer = restore_optimizer(resume.payload, optimizer, scheduler, start, os.fspath(resume.path))
        _say_resumed(resume, state, cfg, had_optimizer)
    module = DetectionModule(cfg, model, optimizer, scheduler)
    module.first_iteration = start
    module.last_good = os.fspath(resume.path) if resume is not None else ""
    recorder = Recorder(cfg, EventLog(), _writers(cfg, state.iteration), start, terminal=terminal)
    saved = resume.payload if resume is not None else {}
    keeper = Keeper(cfg, meta, state, recorder, evaluate, _rng_of(saved), saved.get("grad_scaler"))
    try:
        _run(cfg, device, module, keeper, make_loader)
    finally:
        keeper.close()
        for writer in recorder.writers:
            writer.close()
    return state.results


def _run(cfg: CfgNode, device: str, module: DetectionModule, keeper: Keeper, make_loader: LoaderFactory) -> None:
    state = keeper.state
    left = int(cfg.SOLVER.MAX_ITER) - state.iteration - 1
    missed = state.iteration >= 0 and state.evaluated_at != state.iteration
    if missed and keeper.evaluation_due(state.iteration + 1, left <= 0):
        logger.info("The evaluation due after iteration %d did not finish; it runs now.", state.iteration)
        keeper.run_evaluation(None, module)
    if left <= 0:
        logger.info(
            "Nothing left to train: iteration %d is done and SOLVER.MAX_ITER is %d; raise SOLVER.MAX_ITER to go on.",
            state.iteration,
            cfg.SOLVER.MAX_ITER,
        )
        return
    accumulate = int(cfg.SOLVER.ACCUMULATE)
    start_batch = state.images_seen // (images_per_rank(cfg, dist.world_size()) * dist.world_size())
    batches = Batches(make_loader(start_batch, state.seed), left * accumulate, module)
    with quiet_lightning():
        build_trainer(cfg, device, [keeper.recorder, keeper]).fit(module, train_dataloaders=batches)


def build_trainer(cfg: CfgNode, device: str, callbacks: list[Any]) -> pl.Trainer:
    """Lightning's trainer with its own logging, checkpointing and progress turned off."""
    kind, _, index = device.partition(":")
    devices: Any = [int(index)] if index else 1
    strategy: Any = "auto"
    nodes = 1
    if dist.world_size() > 1:
        local = int(os.environ.get("LOCAL_WORLD_SIZE", dist.world_size()))
        devices, nodes = local, dist.world_size() // local
        strategy = DDPStrategy(
            cluster_environment=TorchElasticEnvironment(),
            process_group_backend="nccl" if kind == "cuda" else "gloo",
            broadcast_buffers=False,
        )
    return pl.Trainer(
        accelerator="gpu" if kind == "cuda" else "cpu",
        devices=devices,
        num_nodes=nodes,
        strategy=strategy,
        precision=_precision(cfg, kind),
        max_epochs=1,
        accumulate_grad_batches=int(cfg.SOLVER.ACCUMULATE),
        callbacks=callbacks,
        default_root_dir=cfg.OUTPUT_DIR,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        benchmark=bool(cfg.CUDNN_BENCHMARK),
    )


def _precision(cfg: CfgNode, kind: str) -> Any:
    if not cfg.SOLVER.AMP.ENABLED:
        return "32-true"
    if cfg.SOLVER.AMP.DTYPE == "bf16":
        return "bf16-mixed"
    if kind != "cuda":
        raise ConfigError("SOLVER.AMP.DTYPE fp16 needs a GPU; use bf16 or SOLVER.AMP.ENABLED False")
    return "16-mixed"


def _torch_device(device: str) -> str:
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and dist.world_size() > 1 else device


def _rng_of(payload: dict[str, Any]) -> list[Any]:
    states = payload.get("rng") or []
    if states and len(states) != dist.world_size():
        logger.info(
            "The run had %d process(es) and now has %d: random streams start anew.", len(states), dist.world_size()
        )
        return []
    return list(states)


def _writers(cfg: CfgNode, iteration: int) -> list[EventWriter]:
    if dist.rank() != 0:
        return []
    folder = Path(cfg.OUTPUT_DIR)
    if iteration >= 0:
        trim_metrics(folder, iteration)
    return [JsonWriter(os.fspath(folder / METRICS)), TensorBoardWriter(os.fspath(folder))]


def _say_resumed(resume: Resume, state: RunState, cfg: CfgNode, with_optimizer: bool) -> None:
    logger.info(
        "Resumed from %s: iteration %d done, %d to go.",
        resume.path,
        state.iteration,
        max(int(cfg.SOLVER.MAX_ITER) - state.iteration - 1, 0),
    )
    if not with_optimizer:
        logger.info("It holds no optimizer state: momentum starts at zero.")
    changed = changed_keys(resume.payload, cfg)
    if changed:
        logger.info("Changed since that checkpoint, and used as given now: %s.", "; ".join(changed))


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Lightning's banners, tips and warnings about choices that are ours, silenced."""
    loggers = [logging.getLogger(name) for name in ("lightning", "lightning.pytorch", "lightning.fabric")]
    levels = [one.level for one in loggers]
    for one in loggers:
        one.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning.*")
            warnings.filterwarnings("ignore", message=r".*lr_scheduler\.step\(\).*")
            yield
    finally:
        for one, level in zip(loggers, levels):
            one.setLevel(level)
