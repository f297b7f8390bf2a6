"""What makes a run resumable: counters, random streams, and the checkpoint payload that holds them."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from fvcore.common.config import CfgNode
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from gn_det.checkpoint.meta import build_meta, read_meta
from gn_det.config import parse_config
from gn_det.engine.average import WeightAverage
from gn_det.engine.payload import check_run, numpy_state, refuse, restore_slots
from gn_det.engine.schedule import set_iteration
from gn_det.errors import ConfigError, TrainingError
from gn_det.text import one_line
from gn_det.values import InvalidValue


@dataclass
class RunState:
    """Counters of a run; all of them survive an interruption.

    Attributes:
        seed: seed of the data stream and of initialisation.
        iteration: last finished iteration, 0-based; -1 before the first.
        images_seen: training images consumed by finished iterations, over all GPUs.
        best: best value of the metric that chooses model_best.pth; None before the first.
        best_iteration: iteration of that evaluation, -1 before the first.
        stale: evaluations since the best one.
        evaluated_at: iteration after which the model was last evaluated, -1 if never.
        results: metrics of the last evaluation, flat.
    """

    seed: int
    iteration: int = -1
    images_seen: int = 0
    best: float | None = None
    best_iteration: int = -1
    stale: int = 0
    evaluated_at: int = -1
    results: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ModelMeta:
    """What a checkpoint says about its classes and configuration."""

    cfg: CfgNode
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]


_COUNTERS = ("seed", "images_seen", "best_iteration", "stale", "evaluated_at", "results")


def capture_rng() -> dict[str, Any]:
    """States of python's, numpy's and torch's generators of this process, as tensors and plain values."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(words), gauss],
        "numpy": [str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), int(position), int(has_gauss),
                  float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() and torch.cuda.is_initialized() else None,
    }  # fmt: skip


def restore_rng(state: Mapping[str, Any]) -> None:
    """Inverse of :func:`capture_rng`; a GPU state is skipped where there is no GPU."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(numpy_state(state["numpy"]))
    torch.set_rng_state(state["torch"])
    if state.get("cuda") is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def seed_everything(seed: int) -> None:
    """Seed python, numpy and torch (all devices) of this process."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def weights_are_finite(model: nn.Module) -> bool:
    """True when no parameter or buffer holds nan or inf (one device synchronisation)."""
    floating = [t for t in model.state_dict().values() if isinstance(t, Tensor) and t.is_floating_point()]
    return not floating or bool(torch.stack([torch.isfinite(t).all() for t in floating]).all())


def build_payload(
    model: nn.Module,
    state: RunState,
    meta: ModelMeta,
    *,
    optimizer: Optimizer | None = None,
    scheduler: LRScheduler | None = None,
    scaler: Mapping[str, Any] | None = None,
    rng: Sequence[Mapping[str, Any]] = (),
    logs: Mapping[str, Any] | None = None,
    average: WeightAverage | None = None,
) -> dict[str, Any]:
    """Content of a checkpoint file; without an optimizer only weights and metadata (``model_best.pth``).

    With an ``average`` (SOLVER.EMA) that is the ``model``, which is what was evaluated; the weights that learn lie
    beside it, for resuming.

    Raises:
        TrainingError: the weights hold nan or inf; an older checkpoint is worth more than this one.
    """
    if not weights_are_finite(model):
        raise TrainingError(
            f"the weights hold nan or inf after iteration {state.iteration}, so no checkpoint is written (an older one "
            "is kept); lower SOLVER.BASE_LR or set SOLVER.CLIP_GRADIENTS.ENABLED True"
        )
    # an OrderedDict of its own, whose version metadata is worth keeping
    weights = model.state_dict() if average is None else average.state(model)
    for name in weights:
        weights[name] = _on_cpu(weights[name])
    extra = {name: getattr(state, name) for name in _COUNTERS}
    payload: dict[str, Any] = {
        "model": weights,
        "iteration": state.iteration,
        "gn_det": build_meta(
            meta.cfg, meta.class_names, meta.category_ids, iteration=state.iteration, best_metric=state.best, **extra
        ),
    }
    if optimizer is not None and scheduler is not None:
        payload["optimizer"] = _on_cpu(optimizer.state_dict())
        payload["scheduler"] = {"base_lrs": list(scheduler.base_lrs), "last_epoch": int(scheduler.last_epoch)}
        payload["grad_scaler"] = dict(scaler) if scaler else None
        payload["rng"] = list(rng)
        payload["logs"] = dict(logs or {})
        if average is not None:
            payload["ema"] = {"steps": average.steps, "learning": _on_cpu(dict(model.state_dict()))}
        payload["trainer"] = _for_detectron2(payload)
    return payload


