"""What a suite has found so far: the chosen runs of every row, statistics over seeds, and ``results.json``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import gn_det
from gn_det.compare.columns import COLUMNS, COST, METRIC
from gn_det.compare.plan import Job, Plan
from gn_det.compare.runner import choose, initial_sha, version_of
from gn_det.compare.statistics import Difference, Spread, difference, spread
from gn_det.compare.store import DONE, FAILED, Record, Store
from gn_det.compare.suite import Row

#: Machine and day of a measurement.
Place = tuple[str, str, str]


@dataclass
class RowResult:
    """A row with what is known of it.

    Attributes:
        row: as written.
        wanted: seeds that the plan asks for.
        records: by seed, the one that counts; of any status.
        remarks: what a reader must know of them: other versions, other settings.
        left_out: why an optional row is not run; "" for others.
    """

    row: Row
    wanted: tuple[int, ...]
    records: dict[int, Record] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    left_out: str = ""

    @property
    def done(self) -> list[Record]:
        return [r for _, r in sorted(self.records.items()) if r.status == DONE]

    @property
    def status(self) -> str:
        """In a word or two: "done", "failed", "2 of 3 seeds", "not run", "left out"."""
        if self.left_out:
            return "left out"
        if not self.done:
            return "failed" if any(r.status == FAILED for r in self.records.values()) else "not run"
        return "done" if len(self.done) >= len(self.wanted) else f"{len(self.done)} of {len(self.wanted)} seeds"

    @property
    def reasons(self) -> list[str]:
        return [f"seed {r.seed}: {r.reason}" for r in self.records.values() if r.status == FAILED]

    def values(self, column: str) -> dict[int, float]:
        """A column by seed; costs and sizes are not asked for by seed."""
        found = {r.seed: r.metrics.get(column) for r in self.done}
        return {seed: value for seed, value in found.items() if value is not None}

    def spread(self, column: str) -> Spread | None:
        return spread(self.values(column))

    def size(self, column: str) -> float | None:
        return next((r.size[column] for r in self.done if r.size.get(column) is not None), None)

    def cost(self, column: str, place: Place | None) -> float | None:
        """Median over the runs measured at ``place`` alone; None where there is none."""
        import statistics

        found = [r.cost.get(column) for r in self.done if place is not None and place_of_run(r) == place]
        numbers = [v for v in found if v is not None]
        return statistics.median(numbers) if numbers else None


@dataclass
class Results:
    """All rows of a suite.

    Attributes:
        plan: that was asked for.
        rows: in the order of the suite.
        place: of the differences in cost of the whole suite, see :func:`common_place`.
    """

    plan: Plan
    rows: list[RowResult]

    def row(self, identity: str) -> RowResult:
        return next(r for r in self.rows if r.row.id == identity)

    def difference(self, result: RowResult, column: str) -> Difference | None:
        """Row minus its baseline; None without a baseline, or where a side has no number."""
        if result.row.baseline is None:
            return None
        return difference(result.values(column), self.row(result.row.baseline).values(column))


def collect(plan: Plan, store: Store, *, any_version: bool = False, any_settings: bool = False) -> Results:
    """The runs that count for each row.

    Args:
        plan: of the whole suite.
        store: where runs lie.
        any_version: a finished run of another gn_det version is as good as one of this; otherwise it is taken where
            this version has no run at all, not even a failed one.
        any_settings: take the newest finished run of a row where none has the settings of the plan; for a report of
            what is there. Either is remarked.
    """
    results = []
    by_seed: dict[tuple[str, int], Record] = {}
    for row in plan.suite.rows:
        jobs = [job for job in plan.jobs if job.row.id == row.id]
        result = RowResult(row, tuple(job.seed for job in jobs), left_out=plan.left_out.get(row.id, ""))
        results.append(result)
    for job in sorted(plan.jobs, key=lambda j: j.needs is not None):
        result = next(r for r in results if r.row.id == job.row.id)
        record, remark = _record_of(job, plan, store, by_seed, any_version, any_settings)
        if record is not None:
            result.records[job.seed] = by_seed[job.row.id, job.seed] = record
        if remark:
            result.remarks.append(f"seed {job.seed}: {remark}")
    return Results(plan, results)


def _record_of(
    job: Job, plan: Plan, store: Store, known: Mapping[tuple[str, int], Record], any_version: bool, any_settings: bool
) -> tuple[Record | None, str]:
    records = store.read(job.row.id, job.seed)
    maker = known.get(job.needs) if job.needs is not None else None
    sha = maker.weights_sha if maker is not None else initial_sha(job)
    version = version_of(job, plan)
    key = job.settings_key(sha)
    found = choose(records, key, version, any_version=any_version) or choose(records, key, version, any_version=True)
    if found is not None:
        return found, f"run with gn_det code {found.version}, not {version}" if found.version != version else ""
    others = [r for r in records if r.status == DONE]
    if any_settings and others:
        return others[-1], "run with other settings, data or weights than the suite has now"
    return None, ""


# ------------------------------------------------------------ cost


def place_of_run(record: Record) -> Place | None:
    """Machine and day of a run; None for one that was interrupted and went on elsewhere or on another day."""
    places = {(str(s.get("host")), str(s.get("device")), str(s.get("day"))) for s in record.sessions}
    return next(iter(places)) if len(places) == 1 else None


def common_place(rows: Sequence[RowResult]) -> Place | None:
    """Machine and day on which most of these rows were measured; the later day where two have as many."""
    counts: Counter[Place] = Counter()
    for result in rows:
        counts.update({p for p in (place_of_run(r) for r in result.done) if p is not None})
    return max(counts, key=lambda p: (counts[p], p[2], p), default=None)


# ------------------------------------------------------------ results.json


def as_json(results: Results, findings: Mapping[str, Sequence[str]], date: str) -> dict[str, Any]:
    """Everything, for machines."""
    suite = results.plan.suite
    return {
        "suite": suite.name,
        "title": suite.title,
        "gn_det": gn_det.__version__,
        "date": date,
        "rows": [_row_json(results, result, findings.get(result.row.id, ())) for result in results.rows],
    }


def _row_json(results: Results, result: RowResult, findings: Sequence[str]) -> dict[str, Any]:
    row = result.row
    measured = [c for c, column in COLUMNS.items() if column.what == METRIC and result.spread(c) is not None]
    place = common_place([result])
    return {
        "id": row.id,
        "kind": row.kind,
        "title": row.title,
        "labels": dict(row.labels),
        "status": result.status,
        "reasons": result.reasons + ([result.left_out] if result.left_out else []),
        "remarks": result.remarks,
        "baseline": row.baseline,
        "metrics": {c: asdict(s) for c in measured if (s := result.spread(c)) is not None},
        "difference": {c: asdict(d) for c in measured if (d := results.difference(result, c)) is not None},
        "parameters": result.size("parameters"),
        "cost": {c: result.cost(c, place) for c, column in COLUMNS.items() if column.what == COST},
        "findings": list(findings),
        "references": list(row.references),
        "expected": {"source": row.expected.where, **row.expected.values} if row.expected is not None else None,
        "runs": [_run_json(record) for _, record in sorted(result.records.items())],
    }


def _run_json(record: Record) -> dict[str, Any]:
    out = asdict(record)
    for name in ("row", "config"):
        del out[name]
    return out
