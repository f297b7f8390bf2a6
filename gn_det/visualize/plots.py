"""Plots: the course of a training run as PNG, and charts of reports as SVG in the colors of the page around them."""

from __future__ import annotations

import io
import json
import math
import os
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from gn_det.errors import DataError
from gn_det.files import atomic_write
from gn_det.text import one_line
from gn_det.visualize.colors import hex_color

#: Losses in the order of the plot, with what a reader calls them.
_LOSSES = {
    "loss_cls": "class",
    "loss_box_reg": "box",
    "loss_mask": "mask",
    "loss_rpn_cls": "RPN objectness",
    "loss_rpn_loc": "RPN box",
}
#: Placeholder colors while a chart is drawn, replaced by those of the page.
_INK, _LINE = "#010203", "#010204"
_STYLE: Any = {"axes.grid": True, "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False}
_PNG_STYLE = {**_STYLE, "axes.titlelocation": "left", "axes.titleweight": "bold", "grid.color": "#e6e6e6"}
_SVG_STYLE = {
    **_STYLE,
    "svg.fonttype": "none",
    "svg.hashsalt": "gn_det",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 11.0,
    "grid.color": _LINE,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
}
#: Parts of an SVG that are only needed in a separate file, and the font that was only used to measure text.
_NOT_INLINE = re.compile(r' xmlns(:\w+)?="[^"]*"| width="[\d.]+pt" height="[\d.]+pt"| font-family: [^;"]*;?')
#: Points beyond which a curve has no dots.
_MOST_DOTS = 60
DASHES = ("solid", "dashed", "dotted")


@dataclass
class Line:
    """One curve of a chart."""

    name: str  # for the legend, which belongs to the page
    points: np.ndarray  # (N, 2) x and y
    index: int = 0  # of its color and dash
    runs: Sequence[np.ndarray] = ()  # (M, 2) curves of single runs, drawn faintly behind it
    spread: np.ndarray | None = None  # (N,) half heights of error bars; None draws none
    published: bool = False  # not measured here; drawn dotted and faintly, behind the others

    @property
    def dash(self) -> str:
        """CSS and matplotlib name of its line style; a new one where the colors are used up."""
        return "dotted" if self.published else DASHES[self.index // 10 % len(DASHES)]

    @property
    def color(self) -> str:
        return hex_color(self.index % 10)


def plot_lines(
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    *,
    dots: bool = True,
    categories: Sequence[str] = (),
    from_zero: bool = False,
    limits: tuple[float, float] | None = None,
) -> Markup:
    """Curves with axes as SVG, without a legend.

    Args:
        lines: at least one, each with points.
        x_label, y_label: of the axes.
        dots: mark the points.
        categories: names of x = 0, 1, 2 ...; empty for numbers.
        from_zero: let y begin at 0.
        limits: of y, for charts that are to be compared.
    """

    def draw(axes: Any) -> None:
        for line in lines:
            behind = {"alpha": 0.55, "zorder": 1} if line.published else {}
            style = {"color": line.color, "linestyle": line.dash, **behind}
            for run in line.runs:
                axes.plot(run[:, 0], run[:, 1], **{**style, "linewidth": 0.8, "alpha": 0.35})
            marker = "o" if (dots and len(line.points) <= _MOST_DOTS) or len(line.points) == 1 else None
            axes.errorbar(*line.points.T, yerr=line.spread, marker=marker, markersize=4, linewidth=1.8, **style)
        axes.set(xlabel=x_label, ylabel=y_label)
        if categories:
            axes.set_xticks(range(len(categories)), [one_line(name, 20) for name in categories])
        else:
            axes.xaxis.set_major_formatter(lambda x, _: f"{x / 1000:g}k" if abs(x) >= 10_000 else f"{x:g}")
            axes.set_xlim(left=0)
        if from_zero:
            axes.set_ylim(bottom=0)
        if limits is not None:
            axes.set_ylim(limits)

    return _svg(draw, (5.6, 3.3))


def plot_histogram(
    labels: Sequence[str], counts: Sequence[int], edges: Sequence[float], marks: Sequence[float], what: str
) -> Markup:
    """Bars with their share above, and marks below them, as SVG.

    Args:
        labels: below each bar.
        counts: heights; one more than ``edges``.
        edges: borders between the bars, ascending.
        marks: places on the scale of ``edges``.
        what: of the x axis.
    """
    places = np.interp(marks, [0, *edges, 2 * edges[-1]], np.arange(len(counts) + 1) - 0.5)

    def draw(axes: Any) -> None:
        bars = axes.bar(range(len(counts)), counts, color=hex_color(0), width=0.8)
        share = [c / max(sum(counts), 1) for c in counts]
        axes.bar_label(bars, ["" if not s else f"{s:.0%}" if s >= 0.01 else "<1%" for s in share])
        axes.set_xticks(range(len(labels)), labels)
        axes.set(xlabel=what, yticks=[])
        axes.tick_params(axis="x", pad=20 if len(marks) else 4)
        axes.grid(False)
        axes.spines["left"].set_visible(False)
        axes.plot(
            places, [-0.03] * len(places), "^", color=hex_color(1), transform=axes.get_xaxis_transform(), clip_on=False
        )
        for mark, place in zip(marks, places):
            at = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points", "xytext": (0, -17)}
            axes.annotate(f"{mark:g}", (place, -0.03), ha="center", color=hex_color(1), fontsize=10, **at)

    return _svg(draw, (8.0, 2.8))


def _svg(draw: Callable[[Any], None], size: tuple[float, float]) -> Markup:
    """What ``draw`` puts on axes of ``size`` inches, as inline SVG: the same text for the same drawing."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    buffer = io.StringIO()
    with rc_context(_SVG_STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # glyphs that the measuring font lacks; the browser has others
        figure = Figure(figsize=size, layout="constrained")
        draw(figure.subplots())
        no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    text = buffer.getvalue()
    text = _NOT_INLINE.sub("", text[text.index("<svg") :])
    return Markup(text.replace(_INK, "currentColor").replace(_LINE, "var(--line)"))


# ------------------------------------------------------------ training runs


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a ``metrics.json`` by iteration; of an iteration run twice (resume) the later values count.

    A half-written last line, as a killed run leaves it, is skipped.

    Raises:
        DataError: the file cannot be read, or no line of it is a metric.
    """
    merged: dict[int, dict[str, Any]] = {}
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                with suppress(ValueError, RecursionError):
                    entry = json.loads(line)
                    if isinstance(entry, dict) and isinstance(entry.get("iteration"), int):
                        merged.setdefault(entry["iteration"], {}).update(entry)
    except OSError as error:
        why = error.strerror or error
        raise DataError(f"{os.fspath(path)}: cannot be read ({why}); give the metrics.json of a run") from None
    if not merged:
        raise DataError(f"{os.fspath(path)}: holds no metrics; give the metrics.json of a run that logged something")
    return [merged[i] for i in sorted(merged)]


def draw_curves(metrics_json: str | os.PathLike[str], out_png: str | os.PathLike[str]) -> None:
    """Draw losses, AP and learning rate over the iterations into a PNG, written atomically.

    Args:
        metrics_json: one json object a line with ``iteration`` and Detectron2's metric names.
        out_png: path of the plot.

    Raises:
        DataError: no metrics in the file.
        WriteError: the plot cannot be written.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    entries = read_metrics(metrics_json)
    buffer = io.BytesIO()
    with rc_context(_PNG_STYLE):
        figure = Figure(figsize=(13.5, 4.2), layout="constrained", facecolor="white")
        draws = {"Losses": _draw_losses, "AP on the validation set": _draw_ap, "Learning rate": _draw_lr}
        for axes, (title, draw) in zip(figure.subplots(1, 3, width_ratios=(1.25, 1.0, 0.8)), draws.items()):
            draw(axes, entries)
            axes.set(title=title, xlabel="iteration", xlim=(0, entries[-1]["iteration"] + 1))
        figure.savefig(buffer, format="png", dpi=130)
    atomic_write(out_png, buffer.getvalue())


def _series(entries: Sequence[Mapping[str, Any]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Iterations and finite values of one metric."""
    pairs = [
        (e["iteration"], float(e[key]))
        for e in entries
        if isinstance(e.get(key), (int, float)) and math.isfinite(e[key])
    ]
    x, y = np.array(pairs, dtype=float).reshape(-1, 2).T
    return x, y


def smooth(values: np.ndarray, half: int) -> np.ndarray:
    """Centered moving average over ``2 * half + 1`` values, shrinking toward both ends."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    reach = np.minimum(half, np.minimum(index, len(values) - 1 - index))
    mean: np.ndarray = (total[index + reach + 1] - total[index - reach]) / (2 * reach + 1)
    return mean


def _draw_losses(axes: Any, entries: Sequence[Mapping[str, Any]]) -> None:
    x, total = _series(entries, "total_loss")
    top = total.max(initial=0.0)
    if len(x):
        axes.plot(x, total, color="#bbbbbb", linewidth=0.8)
        axes.plot(x, smooth(total, len(x) // 40), color="#333333", linewidth=2.0, label="total")
    for index, (key, name) in enumerate(_LOSSES.items()):
        x, y = _series(entries, key)
        if len(x):
            axes.plot(x, smooth(y, len(x) // 40), color=hex_color(index), linewidth=1.4, label=name)
            top = max(top, y.max())
    axes.set_ylim(0, top * 1.05 or 1)
    if axes.lines:
        axes.legend(frameon=False, fontsize=9)


def _draw_ap(axes: Any, entries: Sequence[Mapping[str, Any]]) -> None:
    for task, name, color, below in (("bbox", "box", hex_color(0), False), ("segm", "mask", hex_color(2), True)):
        for metric, style in (("AP", "-"), ("AP50", ":")):
            x, y = _series(entries, f"{task}/{metric}")
            if not len(x):
                continue
            axes.plot(x, y, style, color=color, marker="o", markersize=4, label=f"{name} {metric}")
            if metric == "AP":
                at = {"textcoords": "offset points", "xytext": (-2, -13 if below else 6), "ha": "right"}
                axes.annotate(f"{y[-1]:.1f}", (x[-1], y[-1]), color=color, fontweight="bold", fontsize=9, **at)
    axes.set_ylim(0, 100)
    if axes.lines:
        axes.legend(frameon=False, fontsize=9, loc="best")
    else:
        axes.text(0.5, 0.5, "no evaluation yet", transform=axes.transAxes, ha="center", color="#888888")


def _draw_lr(axes: Any, entries: Sequence[Mapping[str, Any]]) -> None:
    x, y = _series(entries, "lr")
    if len(x):
        axes.plot(x, y, color=hex_color(3), linewidth=1.8)
        axes.set_ylim(0, y.max() * 1.08 or 1)
        axes.ticklabel_format(axis="y", style="plain", useOffset=False)
