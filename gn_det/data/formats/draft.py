"""Dataset under construction from another format, and helpers shared by all readers and writers.

A *document* is the content of a COCO json. An annotation may also have the flags :data:`FLAGS`, set to 1. It has a
``segmentation`` (polygons or compressed RLE) or only a box.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from gn_det.data.annotations import decode_counts, polygon_area
from gn_det.data.image import ImageReader
from gn_det.data.inputs import IMAGE_SUFFIXES
from gn_det.errors import DataError
from gn_det.files import inside, open_regular
from gn_det.structures import MaskCrop, crop_mask, encode_crop
from gn_det.text import one_line, shown, some

Document = dict[str, Any]
#: Each image, with the name of its annotation file as ``stem``, and its annotations.
Groups = list[tuple[dict[str, Any], list[dict[str, Any]]]]

#: Attributes of an object besides class and outline.
FLAGS = ("difficult", "truncated", "occluded")
ATTRIBUTES = (*FLAGS, "iscrowd")
#: Largest text file with the annotations of one image, in bytes.
_MOST_BYTES = 256 << 20
#: Largest error of simplified mask outlines, in pixels.
_TOLERANCE = 0.5


class Losses(Counter[str]):
    """Counts what a format cannot represent."""

    def lines(self, target: str) -> list[str]:
        return [f"{target} cannot represent {what}: {number:,}" for what, number in self.items() if number]


class Invalid(Exception):
    """An entry that cannot be used, with the reason; :meth:`Draft.noting` records it."""


class Draft:
    """Collects images and objects; numbers them from 1 in the order of their names.

    Attributes:
        problems: one line for each invalid entry that was left out.
    """

    def __init__(self, names: Sequence[str] = ()) -> None:
        """``names`` are all classes; by default the classes are those of the objects, sorted by name."""
        names = [name.strip() for name in names]  # as everywhere: files of class names lose these spaces
        repeated = [name for name, number in Counter(names).items() if number > 1]
        if repeated:
            raise DataError(f"class {shown(repeated[0])} is listed twice; give every class its own name")
        self._names = names
        self._images: dict[str, dict[str, Any]] = {}
        self._objects: dict[str, list[dict[str, Any]]] = {}
        self.problems: list[str] = []

    @contextmanager
    def noting(self, where: str) -> Iterator[None]:
        """Leave out an entry at ``where`` that raises :class:`Invalid`, and record the problem."""
        try:
            yield
        except Invalid as error:
            self.problems.append(f"{where}: {error}")

    def image(self, file_name: str, size: tuple[int, int]) -> None:
        """Add an image of (width, height) ``size``; raise Invalid if the name was used before."""
        if file_name in self._images:
            raise Invalid(f"image {shown(file_name)} occurs twice")
        self._images[file_name] = {"file_name": file_name, "width": size[0], "height": size[1]}
        self._objects[file_name] = []

    def add(
        self,
        image: str,
        name: str,
        attributes: Mapping[str, object],
        *,
        box: Sequence[float] | None = None,
        polygons: Sequence[Sequence[float]] = (),
        mask: MaskCrop | None = None,
    ) -> None:
        """Add an object given as XYXY ``box``, polygons or mask; raise Invalid for an unknown class or a huge mask.

        Those of :data:`ATTRIBUTES` are set that are true in ``attributes``.
        """
        name = name.strip()
        if self._names and name not in self._names:
            raise Invalid(f"class {shown(name)} is not one of {some(self._names)}")
        flags = {flag: 1 for flag in FLAGS if attributes.get(flag)}
        entry: dict[str, Any] = {"name": name, "iscrowd": int(bool(attributes.get("iscrowd"))), **flags}
        if mask is not None:
            rows, columns = mask.bitmap.shape
            width, height = (self._images[image][side] for side in ("width", "height"))
            try:
                entry["segmentation"] = encode_crop(mask, height, width)
            except (ValueError, OverflowError):
                raise Invalid(f"no mask can have the {shown(width)}x{shown(height)} pixels of its image") from None
            entry["area"] = float(np.count_nonzero(mask.bitmap))
            box = (mask.left, mask.top, mask.left + columns, mask.top + rows)
        elif polygons:
            points = np.concatenate([np.asarray(p, float) for p in polygons]).reshape(-1, 2)
            entry["segmentation"] = [list(p) for p in polygons]
            entry["area"] = float(sum(map(polygon_area, polygons)))
            box = (*points.min(axis=0).tolist(), *points.max(axis=0).tolist())
        assert box is not None
        x0, y0, x1, y1 = (float(v) for v in box)
        entry.setdefault("area", (x1 - x0) * (y1 - y0))
        entry["bbox"] = [x0, y0, round(x1 - x0, 9), round(y1 - y0, 9)]  # without noise of binary fractions
        self._objects[image].append(entry)

    def document(self) -> Document:
        """Return everything as a COCO document."""
        names = self._names or sorted({o["name"] for objects in self._objects.values() for o in objects})
        ids = {name: i for i, name in enumerate(names, 1)}
        images: list[dict[str, Any]] = []
        annotations: list[dict[str, Any]] = []
        for number, file_name in enumerate(sorted(self._images), 1):
            images.append({"id": number, **self._images[file_name]})
            for entry in self._objects[file_name]:
                category = ids[entry.pop("name")]
                annotations.append({"id": len(annotations) + 1, "image_id": number, "category_id": category, **entry})
        categories = [{"id": i, "name": name} for name, i in ids.items()]
        return {"images": images, "annotations": annotations, "categories": categories}


# ------------------------------------------------------------ reading


def text_of(path: Path) -> str:
    """Read a UTF-8 text file; raise DataError if that fails."""
    try:
        with open_regular(path) as file:
            data = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or one_line(error)})") from None
    if len(data) > _MOST_BYTES:
        raise DataError(f"{path}: is larger than {_MOST_BYTES >> 20} MiB; is it an annotation file?")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{path}: is not UTF-8 text; save it as UTF-8") from None


def xml_of(path: Path) -> ElementTree.Element:
    """Parse an XML file; raise DataError if that fails or it defines entities (which may expand without bound)."""
    text = text_of(path)
    if "<!DOCTYPE" in text or "<!ENTITY" in text:
        raise DataError(f"{path}: has a DOCTYPE or entities, which annotation files do not need; remove them")
    try:
        return ElementTree.fromstring(text)
    except (ElementTree.ParseError, ValueError) as error:
        raise DataError(f"{path}: is not XML ({one_line(error)})") from None


def class_list(folder: Path, given: Sequence[str], *names: str) -> list[str]:
    """Return the classes given by the user, or the lines of the first existing file of ``names`` in ``folder``."""
    if given:
        return list(given)
    for name in names:
        if (folder / name).is_file():
            return [line.strip() for line in text_of(folder / name).splitlines() if line.strip()]
    return []


def files_of(folder: Path, suffixes: Collection[str], what: str) -> list[Path]:
    """Return the files with an extension in a folder and its subfolders, sorted; DataError without any ``what``."""
    found = sorted(
        Path(root) / name
        for root, _, names in os.walk(folder)
        for name in names
        if Path(name).suffix.lower() in suffixes and not name.startswith(".")
    )
    if not found:
        raise DataError(f"{folder}: no {what}")
    return found


class Images:
    """The image files of a folder, by their names without extension."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, str] = {}
        for path in files_of(folder, IMAGE_SUFFIXES, "images in this folder; name the image folder with --images"):
            file = path.relative_to(folder).as_posix()
            other = self.files.setdefault(os.path.splitext(file)[0], file)
            if other != file:
                raise DataError(f"{folder}: {other} and {file} share one annotation file; rename one of them")
        self._reader = ImageReader(max_pixels=2**40)  # only headers are read

    def size(self, file: str) -> tuple[int, int]:
        """Return (width, height); raise ImageError if the file is not an image."""
        return self._reader.size(self.folder / file)


