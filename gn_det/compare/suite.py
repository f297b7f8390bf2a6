"""A suite as it is written: YAML -> :class:`Suite`, with every unknown key, missing row and clash of ids named.

What the keys mean stands in ``docs/compare.md``. Nothing of a config or of data is looked at here.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gn_det.compare.columns import COLUMNS
from gn_det.compare.fields import MAX_NOTE, SuiteError, flag, is_text, known, mapping, near, one_of, text, texts, whole
from gn_det.compare.references import SOURCES, Reference
from gn_det.compare.references import expected as expected_of
from gn_det.config.reader import read_yaml
from gn_det.text import one_line, shown

DETECT, PRETRAIN = "detect", "pretrain"

_SUITE_KEYS = ("name", "title", "note", "defaults", "overrides", "rows", "tables", "samples")
_ROW_KEYS = ("id", "kind", "title", "each", "seeds", "baseline", "labels", "reference", "expected", "note", "optional")
_DETECT_KEYS = (*_ROW_KEYS, "config", "overrides", "weights", "data")
_DATA_KEYS = ("train_json", "train_images", "val_json", "val_images")
_TABLE_KEYS = ("title", "rows", "labels", "columns", "reference", "note", "grid")
_GRID_KEYS = ("rows", "columns", "value")
_SAMPLE_KEYS = ("rows", "images")
#: Rows of a suite, seeds of a row, tables, and values and characters that ``each`` may write.
MAX_ROWS, MAX_SEEDS, _MAX_TABLES, _MAX_WRITTEN = 500, 1000, 100, 2_000_000
_MAX_ID, _MAX_PART = 200, 100
#: A name, or names with "/" between them: each is a folder below that of the results.
_ID = re.compile(r"[A-Za-z0-9][\w.+*-]*(/[A-Za-z0-9][\w.+*-]*)*")


@dataclass(frozen=True)
class Row:
    """One line of a table: what is trained, with which seeds.

    Attributes:
        id: unique in the suite; also the folder of its runs.
        kind: "detect" or "pretrain".
        title: how tables and curves call it.
        config: of a detection: path or shipped name.
        overrides: of a detection: config keys of this row alone.
        weights: of a detection: path, URI, id of a pre-training row, "" for none; None leaves the config's.
        data: of a detection: ``train_json`` ... ``val_images``; empty leaves the config's.
        settings: of a pre-training: fields of :class:`gn_det.classification.Settings`.
        seeds: one run each.
        baseline: id of the row that it is compared with.
        labels: column -> text in tables; what tells the rows apart.
        references: ids of published results, see :mod:`gn_det.compare.references`.
        expected: what the suite itself says that should come out, with its source.
        note: a sentence for the report.
        optional: left out, and said so, where its weights or data are not there.
    """

    id: str
    kind: str
    title: str
    config: str = ""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    weights: str | None = None
    data: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    seeds: tuple[int, ...] = (1,)
    baseline: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    references: tuple[str, ...] = ()
    expected: Reference | None = None
    note: str = ""
    optional: bool = False


@dataclass(frozen=True)
class Grid:
    """A table of one number over two labels, as the paper's Table 2: ``value`` by ``rows`` and ``columns``."""

    rows: str
    columns: str
    value: str


@dataclass(frozen=True)
class Table:
    """Rows shown together.

    Attributes:
        title: heading.
        rows: ids in order.
        labels: label columns; empty shows the rows' titles.
        columns: names of :data:`gn_det.compare.columns.COLUMNS`; empty takes those of the kind.
        reference: source of the published numbers beside it, "" shows none.
        note: a sentence below.
        grid: where the table is one number over two labels.
    """

    title: str
    rows: tuple[str, ...]
    labels: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    reference: str = ""
    note: str = ""
    grid: Grid | None = None


@dataclass(frozen=True)
class Suite:
    """A comparison as written.

    Attributes:
        name: of the output folder.
        title: heading of the report.
        note: paragraphs below it.
        rows: in the order of the file.
        tables: at least one.
        overrides: config keys of every detection row, so that all sides get the same.
        sample_rows: ids whose predictions are drawn side by side; empty chooses.
        sample_images: validation images drawn for each.
        source: where it comes from, for messages.
    """

    name: str
    title: str
    note: str
    rows: tuple[Row, ...]
    tables: tuple[Table, ...]
    overrides: Mapping[str, Any] = field(default_factory=dict)
    sample_rows: tuple[str, ...] = ()
    sample_images: int = 4
    source: str = ""

    def row(self, identity: str) -> Row:
        return next(row for row in self.rows if row.id == identity)


