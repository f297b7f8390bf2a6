"""Which gn_det made a result: a hash of the source that can change one."""

from __future__ import annotations

import ast
import functools
import hashlib
from pathlib import Path

#: Rooms and modules on which no trained number depends: what reads, draws and reports.
_NO_PART = (
    "check",
    "cli.py",
    "compare",
    "curves.py",
    "detectron2",
    "doctor.py",
    "draw.py",
    "flags.py",
    "html.py",
    "inputs.py",
    "predict.py",
    "pretrain",
    "quickstart.py",
    "training",
    "weights_cli.py",
    "__main__.py",
)
#: The room that one kind of run alone depends on.
_OWN_ROOM = {"embedded": "training", "detectron2": "detectron2", "pretrain": "pretrain"}


@functools.lru_cache(maxsize=8)
def code_version(trainer: str, package: Path | None = None) -> str:
    """Twelve hex digits that change when code changes on which the result of a run could depend.

    Comments, docstrings and layout do not count, nor do the reporting rooms and what trains runs of another kind.

    Args:
        trainer: "embedded" or "detectron2" for detection, "pretrain".
        package: the folder of gn_det; None takes the running one.
    """
    root = package or Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if inside.parts[0] in _NO_PART and inside.parts[0] != _OWN_ROOM.get(trainer):
            continue
        digest.update(inside.as_posix().encode() + b"\0" + meaning(path.read_text(encoding="utf-8")).encode() + b"\0")
    return digest.hexdigest()[:12]


def meaning(source: str) -> str:
    """Python source without comments, docstrings and layout."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and body:
            first = body[0]
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body = body[1:]
    return ast.dump(tree)
