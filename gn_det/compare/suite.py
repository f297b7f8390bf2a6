"""A suite as it is written: YAML -> :class:`Suite`, with every unknown key, missing row and clash of ids named.

``docs/compare.md`` says what the keys mean. Configs and data are not looked at here.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gn_det.classification import Settings
from gn_det.compare.columns import COLUMNS, EXPECTED, SIZE, SOURCES, Reference, load_references
from gn_det.config.reader import read_yaml
from gn_det.errors import ConfigError
from gn_det.text import did_you_mean, one_line, shown
from gn_det.values import ANYTHING, FLAG, Check, InvalidValue, Value, integer, items, number, one_of, optional

DETECT, PRETRAIN = "detect", "pretrain"
#: Rows of a suite, seeds of a row, and values and characters that ``each`` may write.
MAX_ROWS, MAX_SEEDS, _MAX_WRITTEN = 500, 1000, 2_000_000


class SuiteError(ConfigError):
    """A suite that cannot be run as it is written.

    Attributes:
        where: file, row or table, and key.
        problem: what is wrong there; follows ``where`` in a sentence.
    """

    def __init__(self, where: str, problem: str) -> None:
        super().__init__(f"{where} {problem}")
        self.where, self.problem = where, problem


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
        references: what is known of it from elsewhere: what the suite expects, then published rows.
        note: a sentence for the report.
        optional: left out, and said so, where its weights or data are missing.
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
    references: tuple[Reference, ...] = ()
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
        rows: ids in order, all of one kind.
        labels: label columns; empty shows the rows' titles.
        columns: names of :data:`gn_det.compare.columns.COLUMNS`; empty takes those of the kind.
        reference: source of the published numbers beside it; "" takes the one that most rows have.
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
        note: paragraph below it.
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


def load_suite(path: Path) -> Suite:
    """Read a suite file.

    Raises:
        SuiteError: the first mistake, as one line with the file, the row and the key.
        ConfigError: no valid YAML; a duplicate key.
    """
    return parse_suite(read_yaml(path, "suite"), one_line(str(path), 300))


def parse_suite(content: Mapping[str, Any], source: str) -> Suite:
    """A suite from its YAML content; see :func:`load_suite`."""
    suite = _checked(content, _SUITE, source)
    if not suite["rows"]:
        raise SuiteError(f"{source}: rows", f"is missing; give {_ROWS.expected}")
    defaults = _checked(suite["defaults"], _DEFAULTS, f"{source}: defaults")
    rows = tuple(_row(entry, defaults, source) for entry in _expanded(suite["rows"], source))
    _check_ids(rows, source)
    samples = _checked(suite["samples"], _SAMPLES, f"{source}: samples")
    name = _text(suite["name"]) or Path(source).stem
    return Suite(
        name=name,
        title=_text(suite["title"]) or name,
        note=_text(suite["note"]).strip(),
        rows=rows,
        tables=_tables(suite["tables"], rows, source),
        overrides=suite["overrides"] or {},
        sample_rows=_ids(samples["rows"], rows, f"{source}: samples: rows"),
        sample_images=4 if samples["images"] is None else samples["images"],
        source=source,
    )


# ------------------------------------------------------------ values


def _plain_text(most: int) -> Value:
    return Value(
        f"text or a number of at most {most} characters",
        lambda v: v is None or (isinstance(v, (str, int, float)) and len(str(v)) <= most),
    )


_ID = re.compile(r"[A-Za-z0-9][\w.+*-]*(/[A-Za-z0-9][\w.+*-]*)*")


def _is_id(value: Any) -> bool:
    """Of a row: also a folder below that of the results."""
    if not isinstance(value, (str, int, float)) or not _ID.fullmatch(text := str(value)):
        return False
    return len(text) <= 200 and max(map(len, text.split("/"))) <= 100


def _are_seeds(value: Any) -> bool:
    seeds = value if isinstance(value, list) else [value]
    good = all(isinstance(s, int) and not isinstance(s, bool) and 0 <= s < 2**63 for s in seeds)
    count = len(seeds) if isinstance(value, list) else value
    return good and 1 <= count <= MAX_SEEDS and len(set(seeds)) == len(seeds)


def _mapping(values: Check = ANYTHING) -> Value:
    """Keys and values, none where nothing is written; each value of one kind."""

    def inside(value: Any, where: str) -> None:
        for key, item in (value or {}).items():
            values(item, f"{where}: {one_line(key)}")

    return Value("keys and values", lambda v: v is None or isinstance(v, Mapping), inside)


def _listed(what: str, most: int) -> Value:
    return Value(f"a list of 1 to {most} {what}", lambda v: v is None or (isinstance(v, list) and 1 <= len(v) <= most))


_TEXT, _NOTE, _PATH = _plain_text(1000), _plain_text(20_000), _plain_text(4096)
_NAMES = Value(
    "a name or a list of names",
    lambda v: isinstance(v, (str, list, tuple)) or v is None,
    lambda v, where: items(_TEXT, 0, 1000)([v] if isinstance(v, str) else v or [], where),
)
_KEYS = _mapping(Value("a value; write SECTION.KEY: value", lambda v: not isinstance(v, Mapping)))
_ROWS = _listed("rows", MAX_ROWS)
_SUITE: dict[str, Check] = {
    "name": Value(
        "of letters, digits and . _ + -, at most 100", lambda v: v is None or (_is_id(v) and "/" not in str(v))
    ),
    "title": _TEXT,
    "note": _NOTE,
    "defaults": _mapping(),
    "overrides": _KEYS,
    "rows": _ROWS,
    "tables": _listed("tables", 100),
    "samples": _mapping(),
}
_DEFAULTS: dict[str, Check] = {DETECT: _mapping(), PRETRAIN: _mapping(), "seeds": ANYTHING}
_SAMPLES: dict[str, Check] = {"rows": _NAMES, "images": optional(integer(0, 1000))}
_ROW: dict[str, Check] = {
    "id": Value("of letters, digits and . _ + * -, with / between parts of at most 100", _is_id),
    "kind": optional(one_of(DETECT, PRETRAIN)),
    "title": _TEXT,
    "each": _mapping(Value("a list of values", lambda v: isinstance(v, list) and bool(v))),
    "seeds": Value(
        f"a number of runs (at most {MAX_SEEDS}) or a list of different whole numbers >= 0",
        lambda v: v is None or _are_seeds(v),
    ),
    "baseline": _TEXT,
    "labels": _mapping(_TEXT),
    "reference": _NAMES,
    "expected": _mapping(),
    "note": _NOTE,
    "optional": optional(FLAG),
}
_DETECT: dict[str, Check] = {**_ROW, "config": _TEXT, "overrides": _KEYS, "weights": _PATH, "data": _mapping(_PATH)}
#: Fields of the settings; output folder and seed belong to the runner.
_SETTINGS = [f.name for f in dataclasses.fields(Settings) if f.name not in ("output", "seed")]
_PRETRAIN: dict[str, Check] = {**_ROW, **dict.fromkeys(_SETTINGS, ANYTHING)}
_DATA = ("train_json", "train_images", "val_json", "val_images")
_EXPECTED: dict[str, Check] = {
    "source": _TEXT,
    **{name: optional(number(-1e9, 1e9)) for name, column in COLUMNS.items() if column.what != SIZE},
}
_TABLE: dict[str, Check] = {
    "title": _TEXT,
    "rows": _NAMES,
    "labels": _NAMES,
    "columns": optional(items(one_of(*COLUMNS), 0, 100)),
    "reference": optional(one_of(*SOURCES)),
    "note": _NOTE,
    "grid": _mapping(_TEXT),
}
_GRID: dict[str, Check] = {"rows": _TEXT, "columns": _TEXT, "value": one_of(*COLUMNS)}


def _checked(content: Any, keys: Mapping[str, Check], where: str) -> dict[str, Any]:
    """The value of each key, None for those that are not written.

    Raises:
        SuiteError: no keys and values, an unknown key, or a value that cannot be used.
    """
    if not isinstance(content, Mapping | None):
        raise SuiteError(where, f"is {shown(content)}; it must be keys and values")
    content = {str(key): value for key, value in (content or {}).items()}
    for key, value in content.items():
        if key not in keys:
            hint = did_you_mean(key, keys) or f"; it takes {', '.join(keys)}"
            raise SuiteError(f"{where}:", f"unknown key {one_line(key)}{hint}")
        try:
            keys[key](value, f"{where}: {key}")
        except InvalidValue as error:
            raise SuiteError(error.where, error.problem) from None
    return {**dict.fromkeys(keys), **content}


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _names(value: Any) -> tuple[str, ...]:
    return tuple(map(str, [value] if isinstance(value, str) else value or ()))


# ------------------------------------------------------------ rows


def _expanded(written: Sequence[Any], source: str) -> Iterable[Mapping[str, Any]]:
    """Every row with ``each`` once per combination of its values, ``{name}`` replaced in all its texts."""
    filler = _Filler(source)
    rows = 0
    for number_, entry in enumerate(written, 1):
        where = f"{source}: row {number_}"
        if not isinstance(entry, Mapping):
            raise SuiteError(where, f"is {shown(entry)}; it must be keys and values")
        each = _checked({"each": entry.get("each")}, {"each": _ROW["each"]}, where)["each"] or {}
        rows += math.prod(map(len, each.values()))
        if rows > MAX_ROWS:
            raise SuiteError(f"{where}: each", f"makes more than {MAX_ROWS} rows")
        plain = {key: value for key, value in entry.items() if key != "each"}
        for combination in itertools.product(*each.values()):
            together: dict[str, Any] = {}
            for name, value in zip(each, combination):
                together |= value if isinstance(value, Mapping) else {name: value}  # several that go together
            yield filler.fill(plain, together)


class _Filler:
    """Writes values in the place of ``{name}``, up to a limit: a few lines could otherwise make gigabytes."""

    def __init__(self, source: str):
        self.where, self.left = f"{source}: rows: each", _MAX_WRITTEN

    def fill(self, value: Any, values: Mapping[str, Any]) -> Any:
        self._spend(1)
        if isinstance(value, Mapping):
            return {self._fill_text(str(k), values): self.fill(v, values) for k, v in value.items()}
        if isinstance(value, list):
            return [self.fill(item, values) for item in value]
        if not isinstance(value, str):
            return value
        whole = re.fullmatch(r"\{(\w+)\}", value)
        if whole and whole[1] in values:
            return self.fill(values[whole[1]], {})  # a number stays one
        return self._fill_text(value, values)

    def _fill_text(self, text: str, values: Mapping[str, Any]) -> str:
        for name, value in values.items():
            place = f"{{{name}}}"
            if place in text:
                if not isinstance(value, (str, int, float)):
                    raise SuiteError(f"{self.where}: {one_line(name)}", "inside a text must be text or a number")
                self._spend(text.count(place) * len(str(value)))
                text = text.replace(place, str(value))
        self._spend(len(text))
        return text

    def _spend(self, amount: int) -> None:
        self.left -= amount
        if self.left < 0:
            raise SuiteError(self.where, f"writes more than {_MAX_WRITTEN} values and characters")


def _row(entry: Mapping[str, Any], defaults: Mapping[str, Any], source: str) -> Row:
    identity = entry.get("id", "")
    where = f"{source}: row {shown(identity)}"
    kind = entry.get("kind", DETECT)
    common = (defaults.get(kind) if isinstance(kind, str) else None) or {}
    merged = {**common, **entry, "id": identity}
    for key in ("overrides", "labels"):
        if isinstance(common.get(key), Mapping) and isinstance(entry.get(key), Mapping):
            merged[key] = {**common[key], **entry[key]}
    row = _checked(merged, _DETECT if kind != PRETRAIN else _PRETRAIN, where)
    name, seeds = str(identity), row["seeds"] or _checked({"seeds": defaults["seeds"]}, _ROW, where)["seeds"] or 1
    if kind == DETECT and not row["config"]:
        raise SuiteError(f"{where}: config", "is missing; name a .yaml file or a shipped config (gn-det configs)")
    own_data = row["data"] if kind == DETECT else None
    data = _checked(own_data, dict.fromkeys(_DATA, _PATH), f"{where}: data")
    lacking = [key for key in _DATA if not data[key]]
    if lacking and len(lacking) < len(_DATA):
        raise SuiteError(f"{where}: data", f"lacks {', '.join(lacking)}; without a validation set there is no AP")
    return Row(
        id=name,
        kind=kind,
        title=_text(row["title"]) or name,
        config=_text(row.get("config")),
        overrides=row.get("overrides") or {},
        weights=None if row.get("weights") is None else str(row["weights"]),
        data={} if lacking else {key: str(value) for key, value in data.items()},
        settings={k: v for k, v in merged.items() if k not in _ROW} if kind == PRETRAIN else {},
        seeds=tuple(seeds) if isinstance(seeds, list) else tuple(range(1, seeds + 1)),
        baseline=None if _text(row["baseline"]) in ("", name) else str(row["baseline"]),
        labels={str(key): _text(value) for key, value in (row["labels"] or {}).items()},
        references=(*_expected(row["expected"], name, where), *_published(row["reference"], where)),
        note=_text(row["note"]),
        optional=bool(row["optional"]),
    )


def _expected(value: Any, row: str, where: str) -> Iterable[Reference]:
    """What a row itself says that should come out: ``{box_ap: 40.3, source: "Table 6"}``."""
    if not value:
        return
    found = {key: item for key, item in _checked(value, _EXPECTED, f"{where}: expected").items() if item is not None}
    source = _text(found.pop("source", "")).strip()
    if not source or not found:
        raise SuiteError(f"{where}: expected", "needs a source, and a number for box_ap, mask_ap or another column")
    yield Reference(f"expected of {row}", EXPECTED, source, source, {key: float(item) for key, item in found.items()})


def _published(value: Any, where: str) -> Iterable[Reference]:
    known, _ = load_references()
    for name in _names(value):
        if name not in known:
            raise SuiteError(f"{where}: reference:", f"no published row {shown(name)}{did_you_mean(name, known)}")
        yield known[name]


def _check_ids(rows: Sequence[Row], source: str) -> None:
    kinds: dict[str, str] = {}
    for row in rows:
        if row.id in kinds:
            raise SuiteError(f"{source}: row '{row.id}':", "duplicate id; give every row its own")
        kinds[row.id] = row.kind
    for row in rows:
        where = f"{source}: row '{row.id}': baseline:"
        if row.baseline is not None and row.baseline not in kinds:
            raise SuiteError(where, f"no row {shown(row.baseline)}{did_you_mean(row.baseline, kinds)}")
        if row.baseline is not None and kinds[row.baseline] != row.kind:
            raise SuiteError(where, f"'{row.baseline}' is a {kinds[row.baseline]} row, not {row.kind}")


# ------------------------------------------------------------ tables


def _tables(value: Any, rows: Sequence[Row], source: str) -> tuple[Table, ...]:
    """Those written, or one of all rows of each kind."""
    if value is None:
        headings = {DETECT: "Detection", PRETRAIN: "Classification"}
        of_kind = {kind: tuple(row.id for row in rows if row.kind == kind) for kind in headings}
        return tuple(Table(headings[kind], ids) for kind, ids in of_kind.items() if ids)
    return tuple(_table(entry, rows, number_, f"{source}: table {number_}") for number_, entry in enumerate(value, 1))


def _table(entry: Any, rows: Sequence[Row], number_: int, where: str) -> Table:
    table = _checked(entry, _TABLE, where)
    ids = _ids(table["rows"], rows, f"{where}: rows")
    if not ids:
        raise SuiteError(f"{where}: rows", "is missing; name the ids of its rows")
    mine = [row for row in rows if row.id in ids]
    if len({row.kind for row in mine}) > 1:
        raise SuiteError(f"{where}: rows", f"mixes {DETECT} and {PRETRAIN} rows; make two tables")
    grid = None
    if table["grid"]:
        axes = _checked(table["grid"], _GRID, f"{where}: grid")
        for key in _GRID:
            lacking = next((row.id for row in mine if key != "value" and axes[key] not in row.labels), None)
            if not axes[key] or lacking is not None:
                problem = "is missing" if not axes[key] else f"row '{lacking}' has no label {shown(axes[key])}"
                raise SuiteError(f"{where}: grid: {key}", problem)
        grid = Grid(**axes)
    return Table(
        title=_text(table["title"]) or f"Table {number_}",
        rows=ids,
        labels=_names(table["labels"]),
        columns=_names(table["columns"]),
        reference=_text(table["reference"]),
        note=_text(table["note"]),
        grid=grid,
    )


def _ids(value: Any, rows: Sequence[Row], where: str) -> tuple[str, ...]:
    """Ids of rows; ``*`` stands for any text."""
    known = [row.id for row in rows]
    out: list[str] = []
    for pattern in _names(value):
        found = matching(pattern, known)
        if not found:
            raise SuiteError(f"{where}:", f"no row {shown(pattern)}{did_you_mean(pattern, known)}")
        out += found
    return tuple(dict.fromkeys(out))


def matching(pattern: str, ids: Sequence[str]) -> list[str]:
    """Ids that are the pattern, or match its ``*`` where no id is the pattern."""
    return [pattern] if pattern in ids else fnmatch.filter(ids, pattern) if "*" in pattern else []


# ------------------------------------------------------------ which suite


def own_suite(configs: Sequence[str], data: Mapping[str, str]) -> Suite:
    """A suite of one row per config on own data, the first being the baseline of the others."""
    ids: list[str] = []
    for config in configs:
        base = re.sub(r"[^\w.+-]", "_", Path(config).stem).lstrip("._-+") or "config"
        names = itertools.chain([base], (f"{base}_{count}" for count in itertools.count(2)))
        ids.append(next(name for name in names if name not in ids))
    own = {"data": dict(data)} if data else {}
    rows = [{"id": name, "config": config, "baseline": ids[0], **own} for name, config in zip(ids, configs)]
    return parse_suite({"name": "own", "title": f"Comparison of {', '.join(ids)}", "rows": rows}, "--configs")


def shipped_suites() -> list[str]:
    """Names of the suites that ship with gn_det."""
    return sorted(path.name for path in _experiments().glob("*.yaml"))


def find_suite(name: str) -> Path:
    """A path where a file is there, otherwise the shipped suite of that name.

    Raises:
        ConfigError: neither.
    """
    path = Path(os.path.expanduser(name))
    if os.path.isfile(path):
        return path
    shipped = _experiments() / (path.name if path.suffix in (".yaml", ".yml") else f"{path.name}.yaml")
    if os.path.isfile(shipped) and len(path.parts) == 1 + (path.parts[0] == "experiments"):
        return shipped
    names = ", ".join(shipped_suites())
    raise ConfigError(f"suite {shown(name)} is neither a file nor shipped; shipped suites are {names}")


def _experiments() -> Path:
    """Inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "experiments"
    return inside if inside.is_dir() else package.parent / "experiments"
