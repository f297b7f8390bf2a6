"""Where datasets live: a name or a ``json@images`` pair becomes a :class:`DatasetSource`.

Builtin names and their places under ``$DETECTRON2_DATASETS`` (default ``./datasets``) are Detectron2's.
"""

from __future__ import annotations

import difflib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gn_det.errors import ConfigError

#: name -> (image folder, json), both below the datasets folder.
BUILTIN: dict[str, tuple[str, str]] = {
    "coco_2014_train": ("coco/train2014", "coco/annotations/instances_train2014.json"),
    "coco_2014_val": ("coco/val2014", "coco/annotations/instances_val2014.json"),
    "coco_2014_minival": ("coco/val2014", "coco/annotations/instances_minival2014.json"),
    "coco_2014_valminusminival": ("coco/val2014", "coco/annotations/instances_valminusminival2014.json"),
    "coco_2017_train": ("coco/train2017", "coco/annotations/instances_train2017.json"),
    "coco_2017_val": ("coco/val2017", "coco/annotations/instances_val2017.json"),
    "coco_2017_test": ("coco/test2017", "coco/annotations/image_info_test2017.json"),
    "coco_2017_test-dev": ("coco/test2017", "coco/annotations/image_info_test-dev2017.json"),
    "coco_2017_val_100": ("coco/val2017", "coco/annotations/instances_val2017_100.json"),
    "shapes_train": ("shapes/train/images", "shapes/train/instances.json"),
    "shapes_val": ("shapes/val/images", "shapes/val/instances.json"),
}

#: Generated on first use: name -> split of :func:`gn_det.data.shapes.make_shapes`.
GENERATED = {"shapes_train": "train", "shapes_val": "val"}


@dataclass(frozen=True)
class DatasetSource:
    """One COCO-format dataset on disk.

    Attributes:
        name: what logs and tables call it.
        json_file: annotations in COCO's instances format.
        image_root: folder that the json's ``file_name`` entries are relative to.
        origin: the key or variable to change when a path is wrong, for messages.
    """

    name: str
    json_file: str
    image_root: str
    origin: str = ""


def datasets_root() -> Path:
    """``$DETECTRON2_DATASETS``, or ``./datasets`` where it is not set."""
    return Path(os.environ.get("DETECTRON2_DATASETS") or "datasets").expanduser()


def resolve(name: str, origin: str = "DATASETS.TRAIN/TEST") -> DatasetSource:
    """The source behind a builtin name or a ``path/to.json@path/to/images`` pair.

    Raises:
        ConfigError: the name is neither; the message lists the nearest known name.
    """
    if ".json@" in name:
        json_file, images = name.split(".json@", 1)
        return DatasetSource(Path(json_file).name, f"{_user(json_file)}.json", _user(images), origin)
    if name in BUILTIN:
        images, json_file = BUILTIN[name]
        root = datasets_root()
        return DatasetSource(name, str(root / json_file), str(root / images), "DETECTRON2_DATASETS")
    near = difflib.get_close_matches(name, BUILTIN, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise ConfigError(
        f"{origin}: unknown dataset {name!r}; {hint}known are {', '.join(BUILTIN)}; own data is given as "
        f"path/to.json@path/to/images or by DATASETS.TRAIN_JSON and TRAIN_IMAGES (VAL_JSON, VAL_IMAGES)"
    )


def datasets_for(cfg: Any, split: str) -> list[DatasetSource]:
    """Sources of ``split`` ("train" or "test"): TRAIN_JSON / VAL_JSON where given, else DATASETS.TRAIN / TEST.

    Where the image folder is left empty, images are looked for beside the json. Files of the same name are told apart
    by their folders (``train_instances``, ``val_instances``): logs, metrics and result folders go by the name.
    """
    everywhere = {source.json_file: source for s in ("train", "test") for source in _sources(cfg, s)}
    names = _distinct_names(list(everywhere.values()))
    return [replace(source, name=names[source.json_file]) for source in _sources(cfg, split)]


def _distinct_names(sources: Sequence[DatasetSource]) -> dict[str, str]:
    """json file -> name, with as many parent folders in front as it takes to be unique (none, mostly)."""
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
    keys = {"train": ("TRAIN_JSON", "TRAIN_IMAGES", "TRAIN"), "test": ("VAL_JSON", "VAL_IMAGES", "TEST")}
    json_key, image_key, names_key = keys[split]
    data = cfg.DATASETS
    json_file, images = str(data[json_key]), str(data[image_key])
    if json_file:
        json_file = _user(json_file)
        images = _user(images) if images else str(Path(json_file).parent)
        flag = "train" if split == "train" else "val"
        origin = f"--{flag}-json and --{flag}-images (DATASETS.{json_key}, {image_key})"
        return [DatasetSource(Path(json_file).stem, json_file, images, origin)]
    if images:
        raise ConfigError(f"DATASETS.{image_key} is set without DATASETS.{json_key}: give the json of these images")
    names = data[names_key]
    names = (names,) if isinstance(names, str) else tuple(names)
    return [resolve(str(name), f"DATASETS.{names_key}") for name in names if name]


def prepare(source: DatasetSource) -> None:
    """Generate ``source`` where it is one of the generated sets and absent; do nothing otherwise."""
    split = GENERATED.get(source.name)
    if split is None or source.origin != "DETECTRON2_DATASETS":
        return
    from gn_det.data.shapes import make_shapes

    make_shapes(datasets_root() / "shapes", split)


def _user(path: str) -> str:
    return os.path.expanduser(path)
