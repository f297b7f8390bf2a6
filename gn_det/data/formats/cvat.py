"""CVAT for images 1.1: one XML with boxes, polygons and masks of all images; pieces of an object share a group_id."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from gn_det.data.formats import draft as tools
from gn_det.data.formats.draft import ATTRIBUTES, Draft, Groups, Invalid, Losses
from gn_det.errors import DataError
from gn_det.files import atomic_write
from gn_det.structures import MaskCrop, crop_mask
from gn_det.text import shown

FILE = "annotations.xml"


def read(source: Path, images: Path | None, classes: Sequence[str]) -> Draft:
    """Read ``source``, an XML file or a folder with ``annotations.xml``."""
    path = source / FILE if source.is_dir() else source
    root = tools.xml_of(path)
    if root.tag != "annotations":
        raise DataError(f"{path}: its root is <{root.tag}>, not <annotations>; export as CVAT for images 1.1")
    if root.find("track") is not None:
        raise DataError(f"{path}: has a <track>; annotations of videos cannot be read: export as CVAT for images 1.1")
    listed = [(label.findtext("name") or "").strip() for label in root.iterfind("meta//labels/label")]
    draft = Draft(list(classes) or [name for name in listed if name])
    for entry in root.iter("image"):
        name = entry.get("name", "")
        with draft.noting(where := f"{path} image {shown(name)}"):
            try:
                size = int(entry.get("width", "")), int(entry.get("height", ""))
            except ValueError:
                size = (0, 0)
            if not name or min(size) <= 0:
                raise Invalid("has no name, width and height")
            draft.image(name, size)
            for parts in _objects(draft, entry, where):
                with draft.noting(where):
                    _add(draft, name, parts, size)
    return draft


def _objects(draft: Draft, image: ElementTree.Element, where: str) -> Iterable[list[ElementTree.Element]]:
    """Return the shapes of each object of an image."""
    groups: dict[Any, list[ElementTree.Element]] = {}
    for number, shape in enumerate(image, 1):
        with draft.noting(where):
            if shape.tag == "tag":
                continue
            if shape.tag not in ("box", "polygon", "mask"):
                raise Invalid(f"<{shape.tag}> is not supported; draw a box, polygon or mask instead")
            group = shape.get("group_id", "0") if shape.tag == "polygon" else "0"
            groups.setdefault(number if group == "0" else (group, shape.get("label")), []).append(shape)
    return groups.values()


def _add(draft: Draft, image: str, parts: list[ElementTree.Element], size: tuple[int, int]) -> None:
    first, outline = parts[0], dict[str, Any]()
    attributes = {a.get("name", ""): _is_true(a.text) for a in first.iterfind("attribute")}
    if first.get("occluded") == "1":  # in CVAT an attribute of the shape itself
        attributes["occluded"] = True
    label = first.get("label") or ""
    try:
        if first.tag == "box":
            x0, y0, x1, y1 = (_number(first.get(key, "")) for key in ("xtl", "ytl", "xbr", "ybr"))
            if x0 >= x1 or y0 >= y1:
                raise ValueError
            angle = _number(first.get("rotation", "0")) % 360
            outline = {"polygons": [_rotated(x0, y0, x1, y1, angle)]} if angle else {"box": (x0, y0, x1, y1)}
        elif first.tag == "polygon":
            outline["polygons"] = [_polygon(part) for part in parts]
        else:
            outline["mask"] = _mask(first, size)
    except (ValueError, OverflowError):
        raise Invalid(f"a <{first.tag}> of {shown(label)} has no area or unusable coordinates") from None
    draft.add(image, label, attributes, **outline)


def _is_true(text: str | None) -> bool:
    return (text or "").strip().lower() in ("1", "true")


def _number(word: str) -> float:
    value = float(word)
    if not abs(value) < 1e9:
        raise ValueError
    return value


def _rotated(x0: float, y0: float, x1: float, y1: float, degrees: float) -> list[float]:
    """Return the corners of a box after CVAT's rotation: clockwise around its center."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    sides = [(u - x, v - y) for u, v in ((x0, y0), (x1, y0), (x1, y1), (x0, y1))]
    return [round(c, 6) for u, v in sides for c in (x + u * cos - v * sin, y + u * sin + v * cos)]


