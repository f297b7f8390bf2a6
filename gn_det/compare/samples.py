"""Predictions of several rows on the same validation images, side by side with the truth."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from gn_det.compare.results import Results, RowResult
from gn_det.compare.store import Record, Store
from gn_det.compare.suite import DETECT
from gn_det.errors import UserError
from gn_det.files import atomic_write
from gn_det.terminal import say

logger = logging.getLogger(__name__)

#: Longer side of a picture in the page, pixels; lowest score drawn.
_SIDE, _THRESHOLD = 420, 0.5
#: Larger images are scaled down to this longer side before anything is drawn on them; and images of a report.
_DRAWN, _MOST = 4 * _SIDE, 64


def sample_rows(results: Results) -> list[RowResult]:
    """Whose predictions are drawn: those the suite names, else the first row with a baseline behind that baseline."""
    suite = results.plan.suite
    named = [results.row(identity) for identity in suite.sample_rows]
    if not named:
        first = next((r for r in results.rows if r.row.kind == DETECT and r.row.baseline and r.done), None)
        named = [results.row(first.row.baseline), first] if first is not None and first.row.baseline else []
    return [r for r in named if r.done and r.done[0].weights and r.row.kind == DETECT]


def draw_samples(results: Results, store: Store) -> list[tuple[str, list[bytes]]]:
    """(title, JPEG files) of the truth and of each row, on the same images; empty where nothing can be drawn.

    Pictures are kept below ``samples/``, so that a report of finished runs needs no model.
    """
    rows = sample_rows(results)
    count = results.plan.suite.sample_images
    if not rows or not count:
        return []
    try:
        out = [("truth", _truth(rows[0].done[0], rows[0], results, store, count))]
        for result in rows:
            title = f"{result.row.title} (score ≥ {_THRESHOLD:g})"
            out.append((title, _predictions(result.done[0], result, results, store, count)))
    except (UserError, OSError) as error:  # the images or weights are gone: the numbers are still worth a report
        say(f"No sample predictions in the report: {error}")
        return []
    return out


def _cached(folder: Path, count: int) -> list[bytes]:
    files = sorted(folder.glob("*.jpg"))
    return [f.read_bytes() for f in files[:count]] if len(files) >= count else []


def _truth(record: Record, result: RowResult, results: Results, store: Store, count: int) -> list[bytes]:
    folder = store.root / "samples" / f"truth-{_name(record)}"
    kept = _cached(folder, count)
    if kept:
        return kept
    from gn_det.data.image import ImageReader
    from gn_det.visualize.draw import draw_annotations

    dataset, chosen = _images(result, results, count)
    reader = ImageReader.of(_cfg(result, results), "RGB")
    pictures = []
    for index in chosen:
        found = dataset.records[index]
        pixels = reader.read(found["file_name"])
        pictures.append(draw_annotations(pixels, found, dataset.class_names, min_size=_SIDE, max_size=_DRAWN))
    return _keep(folder, pictures)


def _predictions(record: Record, result: RowResult, results: Results, store: Store, count: int) -> list[bytes]:
    folder = store.root / "samples" / _name(record)
    kept = _cached(folder, count)
    if kept:
        return kept
    from gn_det.engine.predictor import load_predictor, select
    from gn_det.visualize.draw import draw_detections

    dataset, chosen = _images(result, results, count)
    predictor = load_predictor(store.folder_of(record) / record.weights, engine=results.plan.engine)
    pictures = []
    for index in chosen:
        path = Path(dataset.records[index]["file_name"])
        shown = select(predictor.detect(path), _THRESHOLD, None)
        pictures.append(
            draw_detections(predictor.read(path), shown, predictor.class_names, min_size=_SIDE, max_size=_DRAWN)
        )
    return _keep(folder, pictures)


def _images(result: RowResult, results: Results, count: int):  # type: ignore[no-untyped-def]
    """The validation set of a row and images spread over it, those with objects first."""
    from gn_det.data.sets import load_first_test_set

    dataset = load_first_test_set(_cfg(result, results))
    having = [i for i, n in enumerate(dataset.object_counts) if n] or list(range(len(dataset)))
    places = np.linspace(0, len(having) - 1, min(count, _MOST, len(having))).round().astype(int)
    return dataset, [having[i] for i in dict.fromkeys(places.tolist())]


def _cfg(result: RowResult, results: Results):  # type: ignore[no-untyped-def]
    job = next(j for j in results.plan.jobs if j.row.id == result.row.id)
    assert job.cfg is not None
    return job.cfg


def _name(record: Record) -> str:
    return re.sub(r"[^\w.-]", "_", f"{record.row}-{record.seed}-{record.key[:8]}")


def _keep(folder: Path, pictures: Sequence[np.ndarray]) -> list[bytes]:
    import io

    out = []
    for number, pixels in enumerate(pictures):
        picture = Image.fromarray(pixels)
        picture.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        picture.save(buffer, "JPEG", quality=88)
        atomic_write(folder / f"{number}.jpg", buffer.getvalue())
        out.append(buffer.getvalue())
    return out
