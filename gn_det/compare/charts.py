"""Curves as inline SVG: no library, no script, sharp at any size, light and dark by the page's own colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from gn_det.compare.html_parts import escape, svg

#: Colours that can be told apart on white and on near black; the dashes go on where they are used up.
COLORS = ("#3b82f6", "#f97316", "#22a559", "#a855f7", "#e5484d", "#0ea5b7", "#b7791f", "#ec4899", "#6b8e23", "#7c83a1")
_DASHES = ("", "7 4", "2 3")
_WIDTH, _HEIGHT = 560.0, 320.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 54.0, 22.0, 14.0, 46.0

Points = Sequence[tuple[float, float]]


@dataclass
class Line:
    """One curve.

    Attributes:
        name: in the legend.
        points: (x, y) in order.
        faint: curves of the single seeds, behind it.
        color: number of its colour and dash.
        spread: half heights of bars at the points, where there are some.
    """

    name: str
    points: Points
    faint: Sequence[Points] = ()
    color: int = 0
    spread: Sequence[float] = field(default_factory=list)


def chart(
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    *,
    dots: bool = True,
    categories: Sequence[str] = (),
    from_zero: bool = False,
) -> str:
    """Curves with axes and a legend below, as HTML; "" without a point.

    Args:
        lines: curves; those without points are left out of the drawing and the legend.
        x_label, y_label: of the axes.
        dots: mark the points.
        categories: names of x = 0, 1, 2 ...; empty for numbers.
        from_zero: let y begin at 0.
    """
    lines = [line for line in lines if line.points]
    all_points = [p for line in lines for points in (line.points, *line.faint) for p in points]
    if not all_points:
        return ""
    bars = [(y - s, y + s) for line in lines for (_, y), s in zip(line.points, line.spread)]
    x_low, x_high = _range([x for x, _ in all_points], zero=not categories, margin=0.04 if categories else 0)
    y_low, y_high = _range([y for _, y in all_points] + [v for bar in bars for v in bar], zero=from_zero, margin=0.06)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low) * (_WIDTH - _LEFT - _RIGHT)
        return _LEFT + across, _HEIGHT - _BOTTOM - (y - y_low) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [*_axes(x_low, x_high, y_low, y_high, place, categories, x_label, y_label)]
    for line in lines:
        style = _style(line.color)
        parts += [_path([place(*p) for p in points], style, "faint") for points in line.faint if len(points) > 1]
        at = [place(*p) for p in line.points]
        parts.append(_path(at, style, "line"))
        for (x, y), half in zip(line.points, line.spread):
            (px, low), (_, high) = place(x, y - half), place(x, y + half)
            parts.append(f'<line x1="{px:.1f}" x2="{px:.1f}" y1="{low:.1f}" y2="{high:.1f}" {style} class="bar"/>')
        if dots:
            for (px, py), (x, y) in zip(at, line.points):
                where = categories[int(x)] if categories else f"{x:g}"
                tip = escape(f"{line.name}: {y:.4g} at {where}")
                dot = f'cx="{px:.1f}" cy="{py:.1f}" r="3" fill="{_color(line.color)}"'
                parts.append(f"<circle {dot}><title>{tip}</title></circle>")
    return f'<div class="chart">{svg(parts, _WIDTH, _HEIGHT)}{_legend(lines)}</div>'


def _axes(
    x_low: float,
    x_high: float,
    y_low: float,
    y_high: float,
    place: object,
    categories: Sequence[str],
    x_label: str,
    y_label: str,
) -> list[str]:
    assert callable(place)
    parts = []
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    for value in ticks(y_low, y_high, 5):
        _, y = place(x_low, value)
        parts.append(f'<line x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}" class="rule"/>')
        style = 'text-anchor="end" dominant-baseline="central"'
        parts.append(f'<text x="{_LEFT - 7}" y="{y:.1f}" {style}>{number(value)}</text>')
    marks = list(enumerate(categories)) if categories else [(v, number(v)) for v in ticks(x_low, x_high, 6)]
    for value, text in marks:
        x, _ = place(value, y_low)
        parts.append(f'<text x="{x:.1f}" y="{bottom + 17}" text-anchor="middle">{escape(str(text))}</text>')
    parts.append(f'<line x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}" class="axis"/>')
    middle = (_LEFT + right) / 2
    parts.append(f'<text x="{middle}" y="{_HEIGHT - 8}" text-anchor="middle" class="name">{escape(x_label)}</text>')
    up = (_TOP + bottom) / 2
    turned = f'text-anchor="middle" transform="rotate(-90 13 {up})"'
    parts.append(f'<text x="13" y="{up}" {turned} class="name">{escape(y_label)}</text>')
    return parts


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers within a range, about so many."""
    span = max(high - low, 1e-12)
    step = 10 ** math.floor(math.log10(span / about))
    step = next(step * k for k in (1, 2, 2.5, 5, 10) if span / (step * k) <= about)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """Of an axis: no more digits than it needs."""
    if abs(value) >= 10000:
        return f"{value / 1000:g}k"
    return f"{round(value, 6):g}"


def _range(values: Sequence[float], *, zero: bool, margin: float) -> tuple[float, float]:
    low, high = min(values), max(values)
    low = min(low, 0.0) if zero else low
    room = (high - low or abs(high) or 1.0) * margin
    low, high = (low if zero and low == 0 else low - room), high + room
    return (low, high) if high > low else (low, low + 1)


def _color(index: int) -> str:
    return COLORS[index % len(COLORS)]


def _style(index: int) -> str:
    dash = _DASHES[index // len(COLORS) % len(_DASHES)]
    return f'stroke="{_color(index)}"' + (f' stroke-dasharray="{dash}"' if dash else "")


def _path(points: Points, style: str, kind: str) -> str:
    return f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in points)}" {style} class="{kind}"/>'


def _legend(lines: Sequence[Line]) -> str:
    keys = (
        f'<span><svg viewBox="0 0 22 8" class="key"><line x1="0" x2="22" y1="4" y2="4" {_style(line.color)}/></svg>'
        f"{escape(line.name)}</span>"
        for line in lines
    )
    return f'<div class="legend">{"".join(keys)}</div>'
