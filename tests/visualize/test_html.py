"""Templates print every value as one escaped line; images and plots go in as they are."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from jinja2 import UndefinedError
from PIL import Image

from gn_det.visualize import html
from gn_det.visualize.html import jpeg_uri, render

EVIL = "<b>\"'&|*_\x1b[31m\u202e\n# x\udcff"


@pytest.fixture()
def templates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "templates").mkdir()
    monkeypatch.setattr(html, "__file__", str(tmp_path / "html.py"))
    html._environment.cache_clear()
    yield tmp_path / "templates"
    html._environment.cache_clear()


def test_values_cannot_write_markup(templates: Path) -> None:
    (templates / "t.html").write_text('<p title="{{ x }}">{{ x }}</p>\n')
    (templates / "t.md").write_text("# {{ x }}\n")
    page, text = render("t.html", x=EVIL), render("t.md", x=EVIL)
    assert page.count("&lt;b&gt;&#34;&#39;&amp;|*_\\x1b[31m\\u202e\\n# x\\udcff") == 2 and page.count("<") == 2
    assert text == "# \\<b\\>\"'&\\|\\*\\_\\\\x1b\\[31m\\\\u202e # x\\\\udcff\n"
    assert len(render("t.html", x="y" * 10**6)) < 25_000


def test_a_value_that_is_missing_is_an_error(templates: Path) -> None:
    (templates / "t.html").write_text("{{ nothing }}")
    with pytest.raises(UndefinedError):
        render("t.html")


def test_images_are_whole(templates: Path) -> None:
    (templates / "t.html").write_text("{{ uri }}")
    pixels = np.full((200, 300, 3), 70, np.uint8)
    written = render("t.html", uri=jpeg_uri(pixels))
    data = base64.b64decode(written.removeprefix("data:image/jpeg;base64,"))
    with Image.open(io.BytesIO(data)) as image:
        assert image.size == (300, 200) and abs(np.asarray(image).mean() - 70) < 2
    assert jpeg_uri(data) == written
