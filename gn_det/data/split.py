"""Hold out training images for validation: by image, seeded, stratified by class.

DATASETS.VAL_FRACTION holds out one part, DATASETS.VAL_FOLD one of K folds.

Both parts are written as json files to OUTPUT_DIR/split, so that every later command uses the same images.
"""

from __future__ import annotations

import json
import logging
import os
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from gn_det.data.annotations import whole
from gn_det.data.catalog import datasets_for
from gn_det.data.coco_json import read_json
from gn_det.errors import DataError
from gn_det.files import atomic_write, json_bytes
from gn_det.text import count, one_line, some

logger = logging.getLogger(__name__)


def split_keys(cfg: Any) -> Any:
    """Return a copy of ``cfg`` that names the two files of its split; ``cfg`` itself without one."""
    if not is_split(cfg):
        return cfg
    cfg = cfg.clone()
    cfg.defrost()
    data, folder = cfg.DATASETS, Path(os.path.abspath(os.path.expanduser(cfg.OUTPUT_DIR))) / "split"
    data.TRAIN_JSON, data.VAL_JSON = str(folder / "train.json"), str(folder / "val.json")
    data.VAL_IMAGES, data.VAL_FRACTION, data.VAL_FOLD = data.TRAIN_IMAGES, 0.0, (0, 0)
    return cfg


def is_split(cfg: Any) -> bool:
    """Whether ``cfg`` holds out a part of its training images."""
    return bool(cfg.DATASETS.VAL_FRACTION or cfg.DATASETS.VAL_FOLD[1])


def held_out(cfg: Any) -> float:
    """Return the fraction of the training images that is held out, about; 0 without a split."""
    folds = cfg.DATASETS.VAL_FOLD[1]
    return 1 / folds if folds else float(cfg.DATASETS.VAL_FRACTION)


@dataclass(frozen=True)
class _Division:
    """A json in two parts; ``held`` says of each entry of ``content["images"]`` whether it is for validation."""

    content: dict[str, Any]
    ids: list[str]  # as text, see :func:`_id`
    held: list[bool]
    what: str  # key and value that asked for it


def check_split(cfg: Any) -> None:
    """Refuse a split that cannot be made, without writing anything.

    Raises:
        DataError: as :func:`write_split`.
    """
    if is_split(cfg):
        _divide(cfg)


def _divide(cfg: Any) -> _Division:
    source, (fold, folds) = datasets_for(cfg, "train")[0], cfg.DATASETS.VAL_FOLD
    fraction = float(cfg.DATASETS.VAL_FRACTION)
    what = f"DATASETS.VAL_FOLD ({fold}, {folds})" if folds else f"DATASETS.VAL_FRACTION {fraction:g}"
    content = read_json(source.json_file, advice="give a COCO json")
    images, annotations = (content.get(key) if isinstance(content, dict) else None for key in ("images", "annotations"))
    if not isinstance(images, list) or not isinstance(annotations, list) or len(images) < 2:
        raise DataError(f"{source.json_file}: {what} needs COCO images (at least 2) and annotations")
    classes_of: dict[str, set[str]] = {}
    for a in annotations:
        if isinstance(a, dict) and not a.get("iscrowd"):
            classes_of.setdefault(_id(a, "image_id"), set()).add(_id(a, "category_id"))
    ids = [_id(image) for image in images]
    labels = [classes_of.get(i, set()) for i in ids]
    names = {_id(c): one_line(c.get("name", "?"), 60) for c in content.get("categories") or () if isinstance(c, dict)}
    sizes = Counter(chain(*labels))
    if folds:
        fewest, name = min(((number, names.get(i, i)) for i, number in sizes.items()), default=(len(images), ""))
        if fewest < folds:
            problem = f"class {name} is in {count(fewest, 'image')}" if name else f"there are {count(fewest, 'image')}"
            remedy = f"take {fewest} folds" if fewest > 1 else "add images of it, or remove the class"
            raise DataError(f"{source.json_file}: {problem}, too few for {folds} folds: {remedy}")
        held = [number == fold for number in fold_numbers(labels, folds)]
        remedy = "give --val-json, or fewer folds"
    else:
        held = stratified(labels, fraction, max(int(cfg.SEED), 0))
        remedy = "hold out more (--val-fraction), or give --val-json"
    seen = set(chain(*(found for found, is_held in zip(labels, held) if is_held)))
    lacking = {names.get(i, i): number for i, number in sizes.items() if i not in seen}
    _check_classes(lacking, any(held), f"{source.json_file}: {what}", remedy)
    return _Division(content, ids, held, what)


def _check_classes(lacking: dict[str, int], some_held: bool, where: str, remedy: str) -> None:
    """Refuse a split without some classes (name to number of images) in validation, unless they have only one image."""
    left = [name for name, number in lacking.items() if number > 1]
    single = [name for name, number in lacking.items() if number == 1]
    if left or not some_held:
        raise DataError(f"{where} leaves no validation image for {some(left) or 'any class'}; {remedy}")
    if single:
        logger.warning("%s: in only one image, kept for training (no AP): %s.", where, some(single))


