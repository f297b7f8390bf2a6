"""``gn-det doctor``: what is installed, what works, which engine runs and why, and the fix for what does not.

Everything is tried in a fresh interpreter, so that a library that crashes on import is reported like any other.
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

from gn_det import __version__
from gn_det.engine.choice import INSTALL_PAGE, fix
from gn_det.engine.choice import installed_version as installed
from gn_det.text import as_line

#: import name -> name on the package index, of what gn_det needs
REQUIRED = {
    "torch": "torch",
    "torchvision": "torchvision",
    "fvcore": "fvcore",
    "iopath": "iopath",
    "numpy": "numpy",
    "yaml": "pyyaml",
    "safetensors": "safetensors",
    "PIL": "pillow",
    "pycocotools": "pycocotools",
    "faster_coco_eval": "faster-coco-eval",
    "lightning": "lightning",
    "tensorboard": "tensorboard",
    "matplotlib": "matplotlib",
    "shapely": "shapely",
    "tabulate": "tabulate",
    "tqdm": "tqdm",
}

#: Distributions that all give ``cv2``; those without "headless" need a display library. gn_det does not use it, but
#: parts of Detectron2 do (its visualizer, some augmentations), which does not declare it: the extra ``detectron2``.
_OPENCV = ("opencv-python-headless", "opencv-python", "opencv-contrib-python", "opencv-contrib-python-headless")

_TRY_TORCHVISION = "import torch, torchvision; torchvision.ops.nms(torch.zeros(0, 4), torch.zeros(0), 0.5)"
_TRY_GPU = (
    "import json, torch; n = torch.cuda.device_count() if torch.cuda.is_available() else 0; "
    "print(json.dumps({'cuda': torch.version.cuda, 'gpus': [[torch.cuda.get_device_name(i), "
    "torch.cuda.get_device_properties(i).total_memory / 2**30, torch.cuda.is_bf16_supported()] for i in range(n)]}))"
)
_TRY_DETECTRON2 = "from gn_det.engine.choice import import_detectron2; import_detectron2()"
_TRY_PLUGIN = "import gn_det.detectron2.engine"
_TRY_ZOO = "import detectron2.model_zoo"


@dataclass(frozen=True)
class Trial:
    """How a piece of Python ended in a fresh interpreter."""

    ok: bool
    output: str = ""
    error: str = ""


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        mark: "ok", "note" (works, worth knowing) or "broken".
        what: what was looked at, and what is so.
        fix: what to do about it, where something is.
    """

    mark: str
    what: str
    fix: str = ""

    def __str__(self) -> str:
        lines = [as_line(f"{self.mark:7s} {self.what}")]
        return "\n".join(lines + [as_line(f"        fix: {self.fix}")] if self.fix else lines)


Try = Callable[[str], Trial]


def try_python(code: str) -> Trial:
    """Run ``code`` in a fresh interpreter; ``error`` is its last line of stderr, or how it died."""
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    except subprocess.TimeoutExpired:
        return Trial(False, error="no answer in 5 minutes")
    if done.returncode == 0:
        return Trial(True, done.stdout)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    last = lines[-1] if lines else ""
    if done.returncode < 0:
        last = f"the interpreter died of signal {-done.returncode}"
    return Trial(False, done.stdout, last.strip())


def examine(run: Try = try_python, version_of: Callable[[str], str | None] = installed) -> list[Finding]:
    """Look at everything; ``run`` and ``version_of`` are replaceable for tests."""
    findings = [Finding("ok", f"gn_det {__version__}, Python {platform.python_version()}, {platform.platform()}")]
    findings += [_package(name, distribution, run, version_of) for name, distribution in REQUIRED.items()]
    findings += _opencv(run, version_of)
    findings += _gpus(run)
    findings += _detectron2(run, version_of)
    return findings


