"""A run's keeper under Detectron2's training loop."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import detectron2.solver
import torch
import torch.distributed
from detectron2.engine import HookBase, SimpleTrainer, TrainerBase, create_ddp_model
from detectron2.engine.hooks import LRScheduler
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, get_event_storage
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from gn_det.engine import dist
from gn_det.engine.keeper import Keeper
from gn_det.engine.learner import Learner
from gn_det.engine.optim import clip_gradients
from gn_det.errors import ConfigError

if TYPE_CHECKING:
    from detectron2.config import CfgNode
    from torch.optim import Optimizer

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Ended(Exception):
    """The keeper ends the training early; Detectron2's loop knows no other way out."""


class Step(SimpleTrainer):
    """One iteration: SOLVER.ACCUMULATE micro-batches, autocast, and losses checked before the optimizer steps.

    Args:
        cfg: reads SOLVER.
        model: gives losses; wrapped already where there are several processes.
        batches: micro-batches as the model takes them.
        learner: the model's optimizer and the losses' collector.
        keeper: told when the first batch is there; may come later as an attribute.
    """

    def __init__(
        self,
        cfg: CfgNode,
        model: nn.Module,
        batches: Iterable[Any],
        learner: Learner,
        keeper: Keeper | None = None,
    ) -> None:
        super().__init__(model, batches, learner.optimizer)
        self.learner = learner
        self.cfg = cfg
        self.accumulate = int(cfg.SOLVER.ACCUMULATE)
        kind = next(model.parameters()).device.type
        self.grad_scaler = make_scaler(cfg, kind)
        self._autocast: Callable[[], Any] = nullcontext
        if cfg.SOLVER.AMP.ENABLED:
            self._autocast = lambda: torch.autocast(kind, dtype=_DTYPES[cfg.SOLVER.AMP.DTYPE])
        self.keeper, self._started = keeper, False
        # Detectron2's optimizer clips by itself what Detectron2 can clip.
        self._clips = cfg.SOLVER.CLIP_GRADIENTS.ENABLED and not clipped_by_detectron2(cfg)

    def run_step(self) -> None:
        """Forward, backward and optimizer step of one iteration."""
        self.optimizer.zero_grad()
        for part in range(1, self.accumulate + 1):
            batch = self._next_batch()
            with self._gradients_kept(part < self.accumulate):
                with self._autocast():
                    total = self.learner.total_loss(self.model, batch)
                total = total / self.accumulate if self.accumulate > 1 else total
                (total if self.grad_scaler is None else self.grad_scaler.scale(total)).backward()
            self.after_backward()
            self.learner.check()
        self.learner.note_lr()
        if self.grad_scaler is not None:
            self.grad_scaler.unscale_(self.optimizer)
        if self._clips:
            clip_gradients(self.cfg, [p for g in self.optimizer.param_groups for p in g["params"]])
        if self.grad_scaler is None:
            self.optimizer.step()
        else:
            self.grad_scaler.step(self.optimizer)
            self.grad_scaler.update()

    def _next_batch(self) -> Any:
        start = time.perf_counter()
        batch = next(self._data_loader_iter)
        self.learner.waited += time.perf_counter() - start
        if self.keeper is not None and not self._started:
            self.keeper.before_first_batch()
            self._started = True
        return batch

    def _gradients_kept(self, more: bool) -> Any:
        """While more micro-batches come, gradients stay in this process."""
        return self.model.no_sync() if more and isinstance(self.model, DistributedDataParallel) else nullcontext()


class KeeperHook(HookBase):
    """Tells the keeper what the loop does; must come after the hook that steps the learning rate.

    Losses and the results of an evaluation are then in Detectron2's storage, for hooks between this one and
    :class:`ConcludeHook`.

    Args:
        alone: there is no :class:`ConcludeHook`; this one does its work, too.
    """

    def __init__(self, *, alone: bool = False) -> None:
        self.alone = alone
        self.keeper: Keeper | None = None
        self.scaler: Any = None
        self.ended = False
        #: names that the storage got up to here in this iteration
        self.known: set[str] = set()

    def before_train(self) -> None:
        assert self.keeper is not None
        self.keeper.start(self.scaler)

    def after_step(self) -> None:
        assert self.keeper is not None
        storage: EventStorage = get_event_storage()
        metrics = scalars_of(storage, storage.iter)
        metrics.pop("lr", None)  # the learner's own, read before the optimizer stepped
        self.ended = self.keeper.after_iteration(metrics) if self.alone else self.keeper.finish_iteration(metrics)
        learner, state = self.keeper.learner, self.keeper.state
        storage.put_scalars(total_loss=sum(learner.losses.values()), data_time=learner.data_time, **learner.losses)
        if state.evaluated_at == state.iteration:
            storage.put_scalars(smoothing_hint=False, **state.results)
        self.known = set(scalars_of(storage, storage.iter))
        if self.alone and self.ended:
            raise Ended


