"""Results of a suite so far: the runs that count, mean and spread over seeds, and differences with their noise."""

from __future__ import annotations

import functools
import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from gn_det.about import __version__
from gn_det.compare.columns import COLUMNS, COST, EXPECTED, METRIC, SIZE, SOURCES, Reference
from gn_det.compare.plan import Job, Plan
from gn_det.compare.runner import DONE, FAILED, RESULTS_VERSION, MissingWeights, Record, Store, find
from gn_det.compare.suite import Row

#: Host, device and day of a measurement.
Place = tuple[str, str, str]


@dataclass(frozen=True)
class Spread:
    """Mean over n seeds, and their sample standard deviation (divided by n - 1; None with one value)."""

    mean: float
    std: float | None
    n: int

    @property
    def half(self) -> float | None:
        """Half the width of the mean's 95% interval (Student's t); None with one value.

        Folds share training images, so the true interval over folds is somewhat wider.
        """
        return _half(self.std, 1 / self.n, self.n - 1)


@dataclass(frozen=True)
class Difference:
    """A row minus its baseline: difference of the means over the compared seeds."""

    value: float
    half: float | None  # half the width of the 95% interval; None if the noise is unknown
    n: tuple[int, int]  # compared seeds of row and baseline
    paired: bool  # paired by seed, so that common effects of a seed cancel
    assumed: bool = False  # one side has a single seed, and is assumed to vary like the other

    @property
    def beyond_noise(self) -> bool | None:
        """Whether the interval excludes zero; None if the noise is unknown."""
        return None if self.half is None else abs(self.value) > self.half


def spread(values: Mapping[int, float]) -> Spread | None:
    """Return mean and deviation of the values by seed; None without any."""
    numbers = list(values.values())
    if not numbers:
        return None
    return Spread(statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else None, len(numbers))


