"""The first thing a newcomer runs: train on generated shapes, evaluate, and show what was learnt."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from gn_det.data.coco import CocoDataset
from gn_det.errors import TrainingError
from gn_det.structures import Detections
from gn_det.text import as_line

#: Held-out images in the picture of predictions.
SHOWN = 6
#: Larger images are scaled down to this longer side before anything is drawn on them.
_DRAWN = 1920


def quickstart(output: str, overrides: Sequence[str] = (), *, engine: str = "auto") -> dict[str, float]:
    """Train ``quickstart.yaml``, evaluate it, and draw curves and predictions into ``output``.

    Args:
        output: folder for everything; an earlier quickstart in it is replaced.
        overrides: config keys, as on the command line.
        engine: "auto", "embedded" or "detectron2", see :mod:`gn_det.engine.choice`.

    Returns:
        The final metrics, such as ``bbox/AP`` and ``segm/AP`` in percent.
    """
    from gn_det.config import load_config
    from gn_det.data.sets import load_first_test_set
    from gn_det.engine import choice as engines
    from gn_det.engine import commands
    from gn_det.visualize.curves import draw_curves

    folder = Path(output)
    cfg = load_config("quickstart.yaml", ["OUTPUT_DIR", output, *overrides])
    started = time.perf_counter()
    results = commands.train(engines.load(engines.choose(engine)), cfg, overwrite=True)
    minutes = (time.perf_counter() - started) / 60
    weights = folder / "model_best.pth"
    if not weights.is_file():
        raise TrainingError(f"{weights} was not written: no evaluation gave an AP; train longer (SOLVER.MAX_ITER)")
    draw_curves(folder / "metrics.json", folder / "curves.png")
    held_out = load_first_test_set(cfg)
    picture = folder / "predictions.png"
    draw_comparison(held_out, weights, picture)
    print(
        f"\nIn {minutes:.1f} minutes: box AP {results.get('bbox/AP', float('nan')):.1f}, "
        f"mask AP {results.get('segm/AP', float('nan')):.1f} on {len(held_out)} held-out images.\n"
        f"  {as_line(picture)}   truth and predictions\n"
        f"  {as_line(folder / 'curves.png')}   losses, AP and learning rate\n"
        f"  {as_line(weights)}   the model: gn-det predict --weights {as_line(weights)} IMAGE ... --output drawn/\n"
        "Next, your own data in COCO format:\n"
        "  gn-det train --config gn_fpn.yaml --train-json a.json --train-images imgs/ --val-json b.json "
        "--val-images imgs/ --epochs 12"
    )
    return results


def draw_comparison(dataset: CocoDataset, weights: Path, picture: Path) -> None:
    """Draw the ground truth of some images above what the model of ``weights`` finds in them, as one PNG."""
    import io

    from PIL import Image

    from gn_det.engine.predictor import load_predictor
    from gn_det.evaluation.results import write_bytes_atomic
    from gn_det.visualize.draw import draw_annotations, draw_detections, draw_grid

    predictor = load_predictor(weights)
    truths, found = [], []
    for index in _spread(len(dataset)):
        record = dataset.records[index]
        pixels = predictor.read(Path(record["file_name"]))
        truths.append(draw_annotations(pixels, record, dataset.class_names, max_size=_DRAWN))
        detections = predictor.detect(Path(record["file_name"]))
        keep = detections.scores >= 0.5
        masks = None if detections.masks is None else detections.masks[keep]
        shown = Detections(
            detections.image_size, detections.boxes[keep], detections.scores[keep], detections.classes[keep], masks
        )
        found.append(draw_detections(pixels, shown, dataset.class_names, max_size=_DRAWN))
    titles = ["truth"] * len(truths) + ["GN Mask R-CNN"] * len(found)
    buffer = io.BytesIO()
    Image.fromarray(draw_grid(truths + found, titles, columns=max(len(truths), 1))).save(buffer, "PNG")
    write_bytes_atomic(str(picture), buffer.getvalue())


def _spread(count: int) -> list[int]:
    """At most ``SHOWN`` indices spread over ``count``."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(SHOWN, count))}) if count else []
