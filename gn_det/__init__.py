"""gn_det: fine-tune Mask R-CNN with Group Normalization."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import os
import sys
import warnings
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

from gn_det.about import __version__

if TYPE_CHECKING:
    from gn_det.api import Model, evaluate, load_model, train
    from gn_det.config import load_config
    from gn_det.engine.loop import Hook
    from gn_det.norm import GroupNorm
    from gn_det.result import Result

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
    **dict.fromkeys(("Model", "evaluate", "load_model", "train"), "gn_det.api"),
    "GroupNorm": "gn_det.norm",
    "Hook": "gn_det.engine.loop",
    "Result": "gn_det.result",
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


class _Moved(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports modules that moved by their old names, with a DeprecationWarning."""

    names: ClassVar[dict[str, str]] = {
        "gn_det.draw": "gn_det.visualize.draw",
        "gn_det.evaluation.coco": "gn_det.evaluation.coco_eval",
        "gn_det.predict": "gn_det.engine.predictor",
        "gn_det.pretrain": "gn_det.classification",
    }

    def find_spec(self, fullname: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(fullname, self) if fullname in self.names else None

    def exec_module(self, module: ModuleType) -> None:
        new = self.names[module.__name__]
        warnings.warn(f"{module.__name__} is now {new}", DeprecationWarning, stacklevel=2)
        sys.modules[module.__name__] = importlib.import_module(new)


sys.meta_path.append(_Moved())


def config_file(name: str) -> str:
    """Absolute path of a shipped config, such as ``"gn_fpn_long.yaml"``.

    Raises:
        ConfigError: no shipped config has that name; the message lists those that exist.
    """
    from gn_det.config.load import shipped_config

    return os.fspath(shipped_config(name))
