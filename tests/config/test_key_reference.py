"""The page of all config keys is that of the schema."""

from __future__ import annotations

from pathlib import Path

import pytest

from gn_det.cli import main
from gn_det.config.key_reference import key_reference
from gn_det.config.schema import KEYS


def test_the_page_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    """Otherwise: ``gn-det configs --keys > docs/reference/config.md``."""
    page = Path(__file__).resolve().parents[2] / "docs" / "reference" / "config.md"
    assert main(["configs", "--keys"]) == 0
    assert capsys.readouterr().out == key_reference() == page.read_text(encoding="utf-8")


def test_every_key_has_a_row() -> None:
    rows = [line for line in key_reference().splitlines() if line.startswith("| `")]
    assert len(rows) == len(KEYS) and all(row.count(" | ") == 3 for row in rows)
