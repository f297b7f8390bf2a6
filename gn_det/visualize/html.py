"""Reports from templates: one page that needs nothing else, with no script, no network and all images inside.

Every value that a template prints is made one printable line of bounded length and then escaped, so that names from
outside cannot write HTML or Markdown; plots are :class:`markupsafe.Markup` and are printed as they are.
"""

from __future__ import annotations

import base64
import functools
import re
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from gn_det.about import __version__
from gn_det.text import as_line, one_line
from gn_det.visualize.colors import hex_color
from gn_det.visualize.draw import jpeg_bytes

#: Characters of a printed value.
_LONGEST = 10_000


def render(template: str, **context: Any) -> str:
    """Fill in a template of ``gn_det/visualize/templates``: ``.html`` is escaped for HTML, ``.md`` for Markdown."""
    found = _environment(template.endswith(".html")).get_template(template)
    return found.render(version=__version__, hex_color=hex_color, **context)


@functools.lru_cache(maxsize=2)
def _environment(html: bool) -> Environment:
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        finalize=_html_line if html else _markdown_line,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _html_line(value: Any) -> Any:
    return value if isinstance(value, Markup) else as_line(value, _LONGEST)


def _markdown_line(value: Any) -> Markup:
    if isinstance(value, Markup):
        return value
    return Markup(re.sub(r"([\\|*_<>\[\]`])", r"\\\1", one_line(str(value), None)))


def jpeg_uri(image: np.ndarray | bytes) -> Markup:
    """(H, W, 3) uint8 RGB pixels, or the bytes of a JPEG file, as a data URI."""
    if isinstance(image, np.ndarray):
        image = jpeg_bytes(image)
    return Markup("data:image/jpeg;base64," + base64.b64encode(image).decode("ascii"))
