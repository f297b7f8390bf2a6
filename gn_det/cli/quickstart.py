"""Train a small GN Mask R-CNN on generated shapes, evaluate it, and draw what it sees."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import TYPE_CHECKING

from gn_det.cli import flags
from gn_det.engine import choice
from gn_det.errors import TrainingError
from gn_det.text import as_line

if TYPE_CHECKING:
    from gn_det.data.coco import CocoDataset

#: Held-out images in the picture of predictions.
_SHOWN = 6
#: Larger images are scaled down to this longer side before anything is drawn on them.
_DRAWN = 1920

_DONE = """
In {minutes:.1f} minutes: box AP {box:.1f}, mask AP {mask:.1f} on {count} held-out images.
  {pictures}   truth and predictions
  {curves}   losses, AP and learning rate
  {weights}   the model: gn-det predict --weights {weights} IMAGE ... --output drawn/
Next, your own data in COCO format:
  gn-det train --config gn_fpn.yaml --train-json a.json --train-images imgs/ --val-json b.json --val-images imgs/ \
--epochs 12"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", default="output/quickstart", metavar="DIR", help="an earlier run there is replaced")
    flags.add_engine(parser)
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help=flags.OVERRIDES)


def run(args: argparse.Namespace) -> int:
    from gn_det.config import load_config
    from gn_det.data.sets import load_first_test_set
    from gn_det.engine.run import train
    from gn_det.visualize.plots import draw_curves

    folder = Path(args.output)
    cfg = load_config("quickstart.yaml", ["OUTPUT_DIR", args.output, *args.overrides])
    started = time.perf_counter()
    results = train(cfg, choice.load(choice.choose(args.engine)), overwrite=True)
    minutes = (time.perf_counter() - started) / 60
    weights, curves, pictures = folder / "model_best.pth", folder / "curves.png", folder / "predictions.png"
    if not weights.is_file():
        raise TrainingError(f"{weights} was not written: no evaluation gave an AP; train longer (SOLVER.MAX_ITER)")
    draw_curves(folder / "metrics.json", curves)
    held_out = load_first_test_set(cfg)
    draw_comparison(held_out, weights, pictures)
    paths = {"pictures": as_line(pictures), "curves": as_line(curves), "weights": as_line(weights)}
    box, mask = (results.get(name, float("nan")) for name in ("bbox/AP", "segm/AP"))
    print(_DONE.format(minutes=minutes, box=box, mask=mask, count=len(held_out), **paths))
    return 0


def draw_comparison(dataset: CocoDataset, weights: Path, path: Path) -> None:
    """Draw the ground truth of some images above what the model of ``weights`` finds in them, as one PNG."""
    from gn_det.engine.predictor import load_predictor, select, write_png
    from gn_det.visualize.draw import draw_annotations, draw_detections, draw_grid

    predictor = load_predictor(weights)
    truths, found = [], []
    for index in sorted({round(i * (len(dataset) - 1) / (_SHOWN - 1)) for i in range(_SHOWN)}) if len(dataset) else ():
        record = dataset.records[index]
        file = Path(record["file_name"])
        pixels = predictor.read(file)
        truths.append(draw_annotations(pixels, record, dataset.class_names, max_size=_DRAWN))
        detections = select(predictor.detect(file), 0.5, None)
        found.append(draw_detections(pixels, detections, dataset.class_names, max_size=_DRAWN))
    titles = ["truth"] * len(truths) + ["GN Mask R-CNN"] * len(found)
    write_png(path, draw_grid(truths + found, titles, columns=max(len(truths), 1)))
