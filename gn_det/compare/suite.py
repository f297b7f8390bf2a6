"""Parse a suite from YAML; errors name unknown keys, missing rows and duplicate ids.

``docs/compare.md`` describes the keys. Configs and data are not checked here.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import itertools
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gn_det.classification import Settings
from gn_det.compare.columns import COLUMNS, EXPECTED, SIZE, SOURCES, Reference, load_references
from gn_det.config.reader import read_yaml
from gn_det.errors import ConfigError
from gn_det.files import shipped_folder
from gn_det.text import did_you_mean, one_line, shown, some
from gn_det.values import ANYTHING, FLAG, Check, InvalidValue, Value, integer, items, number, one_of

DETECT, PRETRAIN = "detect", "pretrain"
#: Most rows per suite, seeds per row, folds, and values and characters that ``each`` may produce.
MAX_ROWS, MAX_SEEDS, MAX_FOLDS, _MAX_WRITTEN = 500, 1000, 100, 2_000_000

# ------------------------------------------------------------ values


def _plain_text(most: int) -> Value:
    expected = f"text or a number of at most {most} characters"
    return Value(expected, lambda v: isinstance(v, (str, int, float)) and len(str(v)) <= most)


def _mapping(values: Check = ANYTHING, keys: Mapping[str, Check] | None = None) -> Value:
    """Check a mapping: values of one kind, or known ``keys``, for which an empty value counts as absent."""

    def inside(content: Any, where: str) -> None:
        for key, value in content.items():
            if keys is not None and key not in keys:
                hint = did_you_mean(str(key), keys) or f"; it takes {', '.join(keys)}"
                raise InvalidValue(f"{where}:", f"unknown key {one_line(key)}{hint}")
            if keys is None or value is not None:
                (values if keys is None else keys[key])(value, f"{where}: {one_line(key)}")

    return Value("keys and values", lambda v: isinstance(v, Mapping), inside)


def _is_id(value: Any, parts: int = 100) -> bool:
    """Return whether a row id is valid, also as a folder name."""
    if not isinstance(value, (str, int, float)) or len(text := str(value)) > 200:
        return False
    names = text.split("/")
    return len(names) <= parts and all(re.fullmatch(r"[A-Za-z0-9][\w.+*-]{0,99}", name) for name in names)


def _are_seeds(value: Any) -> bool:
    seeds = value if isinstance(value, list) else [value]
    good = all(isinstance(s, int) and not isinstance(s, bool) and 0 <= s < 2**63 for s in seeds)
    count = len(seeds) if isinstance(value, list) else value
    return good and 1 <= count <= MAX_SEEDS and len(set(seeds)) == len(seeds)


def _names(value: Any) -> tuple[str, ...]:
    return tuple(map(str, [value] if isinstance(value, str) else value))


_TEXT, _NOTE, _PATH = _plain_text(1000), _plain_text(20_000), _plain_text(4096)
_NAMES = Value(
    "a name or a list of names",
    lambda v: isinstance(v, (str, list, tuple)),
    lambda v, where: items(_TEXT, 0, 1000)([v] if isinstance(v, str) else v, where),
)
_SEEDS = Value(f"a number of runs (at most {MAX_SEEDS}) or a list of distinct integers >= 0", _are_seeds)
_OVERRIDES = _mapping(Value("a value; write SECTION.KEY: value", lambda v: not isinstance(v, Mapping)))
_DATA = ("train_json", "train_images", "val_json", "val_images")
_EXPECTED = {name: number(-1e9, 1e9) for name, column in COLUMNS.items() if column.what != SIZE}
#: Fields of the settings; the runner sets output folder and seed.
_SETTINGS = [f.name for f in dataclasses.fields(Settings) if f.name not in ("output", "seed")]


def _key(check: Check, default: Any, read: Callable[[Any], Any] = lambda value: value) -> Any:
    """Declare a field for a key of the file, with its check and conversion."""
    start: dict[str, Any] = {"default_factory": dict} if default == {} else {"default": default}
    return field(**start, metadata={"check": check, "read": read})


def _checks(kind: type) -> dict[str, Check]:
    return {f.name: f.metadata["check"] for f in dataclasses.fields(kind) if f.metadata}


def _made(kind: Any, content: Mapping[str, Any], **given: Any) -> Any:
    """Build a dataclass from checked content, whose keys take precedence over ``given``."""
    known = {f.name: f.metadata["read"] for f in dataclasses.fields(kind) if f.metadata}
    read = {name: known[name](content[name]) for name in known if content.get(name) is not None}
    return kind(**{**given, **read})


@dataclass(frozen=True)
class Row:
    """A training and its seeds. ``weights`` None keeps the config's; ``settings`` are those of a pre-training."""

    id: str = _key(Value("of letters, digits and . _ + * -, with / between parts of at most 100", _is_id), "", str)
    kind: str = _key(one_of(DETECT, PRETRAIN), DETECT)
    title: str = _key(_TEXT, "", str)
    seeds: tuple[int, ...] = _key(_SEEDS, (1,), lambda v: tuple(v if isinstance(v, list) else range(1, v + 1)))
    baseline: str | None = _key(_TEXT, None, str)
    labels: Mapping[str, str] = _key(_mapping(_TEXT), {}, lambda v: {str(k): str(text) for k, text in v.items()})
    reference: tuple[str, ...] = _key(_NAMES, (), _names)
    expected: Mapping[str, Any] = _key(_mapping(keys={"source": _TEXT, **_EXPECTED}), {})
    note: str = _key(_NOTE, "", str)
    optional: bool = _key(FLAG, False)
    config: str = _key(_TEXT, "", str)
    overrides: Mapping[str, Any] = _key(_OVERRIDES, {})
    weights: str | None = _key(_PATH, None, str)
    data: Mapping[str, str] = _key(_mapping(keys=dict.fromkeys(_DATA, _PATH)), {})
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def references(self) -> list[Reference]:
        """Return reference results: those expected by the suite, then published rows."""
        known, _ = load_references()
        values = {column: float(value) for column, value in self.expected.items() if column != "source"}
        source = str(self.expected.get("source"))
        expected = Reference(f"expected of {self.id}", EXPECTED, source, source, values)
        return [*([expected] if values else []), *(known[name] for name in self.reference)]


