"""What a run knows of the model that learns: its losses, checked and averaged, and what a checkpoint takes along."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from gn_det.engine import dist
from gn_det.engine.advice import describe_batch
from gn_det.engine.nonfinite import Pass, diagnose
from gn_det.errors import TrainingError


class Learner:
    """Model, optimizer and schedule of this process, and the numbers of the iteration at hand.

    An engine's loop calls, for every micro-batch, :meth:`total_loss` and after the backward pass :meth:`check`; before
    the optimizer steps :meth:`note_lr`; and :meth:`finish_iteration` after it.

    Attributes:
        model: the bare module, not wrapped for several processes.
        scaler: gradient scaler of fp16, or None.
        iteration: 0-based number of the iteration at hand.
        losses: mean over ranks and micro-batches of each loss of the iteration that just ended.
        data_time: seconds waited for data in it, the slowest rank.
        lr: learning rate used in it, of the group with most tensors (as Detectron2 reports it).
        stop_requested: set by a signal; every rank sees it in ``stop_everywhere`` at the end of the iteration.
        time_is_up: set where the hours of the run are used up; every rank sees it in ``time_is_up_everywhere`` at the
            end of the next iteration.
        last_good: path of the newest checkpoint, for messages.
        keep_in: folder for the batch of a non-finite loss; None keeps none.
        about: further content of that file.
        waited: seconds waited for the micro-batch at hand; added by whoever waits.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer, scheduler: LRScheduler, *, iteration: int = 0) -> None:
        self.model, self.optimizer, self.scheduler = model, optimizer, scheduler
        self.scaler: Any = None
        self.iteration = iteration
        self.losses: dict[str, float] = {}
        self.data_time = 0.0
        self.lr = 0.0
        self.stop_requested = False
        self.stop_everywhere = False
        self.time_is_up = False
        self.time_is_up_everywhere = False
        self.last_good = ""
        self.waited = 0.0
        self.keep_in: Path | None = None
        self.about: dict[str, Any] = {}
        self._pass: Pass | None = None
        self._current: tuple[dict[str, Tensor], list[str]] = ({}, [])
        self._micro: list[dict[str, float]] = []
        self._waits: list[float] = []
        sizes = [len(group["params"]) for group in optimizer.param_groups]
        self._largest_group = sizes.index(max(sizes))

    def total_loss(self, forward: Callable[[Any], Mapping[str, Tensor]], batch: Sequence[Any]) -> Tensor:
        """Sum of the losses that ``forward(batch)`` gives.

        Raises:
            TrainingError: training has diverged so far that no proposals can be made.
        """
        self._pass = Pass.about_to_run(self.model, batch)
        try:
            losses = forward(batch)
        except FloatingPointError as error:  # proposals cannot be made of such predictions: there is no loss to look at
            names = ", ".join(_image_name(s) for s in batch)
            what = f"loss_rpn_cls, loss_rpn_loc, images {names} ({error})"
            raise self._not_finite(what, [self._diagnose()]) from None
        self._current = ({k: v.detach() for k, v in losses.items()}, [_image_name(s) for s in batch])
        return torch.stack([v.float() for v in losses.values()]).sum()

    def check(self) -> None:
        """Look at the losses while the device still works on the backward pass; all ranks together.

        Raises:
            TrainingError: a loss of some rank is not finite; names the images. The optimizer has not stepped.
        """
        losses, images = self._current
        names = list(losses)
        flags = [float(self.time_is_up), float(self.stop_requested), self.waited]
        self.waited = 0.0
        row = torch.stack([v.float() for v in losses.values()])
        rows = dist.gather_rows(torch.cat([row, torch.tensor(flags, device=row.device)]))
        bad = [not all(abs(v) < float("inf") for v in r[: len(names)]) for r in rows]
        if any(bad):
            self._stop_non_finite(names, rows, images)
        self._micro.append({name: sum(r[i] for r in rows) / len(rows) for i, name in enumerate(names)})
        self._waits.append(max(r[-1] for r in rows))
        self.stop_everywhere = self.stop_everywhere or any(r[-2] > 0 for r in rows)
        self.time_is_up_everywhere = self.time_is_up_everywhere or any(r[-3] > 0 for r in rows)

    def describe_batch(self) -> str:
        """The micro-batch at hand, for messages."""
        return describe_batch(self._pass.batch if self._pass is not None else ())

    def note_lr(self) -> None:
        """Remember the learning rate that the optimizer is about to use."""
        self.lr = float(self.optimizer.param_groups[self._largest_group]["lr"])

    def finish_iteration(self) -> None:
        """Average what the micro-batches of this iteration left, and turn to the next one."""
        count = len(self._micro)
        self.losses = {name: sum(m[name] for m in self._micro) / count for name in self._micro[0]}
        self.data_time = sum(self._waits)
        self._micro, self._waits = [], []
        self.iteration += 1

    def _stop_non_finite(self, names: list[str], rows: list[list[float]], images: list[str]) -> None:
        own = {n: v for n, v in zip(names, rows[dist.rank()]) if not abs(v) < float("inf")}
        row = (dist.rank(), own, images, self._diagnose() if own else "")
        found = [r for r in dist.broadcast(dist.gather_objects(row)) if r[1]]
        told = []
        for rank, losses, batch, _ in found:
            where = f" on GPU {rank}" if len(rows) > 1 else ""
            values = ", ".join(f"{n} = {v:g}" for n, v in losses.items())
            told.append(f"{values}{where}, images {', '.join(batch)}")
        raise self._not_finite("; ".join(told), [r[-1] for r in found])

    def _diagnose(self) -> str:
        """Which layer failed, and where the batch is kept; "" where there is no folder for it."""
        if self.keep_in is None or self._pass is None:
            return ""
        path = self.keep_in / f"nonfinite_{self.iteration:07d}_rank{dist.rank()}.pth"
        return diagnose(self.model, self._pass, path, {**self.about, "iteration": self.iteration})

    def _not_finite(self, what: str, origins: Sequence[str]) -> TrainingError:
        kept = f"the last good checkpoint is {self.last_good}" if self.last_good else "no checkpoint was written yet"
        return TrainingError(
            f"loss is not finite at iteration {self.iteration}: {what}; the weights were not updated, {kept}: "
            "look at the objects of these images, lower SOLVER.BASE_LR or set SOLVER.CLIP_GRADIENTS.ENABLED True"
            + "".join(f"; {origin}" for origin in origins if origin)
        )


def _image_name(sample: Mapping[str, Any]) -> str:
    """Id and file name, as far as the sample has them."""
    name, file = str(sample.get("image_id")), sample.get("file_name")
    return f"{name} ({file})" if file and str(file) != name else name
