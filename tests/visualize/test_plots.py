"""Plots of a real-looking log, and charts as SVG that is safe, self-contained and the same every time."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gn_det.errors import DataError
from gn_det.visualize.colors import class_color, hex_color
from gn_det.visualize.plots import Line, draw_curves, plot_histogram, plot_lines, read_metrics, smooth

EVIL = "<b>$\\frac{x$ & \"日本\" 'x'"


def test_curves(tmp_path: Path) -> None:
    """A resumed run's later values win; damaged lines and nan are no obstacle."""
    log = tmp_path / "metrics.json"
    lines = [{"iteration": i, "total_loss": 9.0, "loss_cls": 3.0, "lr": 0.01} for i in (19, 39, 59)]
    lines += [
        {"iteration": 39, "total_loss": 1.0, "lr": 0.02},
        {"iteration": 59, "bbox/AP": 10.0, "segm/AP": float("nan")},
    ]
    damaged = ["[" * 100_000, '\udcff{"iteration": 79}']  # nested too deep; a byte that is no UTF-8
    text = "\n".join([*damaged, *(json.dumps(line) for line in lines)]) + '\n{"iterat'
    log.write_text(text, encoding="utf-8", errors="surrogateescape")
    entries = read_metrics(log)
    assert [e["iteration"] for e in entries] == [19, 39, 59] and entries[1]["total_loss"] == 1.0
    assert entries[1]["loss_cls"] == 3.0 and (entries[2]["lr"], entries[2]["bbox/AP"]) == (0.01, 10.0)
    draw_curves(log, tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as image:
        assert image.width > 1200
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curves.png", "metrics.json"]


def test_curves_without_metrics(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        draw_curves(tmp_path / "metrics.json", tmp_path / "x.png")
    (tmp_path / "metrics.json").write_text("\n")
    with pytest.raises(DataError, match="no metrics"):
        draw_curves(tmp_path / "metrics.json", tmp_path / "x.png")


def test_smoothing_keeps_a_line_straight_to_its_ends() -> None:
    """80 values are averaged over 5, fewer toward the ends, so that a straight line stays one."""
    line = np.arange(80.0)
    assert smooth(line, 2) == pytest.approx(line)
    jump = np.zeros(80)
    jump[40] = 5.0
    assert smooth(jump, 2)[36:45].tolist() == pytest.approx([0, 0, 1, 1, 1, 1, 1, 0, 0])


def test_colors_are_distinct_and_stable() -> None:
    colors = [class_color(i) for i in range(80)]
    assert len(set(colors)) == 80 and colors == [class_color(i) for i in range(80)]
    assert hex_color(0) == "#3b82f6" and tuple(bytes.fromhex(hex_color(40)[1:])) == class_color(40)


def lines() -> list[Line]:
    """Eleven curves, so that the last one has the color of the first and a dash of its own."""
    x = np.arange(5.0)
    curves = [Line(EVIL, np.stack([x * 1e4, x + k], 1), k, runs=[np.stack([x, x], 1)]) for k in range(11)]
    curves[0].spread = np.full(5, 0.5)
    return curves


def test_charts_are_inline_svg_without_addresses() -> None:
    charts = [
        plot_lines(lines(), EVIL, EVIL, dots=False, from_zero=True),
        plot_lines(lines()[:2], "x", "y", categories=[EVIL, "$", "_x", "", "b" * 500]),
        plot_histogram([EVIL, "b", "c"], [1, 998, 1], [4, 8], [2, 8, 400], EVIL),
    ]
    for chart in charts:
        assert chart.startswith("<svg viewBox") and "http" not in chart and "url(#" in chart
        assert "<b>" not in chart and "currentColor" in chart and "font-family" not in chart
    assert "&lt;b&gt;$\\frac{x$" in charts[0] and "40k" in charts[0] and "var(--line)" in charts[0]
    assert "b" * 21 not in charts[1] and "(500 characters)" in charts[1]
    assert charts[2].count("&lt;1%") == 2 and "100%" in charts[2] and ">400<" in charts[2]


def test_charts_are_the_same_every_time() -> None:
    assert plot_lines(lines(), "x", "y") == plot_lines(lines(), "x", "y")


def test_an_eleventh_curve_differs_from_the_first_by_its_dash() -> None:
    first, *_, last = lines()
    assert first.color == last.color and (first.dash, last.dash) == ("solid", "dashed")
    assert "stroke-dasharray" in plot_lines([last], "x", "y") and "dasharray" not in plot_lines([first], "x", "y")


def test_marks_stand_between_the_bars_as_their_sizes_do() -> None:
    """An anchor at an edge stands between two bars: here at 1/3 and 2/3 of the axis without its margins."""
    chart = plot_histogram(["< 4", "4-8", ">= 8"], [1, 1, 1], [4, 8], [4, 8, 6], "pixels")
    places = [float(part.split('"')[0]) for part in chart.partition('id="line2d_4"')[2].split(' x="')[1:4]]
    assert places[2] == pytest.approx((places[0] + places[1]) / 2, abs=0.01)
