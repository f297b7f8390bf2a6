"""Summary of a finished run: AP, training curves, predictions beside the ground truth, and the next command."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from gn_det.errors import UserError
from gn_det.text import as_line

if TYPE_CHECKING:
    from fvcore.common.config import CfgNode

    from gn_det.data.coco import CocoDataset

#: Metrics that are shown.
_TITLES = {"bbox/AP": "box AP", "segm/AP": "mask AP"}
#: Held-out images in the picture of predictions.
_SHOWN = 6
#: Larger images are scaled down to this longer side before anything is drawn on them.
_DRAWN = 1920


def show_outcome(cfg: CfgNode, results: Mapping[str, float], seconds: float, next_command: str = "") -> None:
    """Draw ``curves.png`` and ``predictions.png`` into OUTPUT_DIR and print where everything is.

    A drawing that fails is only reported: the run itself has succeeded.
    """
    if os.environ.get("RANK", "0") != "0":  # torchrun starts the command once per process
        return
    from gn_det.data.sets import load_first_test_set
    from gn_det.data.split import split_keys
    from gn_det.engine.loggers import send_pictures
    from gn_det.visualize.plots import draw_curves

    folder = Path(cfg.OUTPUT_DIR)
    weights = next((p for p in (folder / "model_best.pth", folder / "model_final.pth") if p.is_file()), None)
    drawn, problems = [], []
    try:
        draw_curves(folder / "metrics.json", folder / "curves.png")
        drawn.append(("curves.png", "losses, AP and learning rate"))
        if results and weights is not None:
            draw_comparison(
                load_first_test_set(split_keys(cfg)), weights, folder / "predictions.png", device=cfg.MODEL.DEVICE
            )
            drawn.append(("predictions.png", "predictions below the ground truth"))
    except UserError as error:
        problems.append(f"  not drawn: {as_line(error)}")
    try:
        send_pictures(cfg, [folder / name for name, _ in drawn])
    except UserError as error:
        problems.append(f"  not sent: {as_line(error)}")
    if weights is not None:
        drawn.append((weights.name, "the model"))
    measured = [f"{title} {results[name]:.1f}" for name, title in _TITLES.items() if name in results]
    lines = ["", f"Done in {seconds / 60:.1f} min" + "".join(f", {text}" for text in measured)]
    width = max((len(name) for name, _ in drawn), default=0)
    lines += [f"  {as_line(folder)}/{name:{width}s}  {what}" for name, what in drawn] + problems
    if weights is not None:
        lines += ["Next:", f"  gn-det predict --weights {as_line(weights)} \\", "      --output drawn/ IMAGE ..."]
    print("\n".join(lines) + next_command)


def draw_comparison(dataset: CocoDataset, weights: Path, path: Path, device: str = "auto") -> None:
    """Draw the ground truth of some images above the detections of a model, as one PNG."""
    from gn_det.prediction.images import write_png
    from gn_det.prediction.predictor import Selection, load_predictor
    from gn_det.visualize.draw import draw_annotations, draw_detections, draw_grid

    predictor = load_predictor(weights, device=device)
    truths, found = [], []
    for index in sorted({round(i * (len(dataset) - 1) / (_SHOWN - 1)) for i in range(_SHOWN)}) if len(dataset) else ():
        record = dataset.records[index]
        file = Path(record["file_name"])
        pixels = predictor.reader.read(file)
        truths.append(draw_annotations(pixels, record, dataset.class_names, max_size=_DRAWN))
        detections = Selection(0.5)(predictor.detect(file))
        found.append(draw_detections(pixels, detections, dataset.class_names, max_size=_DRAWN))
    titles = ["ground truth"] * len(truths) + ["predictions"] * len(found)
    write_png(path, draw_grid(truths + found, titles, columns=max(len(truths), 1)))
