"""Run a script that uses Detectron2's ``get_cfg()``, such as those in Detectron2's ``tools``::

    python -m gn_det.detectron2 analyze_model.py --config-file gn_fpn.yaml --tasks parameter

Only in that process and those it starts, ``get_cfg()`` returns a config with gn_det's keys
(:func:`gn_det.detectron2.add_gn_config`), and gn_det's modules and datasets are registered. ``import
gn_det.detectron2`` alone changes no default of Detectron2. The script is a file, or a name in the ``tools`` folder
beside Detectron2's package. ``--config-file`` also accepts the bare name of a shipped config.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import detectron2
import detectron2.config
from detectron2.data import DatasetCatalog

from gn_det.config.load import resolve_config
from gn_det.data.catalog import resolve
from gn_det.detectron2 import add_gn_config
from gn_det.detectron2.datasets import enter
from gn_det.errors import ConfigError, UserError

_USAGE = "usage: python -m gn_det.detectron2 TOOL.py [ARGUMENTS OF THE TOOL]"

#: Environment variable that names the script to the processes of a tool.
_TOOL = "_GN_DET_TOOL"


def extend_get_cfg() -> None:
    """Make ``detectron2.config.get_cfg`` add gn_det's keys, in this process."""
    module = sys.modules["detectron2.config.config"]
    stock = module.get_cfg

    def get_cfg() -> detectron2.config.CfgNode:
        """Return Detectron2's defaults and gn_det's keys."""
        cfg = stock()
        add_gn_config(cfg)
        return cfg

    module.get_cfg = detectron2.config.get_cfg = get_cfg  # type: ignore[attr-defined]


def register_on_demand() -> None:
    """Make Detectron2's catalog find ``path/to.json@path/to/images`` names, in this process."""

    def missing(catalog: Any, name: str) -> Any:
        if ".json@" not in name:
            raise KeyError(name)
        enter(name, resolve(name, "DATASETS"))
        return catalog.data[name]

    type(DatasetCatalog).__missing__ = missing


def find_tool(name: str) -> Path:
    """Return the script of that name, a file or one beside Detectron2's package, or raise ConfigError."""
    beside = Path(os.path.abspath(detectron2.__file__)).parent.parent / "tools"
    for path in (Path(name), beside / name, beside / f"{name}.py"):
        if path.is_file():
            return path
    where = f"nor in {beside}" if beside.is_dir() else "and this Detectron2 is not installed from a checkout"
    raise ConfigError(f"tool {name!r} is neither a file {where}: name the script by its path")


def tool_words(words: list[str]) -> list[str]:
    """Return the tool's arguments, with the name of a config after ``--config-file`` replaced by its path."""
    out: list[str] = []
    for word in words:
        flag = "" if out[-1:] == ["--config-file"] else "--config-file="
        name = word.removeprefix(flag)
        if word.startswith(flag) and name.endswith((".yaml", ".yml")):
            word = f"{flag}{resolve_config(name)}"
        out.append(word)
    return out


if __name__ in ("__main__", "__mp_main__"):
    try:
        if __name__ == "__main__":
            if len(sys.argv) < 2 or sys.argv[1] in ("-h", "--help"):
                print(_USAGE)
                raise SystemExit(0 if len(sys.argv) > 1 else 2)
            sys.argv = [os.fspath(find_tool(sys.argv[1])), *tool_words(sys.argv[2:])]
            os.environ[_TOOL] = sys.argv[0]
        extend_get_cfg()
        register_on_demand()
        # Run in this module, so that processes started by the script find its functions.
        exec(compile(Path(os.environ[_TOOL]).read_bytes(), os.environ[_TOOL], "exec"))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
