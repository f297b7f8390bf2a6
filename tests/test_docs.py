"""The pages of ``docs/`` and the README name only what exists: config keys, files, commands and flags."""

from __future__ import annotations

import ast
import contextlib
import json
import re
from pathlib import Path
from typing import Any

import pytest

from gn_det.cli import main
from gn_det.config import get_cfg

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
#: Of Detectron2's repository, or a pattern.
FOREIGN = {"tools/analyze_model.py", "tests/ROOM/test_MODULE.py", "test_MODULE.py"}
#: Detectron2's alone; the pages say that they are refused or read by its loader only.
THEIRS = {"DATALOADER.RANDOM_SUBSET_RATIO"}
#: Section of the troubleshooting page for the errors of each room.
SECTIONS = {
    "check": "Data sets",
    "checkpoint": "Weights",
    "classification": "Pre-training and comparisons",
    "cli": "Configuration",
    "compare": "Pre-training and comparisons",
    "config": "Configuration",
    "data": "Data sets",
    "deploy": "Prediction, conversion and export",
    "detectron2": "Detectron2",
    "engine": "Training stops or diverges",
    "evaluation": "Evaluation",
    "files": "Output folder and resume",
    "modeling": "Configuration",
    "norm": "Configuration",
    "prediction": "Prediction, conversion and export",
    "result": "Prediction, conversion and export",
    "visualize": "Evaluation",
}
SPELLED = {".py", ".md", ".yaml", ".html", ".cpp", ".css", ".ipynb"}


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_config_keys_exist(page: Path) -> None:
    """Every dotted name in capitals is a key or a section of the config."""
    cfg, unknown = get_cfg(), set()
    for key in set(re.findall(r"\b[A-Z][A-Z0-9]+(?:\.[A-Z][A-Z0-9_]*)+\b(?!\.[a-z(])", page.read_text())) - THEIRS:
        node = cfg
        for part in key.split("."):
            if part not in node:
                unknown.add(key)
                break
            node = node[part]
    assert not unknown


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_files_exist(page: Path) -> None:
    """Paths of the repository, shipped configs, tests by name, and targets of make."""
    text = page.read_text()
    paths = set(re.findall(r"\b(?:tests|benchmarks|experiments|tools|gn_det)/[\w./-]*\w", text)) - FOREIGN
    configs = set(re.findall(r"(?<![\w/.-])((?:gn|bn|ln|syncbn)_[a-z0-9_]+\.yaml)\b", text))
    tests = (
        set(re.findall(r"\btest_\w+\.py\b", text))
        - {path.name for path in (ROOT / "tests").rglob("test_*.py")}
        - FOREIGN
    )
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert not {path for path in paths if not (ROOT / path).exists()}
    assert not {name for name in configs if not (ROOT / "configs" / name).exists()}
    assert not tests
    assert not set(re.findall(r"`make ([a-z0-9-]+)", text)) - targets


#: Brackets keep the pattern from matching itself.
BRITISH = re.compile(
    r"colo[u]r|\bcent[r](?:e|ed|es|ing)\b|behavio[u]r|neighbo[u]r|favo[u]r|\bgre[y]|licen[c]e|catalog[u]e|judg[e]ment"
    r"|label[l]ed|model[l]ed|cancel[l]ed|\banaly[s]ed?\b|\blearn[t]\b|\btoward[s]\b|arte[f]act"
    r"|[\w-]*(?:gn|al|on|im|stom|er|ar|an|el|iz|tr|il|in|or)i[s](?:e|ed|es|ing|ation)\b"
)
#: Names that users' scripts may hold: a kind of finding in the json of ``gn-det check``.
BRITISH_NAMES = {"bbox-normali" + "sed"}


def test_troubleshooting_covers_every_room() -> None:
    """Each room that raises an error for users has its section; each quoted message exists in the source."""
    trees = {path: ast.parse(path.read_text()) for path in sorted((ROOT / "gn_det").rglob("*.py"))}
    errors = {"UserError"}
    for _ in range(4):  # subclasses of subclasses
        errors |= {
            node.name
            for tree in trees.values()
            for node in ast.walk(tree)
            if isinstance(node, ast.ClassDef) and errors & {getattr(base, "id", "") for base in node.bases}
        }
    rooms = {
        path.relative_to(ROOT / "gn_det").parts[0].removesuffix(".py")
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in errors
    }
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    assert rooms == SECTIONS.keys()
    assert set(SECTIONS.values()) <= set(re.findall(r"^## (.*)", page, re.MULTILINE))
    source = "\n".join(
        node.value
        for tree in trees.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    tables = re.findall(r"^\| the message says \|.*\n\|---.*\n((?:\|.*\n?)+)", page, re.MULTILINE)
    cells = [row.split(" | ")[0] for table in tables for row in table.splitlines()]
    quoted = [text for cell in cells for text in re.findall(r"`([^`]+)`", cell)]
    assert len(quoted) > 100 and not [text for text in quoted if text not in source]


def test_spelling_is_american() -> None:
    folders = ("gn_det", "tests", "benchmarks", "experiments", "configs", "docs", "tools")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in SPELLED]
    found = {
        str(path.relative_to(ROOT)): words
        for path in [*files, *ROOT.glob("*.md"), ROOT / "Makefile", ROOT / "setup.cfg"]
        if (words := set(BRITISH.findall(path.read_text(encoding="utf-8").lower())) - BRITISH_NAMES)
    }
    assert len(files) > 400 and not found


def flags_of(command: str, capsys: pytest.CaptureFixture[str]) -> set[str]:
    with contextlib.suppress(SystemExit):
        main([command, "--help"])
    return set(re.findall(r"--[a-z0-9-]+", capsys.readouterr().out))


def test_command_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """Every flag behind ``gn-det COMMAND`` in a block of code is one of that command's."""
    lines = [(page, line) for page in PAGES for line in re.findall(r"gn-det [^`\n]*(?:\\\n[^`\n]*)*", page.read_text())]
    commands: dict[str, set[str]] = {}
    wrong = []
    for page, line in lines:
        words = line.split("#")[0].replace("\\", " ").split()[1:]
        flags = {word.strip(";,.)") for word in words[1:] if word.startswith("--")}
        if not words or words[0] == "COMMAND" or not flags:
            continue
        known = commands.setdefault(words[0], set()) or flags_of(words[0], capsys)
        commands[words[0]] = known
        wrong += [f"{page_id(page)}: gn-det {words[0]} {flag}" for flag in flags - known]
    assert {"train", "check", "compare", "convert"} <= commands.keys() and not wrong


@pytest.mark.slow
def test_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All cells in order, in one namespace; the model learns something and finds something."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "datasets"))
    names: dict[str, Any] = {}
    for cell in json.loads((ROOT / "docs" / "tutorial.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), str(cell["id"]), "exec"), names)
    assert names["metrics"]["bbox/AP"] > 40 and names["losses"][-1][1] < names["losses"][0][1]
    assert len(names["result"]) > 0
