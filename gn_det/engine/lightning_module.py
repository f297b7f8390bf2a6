"""One optimizer step under Lightning."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from fvcore.common.config import CfgNode
from torch import Tensor

from gn_det.engine.learner import Learner
from gn_det.engine.optim import clip_gradients


class DetectionModule(pl.LightningModule):
    """Lightning's view of a detector that returns a dict of losses."""

    def __init__(self, cfg: CfgNode, learner: Learner) -> None:
        super().__init__()
        self.cfg = cfg
        self.model = learner.model
        self.learner = learner

    def configure_optimizers(self) -> Any:
        return {
            "optimizer": self.learner.optimizer,
            "lr_scheduler": {"scheduler": self.learner.scheduler, "interval": "step", "frequency": 1},
        }

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch  # the model moves what it needs

    def training_step(self, batch: list[Any], batch_idx: int) -> Tensor:
        return self.learner.total_loss(self.model, batch)

    def on_after_backward(self) -> None:
        self.learner.check()

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        clip_gradients(self.cfg, [p for g in optimizer.param_groups for p in g["params"]])

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.learner.note_lr()
