"""What an earlier ``gn-det classify`` left in its folder: refuse it, delete it, resume it, or return its summary."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from gn_det.checkpoint.io import read_checkpoint
from gn_det.classification.classifier_loop import LAST, METRICS, Progressed
from gn_det.classification.settings import Settings
from gn_det.engine import dist
from gn_det.engine.output import BEST, FINAL
from gn_det.engine.payload import MOST_ITERATIONS, SCALER, or_nothing, refuse, restore_slots, weights_of
from gn_det.engine.state import TrainState
from gn_det.errors import ConfigError, TrainingError, WeightsError
from gn_det.files import open_regular
from gn_det.text import count, shown
from gn_det.values import NUMBER, InvalidValue, every, integer, items, optional, record, table, text

SUMMARY = "summary.json"
_MOST_BYTES = 64 << 20
#: May differ between a run and its continuation.
_FREE = ("workers", "device", "output")


def refuse_old(folder: Path, overwrite: bool) -> list[Path]:
    """Return the files of an earlier run; raise TrainingError if there are any, unless ``overwrite``."""
    there = [folder / name for name in (SUMMARY, LAST, METRICS, FINAL, BEST) if (folder / name).exists()]
    if there and not overwrite:
        raise TrainingError(
            f"{folder} holds an earlier run ({there[0].name}): continue it with --resume, replace it with --overwrite, "
            "or choose another --output"
        )
    return [*there, *folder.glob("events.out.tfevents.*")]


# ------------------------------------------------------------ checks


def _setting(value: Any, where: str) -> None:
    """A plain value of a setting, or a list of numbers."""
    if isinstance(value, (list, tuple)):
        items(NUMBER, 0, 1000)(value, where)
    elif isinstance(value, str):
        text(10_000)(value, where)
    elif value is not None and not isinstance(value, bool):
        NUMBER(value, where)


_COUNT = integer(0, MOST_ITERATIONS)
_SETTINGS = table(text(100), _setting, 1000)
_METRICS = table(text(200, printable=True), NUMBER, 1000)
_NUMBERS = ("train_loss", "train_error", "val_error", "lr", "seconds_per_iteration", "inference_seconds_per_image")
_ROW = every(_METRICS, record({"epoch": integer(1, MOST_ITERATIONS), **dict.fromkeys(_NUMBERS, NUMBER)}))
_RECORDED = items(every(_METRICS, record({"epoch": NUMBER})), 0, 10**6)
_DONE = record(
    {
        "epochs": _COUNT,
        "curve": items(_ROW, 0, 10**6),
        "best": or_nothing(every(_METRICS, record({"epoch": _COUNT, "val_error": NUMBER}))),
        "peak_memory_mb": NUMBER,
    },
    recorded=_RECORDED,  # absent in versions before it
)
_MEASURED = ("seconds_per_iteration", "peak_memory_mb", "inference_seconds_per_image", "parameters")
_SUMMARY = record(
    {"settings": _SETTINGS, "top1_error": NUMBER, "curve": items(_ROW, 1, 10**6)},
    **dict.fromkeys(_MEASURED, optional(NUMBER)),
    recorded=_RECORDED,
)


def _check_settings(path: Path, theirs: Mapping[str, Any], settings: Settings) -> None:
    for name, value in settings.to_dict().items():
        old = theirs.get(name, getattr(Settings, name, None))  # of a version before this setting: its default
        old = list(old) if isinstance(old, tuple) else old
        if name not in _FREE and old != value:
            raise ConfigError(
                f"{path}: was started with {name} {shown(old)}, not {value!r}; use that value to resume, or start "
                "a new run with --overwrite"
            )


# ------------------------------------------------------------ reading


def restore(path: Path, settings: Settings, state: TrainState) -> Progressed:
    """Put weights, momentum and loss scale of ``last.ckpt`` into ``state``; return what the run has done.

    Raises:
        ConfigError: the run was started with other settings, or another number of processes.
        WeightsError: the file cannot be used.
    """
    payload, processes = read_checkpoint(path, verify=True), dist.world_size()
    try:
        record({"settings": _SETTINGS, "processes": integer(1, 10**6)})(payload, "")
        _check_settings(path, payload["settings"], settings)
        if payload["processes"] != processes:
            raise ConfigError(
                f"{path}: was trained by {count(payload['processes'], 'process', 'processes')}, not {processes}, so "
                "the batch would change; resume with as many, or start over with --overwrite"
            )
        record({"model": weights_of(state.model), "done": _DONE}, scaler=or_nothing(SCALER))(payload, "")
        done = Progressed(**{f.name: payload["done"][f.name] for f in fields(Progressed) if f.name in payload["done"]})
        if len(done.curve) != done.epochs or (done.epochs and not done.best):
            raise InvalidValue("done.curve", f"has {len(done.curve)} rows, not one for each of {done.epochs} epochs")
        put_momentum = restore_slots(state.optimizer, payload.get("optimizer"), "optimizer")
    except InvalidValue as error:
        raise refuse(str(path), error, "start over with --overwrite") from None
    state.model.load_state_dict(dict(payload["model"]))
    put_momentum()
    if payload.get("scaler"):
        state.scaler.load_state_dict(payload["scaler"])
    return done


def settings_of(folder: Path) -> dict[str, Any]:
    """The settings of the run in ``folder``; empty where none can be read."""
    try:
        found = (_read_summary(folder) or read_checkpoint(folder / LAST, mmap=True))["settings"]
        _SETTINGS(found, "settings")
    except (WeightsError, KeyError, InvalidValue):
        return {}
    return dict(found)


def _read_summary(folder: Path) -> dict[str, Any] | None:
    """The checked content of ``summary.json``; None where it is missing or invalid."""
    try:
        with open_regular(folder / SUMMARY) as file:
            summary = json.loads(file.read(_MOST_BYTES))
        _SUMMARY(summary, "")
    except (OSError, ValueError, RecursionError):  # InvalidValue is a ValueError
        return None
    return dict(summary)


def finished(folder: Path, settings: Settings) -> dict[str, Any] | None:
    """Return the summary of a finished run, or None; raise ConfigError if it has other settings."""
    if (summary := _read_summary(folder)) is None:
        return None
    _check_settings(folder / SUMMARY, summary["settings"], settings)
    return summary if (folder / FINAL).is_file() else None
