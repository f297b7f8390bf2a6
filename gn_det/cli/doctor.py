"""Check the installation: what is installed, what works, which engine runs and why, and how to fix the rest.

Each library is imported in a fresh interpreter, so one that crashes is reported like any other.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import re
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass

from gn_det.about import __version__
from gn_det.engine.choice import INSTALL_PAGE, fix, installed_version
from gn_det.text import as_line, count

#: Import names that are not the distribution's name with "_" for "-".
_MODULES = {"pyyaml": "yaml", "pillow": "PIL"}

#: Extras for work on gn_det itself, which a user does not miss.
_FOR_DEVELOPERS = {"dev", "docs", "test"}

#: Distributions that all provide ``cv2``; those without "headless" need a display library.
_OPENCV = ("opencv-python-headless", "opencv-python", "opencv-contrib-python", "opencv-contrib-python-headless")

_TRY_TORCHVISION = "import torch, torchvision; torchvision.ops.nms(torch.zeros(0, 4), torch.zeros(0), 0.5)"
_TRY_GPU = (
    "import json, torch; n = torch.cuda.device_count() if torch.cuda.is_available() else 0; "
    "print(json.dumps({'cuda': torch.version.cuda, 'gpus': [[torch.cuda.get_device_name(i), "
    "torch.cuda.get_device_properties(i).total_memory / 2**30, torch.cuda.is_bf16_supported()] for i in range(n)]}))"
)
_FIND_DETECTRON2 = "from gn_det.engine.choice import is_installed; raise SystemExit(not is_installed())"


@dataclass(frozen=True)
class Trial:
    """Outcome of a piece of Python in a fresh interpreter."""

    ok: bool
    output: str = ""
    error: str = ""


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    mark: str  # "ok", "note" or "broken"
    what: str  # what was examined, and its state
    fix: str = ""  # what to do about it

    def __str__(self) -> str:
        return as_line(f"{self.mark:7s} {self.what}") + (f"\n        fix: {as_line(self.fix)}" if self.fix else "")


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "Exit status: 0 no problems found, 1 something is broken."


def run(args: argparse.Namespace) -> int:
    findings = examine()
    print(*findings, sep="\n")
    broken = sum(f.mark == "broken" for f in findings)
    print(f"\n{count(broken, 'problem')} found" if broken else "\nNo problems found")
    return 1 if broken else 0


def try_python(code: str) -> Trial:
    """Run ``code`` in a fresh interpreter; the error is its last line of stderr, or the signal that killed it."""
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    except subprocess.TimeoutExpired:
        return Trial(False, error="no answer in 5 minutes")
    if done.returncode == 0:
        return Trial(True, done.stdout)
    if done.returncode < 0:
        return Trial(False, error=f"the interpreter died of signal {-done.returncode}")
    return Trial(False, done.stdout, (done.stderr.strip().splitlines() or [""])[-1].strip())


def requirements(declared: Iterable[str]) -> tuple[dict[str, str], dict[str, list[str]]]:
    """Parse requirements such as ``torch>=2.6`` or ``wandb; extra == "wandb"``.

    Returns:
        Lowest versions ("" for any) by name; and the names of each extra for users.
    """
    required: dict[str, str] = {}
    extras: dict[str, list[str]] = {}
    for line in declared:
        name, least = re.match(r"([\w.-]+)[^;>]*(?:>=\s*([\d.]+))?", line).groups("")  # type: ignore[union-attr]
        extra = re.search(r"extra\s*==\s*[\"'](\w+)", line)
        if extra is None:
            required[name.lower()] = least
        elif extra[1] not in _FOR_DEVELOPERS:
            extras.setdefault(extra[1], []).append(name.lower())
    return required, extras


def examine() -> list[Finding]:
    """Return all findings."""
    first = Finding("ok", f"gn_det {__version__}, Python {platform.python_version()}, {platform.platform()}")
    if (known := installed_version("gn-det")) != __version__:
        what = f"pip knows gn_det {known}" if known else "gn_det runs from a folder and is not installed"
        return [first, Finding("broken", what, "pip install . in the checkout (-e . to work on it)")]
    required, extras = requirements(importlib.metadata.requires("gn-det") or ())
    return [
        first,
        *(_package(name, least=least) for name, least in required.items()),
        *_opencv(),
        *(_extra(name, parts) for name, parts in extras.items()),
        *_gpus(),
        *_detectron2(),
    ]


def _numbers(version: str) -> list[int]:
    return [int(n) for n in re.findall(r"\d+", version)[:3]]


def _package(name: str, module: str = "", least: str = "") -> Finding:
    version = installed_version(name)
    module = module or _MODULES.get(name, name.replace("-", "_"))
    tried = try_python(_TRY_TORCHVISION if name == "torchvision" else f"import {module}")
    if version and _numbers(version) < _numbers(least):
        return Finding("broken", f"{name} {version} is too old", f"pip install --upgrade '{name}>={least}'")
    if tried.ok:
        return Finding("ok", f"{name} {version or '(unknown version)'}")
    if version is None:
        return Finding("broken", f"{name} is not installed", f"pip install {name}")
    remedy = f"pip install --force-reinstall {name}"
    if module == "cv2" and "headless" not in name and "cannot open shared object" in tried.error:
        remedy = _headless(d for d in _OPENCV if installed_version(d))
    elif name == "torchvision":
        reason = f"torchvision was built for another torch than {installed_version('torch')}"
        remedy = f"{reason}: pip install --upgrade torch torchvision"
    return Finding("broken", f"{name} {version} cannot be used: {tried.error}", remedy)


def _extra(name: str, parts: list[str]) -> Finding:
    """Optional packages; their versions only, because importing them all would take long."""
    versions = {part: installed_version(part) for part in parts}
    absent = [part for part, version in versions.items() if version is None]
    if absent:
        what = f"optional [{name}]: {', '.join(absent)} not installed"
        return Finding("note", what, f"pip install {' '.join(absent)}")
    return Finding("ok", f"optional [{name}]: {', '.join(f'{part} {version}' for part, version in versions.items())}")


def _headless(installed: Iterable[str]) -> str:
    return f"pip uninstall -y {' '.join(installed)} && pip install opencv-python-headless"


def _opencv() -> list[Finding]:
    installed = [d for d in _OPENCV if installed_version(d)]
    findings = [_package(installed[0], "cv2")] if installed else []
    if len(installed) > 1:
        what = f"{' and '.join(installed)} overwrite each other's cv2; keep one"
        findings.append(Finding("note", what, _headless(installed)))
    return findings


def _gpus() -> list[Finding]:
    tried = try_python(_TRY_GPU)
    if not tried.ok:
        return [Finding("broken", f"torch cannot list the GPUs: {tried.error}", "see torch above")]
    found = json.loads(tried.output.splitlines()[-1])
    if not found["gpus"]:
        built = f"built for CUDA {found['cuda']}" if found["cuda"] else "built without CUDA"
        remedy = "if this machine has a GPU, check the driver with nvidia-smi" if found["cuda"] else ""
        return [Finding("note", f"no GPU found: training on the CPU is slow (torch is {built})", remedy)]
    return [
        Finding("ok", f"GPU {i}: {name}, {gib:.0f} GiB{', bf16' if bf16 else ', no bf16: use SOLVER.AMP.DTYPE fp16'}")
        for i, (name, gib, bf16) in enumerate(found["gpus"])
    ]


def _probe(module: str = "") -> Trial:
    """Import Detectron2, or a module that needs it; where that fails, the output is the fix."""
    return try_python(f"from gn_det.engine.choice import probe; probe({module!r})")


def _detectron2() -> list[Finding]:
    """Detectron2, the plugin, and the engine that follows."""
    engine = "engine of gn-det train, eval and quickstart"
    version = installed_version("detectron2")
    if version is None and not try_python(_FIND_DETECTRON2).ok:
        return [
            Finding("note", "Detectron2 is not installed; only --engine detectron2 needs it", INSTALL_PAGE),
            Finding("ok", f"{engine}: embedded, because Detectron2 is not installed"),
        ]
    name = f"Detectron2 {version or '(unknown version)'}"
    tried = _probe()
    if tried.ok:
        tried = _probe("gn_det.detectron2.engine")
    if not tried.ok:
        what = f"{name} is installed, but cannot be used: {tried.error}"
        return [
            Finding("broken", what, tried.output.strip() or fix(None)),
            Finding("note", f"{engine}: none until this is fixed; --engine embedded works without Detectron2"),
        ]
    findings = [Finding("ok", f"{name} and its plugin: import gn_det.detectron2")]
    if not (zoo := _probe("detectron2.model_zoo")).ok:
        what = f"detectron2.model_zoo cannot be imported: {zoo.error}; gn_det does not need it"
        findings.append(Finding("note", what, zoo.output.strip()))
    iopath = installed_version("iopath")
    if iopath and _numbers(iopath) >= [0, 1, 10]:
        what = f"Detectron2 requires iopath < 0.1.10, but {iopath} is installed"
        findings.append(Finding("note", what, "pip install 'iopath>=0.1.7,<0.1.10'"))
    return [*findings, Finding("ok", f"{engine}: detectron2, because it is installed; or --engine embedded")]
