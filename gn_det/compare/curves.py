"""Which curves a report draws: AP and loss over iterations and time, error over epochs, error against batch size."""

from __future__ import annotations

import bisect
from collections.abc import Sequence

from gn_det.compare.charts import Line, Points, chart
from gn_det.compare.columns import COLUMNS
from gn_det.compare.results import Results, RowResult, common_place
from gn_det.compare.suite import DETECT, Table

#: Points of a loss curve that are averaged; evaluations are shown as they are.
_SMOOTH = 5


def charts_of(results: Results, table: Table) -> list[tuple[str, str]]:
    """(title, HTML) of every chart of a table that has something to show."""
    rows = [results.row(identity) for identity in table.rows]
    if table.grid is not None:
        title = f"{COLUMNS[table.grid.value].heading} by {table.grid.columns}"
        charts = [(title, _by_label(rows, table)), *(_by_epoch(rows, table) if rows[0].row.kind != DETECT else [])]
    elif rows[0].row.kind == DETECT:
        per_second = _seconds(rows)
        charts = [
            ("box AP over iterations", chart(_lines(rows, "box_ap"), "iterations", "box AP", from_zero=True)),
            ("mask AP over iterations", chart(_lines(rows, "mask_ap"), "iterations", "mask AP", from_zero=True)),
            (
                "box AP against training time",
                chart(_lines(rows, "box_ap", per_second), "minutes of training", "box AP", from_zero=True),
            ),
            ("Loss", chart(_lines(rows, "loss"), "iterations", "total loss", dots=False, from_zero=True)),
        ]
    else:
        charts = _by_epoch(rows, table)
    return [(title, drawn) for title, drawn in charts if drawn]


def _lines(
    rows: Sequence[RowResult],
    key: str,
    scale: Sequence[float | None] | None = None,
    names: Sequence[str] | None = None,
) -> list[Line]:
    """One line a row: the mean over seeds, the single seeds faintly behind it.

    Args:
        key: of a curve's points.
        scale: factor on x of each row; None leaves a row out.
        names: for the legend; None takes the titles.
    """
    lines = []
    for number, result in enumerate(rows):
        factor = 1.0 if scale is None else scale[number]
        if factor is None:
            continue
        runs = [_smooth([(p["x"] * factor, p[key]) for p in r.curve if key in p], key) for r in result.done]
        runs = [points for points in runs if points]
        if runs:
            name = result.row.title if names is None else names[number]
            lines.append(Line(name, mean_curve(runs), runs if len(runs) > 1 else (), number))
    return lines


def _smooth(points: Points, key: str) -> Points:
    """Losses jump from batch to batch; a short running mean shows where they go."""
    if key != "loss" or len(points) < 2 * _SMOOTH:
        return points
    reach = _SMOOTH // 2
    out = []
    for i, (x, _) in enumerate(points):
        near = points[max(i - reach, 0) : i + reach + 1]
        out.append((x, sum(y for _, y in near) / len(near)))
    return out


def mean_curve(runs: Sequence[Points]) -> Points:
    """Mean over runs where all have a value, at the places of the first; straight between points."""
    if len(runs) == 1:
        return runs[0]
    low, high = max(r[0][0] for r in runs), min(r[-1][0] for r in runs)
    return [(x, sum(_at(r, x) for r in runs) / len(runs)) for x, _ in runs[0] if low <= x <= high]


def _at(points: Points, x: float) -> float:
    place = bisect.bisect_left([p[0] for p in points], x)
    if place < len(points) and points[place][0] == x:
        return points[place][1]
    (x0, y0), (x1, y1) = points[place - 1], points[place]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def _seconds(rows: Sequence[RowResult]) -> list[float | None]:
    """Minutes per iteration of each row, None where it was not measured on the common machine and day."""
    place = common_place(rows)
    found = [result.cost("s_per_iter", place) for result in rows]
    return [None if s is None else s / 60 for s in found]


def _by_epoch(rows: Sequence[RowResult], table: Table) -> list[tuple[str, str]]:
    """Validation error over epochs: one chart, or one for each column of a grid."""
    if table.grid is None:
        drawn = chart(_lines(rows, "top1_error"), "epochs", "top-1 error (%)", dots=False)
        return [("Validation error over epochs", drawn)]
    charts = []
    names = list(dict.fromkeys(r.row.labels[table.grid.rows] for r in rows))
    for column in dict.fromkeys(r.row.labels[table.grid.columns] for r in rows):
        part = [r for r in rows if r.row.labels[table.grid.columns] == column]
        lines = _lines(part, "top1_error", names=[r.row.labels[table.grid.rows] for r in part])
        for line in lines:
            line.color = names.index(line.name)
        title = f"{table.grid.columns} {column}"
        charts.append((title, chart(lines, "epochs", "top-1 error (%)", dots=False)))
    return charts


def _by_label(rows: Sequence[RowResult], table: Table) -> str:
    """The number of a grid against its columns: the paper's figure of error against batch size."""
    assert table.grid is not None
    grid = table.grid
    across = list(dict.fromkeys(r.row.labels[grid.columns] for r in rows))
    lines = []
    for number, name in enumerate(dict.fromkeys(r.row.labels[grid.rows] for r in rows)):
        points, bars = [], []
        for place, column in enumerate(across):
            labels = {grid.rows: name, grid.columns: column}
            result = next((r for r in rows if {k: r.row.labels[k] for k in labels} == labels), None)
            found = result.spread(grid.value) if result is not None else None
            if found is not None:
                points.append((float(place), found.mean))
                bars.append(found.std or 0.0)
        lines.append(Line(name, points, color=number, spread=bars))
    return chart(lines, grid.columns, COLUMNS[grid.value].heading, categories=across)
