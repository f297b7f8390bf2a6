"""CVAT for images 1.1: one XML with boxes, polygons and masks of all images; pieces of an object share a group_id."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from gn_det.data.formats import draft as tools
from gn_det.data.formats.draft import FLAGS, Document, Draft, Losses
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
        where = f"{path} image {shown(name)}"
        try:
            size = int(entry.get("width", "")), int(entry.get("height", ""))
        except ValueError:
            size = (0, 0)
        if not name or min(size) <= 0:
            draft.problems.append(f"{where}: has no name, width and height")
            continue
        image = draft.image(name, size, where)
        if image is not None:
            _read_shapes(draft, image, entry, size, where)
    return draft


def _read_shapes(draft: Draft, image: str, entry: ElementTree.Element, size: tuple[int, int], where: str) -> None:
    groups: dict[Any, list[ElementTree.Element]] = {}
    for number, shape in enumerate(entry, 1):
        if shape.tag not in ("box", "polygon", "mask"):
            if shape.tag != "tag":
                draft.problems.append(f"{where}: <{shape.tag}> is not supported; draw a box, polygon or mask instead")
            continue
        group = (shape.get("group_id"), shape.get("label"))
        groups.setdefault(group if group[0] not in (None, "0") and shape.tag == "polygon" else number, []).append(shape)
    for parts in groups.values():
        first = parts[0]
        attributes = {a.get("name"): (a.text or "").strip().lower() for a in first.iterfind("attribute")}
        if first.get("occluded") == "1":  # in CVAT an attribute of the shape itself
            attributes["occluded"] = "1"
        flags = [flag for flag in FLAGS if attributes.get(flag) in ("1", "true")]
        more: dict[str, Any] = {"flags": flags, "crowd": attributes.get("iscrowd") in ("1", "true")}
        label = first.get("label") or ""
        try:
            if first.tag == "box":
                x0, y0, x1, y1 = (_number(first.get(key, "")) for key in ("xtl", "ytl", "xbr", "ybr"))
                if x0 >= x1 or y0 >= y1:
                    raise ValueError
                angle = _number(first.get("rotation", "0")) % 360
                outline = {"polygons": [_rotated(x0, y0, x1, y1, angle)]} if angle else {"box": (x0, y0, x1, y1)}
                draft.add(image, label, where, **outline, **more)
            elif first.tag == "polygon":
                draft.add(image, label, where, polygons=[_polygon(part) for part in parts], **more)
            else:
                draft.add(image, label, where, mask=_mask(first, size), **more)
        except (ValueError, OverflowError):
            draft.problems.append(f"{where}: a <{first.tag}> of {shown(label)} has no area or unusable coordinates")


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


def write(document: Document, folder: Path, root: Path, losses: Losses) -> None:
    """Write ``annotations.xml`` with the classes and all images."""
    names = tools.names_of(document)
    xml = ElementTree.Element("annotations")
    ElementTree.SubElement(xml, "version").text = "1.1"
    labels = ElementTree.SubElement(ElementTree.SubElement(ElementTree.SubElement(xml, "meta"), "task"), "labels")
    for name in names.values():
        ElementTree.SubElement(ElementTree.SubElement(labels, "label"), "name").text = name
    for number, (image, objects) in enumerate(tools.by_image(document)):
        size = {"width": str(image["width"]), "height": str(image["height"])}
        entry = ElementTree.SubElement(xml, "image", {"id": str(number), "name": image["file_name"], **size})
        for group, a in enumerate(objects, 1):
            for shape in _shapes(a, names[a["category_id"]], group):
                entry.append(shape)
    ElementTree.indent(xml)
    atomic_write(folder / FILE, ElementTree.tostring(xml, encoding="utf-8", xml_declaration=True))


def _shapes(annotation: dict[str, Any], label: str, group: int) -> list[ElementTree.Element]:
    flags = tools.flags_of(annotation)
    base = {"label": label, "source": "auto" if "score" in annotation else "manual"}
    base |= {"occluded": str(int("occluded" in flags)), "z_order": "0"}
    segmentation = annotation.get("segmentation")
    if isinstance(segmentation, dict):
        crop = tools.crop_of_rle(segmentation)
        rows, columns = crop.bitmap.shape
        flat = np.concatenate([[False], crop.bitmap.ravel()])
        edges = np.flatnonzero(flat[1:] != flat[:-1])
        runs = np.diff(np.concatenate([[0], edges, [rows * columns]])).tolist()
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
    for name in [*(f for f in flags if f != "occluded"), *(["iscrowd"] if annotation.get("iscrowd") else [])]:
        ElementTree.SubElement(shapes[0], "attribute", {"name": name}).text = "true"
    return shapes
