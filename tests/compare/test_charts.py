"""Charts: the paper's Figures 1, 4, 5 and 6 from the numbers of the runs, and curves of detections."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gn_det.compare.charts import _curves, charts, mean_curve, thin
from gn_det.compare.outcomes import Results
from tests.compare.cases import BN, GN, Fake, pretrain_row, results


def by_batch(root: Path, table: dict[str, Any]) -> Results:
    """BN and GN at batch 32 and 2, whose error in epoch k is their mean + 5 / k."""
    values = {"BN_b32": 60.0, "BN_b2": 70.0, "GN_b32": 61.0, "GN_b2": 62.0}
    rows = [
        pretrain_row(name, labels={"norm": name[:2], "batch": name[4:]}, reference=f"imagenet_{name}")
        for name in values
    ]
    return results(root, rows, 2, Fake(values=values), tables=[{"title": "T", "rows": ["*"], **table}])


def test_figure_1_has_the_published_values_behind_and_figure_5_a_panel_a_norm(tmp_path: Path) -> None:
    """Mean over seeds 1 and 2 (+0.4 and -0.2) against the batch sizes in their order; curves of one norm a panel."""
    found = by_batch(tmp_path, {"grid": {"rows": "norm", "columns": "batch", "value": "top1_error"}})
    first, bn, gn = charts(found, found.plan.suite.tables[0])
    assert first["title"] == "top-1 error (%) by batch"
    lines = {line.name: line for line in first["lines"]}
    assert list(lines) == ["BN (paper)", "GN (paper)", "BN", "GN"]
    assert lines["BN"].points.tolist() == [[0, pytest.approx(60.1)], [1, pytest.approx(70.1)]]
    assert lines["BN (paper)"].points.tolist() == [[0, 23.6], [1, 34.7]]
    assert lines["GN (paper)"].color == lines["GN"].color and lines["GN (paper)"].dash == "dotted"
    assert (bn["title"], gn["title"]) == ("BN: validation error by batch", "GN: validation error by batch")
    assert [line.name for line in bn["lines"]] == ["32", "2"] and bn["lines"][0].color != bn["lines"][1].color
    assert gn["lines"][1].points == pytest.approx(np.array([[1, 67.1], [2, 64.6], [3, 62.1 + 5 / 3]]))


def test_panels_that_are_compared_have_one_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the lowest to the highest value of any line or run, with a margin of 5 %."""
    limits = []
    monkeypatch.setattr(
        "gn_det.compare.charts.plot_lines", lambda *a, limits_=limits, **k: limits_.append(k.get("limits"))
    )
    found = by_batch(tmp_path, {"grid": {"rows": "norm", "columns": "batch", "value": "top1_error"}})
    charts(found, found.plan.suite.tables[0])
    low, high = 59.8 + 5 / 3, 75.4
    assert limits[0] is None and limits[1] == limits[2]
    assert limits[1] == pytest.approx((low - 0.05 * (high - low), high + 0.05 * (high - low)))


def test_a_grid_of_a_cost_has_its_lines_and_no_panels(tmp_path: Path) -> None:
    found = by_batch(tmp_path, {"grid": {"rows": "norm", "columns": "batch", "value": "memory_mb"}})
    (memory,) = charts(found, found.plan.suite.tables[0])
    assert memory["title"] == "peak memory (MB) by batch"
    assert [line.points.tolist() for line in memory["lines"]] == [[[0, 100.0], [1, 100.0]]] * 2


def test_figure_4_shows_training_beside_validation_and_figure_6_percentiles(tmp_path: Path) -> None:
    found = results(tmp_path, [pretrain_row("bn"), pretrain_row("gn", norm="GN", groups=8, record="res2.0.conv1")])
    for result in found.rows:
        for point in result.done[0].curve:
            point["train_error"] = point["top1_error"] - 1
    recorded = [{"x": k / 2, "p1": -float(k), "p20": 0.0, "p80": 1.0, "p99": float(k)} for k in range(5)]
    found.rows[1].done[0].curve += recorded
    training, validation, layer = charts(found, found.plan.suite.tables[0])
    assert [c["title"] for c in (training, validation)] == [
        f"{p} error over epochs" for p in ("Training", "Validation")
    ]
    for a, b in zip(training["lines"], validation["lines"]):
        assert a.points[:, 1] == pytest.approx(b.points[:, 1] - 1)
    assert layer["title"] == "gn: percentiles of res2.0.conv1"
    assert [line.name for line in layer["lines"]] == ["1 %", "20 %", "80 %", "99 %"]
    assert layer["lines"][3].points.tolist() == [[k / 2, k] for k in range(5)]


def test_nothing_is_drawn_of_published_values_alone(tmp_path: Path) -> None:
    found = by_batch(tmp_path, {"grid": {"rows": "norm", "columns": "batch", "value": "top1_error"}})
    for result in found.rows:
        result.records.clear()
    assert charts(found, found.plan.suite.tables[0]) == []


def test_a_mean_curve_ends_where_the_first_run_ends() -> None:
    """Where one run has no value there is no mean; between points the line is straight."""
    long, short = np.array([(0, 0.0), (2, 4.0), (4, 8.0), (6, 12.0)]), np.array([(1, 10.0), (5, 14.0)])
    assert mean_curve([long, short]).tolist() == [[2, 7.5], [4, 10.5]]
    assert mean_curve([short, long]).tolist() == [[1, 6.0], [5, 12.0]]
    assert mean_curve([np.array([(1, 1), (2, 3)]), np.array([(1, 3), (3, 7)])]).tolist() == [[1, 2.0], [2, 4.0]]


def test_losses_alone_are_smoothed(tmp_path: Path) -> None:
    """AP is shown as it was measured."""
    found = results(tmp_path, [BN])
    found.rows[0].done[0].curve = [{"x": float(k), "loss": float(k == 5), "box_ap": float(k == 5)} for k in range(10)]
    (loss,), (ap,) = (_curves(found.rows, key) for key in ("loss", "box_ap"))
    assert loss.points[:, 1] == pytest.approx([0, 0, 0, 0.2, 0.2, 0.2, 0.2, 0.2, 0, 0])
    assert ap.points[:, 1].tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 0, 0]


def test_long_curves_are_thinned_to_their_means() -> None:
    points = np.stack([np.arange(1000.0), np.arange(1000.0)], 1)
    assert thin(points)[:2].tolist() == [[2, 2], [7, 7]] and len(thin(points)) == 200
    assert thin(points[:150]) is not points and (thin(points[:150]) == points[:150]).all()


def test_minutes_are_those_of_the_common_machine(tmp_path: Path) -> None:
    """Half a second an iteration; a row that was timed elsewhere has no line."""
    found = results(tmp_path, [BN, GN])
    assert [line.points[:, 0].tolist() for line in _curves(found.rows, "box_ap")] == [[10, 20]] * 2
    found.rows[1].done[0].sessions[0]["host"] = "elsewhere"
    found.rows[0].done[0].sessions[0]["day"] = "9999-01-01"
    (line,) = _curves(found.rows, "box_ap", by_time=True)
    assert line.points[:, 0].tolist() == pytest.approx([10 / 120, 20 / 120]) and line.name == "bn"
