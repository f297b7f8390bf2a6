"""Render the page of ``gn-det eval --html``: how good a model is, how certain that is, and where it fails."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
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
    wrong = main.confusion.sum(0) + main.confusion.sum(1) - 2 * np.diag(main.confusion)
    most_confused = np.argsort(-wrong[:-1], kind="stable")[:_CONFUSED]
    return render(
        "eval.html",
        json_file=dataset.json_file,
        weights=weights,
        analyses=analyses,
        main=main,
        percent=percent,
        tasks=_TASKS,
        few=main.images < _FEW,
        classes=sorted(main.classes, key=lambda c: (math.isnan(c.ap[0]), c.ap[0])),
        names=[*(c.name for c in main.classes), "nothing"],
        confused=[*sorted(most_confused.tolist()), len(main.classes)],
        curves=curves,
        curve_plot=plot_lines(curves, "recall", "precision", dots=False, from_zero=True) if curves else "",
        calibration_plot=plot_lines(calibration, "score", "precision", from_zero=True) if len(main.calibration) else "",
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
        for error, record, pixels, file in self._read(errors):
            truth = [a for a in record["annotations"] if not a["iscrowd"]]
            detections, names = self._detections(record["image_id"]), list(self.names.values())
            caption = f"{file}: {error.missed} of {error.objects} objects missed, {error.false} false detections"
            pair = _drawn(pixels, record, truth, self.dataset.class_names), _drawn(pixels, record, detections, names)
            found.append({"truth": pair[0], "found": pair[1], "caption": caption})
        return found

    def doubts(self, doubts: Sequence[Doubt]) -> list[dict[str, Any]]:
        found = []
        for doubt, _, pixels, file in self._read(doubts):
            what = "no label" if doubt.kind == "missing" else f"labeled {doubt.labeled}"
            caption = f"{file}: {doubt.found} {doubt.score:.0%}, {what}"
            found.append({"uri": jpeg_uri(_cut(pixels, doubt.box)), "caption": caption})
        return found

    def _read(self, found: Sequence[Any]) -> Iterator[tuple[Any, Record, np.ndarray, str]]:
        """Yield each entry with its record, pixels and file name, unless the image cannot be read."""
        for one in found:
            record = self.dataset.records[one.index]
            if (pixels := self.reader.rgb_or_none(record["file_name"])) is not None:
                yield one, record, pixels, one_line(Path(record["file_name"]).name, 60)

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


def _drawn(pixels: np.ndarray, record: Record, objects: list[Any], names: Sequence[str]) -> Markup:
    shown = Record({**record, "annotations": objects})
    return jpeg_uri(draw_annotations(pixels, shown, names, min_size=_SIDE, max_size=_SIDE, labels="fit"))


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
