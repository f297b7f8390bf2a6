"""Suites without training: an executor that makes up numbers from row and seed."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gn_det.compare.execute import Outcome
from gn_det.compare.outcomes import Results, collect
from gn_det.compare.plan import Job, Plan, make_plan
from gn_det.compare.runner import Runner, Store
from gn_det.compare.suite import parse_suite
from gn_det.engine.engines import Engine


def pretrain_row(identity: str, **keys: Any) -> dict[str, Any]:
    return {"id": identity, "kind": "pretrain", "arch": "resnet8", "norm": "BN", "data": "digits", **keys}


def plan_of(rows: list[dict[str, Any]], seeds: int | None = None, **keys: Any) -> Plan:
    """Without sample pictures: made-up weights draw none."""
    content = {"name": "case", "rows": rows, "samples": {"images": 0}, **keys}
    return make_plan(parse_suite(content, "case.yaml"), Engine(), seeds=seeds)


class Fake:
    """Numbers by row and seed; errors, and whatever else, by name of the run.

    Attributes:
        calls: names of the runs that were executed, in order.
        on: name of the run -> called before its numbers are made.
        values: row -> mean of its metric; others get one from their name.
    """

    def __init__(self, on: Mapping[str, Callable[[], None]] | None = None, values: Mapping[str, float] | None = None):
        self.calls: list[str] = []
        self.on, self.values = dict(on or {}), dict(values or {})

    def __call__(self, job: Job, folder: Path, weights: str) -> Outcome:
        self.calls.append(job.name)
        if job.name in self.on:
            self.on[job.name]()
        number = zlib.crc32(job.row.id.encode()) % 20 + 20
        value = self.values.get(job.row.id, float(number)) + (0.1, 0.4, -0.2)[job.seed % 3]
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / "model_final.pth"
        file.write_bytes(f"{job.name} {weights and Path(weights).read_text()}".encode())
        cost: dict[str, float | None] = {"s_per_iter": 0.5, "memory_mb": 100.0, "s_per_image": 0.01}
        if job.cfg is None:
            curve = [{"x": float(i), "loss": 1.0 / i, "top1_error": value + 5 / i} for i in range(1, 4)]
            return Outcome({"top1_error": value}, curve, cost, {"parameters": 1e6}, "settings: 1")
        curve = [{"x": 10.0 * i, "loss": 2.0 / i, "box_ap": value - 5 / i, "mask_ap": value - 6 / i} for i in (1, 2)]
        metrics: dict[str, float | None] = {"box_ap": value, "mask_ap": value - 1, "box_ap_l": None}
        return Outcome(metrics, curve, cost, {"parameters": 2e6}, "MODEL:\n  MASK_ON: true")


BN = {"id": "bn", "config": "quickstart.yaml", "reference": "fpn_bn"}
GN = {**BN, "id": "gn", "baseline": "bn", "reference": "fpn_gn", "overrides": {"SOLVER.GAMMA": 0.2}}


def results(root: Path, rows: list[dict[str, Any]], seeds: int = 1, fake: Fake | None = None, **keys: Any) -> Results:
    plan = plan_of(rows, seeds, **keys)
    Runner(plan, Store(root), fake or Fake()).run()
    return collect(plan, Store(root))
