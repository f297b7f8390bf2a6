"""Recognize folders exported in COCO format: Roboflow, CVAT, Label Studio and COCO itself."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from gn_det.errors import DataError
from gn_det.text import shown

#: Words in the name of a json or its folder that indicate a split.
_SPLITS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
#: Other annotation files in COCO's own download.
_OTHERS = ("captions", "person_keypoints", "stuff", "panoptic", "image_info")
#: How many entries of a folder, and bytes of a json, are inspected.
_MOST_ENTRIES, _HEAD = 100_000, 1 << 20
_FILE_NAME = re.compile(rb'"file_name"\s*:\s*("(?:[^"\\]|\\.)*")')


def find_layout(folder: str | os.PathLike[str]) -> dict[str, str]:
    """Return the DATASETS keys for the annotations and images below ``folder``; no VAL_JSON if there is only one json.

    Raises:
        DataError: not a folder, no COCO json for training, more than one for a split, or images not found.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise DataError(f"--data {root}: is not a folder; give the folder that your annotation tool exported")
    found: dict[str, Path] = {}
    for path in _json_files(root):
        split = _split_of(path, root)
        if split in found:
            raise DataError(
                f"--data {root}: both {found[split].relative_to(root)} and {path.relative_to(root)} may be the "
                f"{split or 'only'} annotations; name one with --train-json or --val-json"
            )
        found[split] = path
    train = found.get("train") or found.get("")
    if train is None:
        raise DataError(
            f"--data {root}: no COCO json for training in it or in its folders; export COCO format, such as "
            "train/_annotations.coco.json, annotations/instances_train.json or result.json"
        )
    keys = {"DATASETS.TRAIN_JSON": str(train), "DATASETS.TRAIN_IMAGES": _images_of(train, root, "train")}
    val = found.get("val") or (found.get("test") if "train" in found else None)
    if val is not None:
        keys |= {"DATASETS.VAL_JSON": str(val), "DATASETS.VAL_IMAGES": _images_of(val, root, "val")}
    return keys


def _json_files(root: Path) -> Iterator[Path]:
    """Yield COCO files in ``root`` and its direct subfolders."""
    for folder in (root, *sorted(p for p in _entries(root) if p.is_dir())):
        for path in sorted(_entries(folder)):
            if path.suffix.lower() == ".json" and not path.name.startswith(_OTHERS) and path.is_file():
                head = _head(path)
                if b'"images"' in head or b'"annotations"' in head or b'"categories"' in head:
                    yield path


def _entries(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        return [Path(entry.path) for entry, _ in zip(entries, range(_MOST_ENTRIES))]


def _head(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(_HEAD)


def _split_of(path: Path, root: Path) -> str:
    """Return "train", "val" or "test" by words in the file name, or else the folder name; "" if there are none."""
    for name in (path.stem, path.parent.name if path.parent != root else ""):
        words = re.findall("[a-z]+", name.lower())
        for split, names in _SPLITS.items():
            if any(word in names for word in words):
                return split
    return ""


def _images_of(path: Path, root: Path, split: str) -> str:
    """Return the folder that the first ``file_name`` of a json is relative to."""
    match = _FILE_NAME.search(_head(path))
    if match is None:
        raise DataError(f"{path}: no image has a file_name; export the annotations in COCO format")
    name = str(json.loads(match[1])).replace("\\", "/").lstrip("/")
    folders = [path.parent, root, root / "images", path.parent / "images"]
    for parent in (root / "images", root):
        if parent.is_dir():
            split_folders = (p for p in _entries(parent) if p.is_dir() and _split_of(p / "x", parent) in (split, ""))
            folders += sorted(split_folders)
    for images in folders:
        if (images / name).is_file():
            return str(images)
    raise DataError(
        f"{path}: its first image {shown(name)} is in none of {', '.join(str(f) for f in folders[:6])}; export the "
        "images too, or name their folder with --train-images or --val-images"
    )
