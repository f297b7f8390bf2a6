"""YOLO: ``labels/NAME.txt`` for ``images/NAME.jpg``, one line per object in fractions of the image's width and height.

``CLASS cx cy w h`` is a box, ``CLASS x0 y0 x1 y1 x2 y2 ...`` a polygon. An image without file or lines has no objects.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gn_det.data.annotations import polygon_area
from gn_det.data.formats import draft as tools
from gn_det.data.formats.draft import Draft, Groups, Invalid, Losses
from gn_det.errors import DataError
from gn_det.files import atomic_write

#: Attributes of an object that this format can represent.
ATTRIBUTES = ()
#: Tolerance for coordinates outside the image, because tools round.
_ROUNDING = 1e-3
#: Digits after the point of a coordinate in pixels.
_DIGITS = 6


def read(source: Path, images: Path | None, classes: Sequence[str]) -> Draft:
    """Read ``source/labels`` (or ``source``) for the images in ``source/images``, or in ``images``."""
    labels = source / "labels" if (source / "labels").is_dir() else source
    files = tools.Images(images or source / "images")
    names = _names(source, classes) or tools.class_list(source, (), "classes.txt", "labels.txt")
    if not names:
        raise DataError(f"{source}: no class names; give data.yaml or classes.txt, or name them with --classes")
    draft = Draft(names)
    for stem, file in files.files.items():
        path = labels / f"{stem}.txt"
        width, height = files.size(file)
        draft.image(file, (width, height))
        for number, line in enumerate(tools.text_of(path).splitlines() if path.is_file() else (), 1):
            with draft.noting(f"{path} line {number}"):
                _read_line(draft, file, line.split(), names, (width, height))
    known = {f"{stem}.txt" for stem in files.files} | {"classes.txt", "labels.txt"}
    others = (path for path in sorted(labels.rglob("*.txt")) if path.relative_to(labels).as_posix() not in known)
    draft.problems += [f"{path}: no image of this name in {files.folder}" for path in others]
    return draft


def _read_line(draft: Draft, image: str, words: list[str], names: Sequence[str], size: tuple[int, int]) -> None:
    if not words:
        return
    try:
        index, values = int(words[0]), [float(word) for word in words[1:]]
    except ValueError:
        raise Invalid("is not a class number and coordinates") from None
    if not 0 <= index < len(names):
        raise Invalid(f"class {index} is out of range; there are {len(names)} classes")
    if len(values) != 4 and (len(values) < 6 or len(values) % 2):
        raise Invalid(f"has {len(values)} coordinates; a box has 4, a polygon 6 or more in pairs")
    if not all(-_ROUNDING <= v <= 1 + _ROUNDING for v in values):  # nan fails, too
        raise Invalid("coordinates must be fractions of the image, from 0 to 1")
    if len(values) == 4:
        cx, cy, w, h = values
        if w <= 0 or h <= 0:
            raise Invalid("the box has no area")
        values = [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]
    points = [round(v * size[k % 2], _DIGITS) for k, v in enumerate(values)]
    outline: dict[str, Any] = {"box": points} if len(points) == 4 else {"polygons": [points]}
    draft.add(image, names[index], {}, **outline)


def _names(source: Path, given: Sequence[str]) -> list[str]:
    """Return the ``given`` classes, or those of ``data.yaml``; [] without either."""
    import yaml

    path = next((p for p in (source / "data.yaml", source.parent / "data.yaml") if p.is_file()), None)
    if path is None:
        return list(given)
    try:
        content: Any = yaml.safe_load(tools.text_of(path))
        if isinstance(content, dict) and "kpt_shape" in content:
            raise DataError(
                f"{path}: 'kpt_shape': keypoints are not supported; keep the first 5 numbers of each label line and "
                "remove this key"
            )
        names = content["names"]
        ordered = [names[i] for i in range(len(names))]
    except (yaml.YAMLError, TypeError, KeyError):
        ordered = [None]
    if given:
        return list(given)
    if not ordered or not all(isinstance(name, str) for name in ordered):
        raise DataError(f"{path}: 'names' must list the classes as [a, b] or {{0: a, 1: b}}")
    return ordered


def write(names: Mapping[int, str], groups: Groups, folder: Path, root: Path, losses: Losses) -> None:
    """Write ``labels/`` and ``data.yaml``: polygons where every object has a mask, boxes otherwise."""
    import yaml

    index = {category: i for i, category in enumerate(names)}
    every = [a for _, objects in groups for a in objects]
    masks = sum("segmentation" in a for a in every)
    outlined = masks == len(every)
    if not outlined:
        losses["masks beside boxes without mask (boxes are written)"] += masks
    for image, objects in groups:
        size = image["width"], image["height"]
        lines = []
        for a in objects:
            if outlined:
                losses["further pieces of an object"] += len(a["segmentation"]) - 1
                values = max(a["segmentation"], key=polygon_area)
            else:
                x0, y0, x1, y1 = tools.corners(a)
                values = [(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0]
            parts = (v / size[k % 2] for k, v in enumerate(values))
            numbers = " ".join(f"{min(max(v, 0.0), 1.0):.12g}" for v in parts if math.isfinite(v))
            lines.append(f"{index[a['category_id']]} {numbers}\n")
        atomic_write(tools.place(folder / "labels", image, ".txt"), "".join(lines))
    content = {"path": ".", "train": "images", "val": "images", "names": dict(enumerate(names.values()))}
    atomic_write(folder / "data.yaml", yaml.safe_dump(content, sort_keys=False, allow_unicode=True))
