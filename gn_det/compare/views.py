"""Tables and sentences of a report, before they become Markdown or HTML."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from gn_det.compare.columns import AP_METRICS, COLUMNS, COST, METRIC, SOURCES, Reference, describe, published_difference
from gn_det.compare.outcomes import Difference, Place, Results, RowResult, common_place, published_rows
from gn_det.compare.suite import DETECT, Grid, Table

#: The main column of each kind of row.
DECIDING = {"detect": "box_ap", "pretrain": "top1_error"}
#: Default columns of a table, and those of the cost table.
USUAL = {
    "detect": ("box_ap", "box_ap50", "box_ap75", "mask_ap", "mask_ap50", "mask_ap75"),
    "pretrain": ("top1_error", "train_error"),
}
COSTS = ("parameters", "s_per_iter", "memory_mb", "s_per_image")
#: Kinds of columns.
LABEL, MEASURED, DIFFERENCE, REFERENCE = "label", "measured", "difference", "reference"


@dataclass(frozen=True)
class Cell:
    """Text of a cell: ``strong`` if larger than the noise, ``faint`` if empty."""

    text: str
    strong: bool = False
    faint: bool = False


_EMPTY, _NOTHING = Cell("", faint=True), Cell("–", faint=True)


@dataclass
class View:
    """A table to render."""

    title: str
    head: list[tuple[str, str]]  # (kind, text) of each column
    body: list[list[Cell]]
    notes: list[str] = field(default_factory=list)  # sentences below
    reference: str = ""  # description of the reference columns
    minor: bool = False  # may be collapsed

    @property
    def published(self) -> int:
        """Number of reference columns, which are the last ones."""
        return sum(kind == REFERENCE for kind, _ in self.head)


# ------------------------------------------------------------ sentences


@dataclass(frozen=True)
class Finding:
    """Comparison of a row with its baseline, and with a published difference."""

    text: str
    published: str = ""
    beyond_noise: bool = False
    contradicts: bool = False  # significant, and opposite to the published difference

    @property
    def sentences(self) -> list[str]:
        return [self.text, self.published] if self.published else [self.text]


def findings(results: Results) -> dict[str, Finding]:
    """Return row id -> finding for rows with a baseline."""
    return {r.row.id: _finding(r, r.base) for r in results.rows if r.base is not None and not r.left_out}


def _finding(result: RowResult, base: RowResult) -> Finding:
    column = DECIDING[result.row.kind]
    name = "points of top-1 error" if column == "top1_error" else COLUMNS[column].heading
    found = result.difference(column)
    if found is None:
        missing = result if base.done else base
        return Finding(f"{result.row.title}: no difference available ({missing.row.title}: {missing.status}).")
    head = f"{result.row.title} against {base.row.title}"
    if result.neither_learned(column):
        return Finding(f"{head}: neither learned ({name} 0.0 on both sides).")
    published, contradicts = "", False
    for mine, other in itertools.product(result.row.references, base.row.references):
        delta = published_difference(mine, other, column)
        if delta is not None and not published:
            published, contradicts = _against(found, mine, other, delta, column, result.unit)
    text = f"{head}: {signed(found.value)} {name}, {_noise(found, column, result.unit)}"
    return Finding(text, published, bool(found.beyond_noise), contradicts)


def _noise(found: Difference, column: str, unit: str) -> str:
    """Return the second half of a sentence: interval and verdict."""
    if found.half is None:
        return f"one {unit} each: the noise is unknown, so this may be chance."
    how = f"{found.n[0]} paired {unit}s" if found.paired else f"{found.n[0]} and {found.n[1]} {unit}s"
    how += ", assuming both rows vary equally" if found.assumed else ""
    interval = f"95% interval {signed(found.value - found.half)} to {signed(found.value + found.half)} over {how}"
    if not found.beyond_noise:
        return f"{interval}: not larger than the noise."
    better = (found.value < 0) == COLUMNS[column].lower_is_better
    return f"{interval}: larger than the noise, {'better' if better else 'worse'}."


def _against(
    found: Difference, row: Reference, other: Reference, delta: float, column: str, unit: str
) -> tuple[str, bool]:
    """Compare the sign of a difference with the published one: return a sentence, and whether they contradict."""
    name, numbers = SOURCES[row.source], row.where
    if column in row.values and column in other.values:
        numbers = f"{other.values[column]:.1f} to {row.values[column]:.1f}"
    head = f"{name[0].upper()}{name[1:]} has {signed(delta)} ({numbers}, {row.model})"
    same = (found.value > 0) == (delta > 0)
    if round(delta, 3) == 0 or (found.half is None and abs(found.value) < 0.05):
        return f"{head}.", False
    if found.half is None:
        opposite = f"the opposite direction here; with one {unit} it cannot be distinguished from noise"
        rest = f"the same direction here, on one {unit}" if same else opposite
    elif not found.beyond_noise:
        rest = "neither confirmed nor contradicted here"
        rest += ", but the interval excludes a difference of that size" * (abs(found.value - delta) > found.half)
    else:
        rest = "the same direction here" if same else f"this result contradicts {name}"
    return f"{head}: {rest}.", bool(found.beyond_noise) and not same


def signed(value: float) -> str:
    """Format with sign and one decimal, never as "-0.0"."""
    text = f"{value:+.1f}"
    return text.replace("-", "−") if float(text) else "0.0"


# ------------------------------------------------------------ tables


def views(results: Results, table: Table) -> list[View]:
    """Return a table, followed by a cost table if it names no columns and shows no cost itself."""
    shown = [view(results, table)]
    of_cost = table.grid is not None and COLUMNS[table.grid.value].what == COST
    if not table.columns and not of_cost and any(r.done for r in results.of(table.rows)):
        cost = Table(f"{table.title.partition(' (')[0]}: cost", table.rows, table.labels, COSTS)
        shown.append(view(results, cost, minor=True))
    return shown


def view(results: Results, table: Table, *, minor: bool = False) -> View:
    """Fill in a table of a suite; a ``minor`` one has no differences, published numbers or notes on rows."""
    rows = results.of(table.rows)
    if table.grid is not None:
        return _grid_view(table, rows, table.grid)
    kind = rows[0].row.kind
    columns = table.columns or USUAL[kind]
    place = common_place(rows)
    source, references = published_rows(rows, table.reference)
    published = [c for c in columns if not minor and any(_published_cell(r, c).text for r in references)]
    compared = [c for c in (DECIDING[kind], "mask_ap") if c in columns and any(r.row.baseline for r in rows)]
    compared = [] if minor else compared
    # The row that others are compared with, unless its own baseline is in the table.
    bases = {r.row.baseline for r in rows} - {r.row.id for r in rows if r.row.baseline in table.rows}
    head = [(LABEL, text) for text in table.labels or ["row"]]
    for column in columns:
        head.append((MEASURED, COLUMNS[column].heading))
        head += [(DIFFERENCE, f"Δ {COLUMNS[column].heading}")] if column in compared else []
    head += [(REFERENCE, f"{COLUMNS[c].heading} ({source})") for c in published]
    body = []
    for result, reference in zip(rows, references):
        cells = [Cell(result.row.labels.get(text, "")) for text in table.labels] or [Cell(result.row.title)]
        for column in columns:
            cells.append(_cell(result, column, place))
            if column in compared:
                cells.append(_EMPTY if result.row.id in bases else _difference_cell(result, column))
        body.append(cells + [_published_cell(reference, c) for c in published])
    notes = [table.note] * bool(table.note) + _notes(rows, columns, place, compared)
    notes += [] if minor else _row_notes(rows)
    return View(table.title, head, body, notes, describe(source, references) if published else "", minor)


def full_view(results: Results, table: Table) -> View | None:
    """Return all APs (50, 75, small, medium, large) of a detection table; None for other rows or without results."""
    rows = results.of(table.rows)
    if rows[0].row.kind != DETECT or not any(r.done for r in rows):
        return None
    return view(results, Table(f"{table.title}: all AP", table.rows, columns=tuple(AP_METRICS)), minor=True)


def fold_view(results: Results) -> View | None:
    """The deciding APs of each row fold by fold, and their mean with its interval; None without folds."""
    folds = results.plan.suite.folds
    rows = [r for r in results.rows if r.done]
    if not folds or not rows:
        return None
    columns = [c for c in ("box_ap", "mask_ap") if any(r.values(c) for r in rows)]
    head = [(LABEL, "row"), (LABEL, "metric"), *((MEASURED, f"fold {k}") for k in range(1, folds + 1))]
    body = []
    for result in rows:
        for column in columns:
            what, values, found = COLUMNS[column], result.values(column), result.number(column, None)
            cells = [Cell(what.show(values[k])) if k in values else _NOTHING for k in range(1, folds + 1)]
            half = "" if found is None or found.half is None else f" ± {found.half:.1f}"
            mean = Cell("" if found is None else f"{what.show(found.mean)}{half}")
            body.append([Cell(result.row.title), Cell(what.heading), *cells, mean])
    notes = [
        f"Every image is held out once, in one of {folds} folds of equal classes. Mean ± half of its 95% interval "
        "(Student's t over the folds). Folds share training images, so the true interval is somewhat wider."
    ]
    return View(f"Cross-validation in {folds} folds", [*head, (MEASURED, "mean")], body, notes)


def run_view(results: Results) -> View:
    """Return the table of all runs behind the numbers."""
    head = ("run", "status", "results version", "trained by", "machine", "day", "minutes")
    body = []
    for result in results.rows:
        for seed, record in sorted(result.records.items()):
            last = record.sessions[-1] if record.sessions else {}
            # Sum over all starts; the time of a killed start is unknown.
            known = [float(s["seconds"]) for s in record.sessions if s.get("seconds") is not None]
            minutes = f"{'> ' if len(known) < len(record.sessions) else ''}{sum(known) / 60:.1f}"
            commit = record.software.get("commit", "")
            version = f"{record.version} ({commit})" if commit else record.version
            run = f"{result.row.id}, {result.unit} {seed}"
            words = [run, record.status, version, record.software.get("engine", "")]
            body.append([Cell(w) for w in (*words, str(last.get("device", "")), str(last.get("day", "")), minutes)])
    remarks = [f"{r.row.title}: {remark}" for r in results.rows for remark in r.remarks]
    return View("Runs", [(LABEL, text) for text in head], body, remarks)


def _grid_view(table: Table, rows: Sequence[RowResult], grid: Grid) -> View:
    across = list(dict.fromkeys(r.row.labels[grid.columns] for r in rows))
    down = list(dict.fromkeys(r.row.labels[grid.rows] for r in rows))
    place = common_place(rows)
    source, references = published_rows(rows, table.reference)
    places = [(r.row.labels[grid.rows], r.row.labels[grid.columns]) for r in rows]
    measured = dict(zip(places, (_cell(r, grid.value, place) for r in rows)))
    published = dict(zip(places, (_published_cell(reference, grid.value) for reference in references)))
    shown = [a for a in across if any(published.get((d, a), _EMPTY).text for d in down)]
    head = [(LABEL, f"{grid.rows} \\ {grid.columns}")] + [(MEASURED, a) for a in across]
    head += [(REFERENCE, f"{a} ({source})") for a in shown]
    body = [
        [Cell(d), *(measured.get((d, a), _EMPTY) for a in across), *(published.get((d, a), _EMPTY) for a in shown)]
        for d in down
    ]
    notes = [f"{COLUMNS[grid.value].heading}.", *_notes(rows, [grid.value], place, []), *_row_notes(rows)]
    notes += [table.note] * bool(table.note)
    return View(table.title, head, body, notes, describe(source, references) if shown else "")


# ------------------------------------------------------------ cells


def _cell(result: RowResult, column: str, place: Place | None) -> Cell:
    found, what = result.number(column, place), COLUMNS[column]
    if found is None:
        return _NOTHING if result.done or what.what != METRIC else Cell(result.status, faint=True)
    return Cell(what.show(found.mean) + ("" if found.std is None else f" ± {what.show(found.std)}"))


def _difference_cell(result: RowResult, column: str) -> Cell:
    found = result.difference(column)
    if found is None:
        return _EMPTY if result.row.baseline is None else _NOTHING
    if result.neither_learned(column):
        return Cell("neither learned", faint=True)
    noise = f"± {found.half:.1f}" if found.half is not None else "(?)"
    return Cell(f"{signed(found.value)} {noise}", strong=bool(found.beyond_noise))


def _published_cell(reference: Reference | None, column: str) -> Cell:
    if reference is not None and column in reference.values:
        return Cell(COLUMNS[column].show(reference.values[column]))
    if reference is not None and column in reference.delta:
        return Cell(f"Δ about {signed(reference.delta[column])}")
    return _EMPTY


# ------------------------------------------------------------ notes


def _notes(
    rows: Sequence[RowResult], columns: Sequence[str], place: Place | None, compared: Sequence[str]
) -> list[str]:
    notes = []
    if any(len(r.done) > 1 for r in rows) and any(COLUMNS[c].what == METRIC for c in columns):
        notes.append(f"Mean ± standard deviation over {rows[0].unit}s.")
    if compared:
        found = [d for r in rows for c in compared if (d := r.difference(c)) is not None]
        text = "Δ: against the row's baseline, ± half of its 95% interval; bold: larger than the noise"
        one = f"one {rows[0].unit}"
        text += f"; (?): {one}, so the noise is unknown" if any(d.half is None for d in found) else ""
        text += f"; a row with {one} is assumed to vary like the other" if any(d.assumed for d in found) else ""
        notes.append(f"{text}.")
    costs = [c for c in columns if COLUMNS[c].what == COST]
    if costs and place is not None:
        notes.append(f"Cost: measured on {place[2]}, {place[1]}.")
        blank = [r.row.title for r in rows if r.done and all(r.cost(c, place) is None for c in costs)]
        if blank:
            notes.append(f"No cost for {', '.join(blank)}: not measured on the same machine and day.")
    return notes


def _row_notes(rows: Sequence[RowResult]) -> list[str]:
    notes = []
    for r in rows:
        remarks = (r.left_out and f"left out: {r.left_out}", *(f"failed: {why}" for why in r.reasons), r.row.note)
        notes += [f"{r.row.title}: {remark}" for remark in remarks if remark]
    return notes
