"""Training of a classifier by the engine's loop, resumable after every epoch."""

from __future__ import annotations

import json
import math
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NoReturn

import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from gn_det.about import __version__
from gn_det.checkpoint.io import save_checkpoint
from gn_det.classification.image_sources import Batch, Input, Source
from gn_det.classification.network import Classifier
from gn_det.classification.other_norms import plain_weights
from gn_det.classification.settings import DEPTHS, Settings
from gn_det.engine import dist
from gn_det.engine.loop import Hook, Loop
from gn_det.engine.output import BEST
from gn_det.engine.scalars import peak_memory_mb
from gn_det.errors import DataError, TrainingError
from gn_det.files import atomic_write

LAST = "last.ckpt"
METRICS = "metrics.jsonl"


@dataclass
class Progressed:
    """What a run has done; all of it survives an interruption."""

    epochs: int = 0  # finished
    #: one row per epoch: epoch (1-based), train_loss, train_error, val_error (percent), lr (of its end),
    #: seconds_per_iteration, inference_seconds_per_image
    curve: list[dict[str, float]] = field(default_factory=list)
    best: dict[str, float] = field(default_factory=dict)  # lowest validation error, its epoch
    peak_memory_mb: float = 0.0  # of this machine so far
    recorded: list[dict[str, float]] = field(default_factory=list)  # see recording.Recorder


@dataclass(frozen=True)
class Plan:
    """The schedule in iterations: ``total`` of them, ``per_epoch`` in an epoch; the last epoch may be cut short."""

    lr: float
    per_epoch: int
    total: int

    @property
    def epochs(self) -> int:
        return math.ceil(self.total / self.per_epoch)


class Normalize(nn.Module):
    """Pixels on the 0-255 scale to the network's input, on its device."""

    def __init__(self, given: Input) -> None:
        super().__init__()
        self.mean = nn.Buffer(torch.tensor(given.mean), persistent=False)
        self.std = nn.Buffer(torch.tensor(given.std), persistent=False)

    def forward(self, pixels: Tensor) -> Tensor:
        """(N, C, ...) of any dtype to the same shape in float32."""
        pixels = pixels.to(self.mean.device, non_blocking=True).float()
        shape = (-1, *[1] * (pixels.dim() - 2))
        return (pixels - self.mean.view(shape)) / self.std.view(shape)


