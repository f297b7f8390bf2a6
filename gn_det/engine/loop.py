"""The training loop: micro-batches, optimizer steps and hooks."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gn_det.engine import dist
from gn_det.engine.nonfinite import Pass, diagnose
from gn_det.engine.state import TrainState, restore_rng
from gn_det.errors import TrainingError

logger = logging.getLogger(__name__)


class Hook:
    """Base class of hooks; override the methods you need.

    Methods are called in the order of ``loop.hooks``, on every rank. A hook can read ``loop.state`` (model, optimizer,
    iteration, results ...) and ``loop.losses`` and ``loop.lr`` of the last step, add numbers to log to
    ``loop.scalars``, and end training with ``loop.stop()``.
    """

    def before_train(self, loop: Loop) -> None:
        """Called before the first batch is read, after a resumed state is restored."""

    def before_step(self, loop: Loop) -> None:
        """Called before an iteration; ``loop.state.iteration`` is still the previous one."""

    def after_step(self, loop: Loop) -> None:
        """Called after the optimizer step; ``loop.state.iteration`` is the iteration that just ended."""

    def after_eval(self, loop: Loop) -> None:
        """Called after an evaluation; its flat metrics are in ``loop.state.results``."""

    def end_step(self, loop: Loop) -> None:
        """Called after ``after_step`` of all hooks, and once before the first iteration of a resumed run."""

    def after_train(self, loop: Loop) -> None:
        """Called when training ends, also by an error; release resources here."""


@dataclass(eq=False, repr=False)
class Loop:
    """One training run in this process; hooks may read all of its fields."""

    state: TrainState
    forward: Callable[[Any], Mapping[str, Tensor]]  # micro-batch -> losses; usually the model, wrapped by parallel()
    hooks: Sequence[Hook] = ()
    _: KW_ONLY
    total: int  # iterations of the run, including those up to state.iteration
    accumulate: int = 1  # micro-batches per iteration
    images: int = 0  # per iteration, over all micro-batches and processes
    autocast: torch.dtype | None = None  # of mixed precision; None: float32
    #: whether to cast a weight once per forward pass, like Detectron2's trainer. If False, it is cast at each use, and
    #: the gradients are summed in float32.
    autocast_cache: bool = False
    clip: Callable[[list[nn.Parameter]], None] | None = None  # clips the gradients of the optimizer's parameters
    folder: Path | None = None  # where to save the batch of a non-finite loss; None saves none
    about: Mapping[str, Any] = field(default_factory=dict)  # further content of that file
    #: returns the RGB image (H, W, 3) uint8 that the model drew in this iteration by VIS_PERIOD, and forgets it; None
    #: if the model does not draw.
    take_picture: Callable[[], np.ndarray | None] | None = None

    # ------ set by the loop and its hooks
    losses: dict[str, float] = field(default_factory=dict)  # of the last iteration: means over ranks and micro-batches
    scalars: dict[str, float] = field(default_factory=dict)  # further numbers of the iteration, to be logged
    lr: float = 0.0  # of the iteration, for the group with most tensors (as in Detectron2)
    data_time: float = 0.0  # seconds that the iteration waited for data, on the slowest rank
    flags: dict[str, float] = field(default_factory=dict)  # numbers set on this rank, such as a received signal
    agreed: dict[str, float] = field(default_factory=dict)  # maximum of each flag over ranks, updated with the losses
    stopping: bool = False  # whether a hook ended the training, so that this iteration is the last
    current: Pass | None = None  # the newest forward pass
    batches: Iterator[Any] = field(default_factory=lambda: iter(()))
    _finished: bool = False

    # ------------------------------------------------------------ the run

    def run(self, make_batches: Callable[[], Iterable[Any]]) -> None:
        """Train for up to ``total`` iterations, or until a hook ends it; if none is left, read no batch."""
        try:
            self.begin()
            if not (self.last or self.stopping):
                self.batches = iter(make_batches())
            while not (self.last or self.stopping):
                self.call("before_step")
                self.step()
                self.call("after_step")
                self.call("end_step")
        finally:
            self.end()

    def begin(self) -> None:
        """Call the hooks before the first iteration."""
        self.call("before_train")
        if self.state.iteration >= 0:
            self.call("end_step")  # a killed run may not have reached it
        if self.last:
            logger.info("Nothing left to train: raise SOLVER.MAX_ITER (now %d) to continue.", self.total)

    def end(self) -> None:
        """Release the batches, which ends their workers, and call ``after_train`` of all hooks even if some fail."""
        self.batches = iter(())
        with ExitStack() as stack:
            for hook in reversed(self.hooks):
                stack.callback(hook.after_train, self)

    def call(self, event: str) -> None:
        """Call the method ``event`` of all hooks."""
        for hook in self.hooks:
            getattr(hook, event)(self)

    def stop(self, *, finished: bool = True) -> None:
        """End training after this iteration; must be called on all ranks.

        The result is final (``model_final.pth``) if ``finished``; otherwise ``--resume`` should continue.
        """
        self.stopping = True
        self._finished = self._finished or finished

    def due(self, period: int) -> bool:
        """Whether this iteration ends with what is done every ``period`` iterations (0: never) and after the last."""
        return self.last or (period > 0 and (self.state.iteration + 1) % period == 0)

    @property
    def last(self) -> bool:
        """Whether all iterations are done."""
        return self.state.iteration + 1 >= self.total

    @property
    def finished(self) -> bool:
        """Whether the result is final: all iterations are done, or a hook ended the training as finished."""
        return self.last or self._finished

    def mixed_precision(self) -> torch.autocast:
        """The autocast in which forward passes run."""
        on = self.autocast is not None
        return torch.autocast(self._device, self.autocast, on, cache_enabled=self.autocast_cache)

    @property
    def _device(self) -> str:
        return next(self.state.model.parameters()).device.type

    # ------------------------------------------------------------ one iteration

    def step(self) -> None:
        """Run forward, backward and optimizer step; raise TrainingError before that step if a loss is not finite."""
        state, micro = self.state, []
        ddp = self.forward if isinstance(self.forward, DistributedDataParallel) else None
        self.scalars, self.data_time = {}, 0.0
        state.optimizer.zero_grad()
        for part in range(1, self.accumulate + 1):
            start = time.perf_counter()
            batch = next(self.batches)
            waited = time.perf_counter() - start
            if state.rng is not None:  # as late as possible, because building loaders uses the random streams, too
                restore_rng(state.rng)
                state.rng = None
            with ddp.no_sync() if ddp is not None and part < self.accumulate else nullcontext():
                with self.mixed_precision():
                    losses = self._forward(batch)
                    total = torch.stack([v.float() for v in losses.values()]).sum() / self.accumulate
                torch.autograd.backward(state.scaler.scale(total))
            micro.append(self._look(losses, waited))
        self.losses = {name: sum(m[name] for m in micro) / len(micro) for name in micro[0]}
        groups = state.optimizer.param_groups
        self.lr = float(max(groups, key=lambda group: len(group["params"]))["lr"])
        state.scaler.unscale_(state.optimizer)
        if self.clip is not None:
            self.clip([p for group in groups for p in group["params"]])
        state.scaler.step(state.optimizer)
        state.scaler.update()
        if state.average is not None:
            state.average.update(state.model)
        state.iteration += 1
        state.images_seen += self.images

    def _forward(self, batch: Sequence[Any]) -> Mapping[str, Tensor]:
        cuda = torch.cuda.get_rng_state() if self._device == "cuda" else None
        self.current = Pass(batch, {"torch": torch.get_rng_state(), "cuda": cuda}, self._device, self.autocast)
        try:
            return self.forward(batch)
        except FloatingPointError as error:  # no proposals can be computed from such predictions, so there is no loss
            what = f"loss_rpn_cls, loss_rpn_loc, images {self.current.images()} ({error})"
            raise self._not_finite(what, [self._diagnose()]) from None

    def _look(self, losses: Mapping[str, Tensor], waited: float) -> dict[str, float]:
        """Return the mean losses of all ranks, gathered while the device still computes the backward pass."""
        row = torch.stack([v.detach().float() for v in losses.values()])
        rows = dist.gather_rows(torch.cat([row, row.new_tensor([*self.flags.values(), waited])]))
        count = len(losses)
        if not all(math.isfinite(v) for r in rows for v in r[:count]):
            self.stop_non_finite(list(losses), rows)
        self.data_time += max(r[-1] for r in rows)
        self.agreed = {name: max(r[count + i] for r in rows) for i, name in enumerate(self.flags)}
        return {name: sum(r[i] for r in rows) / len(rows) for i, name in enumerate(losses)}

    def stop_non_finite(self, names: Sequence[str], rows: Sequence[Sequence[float]]) -> NoReturn:
        """Raise TrainingError on all ranks; ``rows`` begin with each rank's losses, ``names`` are theirs."""
        assert self.current is not None
        own = {n: v for n, v in zip(names, rows[dist.rank()]) if not math.isfinite(v)}
        mine = (own, self.current.images(), self._diagnose() if own else "")
        parts, origins = [], []
        for rank, (losses, images, origin) in enumerate(dist.broadcast(dist.gather_objects(mine))):
            if losses:
                where = f" on GPU {rank}" if len(rows) > 1 else ""
                parts.append(f"{', '.join(f'{n} = {v:g}' for n, v in losses.items())}{where}, images {images}")
                origins.append(origin)
        raise self._not_finite("; ".join(parts), origins)

    def _diagnose(self) -> str:
        if self.folder is None or self.current is None:
            return ""
        about = {**self.about, "iteration": self.state.iteration + 1}
        return diagnose(self.current, self.state.model, self.folder, about)

    def _not_finite(self, what: str, origins: Sequence[str]) -> TrainingError:
        state = self.state
        kept = f"the last good checkpoint is {state.saved}" if state.saved else "no checkpoint was written yet"
        return TrainingError(
            f"loss is not finite at iteration {state.iteration + 1}: {what}; the weights were not updated, {kept}: "
            "check the objects in these images, lower SOLVER.BASE_LR or set SOLVER.CLIP_GRADIENTS.ENABLED True"
            + "".join(f"; {origin}" for origin in origins if origin)
        )


def parallel(model: nn.Module) -> nn.Module:
    """Wrap ``model`` if there are several processes; each keeps its own buffers."""
    return model if dist.world_size() == 1 else DistributedDataParallel(model, broadcast_buffers=False)


def make_scaler(dtype: torch.dtype | None, device: str) -> torch.amp.GradScaler:
    """Return a gradient scaler, which does nothing except for fp16."""
    if dtype is torch.float16:
        # If the first step is skipped because of infinite gradients, torch warns that the schedule advances.
        warnings.filterwarnings("ignore", message=r".*lr_scheduler\.step\(\)")
    return torch.amp.GradScaler(device, enabled=dtype is torch.float16)
