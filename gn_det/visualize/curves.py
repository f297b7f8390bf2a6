"""The course of a training run as a picture, from its ``metrics.json``."""

from __future__ import annotations

import io
import json
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from gn_det.errors import DataError
from gn_det.files import atomic_write

#: Losses in the order of the picture, with what a reader calls them.
_LOSSES = {
    "loss_cls": "class",
    "loss_box_reg": "box",
    "loss_mask": "mask",
    "loss_rpn_cls": "RPN objectness",
    "loss_rpn_loc": "RPN box",
}
_COLORS = ("#1f77dc", "#ff7f0e", "#2caf3c", "#9455d3", "#8c563c")


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a ``metrics.json`` by iteration; of an iteration run twice (resume) the later values count.

    A half-written last line, as a killed run leaves it, is skipped.

    Raises:
        DataError: the file cannot be read, or no line of it is a metric.
    """
    merged: dict[int, dict[str, Any]] = {}
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                try:
                    entry = json.loads(line)
                except ValueError:
                    continue
                if isinstance(entry, dict) and isinstance(entry.get("iteration"), int):
                    merged.setdefault(entry["iteration"], {}).update(entry)
    except OSError as error:
        why = error.strerror or error
        raise DataError(f"{os.fspath(path)}: cannot be read ({why}); give the metrics.json of a run") from None
    if not merged:
        raise DataError(f"{os.fspath(path)}: holds no metrics; give the metrics.json of a run that logged something")
    return [merged[i] for i in sorted(merged)]


def draw_curves(metrics_json: str | os.PathLike[str], out_png: str | os.PathLike[str]) -> None:
    """Losses, AP and learning rate over the iterations, as a PNG written atomically.

    Args:
        metrics_json: one json object a line with ``iteration`` and Detectron2's metric names.
        out_png: path of the picture.

    Raises:
        DataError: no metrics in the file.
        WriteError: the picture cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    entries = read_metrics(metrics_json)
    figure = Figure(figsize=(13.5, 4.2), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)  # the Agg canvas, whatever backend the user has chosen
    losses, ap, lr = figure.subplots(1, 3, width_ratios=(1.25, 1.0, 0.8))
    _draw_losses(losses, entries)
    _draw_ap(ap, entries)
    _draw_lr(lr, entries)
    end = entries[-1]["iteration"] + 1
    for axes in (losses, ap, lr):
        axes.set_xlim(0, end)
        axes.set_xlabel("iteration")
        axes.grid(color="#e6e6e6", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130)
    atomic_write(out_png, buffer.getvalue())


def _series(entries: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Iterations and finite values of one metric."""
    pairs = [
        (e["iteration"], float(e[key]))
        for e in entries
        if isinstance(e.get(key), (int, float)) and math.isfinite(e[key])
    ]
    x, y = (np.array([p[k] for p in pairs]) for k in (0, 1))
    return x, y


def _smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving average over about a twentieth of the run, shrinking towards both ends."""
    half = max(len(values) // 40, 0)
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    reach = np.minimum(half, np.minimum(index, len(values) - 1 - index))
    return (total[index + reach + 1] - total[index - reach]) / (2 * reach + 1)


def _draw_losses(axes: Any, entries: Sequence[Mapping[str, Any]]) -> None:
    x, y = _series(entries, "total_loss")
    if len(x):
        axes.plot(x, y, color="#bbbbbb", linewidth=0.8)
        axes.plot(x, _smooth(y), color="#333333", linewidth=2.0, label="total")
    top = float(y.max()) if len(y) else 0.0
    for (key, name), color in zip(_LOSSES.items(), _COLORS):
        x, y = _series(entries, key)
        if len(x):
            axes.plot(x, _smooth(y), color=color, linewidth=1.4, label=name)
            top = max(top, float(y.max()))
    axes.set_title("Losses", loc="left", fontweight="bold")
    axes.set_ylim(0, top * 1.05 or 1)
    if axes.lines:
        axes.legend(frameon=False, fontsize=9)


def _draw_ap(axes: Any, entries: Sequence[Mapping[str, Any]]) -> None:
    axes.set_title("AP on the validation set", loc="left", fontweight="bold")
    for task, name, color in (("bbox", "box", "#1f77dc"), ("segm", "mask", "#2caf3c")):
        for metric, style in (("AP", "-"), ("AP50", ":")):
            x, y = _series(entries, f"{task}/{metric}")
            if len(x):
                axes.plot(x, y, style, color=color, marker="o", markersize=4, label=f"{name} {metric}")
                if metric == "AP":
                    _annotate_last(axes, x, y, color, below=task == "segm")
    axes.set_ylim(0, 100)
    if axes.lines:
        axes.legend(frameon=False, fontsize=9, loc="best")
    else:
        axes.text(0.5, 0.5, "no evaluation yet", transform=axes.transAxes, ha="center", color="#888888")


def _annotate_last(axes: Any, x: np.ndarray, y: np.ndarray, color: str, *, below: bool) -> None:
    """The last value as a number beside its point."""
    offset = (-2, -13 if below else 6)
    style = {"ha": "right", "color": color, "fontweight": "bold", "fontsize": 9}
    axes.annotate(f"{y[-1]:.1f}", (x[-1], y[-1]), textcoords="offset points", xytext=offset, **style)


def _draw_lr(axes: Any, entries: Sequence[Mapping[str, Any]]) -> None:
    x, y = _series(entries, "lr")
    axes.set_title("Learning rate", loc="left", fontweight="bold")
    if len(x):
        axes.plot(x, y, color="#9455d3", linewidth=1.8)
        axes.set_ylim(0, float(y.max()) * 1.08 or 1)
        axes.ticklabel_format(axis="y", style="plain", useOffset=False)
