"""Parts of reports that are one HTML page and need nothing else: no script, no network, pictures inside."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from gn_det.text import as_line

#: Characters of a line in a page.
_LONGEST = 10_000


def escape(value: str) -> str:
    """Any text on one line of bounded length, harmless in HTML and in its attributes."""
    return html.escape(as_line(value, _LONGEST))


def as_data_uri(pixels: np.ndarray) -> str:
    """(H, W, 3) uint8 RGB as a JPEG inside a URI."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=86)
    return jpeg_uri(buffer.getvalue())


def jpeg_uri(data: bytes) -> str:
    """The bytes of a JPEG file inside a URI."""
    return "data:image/jpeg;base64," + base64.b64encode(data).decode("ascii")


def figure(uri: str, caption: str) -> str:
    """A picture with its caption."""
    return f'<figure><img src="{uri}" alt="{escape(caption)}"><figcaption>{escape(caption)}</figcaption></figure>'


def svg(parts: Sequence[str], width: float, height: float) -> str:
    """An inline drawing that scales with the page."""
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img">{"".join(parts)}</svg>'


def document(title: str, style: str, body: Sequence[str]) -> str:
    """A whole page; ``title`` is escaped, ``body`` is HTML."""
    return "\n".join(
        [
            '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width,initial-scale=1">',
            f"<title>{escape(title)}</title><style>{style}</style></head><body><main>",
            *body,
            "</main></body></html>",
        ]
    )