class ConcludeHook(HookBase):
    """Records what hooks after :class:`KeeperHook` put into the storage, and ends the training where that says so."""

    def __init__(self, first: KeeperHook) -> None:
        self.first = first

    def after_step(self) -> None:
        assert self.first.keeper is not None
        storage: EventStorage = get_event_storage()
        found = scalars_of(storage, storage.iter)
        self.first.keeper.conclude_iteration(
            self.first.ended, {k: v for k, v in found.items() if k not in self.first.known}
        )
        if self.first.ended:
            raise Ended


def scalars_of(storage: EventStorage, iteration: int) -> dict[str, float]:
    """What was put into the storage in ``iteration``: the mean of each name's defined values."""
    means = {}
    for name, history in storage.histories().items():
        values = []
        for value, at in reversed(history.values()):
            if at != iteration:
                break
            if not math.isnan(value):
                values.append(float(value))
        if values:
            means[name] = sum(values) / len(values)
    return means


class Loop(TrainerBase):
    """Detectron2's loop over :class:`Step`."""

    def __init__(self, step: Step) -> None:
        super().__init__()
        self.step = step

    def run_step(self) -> None:
        self.step.iter = self.iter
        self.step.run_step()


def run_loop(cfg: CfgNode, keeper: Keeper, batches: Iterable[Any]) -> None:
    """Train ``keeper.learner`` on Detectron2's inputs until SOLVER.MAX_ITER or until the keeper ends it."""
    learner = keeper.learner
    step = Step(cfg, parallel(learner.model), batches, learner, keeper)
    loop = Loop(step)
    hook = KeeperHook(alone=True)
    hook.keeper, hook.scaler = keeper, step.grad_scaler
    loop.register_hooks([LRScheduler(learner.optimizer, learner.scheduler), hook])
    with train_quietly():
        loop.train(learner.iteration, int(cfg.SOLVER.MAX_ITER))


@contextmanager
def train_quietly() -> Iterator[None]:
    """An early end is none to Detectron2's log, and an exception is told once, by whoever catches it."""
    log = logging.getLogger("detectron2.engine.train_loop")

    def told_elsewhere(record: logging.LogRecord) -> bool:
        return record.exc_info is None

    log.addFilter(told_elsewhere)
    try:
        yield
    except Ended:
        pass
    finally:
        log.removeFilter(told_elsewhere)


def parallel(model: nn.Module) -> nn.Module:
    """``model`` for all processes of the group that gn_det or Detectron2 started."""
    if dist.world_size() == 1:
        return model
    join_local_group()
    on_gpu = next(model.parameters()).is_cuda
    # Without GPUs there is no device to name.
    return create_ddp_model(model, broadcast_buffers=False, **({} if on_gpu else {"device_ids": None}))


def join_local_group() -> None:
    """Tell Detectron2 which processes share this machine, which its own launcher would have done."""
    if torch.distributed.is_initialized() and comm._LOCAL_PROCESS_GROUP is None:
        comm.create_local_process_group(int(os.environ.get("LOCAL_WORLD_SIZE", dist.world_size())))


def make_scaler(cfg: CfgNode, kind: str) -> Any:
    """The gradient scaler of fp16; None for other types.

    Raises:
        ConfigError: fp16 without a GPU.
    """
    if not cfg.SOLVER.AMP.ENABLED or cfg.SOLVER.AMP.DTYPE != "fp16":
        return None
    if kind != "cuda":
        raise ConfigError("SOLVER.AMP.DTYPE fp16 needs a GPU; use bf16 or SOLVER.AMP.ENABLED False")
    return torch.amp.GradScaler(kind)


def clipped_by_detectron2(cfg: CfgNode) -> bool:
    """Whether Detectron2's optimizer knows SOLVER.CLIP_GRADIENTS.CLIP_TYPE; it has no "full_model"."""
    return cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE in ("value", "norm")


def build_optimizer(cfg: CfgNode, model: nn.Module) -> Optimizer:
    """Detectron2's optimizer; clipping that it does not know is left to :class:`Step`.

    Raises:
        ConfigError: every parameter is frozen.
    """
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError("every parameter of the model is frozen; lower MODEL.BACKBONE.FREEZE_AT")
    if not clipped_by_detectron2(cfg):
        cfg = cfg.clone()
        cfg.defrost()
        cfg.SOLVER.CLIP_GRADIENTS.ENABLED = False
    return detectron2.solver.build_optimizer(cfg, model)
