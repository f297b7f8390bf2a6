"""Resumable state of a run: model, optimizer, counters, random streams, and the checkpoint that stores them."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils._pytree import tree_map_only

from gn_det.checkpoint.io import read_checkpoint
from gn_det.checkpoint.last import read_last
from gn_det.checkpoint.meta import build_meta, read_meta
from gn_det.config import parse_config
from gn_det.config.defaults import as_lists, flatten, get_value
from gn_det.engine import dist
from gn_det.engine.payload import check_run, refuse, restore_slots, set_stream
from gn_det.engine.schedule import set_iteration
from gn_det.errors import ConfigError, TrainingError
from gn_det.text import one_line
from gn_det.values import InvalidValue

logger = logging.getLogger(__name__)


class WeightAverage:
    """Moving average of parameters and buffers: ``average = d * average + (1 - d) * weights`` after every step.

    After n steps, ``d`` is ``min(decay, (1 + n) / (10 + n))`` (TensorFlow's rule), so that the random start is quickly
    forgotten. Integer tensors are copied. The average starts at the weights of ``model`` and is equal on all ranks.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.steps = decay, 0
        self.tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Update the average after an optimizer step."""
        self.steps += 1
        weight = 1.0 - min(self.decay, (1.0 + self.steps) / (10.0 + self.steps))
        averages, tensors = [], []
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                averages.append(self.tensors[name])
                tensors.append(tensor)
            else:
                self.tensors[name].copy_(tensor)
        torch._foreach_lerp_(averages, tensors, weight)  # bit-exact for frozen tensors

    @contextmanager
    def swapped_in(self, model: nn.Module) -> Iterator[None]:
        """Put the averages into the model within the context."""
        kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        _copy_into(model.state_dict(), self.tensors)
        try:
            yield
        finally:
            _copy_into(model.state_dict(), kept)

    def restore(self, tensors: Mapping[str, Tensor], steps: int) -> None:
        """Continue from the averages of a checked checkpoint."""
        self.steps = steps
        _copy_into(self.tensors, tensors)


@torch.no_grad()
def _copy_into(tensors: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        tensor.copy_(values[name])


@dataclass
class TrainState:
    """Model, optimizer, schedule and counters of a run, which can be resumed."""

    model: nn.Module  # bare, not wrapped for several processes
    optimizer: Optimizer
    scheduler: LRScheduler
    seed: int = 0  # of data stream and initialization
    #: of fp16; does nothing otherwise
    scaler: torch.amp.GradScaler = field(default_factory=partial(torch.amp.GradScaler, "cpu", enabled=False))
    average: WeightAverage | None = None  # SOLVER.EMA
    iteration: int = -1  # last finished one, 0-based; -1 before the first
    images_seen: int = 0  # training images of finished iterations, over all GPUs
    best: float | None = None  # value of the metric that chooses model_best.pth; None before the first
    best_iteration: int = -1  # of that evaluation, -1 before the first
    stale: int = 0  # evaluations since the best one
    evaluated_at: int = -1  # iteration after which the model was last evaluated, -1 if never
    results: dict[str, float] = field(default_factory=dict)  # metrics of the last evaluation, flat
    saved: str = ""  # path of the newest checkpoint, "" without one
    rng: Mapping[str, Any] | None = None  # random streams to be restored just before training continues


@dataclass(frozen=True)
class ModelMeta:
    """Classes and configuration stored in a checkpoint."""

    cfg: CfgNode
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]


_COUNTERS = ("seed", "images_seen", "best_iteration", "stale", "evaluated_at", "results")


def capture_rng() -> dict[str, Any]:
    """Return the states of Python's, numpy's and torch's generators as tensors and plain values."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(words), gauss],
        "numpy": [str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), int(position), int(has_gauss),
                  float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() and torch.cuda._initialized else None,
    }  # fmt: skip


def restore_rng(state: Mapping[str, Any]) -> None:
    """Invert :func:`capture_rng` for the generators in ``state``; skip a GPU state if there is no GPU."""
    for name, generator in (("python", random), ("numpy", np.random), ("torch", torch.default_generator)):
        if name in state:
            set_stream(generator, state[name])
    if state.get("cuda") is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def seed_everything(seed: int) -> None:
    """Seed Python, numpy and torch (all devices) in this process."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def build_payload(state: TrainState, meta: ModelMeta) -> dict[str, Any]:
    """Return the content of a file of weights (with ``state.average``, the evaluated averages) and metadata.

    Raises:
        TrainingError: the weights contain nan or inf, so an older checkpoint is better than this one.
    """
    weights = state.model.state_dict()  # a new OrderedDict that keeps the version metadata
    floating = [t for t in weights.values() if isinstance(t, Tensor) and t.is_floating_point()]
    if floating and not torch.stack([torch.isfinite(t).all() for t in floating]).all():  # one device synchronization
        raise TrainingError(
            f"the weights contain nan or inf after iteration {state.iteration}, so no checkpoint is written (an older "
            "one is kept); lower SOLVER.BASE_LR or set SOLVER.CLIP_GRADIENTS.ENABLED True"
        )
    weights.update(_on_cpu(weights if state.average is None else state.average.tensors))
    extra = {name: getattr(state, name) for name in ("iteration", *_COUNTERS)}
    block = build_meta(meta.cfg, meta.class_names, meta.category_ids, best_metric=state.best, **extra)
    return {"model": weights, "iteration": state.iteration, "gn_det": block}


def build_checkpoint(
    state: TrainState, meta: ModelMeta, rng: Sequence[Mapping[str, Any]], logs: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the content of a checkpoint to resume from: :func:`build_payload` and all other state of the run.

    With ``state.average``, the training weights are stored under ``ema``.

    Args:
        rng: random streams of all ranks.
        logs: from :meth:`gn_det.engine.scalars.Metrics.dump`.
    """
    optimizer, scaler = _on_cpu(state.optimizer.state_dict()), state.scaler.state_dict() or None
    scheduler = {"base_lrs": list(state.scheduler.base_lrs), "last_epoch": int(state.scheduler.last_epoch)}
    payload = build_payload(state, meta)
    payload |= {"optimizer": optimizer, "scheduler": scheduler, "grad_scaler": scaler, "rng": rng, "logs": logs}
    if state.average is not None:
        payload["ema"] = {"steps": state.average.steps, "learning": _on_cpu(dict(state.model.state_dict()))}
    # The same objects under the names that Detectron2's own trainer reads; the file stores them once.
    inner = {"iteration": state.iteration, "optimizer": optimizer, **({"grad_scaler": scaler} if scaler else {})}
    payload["trainer"] = {"iteration": state.iteration, "hooks": {"LRScheduler": scheduler}, "_trainer": inner}
    return payload


