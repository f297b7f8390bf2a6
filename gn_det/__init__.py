"""gn_det: fine-tune Mask R-CNN with Group Normalization."""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from gn_det.about import __version__

if TYPE_CHECKING:
    from gn_det.api import Model, Result, evaluate, load_model, train
    from gn_det.config import load_config
    from gn_det.engine.loop import Hook
    from gn_det.norm import GroupNorm

__all__ = [
    "GroupNorm",
    "Hook",
    "Model",
    "Result",
    "__version__",
    "config_file",
    "evaluate",
    "load_config",
    "load_model",
    "train",
]

#: Module of each name that is imported when it is first used: they need torch, which ``import gn_det`` does not load.
_ON_USE = {
    **dict.fromkeys(("Model", "Result", "evaluate", "load_model", "train"), "gn_det.api"),
    "GroupNorm": "gn_det.norm",
    "Hook": "gn_det.engine.loop",
    "load_config": "gn_det.config",
}


def __getattr__(name: str) -> Any:
    if name not in _ON_USE:
        raise AttributeError(f"module 'gn_det' has no attribute '{name}'")
    value = getattr(importlib.import_module(_ON_USE[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def config_file(name: str) -> str:
    """Absolute path of a shipped config, such as ``"gn_fpn_long.yaml"``.

    Raises:
        ConfigError: no shipped config has that name; the message lists those that exist.
    """
    from gn_det.config.load import shipped_config

    return os.fspath(shipped_config(name))