# ------------------------------------------------------------ writing


def place(folder: Path, image: dict[str, Any], ending: str) -> Path:
    """Return where to write the annotations of an image; raise DataError for a name that leads out of ``folder``."""
    try:
        return inside(folder, f"{image['stem']}{ending}")
    except ValueError as error:
        raise DataError(f"image {image['id']}: file_name {shown(image['file_name'])}: {error}; rename it") from None


def by_image(images: Sequence[dict[str, Any]], annotations: Sequence[dict[str, Any]]) -> Groups:
    """Return images with their annotations."""
    groups: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for annotation in annotations:
        groups[annotation["image_id"]].append(annotation)
    return [(image, groups[image["id"]]) for image in images]


def names_of(document: Document) -> dict[int, str]:
    """Map each category id to its class name, in the order of the ids, without the spaces that readers strip."""
    names = {c["id"]: c["name"].strip() for c in sorted(document["categories"], key=lambda c: c["id"])}
    repeated = [name for name, number in Counter(names.values()).items() if number > 1]
    if repeated:
        raise DataError(f"class {shown(repeated[0])} is there twice, spaces around it aside; rename one of them")
    return names


def corners(annotation: dict[str, Any]) -> tuple[float, float, float, float]:
    """Return the box as XYXY."""
    x, y, w, h = annotation["bbox"]
    return x, y, round(x + w, 9), round(y + h, 9)


