"""Render the report of a check as one HTML page: findings with images, histograms, and sample images."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageOps
from pycocotools import mask as coco_mask

from gn_det.check.audit import Findings, Survey
from gn_det.check.report import ClassTable, Report, class_table, facts
from gn_det.check.sizes import EDGES, LABELS, as_overrides
from gn_det.data.annotations import Defect, check_segmentation, is_number, usable_pieces
from gn_det.data.problems import Problem
from gn_det.visualize.draw import draw_annotations, tint
from gn_det.visualize.html import jpeg_uri, render
from gn_det.visualize.plots import plot_histogram

#: Per kind: places to list, findings to draw, and findings to try until enough are drawn.
_LISTED, _DRAWN, _TRIED = 50, 3, 12
#: Classes in the histogram, and sample images per set.
_CLASSES, _SAMPLES = 2000, 12
#: Longer side of an embedded image in pixels; larger images are scaled to four times that before drawing.
_SIDE = 480
_RED, _YELLOW, _GROUND = (230, 30, 45), (255, 210, 0), (196, 200, 206)
#: Prefixes of the kinds of problems that are visible in an image.
_VISIBLE = ("bbox-", "polygon-", "rle-", "segmentation-", "object-", "no-mask", "category-unknown")
#: Boxes with a side below this share of the image are circled.
_SMALL = 0.04

Box = tuple[float, float, float, float]


def as_html(report: Report) -> str:
    """Render the page, reading and drawing images as needed."""
    readable = [s for s in report.surveys if s.dataset is not None]
    splits, classes, sizes = [s.split for s in readable], class_table(readable), report.sizes
    return render(
        "check.html",
        report=report,
        surveys=[_set(survey) for survey in report.surveys],
        together=_problems(report.across),
        class_sets=splits,
        classes=_class_rows(classes, splits),
        more_classes=len(classes) - _CLASSES,
        size_plot=sizes and plot_histogram(LABELS, sizes.counts, EDGES, sizes.anchors, "pixels"),
        proposals=as_overrides(report.proposals),
    )


def _set(survey: Survey) -> dict[str, Any]:
    drawn = ((survey.images[index], draw_sample(survey, index)) for index in choose_samples(survey))
    samples = [_figure(pixels, f"image {i['id']}: {i['file_name']}") for i, pixels in drawn if pixels is not None]
    problems = _problems(survey.findings, survey)
    return {"set": survey, "facts": facts(survey), "problems": problems, "samples": samples}


def _problems(findings: Findings, survey: Survey | None = None) -> list[dict[str, Any]]:
    """Return each kind with its first places, and images of some of them."""
    out = []
    for name, kind, count in findings.kinds():
        found = findings.found[name]
        drawn = ((str(f.where), draw_problem(survey, f)) for f in found[:_TRIED] if survey is not None)
        figures = (_figure(pixels, where) for where, pixels in drawn if pixels is not None)
        shown = {"lines": [str(f) for f in found[:_LISTED]], "images": list(islice(figures, _DRAWN))}
        out.append({"name": name, "kind": kind, "count": count, **shown})
    return out


def _figure(pixels: np.ndarray, caption: str) -> dict[str, str]:
    return {"uri": jpeg_uri(pixels), "caption": caption}


def _class_rows(classes: ClassTable, splits: Sequence[str]) -> list[dict[str, Any]]:
    """Return bars in percent of the widest; each set has its own scale, the share of its objects."""
    totals = [max(sum(objects), 1) for objects in zip(*(objects for _, objects, _ in classes))]
    most = max((n / total for _, objects, _ in classes for n, total in zip(objects, totals)), default=0) or 1.0
    out = []
    for name, objects, images in classes[:_CLASSES]:
        bars = [
            {
                "width": round(100 * n / total / most, 1),
                "title": f"{n} objects in {m} images of {split} ({n / total:.1%})",
            }
            for n, m, total, split in zip(objects, images, totals, splits)
        ]
        out.append({"name": name, "bars": bars, "counts": objects})
    return out


# ------------------------------------------------------------ sample images


def choose_samples(survey: Survey) -> list[int]:
    """Return indices into ``survey.images``: one image per class, rarest first, then spread over the set."""
    if survey.dataset is None or not survey.images:
        return []
    images, classes = survey.dataset.object_images, survey.dataset.object_classes
    chosen: list[int] = []
    for index in np.argsort(survey.dataset.class_counts, kind="stable"):
        having = images[classes == index]
        if len(having) and len(chosen) < _SAMPLES:
            # Spread over the set, because neighbors are often similar.
            chosen.append(int(having[len(having) * (2 * len(chosen) + 1) // (2 * _SAMPLES)]))
    spread = np.linspace(0, len(survey.images) - 1, _SAMPLES - len(chosen)).astype(int).tolist()
    return list(dict.fromkeys([*chosen, *spread, *range(len(survey.images))]))[:_SAMPLES]


def draw_sample(survey: Survey, index: int) -> np.ndarray | None:
    """Draw an image with all its annotations; None if it cannot be read, or is not of the size in the json."""
    assert survey.dataset is not None
    image = survey.images[index]
    pixels = survey.reader.rgb_or_none(survey.path(image))
    if pixels is None or pixels.shape[:2] != (image["height"], image["width"]):
        return None
    record, names = survey.dataset.records[index], survey.dataset.class_names
    drawn = draw_annotations(pixels, record, names, min_size=_SIDE, max_size=4 * _SIDE, labels="fit")
    fitted = Image.fromarray(drawn)
    fitted.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
    return np.array(fitted)


# ------------------------------------------------------------ images of problems


def draw_problem(survey: Survey, finding: Problem) -> np.ndarray | None:
    """Draw a faulty annotation on its image, box in red and mask in yellow; None if nothing is visible."""
    if survey.content is None or not finding.kind.startswith(_VISIBLE):
        return None
    found = survey.content.find(finding.where.image, finding.where.annotation)
    if found is None:
        return None
    image, raw = found
    box, polygons = _drawable_box(raw.get("bbox"), image), _drawable_polygons(raw.get("segmentation"), image)
    pixels = survey.reader.rgb_or_none(survey.path(image)) if box or polygons else None
    if pixels is None:
        return None
    _tint_rle(pixels, raw.get("segmentation"), image)
    scale = _SIDE / max(pixels.shape[:2])
    size = max(round(pixels.shape[1] * scale), 1), max(round(pixels.shape[0] * scale), 1)
    margin = round(0.12 * _SIDE)  # the faulty part may be outside the image
    sheet = ImageOps.expand(Image.fromarray(pixels).resize(size), margin, _GROUND)
    canvas = ImageDraw.Draw(sheet)
    for polygon in polygons:
        points = [(x * scale + margin, y * scale + margin) for x, y in zip(polygon[0::2], polygon[1::2])]
        canvas.line([*points, points[0]], fill=_YELLOW, width=3)
    if box is not None:
        (x0, x1), (y0, y1) = (sorted(v * scale + margin for v in box[k::2]) for k in (0, 1))
        canvas.rectangle((x0, y0, x1, y1), outline=_RED, width=3)
        if min(x1 - x0, y1 - y0) < _SMALL * _SIDE:
            radius = max(x1 - x0, y1 - y0) / 2 + 14
            canvas.circle(((x0 + x1) / 2, (y0 + y1) / 2), radius, outline=_RED, width=3)
    return np.array(sheet)


def _tint_rle(pixels: np.ndarray, segmentation: Any, image: dict[str, Any]) -> None:
    """Tint an RLE mask in place, if it can be decoded."""
    if not isinstance(segmentation, dict) or pixels.shape[:2] != (image["height"], image["width"]):
        return
    try:
        checked, _ = check_segmentation(segmentation, image["height"], image["width"])
    except Defect:
        return
    if checked is not None:
        tint(pixels, coco_mask.decode(checked).astype(bool), _YELLOW, 0.55)


def _drawable_box(bbox: Any, image: dict[str, Any]) -> Box | None:
    """Return XYXY clipped to slightly more than the image; None for an invalid box."""
    if not isinstance(bbox, (list, tuple)) or len(bbox) != 4 or not all(is_number(v) for v in bbox):
        return None
    x, y, w, h = (float(v) for v in bbox)
    size = np.array([image["width"], image["height"]] * 2)
    x0, y0, x1, y1 = np.clip((x, y, x + w, y + h), -0.2 * size, 1.2 * size).tolist()
    return x0, y0, x1, y1


def _drawable_polygons(pieces: Any, image: dict[str, Any]) -> list[list[float]]:
    if not isinstance(pieces, list) or not all(isinstance(p, (list, tuple)) for p in pieces):
        return []
    far = 10.0 * max(image["width"], image["height"])
    good = (p for p in usable_pieces(pieces) if all(is_number(v) and abs(v) < far for v in p))
    return [[float(v) for v in p] for p in good]