def _id(entry: Any, key: str = "id") -> str:
    """The id of an entry as text, which is the same for 77 and 77.0."""
    value = whole(entry.get(key)) if isinstance(entry, dict) else None
    return str(value) if type(value) is int else json.dumps(value)


def write_split(cfg: Any, *, started: bool = False) -> Any:
    """Write the files of the split that DATASETS.VAL_FRACTION or VAL_FOLD asks for; returns :func:`split_keys`.

    The same json, fraction and SEED (0 where it is negative) give the same split; folds depend on the json alone.

    Args:
        started: a run in OUTPUT_DIR has trained on the split that is there; no image may change sides.

    Raises:
        DataError: the json cannot be read, a class would be left without validation images, or an image changes sides.
    """
    if not is_split(cfg):
        return cfg
    division = _divide(cfg)
    content, held = division.content, division.held
    out = split_keys(cfg)
    if started:
        _check_sides(out, division)
    val_ids = {i for i, is_held in zip(division.ids, held) if is_held}
    in_val = [_id(annotation, "image_id") in val_ids for annotation in content["annotations"]]
    for path, wanted in ((out.DATASETS.TRAIN_JSON, False), (out.DATASETS.VAL_JSON, True)):
        part = {
            **content,
            "images": [image for image, is_held in zip(content["images"], held) if is_held == wanted],
            "annotations": [a for a, is_held in zip(content["annotations"], in_val) if is_held == wanted],
        }
        os.makedirs(os.path.dirname(path), exist_ok=True)
        atomic_write(path, json_bytes(part))
    logger.info(
        "Split %s: %s for training, %d for validation (%s); written to %s.",
        *(datasets_for(cfg, "train")[0].json_file, count(held.count(False), "image"), held.count(True), division.what),
        os.path.dirname(out.DATASETS.TRAIN_JSON),
    )
    return out


def _check_sides(out: Any, division: _Division) -> None:
    """Refuse to validate on images that the run in the folder of ``out`` has trained on, or the other way round."""
    moved: set[str] = set()
    for path, side in ((out.DATASETS.TRAIN_JSON, False), (out.DATASETS.VAL_JSON, True)):
        if os.path.exists(path):
            before = {_id(image) for image in read_json(path)["images"]}
            moved |= before & {i for i, held in zip(division.ids, division.held) if held != side}
    if moved:
        raise DataError(
            f"{division.what}: {count(len(moved), 'image')} would change between training and validation while a run "
            "continues, because json, fraction or SEED are not those of its start; use those, or continue on its own "
            f"files: --train-json {out.DATASETS.TRAIN_JSON} --val-json {out.DATASETS.VAL_JSON}"
        )


def stratified(labels: Sequence[set[Any]], fraction: float, seed: int) -> list[bool]:
    """Choose images to hold out so that each class keeps its share (iterative stratification, Sechidis et al. 2011).

    Args:
        labels: the classes of each image; images without any form a class of their own.
        fraction: fraction of the images, in (0, 1); each side keeps at least one image.
    """
    total = min(max(round(fraction * len(labels)), 1), len(labels) - 1)
    order, images_of = _by_class(labels, seed)
    # A class with two images or more gets at least one; the only image of a class stays in training.
    wanted = {label: max(round(fraction * len(found)), 1) for label, found in images_of.items()}
    free = [all(len(images_of[label]) > 1 for label in found or {""}) for found in labels]
    held: set[int] = set()
    # Classes that share images need fewer; the last pass fills up the difference.
    for label, found in [*images_of.items(), (None, order)]:
        for i in found:
            if len(held) >= total or (label is not None and wanted[label] <= 0):
                break
            if i not in held and free[i]:
                held.add(i)
                for other in labels[i] or {""}:
                    wanted[other] -= 1
    return [i in held for i in range(len(labels))]


def _by_class(labels: Sequence[set[Any]], seed: int) -> tuple[list[int], dict[Any, list[int]]]:
    """The images in random order, and those of each class likewise, rarest class first; "" for images without any."""
    order = list(range(len(labels)))
    random.Random(seed).shuffle(order)
    images_of: dict[Any, list[int]] = {}
    for i in order:
        for label in labels[i] or {""}:
            images_of.setdefault(label, []).append(i)
    return order, dict(sorted(images_of.items(), key=lambda item: (len(item[1]), str(item[0]))))


def fold_numbers(labels: Sequence[set[Any]], folds: int) -> list[int]:
    """The fold (1 to ``folds``) of each image; every class is spread over the folds as evenly as it can be.

    Iterative stratification (Sechidis et al. 2011): the images of the rarest class come first, and each goes to the
    fold that lacks most of that class, of those to the one with fewest images.

    Args:
        labels: the classes of each image; images without any form a class of their own.
    """
    _, images_of = _by_class(labels, seed=0)
    lacking = {label: [len(found) / folds] * folds for label, found in images_of.items()}
    room, numbers = [len(labels) / folds] * folds, [0] * len(labels)
    for label, found in images_of.items():
        for i in found:
            if not numbers[i]:
                fold = max(range(folds), key=lambda f: (lacking[label][f], room[f], -f))
                numbers[i] = fold + 1
                room[fold] -= 1
                for other in labels[i] or {""}:
                    lacking[other][fold] -= 1
    return numbers
