"""Random damage of a config: refused in one line, or every key is what YAML says and the run it describes is built.

What YAML says is asked of plain PyYAML. An accepted config is then resolved and its model built (``--dry-run``), under
a limit of memory; that must end well or in one line, too.
"""

from __future__ import annotations

import ast
import io
import random
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from tests.faults.soak_case import TINY, Case, limit, run_mutations, watch_mutations

WORDS = [
    "0", "1", "-1", "2", "0.5", "1e9", "1e11", "1e400", ".nan", ".inf", "true", "False", "null", "''", "x", "[]", "[1]",
    "{}",
    "(1, 2)", "[1, 2, 3]", '"GN"', "BN", "1_000", "0x10", "1:30", "2020-01-01", "~", "*a", "&a 1",
    "!!python/name:os.system",
    "!!binary aGVsbG8=", "99999999999999999999", "[[1], [2]]", "'1'", "é", "| \n  x", "0o17", "+1", "yes", "on", "NO",
]  # fmt: skip
HANG_SECONDS = 60.0


def mutations(case: Case) -> None:
    """Values, keys, lines and bytes of the quickstart's config, which has a base."""
    wanted, piece = case.count(1500, 20), 100
    original = _original(case.folder)
    with limit(HANG_SECONDS):
        name = _outcome(case.folder / "c.yaml")
    case.require(name.startswith("accepted"), f"the config as it is: {name}")
    run_mutations(case, "a YAML config", wanted, piece, 6 << 30, partial(_piece, original, case.folder))


def _original(folder: Path) -> str:
    """The whole config in one file, small; the base is a copy of the shipped one."""
    import shutil

    from gn_det.config import dump_config, load_config
    from gn_det.config.load import merge_overrides, shipped_config

    for path in shipped_config("quickstart.yaml").parent.glob("Base-*.yaml"):
        shutil.copy(path, folder)
    cfg = load_config("quickstart.yaml")
    merge_overrides(cfg, TINY)
    cfg.OUTPUT_DIR = str(folder / "out")
    cfg.SOLVER.NO_RESCALE = ()
    text = "_BASE_: Base-RCNN-FPN-GN.yaml\n" + dump_config(cfg, implemented_only=True)
    (folder / "c.yaml").write_text(text)
    return text


def _piece(original: str, folder: Path, start: int, count: int) -> dict[str, Any]:
    def one(number: int) -> Callable[[], str]:
        path = folder / f"c{start}.yaml"
        path.write_bytes(_mutated(original, random.Random(number)))
        return partial(_outcome, path)

    return watch_mutations(range(start, start + count), HANG_SECONDS, one)


def _mutated(text: str, rng: random.Random) -> bytes:
    lines = text.splitlines()
    for _ in range(rng.choice((1, 1, 1, 2))):
        at = rng.randrange(len(lines))
        kind = rng.random()
        if kind < 0.45 and ":" in lines[at]:
            lines[at] = lines[at].partition(":")[0] + ": " + rng.choice(WORDS)
        elif kind < 0.6 and ":" in lines[at]:
            key, _, value = lines[at].partition(":")
            lines[at] = f"{key}: {_near(value.strip(), rng)}"
        elif kind < 0.65:
            del lines[at]
        elif kind < 0.7:
            lines.insert(at, lines[rng.randrange(len(lines))])
        elif kind < 0.75:
            lines[at] = rng.choice(("  ", " ", "\t")) + lines[at]
        elif kind < 0.8:
            lines[at] = lines[at].strip()
        else:
            data = bytearray("\n".join(lines).encode())
            for _ in range(rng.randint(1, 2)):
                at = rng.randrange(len(data))
                if rng.random() < 0.5:
                    data[at] = rng.choice((*b"0123456789.-:[]{}#&*!|>'\"%@`, \n\t", rng.randrange(256)))
                else:
                    del data[at : at + rng.choice((1, 1, 5))]
            return bytes(data)
        if not lines:
            break
    return "\n".join(lines).encode()


def _near(value: str, rng: random.Random) -> str:
    """Another number or word of the same kind."""
    try:
        number = ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return rng.choice((value[:-1], value + "x", value.swapcase(), value))
    if isinstance(number, (int, float)) and not isinstance(number, bool):
        return str(rng.choice((number + 1, number - 1, -number, number * 2, number / 2, number * 100)))
    return rng.choice((value, value.replace("1", "2"), value.replace(",", " "), f"'{value}'"))


def _outcome(path: Path) -> str:
    from gn_det.config import load_config
    from gn_det.errors import ConfigError

    try:
        cfg = load_config(str(path))
    except ConfigError as error:
        return "refused in one line" if "\n" not in str(error) else f"OTHER: not one line: {str(error)[:60]!r}"
    wrong = _compare(cfg, path)
    if wrong:
        return f"OTHER: accepted a wrong value: {wrong}"
    code, printed = _dry_run(path)
    last = printed.strip().splitlines()[-1] if printed.strip() else ""
    if "Traceback" in printed:
        return "OTHER: --dry-run shows a trace"
    if code == 0:
        return "accepted, every key as YAML says, model built"
    if code == 2 and last.startswith("gn-det: error: "):
        return "read, then refused by --dry-run in one line"
    return f"OTHER: --dry-run ended with {code}: {last[:80]}"


def _dry_run(path: Path) -> tuple[int, str]:
    from gn_det.cli import main

    out = io.StringIO()
    with redirect_stdout(out), redirect_stderr(out):
        code = main(["train", "--config", str(path), "--engine", "embedded", "--dry-run"])
    return code, out.getvalue()


def _compare(cfg: Any, path: Path) -> str:
    """The first key of the config that is not what the files say, or that they do not name and is no default."""
    from gn_det.config import get_cfg

    expected = _flat(get_cfg())
    chain = [yaml.safe_load(path.read_text())]
    while chain[-1].get("_BASE_"):
        chain.append(yaml.safe_load((path.parent / chain[-1]["_BASE_"]).read_text()))
    for content in reversed(chain):
        expected.update(_flat({k: v for k, v in content.items() if k != "_BASE_"}))
    found = _flat(cfg)
    for key, value in found.items():
        if not _equal(value, expected[key]):
            return f"{key} {value!r}, the file says {expected[key]!r}"
    return "" if found.keys() == expected.keys() else "other keys"


def _equal(ours: Any, said: Any) -> bool:
    """Lists and tuples alike, a single value as a list of it, text of a Python value as that value."""
    if isinstance(ours, (list, tuple)):
        if isinstance(said, str):
            said = _value(said)
        said = said if isinstance(said, (list, tuple)) else [said]
        return len(ours) == len(said) and all(map(_equal, ours, said))
    if isinstance(ours, str) or not isinstance(said, str):
        return (ours == said and isinstance(ours, bool) == isinstance(said, bool)) or ours == str(said)
    return ours == _value(said)


def _value(text: str) -> Any:
    words = {"true": True, "false": False, "none": None}
    try:
        return words[text.lower()] if text.lower() in words else ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _flat(node: Any, prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for name, value in node.items():
        if isinstance(value, dict):
            out.update(_flat(value, f"{prefix}{name}."))
        else:
            out[f"{prefix}{name}"] = value
    return out
