"""Plain sentences: what a difference is, whether it is larger than the noise, and what the published result says."""

from __future__ import annotations

from gn_det.compare.columns import COLUMNS, DECIDING
from gn_det.compare.references import EXPECTED, Reference, published_difference, references_of
from gn_det.compare.results import Results, RowResult
from gn_det.compare.statistics import Difference

#: Differences of so many points of a percent count as none in print.
_DECIMALS = 1

_NAMES = {
    EXPECTED: "what was expected",
    "paper": "the paper",
    "detectron": "Detectron",
    "d2": "Detectron2",
    "mmdet": "MMDetection",
}


def findings(results: Results) -> dict[str, list[str]]:
    """Row id -> sentences, for the rows that have a baseline."""
    return {r.row.id: of_row(results, r) for r in results.rows if r.row.baseline is not None and not r.left_out}


def many_told(count: int) -> str:
    """A warning for the reader of many comparisons."""
    return f"Each interval is one of 95 %: of {count} comparisons about {count / 20:.0f} leave zero out by chance."


def of_row(results: Results, result: RowResult) -> list[str]:
    """The sentences of one row with a baseline."""
    assert result.row.baseline is not None
    base = results.row(result.row.baseline)
    column = DECIDING[result.row.kind]
    found = results.difference(result, column)
    if found is None:
        missing = base if not base.done else result
        return [f"{result.row.title}: no difference can be told, because {missing.row.title} is {missing.status}."]
    change = f"{signed(found.value)} {heading(column)}"
    sentences = [f"{result.row.title} against {base.row.title}: {change}, {noise(found, column)}"]
    published = reference_pair(result, base, column)
    if published is not None:
        row, other, delta = published
        sentences.append(against_published(found, row, other, delta, column))
    return sentences


def heading(column: str) -> str:
    """As used in a sentence."""
    return "points of top-1 error" if column == "top1_error" else COLUMNS[column].heading


def noise(found: Difference, column: str) -> str:
    """The rest of a sentence: interval and verdict."""
    if found.half is None:
        return "one seed each: the noise is not known, so this may be chance."
    low, high = found.value - found.half, found.value + found.half
    how = f"{found.n[0]} paired seeds" if found.paired else f"{found.n[0]} and {found.n[1]} seeds"
    if found.assumed:
        how = f"{found.n[0]} and {found.n[1]} seeds, if both rows spread alike"
    interval = f"95 % interval {signed(low)} to {signed(high)} over {how}"
    if not found.beyond_noise:
        return f"{interval}: not larger than the noise."
    better = (found.value < 0) == COLUMNS[column].lower_is_better
    return f"{interval}: larger than the noise, {'better' if better else 'worse'}."


def signed(value: float) -> str:
    """With its sign, one decimal, and never "-0.0"."""
    text = f"{value:+.{_DECIMALS}f}"
    return text.replace("-", "−") if float(text) else f"{0:.{_DECIMALS}f}"


def reference_pair(result: RowResult, base: RowResult, column: str) -> tuple[Reference, Reference, float] | None:
    """Published rows of one source for a row and its baseline, with their difference."""
    for mine in references_of(result.row):
        for other in references_of(base.row):
            delta = published_difference(mine, other, column)
            if delta is not None:
                return mine, other, delta
    return None


def against_published(found: Difference, row: Reference, other: Reference, delta: float, column: str) -> str:
    """Whether a difference points where the published one does; sizes differ with data and schedule."""
    name = _NAMES[row.source]
    if column in row.values and column in other.values:
        numbers = f"{other.values[column]:.1f} to {row.values[column]:.1f}"
    else:
        numbers = row.where
    head = f"{name[0].upper()}{name[1:]} has {signed(delta)} ({numbers}, {row.model})"
    same = (found.value > 0) == (delta > 0)
    if round(delta, 3) == 0 or (found.half is None and abs(found.value) < 0.05):
        return f"{head}."
    if found.half is None:
        return f"{head}: the same direction here, on one seed." if same else (
            f"{head}: the opposite direction here; with one seed it cannot be told from noise."
        )  # fmt: skip
    if not found.beyond_noise:
        return f"{head}: neither confirmed nor contradicted here."
    return f"{head}: the same direction here." if same else f"{head}: this result contradicts {name}."
