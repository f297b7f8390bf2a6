"""Intervals against closed forms and published tables; which runs a cost is taken from."""

from __future__ import annotations

import math
import statistics
from pathlib import Path

import pytest

from gn_det.compare.outcomes import common_place, difference, place_of_run, spread, t_quantile
from tests.compare.cases import BN, GN, results


@pytest.mark.parametrize("p", [0.6, 0.75, 0.9, 0.975, 0.9995])
def test_quantiles_of_one_and_two_degrees_have_closed_forms(p: float) -> None:
    assert t_quantile(p, 1) == pytest.approx(math.tan(math.pi * (p - 0.5)), rel=1e-9)
    assert t_quantile(p, 2) == pytest.approx((2 * p - 1) / math.sqrt(2 * p * (1 - p)), rel=1e-9)


def test_quantiles_of_many_degrees_are_the_normal_ones() -> None:
    normal = statistics.NormalDist()
    # Cornish-Fisher: t = z + (z^3 + z) / (4 v) + O(1 / v^2)
    for p in (0.8, 0.975):
        z = normal.inv_cdf(p)
        assert t_quantile(p, 1e4) == pytest.approx(z + (z**3 + z) / 4e4, rel=1e-7)


@pytest.mark.parametrize(
    ("freedom", "published"),
    [
        (1, 12.7062047362), (25 / 17, 6.1881149408), (2, 4.3026527297), (2.5, 3.5746548420), (5, 2.5705818356),
        (10, 2.2281388520), (30, 2.0422724563), (100, 1.9839715185),
    ],
)  # fmt: skip
def test_quantiles_of_published_tables(freedom: float, published: float) -> None:
    """As R's qt(0.975, df) and scipy's stdtrit print them; broken degrees come from Welch's interval."""
    assert t_quantile(0.975, freedom) == pytest.approx(published, rel=1e-10)


def test_shared_seeds_are_paired() -> None:
    """What a seed does to both rows cancels: here the row is always 1 above, give or take 0.1."""
    row, base = {1: 11.0, 2: 21.1, 3: 30.9}, {1: 10.0, 2: 20.0, 3: 30.0, 4: 99.0}
    found = difference(row, base)
    assert found is not None and found.paired and found.n == (3, 3)
    assert found.value == pytest.approx(1.0)
    assert found.half == pytest.approx(4.302653 * 0.1 / math.sqrt(3), rel=1e-6)
    assert found.beyond_noise


def test_other_seeds_take_welchs_interval() -> None:
    row, base = {1: 1.0, 2: 3.0}, {5: 0.0, 6: 4.0}
    found = difference(row, base)
    # variances 2 and 8, so (1 + 4)^2 / (1 + 16) degrees of freedom and a standard error of sqrt(5)
    assert found is not None and not found.paired and found.n == (2, 2) and found.value == 0.0
    assert found.half == pytest.approx(t_quantile(0.975, 25 / 17) * math.sqrt(5), rel=1e-9)
    assert found.beyond_noise is False


def test_one_seed_knows_no_noise() -> None:
    found = difference({1: 2.0}, {1: 1.0})
    assert found is not None and (found.value, found.half, found.beyond_noise, found.paired) == (1.0, None, None, True)
    assert difference({}, {1: 1.0}) is None and spread({}) is None


@pytest.mark.parametrize("alone", [{1: 1.0}, {9: 1.0}], ids=["shared", "other"])
def test_a_single_seed_is_taken_to_spread_as_the_other_side(alone: dict[int, float]) -> None:
    """The interval for one more value: t(2) = 4.3027, std 1, sqrt(1 + 1/3); the same both ways."""
    many = {1: 4.0, 2: 5.0, 3: 6.0}
    for found, value in ((difference(many, alone), 4.0), (difference(alone, many), -4.0)):
        assert found is not None and found.assumed and not found.paired and found.value == value
        assert found.half == pytest.approx(4.302653 * math.sqrt(4 / 3), rel=1e-6)
        assert found.beyond_noise is False
    far = difference(many, {1: -1.0})
    assert far is not None and far.beyond_noise


def test_equal_runs_have_no_noise_and_no_difference() -> None:
    found = difference({1: 5.0, 2: 6.0}, {1: 5.0, 2: 6.0})
    assert found is not None and found.half == 0.0 and found.beyond_noise is False


def test_spread_is_the_sample_deviation() -> None:
    found = spread({1: 1.0, 2: 2.0, 4: 6.0})
    assert found is not None and (found.mean, found.n) == (3.0, 3)
    assert found.std == pytest.approx(math.sqrt((4 + 1 + 9) / 2))


def test_cost_is_the_median_of_the_seeds(tmp_path: Path) -> None:
    found = results(tmp_path, [BN], 3)
    row = found.rows[0]
    for record, cost in zip(row.done, (0.6, 9.0, 1.2)):
        record.cost = {"s_per_iter": cost}
    assert row.cost("s_per_iter", common_place(found.rows)) == 1.2


def test_a_run_that_went_on_on_another_day_has_no_place(tmp_path: Path) -> None:
    (record,) = results(tmp_path, [BN]).rows[0].done
    session = {"host": "a", "device": "b", "day": "2001-01-01"}
    record.sessions = [session, dict(session)]
    assert place_of_run(record) == ("a", "b", "2001-01-01")
    for other in ({"day": "2001-01-02"}, {"host": "c"}, {"device": "d"}):
        record.sessions = [session, session | other]
        assert place_of_run(record) is None


def test_the_common_place_is_that_of_most_runs_and_then_the_later_day(tmp_path: Path) -> None:
    rows = results(tmp_path, [BN, GN]).rows
    for row, (host, day) in zip(rows, (("z", "2001-01-01"), ("a", "2001-01-02"))):
        row.done[0].sessions = [{"host": host, "device": "b", "day": day}]
    assert common_place(rows) == common_place(rows[::-1]) == ("a", "b", "2001-01-02")
    assert common_place([rows[0], *rows, rows[0]]) == ("z", "b", "2001-01-01")
    assert common_place([]) is None