def load_suite(path: Path) -> Suite:
    """Read a suite file.

    Raises:
        SuiteError: the first mistake, as one line with the file, the row and the key.
        ConfigError: no valid YAML; a key that stands twice.
    """
    return parse_suite(read_yaml(path, "suite"), one_line(str(path), 300))


def parse_suite(content: Mapping[str, Any], source: str) -> Suite:
    """A suite from its YAML content; see :func:`load_suite`."""
    known(content, _SUITE_KEYS, source)
    name = text(content.get("name"), f"{source}: name") or Path(source).stem
    if not _is_id(name) or "/" in name:
        raise SuiteError(f"{source}: name {shown(name)} must be of letters, digits and . _ + -, at most {_MAX_PART}")
    defaults = mapping(content.get("defaults"), f"{source}: defaults")
    known(defaults, (DETECT, PRETRAIN, "seeds"), f"{source}: defaults")
    written = content.get("rows")
    if not isinstance(written, list) or not written:
        raise SuiteError(f"{source}: rows must be a list of at least one row")
    if len(written) > MAX_ROWS:
        raise SuiteError(f"{source}: rows has {len(written)} rows; at most {MAX_ROWS} are possible")
    rows = tuple(_row(entry, defaults, source) for entry in _expanded(written, source))
    _check_ids(rows, source)
    samples = mapping(content.get("samples"), f"{source}: samples")
    known(samples, _SAMPLE_KEYS, f"{source}: samples")
    suite = Suite(
        name=name,
        title=text(content.get("title"), f"{source}: title") or name,
        note=text(content.get("note"), f"{source}: note", MAX_NOTE).strip(),
        rows=rows,
        tables=_tables(content.get("tables"), rows, source),
        overrides=_overrides(content.get("overrides"), f"{source}: overrides"),
        sample_rows=_ids(samples.get("rows", ()), rows, f"{source}: samples: rows"),
        sample_images=whole(samples.get("images", 4), f"{source}: samples: images", least=0),
        source=source,
    )
    return suite


# ------------------------------------------------------------ rows


def _is_id(name: str) -> bool:
    return len(name) <= _MAX_ID and bool(_ID.fullmatch(name)) and max(map(len, name.split("/"))) <= _MAX_PART


def _expanded(written: Sequence[Any], source: str) -> Iterable[Mapping[str, Any]]:
    """Every row with ``each`` once per combination of its values, ``{name}`` replaced in all its texts."""
    budget = _Budget(source)
    rows = 0
    for number, entry in enumerate(written, 1):
        if not isinstance(entry, Mapping):
            raise SuiteError(f"{source}: row {number} must be keys and values, got {shown(entry)}")
        each = mapping(entry.get("each"), f"{source}: row {number}: each")
        for name, values in each.items():
            if not isinstance(values, list) or not values:
                raise SuiteError(f"{source}: row {number}: each: {one_line(name)} must be a list of values")
        rows += math.prod(len(values) for values in each.values())
        if rows > MAX_ROWS:
            raise SuiteError(f"{source}: row {number}: each makes more than {MAX_ROWS} rows")
        plain = {key: value for key, value in entry.items() if key != "each"}
        for combination in itertools.product(*each.values()):
            together: dict[str, Any] = {}
            for name, value in zip(each, combination):
                together |= value if isinstance(value, Mapping) else {name: value}  # several that go together
            yield _filled(plain, together, budget)


class _Budget:
    """What ``each`` may still write; a few lines could otherwise make gigabytes."""

    def __init__(self, source: str):
        self.source, self.left = source, _MAX_WRITTEN

    def spend(self, amount: int) -> None:
        self.left -= amount
        if self.left < 0:
            raise SuiteError(f"{self.source}: rows: each writes more than {_MAX_WRITTEN} values and characters")


def _filled(value: Any, values: Mapping[str, Any], budget: _Budget) -> Any:
    budget.spend(1)
    if isinstance(value, Mapping):
        return {_filled_text(k, values, budget): _filled(v, values, budget) for k, v in value.items()}
    if isinstance(value, list):
        return [_filled(item, values, budget) for item in value]
    if not isinstance(value, str):
        return value
    whole = re.fullmatch(r"\{(\w+)\}", value)
    if whole and whole[1] in values:
        return _filled(values[whole[1]], {}, budget)  # a number stays one
    return _filled_text(value, values, budget)


def _filled_text(written: Any, values: Mapping[str, Any], budget: _Budget) -> str:
    filled = str(written)
    for name, value in values.items():
        if f"{{{name}}}" in filled:
            if not is_text(value):
                raise SuiteError(
                    f"{budget.source}: rows: each: {one_line(name)} inside a text must be text or a number"
                )
            budget.spend(filled.count(f"{{{name}}}") * len(str(value)))
            filled = filled.replace(f"{{{name}}}", str(value))
    budget.spend(len(filled))
    return filled


