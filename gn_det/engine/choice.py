"""Which engine trains: found out cheaply, chosen openly, and explained in one line where Detectron2 cannot be used.

Nothing heavy is imported here before an engine is loaded.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import logging
import re
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gn_det.errors import UserError

if TYPE_CHECKING:
    from gn_det.engine.engines import Engine

INSTALL_PAGE = "https://detectron2.readthedocs.io/en/latest/tutorials/install.html"

#: Values of ``--engine``.
ENGINES = ("auto", "embedded", "detectron2")

_WITHOUT_IT = "--engine embedded runs without it"


class EngineError(UserError):
    """Detectron2 was asked for, or is installed, and cannot be used."""


@dataclass(frozen=True)
class Choice:
    """The engine that is to run.

    Attributes:
        name: "embedded" or "detectron2".
        why: half a sentence for the log.
    """

    name: str
    why: str


def is_installed() -> bool:
    """Whether there is a Detectron2 to import; a mere folder of that name (its checkout) is none."""
    try:
        spec = importlib.util.find_spec("detectron2")
    except (ImportError, ValueError):  # a half-initialised or blocked module
        return "detectron2" in sys.modules
    return spec is not None and spec.origin is not None


def installed_version(distribution: str) -> str | None:
    """Version of an installed distribution, None where it is absent."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def choose(wanted: str = "auto") -> Choice:
    """Decide by what is installed, without importing it.

    Raises:
        EngineError: Detectron2 is wanted and not installed.
    """
    if wanted == "embedded":
        return Choice("embedded", "as --engine says")
    if not is_installed():
        if wanted == "detectron2":
            raise EngineError(
                f"--engine detectron2: Detectron2 is not installed; install it for this Python ({sys.executable}) as "
                f"{INSTALL_PAGE} says; {_WITHOUT_IT}"
            )
        return Choice("embedded", "because Detectron2 is not installed")
    if wanted == "detectron2":
        return Choice("detectron2", "as --engine says")
    return Choice("detectron2", "because it is installed; --engine embedded is the other one")


def load(choice: Choice) -> Engine:
    """The chosen engine, imported.

    Raises:
        EngineError: Detectron2 is installed and broken, or too old; one line with the cause, the fix, its installation
            page and the way around it.
    """
    if choice.name == "embedded":
        from gn_det.engine.engines import Engine

        return Engine(choice.why)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Detectron2 still uses what torch has deprecated
            import_detectron2()
            module = importlib.import_module("gn_det.detectron2.engine")
    except Exception as error:
        raise EngineError(describe(error_line(error))) from error
    _be_quiet()
    return module.Detectron2Engine(choice.why)


def _be_quiet() -> None:
    """Of what Detectron2 does to a newer torch, nothing concerns the user of a run."""
    for message in (r"torch\.meshgrid", r".*broadcast_buffers", r".*torch\.jit\.script"):
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("torch.fx._symbolic_trace").addFilter(_no_news)


def _no_news(record: logging.LogRecord) -> bool:
    return "is_fx_tracing" not in str(record.msg)


def import_detectron2() -> None:
    """Import all of Detectron2 that the plugin needs, its compiled part by name.

    Raises:
        Exception: whatever a broken installation raises.
    """
    importlib.import_module("detectron2")
    # Its own modules put up with a missing or unfitting compiled part until somebody calls it.
    importlib.import_module("detectron2._C")
    modeling = importlib.import_module("detectron2.modeling")
    importlib.import_module("detectron2.engine")
    if not hasattr(modeling.Backbone, "padding_constraints"):
        raise ImportError("too old: detectron2.modeling.Backbone has no padding_constraints")


def error_line(error: BaseException) -> str:
    """Type and first line of an exception."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def describe(error: str, version_of: Callable[[str], str | None] = installed_version) -> str:
    """One line on a Detectron2 that is installed and cannot be used: cause, fix, page, way around."""
    version = version_of("detectron2")
    name = f"Detectron2 {version}" if version else "Detectron2"
    return f"{name} is installed, but cannot be used ({error}): {fix(error, version_of)}; {_WITHOUT_IT}"


def fix(error: str, version_of: Callable[[str], str | None] = installed_version) -> str:
    """The exact fix for an error on importing Detectron2, and its installation page."""
    return f"{_fix(error, version_of)}; see {INSTALL_PAGE}"


def _fix(error: str, version_of: Callable[[str], str | None]) -> str:
    if "pkg_resources" in error:
        return "pip install 'setuptools<81' (it has pkg_resources, which this Detectron2 still imports)"
    if "iopath" in error:
        return "pip install 'iopath>=0.1.7,<0.1.10'"
    if "too old" in error or "PIL.Image" in error:
        return "this Detectron2 is too old: install its current source"
    if "libGL" in error or "libgthread" in error:
        return "pip uninstall -y opencv-python && pip install opencv-python-headless"
    if any(sign in error for sign in ("undefined symbol", "cannot open shared object", "_C", "signal", "ABI")):
        return f"its compiled part does not fit torch {version_of('torch')}: build Detectron2 anew with this torch"
    missing = re.search(r"No module named '([\w.]+)'", error)
    if missing and not missing.group(1).startswith("detectron2"):
        return f"pip install {missing.group(1).split('.')[0]}"
    return "install it again"