class ClassifierLoss(nn.Module):
    """Cross entropy of a classifier; ``mistakes`` counts the images that it got wrong."""

    def __init__(self, classifier: nn.Module, given: Input) -> None:
        super().__init__()
        self.classifier = classifier
        self.normalize = Normalize(given)
        self.mistakes = nn.Buffer(torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        pixels, labels = batch
        labels = labels.to(self.mistakes.device, non_blocking=True)
        scores = self.classifier(self.normalize(pixels))
        self.mistakes.add_((scores.detach().argmax(dim=1) != labels).sum())
        return {"loss": F.cross_entropy(scores.float(), labels)}


class ClassifierLoop(Loop):
    """The engine's loop; names the settings to change where the loss is not finite."""

    def stop_non_finite(self, names: Sequence[str], rows: Sequence[Sequence[float]]) -> NoReturn:
        value = next(v for row in rows for v in row[: len(names)] if not math.isfinite(v))
        raise TrainingError(
            f"the loss is {value} in iteration {self.state.iteration + 1}: training has diverged; lower lr (now "
            f"{self.state.optimizer.param_groups[0]['lr']:g}) or turn amp off, and start again with --overwrite"
        )


class Epochs(Hook):
    """Ends every epoch: validation, a row of the curve in ``done``, best weights, checkpoint in ``folder``."""

    def __init__(
        self, settings: Settings, source: Source, plan: Plan, loss: ClassifierLoss, done: Progressed, folder: Path
    ) -> None:
        self.settings, self.source, self.plan, self.loss = settings, source, plan, loss
        self.done, self.folder = done, folder
        self._losses: list[float] = []
        self._seconds: list[float] = []
        self._started = 0.0

    def before_step(self, loop: Loop) -> None:
        self._started = time.perf_counter()

    def after_step(self, loop: Loop) -> None:
        self._seconds.append(time.perf_counter() - self._started)
        self._losses.append(loop.losses["loss"])
        if (loop.state.iteration + 1) % self.plan.per_epoch == 0 or loop.last:
            self._end_epoch(loop)

    def _end_epoch(self, loop: Loop) -> None:
        """Losses, errors and times are those of all processes; the time is that of the slowest."""
        done, mistakes = self.done, self.loss.mistakes
        batch = self.settings.batch_size if self.settings.of_clips else 64
        rows = dist.gather_rows(
            torch.stack([mistakes.double(), mistakes.new_tensor(statistics.median(self._seconds), dtype=torch.float64)])
        )
        images = len(self._losses) * self.settings.batch_size * len(rows)
        row = {
            "epoch": done.epochs + 1,
            "train_loss": statistics.fmean(self._losses),
            "train_error": 100 * sum(row[0] for row in rows) / images,
            "lr": loop.lr,
            "seconds_per_iteration": max(row[1] for row in rows),
            **validate(self.loss, self.source, loop.autocast, batch),
        }
        mistakes.zero_()
        self._losses, self._seconds = [], []
        done.epochs += 1
        done.curve.append(row)
        done.peak_memory_mb = max(done.peak_memory_mb, peak_memory_mb())
        better = not done.best or row["val_error"] < done.best["val_error"]
        if better:
            done.best = {"epoch": row["epoch"], "val_error": row["val_error"]}
        if dist.rank() == 0:
            self._write(loop, better)
        loop.state.results = row
        loop.call("after_eval")

    def _write(self, loop: Loop, better: bool) -> None:
        state, done = loop.state, self.done
        if better:
            facts = {"epoch": done.epochs, "val_error": done.best["val_error"], "date": utc_now()}
            assert isinstance(state.model, Classifier)
            write_weights(self.folder / BEST, state.model, self.settings, self.source, facts)
        # whole: a killed run may have left a row beyond its checkpoint
        atomic_write(self.folder / METRICS, "".join(json.dumps(row) + "\n" for row in done.curve))
        save_checkpoint(
            self.folder / LAST,
            {
                "model": {k: v.cpu() for k, v in state.model.state_dict().items()},
                "optimizer": state.optimizer.state_dict(),
                "scaler": state.scaler.state_dict(),
                "done": asdict(done),
                "settings": self.settings.to_dict(),
                "processes": dist.world_size(),
            },
        )


def validate(
    loss: ClassifierLoss, source: Source, autocast: torch.dtype | None = None, batch: int = 64
) -> dict[str, float]:
    """Error (percent) on all validation images, and seconds for one of them; leaves the model in training mode.

    All processes take part. BN's running statistics become those of rank 0, whose weights are written.
    """
    model, device = loss.classifier, loss.mistakes.device
    wrong, images, times = torch.zeros_like(loss.mistakes), 0, []
    with _evaluating(loss, autocast):
        for pixels, labels in source.val_batches(range(dist.rank(), source.val_images, dist.world_size()), batch):
            pixels, labels = pixels.to(device), labels.to(device)
            _wait(device)
            started = time.perf_counter()
            scores = model(loss.normalize(pixels))
            _wait(device)
            times.append((time.perf_counter() - started) / len(labels))
            wrong += (scores.argmax(dim=1) != labels).sum()
            images += len(labels)
    model.train()
    rows = dist.gather_rows(torch.stack([wrong, torch.full_like(wrong, images)]))
    if not sum(row[1] for row in rows):
        raise DataError("no validation video can be used")
    error = 100 * sum(row[0] for row in rows) / sum(row[1] for row in rows)
    return {"val_error": error, "inference_seconds_per_image": statistics.median(times or [math.nan])}


def final_test(loss: ClassifierLoss, source: Any, autocast: torch.dtype | None = None) -> dict[str, float]:
    """Return top1_error and top5_error (percent), and test_videos, the number that could be used.

    The softmax is averaged over all clips and crops of a validation video. The model stays in evaluation mode.
    """
    with _evaluating(loss, autocast):
        videos = summed_softmax(loss, source, range(dist.rank(), source.val_images, dist.world_size())).values()
    ranks = [int((scores > scores[label]).sum()) for scores, label in videos]
    row = [sum(rank > 0 for rank in ranks), sum(rank > 4 for rank in ranks), len(ranks)]
    rows = dist.gather_rows(torch.tensor(row, device=loss.mistakes.device))
    top1, top5, usable = (sum(part) for part in zip(*rows))
    if not usable:
        raise DataError("no validation video can be used")
    return {"top1_error": 100 * top1 / usable, "top5_error": 100 * top5 / usable, "test_videos": usable}


def summed_softmax(loss: ClassifierLoss, source: Any, numbers: Sequence[int]) -> dict[int, tuple[Tensor, int]]:
    """Return the softmax, summed over all clips and crops, and the class of each validation video that can be used."""
    found: dict[int, tuple[Tensor, int]] = {}
    for number, (pixels, labels) in source.test_batches(numbers):
        if len(labels):
            softmax = loss.classifier(loss.normalize(pixels)).float().softmax(dim=1).sum(dim=0)
            before, _ = found.get(number, (torch.zeros_like(softmax), 0))
            found[number] = before + softmax, int(labels[0])
    return found


@contextmanager
def _evaluating(loss: ClassifierLoss, autocast: torch.dtype | None) -> Iterator[None]:
    """Put the classifier in evaluation mode, with rank 0's running statistics of BN, for inference in the context."""
    if dist.world_size() > 1:
        for buffer in loss.classifier.buffers():
            torch.distributed.broadcast(buffer, src=0)
    loss.classifier.eval()
    kind = loss.mistakes.device.type
    with torch.inference_mode(), torch.autocast(kind, autocast, enabled=autocast is not None):
        yield


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def write_weights(path: Path, model: Classifier, settings: Settings, source: Source, facts: dict[str, Any]) -> None:
    """Write ``model`` for MODEL.WEIGHTS of either engine, with the preprocessing and norm that a config must match.

    Trunk tensors are named ``stem.conv1.weight``, ``res2.0.conv1.weight`` ...; the linear layer is stored as
    ``stem.fc``, which detectors ignore and conversion to torchvision's layout keeps. ``facts`` are plain values of the
    run for the provenance (epoch, error, date).
    """
    state = plain_weights(model.trunk)
    state["stem.fc.weight"] = model.linear.weight.detach().cpu()
    state["stem.fc.bias"] = model.linear.bias.detach().cpu()
    backbone = settings.arch in DEPTHS or settings.of_clips
    preprocessing = {
        "format": source.input.order,
        "pixel_mean": list(source.input.mean),
        "pixel_std": list(source.input.std),
        # Basic blocks have one place for the stride: any config suits.
        "stride_in_1x1": settings.stride_in_1x1 if DEPTHS.get(settings.arch, 0) >= 50 else None,
    }
    name = settings.source if ":" in settings.data else Path(settings.data).name
    run = {
        "kind": f"{settings.arch} {settings.norm} classifier of {name}",
        "trained": True,
        "settings": {**settings.to_dict(), "data": name, "output": ""},
        "classes": list(source.class_names),
        **facts,
    }
    block = {
        "version": __version__,
        "weights": {
            "norm": {"BR": "BN", "SyncBN": "BN", "WN": "", "none": ""}.get(settings.norm, settings.norm),
            "groups": list(settings.group_rule) if settings.norm == "GN" else None,
            "ws": {"RESNETS": settings.ws or ""},
            "preprocessing": preprocessing if backbone else None,
            # Channel order and std may be folded into the stem for a config that wants others.
            "foldable": settings.arch in DEPTHS,
        },
        "provenance": [run],
    }
    author = f"gn_det {__version__}"
    # Detectron2 finds where bare names belong only when told to search.
    save_checkpoint(path, {"model": state, "__author__": author, "matching_heuristics": True, "gn_det": block})


def summarize(settings: Settings, done: Progressed, model: Classifier, weights: Path, device: str) -> dict[str, Any]:
    """Return the content of ``summary.json``, but for the final test of videos."""
    return {
        "settings": settings.to_dict(),
        "top1_error": top1_error(done.curve),
        "median_of_epochs": min(len(done.curve), 5),
        "curve": done.curve,
        "recorded": done.recorded,
        "seconds_per_iteration": statistics.median(row["seconds_per_iteration"] for row in done.curve),
        "peak_memory_mb": done.peak_memory_mb,
        "inference_seconds_per_image": statistics.median(row["inference_seconds_per_image"] for row in done.curve),
        "parameters": sum(p.numel() for p in model.parameters()),
        "weights": str(weights),
        "best": {**done.best, "weights": str(weights.with_name(BEST))},
        "date": utc_now(),
        "machine": {
            "name": dist.device_name(device),
            "device": device,
            "threads": torch.get_num_threads(),
            "processes": dist.world_size(),
        },
        "versions": {
            "gn_det": __version__,
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "python": platform.python_version(),
        },
        "finished": True,
    }


def top1_error(curve: Sequence[dict[str, float]]) -> float:
    """The paper's number: median validation error of the last 5 epochs, or of all where there are fewer."""
    return statistics.median(row["val_error"] for row in curve[-5:])


def utc_now() -> str:
    """Date and time for provenance, such as ``2026-11-28T12:00:00Z``."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
