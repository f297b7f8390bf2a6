"""One optimizer step under Lightning: losses, the check for non-finite values, clipping, learning rate."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from gn_det.errors import TrainingError
from gn_det.training import dist
from gn_det.training.optim import clip_gradients


class DetectionModule(pl.LightningModule):
    """Lightning's view of a detector that returns a dict of losses.

    Attributes:
        losses: mean over ranks and micro-batches of each loss of the iteration that just ended.
        data_time: seconds waited for data in it, the slowest rank.
        lr: learning rate used in it, of the group with most tensors (as Detectron2 reports it).
        stop_requested: set by a signal; every rank sees it in ``stop_everywhere`` at the end of the iteration.
        first_iteration: iteration at which this process starts counting.
        last_good: path of the newest checkpoint, for messages.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module, optimizer: torch.optim.Optimizer, scheduler: LambdaLR) -> None:
        super().__init__()
        self.cfg = cfg
        self.model = model
        self._optimizer, self._scheduler = optimizer, scheduler
        self.first_iteration = 0
        self.losses: dict[str, float] = {}
        self.data_time = 0.0
        self.lr = 0.0
        self.stop_requested = False
        self.stop_everywhere = False
        self.last_good = ""
        self.waited = 0.0  # seconds, added by the loader wrapper
        self._current: tuple[dict[str, Tensor], list[Any]] = ({}, [])
        self._micro: list[dict[str, float]] = []
        self._waits: list[float] = []
        self._largest_group = max(range(len(optimizer.param_groups)), key=lambda i: self._size(optimizer, i))

    @staticmethod
    def _size(optimizer: torch.optim.Optimizer, index: int) -> int:
        return len(optimizer.param_groups[index]["params"])

    def configure_optimizers(self) -> Any:
        return {
            "optimizer": self._optimizer,
            "lr_scheduler": {"scheduler": self._scheduler, "interval": "step", "frequency": 1},
        }

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        return batch  # the model moves what it needs

    def training_step(self, batch: list[Any], batch_idx: int) -> Tensor:
        try:
            losses = self.model(batch)
        except FloatingPointError as error:  # proposals cannot be made of such predictions: there is no loss to look at
            ids = ", ".join(str(s.get("image_id")) for s in batch)
            raise self._not_finite(f"loss_rpn_cls, loss_rpn_loc, images {ids} ({error})") from None
        self._current = ({k: v.detach() for k, v in losses.items()}, [s.get("image_id") for s in batch])
        return torch.stack([v.float() for v in losses.values()]).sum()

    def on_after_backward(self) -> None:
        """Look at the losses while the device still works on the backward pass; stop before the optimizer steps."""
        losses, image_ids = self._current
        names = list(losses)
        flags = [float(self.stop_requested), self.waited]
        self.waited = 0.0
        row = torch.stack([v.float() for v in losses.values()])
        rows = dist.gather_rows(torch.cat([row, torch.tensor(flags, device=row.device)]))
        bad = [not all(abs(v) < float("inf") for v in r[: len(names)]) for r in rows]
        if any(bad):
            self._stop_non_finite(names, rows, image_ids)
        self._micro.append({name: sum(r[i] for r in rows) / len(rows) for i, name in enumerate(names)})
        self._waits.append(max(r[-1] for r in rows))
        self.stop_everywhere = self.stop_everywhere or any(r[-2] > 0 for r in rows)

    def _stop_non_finite(self, names: list[str], rows: list[list[float]], image_ids: list[Any]) -> None:
        own = {n: v for n, v in zip(names, rows[dist.rank()]) if not abs(v) < float("inf")}
        found = [r for r in dist.broadcast(dist.gather_objects((dist.rank(), own, image_ids))) if r[1]]
        told = []
        for rank, losses, ids in found:
            where = f" on GPU {rank}" if len(rows) > 1 else ""
            values = ", ".join(f"{n} = {v:g}" for n, v in losses.items())
            told.append(f"{values}{where}, images {', '.join(str(i) for i in ids)}")
        raise self._not_finite("; ".join(told))

    def _not_finite(self, what: str) -> TrainingError:
        iteration = self.first_iteration + self.global_step
        kept = f"the last good checkpoint is {self.last_good}" if self.last_good else "no checkpoint was written yet"
        return TrainingError(
            f"loss is not finite at iteration {iteration}: {what}; the weights were not updated, {kept}: "
            "look at the objects of these images, lower SOLVER.BASE_LR or set SOLVER.CLIP_GRADIENTS.ENABLED True"
        )

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        clip_gradients(self.cfg, [p for g in optimizer.param_groups for p in g["params"]])

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.lr = float(optimizer.param_groups[self._largest_group]["lr"])

    def finish_iteration(self) -> None:
        """Average what the micro-batches of this iteration left."""
        count = len(self._micro)
        self.losses = {name: sum(m[name] for m in self._micro) / count for name in self._micro[0]}
        self.data_time = sum(self._waits)
        self._micro, self._waits = [], []
