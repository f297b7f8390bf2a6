"""Render the page of ``gn-det eval --html``: how good a model is, how certain that is, and where it fails."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from gn_det.data.coco import CocoDataset
from gn_det.data.image import ImageReader
from gn_det.data.records import Record
from gn_det.evaluation.analysis import Analysis, Doubt, ImageErrors, Interval
from gn_det.files import atomic_write
from gn_det.text import one_line
from gn_det.visualize.draw import draw_annotations
from gn_det.visualize.html import jpeg_uri, render
from gn_det.visualize.plots import Line, plot_lines

#: Images to show, classes in curves and confusions, and the longer side of an image in pixels.
_WORST, _DOUBTS, _CURVES, _CONFUSED, _SIDE = 8, 12, 6, 12, 480
#: With fewer images, the page says that they prove little.
_FEW = 100
_TASKS = {"bbox": "box", "segm": "mask"}


def as_html(
    analyses: Sequence[Analysis],
    dataset: CocoDataset,
    results: Sequence[Mapping[str, Any]],
    category_ids: Sequence[int],
    class_names: Sequence[str],
    *,
    reader: ImageReader,
    weights: str = "",
) -> str:
    """Render the page.

    Args:
        analyses: one per task, of the same results; images show the errors of the last one.
        class_names: the model's classes, in the order of ``category_ids``.
        reader: reads images like the evaluation.
        weights: name of the evaluated file.
    """
    main = analyses[-1]
    pictures = _Pictures(dataset, results, dict(zip(category_ids, class_names)), main.thresholds, reader)
    shown = sorted((c for c in main.classes if len(c.curve)), key=lambda c: -c.objects)[:_CURVES]
    curves = [
        Line(c.name, np.concatenate([[[0.0, c.curve[0, 1]]], c.curve, [[c.curve[-1, 0], 0.0]]]), k)
        for k, c in enumerate(shown)
    ]
    calibration = [Line("all classes", main.calibration[:, :2]), Line("perfect", np.array([[0.0, 0], [1, 1]]), 12)]
    tasks = []
    for a in analyses:
        sizes = [{"name": name, "ap": percent(ap), "objects": n} for name, (ap, n) in a.sizes.items()]
        tasks.append({"name": _TASKS[a.task], "ap": percent(a.ap), "ap50": percent(a.ap50), "sizes": sizes})
    return render(
        "eval.html",
        json_file=dataset.json_file,
        weights=weights,
        images=main.images,
        few=main.images < _FEW,
        tasks=tasks,
        task=_TASKS[main.task],
        classes=[_row(c) for c in sorted(main.classes, key=lambda c: (math.isnan(c.ap[0]), c.ap[0]))],
        curves=curves,
        curve_plot=plot_lines(curves, "recall", "precision", dots=False, from_zero=True) if curves else "",
        calibration_plot=plot_lines(calibration, "score", "precision", from_zero=True) if len(main.calibration) else "",
        confusion=_confusion(main),
        worst=pictures.worst([e for e in main.worst if e.missed + e.false][:_WORST]),
        doubts=pictures.doubts(main.doubts[:_DOUBTS]),
        more_doubts=max(len(main.doubts) - _DOUBTS, 0),
    )


def write_csv(path: Path, analysis: Analysis) -> None:
    """Write one row per class, with unrounded numbers; undefined ones are empty."""
    buffer = io.StringIO()
    writer = csv.writer(buffer)
    writer.writerow(
        ["class", "objects", "detections", "AP", "AP_low", "AP_high", "AP50", "threshold", "F1", "precision", "recall"]
    )
    for c in analysis.classes:
        numbers = (*c.ap, c.ap50[0], c.threshold, c.f1, c.precision, c.recall)
        # A spreadsheet would evaluate a name that looks like a formula.
        name = f"'{c.name}" if c.name.startswith(("=", "+", "-", "@")) else c.name
        writer.writerow([name, c.objects, c.detections, *("" if math.isnan(v) else round(v, 4) for v in numbers)])
    atomic_write(path, buffer.getvalue().encode("utf-8", "backslashreplace"))


def percent(interval: Interval) -> str:
    """Return ``41.2 (38.0 to 44.1)``."""
    value, low, high = interval
    if math.isnan(value):
        return "-"
    return f"{value:.1f}" if math.isnan(low) else f"{value:.1f} ({low:.1f} to {high:.1f})"


def _row(c: Any) -> dict[str, Any]:
    fractions = {key: "-" if math.isnan(v := getattr(c, key)) else f"{v:.2f}" for key in _FRACTIONS}
    return {"name": c.name, "objects": c.objects, "ap": percent(c.ap), "ap50": percent(c.ap50), **fractions}


_FRACTIONS = ("threshold", "f1", "precision", "recall")


def _confusion(analysis: Analysis) -> dict[str, Any] | None:
    """Return the rows and columns of the classes with most errors; each cell has its share of the row."""
    matrix, classes = analysis.confusion, [c.name for c in analysis.classes]
    if not matrix.any():
        return None
    errors = matrix.sum(0) + matrix.sum(1) - 2 * np.diag(matrix)
    chosen = sorted(np.argsort(-errors[:-1], kind="stable")[:_CONFUSED].tolist()) + [len(classes)]
    names = [*classes, "nothing"]
    rows = []
    for i in chosen:
        total = max(int(matrix[i].sum()), 1)
        cells = [
            {"count": int(matrix[i, j]), "share": round(100 * matrix[i, j] / total), "right": i == j} for j in chosen
        ]
        rows.append({"name": names[i], "cells": cells})
    return {"columns": [names[j] for j in chosen], "rows": rows, "left": len(classes) + 1 - len(chosen)}


@dataclass
class _Pictures:
    """Draws ground truth and detections of single images, which are read when drawn."""

    dataset: CocoDataset
    results: Sequence[Mapping[str, Any]]
    names: Mapping[int, str]
    thresholds: Mapping[str, float]
    reader: ImageReader

    def worst(self, errors: Sequence[ImageErrors]) -> list[dict[str, Any]]:
        found = []
        for error in errors:
            record = self.dataset.records[error.index]
            pixels = self.reader.rgb_or_none(record["file_name"])
            if pixels is None:
                continue
            truth = [a for a in record["annotations"] if not a["iscrowd"]]
            missed = f"{error.missed} of {error.objects} objects missed"
            pair = {
                "truth": self._drawn(pixels, record, truth, self.dataset.class_names),
                "found": self._drawn(pixels, record, self._detections(record["image_id"]), list(self.names.values())),
            }
            found.append({**pair, "caption": f"{self._file(record)}: {missed}, {error.false} false detections"})
        return found

    def doubts(self, doubts: Sequence[Doubt]) -> list[dict[str, Any]]:
        found = []
        for doubt in doubts:
            record = self.dataset.records[doubt.index]
            pixels = self.reader.rgb_or_none(record["file_name"])
            if pixels is None:
                continue
            what = "no label" if doubt.kind == "missing" else f"labeled {doubt.labeled}"
            caption = f"{self._file(record)}: {doubt.found} {doubt.score:.0%}, {what}"
            found.append({"uri": jpeg_uri(_cut(pixels, doubt.box)), "caption": caption})
        return found

    def _drawn(self, pixels: np.ndarray, record: Record, objects: list[Any], names: Sequence[str]) -> Any:
        shown = Record({**record, "annotations": objects})
        return jpeg_uri(draw_annotations(pixels, shown, names, min_size=_SIDE, max_size=_SIDE, labels="fit"))

    def _file(self, record: Any) -> str:
        return one_line(Path(record["file_name"]).name, 60)

    def _detections(self, image_id: Any) -> list[Any]:
        """Return the detections above their class's threshold as annotations."""
        index = {category: k for k, category in enumerate(self.names)}
        return [
            {"bbox": r["bbox"], "category_id": index[r["category_id"]], "segmentation": r.get("segmentation")}
            for r in self.results
            if r["image_id"] == image_id
            and r["category_id"] in index
            and r["score"] >= self.thresholds.get(self.names[r["category_id"]], 0.5)
        ]


def _cut(pixels: np.ndarray, box: Sequence[float]) -> np.ndarray:
    """Crop the surroundings of an XYWH box, with the box drawn."""
    x, y, w, h = box
    margin = max(w, h, 24.0)
    left, top = max(round(x - margin), 0), max(round(y - margin), 0)
    part = pixels[top : round(y + h + margin) + 1, left : round(x + w + margin) + 1]
    scale = _SIDE / max(part.shape[:2])
    image = Image.fromarray(np.ascontiguousarray(part))
    image = image.resize((max(round(image.width * scale), 1), max(round(image.height * scale), 1)))
    corners = [(x - left) * scale, (y - top) * scale, (x + w - left) * scale, (y + h - top) * scale]
    ImageDraw.Draw(image).rectangle(corners, outline=(230, 30, 45), width=3)
    return np.array(image)
