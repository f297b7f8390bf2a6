"""Charts of a report's tables: the paper's Figures 1, 4, 5 and 6, and what a detection did over its training."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from gn_det.classification.recording import PERCENTILES
from gn_det.compare.columns import COLUMNS
from gn_det.compare.outcomes import Results, RowResult, common_place, published_rows
from gn_det.compare.suite import DETECT, Grid, Table
from gn_det.visualize.plots import Line, plot_lines, smooth

#: Points of a drawn curve; and of a loss that are averaged, to each side.
_MOST_POINTS, _SMOOTH = 200, 2


def charts(results: Results, table: Table) -> list[dict[str, Any]]:
    """Title, drawing and legend of every chart of a table that has something to show."""
    rows = results.of(table.rows)
    if table.grid is not None:
        found = _of_grid(rows, table, table.grid)
    elif rows[0].row.kind == DETECT:
        found = _of_detections(rows)
    else:
        found = _of_classifiers(rows)
    return [chart for chart in found if chart["lines"]]


def _of_detections(rows: Sequence[RowResult]) -> list[dict[str, Any]]:
    box, mask, loss = (_curves(rows, key) for key in ("box_ap", "mask_ap", "loss"))
    by_time = _curves(rows, "box_ap", by_time=True)
    return [
        _chart("box AP over iterations", box, "iterations", "box AP", from_zero=True),
        _chart("mask AP over iterations", mask, "iterations", "mask AP", from_zero=True),
        _chart("box AP against training time", by_time, "minutes of training", "box AP", from_zero=True),
        _chart("Loss", loss, "iterations", "total loss", dots=False, from_zero=True),
    ]


def _of_classifiers(rows: Sequence[RowResult]) -> list[dict[str, Any]]:
    """Training and validation error (Figure 4) on one scale, and percentiles of a recorded layer (Figure 6)."""
    parts = {"Training": _curves(rows, "train_error"), "Validation": _curves(rows, "top1_error")}
    found = _errors({f"{part} error over epochs": lines for part, lines in parts.items()})
    for result in rows:
        lines = []
        for index, percentile in enumerate(PERCENTILES):
            of_one = _curves([result], f"p{percentile}")
            lines += [Line(f"{percentile} %", line.points, index, line.runs) for line in of_one]
        layer = str(result.row.settings.get("record"))
        title = f"{result.row.title}: percentiles of {layer}"
        found.append(_chart(title, lines, "epochs", f"{layer} before norm and ReLU", dots=False))
    return found


def _of_grid(rows: Sequence[RowResult], table: Table, grid: Grid) -> list[dict[str, Any]]:
    """The number against the grid's columns (Figure 1); of an error also a panel a line of the grid (Figure 5)."""
    names = list(dict.fromkeys(r.row.labels[grid.rows] for r in rows))
    across = list(dict.fromkeys(r.row.labels[grid.columns] for r in rows))
    heading = COLUMNS[grid.value].heading
    lines = _grid_lines(rows, table, grid, names, across)
    found = [_chart(f"{heading} by {grid.columns}", lines, grid.columns, heading, categories=across)]
    if grid.value != "top1_error":
        return found
    panels = {}
    for name in names:
        part = [r for r in rows if r.row.labels[grid.rows] == name]
        curves = _curves(part, "top1_error", label=grid.columns, names=across)
        panels[f"{name}: validation error by {grid.columns}"] = curves
    return found + _errors(panels)


def _grid_lines(
    rows: Sequence[RowResult], table: Table, grid: Grid, names: Sequence[str], across: Sequence[str]
) -> list[Line]:
    """The numbers of a grid against its columns with their deviation over seeds, and published ones behind them.

    Empty without measured numbers.
    """
    place = common_place(rows)
    source, references = published_rows(rows, table.reference)
    measured, published = defaultdict(list), defaultdict(list)
    for result, reference in zip(rows, references):
        name, at = result.row.labels[grid.rows], across.index(result.row.labels[grid.columns])
        number = result.number(grid.value, place)
        if number is not None:
            measured[name].append((at, number.mean, number.std or 0.0))
        if reference is not None and grid.value in reference.values:
            published[name].append((at, reference.values[grid.value]))
    lines = [
        Line(f"{name} ({source})", np.array(sorted(found), dtype=float), names.index(name), published=True)
        for name, found in published.items()
    ]
    for name, found in measured.items():
        values = np.array(sorted(found), dtype=float)
        lines.append(Line(name, values[:, :2], names.index(name), spread=values[:, 2]))
    return lines if measured else []


def _chart(title: str, lines: list[Line], x: str, y: str, **options: Any) -> dict[str, Any]:
    return {"title": title, "lines": lines, "svg": plot_lines(lines, x, y, **options) if lines else Markup()}


def _errors(panels: Mapping[str, list[Line]]) -> list[dict[str, Any]]:
    """Charts of errors over epochs by title, on one scale that has room for all lines and the runs behind them."""
    lines = [line for part in panels.values() for line in part]
    values = np.concatenate([part[:, 1] for line in lines for part in (line.points, *line.runs)] or [np.zeros(1)])
    margin = 0.05 * np.ptp(values) or 1.0
    options: Any = {"dots": False, "limits": (values.min() - margin, values.max() + margin)}
    return [_chart(title, part, "epochs", "top-1 error (%)", **options) for title, part in panels.items()]


def _curves(
    rows: Sequence[RowResult], key: str, *, by_time: bool = False, label: str = "", names: Sequence[str] = ()
) -> list[Line]:
    """One line a row that has points ``key``: the mean over seeds, the single seeds faintly behind it.

    With ``by_time`` x is minutes of training, for rows that were timed on the common machine and day. The text of
    ``label`` names the lines, in the order of ``names``; "" takes the titles.
    """
    place = common_place(rows)
    lines = []
    for position, result in enumerate(rows):
        seconds = result.cost("s_per_iter", place) if by_time else 60.0
        runs = []
        for record in result.done if seconds is not None else ():
            points = np.array([(p["x"], p[key]) for p in record.curve if key in p]).reshape(-1, 2)
            points[:, 0] *= (seconds or 0.0) / 60
            if key == "loss" and len(points) >= 4 * _SMOOTH:  # losses jump from batch to batch
                points[:, 1] = smooth(points[:, 1], _SMOOTH)
            runs += [thin(points)] if len(points) else []
        if runs:
            name = result.row.labels[label] if label else result.row.title
            index = names.index(name) if label else position
            lines.append(Line(name, mean_curve(runs), index, runs if len(runs) > 1 else ()))
    return lines


def thin(points: np.ndarray) -> np.ndarray:
    """Reduce (N, 2) points to about 200 means of neighbors; few points are returned unchanged."""
    if len(points) <= _MOST_POINTS:
        return points
    return np.array([part.mean(axis=0) for part in np.array_split(points, _MOST_POINTS)])


def mean_curve(runs: Sequence[np.ndarray]) -> np.ndarray:
    """Mean over runs where all have a value, at the places of the first; straight between points."""
    low, high = max(run[0, 0] for run in runs), min(run[-1, 0] for run in runs)
    x = runs[0][(runs[0][:, 0] >= low) & (runs[0][:, 0] <= high), 0]
    return np.stack([x, np.mean([np.interp(x, run[:, 0], run[:, 1]) for run in runs], axis=0)], axis=1)
