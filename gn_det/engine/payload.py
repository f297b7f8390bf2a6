"""Schema of the checkpoints that runs are resumed from: every value is checked before any of it is used.

A checkpoint comes from outside. What torch.load returns is still any nesting of any plain values, so each entry that a
resumed run reads is described here: type, range, and for tensors dtype and shape. Entries that nothing reads are
ignored, whatever they hold.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from gn_det.checkpoint.io import tensor_problem
from gn_det.errors import WeightsError
from gn_det.text import shown
from gn_det.values import (
    ANYTHING,
    FINITE,
    FLAG,
    NUMBER,
    POSITIVE,
    Check,
    InvalidValue,
    every,
    integer,
    items,
    one_of,
    optional,
    record,
    row,
    table,
    text,
)

MOST_ITERATIONS = 10**9
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
#: Images of one iteration, in case the batch was larger before: a resumed run skips all images seen, one by one.
_LARGEST_BATCH = 1024


_REMEDY = "delete that file to resume from an older checkpoint, or start a new run with MODEL.WEIGHTS"


class OtherModel(InvalidValue):
    """The checkpoint is of another model than the configured one."""

    remedy = "resume with the configuration that the run was started with, or start a new one with MODEL.WEIGHTS"


class OtherGroups(InvalidValue):
    """The saved optimizer state is of other parameter groups."""

    remedy = (
        "resume with the MODEL.BACKBONE.FREEZE_AT and weight decay keys of the run, or start a new one with "
        "MODEL.WEIGHTS"
    )


# ------------------------------------------------------------ tensors


def tensor(shape: Sequence[int | None], *dtypes: torch.dtype, finite: bool = False) -> Check:
    """A dense tensor in host memory, of one of ``dtypes``; None in ``shape`` stands for any length."""

    def check(value: Any, where: str) -> None:
        if problem := tensor_problem(value):
            raise InvalidValue(where, problem)
        if len(shape) != value.dim() or any(n not in (None, have) for n, have in zip(shape, value.shape)):
            raise InvalidValue(where, f"has shape {_shape(value.shape)}; it must have {_shape(shape)}")
        if value.dtype not in dtypes:
            wanted = " or ".join(map(_name, dtypes))
            raise InvalidValue(where, f"is of type {_name(value.dtype)}; it must be {wanted}")
        if finite and not torch.isfinite(value).all():
            raise InvalidValue(where, "holds nan or infinity")

    return check


def _shape(shape: Sequence[int | None]) -> str:
    return "x".join("?" if n is None else str(n) for n in shape[:8]) or "()"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def tensor_like(own: Tensor, *, finite: bool = True) -> Check:
    """A tensor that can be copied into ``own``."""
    floating = own.is_floating_point()
    return tensor(own.shape, *(_FLOATS if floating else (own.dtype,)), finite=finite and floating)


def weights_of(model: nn.Module, *, finite: bool = True) -> Check:
    """All tensors of ``model`` and no others."""
    own = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}

    def check(value: Any, where: str) -> None:
        if not isinstance(value, Mapping):
            raise InvalidValue(where, f"is {shown(value)}, not a dict of tensors")
        differing = [name for name in own if getattr(value.get(name), "shape", own[name].shape) != own[name].shape]
        differing += [name for name in {**own, **value} if name not in own or name not in value]
        if differing:
            raise OtherModel(
                where,
                f"has {len(differing)} tensors that differ from the configured model (first: {shown(differing[0])})",
            )
        for name, tensor in own.items():
            tensor_like(tensor, finite=finite)(value[name], f"{where}.{name}")

    return check


# ------------------------------------------------------------ optimizer

_SAVED = record(
    {
        "state": table(integer(0, 10**7), table(text(60), ANYTHING, 20), 10**6),
        "param_groups": items(record({"params": items(integer(0, 10**7), 0, 10**6)}), 1, 10**5),
    }
)


def restore_slots(optimizer: Optimizer, saved: Any, where: str) -> Callable[[], None]:
    """Check a saved optimizer state; return the function that puts its buffers into ``optimizer``.

    Hyperparameters stay the optimizer's own. Its buffers are copied, so that nothing of the file is shared.

    Raises:
        InvalidValue: an entry cannot be used.
        OtherGroups: the groups hold other numbers of parameters.
    """
    _SAVED(saved, where)
    groups, ours = saved["param_groups"], optimizer.state_dict()["param_groups"]
    counts, wanted = ([len(g["params"]) for g in part] for part in (groups, ours))
    if counts != wanted:
        raise OtherGroups(f"{where}.param_groups", f"hold {shown(counts)} parameters, not {shown(wanted)}")
    theirs = [key for group in groups for key in group["params"]]
    if len(set(theirs)) != len(theirs):
        raise InvalidValue(f"{where}.param_groups", "name a parameter twice in their params")
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    names = [key for group in ours for key in group["params"]]
    slots = {
        name: _slot(optimizer, parameter, saved["state"][key], f"{where}.state[{key}]")
        for key, name, parameter in zip(theirs, names, parameters)
        if key in saved["state"]
    }
    return lambda: optimizer.load_state_dict({"state": slots, "param_groups": ours})


def _slot(optimizer: Optimizer, parameter: Tensor, slot: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Copies of one parameter's buffers; of SGD only momentum, the one that it reads."""
    out: dict[str, Any] = {}
    sgd = isinstance(optimizer, SGD)
    for name, value in slot.items():
        if sgd and name != "momentum_buffer":
            continue
        if value is None or (isinstance(value, (int, float)) and not sgd):
            out[name] = value
            continue
        like = value.new_zeros(()) if isinstance(value, Tensor) and value.dim() == 0 and not sgd else parameter
        tensor_like(like)(value, f"{where}.{name if name.isidentifier() else shown(name)}")
        with torch.no_grad():
            out[name] = torch.empty_like(like, requires_grad=False).copy_(value)
    return out


