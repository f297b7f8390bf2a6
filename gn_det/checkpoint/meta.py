"""The ``gn_det`` block of a checkpoint: what predict, evaluation and fine-tuning must know beyond the tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import gn_det
from gn_det.errors import WeightsError
from gn_det.files import StrPath
from gn_det.text import one_line

if TYPE_CHECKING:
    from fvcore.common.config import CfgNode

KEY = "gn_det"
#: A model of more classes would need gigabytes for its predictors alone.
_MOST_CLASSES = 1 << 15
_LONGEST_NAME = 1000


def build_meta(cfg: CfgNode, class_names: Sequence[str], category_ids: Sequence[int], **extra: Any) -> dict[str, Any]:
    """The metadata block, of plain values alone.

    Args:
        cfg: the resolved configuration; stored as the YAML text of all its keys.
        class_names: one name per class, in the model's order.
        category_ids: the json category id of each class, in the same order.
        extra: further plain values, such as ``iteration`` (int) and ``best_metric`` (float or None).
    """
    from gn_det.config import dump_config

    if len(class_names) != len(category_ids):
        raise ValueError(f"{len(class_names)} class names but {len(category_ids)} category ids")
    return {
        "version": gn_det.__version__,
        "class_names": [str(name) for name in class_names],
        "category_ids": [int(number) for number in category_ids],
        "config": dump_config(cfg),
        **extra,
    }


def config_of_checkpoint(path_or_uri: StrPath) -> CfgNode:
    """The configuration stored in one of our checkpoints, checked as a config file is.

    What belongs to the machine and the run that wrote it has its default: :data:`NOT_OF_THE_FILE`.

    Raises:
        WeightsError: unreadable file, or one that stores no configuration.
        ConfigError: the stored configuration has keys that this version does not know.
    """
    from gn_det.checkpoint.catalog import local_path
    from gn_det.checkpoint.sources import read_any
    from gn_det.config import parse_config

    meta = read_meta(read_any(local_path(path_or_uri)))
    if meta is None or not meta["config"]:
        raise WeightsError(f"{path_or_uri}: stores no config (not written by gn_det); name one with --config")
    return without_places(parse_config(meta["config"], str(path_or_uri)))


#: Keys that a stored config does not decide: where files are written, what else is loaded, and on which device.
NOT_OF_THE_FILE = ("OUTPUT_DIR", "MODEL.WEIGHTS", "MODEL.DEVICE")


def without_places(cfg: CfgNode) -> CfgNode:
    """``cfg`` after its :data:`NOT_OF_THE_FILE` were set to their defaults: a file must not choose where we write."""
    from gn_det.config import get_cfg

    default = get_cfg()
    for key in NOT_OF_THE_FILE:
        *sections, name = key.split(".")
        node, other = cfg, default
        for section in sections:
            node, other = node[section], other[section]
        node[name] = other[name]
    return cfg


def read_meta(payload: Mapping[str, Any]) -> dict[str, Any] | None:
    """The metadata block of a checkpoint, or None when the file is not gn_det's.

    Missing, ill-typed or absurdly large entries come back empty, so that callers can rely on ``version`` (str),
    ``class_names`` (tuple of str), ``category_ids`` (tuple of int), ``config`` (YAML text, "" when unknown),
    ``iteration`` (int or None) and ``best_metric`` (float or None).
    """
    block = payload.get(KEY)
    if not isinstance(block, dict):
        return None
    names, ids = block.get("class_names"), block.get("category_ids")
    good_names = _is_list_of(names, lambda n: isinstance(n, str) and len(n) <= _LONGEST_NAME)
    good_ids = _is_list_of(ids, lambda i: isinstance(i, int) and abs(i) < 2**63)
    iteration, best, config = block.get("iteration"), block.get("best_metric"), block.get("config")
    version = block.get("version")
    return {
        **block,
        "version": one_line(version) if isinstance(version, str) else "",
        "class_names": tuple(names) if good_names and names is not None else (),
        "category_ids": tuple(ids) if good_ids and ids is not None else (),
        "config": config if isinstance(config, str) else "",
        "iteration": iteration if isinstance(iteration, int) and abs(iteration) < 2**63 else None,
        "best_metric": float(best) if isinstance(best, (int, float)) and abs(best) < 2**63 else None,
    }


def _is_list_of(value: Any, holds: Callable[[Any], bool]) -> bool:
    return isinstance(value, (list, tuple)) and len(value) <= _MOST_CLASSES and all(map(holds, value))
