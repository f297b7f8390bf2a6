"""Write the report of a comparison: results.json, report.md, and report.html with curves and sample predictions."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image

from gn_det.compare.charts import charts
from gn_det.compare.outcomes import Results, RowResult, as_json
from gn_det.compare.runner import Store, write_json
from gn_det.compare.suite import DETECT
from gn_det.compare.views import findings, fold_view, full_view, run_view, views
from gn_det.config.defaults import edited
from gn_det.engine.engines import Engine
from gn_det.errors import UserError
from gn_det.files import atomic_write
from gn_det.terminal import say
from gn_det.visualize.draw import jpeg_bytes
from gn_det.visualize.html import jpeg_uri, render

#: Longer side of a sample image in pixels, and lowest score drawn; larger images are scaled to four times the side
#: before drawing.
_SIDE, _THRESHOLD = 420, 0.5
#: Sample images of a report.
_MOST_SAMPLES = 64
#: Config keys that differ in every run and are not shown.
_OWN = ("OUTPUT_DIR:", '"output":', "SEED:", "WEIGHTS:")


def write_report(results: Results, store: Store, date: str) -> None:
    """Write the three files to the folder of the store, each atomically; raise WriteError on failure."""
    found = findings(results)
    suite = results.plan.suite
    content: dict[str, Any] = {
        "suite": suite,
        "date": date,
        "state": _state(results),
        "findings": list(found.values()),
        "chance": f"About 1 in 20 intervals excludes zero by chance: {len(found) / 20:.0f} of these {len(found)}.",
        "tables": [(views(results, table), charts(results, table)) for table in suite.tables],
        "folds": fold_view(results),
        "full": [full for table in suite.tables if (full := full_view(results, table)) is not None],
        "runs": run_view(results),
        "configs": _configs(results),
        "samples": _samples(results, store),
    }
    sentences = {identity: finding.sentences for identity, finding in found.items()}
    write_json(store.root / "results.json", as_json(results, sentences, date))
    atomic_write(store.root / "report.md", render("compare.md", **content))
    atomic_write(store.root / "report.html", render("compare.html", **content))
    say(f"Report: {store.root / 'report.html'}, report.md, results.json")


def _state(results: Results) -> list[tuple[str, str]]:
    """Count rows by state, and their seeds."""
    states = [r.status for r in results.rows]
    parts = {"rows done": states.count("done"), "failed": states.count("failed"), "left out": states.count("left out")}
    parts["not finished"] = len(states) - sum(parts.values())
    seeds = sorted({len(r.wanted) for r in results.rows if r.wanted})
    if results.plan.suite.folds:
        seeds, parts = [], {**parts, "folds": results.plan.suite.folds}
    shown = [(str(n), name) for name, n in parts.items() if n or name == "rows done"]
    return shown + [(" or ".join(map(str, seeds)), "seed per row" if seeds == [1] else "seeds per row")] * bool(seeds)


def _configs(results: Results) -> list[dict[str, Any]]:
    """Return the resolved config of each row, and the lines that differ from its baseline's."""
    lines = {r.row.id: r.done[0].config.splitlines() if r.done else [] for r in results.rows}
    out = []
    for result in (r for r in results.rows if lines[r.row.id]):
        own, before = lines[result.row.id], lines.get(result.row.baseline or "", [])
        diff = list(difflib.unified_diff(before, own, lineterm="", n=0))[2:] if before else []
        changed = [line for line in diff if not line[1:].strip().startswith(_OWN)]
        out.append({"row": result.row, "base": result.base and result.base.row, "changed": changed, "lines": own})
    return out


# ------------------------------------------------------------ sample predictions


def _samples(results: Results, store: Store) -> list[tuple[str, list[Markup]]]:
    """Return (title, images) of the ground truth and each row, on the same images; empty if nothing can be drawn.

    The rows are those named by the suite, else a baseline and its first compared row.
    """
    compared = ([r.base, r] for r in results.rows if r.row.kind == DETECT and r.base is not None and r.done)
    named = results.of(results.plan.suite.sample_rows) or next(compared, [])
    rows = [r for r in named if r.done and r.done[0].weights and r.row.kind == DETECT]
    if not rows or not results.plan.suite.sample_images:
        return []
    try:
        out = [("truth", _drawn(rows[0], results, store, truth=True))]
        return out + [(f"{r.row.title} (score ≥ {_THRESHOLD:g})", _drawn(r, results, store)) for r in rows]
    except (UserError, OSError) as error:  # images or weights are gone, but the numbers are still worth a report
        say(f"No sample predictions in the report: {error}")
        return []


def _drawn(result: RowResult, results: Results, store: Store, *, truth: bool = False) -> list[Markup]:
    """Return images with a row's detections, or the ground truth, as URIs.

    They are cached in ``samples/``, so that a report of finished runs needs no model.
    """
    record, count = result.done[0], min(results.plan.suite.sample_images, _MOST_SAMPLES)
    name = re.sub(r"[^\w.-]", "_", f"{record.row}-{record.seed}-{record.key[:8]}")
    folder = store.root / "samples" / (f"truth-{name}" if truth else name)
    kept = sorted(folder.glob("*.jpg"))[:count]
    if len(kept) < count:
        weights = None if truth else store.folder_of(record) / record.weights
        job = next(j for j in results.plan.jobs if (j.row.id, j.seed) == (record.row, record.seed))
        assert job.cfg is not None
        cfg = edited(job.cfg, {"OUTPUT_DIR": str(store.folder_of(record))})  # the files of its split are there
        kept = []
        for pixels in _drawings(cfg, weights, results.plan.engine, count):
            kept.append(folder / f"{len(kept)}.jpg")
            atomic_write(kept[-1], jpeg_bytes(pixels))
    return [jpeg_uri(path.read_bytes()) for path in kept]


def _drawings(cfg: Any, weights: Path | None, engine: Engine, count: int) -> Iterator[np.ndarray]:
    """Draw detections or ground truth on images spread over the validation set, those with objects first."""
    from gn_det.data.image import ImageReader
    from gn_det.data.sets import load_first_test_set
    from gn_det.data.split import split_keys
    from gn_det.prediction.predictor import Selection, load_predictor
    from gn_det.visualize.draw import draw_annotations, draw_detections

    dataset = load_first_test_set(split_keys(cfg))
    having = [i for i, n in enumerate(dataset.object_counts) if n] or list(range(len(dataset)))
    places = np.linspace(0, len(having) - 1, min(count, len(having))).round().astype(int)
    predictor = None if weights is None else load_predictor(weights, engine=engine)
    read = ImageReader.of(cfg, "RGB").read
    size: Any = {"min_size": _SIDE, "max_size": 4 * _SIDE}
    for index in dict.fromkeys(having[place] for place in places):
        found = dataset.records[index]
        path = Path(found["file_name"])
        if predictor is None:
            drawn = draw_annotations(read(path), found, dataset.class_names, **size)
        else:
            shown = Selection(_THRESHOLD)(predictor.detect(path))
            drawn = draw_detections(read(path), shown, predictor.class_names, **size)
        image = Image.fromarray(drawn)
        image.thumbnail((_SIDE, _SIDE), Image.Resampling.LANCZOS)
        yield np.asarray(image)