def difference(row: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """Return row minus baseline with a t-interval.

    Shared seeds are compared in pairs (n - 1 degrees of freedom). If fewer than two are shared but both sides have two
    or more values, Welch's interval for unequal variances is used. A side with one value is assumed to vary like the
    other, which gives the prediction interval t(n - 1) std sqrt(1 + 1/n). With one value on both sides, the noise is
    unknown.

    Args:
        row, baseline: a metric by seed; if one has no value, the result is None.
    """
    shared = sorted(row.keys() & baseline.keys())
    if len(shared) > 1 or (len(shared) == 1 and max(len(row), len(baseline)) == 1):
        pairs = spread({seed: row[seed] - baseline[seed] for seed in shared})
        assert pairs is not None
        return Difference(pairs.mean, pairs.half, (pairs.n, pairs.n), True)
    a, b = spread(row), spread(baseline)
    if a is None or b is None:
        return None
    half = None
    if a.std is not None and b.std is not None:
        va, vb = a.std**2 / a.n, b.std**2 / b.n
        freedom = (va + vb) ** 2 / (va**2 / (a.n - 1) + vb**2 / (b.n - 1)) if va + vb else 1.0
        half = _half(math.sqrt(va + vb), 1, freedom)
    elif a.n + b.n > 2:
        known = b if a.n == 1 else a
        half = _half(known.std, 1 + 1 / known.n, known.n - 1)
    return Difference(a.mean - b.mean, half, (a.n, b.n), False, assumed=(a.n == 1) != (b.n == 1))


def _half(std: float | None, factor: float, freedom: float) -> float | None:
    """Return half the width of the 95% interval of ``std * sqrt(factor)`` with ``freedom`` degrees of freedom."""
    return None if std is None else t_quantile(0.975, freedom) * std * math.sqrt(factor)


@functools.lru_cache(maxsize=256)
def t_quantile(p: float, freedom: float) -> float:
    """Return the quantile of Student's t at probability ``p`` in (0.5, 1) with ``freedom`` >= 1 degrees of freedom.

    With t = sqrt(v) tan(a) the density of the angle a is proportional to cos(a) ** (v - 1), which Gauss-Legendre
    quadrature integrates to about 1e-10; the angle is found by bisection.
    """
    nodes, weights = np.polynomial.legendre.leggauss(96)
    log_whole = 0.5 * math.log(math.pi) + math.lgamma(freedom / 2) - math.lgamma((freedom + 1) / 2)
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        angle = (low + high) / 2
        mass = angle / 2 * float(weights @ np.cos(angle / 2 * (nodes + 1)) ** (freedom - 1)) / math.exp(log_whole)
        low, high = (angle, high) if mass < p - 0.5 else (low, angle)
    return math.sqrt(freedom) * math.tan(low)


# ------------------------------------------------------------ rows


@dataclass
class RowResult:
    """A row with its runs so far."""

    row: Row
    wanted: tuple[int, ...]  # seeds requested by the plan
    records: dict[int, Record] = field(default_factory=dict)  # the record that counts for each seed, of any status
    remarks: list[str] = field(default_factory=list)  # caveats: other versions, other settings
    left_out: str = ""  # why an optional row is not run
    unit: str = "seed"  # what numbers the runs: "seed" or "fold"
    base: RowResult | None = None

    @property
    def done(self) -> list[Record]:
        return [r for _, r in sorted(self.records.items()) if r.status == DONE]

    @property
    def status(self) -> str:
        """Status: "done", "failed", "2 of 3 seeds" (or folds), "not run" or "left out"."""
        if self.left_out:
            return "left out"
        if not self.done:
            return "failed" if any(r.status == FAILED for r in self.records.values()) else "not run"
        return "done" if len(self.done) >= len(self.wanted) else f"{len(self.done)} of {len(self.wanted)} {self.unit}s"

    @property
    def reasons(self) -> list[str]:
        return [f"{self.unit} {r.seed}: {r.reason}" for r in self.records.values() if r.status == FAILED]

    def values(self, column: str) -> dict[int, float]:
        """A metric by seed."""
        found = {r.seed: r.metrics.get(column) for r in self.done}
        return {seed: value for seed, value in found.items() if value is not None}

    def difference(self, column: str) -> Difference | None:
        """Return row minus baseline; None without a baseline, or if a side has no number."""
        return None if self.base is None else difference(self.values(column), self.base.values(column))

    def neither_learned(self, column: str) -> bool:
        """Return whether all runs of a row and its baseline have AP 0.0, which makes the difference meaningless."""
        sides = [list(side.values(column).values()) for side in (self, self.base) if side is not None]
        nothing = len(sides) == 2 and all(sides) and max(map(max, sides)) < 0.05  # shown as 0.0
        return nothing and not COLUMNS[column].lower_is_better

    def cost(self, column: str, place: Place | None) -> float | None:
        """Return the median over the runs measured at ``place``, or None; a size is the same at every place."""
        anywhere = COLUMNS[column].what == SIZE
        runs = [r for r in self.done if anywhere or (place is not None and place_of_run(r) == place)]
        numbers = [v for r in runs if (v := {**r.size, **r.cost}.get(column)) is not None]
        return statistics.median(numbers) if numbers else None

    def number(self, column: str, place: Place | None) -> Spread | None:
        """Return a metric over the seeds, or a cost or size, which has no deviation; None without one."""
        if COLUMNS[column].what == METRIC:
            return spread(self.values(column))
        value = self.cost(column, place)
        return None if value is None else Spread(value, None, 1)


@dataclass
class Results:
    """All rows of a suite, in its order, and the plan."""

    plan: Plan
    rows: list[RowResult]

    def of(self, ids: Sequence[str]) -> list[RowResult]:
        """Return the rows with these ids, in their order."""
        return [next(r for r in self.rows if r.row.id == identity) for identity in ids]


def collect(plan: Plan, store: Store, *, any_version: bool = False, any_settings: bool = False) -> Results:
    """Find the runs that count for each row.

    Args:
        plan: plan of the whole suite.
        any_version: accept finished runs of another version like those of this one; otherwise they are only used if
            this version has no run at all, not even a failed one.
        any_settings: use the newest finished run of a row if none has the plan's settings, for a report of what exists.
            The report mentions either case.
    """
    unit = "fold" if plan.suite.folds else "seed"
    rows = {row.id: RowResult(row, (), left_out=plan.left_out.get(row.id, ""), unit=unit) for row in plan.suite.rows}
    for job in plan.jobs:
        result = rows[job.row.id]
        result.wanted += (job.seed,)
        record, remark = _record_of(job, plan, store, any_version, any_settings)
        if record is not None:
            result.records[job.seed] = record
        if remark:
            result.remarks.append(f"{unit} {job.seed}: {remark}")
    for result in rows.values():
        result.base = rows.get(result.row.baseline or "")
    return Results(plan, list(rows.values()))


def _record_of(job: Job, plan: Plan, store: Store, any_version: bool, any_settings: bool) -> tuple[Record | None, str]:
    try:
        found, _ = find(job, plan, store, any_version=any_version, else_any=True)
    except MissingWeights:
        found = None
    if found is not None and found.sessions:
        other = found.version != str(RESULTS_VERSION)
        return found, f"run with gn_det results version {found.version}, not {RESULTS_VERSION}" if other else ""
    others = [r for r in store.read(job.row.id, job.seed) if r.status == DONE] if any_settings else []
    return (others[-1], "run with other settings, data or weights than the suite has now") if others else (None, "")


def place_of_run(record: Record) -> Place | None:
    """Return machine and day of a run; None if it was resumed elsewhere or on another day."""
    places = {(str(s.get("host")), str(s.get("device")), str(s.get("day"))) for s in record.sessions}
    return next(iter(places)) if len(places) == 1 else None


def common_place(rows: Sequence[RowResult]) -> Place | None:
    """Return the machine and day on which most rows were measured; of equals, the later day."""
    counts: Counter[Place] = Counter()
    for result in rows:
        counts.update({p for p in map(place_of_run, result.done) if p is not None})
    return max(counts, key=lambda p: (counts[p], p[2], p), default=None)


def published_rows(rows: Sequence[RowResult], wanted: str) -> tuple[str, list[Reference | None]]:
    """Return a source, and its result for each row, so that columns never mix sources.

    It is ``wanted``, or if that is "" the source of most rows. Only results of the most frequent kind of model (C4,
    FPN) are returned.
    """
    counts = Counter(source for r in rows for source in {found.source for found in r.row.references})
    source = wanted or (max(SOURCES, key=lambda source: counts[source]) if counts else "")
    found = [next((f for f in r.row.references if f.source == source), None) for r in rows]
    kinds = Counter(f.kind for f in found if f is not None)
    return source, [f if f is not None and f.kind == kinds.most_common(1)[0][0] else None for f in found]


# ------------------------------------------------------------ results.json


def as_json(results: Results, findings: Mapping[str, Sequence[str]], date: str) -> dict[str, Any]:
    """Return all results as plain values."""
    suite = results.plan.suite
    rows = [_row_json(result, findings.get(result.row.id, ())) for result in results.rows]
    return {"suite": suite.name, "title": suite.title, "gn_det": __version__, "date": date, "rows": rows}


def _row_json(result: RowResult, findings: Sequence[str]) -> dict[str, Any]:
    row = result.row
    spreads = {c: s for c, what in COLUMNS.items() if what.what == METRIC and (s := result.number(c, None))}
    place = common_place([result])
    expected = next((r for r in row.references if r.source == EXPECTED), None)
    runs = [vars(record) for _, record in sorted(result.records.items())]
    return {
        "id": row.id,
        "kind": row.kind,
        "title": row.title,
        "labels": dict(row.labels),
        "status": result.status,
        "reasons": result.reasons + ([result.left_out] if result.left_out else []),
        "remarks": result.remarks,
        "baseline": row.baseline,
        "metrics": {column: asdict(found) for column, found in spreads.items()},
        "interval": {column: {"mean": found.mean, "half": found.half} for column, found in spreads.items()},
        "difference": {c: asdict(d) for c in spreads if (d := result.difference(c)) is not None},
        "parameters": result.cost("parameters", place),
        "cost": {c: result.cost(c, place) for c, column in COLUMNS.items() if column.what == COST},
        "findings": list(findings),
        "references": [r.id for r in row.references if r.source != EXPECTED],
        "expected": {"source": expected.where, **expected.values} if expected is not None else None,
        "runs": [{key: value for key, value in run.items() if key not in ("row", "config")} for run in runs],
    }
