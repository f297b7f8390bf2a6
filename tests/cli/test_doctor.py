"""The doctor names what is broken, the exact fix, and the engine that runs."""

from __future__ import annotations

from collections.abc import Callable
from configparser import ConfigParser
from pathlib import Path

import pytest

from gn_det.about import __version__
from gn_det.cli import doctor, main
from gn_det.cli.doctor import Finding, Trial, examine, requirements, try_python
from gn_det.engine.choice import INSTALL_PAGE

#: As pip writes them into the metadata.
DECLARED = ["torch>=2.6", "torchvision>=0.21", "numpy", "iopath", "tensorboard", "faster-coco-eval>=1.6"]
DECLARED += ['wandb; extra == "wandb"', "opencv-python-headless; extra == 'detectron2'", 'ruff; extra == "dev"']
VERSIONS = dict.fromkeys(requirements(DECLARED)[0], "9.0") | {"iopath": "0.1.9", "detectron2": "0.6", "torch": "2.9.0"}
VERSIONS["opencv-python-headless"] = "4.9"
NO_GPU = Trial(True, '{"cuda": null, "gpus": []}\n')


def report(errors: dict[str, str], versions: dict[str, str] | None = None) -> list[Finding]:
    """Findings where pieces of code that contain a key fail with its error."""

    def run(code: str) -> Trial:
        for piece, error in errors.items():
            if piece in code:
                return Trial(False, error=error)
        return NO_GPU

    return examined(run, VERSIONS if versions is None else versions)


def examined(trial: Callable[[str], Trial], versions: dict[str, str]) -> list[Finding]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(doctor, "try_python", trial)
        patch.setattr(doctor, "installed_version", {**versions, "gn-det": __version__}.get)
        patch.setattr(doctor.importlib.metadata, "requires", lambda name: DECLARED)
        return examine()


def test_all_works() -> None:
    findings = report({})
    assert {f.mark for f in findings} == {"ok", "note"}
    assert [f.what for f in findings if f.mark == "note"] == [
        "optional [wandb]: wandb not installed",
        "no GPU found: training on the CPU is slow (torch is built without CUDA)",
    ]
    assert "engine of gn-det train, eval and quickstart: detectron2, because it is installed" in findings[-1].what


def test_without_detectron2() -> None:
    """Absent is no defect."""
    versions = {k: v for k, v in VERSIONS.items() if k != "detectron2"}
    findings = report({"is_installed": "", "probe": "not tried"}, versions)
    assert "broken" not in {f.mark for f in findings}
    assert findings[-2].fix == INSTALL_PAGE and findings[-1].what.endswith("Detectron2 is not installed")


@pytest.mark.parametrize("code", ["probe('')", "probe('gn_det.detectron2.engine')"])
def test_detectron2_installed_but_broken(code: str) -> None:
    """Reported, and not passed over in silence; the fix is what the other interpreter printed."""
    trial = lambda tried: Trial(False, "pip install omegaconf\n", "an error") if code in tried else NO_GPU  # noqa: E731
    broken = [f for f in examined(trial, VERSIONS) if f.mark == "broken"]
    assert [(f.what, f.fix) for f in broken] == [
        ("Detectron2 0.6 is installed, but cannot be used: an error", "pip install omegaconf")
    ]


def test_detectron2_that_kills_the_interpreter() -> None:
    (broken,) = [f for f in report({"probe('')": "the interpreter died of signal 11"}) if f.mark == "broken"]
    assert "signal 11" in broken.what and "rebuild Detectron2" in broken.fix


def test_parts_of_detectron2_that_gn_det_does_not_need() -> None:
    errors = {"model_zoo": "ModuleNotFoundError: No module named 'pkg_resources'"}
    notes = [f for f in report(errors, VERSIONS | {"iopath": "0.1.10"}) if f.mark == "note"]
    assert "gn_det does not need it" in notes[-2].what and "iopath>=0.1.7,<0.1.10" in notes[-1].fix


def test_opencv_that_needs_a_display() -> None:
    versions = {k: v for k, v in VERSIONS.items() if "opencv" not in k} | {"opencv-python": "4.9"}
    error = "ImportError: libGL.so.1: cannot open shared object file: No such file or directory"
    broken = [f for f in report({"cv2": error}, versions) if f.mark == "broken"]
    assert [f.fix for f in broken] == ["pip uninstall -y opencv-python && pip install opencv-python-headless"]
    both = report({}, VERSIONS | {"opencv-python": "4.9"})
    assert any("overwrite each other" in f.what for f in both)


def test_missing_and_mismatched_packages() -> None:
    versions = {k: v for k, v in VERSIONS.items() if k != "tensorboard"}
    errors = {"tensorboard": "ModuleNotFoundError: ...", "torchvision": "RuntimeError: operator torchvision::nms ..."}
    broken = {f.what.split()[0]: f.fix for f in report(errors, versions) if f.mark == "broken"}
    assert broken["tensorboard"] == "pip install tensorboard"
    assert "built for another torch than 2.9.0" in broken["torchvision"]


def test_too_old() -> None:
    assert [f.fix for f in report({}, VERSIONS | {"torch": "2.5.1"}) if f.mark == "broken"] == [
        "pip install --upgrade 'torch>=2.6'"
    ]


def test_every_requirement_is_parsed() -> None:
    """All of setup.cfg's, with lowest versions; extras for users by name."""
    setup = ConfigParser()
    setup.read(Path(__file__).parents[2] / "setup.cfg")
    declared = setup["options"]["install_requires"].split()
    declared += [
        f'{line}; extra == "{extra}"'
        for extra, lines in setup["options.extras_require"].items()
        for line in lines.split()
    ]
    required, extras = requirements(declared)
    assert len(required) == len(setup["options"]["install_requires"].split()) and required["torch"] == "2.6"
    assert extras.keys() == setup["options.extras_require"].keys() - {"dev", "docs", "test"}


def test_trials() -> None:
    assert try_python("print(3)") == Trial(True, "3\n")
    assert try_python("import nowhere_at_all").error == "ModuleNotFoundError: No module named 'nowhere_at_all'"
    assert try_python("print('do this'); 1 / 0") == Trial(False, "do this\n", "ZeroDivisionError: division by zero")
    died = try_python("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    assert died.error == "the interpreter died of signal 11"


def test_command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: [Finding("broken", "x is not installed", "pip install x")])
    assert main(["doctor"]) == 1
    assert "broken  x is not installed\n        fix: pip install x\n\n1 problem found" in capsys.readouterr().out
    monkeypatch.setattr(doctor, "examine", lambda: [Finding("ok", "x 1.0")])
    assert main(["doctor"]) == 0
