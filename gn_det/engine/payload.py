"""Schema of the checkpoints that runs resume from: every value is checked before any is used.

A checkpoint is untrusted: torch.load may return any nesting of plain values. Each entry that a resumed run reads is
described here by type, range, and for tensors dtype and shape. All other entries are ignored.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

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
#: Most images per iteration, in case the batch was larger before: a resumed run skips all seen images one by one.
_LARGEST_BATCH = 1024

_REMEDY = "delete that file to resume from an older checkpoint, or start a new run with MODEL.WEIGHTS"


#: What to do about a checkpoint that does not match the configuration, by what differs.
_RESUME_WITH = {
    "model": "resume with the configuration that the run was started with, or start a new one with MODEL.WEIGHTS",
    "groups": "resume with the MODEL.BACKBONE.FREEZE_AT, MODEL.FREEZE, SOLVER.BACKBONE_LR_FACTOR and weight decay keys "
    "of the run, or start a new one with MODEL.WEIGHTS",
    "optimizer": "resume with the SOLVER.OPTIMIZER of the run, or start a new one with MODEL.WEIGHTS",
}


# ------------------------------------------------------------ tensors


def tensor(shape: Sequence[int | None], *dtypes: torch.dtype, finite: bool = False) -> Check:
    """Check for a dense tensor in host memory with one of ``dtypes``; None in ``shape`` means any length."""

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
    """Check for a tensor that can be copied into ``own``."""
    floating = own.is_floating_point()
    return tensor(own.shape, *(_FLOATS if floating else (own.dtype,)), finite=finite and floating)


def weights_of(model: nn.Module, *, finite: bool = True) -> Check:
    """Check for exactly the tensors of ``model``."""
    own = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}

    def check(value: Any, where: str) -> None:
        if not isinstance(value, Mapping):
            raise InvalidValue(where, f"is {shown(value)}, not a dict of tensors")
        differing = [name for name in own if getattr(value.get(name), "shape", own[name].shape) != own[name].shape]
        differing += [name for name in {**own, **value} if name not in own or name not in value]
        if differing:
            problem = f"has {len(differing)} tensors that differ from the configured model (first: "
            raise InvalidValue(where, f"{problem}{shown(differing[0])})", _RESUME_WITH["model"])
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
    """Check a saved optimizer state; return a function that copies its buffers, not hyperparameters, to ``optimizer``.

    Raises:
        InvalidValue: an entry cannot be used, or the groups have other numbers of parameters.
    """
    _SAVED(saved, where)
    groups, ours = saved["param_groups"], optimizer.state_dict()["param_groups"]
    counts, wanted = ([len(g["params"]) for g in part] for part in (groups, ours))
    if counts != wanted:
        problem = f"hold {shown(counts)} parameters, not {shown(wanted)}"
        raise InvalidValue(f"{where}.param_groups", problem, _RESUME_WITH["groups"])
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


#: What Adam and AdamW keep of each parameter.
_ADAM = ("step", "exp_avg", "exp_avg_sq")


def _slot(optimizer: Optimizer, parameter: Tensor, slot: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Copy one parameter's buffers; for SGD only momentum, the only one it reads."""
    out: dict[str, Any] = {}
    sgd, adam = isinstance(optimizer, SGD), isinstance(optimizer, (Adam, AdamW))
    if (sgd and slot.keys() >= set(_ADAM)) or (adam and not slot.keys() >= set(_ADAM)):
        raise InvalidValue(where, f"has no state of {type(optimizer).__name__}", _RESUME_WITH["optimizer"])
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
        if adam and name in ("step", "exp_avg_sq") and out[name].min() < 0:  # a root and a power are taken
            raise InvalidValue(f"{where}.{name}", "is negative")
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

SCALER = record(
    {
        "scale": POSITIVE,
        "growth_factor": POSITIVE,
        "backoff_factor": POSITIVE,
        "growth_interval": integer(1, MOST_ITERATIONS),
        "_growth_tracker": integer(0, MOST_ITERATIONS),
    }
)

#: [smooth, values, iteration, ...] of each scalar; see :meth:`gn_det.engine.scalars.EventLog.dump`.
_SCALAR = row(FLAG, items(NUMBER, 1, 1000), _COUNT, integer(0, MOST_ITERATIONS), NUMBER)
_LOGS = record(
    {
        "scalars": table(text(200, printable=True), _SCALAR, 10_000),
        "written": _COUNT,
        "lowest": optional(row(FINITE, _COUNT)),
    }
)


