"""Lightning's loop under a run's keeper."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import lightning.pytorch as pl
from fvcore.common.config import CfgNode
from lightning.fabric.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy

from gn_det.engine import dist
from gn_det.engine.keeper import Keeper
from gn_det.engine.lightning_hooks import KeeperCallback
from gn_det.engine.lightning_module import DetectionModule
from gn_det.engine.lightning_parts import backend, process_layout, quiet_lightning
from gn_det.errors import ConfigError


def loop(cfg: CfgNode, device: str, keeper: Keeper, batches: Iterable[Any]) -> None:
    """Train on ``batches`` until they or the keeper end it; see :class:`gn_det.engine.interface.Engine`."""
    callback = KeeperCallback(keeper, int(cfg.SOLVER.ACCUMULATE))
    with quiet_lightning():
        build_trainer(cfg, device, [callback]).fit(DetectionModule(cfg, keeper.learner), train_dataloaders=batches)


def build_trainer(cfg: CfgNode, device: str, callbacks: list[Any]) -> pl.Trainer:
    """Lightning's trainer with its own logging, checkpointing and progress turned off."""
    accelerator, devices, nodes = process_layout(device)
    strategy: Any = "auto"
    if dist.world_size() > 1:
        strategy = DDPStrategy(
            cluster_environment=TorchElasticEnvironment(),
            process_group_backend=backend(accelerator),
            broadcast_buffers=False,
        )
    return pl.Trainer(
        accelerator=accelerator,
        devices=devices,
        num_nodes=nodes,
        strategy=strategy,
        precision=_precision(cfg, accelerator),
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


def _precision(cfg: CfgNode, accelerator: str) -> Any:
    if not cfg.SOLVER.AMP.ENABLED:
        return "32-true"
    if cfg.SOLVER.AMP.DTYPE == "bf16":
        return "bf16-mixed"
    if accelerator != "gpu":
        raise ConfigError("SOLVER.AMP.DTYPE fp16 needs a GPU; use bf16 or SOLVER.AMP.ENABLED False")
    return "16-mixed"
