"""The tables of a report as cells, before they become Markdown or HTML."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from gn_det.compare.columns import ALL_AP, COLUMNS, COST, DECIDING, METRIC, TAKES, USUAL
from gn_det.compare.findings import signed
from gn_det.compare.references import SOURCES, Reference, references_of, sentence_on
from gn_det.compare.results import Place, Results, RowResult, common_place
from gn_det.compare.statistics import Difference, Spread
from gn_det.compare.store import Record
from gn_det.compare.suite import DETECT, Grid, Table

#: Kinds of columns.
LABEL, MEASURED, DIFFERENCE, REFERENCE = "label", "measured", "difference", "reference"
NOTHING = "–"


@dataclass(frozen=True)
class Cell:
    """Text of a cell; ``strong`` where it is larger than the noise, ``faint`` where there is nothing."""

    text: str
    strong: bool = False
    faint: bool = False


@dataclass
class View:
    """A table to be written.

    Attributes:
        title: heading.
        head: (kind, text) of each column.
        body: rows of cells.
        notes: sentences below.
        reference: what the reference columns hold, "" without any.
        minor: may be folded where it is long.
    """

    title: str
    head: list[tuple[str, str]]
    body: list[list[Cell]]
    notes: list[str] = field(default_factory=list)
    reference: str = ""
    minor: bool = False


def view(results: Results, table: Table, *, plain: bool = False) -> View:
    """A table of a suite, filled in; ``plain`` leaves out published numbers and the notes on rows."""
    rows = [results.row(identity) for identity in table.rows]
    if table.grid is not None:
        return _grid_view(results, table, rows, table.grid)
    kind = rows[0].row.kind
    columns = table.columns or USUAL[kind]
    place = common_place(rows)
    source = table.reference or _source_of(rows)
    references = _published(rows, source)
    published = [] if plain else _published_columns(references, columns)
    compared = [c for c in (DECIDING[kind], "mask_ap") if c in columns and any(r.row.baseline for r in rows)]
    # What the other rows are compared with, unless its own baseline stands here too.
    bases = {r.row.baseline for r in rows} - {r.row.id for r in rows if r.row.baseline in table.rows}
    labels = list(table.labels)
    head = [(LABEL, text) for text in labels or ["row"]]
    for column in columns:
        head.append((MEASURED, COLUMNS[column].heading))
        head += [(DIFFERENCE, f"Δ {COLUMNS[column].heading}")] if column in compared else []
    head += [(REFERENCE, f"{COLUMNS[c].heading} ({source})") for c in published]
    body = []
    for result, reference in zip(rows, references):
        cells = [Cell(result.row.labels.get(text, "")) for text in labels] or [Cell(result.row.title)]
        for column in columns:
            cells.append(_cell(result, column, place))
            if column in compared:
                base = result.row.id in bases
                cells.append(Cell("", faint=True) if base else _difference_cell(results, result, column))
        body.append(cells + [_published_cell(reference, c) for c in published])
    notes = _notes(results, rows, columns, place, compared, table.note) + ([] if plain else _row_notes(rows))
    return View(table.title, head, body, notes, sentence_on(source, references) if published else "", plain)


def views(results: Results, table: Table) -> list[View]:
    """A table, and behind one that names no columns what its rows cost."""
    shown = [view(results, table)]
    if not table.columns and any(results.row(i).done for i in table.rows):
        cost = Table(f"{table.title.partition(' (')[0]}: cost", table.rows, table.labels, TAKES)
        shown.append(view(results, cost, plain=True))
    return shown


def full_view(results: Results, table: Table) -> View | None:
    """All APs of a table of detections: 50, 75, small, medium, large; None for other rows or where nothing is done."""
    rows = [results.row(identity) for identity in table.rows]
    if rows[0].row.kind != DETECT or not any(r.done for r in rows):
        return None
    head = [(LABEL, "row")] + [(MEASURED, COLUMNS[c].heading) for c in ALL_AP]
    body = [[Cell(r.row.title), *(_cell(r, c, None) for c in ALL_AP)] for r in rows]
    return View(f"{table.title}: all AP", head, body)


# ------------------------------------------------------------ grids


def _grid_view(results: Results, table: Table, rows: Sequence[RowResult], grid: Grid) -> View:
    across = list(dict.fromkeys(r.row.labels[grid.columns] for r in rows))
    down = list(dict.fromkeys(r.row.labels[grid.rows] for r in rows))
    source = table.reference or _source_of(rows)
    place = common_place(rows)
    by_labels = {(r.row.labels[grid.rows], r.row.labels[grid.columns]): r for r in rows}
    published = dict(zip(by_labels, _published(list(by_labels.values()), source)))
    shown = [a for a in across if any(_value(published.get((d, a)), grid.value) is not None for d in down)]
    head = [(LABEL, f"{grid.rows} \\ {grid.columns}")] + [(MEASURED, a) for a in across]
    head += [(REFERENCE, f"{a} ({source})") for a in shown]
    body = []
    for d in down:
        cells = [Cell(d)]
        for a in across:
            result = by_labels.get((d, a))
            cells.append(_cell(result, grid.value, place) if result else Cell("", faint=True))
        body.append(cells + [_published_cell(published.get((d, a)), grid.value) for a in shown])
    notes = [f"{COLUMNS[grid.value].heading}; mean ± standard deviation over seeds.", *_row_notes(rows)]
    reference = sentence_on(source, list(published.values())) if shown else ""
    return View(table.title, head, body, notes + ([table.note] if table.note else []), reference)


# ------------------------------------------------------------ cells


def _cell(result: RowResult, column: str, place: Place | None) -> Cell:
    what = COLUMNS[column]
    if what.what == METRIC:
        return _spread_cell(result, result.spread(column), what.decimals)
    value = result.cost(column, place) if what.what == COST else result.size(column)
    return Cell(NOTHING, faint=True) if value is None else Cell(f"{value * what.factor:.{what.decimals}f}")


def _spread_cell(result: RowResult, found: Spread | None, decimals: int) -> Cell:
    if found is None:
        word = NOTHING if result.done else result.status
        return Cell(word, faint=True)
    text = f"{found.mean:.{decimals}f}"
    return Cell(text if found.std is None else f"{text} ± {found.std:.{decimals}f}")


def _difference_cell(results: Results, result: RowResult, column: str) -> Cell:
    found = results.difference(result, column)
    if found is None:
        return Cell("" if result.row.baseline is None else NOTHING, faint=True)
    return Cell(_difference_text(found), strong=bool(found.beyond_noise))


def _difference_text(found: Difference) -> str:
    return f"{signed(found.value)} ± {found.half:.1f}" if found.half is not None else f"{signed(found.value)} (?)"


# ------------------------------------------------------------ published


def _source_of(rows: Sequence[RowResult]) -> str:
    """The one source to show: that of most rows, so that columns never mix."""
    counts = {s: sum(any(f.source == s for f in references_of(r.row)) for r in rows) for s in SOURCES}
    best = max(SOURCES, key=lambda s: (counts[s], -SOURCES.index(s)))
    return best if counts[best] else ""


def _published(rows: Sequence[RowResult], source: str) -> list[Reference | None]:
    """What the source has for each row; of one kind of model (C4, FPN) only, that of most rows."""
    found = [next((f for f in references_of(r.row) if f.source == source), None) for r in rows]
    kinds = Counter(f.kind for f in found if f is not None)
    return [f if f is not None and f.kind == kinds.most_common(1)[0][0] else None for f in found]


def _value(reference: Reference | None, column: str) -> float | None:
    return None if reference is None else reference.values.get(column)


def _published_columns(found: Sequence[Reference | None], columns: Sequence[str]) -> list[str]:
    """The shown columns that are published for a row, or a difference in them."""
    return [c for c in columns if any(f is not None and (c in f.values or c in (f.delta or {})) for f in found)]


def _published_cell(reference: Reference | None, column: str) -> Cell:
    value = _value(reference, column)
    if value is None and reference is not None and column in (reference.delta or {}):
        return Cell(f"Δ about {signed((reference.delta or {})[column])}")
    what = COLUMNS[column]
    return Cell("", faint=True) if value is None else Cell(f"{value * what.factor:.{what.decimals}f}")


# ------------------------------------------------------------ notes


def _notes(
    results: Results,
    rows: Sequence[RowResult],
    columns: Sequence[str],
    place: Place | None,
    compared: Sequence[str],
    written: str,
) -> list[str]:
    notes = [written] if written else []
    if any(len(r.done) > 1 for r in rows) and any(COLUMNS[c].what == METRIC for c in columns):
        notes.append("Mean ± standard deviation over seeds.")
    if compared:
        found = [d for r in rows for c in compared if (d := results.difference(r, c)) is not None]
        text = "Δ: against the row's baseline, ± half of its 95 % interval; bold: larger than the noise"
        text += "; (?): one seed, so the noise is not known" if any(d.half is None for d in found) else ""
        text += "; a row of one seed is taken to spread as the other" if any(d.assumed for d in found) else ""
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
    for result in rows:
        if result.left_out:
            notes.append(f"{result.row.title}: left out: {result.left_out}.")
        notes += [f"{result.row.title}: failed: {reason}" for reason in result.reasons]
        if result.row.note:
            notes.append(f"{result.row.title}: {result.row.note}")
    return notes


# ------------------------------------------------------------ runs

#: Of the table of single runs.
RUN_HEAD = ("run", "status", "gn_det code", "trained by", "machine", "day", "minutes")


def run_rows(results: Results) -> list[list[str]]:
    """Where every number comes from: the columns of :data:`RUN_HEAD` for each run."""
    rows = []
    for result in results.rows:
        for seed, record in sorted(result.records.items()):
            last = record.sessions[-1] if record.sessions else {}
            rows.append([f"{result.row.id}, seed {seed}", record.status, record.version,
                         record.software.get("engine", ""), str(last.get("device", "")), str(last.get("day", "")),
                         _minutes(record)])  # fmt: skip
    return rows


def _minutes(record: Record) -> str:
    """Of all starts; what one took that was killed, nobody wrote down."""
    known = [float(s["seconds"]) for s in record.sessions if s.get("seconds") is not None]
    return f"{'> ' if len(known) < len(record.sessions) else ''}{sum(known) / 60:.1f}"
