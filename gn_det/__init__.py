"""gn_det: fine-tune Mask R-CNN with Group Normalization."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import warnings
from types import CodeType, ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

from gn_det.about import __version__

if TYPE_CHECKING:
    from gn_det.api import Model, load_model
    from gn_det.config import load_config
    from gn_det.engine.loop import Hook
    from gn_det.engine.run import evaluate, train
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
    **dict.fromkeys(("Model", "load_model"), "gn_det.api"),
    **dict.fromkeys(("evaluate", "train"), "gn_det.engine.run"),
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


class _Moved(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Imports or runs (``python -m``) modules by names that they had before, with a DeprecationWarning or a note."""

    names: ClassVar[dict[str, str]] = {
        "gn_det.draw": "gn_det.visualize.draw",
        "gn_det.evaluation.coco": "gn_det.evaluation.coco_eval",
        "gn_det.engine.predictor": "gn_det.prediction.images",
        "gn_det.predict": "gn_det.prediction.images",
        "gn_det.pretrain": "gn_det.classification",
        "gn_det.run": "gn_det.engine",
        "gn_det.run.replay": "gn_det.engine.nonfinite",
    }

    def find_spec(self, fullname: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(fullname, self) if fullname in self.names else None

    def exec_module(self, module: ModuleType) -> None:
        new = self.names[module.__name__]
        warnings.warn(f"{module.__name__} is now {new}", DeprecationWarning, stacklevel=2)
        sys.modules[module.__name__] = importlib.import_module(new)

    def get_code(self, fullname: str) -> CodeType | None:
        new = self.names[fullname]
        print(f"note: {fullname} is now {new}", file=sys.stderr)
        spec = importlib.util.find_spec(new)
        return spec.loader.get_code(new) if spec and isinstance(spec.loader, importlib.abc.InspectLoader) else None

    def get_source(self, fullname: str) -> None:
        """None: it is found under the new name."""


sys.meta_path.append(_Moved())


def config_file(name: str) -> str:
    """Absolute path of a shipped config, such as ``"gn_fpn_long.yaml"``.

    Raises:
        ConfigError: no shipped config has that name; the message lists those that exist.
    """
    from gn_det.config.load import shipped_config

    return os.fspath(shipped_config(name))