_OF_DETECTION = ("config", "overrides", "weights", "data")


@dataclass(frozen=True)
class Grid:
    """A table of one number over two labels, like the paper's Table 2: ``value`` by ``rows`` and ``columns``."""

    rows: str = _key(_TEXT, "", str)
    columns: str = _key(_TEXT, "", str)
    value: str = _key(one_of(*COLUMNS), "")


@dataclass(frozen=True)
class Table:
    """Rows shown together; by default with the columns of their kind, and their titles as labels."""

    title: str = _key(_TEXT, "", str)
    rows: tuple[str, ...] = _key(_NAMES, (), _names)
    labels: tuple[str, ...] = _key(_NAMES, (), _names)
    columns: tuple[str, ...] = _key(items(one_of(*COLUMNS), 0, 100), (), tuple)
    reference: str = _key(one_of(*SOURCES), "")
    note: str = _key(_NOTE, "", str)
    grid: Grid | None = None


@dataclass(frozen=True)
class Suite:
    """A comparison and its path. Without ``sample_rows``, the report chooses."""

    name: str = _key(Value("of letters, digits and . _ + -, at most 100", lambda v: _is_id(v, parts=1)), "", str)
    title: str = _key(_TEXT, "", str)
    note: str = _key(_NOTE, "", lambda v: str(v).strip())
    overrides: Mapping[str, Any] = _key(_OVERRIDES, {})
    folds: int = 0  # of own data; run k of a row trains without fold k, with seed k
    rows: tuple[Row, ...] = ()
    tables: tuple[Table, ...] = ()
    sample_rows: tuple[str, ...] = ()
    sample_images: int = 4
    source: str = ""


