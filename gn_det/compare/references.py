"""Published results that stand beside the measured ones: ``references.yaml``, with the source of each."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

#: Sources in the order of preference where a table names none.
SOURCES = ("paper", "detectron", "d2", "mmdet")


_TEXTS = ("id", "source", "model", "where", "delta")


@dataclass(frozen=True)
class Reference:
    """One published row.

    Attributes:
        id: as suites name it.
        source: one of :data:`SOURCES`.
        model: backbone; rows of different ones are not compared.
        where: table or section.
        values: column -> number as published.
        delta_to: id of the row that ``delta`` is measured from, where only a difference is published; else "".
        delta: column -> published difference.
    """

    id: str
    source: str
    model: str
    where: str
    values: Mapping[str, float]
    delta_to: str = ""
    delta: Mapping[str, float] | None = None

    @property
    def kind(self) -> str:
        """Of model, whatever its depth: "C4", "FPN" or "ImageNet"."""
        return self.model.replace("-", " ").split()[-1]


@functools.lru_cache(maxsize=1)
def load_references() -> tuple[dict[str, Reference], dict[str, str]]:
    """All published rows by id, and a sentence on each source."""
    content = yaml.safe_load((Path(__file__).parent / "references.yaml").read_text(encoding="utf-8"))
    rows = {}
    for entry in [*content["coco"], *content["imagenet"]]:
        delta = dict(entry.get("delta") or {})
        to = str(delta.pop("to", ""))
        values = {k: float(v) for k, v in entry.items() if k not in _TEXTS}
        name, source, model, where = (str(entry[k]) for k in _TEXTS[:4])
        rows[name] = Reference(name, source, model, where, values, to, delta or None)
    return rows, dict(content["sources"])


def published_difference(row: Reference, baseline: Reference, column: str) -> float | None:
    """Row minus baseline where one source gives both for one model, or gives the difference; None where not."""
    if (row.source, row.model) != (baseline.source, baseline.model):
        return None
    if row.delta and row.delta_to == baseline.id:
        return row.delta.get(column)
    if column in row.values and column in baseline.values:
        return row.values[column] - baseline.values[column]
    return None
