"""The training loop: micro-batches in, optimizer steps out, hooks in between."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gn_det.engine import dist
from gn_det.engine.nonfinite import Pass, not_finite, stop_non_finite
from gn_det.engine.state import TrainState, restore_rng

logger = logging.getLogger(__name__)


class Hook:
    """Base class of what happens around the steps; override the methods you need.

    Methods are called in the order of ``loop.hooks``, on every rank. A hook reads ``loop.state`` (model, optimizer,
    iteration, results ...), ``loop.losses`` and ``loop.lr`` of the step that just ended, adds numbers to be logged to
    ``loop.scalars``, and ends the training with ``loop.stop()``.
    """

    def before_train(self, loop: Loop) -> None:
        """Before the first batch is read; a resumed state has been restored."""

    def before_step(self, loop: Loop) -> None:
        """Before an iteration; ``loop.state.iteration`` is still that of the previous one."""

    def after_step(self, loop: Loop) -> None:
        """After the optimizer stepped; ``loop.state.iteration`` is the iteration that just ended."""

    def after_eval(self, loop: Loop) -> None:
        """After an evaluation, whose flat metrics are ``loop.state.results``."""

    def end_step(self, loop: Loop) -> None:
        """After ``after_step`` of all hooks, and once before the first iteration of a resumed run."""

    def after_train(self, loop: Loop) -> None:
        """The training ended, also by an error: release what was opened."""


class Loop:
    """One training run in this process.

    Args:
        state: what trains.
        forward: maps a micro-batch to its losses; usually ``state.model``, wrapped by :func:`parallel`.
        hooks: see :class:`Hook`.
        total: iterations of the run, those before ``state.iteration`` included.
        accumulate: micro-batches of an iteration.
        images: images of an iteration, over all micro-batches and processes.
        autocast: dtype of mixed precision, None for float32.
        clip: changes the gradients of the parameters that the optimizer has.
        folder: where the batch of a non-finite loss is saved; None saves none.

    Attributes:
        losses: mean over ranks and micro-batches of each loss of the iteration that just ended.
        scalars: further numbers of the iteration, to be logged.
        lr: learning rate used in it, of the group with most tensors (as Detectron2 reports it).
        data_time: seconds waited for data in it, on the slowest rank.
        flags: numbers that hooks set on this rank, such as a signal received.
        agreed: maximum over ranks of each flag, as of the last look at the losses; equal on all ranks.
        stopping: a hook ended the training; this iteration is the last one.
        about: further content of the file of a non-finite loss.
        autocast_cache: cast a weight once per forward pass, as Detectron2's trainer does. False: each use of a shared
            weight casts it, and gets its gradient in float32.
    """

    def __init__(
        self,
        state: TrainState,
        forward: Callable[[Any], Mapping[str, Tensor]],
        hooks: Iterable[Hook] = (),
        *,
        total: int,
        accumulate: int = 1,
        images: int = 0,
        autocast: torch.dtype | None = None,
        clip: Callable[[list[nn.Parameter]], None] | None = None,
        folder: Path | None = None,
    ) -> None:
        self.state, self.forward, self.hooks = state, forward, list(hooks)
        self.total, self.accumulate, self.images = total, accumulate, images
        self.autocast, self.clip, self.folder = autocast, clip, folder
        self.about: dict[str, Any] = {}
        self.autocast_cache = False
        self.losses: dict[str, float] = {}
        self.scalars: dict[str, float] = {}
        self.flags: dict[str, float] = {}
        self.agreed: dict[str, float] = {}
        self.lr = self.data_time = 0.0
        self.stopping = self._finished = False
        self.current: Pass | None = None
        self.batches: Iterator[Any] = iter(())
        groups = state.optimizer.param_groups
        self._largest_group = max(range(len(groups)), key=lambda i: len(groups[i]["params"]))
        self._ddp = forward if isinstance(forward, DistributedDataParallel) else None
        self._device = next(state.model.parameters()).device
        self._micro: list[dict[str, float]] = []

    # ------------------------------------------------------------ the run

    def run(self, make_batches: Callable[[], Iterable[Any]]) -> None:
        """Train up to ``total`` iterations, or until a hook ends it.

        Args:
            make_batches: called where there is something to train; gives at least the micro-batches that are needed.
        """
        try:
            self.begin()
            if not (self.last or self.stopping):
                self.batches = iter(make_batches())
            for _ in range(self.state.iteration + 1, self.total):
                if self.stopping:
                    break
                self.call("before_step")
                self.step()
                self.call("after_step")
                self.call("end_step")
        finally:
            self.end()

    def begin(self) -> None:
        """Do what comes before the first iteration."""
        self.call("before_train")
        if self.state.iteration >= 0:
            self.call("end_step")  # what a killed run did not get to
        if self.last:
            logger.info(
                "Nothing left to train: iteration %d is done and SOLVER.MAX_ITER is %d; raise SOLVER.MAX_ITER to "
                "continue.",
                *(self.state.iteration, self.total),
            )

    def end(self) -> None:
        """Release the batches, whose workers end then, and what the hooks opened; however many of them fail."""
        self.batches = iter(())
        with ExitStack() as stack:
            for hook in reversed(self.hooks):
                stack.callback(hook.after_train, self)

    def call(self, event: str) -> None:
        """Call the method ``event`` of all hooks."""
        for hook in self.hooks:
            getattr(hook, event)(self)

    def stop(self, *, finished: bool = True) -> None:
        """End the training after this iteration; to be called on all ranks alike.

        Args:
            finished: the result is final (``model_final.pth``); False: ``--resume`` is expected to continue.
        """
        self.stopping = True
        self._finished = self._finished or finished

    @property
    def last(self) -> bool:
        """Whether all iterations are done."""
        return self.state.iteration + 1 >= self.total

    @property
    def finished(self) -> bool:
        """Whether the training came to its end: by ``total``, or by a hook for good."""
        return self.last or self._finished

    # ------------------------------------------------------------ one iteration

    def step(self) -> None:
        """Forward, backward and optimizer step of one iteration.

        Raises:
            TrainingError: a loss is not finite; the optimizer has not stepped.
        """
        state, scaler = self.state, self.state.scaler
        self._micro, self.data_time = [], 0.0
        self.scalars = {}
        state.optimizer.zero_grad()
        for part in range(1, self.accumulate + 1):
            batch, waited = self._next_batch()
            with self._ddp.no_sync() if self._ddp is not None and part < self.accumulate else nullcontext():
                with self._autocast():
                    losses = self._losses(batch)
                    total = torch.stack([v.float() for v in losses.values()]).sum()
                total = total / self.accumulate if self.accumulate > 1 else total
                torch.autograd.backward(total if scaler is None else scaler.scale(total))
            self._look(losses, waited)
        self.losses = {n: sum(m[n] for m in self._micro) / len(self._micro) for n in self._micro[0]}
        self.lr = float(state.optimizer.param_groups[self._largest_group]["lr"])
        if scaler is not None:
            scaler.unscale_(state.optimizer)
        if self.clip is not None:
            self.clip([p for g in state.optimizer.param_groups for p in g["params"]])
        if scaler is None:
            state.optimizer.step()
        else:
            scaler.step(state.optimizer)
            scaler.update()
        state.iteration += 1
        state.images_seen += self.images

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(self._device.type, self.autocast, cache_enabled=self.autocast_cache)

    def _next_batch(self) -> tuple[Any, float]:
        start = time.perf_counter()
        batch = next(self.batches)
        waited = time.perf_counter() - start
        if self.state.rng is not None:  # the last moment: building loaders draws from the random streams, too
            restore_rng(self.state.rng)
            self.state.rng = None
        return batch, waited

    def _losses(self, batch: Sequence[Any]) -> Mapping[str, Tensor]:
        rng = {
            "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state() if self._device.type == "cuda" else None,
        }
        self.current = Pass(batch, rng, self._device.type, self.autocast)
        try:
            return self.forward(batch)
        except FloatingPointError as error:  # the model cannot go on with such predictions: there is no loss to look at
            raise not_finite(self.state, self.current, error, self.folder, self.about) from None

    def _look(self, losses: Mapping[str, Tensor], waited: float) -> None:
        """Look at the losses while the device still works on the backward pass; all ranks together."""
        row = torch.stack([v.detach().float() for v in losses.values()])
        extra = [*self.flags.values(), waited]
        if self._ddp is not None:
            rows = dist.gather_rows(torch.cat([row, row.new_tensor(extra)]))
        else:
            rows = [[*row.tolist(), *extra]]
        count = len(losses)
        if any(not all(abs(v) < float("inf") for v in r[:count]) for r in rows):
            self.stop_non_finite(list(losses), rows)
        self._micro.append({name: sum(r[i] for r in rows) / len(rows) for i, name in enumerate(losses)})
        self.data_time += max(r[-1] for r in rows)
        self.agreed = {name: max(r[count + i] for r in rows) for i, name in enumerate(self.flags)}

    def stop_non_finite(self, names: Sequence[str], rows: Sequence[Sequence[float]]) -> NoReturn:
        """Raise the error of a loss that is not finite; ``rows`` begin with every rank's losses. All ranks together."""
        assert self.current is not None
        stop_non_finite(self.state, self.current, names, rows, self.folder, self.about)


def parallel(model: nn.Module) -> nn.Module:
    """``model``, wrapped where there are several processes; each keeps its own buffers."""
    return model if dist.world_size() == 1 else DistributedDataParallel(model, broadcast_buffers=False)


def make_scaler(dtype: torch.dtype | None, device: str) -> torch.amp.GradScaler | None:
    """The gradient scaler that fp16 needs; None for other types."""
    if dtype is not torch.float16:
        return None
    # A step with infinite gradients is skipped, the schedule goes on: torch warns if that is the first one.
    warnings.filterwarnings("ignore", message=r".*lr_scheduler\.step\(\)")
    return torch.amp.GradScaler(device)