def crop_of_rle(rle: dict[str, Any]) -> MaskCrop:
    """Return the pixels of a compressed or plain COCO RLE, without decoding the rest of the image."""
    height = int(rle["size"][0])
    counts = rle["counts"]
    runs = np.asarray(counts) if isinstance(counts, list) else decode_counts(counts)
    ends = np.cumsum(runs)
    starts, stops = ends[:-1:2], ends[1::2]
    if len(starts) == 0 or height == 0:
        return MaskCrop(0, 0, np.zeros((0, 0), dtype=bool))
    first, last = int(starts[0]) // height, (int(stops[-1]) - 1) // height
    change = np.zeros((last - first + 1) * height + 1, dtype=np.int32)
    np.add.at(change, starts - first * height, 1)
    np.add.at(change, stops - first * height, -1)
    columns = np.cumsum(change[:-1]).astype(bool).reshape(-1, height)
    return crop_mask(columns.T, 0, first)


def outlines(crop: MaskCrop, losses: Losses) -> list[list[float]]:
    """Return simplified polygons around the pieces of a mask; holes are filled."""
    import contourpy
    import shapely

    if not crop.bitmap.any():
        return []
    generator = contourpy.contour_generator(
        z=np.pad(crop.bitmap, 1).astype(np.float32), fill_type=contourpy.FillType.OuterOffset
    )
    polygons = []
    for points, offsets in zip(*generator.filled(0.5, 2.0)):
        losses["holes in masks"] += len(offsets) - 2
        # the center of the first pixel is at (1, 1) of the padded grid and at (0.5, 0.5) of the crop
        ring = points[: offsets[1]] - 0.5 + np.array([crop.left, crop.top])
        simple = shapely.simplify(shapely.Polygon(ring), _TOLERANCE)
        polygons.append(np.asarray(simple.exterior.coords)[:-1].round(2).reshape(-1).tolist())
    return polygons


def to_outlines(document: Document, losses: Losses) -> Document:
    """Return a copy with masks as polygons; an object too small for a polygon keeps its box."""
    annotations = []
    for annotation in document["annotations"]:
        if isinstance(annotation.get("segmentation"), dict):
            polygons = outlines(crop_of_rle(annotation["segmentation"]), losses)
            annotation = {**annotation, "segmentation": polygons}
            if not polygons:
                del annotation["segmentation"]
        annotations.append(annotation)
    return {**document, "annotations": annotations}
