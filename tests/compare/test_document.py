"""The report needs nothing but itself, shows text as text, and stays small."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from gn_det.compare import document
from gn_det.compare.document import _drawings, write_report
from gn_det.compare.outcomes import Results
from gn_det.compare.runner import Store
from gn_det.config import get_cfg
from gn_det.engine.engines import Engine
from gn_det.visualize.html import jpeg_uri
from tests.compare.cases import BN, GN, Fake, pretrain_row, results

EVIL = "<script>alert('x')</script> & \"GN\" | *bold*"


class Page(HTMLParser):
    """Tags, their attributes, and the text of a page; unbalanced tags are an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def written(found: Results, root: Path) -> str:
    write_report(found, Store(root), "today")
    return (root / "report.html").read_text(encoding="utf-8")


def with_samples(monkeypatch: pytest.MonkeyPatch, title: str, images: int, rows: int = 1, size: int = 20) -> None:
    """JPEGs that cannot be compressed, as if they had been drawn."""
    uri = jpeg_uri(np.random.default_rng(0).bytes(size))
    monkeypatch.setattr(document, "_samples", lambda results, store: [(title, [uri] * images)] * rows)


def test_page_is_self_contained_and_escapes_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {**BN, "title": EVIL, "note": EVIL},
        {**GN, "labels": {"norm": EVIL}},
        pretrain_row("pre", title=EVIL),
    ]
    found = results(tmp_path, rows, 2, title=EVIL, note=EVIL)
    with_samples(monkeypatch, EVIL, 2)
    text = written(found, tmp_path)
    page = Page(text)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    loaded = [v for _, attrs in page.tags for k, v in attrs.items() if k in ("src", "href", "srcset", "data")]
    assert len(loaded) == 2 and all(str(v).startswith("data:image/jpeg;base64,") for v in loaded)
    assert not re.search(r"url\((?!#)|@import|https?://|xlink:href=\"(?!#)", text)
    assert sum(EVIL in word for word in page.words) >= 6
    assert "prefers-color-scheme: dark" in text
    assert sum(tag == "svg" for tag, _ in page.tags) == 5  # four of detection, one of pre-training
    markdown = (tmp_path / "report.md").read_text()
    assert "<script>" not in markdown and "\\<script\\>" in markdown
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", line)) > 3 for line in lines)
    assert text == written(found, tmp_path)  # the same every time


@pytest.fixture()
def no_charts(monkeypatch: pytest.MonkeyPatch) -> None:
    """They cost most of the time of a report."""
    monkeypatch.setattr(document, "charts", lambda results, table: [])


@pytest.mark.usefixtures("no_charts")
def test_markdown_tables_are_tables(tmp_path: Path) -> None:
    """Head, rule and rows of one length on lines of their own, with an empty line before and behind."""
    written(results(tmp_path, [BN, GN], 3), tmp_path)
    blocks = (tmp_path / "report.md").read_text(encoding="utf-8").split("\n\n")
    tables = [block.splitlines() for block in blocks if block.startswith("|")]
    assert len(tables) == 4 and blocks[0] == "# case" and any(block == "## Findings" for block in blocks)
    for table in tables:
        assert len(table) >= 4 and len({line.count("|") for line in table}) == 1 and table[1].startswith("| :-- |")


def test_a_report_of_many_rows_and_long_curves_stays_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """15 rows and 4,000 logged points, 4 sample images of 40 kB for each of 16 lines."""
    found = results(tmp_path, [BN, *({**GN, "id": f"gn{i}", "title": EVIL} for i in range(14))], 1)
    rng = np.random.default_rng(0)
    for result in found.rows:
        for record in result.done:
            values = rng.random(4000)
            record.curve = [{"x": 45.0 * i, "loss": values[i]} for i in range(4000)]
            record.curve += [{"x": 9000.0 * i, "box_ap": values[i], "mask_ap": values[-i]} for i in range(20)]
    with_samples(monkeypatch, "row", 4, 16, 40_000)
    text = written(found, tmp_path)
    assert text.count("<img") == 64 and 64 * 50_000 < len(text) < 5_000_000


@pytest.mark.usefixtures("no_charts")
def test_many_findings_within_the_noise_are_folded(tmp_path: Path) -> None:
    rows = [BN, *({**GN, "id": f"gn{i}", "reference": []} for i in range(9))]
    values = {"bn": 30.0, "gn0": 35.0, **{f"gn{i}": 30.0 for i in range(1, 9)}}
    text = written(results(tmp_path, rows, 3, Fake(values=values)), tmp_path)
    shown, _, folded = text.partition("<details><summary>8 more that are not larger than the noise")
    assert "gn0 against bn: +5.0" in shown and "gn1 against bn" not in shown and "gn8 against bn" in folded
    assert "About 1 in 20 intervals excludes zero by chance" in folded


@pytest.mark.usefixtures("no_charts")
def test_settings_are_shown_by_their_difference(tmp_path: Path) -> None:
    found = results(tmp_path, [BN, GN])
    found.rows[1].done[0].config = "MODEL:\n  MASK_ON: false\nSEED: 3"
    text = written(found, tmp_path)
    changed = text.partition("Differs from bn in:")[2].partition("</pre>")[0]
    assert "-  MASK_ON: true" in changed and "+  MASK_ON: false" in changed and "SEED" not in changed


def test_names_leave_no_attribute_and_no_line_of_their_own(tmp_path: Path) -> None:
    """Quotes, control characters, line breaks and half a surrogate pair, in everything that a suite names."""
    evil = "\" ' onload=alert(1) ><img src=x onerror=alert(2)>\x1b[31m\x9b\u202e\n| forged | row |\udcff"
    rows = [{**BN, "title": evil, "note": evil}, {**GN, "title": evil, "labels": {evil: evil}}]
    found = results(tmp_path, rows, 2, title=evil, note=evil)
    page = Page(written(found, tmp_path))
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert "img" not in {tag for tag, _ in page.tags}
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    for text in ("".join(page.words), markdown):
        assert not set(text) & set("\x1b\x9b\u202e") and "\n| forged" not in text and "\\udcff" in text
    assert evil in json.loads((tmp_path / "results.json").read_text(encoding="utf-8")).values()


def test_samples_are_spread_over_the_images_with_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    class Images(SimpleNamespace):
        class_names = ("a",)
        records = tuple({"file_name": f"{number}.png"} for number in range(5))

        def __len__(self) -> int:
            return 5

    dataset, drawn = Images(), list[str]()

    def draw(image: str, *_: Any, **size: Any) -> np.ndarray:
        drawn.append(image)
        return np.zeros((4, 4, 3), np.uint8)

    monkeypatch.setattr("gn_det.data.sets.load_first_test_set", lambda cfg: dataset)
    monkeypatch.setattr("gn_det.data.image.ImageReader.read", lambda self, path: str(path))
    monkeypatch.setattr("gn_det.visualize.draw.draw_annotations", draw)
    for found, expected in (([0, 1, 0, 2, 1], ["1.png", "4.png"]), ([0] * 5, ["0.png", "4.png"])):
        dataset.object_counts = found
        drawn.clear()
        assert len(list(_drawings(get_cfg(), None, Engine(), 2))) == 2 and drawn == expected