def _for_detectron2(payload: Mapping[str, Any]) -> dict[str, Any]:
    """The same states where Detectron2's own trainer looks for them, to go on with; the file holds them once."""
    inner = {"iteration": payload["iteration"], "optimizer": payload["optimizer"]}
    if payload["grad_scaler"]:
        inner["grad_scaler"] = payload["grad_scaler"]
    return {"iteration": payload["iteration"], "hooks": {"LRScheduler": payload["scheduler"]}, "_trainer": inner}


def _on_cpu(value: Any) -> Any:
    """A copy with tensors in host memory, so that a file written on a GPU loads anywhere.

    Never in place: an optimizer's state dict shares its inner dicts with the optimizer.
    """
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: _on_cpu(item) for key, item in value.items()}
    return value


def restore_state(payload: Mapping[str, Any], default: RunState, source: str = "") -> RunState:
    """Counters of a checked checkpoint; those it does not have (another tool's file) stay as in ``default``."""
    block = read_meta(payload, source) or {}
    state = RunState(default.seed, iteration=payload.get("iteration", -1), best=block.get("best_metric"))
    for name in _COUNTERS:
        if name in block:
            setattr(state, name, block[name])
    return state


def restore(
    payload: Mapping[str, Any],
    model: nn.Module,
    optimizer: Optimizer,
    scheduler: LRScheduler,
    default: RunState,
    *,
    batch: int,
    processes: int,
    source: str,
) -> tuple[RunState, str]:
    """Weights and momentum from the checkpoint, hyperparameters from the current configuration.

    Everything that a resumed run reads of the payload is checked first; on an error nothing has changed.

    Args:
        default: counters that the checkpoint does not have (another tool's file) stay as here.
        batch: SOLVER.IMS_PER_BATCH.
        processes: of this run.
        source: file, for messages.

    Returns:
        Counters; and "" or, where momentum starts at zero, a sentence that says why: the checkpoint holds no optimizer
        (``model_best.pth``, another tool's file), or its tensors come in another order.

    Raises:
        WeightsError: an entry cannot be used, names or shapes differ from the configured model, or the optimizer's
            groups do not match (another FREEZE_AT or other weight decay keys).
    """
    try:
        check_run(payload, model, batch, processes)
        put_momentum, sentence = _momentum(payload, model, optimizer)
    except InvalidValue as error:
        raise refuse(source, error) from None
    state = restore_state(payload, default, source)
    model.load_state_dict(dict((payload.get("ema") or {}).get("learning", payload["model"])))
    put_momentum()
    set_iteration(scheduler, state.iteration + 1)
    return state, sentence


def _momentum(payload: Mapping[str, Any], model: nn.Module, optimizer: Optimizer) -> tuple[Callable[[], None], str]:
    where, saved = _saved_optimizer(payload)
    if saved is None:
        return _nothing, "It holds no optimizer state: momentum starts at zero."
    if list(payload["model"]) != list(model.state_dict()):
        return (
            _nothing,
            "Its tensors come in another order (another engine or version wrote it): momentum starts at zero.",
        )
    return restore_slots(optimizer, saved, where), ""


def _nothing() -> None:
    pass


def _saved_optimizer(payload: Mapping[str, Any]) -> tuple[str, Any]:
    """Place and content of the optimizer's state in our checkpoints, or in those of Detectron2's own trainer."""
    if payload.get("optimizer") is not None:
        return "optimizer", payload["optimizer"]
    trainer = payload.get("trainer")
    inner = trainer.get("_trainer") if isinstance(trainer, Mapping) else None
    return "trainer._trainer.optimizer", inner.get("optimizer") if isinstance(inner, Mapping) else None


#: Keys that may differ between a run and its continuation without being worth a word.
_SILENT = ("OUTPUT_DIR", "DATALOADER.NUM_WORKERS", "MODEL.WEIGHTS", "MODEL.DEVICE", "MODEL.CLASS_NAMES", "SEED",
           "SOLVER.NO_RESCALE", "SOLVER.CHECKPOINT_KEEP", "SOLVER.MAX_HOURS")  # fmt: skip


def changed_keys(payload: Mapping[str, Any], cfg: CfgNode) -> list[str]:
    """``KEY old -> new`` for every key in which the checkpoint's configuration differs from ``cfg``."""
    block = read_meta(payload)
    try:
        if not block or not block["config"]:
            return []
        old = _flat(parse_config(block["config"], "checkpoint"))
    except (ConfigError, ValueError):  # of a version with other keys, or damaged: nothing of it is used
        return []
    new = _flat(cfg)
    return [
        f"{k} {one_line(old[k])} -> {one_line(v)}"
        for k, v in new.items()
        if k in old and old[k] != v and k not in _SILENT
    ]


def _flat(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in node.items():
        if isinstance(value, Mapping):
            out.update(_flat(value, f"{prefix}{name}."))
        else:
            out[prefix + name] = list(value) if isinstance(value, (list, tuple)) else value
    return out
