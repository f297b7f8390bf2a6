"""Who may import whom: the direction of the design, checked on the source and in a fresh interpreter."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "gn_det"

#: room -> rooms of gn_det that it must not import
FORBIDDEN = {
    "kernels": {"norm", "modeling", "config", "checkpoint", "data", "evaluation"},
    "norm": {"modeling", "config", "checkpoint", "data", "evaluation"},
    "modeling": {"config", "checkpoint", "data", "evaluation"},
    "config": {"modeling", "checkpoint", "evaluation"},
    "checkpoint": {"modeling", "data", "evaluation"},
    "data": {"modeling", "evaluation"},
    "evaluation": {"modeling"},
    "visualize": {"modeling"},
    "engine": set(),
    "check": {"modeling"},
    "classification": set(),
    "compare": set(),
    "detectron2": set(),
}
_ABOVE = {
    "engine": {"check", "classification", "compare", "detectron2"},
    "check": {"classification", "compare", "detectron2"},
    "classification": {"check", "compare", "detectron2"},
    "compare": {"check", "detectron2"},
    "detectron2": {"check", "classification", "compare"},
}
for _room, _names in FORBIDDEN.items():
    _names |= _ABOVE.get(_room, {"engine", "check", "classification", "compare", "detectron2"}) | {"cli"}

#: What a room may import nevertheless.
ALLOWED: dict[str, set[str]] = {}


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("room", sorted(FORBIDDEN))
def test_rooms_import_only_downwards(room: str) -> None:
    files = [PACKAGE / f"{room}.py"] if (PACKAGE / f"{room}.py").exists() else sorted((PACKAGE / room).glob("**/*.py"))
    assert files
    for path in files:
        for name in imported(path):
            if any(name.startswith(allowed) for allowed in ALLOWED.get(room, ())):
                continue
            parts = name.split(".")
            assert not (parts[0] == "gn_det" and len(parts) > 1 and parts[1] in FORBIDDEN[room]), f"{path}: {name}"


def test_only_the_plugin_imports_detectron2() -> None:
    for path in PACKAGE.glob("**/*.py"):
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
    program = BLOCK.format(blocked=blocked) + code
    return subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)


def test_import_needs_nothing_heavy() -> None:
    heavy = {"torchvision", "lightning", "cv2", "pycocotools", "fvcore", "matplotlib", "detectron2", "faster_coco_eval"}
    result = run_blocked(heavy, "import gn_det, gn_det.errors, gn_det.cli, gn_det.norm; print(gn_det.__version__)")
    assert result.returncode == 0, result.stderr


def test_model_needs_neither_lightning_nor_detectron2() -> None:
    blocked = {"lightning", "detectron2", "cv2", "matplotlib", "faster_coco_eval"}
    code = (
        "from gn_det.config import load_config\n"
        "from gn_det.modeling.build import build_model\n"
        "build_model(load_config('quickstart', ['MODEL.ROI_HEADS.NUM_CLASSES', '3']))\n"
    )
    result = run_blocked(blocked, code)
    assert result.returncode == 0, result.stderr


def test_help_is_quick_because_it_imports_no_torch() -> None:
    code = "import sys; from gn_det.cli import main\ntry: main(['train', '--help'])\nexcept SystemExit: pass\n"
    result = run_blocked({"torch", "numpy", "yaml"}, code)
    assert result.returncode == 0 and "--dry-run" in result.stdout, result.stderr
