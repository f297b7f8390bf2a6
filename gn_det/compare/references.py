"""Numbers that stand beside the measured ones, each with its source.

Published ones are in ``references.yaml``; a row of a suite can say its own.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gn_det.compare.columns import COLUMNS, SIZE
from gn_det.compare.fields import SuiteError, mapping, one_of, text
from gn_det.config.reader import read_yaml
from gn_det.text import shown

if TYPE_CHECKING:
    from gn_det.compare.suite import Row

#: The source of a number that the suite itself gives.
EXPECTED = "expected"
#: Sources in the order of preference where a table names none.
SOURCES = (EXPECTED, "paper", "detectron", "d2", "mmdet")

_TEXTS = ("id", "source", "model", "where", "delta")


@dataclass(frozen=True)
class Reference:
    """One row of somebody's table.

    Attributes:
        id: as suites name it.
        source: one of :data:`SOURCES`.
        model: backbone; rows of different ones are not compared. Of an expected row the text of its source.
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
        """Of model, whatever its depth: "C4", "FPN" or "ImageNet"; "" of an expected row, whose suite knows why."""
        return "" if self.source == EXPECTED else self.model.replace("-", " ").split()[-1]


@functools.lru_cache(maxsize=1)
def load_references() -> tuple[dict[str, Reference], dict[str, str]]:
    """All published rows by id, and a sentence on each source."""
    content = read_yaml(Path(__file__).parent / "references.yaml", "file")
    rows = {}
    for entry in [*content["coco"], *content["imagenet"]]:
        delta = dict(entry.get("delta") or {})
        to = str(delta.pop("to", ""))
        values = {k: float(v) for k, v in entry.items() if k not in _TEXTS}
        name, source, model, where = (str(entry[k]) for k in _TEXTS[:4])
        rows[name] = Reference(name, source, model, where, values, to, delta or None)
    return rows, dict(content["sources"])


def expected(value: Any, row: str, where: str) -> Reference | None:
    """What a row of a suite says that should come out: ``{box_ap: 40.3, source: "Table 6"}``; None where it is silent.

    Raises:
        SuiteError: no source, no number, or a number of no column.
    """
    content = mapping(value, where)
    if not content:
        return None
    source = content.pop("source", None)
    if not isinstance(source, str) or not source.strip():
        raise SuiteError(f"{where}: source is missing; say where the numbers come from")
    numbers = {}
    for column, number in content.items():
        one_of(column, [c for c, what in COLUMNS.items() if what.what != SIZE], where)
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not abs(number) < 1e9:  # nor NaN
            raise SuiteError(f"{where}: {column} is {shown(number)}; give a number")
        numbers[column] = float(number)
    if not numbers:
        raise SuiteError(f"{where}: no number; give box_ap, mask_ap or another column")
    source = text(source.strip(), f"{where}: source")
    return Reference(f"expected of {row}", EXPECTED, source, source, numbers)


def references_of(row: Row) -> list[Reference]:
    """The expected row first, then the published ones that the row names."""
    known, _ = load_references()
    return [*([row.expected] if row.expected is not None else []), *(known[i] for i in row.references)]


def sentence_on(source: str, found: Sequence[Reference | None]) -> str:
    """What a source is, for the note below a table; "" for none."""
    if source == EXPECTED:
        return "; ".join(dict.fromkeys(f.where for f in found if f is not None))
    return load_references()[1].get(source, "")


def published_difference(row: Reference, baseline: Reference, column: str) -> float | None:
    """Row minus baseline where one source gives both for one model, or gives the difference; None where not."""
    if (row.source, row.model) != (baseline.source, baseline.model):
        return None
    if row.delta and row.delta_to == baseline.id:
        return row.delta.get(column)
    if column in row.values and column in baseline.values:
        return row.values[column] - baseline.values[column]
    return None