# ------------------------------------------------------------ a detection run

_COUNT = integer(-1, MOST_ITERATIONS)

#: The counters of the ``gn_det`` block.
_BLOCK = record(
    {},
    seed=integer(0, 2**63 - 1),
    images_seen=integer(0, 10**15),
    best_metric=optional(FINITE),
    best_iteration=_COUNT,
    stale=integer(0, MOST_ITERATIONS),
    evaluated_at=_COUNT,
    results=table(text(10_000), NUMBER, 100_000),
    config=text(1 << 20),
)

_SCALER = record(
    {
        "scale": POSITIVE,
        "growth_factor": POSITIVE,
        "backoff_factor": POSITIVE,
        "growth_interval": integer(1, MOST_ITERATIONS),
        "_growth_tracker": integer(0, MOST_ITERATIONS),
    }
)

#: One name -> [smooth, values, iteration, count, mean]; see :meth:`gn_det.engine.events.EventLog.dump`.
_LOGS = record(
    {
        "scalars": table(
            text(200, printable=True),
            row(FLAG, items(NUMBER, 1, 1000), _COUNT, integer(0, MOST_ITERATIONS), NUMBER),
            10_000,
        ),
        "written": _COUNT,
        "lowest": optional(row(FINITE, _COUNT)),
    }
)


def _accepted_by(what: str, take: Callable[[Any], Any]) -> Check:
    """The library itself takes the value, on an object of no consequence."""

    def check(value: Any, where: str) -> None:
        try:
            take(value)
        except Exception:  # python, numpy and torch raise many types
            raise InvalidValue(where, f"is not a state of {what}'s random generator") from None

    return check


def _python(value: Any) -> None:
    random.Random().setstate((value[0], tuple(value[1]), value[2]))


def _numpy(value: Any) -> None:
    np.random.RandomState().set_state(numpy_state(value))


def numpy_state(value: Sequence[Any]) -> tuple[Any, ...]:
    """A stored state as numpy takes it: a word of a tensor is 32 bits, kept in 64."""
    name, keys, position, has_gauss, cached = value
    return (name, keys.numpy().astype(np.uint32), position, has_gauss, cached)