def _package(name: str, distribution: str, run: Try, version_of: Callable[[str], str | None]) -> Finding:
    names = _OPENCV if name == "cv2" else (distribution,)
    found = next(((d, v) for d in names if (v := version_of(d))), None)
    trial = run(_TRY_TORCHVISION if name == "torchvision" else f"import {name}")
    if trial.ok:
        return Finding("ok", " ".join(found) if found else f"{distribution} (no version)")
    if found is None:
        return Finding("broken", f"{distribution} is not installed", f"pip install {distribution}")
    what = f"{' '.join(found)} cannot be used: {trial.error}"
    if name == "cv2" and "headless" not in found[0] and "cannot open shared object" in trial.error:
        others = " ".join(d for d in _OPENCV if version_of(d))
        return Finding("broken", what, f"pip uninstall -y {others} && pip install opencv-python-headless")
    if name == "torchvision":
        torch = version_of("torch")
        fix = f"torchvision was built for another torch than {torch}: pip install --upgrade torch torchvision"
        return Finding("broken", what, fix)
    return Finding("broken", what, f"pip install --force-reinstall {found[0]}")


def _opencv(run: Try, version_of: Callable[[str], str | None]) -> list[Finding]:
    """Nothing where it is not installed."""
    several = [d for d in _OPENCV if version_of(d)]
    findings = [_package("cv2", several[0], run, version_of)] if several else []
    if len(several) < 2:
        return findings
    what = f"{' and '.join(several)} are both installed: they overwrite each other's cv2"
    fix = f"pip uninstall -y {' '.join(several)} && pip install opencv-python-headless"
    return [*findings, Finding("note", what, fix)]


def _gpus(run: Try) -> list[Finding]:
    trial = run(_TRY_GPU)
    if not trial.ok:
        return [Finding("broken", f"torch cannot tell about GPUs: {trial.error}", "see torch above")]
    found = json.loads(trial.output.splitlines()[-1])
    if not found["gpus"]:
        built = f"is built for CUDA {found['cuda']}" if found["cuda"] else "is built without CUDA"
        fix = "" if found["cuda"] is None else "if this machine has one: check the driver with nvidia-smi"
        return [Finding("note", f"no GPU: training runs on the CPU, slowly (torch {built})", fix)]
    return [
        Finding(
            "ok", f"GPU {i}: {name}, {memory:.0f} GiB{', bf16' if bf16 else ', no bf16: use SOLVER.AMP.DTYPE fp16'}"
        )
        for i, (name, memory, bf16) in enumerate(found["gpus"])
    ]


def _detectron2(run: Try, version_of: Callable[[str], str | None]) -> list[Finding]:
    """Detectron2 and the plugin, and what this means for the choice of the engine."""
    engine = "engine of gn-det train, eval and quickstart"
    version = version_of("detectron2")
    trial = run(_TRY_DETECTRON2)
    if version is None and re.search(r"No module named '?detectron2'?$", trial.error):
        return [
            Finding("note", "Detectron2 is not installed: optional, --engine detectron2 needs it", INSTALL_PAGE),
            Finding("ok", f"{engine}: embedded, because Detectron2 is not installed"),
        ]
    name = f"Detectron2 {version or '(no version)'}"
    if trial.ok:
        trial = run(_TRY_PLUGIN)
    if not trial.ok:
        return [
            Finding("broken", f"{name} is installed, but cannot be used: {trial.error}", fix(trial.error, version_of)),
            Finding("note", f"{engine}: none until then, unless --engine embedded, which does not need Detectron2"),
        ]
    findings = [Finding("ok", f"{name} and its plugin: import gn_det.detectron2")]
    if not (zoo := run(_TRY_ZOO)).ok:
        what = f"detectron2.model_zoo cannot be imported: {zoo.error}; gn_det does not need it"
        findings.append(Finding("note", what, fix(zoo.error, version_of)))
    iopath = version_of("iopath")
    if iopath and _numbers(iopath) >= (0, 1, 10):
        what = f"Detectron2 asks for iopath < 0.1.10, installed is {iopath}"
        findings.append(Finding("note", what, "pip install 'iopath>=0.1.7,<0.1.10'"))
    return [*findings, Finding("ok", f"{engine}: detectron2, because it is installed; or --engine embedded")]


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version)[:3])


def doctor() -> int:
    """Print the report; 0 where all works, 1 where something is broken."""
    findings = examine()
    for finding in findings:
        print(finding)
    broken = sum(f.mark == "broken" for f in findings)
    print(f"\n{broken} broken" if broken else "\nall works")
    return 1 if broken else 0
