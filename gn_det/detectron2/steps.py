"""Connect gn_det's training loop with Detectron2: its event storage as a hook, and our loop driven by its trainer."""

from __future__ import annotations

import itertools
import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

import detectron2.solver
import numpy as np
import torch.distributed
from detectron2.engine import HookBase, SimpleTrainer
from detectron2.utils import comm
from detectron2.utils.events import EventStorage, get_event_storage
from torch import nn

from gn_det.config.defaults import edited
from gn_det.engine import dist
from gn_det.engine.loop import Hook, Loop
from gn_det.engine.optimizer import build_optimizer as own_optimizer
from gn_det.engine.optimizer import check_trainable

if TYPE_CHECKING:
    from detectron2.config import CfgNode
    from torch.optim import Optimizer


class Ended(Exception):
    """Raised by a hook to end training early; Detectron2's loop has no other way."""


class Storage(Hook):
    """Provides Detectron2's event storage to our loop, and logs what the model puts there."""

    def before_train(self, loop: Loop) -> None:
        join_local_group()
        self._storage = EventStorage(loop.state.iteration + 1)
        self._storage.__enter__()
        loop.take_picture = partial(take_picture, self._storage)

    def before_step(self, loop: Loop) -> None:
        self._storage.iter = loop.state.iteration + 1

    def after_step(self, loop: Loop) -> None:
        loop.scalars |= scalars_of(self._storage, loop.state.iteration)

    def after_train(self, loop: Loop) -> None:
        self._storage.__exit__(None, None, None)


class Step(SimpleTrainer):
    """Runs the iterations of :attr:`loop`, which is set later, also for a ``run_step`` of the user's own."""

    loop: Loop

    def run_step(self) -> None:
        """Forward, backward and optimizer step of one iteration."""
        self.loop.batches = self._data_loader_iter
        self.loop.step()


class LoopHook(HookBase):
    """Calls the hooks of ``loop``; must come after the hook that steps the learning rate.

    It puts losses and evaluation results into Detectron2's storage, for the hooks after this one.
    """

    loop: Loop  # set before the training

    def __init__(self) -> None:
        #: names put into the storage so far in this iteration
        self.known: set[str] = set()

    def before_train(self) -> None:
        self.loop.take_picture = partial(take_picture, get_event_storage())
        self.loop.begin()
        if self.loop.stopping:
            raise Ended

    def after_step(self) -> None:
        loop, storage = self.loop, get_event_storage()
        found = scalars_of(storage, storage.iter)
        loop.scalars |= {k: v for k, v in found.items() if k not in ("lr", "time")}  # the loop has these itself
        loop.call("after_step")
        storage.put_scalars(total_loss=sum(loop.losses.values()), data_time=loop.data_time, **loop.losses)
        if loop.state.evaluated_at == loop.state.iteration:
            storage.put_scalars(smoothing_hint=False, **loop.state.results)
        self.known = set(scalars_of(storage, storage.iter))

    def end_step(self) -> None:
        """Record what the hooks after this one put into the storage, and end training if the loop is stopping."""
        loop, storage = self.loop, get_event_storage()
        loop.scalars |= {k: v for k, v in scalars_of(storage, storage.iter).items() if k not in self.known}
        loop.call("end_step")
        if loop.stopping:
            raise Ended

    def after_train(self) -> None:
        self.loop.end()


def take_picture(storage: EventStorage) -> np.ndarray | None:
    """Take the picture that the model drew by VIS_PERIOD out of the storage, which keeps all until they are taken.

    Detectron2 also puts the masks there, one image each, as tensors: those are dropped.
    """
    drawn = [image for _, image, _ in storage._vis_data if isinstance(image, np.ndarray)]
    storage.clear_images()
    return drawn[-1].transpose(1, 2, 0) if drawn else None


def scalars_of(storage: EventStorage, iteration: int) -> dict[str, float]:
    """Return the scalars put into the storage in ``iteration``: the mean of each name's finite values."""
    means = {}
    for name, history in storage.histories().items():
        latest = itertools.takewhile(lambda entry: entry[1] == iteration, reversed(history.values()))
        if values := [float(value) for value, _ in latest if not math.isnan(value)]:
            means[name] = sum(values) / len(values)
    return means


@contextmanager
def train_quietly() -> Iterator[None]:
    """Do not log early stops, or exceptions that are reported elsewhere, as Detectron2 errors."""
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


def join_local_group() -> None:
    """Tell Detectron2 which processes share this machine, like its own launcher does."""
    if torch.distributed.is_initialized() and comm._LOCAL_PROCESS_GROUP is None:
        comm.create_local_process_group(int(os.environ.get("LOCAL_WORLD_SIZE", dist.world_size())))


def clipped_by_detectron2(cfg: CfgNode) -> bool:
    """Return whether Detectron2's optimizer is used and supports the CLIP_TYPE; it lacks "full_model"."""
    return cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE in ("value", "norm") and not _is_ours(cfg)


def _is_ours(cfg: CfgNode) -> bool:
    """Return whether the config needs an optimizer that Detectron2 cannot build from keys."""
    return bool(cfg.SOLVER.OPTIMIZER != "SGD" or cfg.SOLVER.BACKBONE_LR_FACTOR != 1)


def build_optimizer(cfg: CfgNode, model: nn.Module, *, clips: bool = True) -> Optimizer:
    """Build Detectron2's optimizer, or gn_det's with the same groups; raise ConfigError if nothing is trained.

    The loop does clipping that the optimizer lacks, or all of it without ``clips``.
    """
    if _is_ours(cfg):
        return own_optimizer(cfg, model)
    check_trainable(model)
    if not clips or not clipped_by_detectron2(cfg):
        cfg = edited(cfg, {"SOLVER.CLIP_GRADIENTS.ENABLED": False})
    optimizer: Optimizer = detectron2.solver.build_optimizer(cfg, model)
    return optimizer
