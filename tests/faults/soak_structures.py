"""Hostile YAML structures through every reader of YAML: read, or refused in one printable line, in bounded time.

Unlike the mutations of ``soak_yaml`` these are built: nesting, aliases, tags, formulas, endless numbers and names,
graphs of ``_BASE_`` and suites whose ``each`` multiplies. A config that is accepted must survive being stored.
"""

from __future__ import annotations

import functools
import os
import random
import resource
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from tests.faults.soak_case import Case, run_mutations, watch_mutations

HANG_SECONDS = 30.0
#: Bytes that a piece may take beyond what the process has.
MEMORY = 1 << 30

ATOMS = [
    "0", "-1", "7", "0.5", "1e9", "1.5e+300", ".inf", "-.inf", ".nan", "true", "null", "~", "''", "x", "GN", "on",
    "0x_", "0b2", "1:30", "9:9:9:9.5", "2020-01-01", "=", "<<", "'<<'", "*a", "*nobody", "&a", "&a 1", "!", "!!int x",
    "!!float ''", "!!bool 1", "!!binary aGk=", "!!set {a, b}", "!!omap [a: 1]", "!!timestamp 2020-01-01", "!local x",
    "!!python/name:os.system", "!!python/object/apply:os.system ['true']", "!!python/tuple [1]", "!<x> y", "%YAML 1.1",
    '"\\0"', '"\\e[31m"', '"\\ud800"', '"\\udcff"', '"\\U99999999"', '"\\u202e"', "'a\tb'", "\x1b", "\x7f", "\x85",
    "\u2028", "é", "名前", "../../x", "/dev/zero", "~/x", "http://x/y.yaml", "[]", "{}", "[,]", "{,}", "- 1", "? 1",
    "#", "`", "@", "(1, 2)", "((1,), [2])", "(1", "1)", "'(1,'", "[None]", "[[1], 2]", "[a, 1]", "[true]", "'none'",
    "'1e999'", "'-' * 9",
]  # fmt: skip
FORMULAS = [
    "9**9**9", "2**64", "2**-64", "0**-1", "1/0", "(-1)**0.5", "[x for x in [1, 2]]", "[x for x in x]",
    "[[x, x * 2**(1.0/3)] for x in [32, 64]]", "[[y for y in [1]] for x in [1]]", "[x for x in [1] if x]", "[1] * 9",
    "__import__('os').system('true')", "x", "1 if 1 else 2", "lambda: 0", "'a'", "True", "(1, 2)", "1e308 * 10",
    "[x for x in range(9)]", "f(1)", "x.y", "[*[1]]", "1_000", "-" * 500 + "1", "(" * 300 + "1" + ")" * 300,
    "+".join("1" * 450), "1 << 9",
]  # fmt: skip


def structures(case: Case) -> None:
    """Config files, their bases, overrides, stored configs and suites, in turn."""
    wanted, piece = case.count(10_000, 40), 200
    run_mutations(case, "YAML structures", wanted, piece, MEMORY, partial(_piece, case.folder))
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    case.say("peak memory of a process", f"{peak / 1024:.0f} MB")


def _piece(folder: Path, start: int, count: int) -> dict[str, Any]:
    def one(number: int) -> Callable[[], str]:
        rng = random.Random(number)
        place = folder / f"s{start}"
        place.mkdir(exist_ok=True)
        return partial(_outcome, *_READERS[number % len(_READERS)](rng, place))

    return watch_mutations(range(start, start + count), HANG_SECONDS, one)


def _outcome(kind: str, read: Callable[[], str]) -> str:
    from gn_det.errors import ConfigError

    try:
        return f"{kind}: accepted" if not (wrong := read()) else f"OTHER: {kind}: {wrong}"
    except ConfigError as error:
        text = str(error)
    if not text.isprintable() or len(text) > 2000:
        return f"OTHER: {kind}: not one short printable line: {text[:60]!r}"
    return f"{kind}: refused in one line"


# ------------------------------------------------------------ structures


