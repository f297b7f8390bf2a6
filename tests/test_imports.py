"""Who may import whom, circles, repeated names, and what must be cheap to import.

Everything is read from the source, so an import inside a function or under TYPE_CHECKING counts like any other.
"""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "gn_det"

#: Modules at the top of gn_det that every room may use; "gn_det" is the package itself, for its version.
BASE = {"gn_det", "errors", "text", "terminal", "files", "values", "parent_watch"}
#: Rooms that read or write what a user has; they import no engine.
MIDDLE = BASE | {"structures", "config", "checkpoint", "data", "evaluation", "visualize"}

#: room or top-level module -> what it may import beside itself. The arrows have no circle.
ALLOWED: dict[str, set[str]] = {
    "gn_det": {"api", "config"},
    "api": MIDDLE | {"engine"},
    "errors": set(),
    "text": set(),
    "terminal": {"text"},
    "files": {"errors", "text"},
    "values": {"errors", "text"},
    "parent_watch": set(),
    "structures": set(),
    "kernels": {"errors"},
    "norm": {"errors", "kernels"},
    "modeling": {"errors", "kernels", "norm", "structures"},
    "config": BASE,
    "checkpoint": BASE | {"config"},
    "data": BASE | {"config", "structures"},
    "evaluation": BASE | {"config", "structures", "data"},
    "visualize": BASE | {"structures", "data", "evaluation"},
    "check": MIDDLE,
    "engine": MIDDLE | {"modeling", "norm"},
    "classification": MIDDLE | {"modeling", "norm", "engine"},
    "compare": MIDDLE | {"engine", "classification"},
    "detectron2": MIDDLE | {"modeling", "norm", "kernels", "engine"},
    "cli": MIDDLE | {"api", "modeling", "check", "engine", "classification", "compare"},
    "__main__": {"cli"},
}

# What is still wrong; these lists only shrink.
KNOWN_ARROWS = {"gn_det.config.check -> gn_det.data.inputs"}
KNOWN_CIRCLES = {
    "gn_det.checkpoint.sources",
    "gn_det.engine.advice",
    "gn_det.data.catalog",
    "gn_det.compare.suite",
}  # a circle is known by any of its modules
KNOWN_STEMS = {"report", "samples", "fit", "findings", "build", "coco", "charts", "page", "curves", "catalog"}
KNOWN_STEMS |= {"tables", "results"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@functools.cache
def imported(path: Path) -> set[str]:
    """Names that a file imports, ``a`` for ``import a`` and both ``a`` and ``a.b`` for ``from a import b``."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}:{node.lineno}: relative import"
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@functools.cache
def graph() -> dict[str, set[str]]:
    """Module of gn_det -> modules of gn_det that it imports: of ``from a import b`` the submodule where b is one."""
    files = {module_name(path): path for path in PACKAGE.rglob("*.py")}
    edges = {}
    for name, path in files.items():
        found = {n for n in imported(path) if n in files}
        packages = {n.rpartition(".")[0] for n in found}
        whole = {n for n in packages & found if not from_package(path, n, files)}
        edges[name] = found - whole - {name}
    edges["gn_det"] -= {"gn_det.api"}  # its names are imported when they are first used
    return edges


def from_package(path: Path, package: str, files: dict[str, Path]) -> bool:
    """Whether a file takes something from the ``__init__`` of a package, not only submodules."""
    return any(n.rpartition(".")[0] == package and n not in files for n in imported(path))


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def circles() -> list[set[str]]:
    """Sets of modules that reach each other."""
    edges = graph()

    @functools.cache
    def reached(start: str) -> frozenset[str]:
        seen: set[str] = set()
        stack = [start]
        while stack:
            for target in edges[stack.pop()] - seen:
                seen.add(target)
                stack.append(target)
        return frozenset(seen)

    found: list[set[str]] = []
    for module in edges:
        circle = {other for other in reached(module) if module in reached(other)}
        if circle and circle not in found:
            found.append(circle)
    return found


def test_rooms_import_only_downwards() -> None:
    wrong = {
        f"{module} -> {target}"
        for module, targets in graph().items()
        for target in targets
        if room(target) not in ALLOWED[room(module)] | {room(module)}
    }
    assert wrong <= KNOWN_ARROWS


def test_every_room_is_listed_and_has_its_tests() -> None:
    assert {room(module) for module in graph()} == set(ALLOWED)
    folders = {p.name for p in (ROOT / "tests").iterdir() if p.is_dir() and any(p.rglob("*.py"))}
    assert folders - {"equality", "faults", "golden"} <= set(ALLOWED)


def test_no_circles() -> None:
    unknown = [sorted(circle) for circle in circles() if not circle & KNOWN_CIRCLES]
    assert not unknown


def test_no_stem_is_used_twice() -> None:
    stems = Counter(p.stem for p in PACKAGE.rglob("*.py") if not p.stem.startswith("__") and p.parent.name != "cli")
    assert {stem for stem, count in stems.items() if count > 1} <= KNOWN_STEMS


def test_only_the_plugin_imports_detectron2() -> None:
    for path in PACKAGE.rglob("*.py"):
        if "detectron2" not in path.relative_to(PACKAGE).parts:
            assert not any(n.split(".")[0] == "detectron2" for n in imported(path)), path


BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {blocked!r}:
            raise ImportError('blocked: ' + name)
sys.meta_path.insert(0, Block())
"""


def run_blocked(blocked: set[str], code: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a fresh interpreter that cannot import some libraries."""
    program = BLOCK.format(blocked=blocked) + code
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)


def test_package_and_every_help_are_cheap() -> None:
    """Neither torch nor NumPy nor a YAML reader is imported for them."""
    code = """
import gn_det, gn_det.errors, gn_det.cli
gn_det.cli.main(['--help'])
for name in gn_det.cli.COMMANDS:
    try: gn_det.cli.main([name, '--help'])
    except SystemExit: pass
"""
    result = run_blocked({"torch", "numpy", "yaml", "fvcore"}, code)
    assert result.returncode == 0 and result.stderr == ""
    assert "--dry-run" in result.stdout and result.stdout.count("usage: gn-det ") == 12


def test_model_needs_little_beside_torch() -> None:
    code = (
        "from gn_det.config import load_config\n"
        "from gn_det.modeling.build import build_model\n"
        "build_model(load_config('quickstart', ['MODEL.ROI_HEADS.NUM_CLASSES', '3']))\n"
    )
    result = run_blocked({"lightning", "detectron2", "cv2", "matplotlib", "faster_coco_eval", "tensorboard"}, code)
    assert result.returncode == 0, result.stderr
