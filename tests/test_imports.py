"""Who may import whom, circles, repeated names, and what must be cheap to import.

Everything is read from the source, so an import inside a function or under TYPE_CHECKING counts like any other.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.house import circles, graph, imported, modules, repeated_stems
from gn_det.cli import COMMANDS

ROOT = Path(__file__).resolve().parent.parent

#: Modules at the top of gn_det that every room may use.
BASE = {"about", "compiler", "errors", "text", "terminal", "files", "values", "parent_watch"}
#: Rooms that read or write what a user has; they import no engine.
MIDDLE = BASE | {"structures", "config", "checkpoint", "data", "evaluation", "visualize"}

#: room or top-level module -> what it may import beside itself. The arrows have no circle.
ALLOWED: dict[str, set[str]] = {
    "gn_det": {"about", "api", "config", "engine", "norm", "result"},
    "about": set(),
    "result": MIDDLE,
    "api": MIDDLE | {"engine", "prediction", "result"},
    "errors": set(),
    "text": set(),
    "terminal": {"text"},
    "files": {"errors", "text"},
    "values": {"text"},
    "parent_watch": set(),
    "structures": set(),
    "compiler": set(),
    "kernels": {"compiler"},
    "norm": {"errors", "kernels"},
    "modeling": {"errors", "kernels", "norm", "structures"},
    "config": BASE,
    "checkpoint": BASE | {"config"},
    "data": BASE | {"config", "structures"},
    "evaluation": BASE | {"config", "structures", "data", "visualize"},
    "visualize": BASE | {"structures", "data"},
    "check": MIDDLE,
    "engine": MIDDLE | {"modeling", "norm"},
    "classification": MIDDLE | {"modeling", "norm", "engine"},
    "prediction": MIDDLE | {"engine", "result"},
    "deploy": MIDDLE | {"modeling", "norm", "engine", "prediction", "result"},
    "compare": MIDDLE | {"engine", "classification", "prediction"},
    "detectron2": MIDDLE | {"modeling", "norm", "kernels", "engine"},
    "cli": MIDDLE | {"api", "modeling", "check", "engine", "classification", "compare", "deploy", "prediction"},
    "__main__": {"cli"},
}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else module


def test_rooms_import_only_downwards() -> None:
    wrong = {
        f"{module} -> {target}"
        for module, targets in graph(ROOT).items()
        for target in targets
        if room(target) not in ALLOWED[room(module)] | {room(module)}
    }
    assert not wrong


def test_every_room_is_listed_and_has_its_tests() -> None:
    assert {room(module) for module in graph(ROOT)} == set(ALLOWED)
    folders = {p.name for p in (ROOT / "tests").iterdir() if p.is_dir() and any(p.rglob("*.py"))}
    assert folders - {"equality", "faults", "golden"} <= set(ALLOWED)


def test_no_circles() -> None:
    assert circles(ROOT) == []


def test_no_file_name_is_used_twice() -> None:
    assert repeated_stems(ROOT) == []


def test_only_the_plugin_imports_detectron2() -> None:
    for name, path in modules(ROOT).items():
        if room(name) != "detectron2":
            assert not any(n.split(".")[0] == "detectron2" for n, _ in imported(path)), path


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
    assert "--dry-run" in result.stdout and result.stdout.count("usage: gn-det ") == 1 + len(COMMANDS)


def test_model_needs_little_beside_torch() -> None:
    code = (
        "from gn_det.config import load_config\n"
        "from gn_det.modeling.build import build_model\n"
        "build_model(load_config('quickstart', ['MODEL.ROI_HEADS.NUM_CLASSES', '3']))\n"
    )
    result = run_blocked({"lightning", "detectron2", "cv2", "matplotlib", "faster_coco_eval", "tensorboard"}, code)
    assert result.returncode == 0, result.stderr