def hostile(rng: random.Random, depth: int = 0) -> str:
    """One YAML value, most often a hostile one."""
    kind = rng.random()
    many = rng.choice((3, 10, 31, 33, 100, 900, 5000))
    if kind < 0.35 or depth > 5:
        return rng.choice(ATOMS)
    if kind < 0.42:
        return rng.choice(("[", "{a: ", "[[1], ", "- ", "? ", "!!seq [")) * many + "1" + rng.choice(("]", "}")) * many
    if kind < 0.5:
        number = rng.choice(("9", "0x", "1_", "1:", "-", "0.", "1e", "0b1", ".")) + rng.choice("019f_:") * many
        return f"{number}{rng.choice(('', '.', '.5', 'e5'))}"
    if kind < 0.55:
        return rng.choice(("x", "é", "../", "a/", "'", '"', "(", "['a'],", "1,", "\\")) * many
    if kind < 0.6:
        return f'!!python/object/apply:eval ["{rng.choice(FORMULAS)}"]'
    if kind < 0.66:
        return f"&{rng.choice('ab')} {hostile(rng, depth + 1)}"
    if kind < 0.7:
        return "[" + ", ".join(["*a"] * many) + "]"
    items = [hostile(rng, depth + 1) for _ in range(rng.choice((0, 1, 2, 5)))]
    if kind < 0.85:
        return "[" + ", ".join(items) + "]"
    return "{" + ", ".join(f"{hostile(rng, depth + 2)}: {item}" for item in items) + "}"


def near(rng: random.Random, default: Any) -> str:
    """A value as a key could have it."""
    if isinstance(default, (list, tuple)):
        items = [near(rng, default[0] if default else "x") for _ in range(len(default) or rng.choice((0, 1, 3)))]
        return rng.choice((f"[{', '.join(items)}]", repr(f"({', '.join(items)},)"), items[0] if items else "[]"))
    if isinstance(default, bool):
        return rng.choice(("true", "False", "'true'", "1"))
    if isinstance(default, (int, float)):
        return str(
            rng.choice((default, default, default + 1, -default, default * 2, default / 2, f"'{default}'", "&a 1"))
        )
    return rng.choice((repr(str(default)), repr(str(default)), "x", "'名前'", '"\\udcff"', "1", "2020-01-01", "~"))


def bomb(rng: random.Random) -> str:
    """Keys in each of which the last one stands several times."""
    times, levels = rng.choice((2, 9, 40)), rng.choice((5, 20, 60))
    merge = rng.random() < 0.5
    lines = ["a0: &a0 " + ("{k: 1}" if merge else "[1, 1]")]
    for level in range(1, levels):
        several = "[" + ", ".join([f"*a{level - 1}"] * times) + "]"
        lines.append(f"a{level}: &a{level} " + (f"{{<<: {several}, k{level}: 1}}" if merge else several))
    return "\n".join(lines)