def _row(entry: Mapping[str, Any], defaults: Mapping[str, Any], source: str) -> Row:
    identity = str(entry.get("id", "")) if is_text(entry.get("id", "")) else ""
    where = f"{source}: row {shown(identity)}"
    if not _is_id(identity):
        raise SuiteError(
            f"{where}: id must be of letters, digits and . _ + * -, with / between parts of at most {_MAX_PART}"
        )
    kind = text(entry.get("kind", DETECT), f"{where}: kind")
    if kind not in (DETECT, PRETRAIN):
        raise SuiteError(f"{where}: kind is {shown(kind)}; it is {DETECT} or {PRETRAIN}")
    common = mapping(defaults.get(kind), f"{source}: defaults: {kind}")
    merged: dict[str, Any] = {**common, **entry}
    for key in ("overrides", "labels"):
        if key in common and key in entry:
            merged[key] = {**mapping(common[key], f"{source}: defaults: {key}"), **mapping(entry[key], where)}
    allowed = _DETECT_KEYS if kind == DETECT else (*_ROW_KEYS, *_setting_names())
    known(merged, allowed, where)
    if kind == DETECT and not merged.get("config"):
        raise SuiteError(f"{where}: config is missing; name a .yaml file or a shipped config (gn-det configs)")
    return Row(
        id=identity,
        kind=kind,
        title=text(merged.get("title"), f"{where}: title") or identity,
        config=text(merged.get("config"), f"{where}: config"),
        overrides=_overrides(merged.get("overrides"), f"{where}: overrides"),
        weights=None if merged.get("weights") is None else text(merged["weights"], f"{where}: weights", 4096),
        data=_data(merged.get("data"), where) if kind == DETECT else {},
        settings={k: v for k, v in merged.items() if k not in _ROW_KEYS} if kind == PRETRAIN else {},
        seeds=_seeds(merged.get("seeds", defaults.get("seeds", 1)), where),
        baseline=None
        if merged.get("baseline") in (None, "", identity)
        else text(merged["baseline"], f"{where}: baseline"),
        labels=_labels(merged.get("labels"), f"{where}: labels"),
        references=texts(merged.get("reference", ()), f"{where}: reference"),
        expected=expected_of(merged.get("expected"), identity, f"{where}: expected"),
        note=text(merged.get("note"), f"{where}: note", MAX_NOTE),
        optional=flag(merged.get("optional", False), f"{where}: optional"),
    )


def _setting_names() -> tuple[str, ...]:
    """What a pre-training row may set; output folder and seed belong to the runner."""
    import dataclasses

    from gn_det.classification import Settings

    return tuple(f.name for f in dataclasses.fields(Settings) if f.name not in ("output", "seed"))


def _data(value: Any, where: str) -> Mapping[str, str]:
    data = mapping(value, f"{where}: data")
    known(data, _DATA_KEYS, f"{where}: data")
    if data and not (data.get("train_json") and data.get("train_images")):
        raise SuiteError(f"{where}: data: train_json and train_images are both needed")
    if data and not (data.get("val_json") and data.get("val_images")):
        raise SuiteError(f"{where}: data: val_json and val_images are missing; without validation there is no AP")
    return {k: text(v, f"{where}: data: {k}", 4096) for k, v in data.items()}


def _overrides(value: Any, where: str) -> Mapping[str, Any]:
    overrides = mapping(value, where)
    for key, item in overrides.items():
        if isinstance(item, Mapping):
            raise SuiteError(f"{where}: {one_line(key)} must be a value, got keys; write SECTION.KEY: value")
    return overrides


def _labels(value: Any, where: str) -> Mapping[str, str]:
    return {text(k, where): text(v, f"{where}: {one_line(k)}") for k, v in mapping(value, where).items()}


def _seeds(value: Any, where: str) -> tuple[int, ...]:
    """3 means 1, 2, 3; a list is taken as it is."""
    if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= MAX_SEEDS:
        return tuple(range(1, value + 1))
    if isinstance(value, list) and 0 < len(value) <= MAX_SEEDS and all(_is_seed(seed) for seed in value):
        if len(set(value)) < len(value):
            raise SuiteError(f"{where}: seeds {shown(value)} name one twice")
        return tuple(value)
    raise SuiteError(
        f"{where}: seeds is {shown(value)}; give how many (at most {MAX_SEEDS}), or a list of whole numbers >= 0"
    )


