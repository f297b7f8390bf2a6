"""Lightning's loop under a run's keeper."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from fvcore.common.config import CfgNode
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy

from gn_det.errors import ConfigError
from gn_det.run import dist
from gn_det.run.keeper import Keeper
from gn_det.training.hooks import KeeperCallback
from gn_det.training.module import DetectionModule


def loop(cfg: CfgNode, device: str, keeper: Keeper, batches: Iterable[Any]) -> None:
    """Train on ``batches`` until they or the keeper end it; see :class:`gn_det.run.engine.Engine`."""
    callback = KeeperCallback(keeper, int(cfg.SOLVER.ACCUMULATE))
    with quiet_lightning():
        build_trainer(cfg, device, [callback]).fit(DetectionModule(cfg, keeper.learner), train_dataloaders=batches)


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
