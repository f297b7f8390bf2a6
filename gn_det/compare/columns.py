"""Columns of a table: measured numbers, and published ones with their source."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gn_det.config.reader import read_yaml

#: Kinds of columns: a metric depends on the seed, a cost on the machine, a size only on the model.
METRIC, COST, SIZE = "metric", "cost", "size"


@dataclass(frozen=True)
class Column:
    """A number of a run; shown values are multiplied by ``factor``."""

    heading: str
    decimals: int = 1
    what: str = METRIC
    lower_is_better: bool = False
    factor: float = 1.0

    def show(self, value: float) -> str:
        return f"{value * self.factor:.{self.decimals}f}"


#: Column of each AP of an evaluation -> name of the metric.
AP_METRICS = {
    f"{task}_ap{suffix}": f"{kind}/{metric}"
    for task, kind in (("box", "bbox"), ("mask", "segm"))
    for suffix, metric in {"": "AP", "50": "AP50", "75": "AP75", "_s": "APs", "_m": "APm", "_l": "APl"}.items()
}

COLUMNS: dict[str, Column] = {
    **{name: Column(f"{name.partition('_')[0]} {metric.partition('/')[2]}") for name, metric in AP_METRICS.items()},
    "top1_error": Column("top-1 error (%)", lower_is_better=True),
    "top5_error": Column("top-5 error (%)", lower_is_better=True),
    "train_error": Column("training error (%)", lower_is_better=True),
    "parameters": Column("parameters (M)", 2, SIZE, factor=1e-6),
    "s_per_iter": Column("s / iteration", 3, COST, lower_is_better=True),
    "memory_mb": Column("peak memory (MB)", 0, COST, lower_is_better=True),
    "s_per_image": Column("inference, ms / image", 2, COST, lower_is_better=True, factor=1e3),
}


# ------------------------------------------------------------ published numbers

#: Source name of numbers given by the suite itself.
EXPECTED = "expected"
#: Sources in order of preference, with their names in sentences.
SOURCES = {
    EXPECTED: "what was expected",
    "paper": "the paper",
    "detectron": "Detectron",
    "d2": "Detectron2",
    "mmdet": "MMDetection",
    "tensorpack": "tensorpack",
}


@dataclass(frozen=True)
class Reference:
    """One row of a published table: numbers by column, or only the difference from the row ``delta_to``.

    Rows with different ``model`` are not compared. For a suite's ``expected``, it is the text of the source.
    """

    id: str
    source: str
    model: str
    where: str
    values: Mapping[str, float]
    delta_to: str = ""
    delta: Mapping[str, float] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """Model without its depth: "C4", "FPN" or "ImageNet"; "" for a suite's ``expected``."""
        return "" if self.source == EXPECTED else self.model.replace("-", " ").split()[-1]


@functools.lru_cache(maxsize=1)
def load_references() -> tuple[dict[str, Reference], dict[str, str]]:
    """Return all published rows by id, and a sentence on each source."""
    content = read_yaml(Path(__file__).parent / "references.yaml", "file")
    rows = {}
    for entry in [*content["coco"], *content["imagenet"], *content["kinetics"]]:
        delta = entry.pop("delta", {})
        texts = {key: entry.pop(key) for key in ("id", "source", "model", "where")}
        rows[texts["id"]] = Reference(**texts, values=entry, delta_to=delta.pop("to", ""), delta=delta)
    return rows, dict(content["sources"])


def published_difference(row: Reference, baseline: Reference, column: str) -> float | None:
    """Return row minus baseline if one source has both for one model, or has the difference; else None."""
    if (row.source, row.model) != (baseline.source, baseline.model):
        return None
    if row.delta_to == baseline.id:
        return row.delta.get(column)
    if column in row.values and column in baseline.values:
        return row.values[column] - baseline.values[column]
    return None


def describe(source: str, found: Sequence[Reference | None]) -> str:
    """Describe a source for the note below a table."""
    if source == EXPECTED:
        return "; ".join(dict.fromkeys(f.where for f in found if f is not None))
    return load_references()[1][source]