def set_stream(generator: Any, state: Any) -> None:
    """Set a generator of Python, numpy or torch, or that of the module, to a state from a checkpoint."""
    if isinstance(state, Tensor):
        generator.set_state(state)
    elif len(state) == 3:
        generator.setstate((state[0], tuple(state[1]), state[2]))
    else:  # numpy's words have 32 bits; the tensor has 64
        generator.set_state((state[0], state[1].numpy().astype(np.uint32), *state[2:]))


def _taken_by(make: Callable[[], Any], check: Check) -> Check:
    """Return a check that also tries the state on a new generator of that kind."""

    def both(value: Any, where: str) -> None:
        check(value, where)
        try:
            set_stream(make(), value)
        except Exception:  # python, numpy and torch raise many types
            raise InvalidValue(where, "is not a state of that random generator") from None

    return both


def _words(value: Any, where: str) -> None:
    tensor((624,), torch.int64)(value, where)
    if int(value.min()) < 0 or int(value.max()) >= 2**32:
        raise InvalidValue(where, "holds numbers of more than 32 bits")


def _cuda(value: Any, where: str) -> None:
    known = torch.cuda.is_available()
    (_taken_by(partial(torch.Generator, "cuda"), _BYTES) if known else _BYTES)(value, where)


_BYTES = tensor((None,), torch.uint8)
TORCH_RNG = _taken_by(torch.Generator, _BYTES)
_RNG = record(
    {
        "python": _taken_by(random.Random, row(one_of(3), items(ANYTHING, 625, 625), optional(FINITE))),
        "numpy": _taken_by(np.random.RandomState, row(text(20), _words, integer(0, 624), integer(0, 1), FINITE)),
        "torch": TORCH_RNG,
    },
    cuda=optional(_cuda),
)


def check_run(payload: Mapping[str, Any], model: nn.Module, batch: int, processes: int) -> None:
    """Check everything that a resumed detection run reads, except the optimizer (:func:`restore_slots`).

    Args:
        batch: SOLVER.IMS_PER_BATCH of the run.
        processes: of the run; random states for another number are not used.
    """
    weights, states = weights_of(model), payload.get("rng")
    of_this_run = isinstance(states, (list, tuple)) and len(states) == processes
    record(
        {"model": weights},
        iteration=_COUNT,
        gn_det=_BLOCK if isinstance(payload.get("gn_det"), dict) else ANYTHING,
        ema=or_nothing(record({"steps": integer(0, MOST_ITERATIONS), "learning": weights})),
        grad_scaler=or_nothing(SCALER),
        rng=optional(items(_RNG if of_this_run else ANYTHING, 0, 10**6)),
        logs=or_nothing(_LOGS),
    )(payload, "")
    _check_together(payload, batch)


def or_nothing(check: Check) -> Check:
    """Return a check that also accepts an empty dict or None for a missing entry."""

    def either(value: Any, where: str) -> None:
        if value is not None and value != {}:
            check(value, where)

    return either


def _check_together(payload: Mapping[str, Any], batch: int) -> None:
    """Refuse numbers beyond the checkpoint's iteration, which no run writes."""
    iteration, block, logs = payload.get("iteration", -1), payload.get("gn_det"), payload.get("logs") or {}
    block = block if isinstance(block, dict) else {}
    most = max(_LARGEST_BATCH, 64 * batch)
    if block.get("images_seen", 0) > (iteration + 1) * most:
        problem = f"is {block['images_seen']}: more than {most} images an iteration, with {iteration + 1} done"
        raise InvalidValue("gn_det.images_seen", problem)
    numbers = {f"gn_det.{name}": block.get(name, -1) for name in ("best_iteration", "evaluated_at")}
    numbers |= {f"logs.scalars[{shown(name)}][2]": entry[2] for name, entry in logs.get("scalars", {}).items()}
    numbers["logs.written"] = logs.get("written", -1) - 1  # the last evaluation is one beyond the last iteration
    for where, value in numbers.items():
        if value > iteration:
            raise InvalidValue(where, f"is beyond the checkpoint's iteration {iteration}")


def refuse(
    source: str, error: InvalidValue, remedy: str = "", doing: str = "resume from this checkpoint"
) -> WeightsError:
    """Return the user's error for an entry that cannot be used."""
    return WeightsError(f"{source}: cannot {doing}: {error}; {remedy or error.remedy or _REMEDY}")