def _words(value: Any, where: str) -> None:
    tensor((624,), torch.int64)(value, where)
    if int(value.min()) < 0 or int(value.max()) >= 2**32:
        raise InvalidValue(where, "holds numbers of more than 32 bits")


def _cuda(value: Any, where: str) -> None:
    _BYTES(value, where)
    if torch.cuda.is_available():
        _accepted_by("CUDA", torch.Generator("cuda").set_state)(value, where)


_BYTES = tensor((None,), torch.uint8)
_TORCH_RNG = every(_BYTES, _accepted_by("torch", lambda v: torch.Generator().set_state(v)))
_RNG = record(
    {
        "python": every(row(one_of(3), items(ANYTHING, 625, 625), optional(FINITE)), _accepted_by("python", _python)),
        "numpy": every(row(text(20), _words, integer(0, 624), integer(0, 1), FINITE), _accepted_by("numpy", _numpy)),
        "torch": _TORCH_RNG,
    },
    cuda=optional(_cuda),
)


def check_run(payload: Mapping[str, Any], model: nn.Module, batch: int, processes: int) -> None:
    """Check all that a resumed detection run reads of a checkpoint, but the optimizer (:func:`restore_slots`).

    Args:
        payload: content of the file.
        model: of the run.
        batch: its SOLVER.IMS_PER_BATCH.
        processes: of this run; random states of another number of processes are not used.

    Raises:
        InvalidValue: names the entry.
    """
    weights, states = weights_of(model), payload.get("rng")
    of_this_run = isinstance(states, (list, tuple)) and len(states) == processes
    record(
        {"model": weights},
        iteration=_COUNT,
        gn_det=_BLOCK if isinstance(payload.get("gn_det"), dict) else ANYTHING,
        ema=_or_nothing(record({"steps": integer(0, MOST_ITERATIONS), "learning": weights})),
        grad_scaler=_or_nothing(_SCALER),
        rng=optional(items(_RNG if of_this_run else ANYTHING, 0, 10**6)),
        logs=_or_nothing(_LOGS),
    )(payload, "")
    _check_together(payload, batch)


def _or_nothing(check: Check) -> Check:
    """An empty dict or None stands for an absent entry."""

    def either(value: Any, where: str) -> None:
        if value is not None and not (isinstance(value, Mapping) and not value):
            check(value, where)

    return either


def _check_together(payload: Mapping[str, Any], batch: int) -> None:
    """What no run can write: numbers beyond the iteration that the checkpoint was made after."""
    iteration = payload.get("iteration", -1)
    block = payload.get("gn_det")
    block = block if isinstance(block, dict) else {}
    most = max(_LARGEST_BATCH, 64 * batch)
    if block.get("images_seen", 0) > (iteration + 1) * most:
        raise InvalidValue(
            "gn_det.images_seen",
            f"is {block['images_seen']}: more than {most} images an iteration, with {iteration + 1} done",
        )
    numbers = {f"gn_det.{name}": block.get(name, -1) for name in ("best_iteration", "evaluated_at")}
    logs = payload.get("logs") or {}
    for name, entry in logs.get("scalars", {}).items():
        numbers[f"logs.scalars[{shown(name)}][2]"] = entry[2]
    numbers["logs.written"] = logs.get("written", -1) - 1  # a last evaluation is one beyond the last iteration
    for where, value in numbers.items():
        if value > iteration:
            raise InvalidValue(where, f"lies beyond the checkpoint's iteration {iteration}")


# ------------------------------------------------------------ a pretraining run


def _setting(value: Any, where: str) -> None:
    """A plain value of a setting, or a list of numbers."""
    if isinstance(value, (list, tuple)):
        items(NUMBER, 0, 1000)(value, where)
    elif isinstance(value, str):
        text(10_000)(value, where)
    elif value is not None and not isinstance(value, bool):
        NUMBER(value, where)


_SETTINGS = table(text(100), _setting, 1000)

#: Of whom a checkpoint of pretraining is; checked and compared before its content.
check_origin = record({"settings": _SETTINGS, "processes": integer(1, 10**6)})

_METRICS = table(text(200, printable=True), NUMBER, 1000)


