"""Training and validation of a classifier with Lightning Fabric, resumable after every epoch."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gn_det.classification.image_sources import Batch, Input, Source, epoch_batches
from gn_det.classification.settings import Settings, lr_at
from gn_det.engine import dist
from gn_det.engine.lightning_parts import backend, process_layout, quiet_lightning
from gn_det.engine.scalars import EventLog, Progress
from gn_det.errors import TrainingError

logger = logging.getLogger(__name__)

#: Images of a validation batch, of one process.
VAL_BATCH = 64
# On a GPU time is taken over this many iterations, so that waiting for it costs nothing.
_GPU_WINDOW = 20


@dataclass
class Progressed:
    """What a run has done; all of it survives an interruption.

    Attributes:
        epochs: finished.
        curve: one row per epoch: epoch (1-based), train_loss, train_error, val_error (percent), lr (of its end),
            seconds_per_iteration, inference_seconds_per_image.
        best: lowest validation error, its epoch.
        peak_memory_mb: of this machine so far.
    """

    epochs: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, float] = field(default_factory=dict)
    peak_memory_mb: float = 0.0


@dataclass
class Plan:
    """The schedule in iterations: ``total`` of them, ``per_epoch`` in an epoch; the last epoch may be cut short."""

    lr: float
    per_epoch: int
    total: int

    @property
    def epochs(self) -> int:
        return math.ceil(self.total / self.per_epoch)


def make_fabric(settings: Settings, device: str) -> Any:
    """Lightning's hands: device, autocast, gradient exchange."""
    with quiet_lightning():
        from lightning.fabric import Fabric
        from lightning.fabric.plugins.environments import TorchElasticEnvironment
        from lightning.fabric.strategies import DDPStrategy

        accelerator, devices, nodes = process_layout(device)
        more: dict[str, Any] = {}
        if dist.world_size() > 1:
            more["strategy"] = DDPStrategy(
                cluster_environment=TorchElasticEnvironment(),
                process_group_backend=backend(accelerator),
                broadcast_buffers=False,
            )
        precision: Any = {"off": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}[settings.amp]
        fabric = Fabric(accelerator=accelerator, devices=devices, num_nodes=nodes, precision=precision, **more)
        fabric.launch()
    return fabric


