"""MkDocs hook: show docstrings, which are written for reStructuredText, in a Markdown page."""

from __future__ import annotations

import re
from typing import Any

_ROLE = re.compile(r":(?:func|class|mod|meth|data|attr|exc):(?=<code>)")
_LITERAL = re.compile(r"::</p>")


def on_page_content(html: str, **_: Any) -> str:
    """Drop the roles before names (``:func:``) and the second colon before literal blocks."""
    return _LITERAL.sub(":</p>", _ROLE.sub("", html)).replace("<code>~", "<code>")