def check_pretraining(payload: Mapping[str, Any], model: nn.Module) -> None:
    """Check all that ``gn-det pretrain --resume`` reads of ``last.ckpt``, but the optimizer.

    Raises:
        InvalidValue: names the entry.
    """
    record(
        {
            "model": weights_of(model),
            "done": record(
                {
                    "epochs": integer(0, MOST_ITERATIONS),
                    "curve": items(every(_METRICS, _CURVE_ROW), 0, 10**6),
                    "best": _or_nothing(
                        every(_METRICS, record({"epoch": integer(0, MOST_ITERATIONS), "val_error": NUMBER}))
                    ),
                    "peak_memory_mb": NUMBER,
                }
            ),
        },
        scaler=_or_nothing(_SCALER),
    )(payload, "")
    done = payload["done"]
    if len(done["curve"]) != done["epochs"] or (done["epochs"] and not done["best"]):
        raise InvalidValue("done.curve", f"has {len(done['curve'])} rows, not one for each of {done['epochs']} epochs")


_CURVE_ROW = record(
    {
        "epoch": integer(1, MOST_ITERATIONS),
        **dict.fromkeys(("train_loss", "train_error", "val_error", "lr"), NUMBER),
        **dict.fromkeys(("seconds_per_iteration", "inference_seconds_per_image"), NUMBER),
    }
)

#: What is read of the ``summary.json`` of a finished pretraining run.
check_summary = record(
    {
        "settings": _SETTINGS,
        "top1_error": NUMBER,
        "curve": items(every(_METRICS, _CURVE_ROW), 1, 10**6),
    },
    seconds_per_iteration=optional(NUMBER),
    peak_memory_mb=optional(NUMBER),
    inference_seconds_per_image=optional(NUMBER),
    parameters=optional(NUMBER),
)


# ------------------------------------------------------------ a kept batch


_SIDE = integer(1, 1 << 16)
_POLYGONS = items(tensor((None,), torch.float32, torch.float64), 0, 10**5)
_BITMAP = tensor((None, None), torch.bool, torch.uint8)


def _mask(value: Any, where: str) -> None:
    (_POLYGONS if isinstance(value, list) else _BITMAP)(value, where)


_SAMPLE = record(
    {"image": tensor((None, None, None), torch.uint8, torch.float32)},
    file_name=text(10_000),
    height=_SIDE,
    width=_SIDE,
    targets=record(
        {
            "image_size": row(_SIDE, _SIDE),
            "boxes": tensor((None, 4), torch.float32),
            "classes": tensor((None,), torch.int64),
            "masks": optional(items(_mask, 0, 10**5)),
        }
    ),
)


_REPLAY = record(
    {
        "batch": items(_SAMPLE, 1, 1 << 16),
        "rng": record({"torch": _TORCH_RNG}),
        "autocast": one_of("", "torch.float16", "torch.bfloat16"),
    }
)


def check_replay(payload: Mapping[str, Any], model: nn.Module, classes: int) -> None:
    """Check a kept batch (``nonfinite_*.pth``): batch, random states and weights, which may hold nan and infinity.

    Raises:
        InvalidValue: names the entry.
    """
    _REPLAY(payload, "")
    for index, sample in enumerate(payload["batch"]):
        targets = sample.get("targets")
        if targets is None:
            continue
        found, masks = targets["classes"], targets["masks"]
        if len(targets["boxes"]) != len(found) or (masks is not None and len(masks) != len(found)):
            raise InvalidValue(f"batch[{index}].targets", "hold different numbers of boxes, classes and masks")
        if len(found) and not 0 <= int(found.min()) <= int(found.max()) < classes:
            raise InvalidValue(f"batch[{index}].targets.classes", f"go beyond the {classes} classes of the model")
    weights_of(model, finite=False)(payload["model"], "model")


def refuse(
    source: str, error: InvalidValue, remedy: str = "", doing: str = "resume from this checkpoint"
) -> WeightsError:
    """Return the error that a user sees for an entry that cannot be used."""
    return WeightsError(f"{source}: cannot {doing}: {error}; {remedy or error.remedy or _REMEDY}")
