"""Default config from the schema, and access to values by dotted key."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from fvcore.common.config import CfgNode as CN

from gn_det.config.schema import KEYS


def get_cfg() -> CN:
    """Return a new, mutable config with all keys at their defaults."""
    cfg = CN()
    for name, key in KEYS.items():
        _add(cfg, name, key.default)
    return cfg


def add_gn_keys(cfg: CN) -> None:
    """Add gn_det's own keys to a config of Detectron2."""
    for name, key in KEYS.items():
        if key.ours:
            _add(cfg, name, key.default)


def _add(cfg: CN, name: str, default: Any) -> None:
    *sections, last = name.split(".")
    for section in sections:
        cfg = cfg.setdefault(section, type(cfg)())
    cfg[last] = copy.deepcopy(default)


def edited(cfg: CN, values: Mapping[str, Any] | None = None) -> CN:
    """Return a copy of ``cfg`` that is not frozen, with other ``values`` of dotted keys."""
    out = cfg.clone()
    out.defrost()
    for name, value in (values or {}).items():
        set_value(out, name, value)
    return out


def as_lists(value: Any) -> Any:
    """Return ``value`` with tuples, also nested ones, as lists, to compare values of YAML, Python and checkpoints."""
    return list(map(as_lists, value)) if isinstance(value, (list, tuple)) else value


def get_value(cfg: Any, name: str) -> Any:
    """Return the value or section of a dotted key, or None."""
    for part in name.split("."):
        if not isinstance(cfg, Mapping) or part not in cfg:
            return None
        cfg = cfg[part]
    return cfg


def set_value(cfg: CN, name: str, value: Any) -> None:
    """Set a dotted key; its section must exist."""
    section, _, last = name.rpartition(".")
    (get_value(cfg, section) if section else cfg)[last] = value


def flatten(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield dotted keys and values of nested sections."""
    for name, value in node.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