_SUITE = _mapping(
    keys={
        **_checks(Suite),
        "defaults": _mapping(keys={DETECT: _mapping(), PRETRAIN: _mapping(), "seeds": _SEEDS}),
        "rows": Value(f"a list of 1 to {MAX_ROWS} rows", lambda v: isinstance(v, list) and 0 < len(v) <= MAX_ROWS),
        "tables": Value("a list of 1 to 100 tables", lambda v: isinstance(v, list) and 0 < len(v) <= 100),
        "samples": _mapping(keys={"rows": _NAMES, "images": integer(0, 1000)}),
    }
)


def load_suite(path: Path) -> Suite:
    """Read a suite file; ConfigError is one line with file, row and key of the first error."""
    return parse_suite(read_yaml(path, "suite"), one_line(str(path), 300))


def parse_suite(content: Mapping[str, Any], source: str) -> Suite:
    """Build a suite from its YAML content; see :func:`load_suite`."""
    try:
        _SUITE(content, source)
        if content.get("rows") is None:
            raise InvalidValue(f"{source}: rows", f"is missing; give a list of 1 to {MAX_ROWS} rows")
        defaults, samples = content.get("defaults") or {}, content.get("samples") or {}
        rows = tuple(_row(entry, defaults, source) for entry in _expanded(content["rows"], source))
        _check_ids(rows, source)
        name, images = Path(source).stem, samples.get("images")
        parts: dict[str, Any] = {
            "title": str(content.get("name") or name),
            "rows": rows,
            "tables": _tables(content.get("tables"), rows, source),
            "sample_rows": row_ids(_names(samples.get("rows") or ()), rows, f"{source}: samples: rows"),
            "sample_images": 4 if images is None else images,
        }
    except InvalidValue as error:
        raise ConfigError(str(error)) from None
    suite: Suite = _made(Suite, content, name=name, source=source, **parts)
    return suite


# ------------------------------------------------------------ rows


def _expanded(written: Sequence[Any], source: str) -> Iterable[Mapping[str, Any]]:
    """Expand rows with ``each`` to one per combination of values, replacing ``{name}`` in all texts."""
    fill = _filler(f"{source}: rows: each")
    rows = 0
    for place, entry in enumerate(written, 1):
        where = f"{source}: row {place}"
        _mapping()(entry, where)
        each = entry.get("each") or {}
        _mapping(Value("a list of values", lambda v: isinstance(v, list) and bool(v)))(each, f"{where}: each")
        rows += math.prod(map(len, each.values()))
        if rows > MAX_ROWS:
            raise InvalidValue(f"{where}: each", f"makes more than {MAX_ROWS} rows")
        plain = {key: value for key, value in entry.items() if key != "each"}
        for combination in itertools.product(*each.values()):
            # A mapping holds several keys that vary together.
            parts = (v if isinstance(v, Mapping) else {name: v} for name, v in zip(each, combination))
            yield fill(plain, {key: value for part in parts for key, value in part.items()})


def _filler(where: str) -> Callable[[Any, Mapping[str, Any]], Any]:
    """Return a function that replaces ``{name}``, with a limit, because a few lines could produce gigabytes."""
    left = _MAX_WRITTEN

    def spend(amount: int) -> None:
        nonlocal left
        left -= amount
        if left < 0:
            raise InvalidValue(where, f"writes more than {_MAX_WRITTEN} values and characters")

    def fill_text(text: str, values: Mapping[str, Any]) -> str:
        for name, value in values.items():
            if (place := f"{{{name}}}") in text:
                if not isinstance(value, (str, int, float)):
                    raise InvalidValue(f"{where}: {one_line(name)}", "inside a text must be text or a number")
                spend(text.count(place) * len(str(value)))
                text = text.replace(place, str(value))
        spend(len(text))
        return text

    def fill(value: Any, values: Mapping[str, Any]) -> Any:
        spend(1)
        if isinstance(value, Mapping):
            return {fill_text(str(k), values): fill(v, values) for k, v in value.items()}
        if isinstance(value, list):
            return [fill(item, values) for item in value]
        if not isinstance(value, str):
            return value
        whole = re.fullmatch(r"\{(\w+)\}", value)
        if whole and whole[1] in values:
            return fill(values[whole[1]], {})  # keeps a number's type
        return fill_text(value, values)

    return fill