def _is_seed(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _check_ids(rows: Sequence[Row], source: str) -> None:
    seen: set[str] = set()
    for row in rows:
        if row.id in seen:
            raise SuiteError(f"{source}: row '{row.id}': the id stands twice; give every row its own")
        seen.add(row.id)
    for row in rows:
        if row.baseline is None:
            continue
        base = next((r for r in rows if r.id == row.baseline), None)
        if base is None:
            raise SuiteError(
                f"{source}: row '{row.id}': baseline: no row {shown(row.baseline)}{near(row.baseline, seen)}"
            )
        if base.kind != row.kind:
            raise SuiteError(f"{source}: row '{row.id}': baseline: '{base.id}' is a {base.kind} row, not {row.kind}")


# ------------------------------------------------------------ tables


def _tables(value: Any, rows: Sequence[Row], source: str) -> tuple[Table, ...]:
    """Those written, or one of all rows of each kind."""
    if value is None:
        headings = {DETECT: "Detection", PRETRAIN: "Classification"}
        kinds = [k for k in (DETECT, PRETRAIN) if any(r.kind == k for r in rows)]
        return tuple(Table(headings[k], tuple(r.id for r in rows if r.kind == k)) for k in kinds)
    if not isinstance(value, list) or not value:
        raise SuiteError(f"{source}: tables must be a list of at least one table")
    if len(value) > _MAX_TABLES:
        raise SuiteError(f"{source}: tables has {len(value)} tables; at most {_MAX_TABLES} are possible")
    tables = []
    for number, entry in enumerate(value, 1):
        where = f"{source}: table {number}"
        content = mapping(entry, where)
        known(content, _TABLE_KEYS, where)
        ids = _ids(content.get("rows", ()), rows, f"{where}: rows")
        if not ids:
            raise SuiteError(f"{where}: rows is missing; name the ids of its rows")
        if len({r.kind for r in rows if r.id in ids}) > 1:
            raise SuiteError(f"{where}: rows mixes {DETECT} and {PRETRAIN} rows; make two tables")
        columns = texts(content.get("columns", ()), f"{where}: columns")
        for column in columns:
            one_of(column, COLUMNS, f"{where}: columns")
        tables.append(
            Table(
                title=text(content.get("title"), f"{where}: title") or f"Table {number}",
                rows=ids,
                labels=texts(content.get("labels", ()), f"{where}: labels"),
                columns=columns,
                reference=_source(content.get("reference"), f"{where}: reference"),
                note=text(content.get("note"), f"{where}: note", MAX_NOTE),
                grid=_grid(content.get("grid"), [r for r in rows if r.id in ids], where),
            )
        )
    return tuple(tables)


def _grid(value: Any, rows: Sequence[Row], where: str) -> Grid | None:
    if value is None:
        return None
    content = mapping(value, f"{where}: grid")
    known(content, _GRID_KEYS, f"{where}: grid")
    for key in _GRID_KEYS:
        if key not in content:
            raise SuiteError(f"{where}: grid: {key} is missing")
    axes = {key: text(content[key], f"{where}: grid: {key}") for key in _GRID_KEYS}
    one_of(axes["value"], COLUMNS, f"{where}: grid: value")
    for key in ("rows", "columns"):
        for row in rows:
            if axes[key] not in row.labels:
                raise SuiteError(f"{where}: grid: {key}: row '{row.id}' has no label {shown(axes[key])}")
    return Grid(**axes)


def _source(value: Any, where: str) -> str:
    name = text(value, where)
    if name:
        one_of(name, SOURCES, where)
    return name


def _ids(value: Any, rows: Sequence[Row], where: str) -> tuple[str, ...]:
    """Ids of rows; ``*`` stands for any text."""
    out: list[str] = []
    known = [row.id for row in rows]
    for pattern in texts(value, where):
        found = matching(pattern, known)
        if not found:
            raise SuiteError(f"{where}: no row {shown(pattern)}{near(pattern, known)}")
        out += [identity for identity in found if identity not in out]
    return tuple(out)


def matching(pattern: str, ids: Sequence[str]) -> list[str]:
    """Ids that are the pattern, or match it where it has a ``*`` that no id has."""
    if pattern in ids:
        return [pattern]
    return [identity for identity in ids if "*" in pattern and _matches(pattern.split("*"), identity)]


def _matches(parts: Sequence[str], name: str) -> bool:
    """Whether a name has the parts of a pattern in their order, from its start to its end."""
    first, *middle, last = parts
    if not name.startswith(first) or not name.endswith(last) or len(name) < len(first) + len(last):
        return False
    at, end = len(first), len(name) - len(last)
    for part in middle:
        found = name.find(part, at, end)
        if found < 0:
            return False
        at = found + len(part)
    return True