def _polygon(shape: ElementTree.Element) -> list[float]:
    values = [_number(word) for point in shape.get("points", "").split(";") for word in point.split(",")]
    if len(values) < 6 or len(values) % 2:
        raise ValueError
    return values


def _mask(shape: ElementTree.Element, size: tuple[int, int]) -> MaskCrop:
    """Decode runs along the rows of the mask's box, background first; raise ValueError if they do not fill it."""
    top, left, height, width = (int(shape.get(key, "")) for key in ("top", "left", "height", "width"))
    runs = np.array([int(word) for word in shape.get("rle", "").split(",")])
    fits = 0 <= top < top + height <= size[1] and 0 <= left < left + width <= size[0]
    if not fits or runs.min(initial=0) < 0 or runs.max(initial=0) > height * width or runs.sum() != height * width:
        raise ValueError
    inside = np.arange(len(runs)) % 2 == 1
    bitmap = np.repeat(inside, runs).reshape(height, width)
    if not bitmap.any():
        raise ValueError
    return crop_mask(bitmap, top, left)


def write(names: Mapping[int, str], groups: Groups, folder: Path, root: Path, losses: Losses) -> None:
    """Write ``annotations.xml`` with the classes and all images."""
    xml = ElementTree.Element("annotations")
    ElementTree.SubElement(xml, "version").text = "1.1"
    labels = ElementTree.SubElement(ElementTree.SubElement(ElementTree.SubElement(xml, "meta"), "task"), "labels")
    for name in names.values():
        ElementTree.SubElement(ElementTree.SubElement(labels, "label"), "name").text = name
    for number, (image, objects) in enumerate(groups):
        size = {"width": str(image["width"]), "height": str(image["height"])}
        entry = ElementTree.SubElement(xml, "image", {"id": str(number), "name": image["file_name"], **size})
        for group, a in enumerate(objects, 1):
            entry.extend(_shapes(a, names[a["category_id"]], group))
    ElementTree.indent(xml)
    atomic_write(folder / FILE, ElementTree.tostring(xml, encoding="utf-8", xml_declaration=True))


def _shapes(annotation: dict[str, Any], label: str, group: int) -> list[ElementTree.Element]:
    base = {"label": label, "source": "auto" if "score" in annotation else "manual"}
    base |= {"occluded": str(int(bool(annotation.get("occluded")))), "z_order": "0"}
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, dict):
        crop = tools.crop_of_rle(segmentation)
        rows, columns = crop.bitmap.shape
        edges = np.flatnonzero(np.diff(crop.bitmap.ravel(), prepend=False))
        runs = np.diff(edges, prepend=0, append=rows * columns).tolist()
        box = {"left": str(crop.left), "top": str(crop.top), "width": str(columns), "height": str(rows)}
        shapes = [ElementTree.Element("mask", base | box | {"rle": ", ".join(map(str, runs))})]
    elif segmentation:
        base |= {"group_id": str(group)} if len(segmentation) > 1 else {}
        shapes = []
        for polygon in segmentation:
            points = ";".join(f"{x:.12g},{y:.12g}" for x, y in np.asarray(polygon, float).reshape(-1, 2).tolist())
            shapes.append(ElementTree.Element("polygon", base | {"points": points}))
    else:
        sides = zip(("xtl", "ytl", "xbr", "ybr"), tools.corners(annotation))
        shapes = [ElementTree.Element("box", base | {key: f"{value:.12g}" for key, value in sides})]
    for name in ATTRIBUTES:
        if annotation.get(name) and name != "occluded":
            ElementTree.SubElement(shapes[0], "attribute", {"name": name}).text = "true"
    return shapes
