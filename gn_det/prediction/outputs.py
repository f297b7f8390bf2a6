"""Write the detections of images in formats that other tools read."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gn_det.errors import ConfigError
from gn_det.files import atomic_write, json_bytes
from gn_det.text import did_you_mean, shown

#: Name of the json beside the drawings.
PREDICTIONS_FILE = "predictions.json"
CSV_FILE = "predictions.csv"
#: Outputs for images; a dataset format becomes a folder of that name.
OUTPUTS = ("drawings", "coco", "csv", "labelme", "cvat", "yolo", "masks")


def check_outputs(save: Sequence[str]) -> None:
    """Raise ConfigError unless every name is one of :data:`OUTPUTS`."""
    if not save:
        raise ConfigError(f"--save is empty; use {', '.join(OUTPUTS)}")
    for name in save:
        if name not in OUTPUTS:
            hint = did_you_mean(name, OUTPUTS) or f"; use {', '.join(OUTPUTS)}"
            raise ConfigError(f"unknown output {shown(name)}{hint}")


def write_outputs(save: Sequence[str], document: dict[str, list[Any]], folder: Path) -> list[str]:
    """Write everything except the drawings; return what was lost."""
    notes: list[str] = []
    for name in save:
        if name == "coco":
            atomic_write(folder / PREDICTIONS_FILE, json_bytes(document))
        elif name == "csv":
            atomic_write(folder / CSV_FILE, _csv(document))
        elif name != "drawings":
            from gn_det.data.formats.exchange import write

            stems = [Path(image["drawing"]).stem for image in document["images"]]
            notes += write(name, document, folder / name, Path.cwd(), stems, outlines=name != "masks")
    return notes


def _csv(document: dict[str, list[Any]]) -> bytes:
    """Return one line per detection: file, class, score, box in pixels, area."""
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["file_name", "class", "score", "x0", "y0", "x1", "y1", "area"])
    files = {image["id"]: image["file_name"] for image in document["images"]}
    for a in document["annotations"]:
        x, y, w, h = a["bbox"]
        numbers = [f"{value:.6g}" for value in (a["score"], x, y, x + w, y + h, a["area"])]
        lines.writerow([files[a["image_id"]], a["category_name"], *numbers])
    return text.getvalue().encode("utf-8", "backslashreplace")