def flow(value: Any) -> str:
    """YAML of dicts and lists whose texts are YAML themselves."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {flow(item)}" for key, item in value.items()) + "}"
    return "[" + ", ".join(map(flow, value)) + "]" if isinstance(value, list) else str(value)


def _block(tree: dict[str, Any]) -> str:
    return "".join(f"{key}: {flow(value)}\n" for key, value in tree.items())


def _encoded(text: str, rng: random.Random) -> bytes:
    if rng.random() < 0.9:
        return text.encode("utf-8", "surrogatepass")
    codec = rng.choice(("utf-16", "utf-8-sig", "utf-32", "latin-1", "cp037"))
    return text.encode(codec, "replace") + rng.choice((b"", b"\0", b"\xff", b"\n---\nSEED: 1\n"))


def _config_text(rng: random.Random) -> str:
    """Real keys with hostile values, at times beside a key that nobody knows; or a structure alone."""
    kind = rng.random()
    if kind < 0.1:
        return hostile(rng)
    if kind < 0.2:
        return bomb(rng)
    tree: dict[str, Any] = {}
    for key in rng.sample(list(_defaults()), rng.choice((1, 1, 2, 4))):
        *sections, name = key.split(".")
        node = tree
        for section in sections:
            node = node.setdefault(section, {})
        node[name] = hostile(rng) if rng.random() < 0.3 else near(rng, _defaults()[key])
    if rng.random() < 0.1:
        tree[hostile(rng)] = hostile(rng)
    return _block(tree)


@functools.lru_cache
def _defaults() -> dict[str, Any]:
    from gn_det.config import get_cfg
    from gn_det.config.defaults import flatten

    return dict(flatten(get_cfg()))


# ------------------------------------------------------------ readers


def _kept(cfg: Any) -> str:
    """What is lost when the config is stored and read again, "" for nothing."""
    from gn_det.config import dump_config, parse_config

    text = dump_config(cfg)
    return "" if dump_config(parse_config(text, "stored")) == text else "stored and read it is another config"


def _config(rng: random.Random, folder: Path) -> tuple[str, Callable[[], str]]:
    from gn_det.config import load_config

    path = folder / "c.yaml"
    path.write_bytes(_encoded(_config_text(rng), rng))
    return "config", lambda: _kept(load_config(str(path)))


def _stored(rng: random.Random, folder: Path) -> tuple[str, Callable[[], str]]:
    from gn_det.config import parse_config

    text = _config_text(rng)
    return "stored config", lambda: _kept(parse_config(text, "model.pth"))


def _bases(rng: random.Random, folder: Path) -> tuple[str, Callable[[], str]]:
    """Files that name each other: chains, diamonds, circles, links, pipes, and hostile names."""
    from gn_det.config import load_config

    place = folder / f"bases{rng.random()}"
    place.mkdir()
    (place / "sub").symlink_to(place)
    os.mkfifo(place / "pipe.yaml")
    count = rng.choice((2, 3, 5, 10, 30) if rng.random() < 0.95 else (105,))
    others = ["pipe.yaml", "sub", "/dev/zero", "~", "''", "Base-RCNN-FPN-GN.yaml", "x" * 5000, "https://x/c.yaml"]
    down = rng.random() < 0.7
    for number in range(count):
        names = [rng.randint(number + 1, min(number + 2, count)) if down else rng.randrange(count) for _ in range(2)]
        bases = [f"{rng.choice(('', '', 'sub/', './'))}{name}.yaml" for name in names]
        if rng.random() < 0.02:
            bases.append(rng.choice((*others, hostile(rng, 4))))
        written = "" if number == count - 1 else f"_BASE_: {flow(rng.choice((bases, bases[0])))}\n"
        (place / f"{number}.yaml").write_bytes(
            f"{written}SOLVER: {{MAX_ITER: {number + 1}}}\n".encode("utf-8", "replace")
        )
    (place / f"{count}.yaml").write_text("SEED: 3\n")

    def read() -> str:
        cfg = load_config(str(place / "0.yaml"))
        return "" if cfg.SOLVER.MAX_ITER == 1 else "a base wins over the file"

    return "bases", read


def _overrides(rng: random.Random, folder: Path) -> tuple[str, Callable[[], str]]:
    from gn_det.config import load_config

    words = []
    for key in rng.sample(list(_defaults()), rng.choice((1, 2))):
        value = hostile(rng) if rng.random() < 0.5 else near(rng, _defaults()[key])
        words += [key if rng.random() < 0.95 else hostile(rng), value]
    return "overrides", lambda: _kept(load_config("quickstart.yaml", words))


def _suite(rng: random.Random, folder: Path) -> tuple[str, Callable[[], str]]:
    from gn_det.compare.suite import load_suite

    detect: dict[str, Any] = {
        "id": "'a{x}_{y}{z}'",
        "config": "quickstart.yaml",
        "overrides": {"SEED": "1"},
        "seeds": "2",
    }
    detect["each"] = {
        f"{name}": [str(i) for i in range(rng.choice((1, 1, 2, 30)))] for name in "xyz"[: rng.randint(1, 3)]
    }
    pretrain = {"id": "p", "kind": "pretrain", "arch": "resnet8", "norm": "GN", "data": "digits", "labels": {"n": "GN"}}
    suite: dict[str, Any] = {"name": "case", "title": "t", "rows": [detect, pretrain], "samples": {"images": "2"}}
    suite["tables"] = [{"rows": ["'a*'"]}, {"rows": ["p"], "columns": ["top1_error"]}]
    for _ in range(rng.choice((1, 1, 2))):
        node: Any = suite
        while True:
            key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
            if not isinstance(node[key], (dict, list)) or not node[key] or rng.random() < 0.2:
                break
            node = node[key]
        if rng.random() < 0.1:
            break
        if isinstance(node, list) and rng.random() < 0.3:
            node *= rng.choice((2, 300, 3000))
        else:
            node[key] = hostile(rng) if rng.random() < 0.8 else "'" + "{x}" * rng.choice((1, 5000)) + "'"
    path = folder / "suite.yaml"
    path.write_bytes(_encoded(bomb(rng) if rng.random() < 0.05 else _block(suite), rng))

    def read() -> str:
        suite = load_suite(path)
        root = folder / "out"
        names = [suite.name, *(row.id for row in suite.rows)]
        return "" if all((root / name).resolve().parent.is_relative_to(root) for name in names) else "leaves its folder"

    return "suite", read


_READERS = (_config, _stored, _bases, _overrides, _suite)
