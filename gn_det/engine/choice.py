"""Which engine runs: found out cheaply, and explained in one line where Detectron2 cannot be used.

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

#: What an error on importing Detectron2 contains -> the fix; "{torch}" is the installed version of torch.
_FIXES = {
    "pkg_resources": "pip install 'setuptools<81' (it has pkg_resources, which this Detectron2 still imports)",
    "iopath": "pip install 'iopath>=0.1.7,<0.1.10'",
    "too old|PIL.Image": "this Detectron2 is too old: install its current source",
    "libGL|libgthread": "pip uninstall -y opencv-python && pip install opencv-python-headless",
    "undefined symbol|cannot open shared object|_C|signal|ABI": (
        "its compiled part does not fit torch {torch}: rebuild Detectron2 with this torch"
    ),
}


class EngineError(UserError):
    """Detectron2 was asked for, or is installed, and cannot be used."""


@dataclass(frozen=True)
class Choice:
    """The engine to run.

    Attributes:
        name: "embedded" or "detectron2".
        why: half a sentence for the log.
    """

    name: str
    why: str


def is_installed() -> bool:
    """Whether Detectron2 can be found; a bare source checkout in the working directory does not count."""
    try:
        spec = importlib.util.find_spec("detectron2")
    except (ImportError, ValueError):  # a half-initialised or blocked module
        return "detectron2" in sys.modules
    return spec is not None and spec.origin is not None


def installed_version(distribution: str) -> str | None:
    """Return the version of an installed distribution, None where it is absent."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def choose(wanted: str = "auto") -> Choice:
    """Choose an engine by what is installed, without importing it.

    Raises:
        EngineError: Detectron2 is wanted and not installed.
    """
    if wanted == "embedded":
        return Choice("embedded", "as --engine says")
    if is_installed():
        why = "as --engine says" if wanted == "detectron2" else "because it is installed; or use --engine embedded"
        return Choice("detectron2", why)
    if wanted == "detectron2":
        raise EngineError(
            f"--engine detectron2: Detectron2 is not installed for this Python ({sys.executable}); see {INSTALL_PAGE}; "
            f"{_WITHOUT_IT}"
        )
    return Choice("embedded", "because Detectron2 is not installed")


def load(choice: Choice) -> Engine:
    """Import and return the chosen engine.

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
    # Warnings that a newer torch gives about Detectron2's code do not concern its user.
    for message in (r"torch\.meshgrid", r".*broadcast_buffers", r".*torch\.jit\.script"):
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("torch.fx._symbolic_trace").addFilter(lambda record: "is_fx_tracing" not in str(record.msg))
    engine: Engine = module.Detectron2Engine(choice.why)
    return engine


def import_detectron2() -> None:
    """Import all of Detectron2 that the plugin needs.

    Raises:
        Exception: whatever a broken installation raises.
    """
    # Its compiled part by name: Detectron2's own modules tolerate a broken one until something calls it.
    for name in ("detectron2", "detectron2._C", "detectron2.modeling", "detectron2.engine"):
        importlib.import_module(name)
    if not hasattr(sys.modules["detectron2.modeling"].Backbone, "padding_constraints"):
        raise ImportError("too old: detectron2.modeling.Backbone has no padding_constraints")


def error_line(error: BaseException) -> str:
    """Return type and first line of an exception."""
    return f"{type(error).__name__}: {str(error).strip()}".splitlines()[0].removesuffix(": ")


def describe(error: str, version_of: Callable[[str], str | None] = installed_version) -> str:
    """Return one line on a Detectron2 that is installed and cannot be used: cause, fix, page, way around."""
    name = f"Detectron2 {version_of('detectron2') or ''}".strip()
    return f"{name} is installed, but cannot be used ({error}): {fix(error, version_of)}; {_WITHOUT_IT}"


def fix(error: str, version_of: Callable[[str], str | None] = installed_version) -> str:
    """Return the fix for an error on importing Detectron2, with the installation page."""
    found = next((remedy for signs, remedy in _FIXES.items() if re.search(signs, error)), "")
    if not found:
        missing = re.search(r"No module named '(?!detectron2)(\w+)", error)
        found = f"pip install {missing.group(1)}" if missing else "install it again"
    return f"{found.format(torch=version_of('torch'))}; see {INSTALL_PAGE}"