class Trainer:
    """One process of a run.

    Args:
        settings, source: what to do, on what.
        model: bare, on its device.
        optimizer: over its parameters.
        fabric: of :func:`make_fabric`.
        plan: schedule.
    """

    def __init__(
        self,
        settings: Settings,
        source: Source,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        fabric: Any,
        plan: Plan,
    ) -> None:
        self.settings, self.source, self.model, self.plan, self.fabric = settings, source, model, plan, fabric
        self.bare_optimizer = optimizer
        with quiet_lightning():
            self.wrapped, self.optimizer = fabric.setup(model, optimizer)
        self.normalize = Normalize(source.input, fabric.device)
        self.log = EventLog()
        self._sync_every = _GPU_WINDOW if fabric.device.type == "cuda" else 1

    def batches(self, epoch: int) -> Iterator[Batch]:
        """Training batches of the 0-based ``epoch``, of this process."""
        numbers = epoch_batches(self.settings, epoch, self.source.train_images, dist.rank(), dist.world_size())
        numbers = numbers[: self.plan.total - epoch * self.plan.per_epoch]
        return self.source.train_batches(epoch, numbers)

    def train_epoch(self, epoch: int, progress: Progress) -> dict[str, float]:
        """Train on one epoch; loss, error (percent, on augmented images) and time are means over processes.

        Raises:
            TrainingError: the loss is not finite.
        """
        self.wrapped.train()
        device = self.fabric.device
        sums = torch.zeros(3, device=device)  # loss x images, mistakes, images
        times: list[float] = []
        iteration = epoch * self.plan.per_epoch
        started, since = time.perf_counter(), 0
        for pixels, labels in self.batches(epoch):
            rate = lr_at(self.settings, self.plan.lr, iteration, self.plan.total)
            for group in self.bare_optimizer.param_groups:
                group["lr"] = rate
            labels = labels.to(device, non_blocking=True)
            scores = self.wrapped(self.normalize(pixels))
            loss = F.cross_entropy(scores.float(), labels)
            self.optimizer.zero_grad(set_to_none=True)
            self.fabric.backward(loss)
            self.optimizer.step()
            with torch.no_grad():
                mistakes = (scores.argmax(dim=1) != labels).sum()
                sums += torch.stack([loss.detach() * len(labels), mistakes, torch.full_like(loss, len(labels))])
            since += 1
            if since == self._sync_every:
                value = float(loss.detach())  # waits for the GPU
                self._check(value, epoch)
                times.append((time.perf_counter() - started) / since)
                self.log.put("loss", value, iteration)
                self.log.put("time", times[-1], iteration)
                self.log.put(
                    "eta_seconds", self.log.histories["time"].median() * (self.plan.total - iteration - 1), iteration
                )
                self.log.put("lr", rate, iteration, smooth=False)
                started, since = time.perf_counter(), 0
            progress.update(self.log, iteration)
            iteration += 1
        if since:
            value = float(loss.detach())
            times.append((time.perf_counter() - started) / since)
        rows = dist.gather_rows(torch.cat([sums, sums.new_tensor([statistics.median(times)])]))
        loss_sum, wrong, images = (sum(row[k] for row in rows) for k in range(3))
        self._check(loss_sum, epoch)
        return {
            "epoch": epoch + 1,
            "train_loss": loss_sum / images,
            "train_error": 100 * wrong / images,
            "lr": rate,
            "seconds_per_iteration": max(row[3] for row in rows),
        }

    def _check(self, value: float, epoch: int) -> None:
        if not math.isfinite(value):
            raise TrainingError(
                f"the loss is {value} in epoch {epoch + 1}: training has diverged; lower lr (now {self.plan.lr:g}) or "
                "turn amp off, and start again with --overwrite"
            )

    def validate(self) -> dict[str, float]:
        """Error (percent) on all validation images, and seconds for one of them."""
        self._share_buffers()
        self.model.eval()
        numbers = range(dist.rank(), self.source.val_images, dist.world_size())
        batches = self.source.val_batches(numbers, VAL_BATCH)
        row = torch.zeros(2, device=self.fabric.device)
        times = []
        with torch.inference_mode(), self.fabric.autocast():
            for pixels, labels in batches:
                pixels, labels = pixels.to(self.fabric.device), labels.to(self.fabric.device)
                self._wait()
                started = time.perf_counter()
                scores = self.model(self.normalize(pixels))
                self._wait()
                times.append((time.perf_counter() - started) / len(labels))
                row += torch.stack(
                    [(scores.argmax(dim=1) != labels).sum(), torch.tensor(len(labels), device=row.device)]
                )
        rows = dist.gather_rows(row.clone())
        error = 100 * sum(r[0] for r in rows) / sum(r[1] for r in rows)
        return {"val_error": error, "inference_seconds_per_image": statistics.median(times or [math.nan])}

    def _wait(self) -> None:
        if self.fabric.device.type == "cuda":
            torch.cuda.synchronize()

    def _share_buffers(self) -> None:
        """BN's running statistics are those of rank 0, whose weights are written: all ranks validate that model."""
        if dist.world_size() > 1:
            for buffer in self.model.buffers():
                torch.distributed.broadcast(buffer, src=0)

    @property
    def scaler(self) -> Any:
        """fp16's gradient scaler, or None."""
        return getattr(self.fabric.strategy.precision, "scaler", None)


class Normalize:
    """Pixels on the 0-255 scale to the network's input, on its device."""

    def __init__(self, given: Input, device: torch.device) -> None:
        self._device = device
        self._mean = torch.tensor(given.mean, device=device).view(1, -1, 1, 1)
        self._std = torch.tensor(given.std, device=device).view(1, -1, 1, 1)

    def __call__(self, pixels: Tensor) -> Tensor:
        return (pixels.to(self._device, non_blocking=True).float() - self._mean) / self._std


def top1_error(curve: Sequence[dict[str, float]]) -> float:
    """The paper's number: median validation error of the last 5 epochs, or of all where there are fewer."""
    return statistics.median(row["val_error"] for row in curve[-5:])
