"""LabelMe: one json per image with polygons, rectangles, circles and masks; pieces of an object share a group_id."""

from __future__ import annotations

import base64
import io
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from gn_det.data.formats import draft as tools
from gn_det.data.formats.draft import ATTRIBUTES, Draft, Groups, Invalid, Losses
from gn_det.data.image import png_bytes
from gn_det.errors import DataError
from gn_det.files import atomic_write, json_bytes
from gn_det.structures import MaskCrop
from gn_det.text import one_line, shown

CLASSES = "labels.txt"
_CORNERS_OF_CIRCLE = 36


def read(source: Path, images: Path | None, classes: Sequence[str]) -> Draft:
    """Read every json of a folder; ``imagePath`` names the image, in the subfolder of the json."""
    draft = Draft(tools.class_list(source, classes, CLASSES))
    for path in tools.files_of(source, {".json"}, ".json files in this folder"):
        try:
            content = json.loads(tools.text_of(path))
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}: is not json ({one_line(error)})") from None
        with draft.noting(str(path)):
            _read_file(draft, content, path, path.relative_to(source))
    return draft


def _read_file(draft: Draft, content: Any, path: Path, inner: Path) -> None:
    """Read one json, which is at ``inner`` in its folder."""
    if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
        raise Invalid("has no list 'shapes'; it is not a LabelMe file")
    width, height = content.get("imageWidth"), content.get("imageHeight")
    if not (type(width) is int and type(height) is int and min(width, height) > 0):
        raise Invalid("imageWidth and imageHeight must be numbers of pixels")
    name = PurePosixPath(str(content.get("imagePath") or "").replace("\\", "/")).name
    if not name.isprintable() or name == ".." or len(name.encode()) > 250:  # 255 with .json is the limit of disks
        raise Invalid(f"imagePath {shown(name)} is not the name of a file")
    # The json's subfolders are the image's; --images says if the images are elsewhere.
    file = inner.with_suffix(PurePosixPath(name).suffix or ".jpg")
    # Images of one name in two folders have x.json and x-2.json: x.png is then the image of x.json.
    if PurePosixPath(name).suffix and not path.with_name(name).with_suffix(".json").is_file():
        file = file.with_name(name)
    image = file.as_posix()
    draft.image(image, (width, height))
    groups: dict[Any, list[dict[str, Any]]] = {}
    for number, shape in enumerate(content["shapes"], 1):
        with draft.noting(f"{path} shape {number}"):
            if not isinstance(shape, dict) or not isinstance(shape.get("label"), str) or not _points(shape):
                raise Invalid("needs a label and points in finite numbers")
            group = shape.get("group_id")
            key = (group, shape["label"]) if isinstance(group, (int, str)) and _kind(shape) == "polygon" else number
            groups.setdefault(key, []).append(shape)
    for parts in groups.values():
        label, flags = parts[0]["label"], parts[0].get("flags")
        with draft.noting(f"{path}: {shown(label)}"):
            draft.add(image, label, flags if isinstance(flags, dict) else {}, **_outline(parts, (width, height)))


def _outline(parts: list[dict[str, Any]], size: tuple[int, int]) -> dict[str, Any]:
    """Return the outline of an object as :meth:`Draft.add` takes it."""
    kind, points = _kind(parts[0]), _points(parts[0])
    if kind == "polygon" and all(len(_points(part)) >= 3 for part in parts):
        return {"polygons": [[v for point in _points(part) for v in point] for part in parts]}
    if kind == "rectangle" and len(points) >= 2:  # LabelMe 5.5 writes all four corners
        return {"box": (*np.min(points, axis=0).tolist(), *np.max(points, axis=0).tolist())}
    if kind == "circle" and len(points) == 2:
        (x, y), radius = points[0], math.dist(*points)
        angles = [2 * math.pi * k / _CORNERS_OF_CIRCLE for k in range(_CORNERS_OF_CIRCLE)]
        return {"polygons": [[v for a in angles for v in (x + radius * math.cos(a), y + radius * math.sin(a))]]}
    if kind == "mask" and (mask := _mask(parts[0], size)) is not None:
        return {"mask": mask}
    raise Invalid(f"shape of type {shown(kind)} with {len(points)} points has no area")


def _kind(shape: dict[str, Any]) -> str:
    return str(shape.get("shape_type") or "polygon")


def _points(shape: dict[str, Any]) -> list[list[float]]:
    """Return the points of a shape, [] if unusable."""
    points = shape.get("points")
    try:
        values = np.asarray(points, dtype=float).reshape(-1, 2)
    except (TypeError, ValueError, OverflowError):
        return []
    return values.tolist() if np.isfinite(values).all() else []


def _mask(shape: dict[str, Any], size: tuple[int, int]) -> MaskCrop | None:
    """Return the mask of a shape, a PNG between its two corner pixels; None if damaged or empty."""
    (x0, y0), (x1, y1) = _points(shape)[:2] if len(_points(shape)) >= 2 else ((1, 1), (0, 0))
    try:
        with Image.open(io.BytesIO(base64.b64decode(shape["mask"], validate=True))) as image:
            if image.size != (x1 - x0 + 1, y1 - y0 + 1) or x0 < 0 or y0 < 0 or x1 >= size[0] or y1 >= size[1]:
                return None
            bitmap = np.asarray(image.convert("L")) > 0
    except Exception:  # Pillow raises nearly anything on damaged files
        return None
    return MaskCrop(int(y0), int(x0), bitmap) if bitmap.any() else None


def write(names: Mapping[int, str], groups: Groups, folder: Path, root: Path, losses: Losses) -> None:
    """Write one json per image, with an ``imagePath`` to the image in ``root``, and the list of classes."""
    for image, objects in groups:
        path = tools.place(folder, image, ".json")
        content = {
            "version": "5.5.0",
            "flags": {},
            "shapes": [shape for group, a in enumerate(objects, 1) for shape in _shapes(a, names, group)],
            "imagePath": os.path.relpath(root / image["file_name"], path.parent).replace(os.sep, "/"),
            "imageData": None,
            "imageHeight": image["height"],
            "imageWidth": image["width"],
        }
        atomic_write(path, json_bytes(content, indent=1))
    atomic_write(folder / CLASSES, "".join(f"{name}\n" for name in names.values()))


def _shapes(annotation: dict[str, Any], names: Mapping[int, str], group: int) -> Iterator[dict[str, Any]]:
    segmentation = annotation.get("segmentation") or []
    pieces = not isinstance(segmentation, dict) and len(segmentation) > 1
    base = {
        "label": names[annotation["category_id"]],
        "group_id": group if pieces else None,
        "description": f"score {annotation['score']:.3f}" if "score" in annotation else "",
        "flags": {name: True for name in ATTRIBUTES if annotation.get(name)},
        "mask": None,
    }
    if isinstance(segmentation, dict):
        top, left, bitmap = tools.crop_of_rle(segmentation)
        points = [[left, top], [left + bitmap.shape[1] - 1, top + bitmap.shape[0] - 1]]
        yield {**base, "points": points, "shape_type": "mask", "mask": base64.b64encode(png_bytes(bitmap)).decode()}
    elif not segmentation:
        x0, y0, x1, y1 = tools.corners(annotation)
        yield {**base, "points": [[x0, y0], [x1, y1]], "shape_type": "rectangle"}
    for polygon in segmentation if isinstance(segmentation, list) else ():
        yield {**base, "points": np.asarray(polygon, float).reshape(-1, 2).tolist(), "shape_type": "polygon"}