def _row(entry: Mapping[str, Any], defaults: Mapping[str, Any], source: str) -> Row:
    identity, kind = entry.get("id", ""), entry.get("kind", DETECT)
    where = f"{source}: row {shown(identity)}"
    common = (defaults.get(kind) if isinstance(kind, str) else None) or {}
    merged = {"seeds": defaults.get("seeds"), **common, **entry, "id": identity}
    for key in ("overrides", "labels"):
        if isinstance(common.get(key), Mapping) and isinstance(entry.get(key), Mapping):
            merged[key] = {**common[key], **entry[key]}
    settings = dict.fromkeys(_SETTINGS if kind == PRETRAIN else (), ANYTHING)
    checks = {key: check for key, check in _checks(Row).items() if not settings or key not in _OF_DETECTION}
    _mapping(keys={**checks, **settings})(merged, where)
    own = {key: value for key, value in merged.items() if key in settings}
    row: Row = _made(Row, {key: merged.get(key) for key in checks}, title=str(identity), settings=own)
    if row.kind == DETECT and not row.config:
        raise InvalidValue(f"{where}: config", "is missing; name a .yaml file or a shipped config (gn-det configs)")
    if row.data and (lacking := [key for key in _DATA if not row.data.get(key)]):
        raise InvalidValue(f"{where}: data", f"lacks {', '.join(lacking)}; without a validation set there is no AP")
    if row.expected and (not str(row.expected.get("source") or "").strip() or len(row.expected) == 1):
        raise InvalidValue(f"{where}: expected", "needs a source, and a number for box_ap, mask_ap or another column")
    for name in row.reference:
        if name not in (known := load_references()[0]):
            raise InvalidValue(f"{where}: reference:", f"no published row {shown(name)}{did_you_mean(name, known)}")
    return dataclasses.replace(row, baseline=None) if row.baseline in ("", row.id) else row


def _check_ids(rows: Sequence[Row], source: str) -> None:
    kinds: dict[str, str] = {}
    for row in rows:
        if row.id in kinds:
            raise InvalidValue(f"{source}: row '{row.id}':", "duplicate id; give every row its own")
        kinds[row.id] = row.kind
    for row in rows:
        if row.baseline is not None and kinds.get(row.baseline) != row.kind:
            hint = did_you_mean(row.baseline, [name for name in kinds if kinds[name] == row.kind])
            problem = f"no row {shown(row.baseline)} of kind {row.kind}{hint}"
            raise InvalidValue(f"{source}: row '{row.id}': baseline:", problem)


# ------------------------------------------------------------ tables


def _tables(value: Any, rows: Sequence[Row], source: str) -> tuple[Table, ...]:
    """Return the tables of the suite, or by default one table per kind of row."""
    if value is None:
        headings = {"Detection": DETECT, "Classification": PRETRAIN}
        tables = (Table(text, tuple(row.id for row in rows if row.kind == kind)) for text, kind in headings.items())
        return tuple(table for table in tables if table.rows)
    return tuple(_table(entry, rows, i, f"{source}: table {i}") for i, entry in enumerate(value, 1))


