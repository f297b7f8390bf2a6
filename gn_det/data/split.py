"""Hold out training images for validation (DATASETS.VAL_FRACTION): by image, seeded, stratified by class.

Both parts are written as json files to OUTPUT_DIR/split, so that every later command uses the same images.
"""

from __future__ import annotations

import json
import logging
import os
import random
from collections import Counter
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

from gn_det.data.catalog import datasets_for
from gn_det.data.coco_json import read_json
from gn_det.errors import DataError
from gn_det.files import atomic_write, json_bytes
from gn_det.text import count, one_line, some

logger = logging.getLogger(__name__)


def split_keys(cfg: Any) -> Any:
    """Return a copy of ``cfg`` with the two files of its split; ``cfg`` itself without DATASETS.VAL_FRACTION."""
    if not cfg.DATASETS.VAL_FRACTION:
        return cfg
    cfg = cfg.clone()
    cfg.defrost()
    data, folder = cfg.DATASETS, Path(os.path.abspath(os.path.expanduser(cfg.OUTPUT_DIR))) / "split"
    data.TRAIN_JSON, data.VAL_JSON = str(folder / "train.json"), str(folder / "val.json")
    data.VAL_IMAGES, data.VAL_FRACTION = data.TRAIN_IMAGES, 0.0
    return cfg


def write_split(cfg: Any) -> Any:
    """Write the files of the DATASETS.VAL_FRACTION split and return :func:`split_keys`.

    The same json, fraction and SEED (0 if negative) give the same split.

    Raises:
        DataError: the json cannot be read, or a class would be left without validation images.
    """
    fraction = float(cfg.DATASETS.VAL_FRACTION)
    if not fraction:
        return cfg
    source = datasets_for(cfg, "train")[0]
    content = read_json(source.json_file, advice="give a COCO json")
    images, annotations = (content.get(key) if isinstance(content, dict) else None for key in ("images", "annotations"))
    if not isinstance(images, list) or not isinstance(annotations, list) or len(images) < 2:
        raise DataError(f"{source.json_file}: DATASETS.VAL_FRACTION needs COCO images (at least 2) and annotations")
    classes_of: dict[Any, set[Any]] = {}
    for a in annotations:
        if isinstance(a, dict) and isinstance(a.get("image_id"), Hashable) and not a.get("iscrowd"):
            classes_of.setdefault(a["image_id"], set()).add(json.dumps(a.get("category_id")))
    ids = [image.get("id") if isinstance(image, dict) else None for image in images]
    labels = [classes_of.get(i, set()) if isinstance(i, Hashable) else set() for i in ids]
    held = stratified(labels, fraction, max(int(cfg.SEED), 0))
    _check_classes(content, labels, held, source.json_file, fraction)
    out = split_keys(cfg)
    val_ids = {i for i, is_held in zip(ids, held) if is_held and isinstance(i, Hashable)}
    for path, wanted in ((out.DATASETS.TRAIN_JSON, False), (out.DATASETS.VAL_JSON, True)):
        part = {
            **content,
            "images": [image for image, is_held in zip(images, held) if is_held == wanted],
            "annotations": [a for a in annotations if _belongs(a, val_ids) == wanted],
        }
        os.makedirs(os.path.dirname(path), exist_ok=True)
        atomic_write(path, json_bytes(part))
    logger.info(
        "Split %s: %s for training, %d for validation (DATASETS.VAL_FRACTION %g); written to %s.",
        *(source.json_file, count(held.count(False), "image"), held.count(True), fraction),
        os.path.dirname(out.DATASETS.TRAIN_JSON),
    )
    return out


def _belongs(annotation: Any, ids: set[Any]) -> bool:
    image = annotation.get("image_id") if isinstance(annotation, dict) else None
    return isinstance(image, Hashable) and image in ids


def stratified(labels: Sequence[set[Any]], fraction: float, seed: int) -> list[bool]:
    """Choose images to hold out so that each class keeps its share (iterative stratification, Sechidis et al. 2011).

    Args:
        labels: the classes of each image; images without any form a class of their own.
        fraction: fraction of the images, in (0, 1); each side keeps at least one image.
    """
    total = min(max(round(fraction * len(labels)), 1), len(labels) - 1)
    order = list(range(len(labels)))
    random.Random(seed).shuffle(order)
    images_of: dict[Any, list[int]] = {}
    for i in order:
        for label in labels[i] or {""}:
            images_of.setdefault(label, []).append(i)
    # A class with two images or more gets at least one; the only image of a class stays in training.
    wanted = {label: max(round(fraction * len(found)), 1) for label, found in images_of.items()}
    free = [all(len(images_of[label]) > 1 for label in found or {""}) for found in labels]
    held: set[int] = set()
    rarest_first = sorted(images_of.items(), key=lambda item: (len(item[1]), str(item[0])))
    # Classes that share images need fewer; the last pass fills up the difference.
    for label, found in [*rarest_first, (None, order)]:
        for i in found:
            if len(held) >= total or (label is not None and wanted[label] <= 0):
                break
            if i not in held and free[i]:
                held.add(i)
                for other in labels[i] or {""}:
                    wanted[other] -= 1
    return [i in held for i in range(len(labels))]


def _check_classes(
    content: dict[str, Any], labels: Sequence[set[Any]], held: Sequence[bool], json_file: str, fraction: float
) -> None:
    names = {
        json.dumps(c.get("id")): one_line(c.get("name", "?"), 60)
        for c in content.get("categories") or ()
        if isinstance(c, dict)
    }
    sizes = Counter(label for found in labels for label in found)
    seen = {label for found, is_held in zip(labels, held) if is_held for label in found}
    lacking = [label for label in sizes if label not in seen]
    single = [names.get(label, label) for label in lacking if sizes[label] == 1]
    left = [names.get(label, label) for label in lacking if sizes[label] > 1]
    if left or not any(held):
        raise DataError(
            f"{json_file}: DATASETS.VAL_FRACTION {fraction:g} leaves no validation image for "
            f"{some(left) or 'any class'}; hold out more (--val-fraction), or give --val-json"
        )
    if single:
        logger.warning("%s: in only one image, kept for training (no AP): %s.", json_file, some(single))
