"""Pictures for the report: images with their annotations drawn, and single problems circled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from gn_det.check.audit import Survey
from gn_det.check.findings import Finding
from gn_det.data.checks import Defect, check_segmentation, is_number, usable_pieces
from gn_det.data.coco import AnnotationReader
from gn_det.data.image import ImageReader
from gn_det.data.problems import Problems
from gn_det.data.records import Record
from gn_det.errors import DataError
from gn_det.visualize.draw import draw_annotations, tint

#: Sample images of each set.
SAMPLES = 12
#: Longer side of an embedded picture, pixels.
_SIDE = 480
#: Larger images are scaled down to this longer side before anything is drawn on them.
_DRAWN = 4 * _SIDE
_RED, _YELLOW, _GROUND = (230, 30, 45), (255, 210, 0), (196, 200, 206)
#: Kinds of problems that can be seen in a picture begin with one of these.
_VISIBLE = ("bbox-", "polygon-", "rle-", "segmentation-", "object-", "no-mask", "category-unknown")
#: Boxes with a side below this part of the picture get a ring around them.
_SMALL = 0.04


def choose_samples(survey: Survey, count: int = SAMPLES) -> list[int]:
    """Indices into ``survey.images``: one with each class, rarest first, then spread over the set."""
    if survey.dataset is None or not survey.images:
        return []
    classes = np.array(survey.objects.classes, dtype=np.int64)
    images = np.array(survey.objects.images, dtype=np.int64)
    chosen: list[int] = []
    for index in np.argsort(survey.dataset.class_counts, kind="stable"):
        having = images[classes == index]
        if len(having) and len(chosen) < count and not set(having[:1]) & set(chosen):
            # Each from another part of the set: neighbours are often alike.
            chosen.append(int(having[len(having) * (2 * len(chosen) + 1) // (2 * count)]))
    rest = [i for i in np.linspace(0, len(survey.images) - 1, 4 * count).astype(int).tolist() if i not in chosen]
    step = max(len(rest) // max(count - len(set(chosen)), 1), 1)
    return list(dict.fromkeys([*chosen, *rest[::step], *rest]))[: min(count, len(survey.images))]


def draw_sample(survey: Survey, index: int) -> np.ndarray | None:
    """The image with all its annotations; None where it cannot be read."""
    assert survey.content is not None
    image = survey.images[index]
    reader = AnnotationReader(survey.content.category_ids, Problems(survey.source.json_file))
    found = [reader.read(raw, image) for raw in survey.content.annotations_of.get(image["id"], ())]
    record = Record(
        file_name=survey.path(image),
        width=image["width"],
        height=image["height"],
        annotations=[a for a in found if a is not None],
    )
    try:
        pixels = _reader(survey).read(record["file_name"])
    except DataError:
        return None
    if pixels.shape[:2] != (image["height"], image["width"]):
        return None
    drawn = draw_annotations(pixels, record, survey.content.class_names, min_size=_SIDE, max_size=_DRAWN)
    return _fitted(drawn)


def draw_problem(survey: Survey, finding: Finding) -> np.ndarray | None:
    """The image with the annotation that is wrong: its box in red, its mask in yellow; None where nothing shows."""
    where = finding.where
    if survey.content is None or where.annotation is None or not finding.kind.startswith(_VISIBLE):
        return None
    image = next((i for i in survey.content.images if i["id"] == where.image), None)
    if image is None:
        return None
    entries = survey.content.annotations_of.get(image["id"], ())
    raw = next((a for a in entries if a.get("id") == where.annotation), None)
    box = None if raw is None else _drawable_box(raw.get("bbox"), image)
    if raw is None or (box is None and not _drawable_polygons(raw, image)):
        return None
    try:
        pixels = np.array(_reader(survey).read(survey.path(image)))
    except DataError:
        return None
    _paint_rle(pixels, raw, image)
    picture = Image.fromarray(pixels)
    return _marked(picture, box, _drawable_polygons(raw, image))


def _reader(survey: Survey) -> ImageReader:
    """Reads as training does, in colours to draw on."""
    return replace(survey.reader, image_format="RGB")


def _marked(
    picture: Image.Image, box: tuple[float, float, float, float] | None, polygons: Sequence[Sequence[float]]
) -> np.ndarray:
    scale = _SIDE / max(picture.size)
    picture = picture.resize((max(round(picture.width * scale), 1), max(round(picture.height * scale), 1)))
    # A margin: what is wrong may lie outside the image.
    margin = round(0.12 * _SIDE)
    sheet = Image.new("RGB", (picture.width + 2 * margin, picture.height + 2 * margin), _GROUND)
    sheet.paste(picture, (margin, margin))
    canvas = ImageDraw.Draw(sheet)
    for polygon in polygons:
        points = [(x * scale + margin, y * scale + margin) for x, y in zip(polygon[0::2], polygon[1::2])]
        canvas.line([*points, points[0]], fill=_YELLOW, width=3)
    if box is not None:
        x0, y0, x1, y1 = (v * scale + margin for v in box)
        x0, y0, x1, y1 = min(x0, x1), min(y0, y1), max(x0, x1), max(y0, y1)
        canvas.rectangle((x0, y0, x1, y1), outline=_RED, width=3)
        if min(x1 - x0, y1 - y0) < _SMALL * _SIDE:
            radius = max(x1 - x0, y1 - y0) / 2 + 14
            middle_x, middle_y = (x0 + x1) / 2, (y0 + y1) / 2
            ring = (middle_x - radius, middle_y - radius, middle_x + radius, middle_y + radius)
            canvas.ellipse(ring, outline=_RED, width=3)
    return np.array(sheet)


def _paint_rle(pixels: np.ndarray, raw: dict[str, Any], image: dict[str, Any]) -> None:
    """Tint an RLE mask in place, where there is one that can be decoded."""
    segmentation = raw.get("segmentation")
    if not isinstance(segmentation, dict) or pixels.shape[:2] != (image["height"], image["width"]):
        return
    from pycocotools import mask as coco_mask

    try:
        checked, _ = check_segmentation(segmentation, image["height"], image["width"])
    except Defect:
        return
    if checked is None:
        return
    tint(pixels, coco_mask.decode(checked).astype(bool), _YELLOW, 0.55)


def _drawable_box(bbox: Any, image: dict[str, Any]) -> tuple[float, float, float, float] | None:
    """XYXY, cut to a little more than the image; None for what is no box at all."""
    if not isinstance(bbox, (list, tuple)) or len(bbox) != 4 or not all(is_number(v) for v in bbox):
        return None
    x, y, w, h = (float(v) for v in bbox)
    wide, high = 0.2 * image["width"], 0.2 * image["height"]
    xs = [min(max(v, -wide), image["width"] + wide) for v in (x, x + w)]
    ys = [min(max(v, -high), image["height"] + high) for v in (y, y + h)]
    return xs[0], ys[0], xs[1], ys[1]


def _drawable_polygons(raw: dict[str, Any], image: dict[str, Any]) -> list[list[float]]:
    pieces = raw.get("segmentation")
    if not isinstance(pieces, list) or not all(isinstance(p, (list, tuple)) for p in pieces):
        return []
    far = 10.0 * max(image["width"], image["height"])
    good = (p for p in usable_pieces(pieces) if all(is_number(v) and abs(v) < far for v in p))
    return [[float(v) for v in p] for p in good]


def _fitted(pixels: np.ndarray) -> np.ndarray:
    """At most ``_SIDE`` pixels on the longer side."""
    picture = Image.fromarray(pixels)
    picture.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    return np.array(picture)