def _on_cpu(value: Any) -> Any:
    """Copy tensors to host memory, so that a file written on a GPU loads anywhere."""
    return tree_map_only(Tensor, Tensor.cpu, value)


@dataclass
class Resume:
    """A checkpoint to resume from."""

    path: Path
    payload: dict[str, Any]


def find_resume(folder: str | os.PathLike[str]) -> Resume | None:
    """Read the newest checkpoint of ``folder``, or return None."""
    path = read_last(Path(folder)) if os.path.isdir(folder) else None
    if path is None:
        logger.info("--resume: no checkpoint in OUTPUT_DIR %s; starting from the beginning.", folder)
        return None
    return Resume(path, read_checkpoint(path))


def restore(resume: Resume, state: TrainState, cfg: CfgNode) -> None:
    """Restore weights, momentum, average and counters of a checkpoint to ``state``; hyperparameters are ``cfg``'s.

    Everything is checked first; on an error, nothing has changed. Entries that the checkpoint lacks (another tool's
    file) keep their values in ``state``.

    Raises:
        WeightsError: an entry cannot be used, or does not match the configured model or optimizer.
    """
    payload, source = resume.payload, os.fspath(resume.path)
    try:
        check_run(payload, state.model, int(cfg.SOLVER.IMS_PER_BATCH), dist.world_size())
        put_momentum, sentence = _momentum(payload, state.model, state.optimizer)
    except InvalidValue as error:
        raise refuse(source, error) from None
    block = read_meta(payload, source) or {}
    state.iteration, state.best, state.saved = payload.get("iteration", -1), block.get("best_metric"), source
    for name in _COUNTERS:
        if name in block:
            setattr(state, name, block[name])
    state.model.load_state_dict(dict((payload.get("ema") or {}).get("learning", payload["model"])))
    put_momentum()
    set_iteration(state.scheduler, state.iteration + 1)
    states, processes = payload.get("rng") or [], dist.world_size()
    if len(states) == processes:
        state.rng = states[dist.rank()]
    elif states:
        logger.info("Resuming with %d processes instead of %d: random streams restart.", processes, len(states))
    left = max(int(cfg.SOLVER.MAX_ITER) - state.iteration - 1, 0)
    logger.info("Resumed from %s: iteration %d done, %d to go.", resume.path, state.iteration, left)
    if sentence:
        logger.info(sentence)
    if changed := _changed_keys(resume, cfg):
        logger.info("Changed since that checkpoint (the new values apply): %s.", "; ".join(changed))


def _momentum(payload: Mapping[str, Any], model: nn.Module, optimizer: Optimizer) -> tuple[Callable[[], None], str]:
    """Return a function that restores the optimizer's state (ours, or of Detectron2's trainer), and a remark."""
    where = "trainer._trainer.optimizer" if payload.get("optimizer") is None else "optimizer"
    saved = get_value(payload, where)
    if saved is None:
        return lambda: None, "It has no optimizer state: momentum starts at zero."
    if list(payload["model"]) != list(model.state_dict()):
        return lambda: None, "Its tensors are in another order (other engine or version): momentum starts at zero."
    return restore_slots(optimizer, saved, where), ""


#: Keys whose changes on resuming are not reported.
_SILENT = ("OUTPUT_DIR", "DATALOADER.NUM_WORKERS", "MODEL.WEIGHTS", "MODEL.DEVICE", "MODEL.CLASS_NAMES", "SEED",
           "LOGGERS", "SOLVER.NO_RESCALE", "SOLVER.CHECKPOINT_KEEP", "SOLVER.MAX_HOURS")  # fmt: skip


def stored_config(resume: Resume | None) -> CfgNode | None:
    """Return the configuration in a checkpoint; None if missing, damaged, or from a version with other keys."""
    block = (read_meta(resume.payload) or {}) if resume is not None else {}
    try:
        return parse_config(block["config"], "checkpoint") if block.get("config") else None
    except (ConfigError, ValueError):
        return None


def _changed_keys(resume: Resume, cfg: CfgNode) -> list[str]:
    """Return ``KEY old -> new`` for each key whose value in the checkpoint differs from ``cfg``."""
    old = dict(flatten(stored_config(resume) or {}))
    return [
        f"{name} {one_line(old[name])} -> {one_line(value)}"
        for name, value in flatten(cfg)
        if name in old and as_lists(old[name]) != as_lists(value) and name not in _SILENT
    ]