def _table(entry: Any, rows: Sequence[Row], place: int, where: str) -> Table:
    _mapping(keys={**_checks(Table), "grid": _mapping(keys=_checks(Grid))})(entry, where)
    grid = _made(Grid, entry["grid"]) if entry.get("grid") else None
    table: Table = _made(Table, entry, title=f"Table {place}", grid=grid)
    ids = row_ids(table.rows, rows, f"{where}: rows")
    if not ids:
        raise InvalidValue(f"{where}: rows", "is missing; name the ids of its rows")
    mine = [row for row in rows if row.id in ids]
    if len({row.kind for row in mine}) > 1:
        raise InvalidValue(f"{where}: rows", f"mixes {DETECT} and {PRETRAIN} rows; make two tables")
    for key, label in vars(grid).items() if grid else ():
        if not label:
            raise InvalidValue(f"{where}: grid: {key}", "is missing")
        lacking = next((row.id for row in mine if key != "value" and label not in row.labels), None)
        if lacking is not None:
            raise InvalidValue(f"{where}: grid: {key}:", f"row '{lacking}' has no label {shown(label)}")
    return dataclasses.replace(table, rows=ids)


def row_ids(patterns: Sequence[str], rows: Sequence[Row], where: str) -> tuple[str, ...]:
    """Return the ids equal to a pattern, or else those that match its ``*``; InvalidValue if there are none."""
    known = [row.id for row in rows]
    out: list[str] = []
    for pattern in patterns:
        found = [pattern] if pattern in known else fnmatch.filter(known, pattern) if "*" in pattern else []
        if not found:
            hint = did_you_mean(pattern, known) or f"; the rows are {some(known, 20)}"
            raise InvalidValue(f"{where}:", f"no row {shown(pattern)}{hint}")
        out += found
    return tuple(dict.fromkeys(out))


# ------------------------------------------------------------ which suite


def own_suite(configs: Sequence[str], data: Mapping[str, str], folds: int = 0) -> Suite:
    """Build a suite with one row per config on the user's data; the first row is the baseline.

    Args:
        folds: cross-validate: train each row that many times, each time without another part of the training images;
            raises ConfigError if it is out of range, or does not go with ``data``.
    """
    own: dict[str, Any] = {"data": dict(data)} if data else {}
    if folds:
        if not 2 <= folds <= MAX_FOLDS:
            raise ConfigError(f"--folds is {folds}; it must be from 2 to {MAX_FOLDS}")
        if set(data) != {"train_json", "train_images"}:
            raise ConfigError(
                "--folds divides the images of --train-json and --train-images; give both, and no --val-json"
            )
        own = {"seeds": folds, "overrides": {f"DATASETS.{key.upper()}": path for key, path in data.items()}}
    ids: list[str] = []
    for config in configs:
        base = re.sub(r"[^\w.+-]", "_", Path(config).stem).lstrip("._-+") or "config"
        names = itertools.chain([base], (f"{base}_{count}" for count in itertools.count(2)))
        ids.append(next(name for name in names if name not in ids))
    rows = [{"id": name, "config": config, "baseline": ids[0], **own} for name, config in zip(ids, configs)]
    suite = parse_suite({"name": "own", "title": f"Comparison of {', '.join(ids)}", "rows": rows}, "--configs")
    return dataclasses.replace(suite, folds=folds)


def shipped_suites() -> dict[str, Path]:
    """Return the shipped suites by file name."""
    return {path.name: path for path in sorted(shipped_folder("experiments").glob("*.yaml"))}


def find_suite(name: str) -> Path:
    """Return the path if the file exists, otherwise that of the shipped suite of this name, or raise ConfigError."""
    path, suites = Path(os.path.expanduser(name)), shipped_suites()
    if os.path.isfile(path):
        return path
    found = suites.get(path.name) or suites.get(f"{path.name}.yaml")
    if found is None or len(path.parts) > 1 + (path.parts[0] == "experiments"):
        raise ConfigError(f"suite {shown(name)} is neither a file nor shipped; shipped suites are {', '.join(suites)}")
    return found
