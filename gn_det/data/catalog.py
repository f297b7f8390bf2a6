"""Resolve a dataset name or a ``json@images`` pair to a :class:`DatasetSource`.

Built-in names and their paths under ``$DETECTRON2_DATASETS`` (default ``./datasets``) are Detectron2's.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from gn_det.errors import ConfigError
from gn_det.text import did_you_mean, shown


class Builtin(NamedTuple):
    """A published set: image folder and json below the datasets folder, and how many images and classes it has."""

    images: str
    json_file: str
    num_images: int = 0
    num_classes: int = 80


def _coco(images: str, json_name: str, num_images: int = 0) -> Builtin:
    return Builtin(f"coco/{images}", f"coco/annotations/{json_name}.json", num_images)


BUILTIN: dict[str, Builtin] = {
    "coco_2014_train": _coco("train2014", "instances_train2014", 82783),
    "coco_2014_val": _coco("val2014", "instances_val2014", 40504),
    "coco_2014_minival": _coco("val2014", "instances_minival2014", 5000),
    "coco_2014_valminusminival": _coco("val2014", "instances_valminusminival2014", 35504),
    "coco_2017_train": _coco("train2017", "instances_train2017", 118287),
    "coco_2017_val": _coco("val2017", "instances_val2017", 5000),
    "coco_2017_test": _coco("test2017", "image_info_test2017"),
    "coco_2017_test-dev": _coco("test2017", "image_info_test-dev2017"),
    "coco_2017_val_100": _coco("val2017", "instances_val2017_100", 100),
    "shapes_train": Builtin("shapes/train/images", "shapes/train/instances.json", 600, 5),
    "shapes_val": Builtin("shapes/val/images", "shapes/val/instances.json", 100, 5),
}

#: Generated on first use: name -> split of :func:`gn_det.data.shapes.make_shapes`.
GENERATED = {"shapes_train": "train", "shapes_val": "val"}


@dataclass(frozen=True)
class DatasetSource:
    """One COCO-format dataset on disk."""

    name: str  # its name in logs and tables
    json_file: str  # annotations in COCO's instances format
    image_root: str  # folder that the json's ``file_name`` entries are relative to
    origin: str = ""  # for messages: the key or variable to change when a path is wrong


def datasets_root() -> Path:
    """Return ``$DETECTRON2_DATASETS``, or ``./datasets`` if it is not set."""
    return Path(os.environ.get("DETECTRON2_DATASETS") or "datasets").expanduser()


def resolve(name: str, origin: str = "DATASETS.TRAIN/TEST") -> DatasetSource:
    """Return the source for a built-in name or a ``path/to.json@path/to/images`` pair.

    Raises:
        ConfigError: the name is neither; the message suggests the nearest known name.
    """
    if ".json@" in name:
        json_file, images = name.split(".json@", 1)
        path = os.path.expanduser(f"{json_file}.json")
        return DatasetSource(Path(path).stem, path, os.path.expanduser(images), origin)
    if name in BUILTIN:
        root, builtin = datasets_root(), BUILTIN[name]
        return DatasetSource(name, str(root / builtin.json_file), str(root / builtin.images), "DETECTRON2_DATASETS")
    raise ConfigError(
        f"{origin}: unknown dataset {shown(name)}{did_you_mean(name, BUILTIN)}; known are {', '.join(BUILTIN)}; "
        f"give your own data as path/to.json@path/to/images, or in DATASETS.TRAIN_JSON and TRAIN_IMAGES (VAL_JSON ...)"
    )


def datasets_for(cfg: Any, split: str) -> list[DatasetSource]:
    """Return the sources of ``split`` ("train" or "test"): TRAIN_JSON / VAL_JSON if given, else DATASETS.TRAIN / TEST.

    Without an image folder, images are expected beside the json. Files of the same name get their folder as a prefix
    (``train_instances``, ``val_instances``), because logs, metrics and result folders use the name.
    """
    everywhere = {source.json_file: source for s in ("train", "test") for source in _sources(cfg, s)}
    names = _distinct_names(list(everywhere.values()))
    return [replace(source, name=names[source.json_file]) for source in _sources(cfg, split)]


def _distinct_names(sources: Sequence[DatasetSource]) -> dict[str, str]:
    """Map each json file to a unique name, prefixed with parent folders as needed."""
    names = {source.json_file: source.name for source in sources}
    deepest = max((len(Path(s.json_file).parts) for s in sources), default=0)
    for depth in range(1, deepest):
        shared = [name for name, count in Counter(names.values()).items() if count > 1]
        for source in sources:
            if names[source.json_file] in shared:
                folders = Path(source.json_file).parts[:-1]
                names[source.json_file] = "_".join((*(f for f in folders[-depth:] if f != "/"), source.name))
    return names


def _sources(cfg: Any, split: str) -> list[DatasetSource]:
    key, names_key = ("TRAIN", "TRAIN") if split == "train" else ("VAL", "TEST")
    json_file, images = (os.path.expanduser(str(cfg.DATASETS[f"{key}_{what}"])) for what in ("JSON", "IMAGES"))
    if json_file:
        flag = key.lower()
        origin = f"--{flag}-json and --{flag}-images (DATASETS.{key}_JSON, {key}_IMAGES)"
        path = Path(json_file)
        return [DatasetSource(path.stem, json_file, images or str(path.parent), origin)]
    if images:
        raise ConfigError(f"DATASETS.{key}_IMAGES is set without DATASETS.{key}_JSON: give the json of these images")
    names = cfg.DATASETS[names_key]
    names = (names,) if isinstance(names, str) else names
    return [resolve(str(name), f"DATASETS.{names_key}") for name in names if name]
