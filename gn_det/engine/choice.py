"""Choose an engine cheaply, and explain in one line why Detectron2 cannot be used.

Nothing heavy is imported before an engine is loaded.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import logging
import sys
import warnings
from typing import TYPE_CHECKING, NamedTuple

from gn_det.errors import UserError

if TYPE_CHECKING:
    from gn_det.engine.engines import Engine

INSTALL_PAGE = "https://detectron2.readthedocs.io/en/latest/tutorials/install.html"

#: Values of ``--engine``.
ENGINES = ("auto", "embedded", "detectron2")

_WITHOUT_IT = "--engine embedded runs without it"

#: What fails on importing Detectron2 (package, or its age) -> the fix.
_FIXES = {
    "pkg_resources": "pip install 'setuptools<81' (it has pkg_resources, which this Detectron2 still imports)",
    "iopath": "pip install 'iopath>=0.1.7,<0.1.10'",
    "cv2": "pip uninstall -y opencv-python && pip install opencv-python-headless",
    **dict.fromkeys(("PIL", "its age"), "this Detectron2 is too old: install its current source"),
}


class EngineError(UserError):
    """Detectron2 was requested, or is installed, but cannot be used."""


class Choice(NamedTuple):
    """The engine to run ("embedded" or "detectron2"), and the reason for the log."""

    name: str
    why: str


def is_installed() -> bool:
    """Return whether Detectron2 is installed; a bare source checkout in the working directory does not count."""
    try:
        spec = importlib.util.find_spec("detectron2")
    except (ImportError, ValueError):  # a half-initialized or blocked module
        return "detectron2" in sys.modules
    return spec is not None and spec.origin is not None


def installed_version(distribution: str) -> str | None:
    """Return the version of a distribution, or None if it is not installed."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def choose(wanted: str = "auto") -> Choice:
    """Choose an engine by what is installed, without importing it; raise EngineError if it is not the wanted one."""
    if wanted == "embedded":
        return Choice("embedded", "as --engine says")
    if is_installed():
        why = "as --engine says" if wanted == "detectron2" else "because it is installed; or use --engine embedded"
        return Choice("detectron2", why)
    if wanted == "detectron2":
        what = f"--engine detectron2: Detectron2 is not installed for this Python ({sys.executable})"
        raise EngineError(f"{what}; see {INSTALL_PAGE}; {_WITHOUT_IT}")
    return Choice("embedded", "because Detectron2 is not installed")


def load(choice: Choice) -> Engine:
    """Import and return the chosen engine; EngineError has cause, fix, installation page and workaround on one line."""
    if choice.name == "embedded":
        from gn_det.engine.engines import Engine

        return Engine(choice.why)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Detectron2 uses deprecated functions of torch
            import_detectron2()
            module = importlib.import_module("gn_det.detectron2.engine")
    except Exception as error:
        name = f"Detectron2 {installed_version('detectron2') or ''}".strip()
        what = f"{name} is installed, but cannot be used ({error_line(error)}): {fix(error)}"
        raise EngineError(f"{what}; {_WITHOUT_IT}") from error
    # Hide warnings of a newer torch about Detectron2's code.
    for message in (r"torch\.meshgrid", r".*broadcast_buffers", r".*torch\.jit\.script"):
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("torch.fx._symbolic_trace").addFilter(lambda record: "is_fx_tracing" not in str(record.msg))
    engine: Engine = module.Detectron2Engine(choice.why)
    return engine


def import_detectron2() -> None:
    """Import all of Detectron2 that the plugin needs; raises whatever a broken installation raises."""
    # Import the compiled part explicitly: Detectron2's modules tolerate a broken one until it is called.
    for name in ("detectron2", "detectron2._C", "detectron2.modeling", "detectron2.engine"):
        importlib.import_module(name)
    if not hasattr(sys.modules["detectron2.modeling"].Backbone, "padding_constraints"):
        raise ImportError("too old: detectron2.modeling.Backbone has no padding_constraints", name="its age")


def error_line(error: BaseException) -> str:
    """Return type and first line of an exception."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0].removesuffix(": ")


def probe(module: str = "") -> None:
    """For a fresh interpreter: import Detectron2, and ``module``; on failure print the fix, and raise."""
    try:
        importlib.import_module(module) if module else import_detectron2()
    except Exception as error:
        print(fix(error))
        raise


def fix(error: BaseException | None) -> str:
    """Return the fix for an exception on importing Detectron2; None: a crash, as of a part for another torch."""
    place = error.name if isinstance(error, ImportError) else None
    if isinstance(error, AttributeError):  # a module lacks a name, possibly since an upgrade
        place = getattr(error.obj, "__name__", None)
    package = (place or "").partition(".")[0]
    if error is None or (package == "detectron2" and isinstance(error, ImportError)):
        torch = installed_version("torch")
        found = f"its compiled part does not fit torch {torch}: rebuild Detectron2 with this torch"
    elif package in _FIXES:
        found = _FIXES[package]
    elif isinstance(error, ModuleNotFoundError) and package:
        found = f"pip install {package}"
    else:
        found = "install it again"
    return f"{found}; see {INSTALL_PAGE}"
