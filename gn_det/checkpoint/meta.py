"""The ``gn_det`` block of a checkpoint: what prediction, evaluation and fine-tuning need besides tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gn_det.about import __version__
from gn_det.errors import WeightsError
from gn_det.files import StrPath
from gn_det.text import one_line

if TYPE_CHECKING:
    from fvcore.common.config import CfgNode

KEY = "gn_det"
# LVIS has 1,203 classes.
_MAX_CLASSES = 20_000
_MAX_NAME = 1000


def build_meta(cfg: CfgNode, class_names: Sequence[str], category_ids: Sequence[int], **extra: Any) -> dict[str, Any]:
    """Build the metadata block from plain values.

    Args:
        cfg: the resolved configuration, stored as YAML text of all its keys.
        class_names, category_ids: name and json id of each class, in the model's order.
        extra: further plain values, such as ``iteration`` (int) and ``best_metric`` (float or None).
    """
    from gn_det.config import dump_config

    return {
        "version": __version__,
        "class_names": [str(name) for name in class_names],
        "category_ids": [int(number) for number in category_ids],
        "config": dump_config(cfg),
        **extra,
    }


def config_of_checkpoint(path_or_uri: StrPath) -> CfgNode:
    """Return the configuration stored in one of our checkpoints, checked like a config file.

    Output folder, weights and device have their defaults.

    Raises:
        WeightsError: the file is unreadable or stores no configuration.
        ConfigError: the stored configuration has keys that this version does not know.
    """
    from gn_det.checkpoint.io import read_any
    from gn_det.checkpoint.weights_uri import local_path
    from gn_det.config import parse_config
    from gn_det.config.defaults import set_value
    from gn_det.config.schema import KEYS

    meta = read_meta(read_any(local_path(path_or_uri)), path_or_uri)
    if meta is None or not meta["config"]:
        raise WeightsError(f"{path_or_uri}: stores no config (not written by gn_det); name one with --config")
    cfg = parse_config(meta["config"], str(path_or_uri))
    for name in ("OUTPUT_DIR", "MODEL.WEIGHTS", "MODEL.DEVICE"):
        set_value(cfg, name, KEYS[name].default)
    return cfg


def read_meta(payload: Mapping[str, Any], source: StrPath = "") -> dict[str, Any] | None:
    """Return the metadata block of a checkpoint (from the file ``source``), or None if gn_det did not write it.

    Missing or ill-typed entries are returned empty, so callers can rely on ``version`` (str), ``class_names`` (tuple of
    str), ``category_ids`` (tuple of int), ``config`` (YAML text, "" if unknown), ``iteration`` (int or None),
    ``best_metric`` (float or None) and ``provenance`` (list of dicts).

    Raises:
        WeightsError: the block has other than plain values, or implausibly many class names.
    """
    block = payload.get(KEY)
    if not isinstance(block, dict):
        return None
    try:
        json.dumps(block)  # bounded by the readers, but may contain tensors and bytes
        names = names_of_classes(block.get("class_names"))
    except (TypeError, ValueError, WeightsError) as error:
        where = f"{one_line(str(source), 400)}: " if source else ""
        raise WeightsError(f"{where}its gn_det metadata cannot be used ({error}); they must be plain values") from None
    ids, iteration, best, config = (block.get(k) for k in ("category_ids", "iteration", "best_metric", "config"))
    steps = block.get("provenance")
    return {
        **block,
        "version": one_line(block.get("version", ""), 40),
        "class_names": names,
        "category_ids": tuple(ids) if isinstance(ids, (list, tuple)) and all(type(i) is int for i in ids) else (),
        "config": config if isinstance(config, str) else "",
        "iteration": iteration if type(iteration) is int else None,
        "provenance": [step for step in steps if isinstance(step, dict)] if isinstance(steps, (list, tuple)) else [],
        "best_metric": float(best) if isinstance(best, (int, float)) and not abs(best) > 2**63 else None,
    }


def names_of_classes(value: Any) -> tuple[str, ...]:
    """Return the class names of a file; () if they are not a list of strings.

    Raises:
        WeightsError: implausibly many or long names.
    """
    if not isinstance(value, (list, tuple)) or not all(isinstance(name, str) for name in value):
        return ()
    longest = max(map(len, value), default=0)
    if len(value) > _MAX_CLASSES or longest > _MAX_NAME:
        limit = f"at most {_MAX_CLASSES} of {_MAX_NAME} characters are read"
        raise WeightsError(f"has {len(value)} class names, the longest of {longest} characters; {limit}")
    return tuple(value)
