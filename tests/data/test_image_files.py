"""A file that was checked before is not opened again while its length and time are the same; any cache is harmless."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gn_det.data import image_files
from gn_det.data.catalog import DatasetSource
from gn_det.data.coco import load_coco
from gn_det.data.image import ImageReader
from gn_det.data.image_files import KnownSizes
from gn_det.errors import DataError
from tests.data.own_coco import write


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DatasetSource:
    """A set whose files are old enough, with a cache of its own."""
    monkeypatch.setattr(image_files, "_REMEMBERED", 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "set").mkdir()
    source = write(tmp_path / "set")
    age(tmp_path / "set")
    return source


def age(folder: Path) -> None:
    for path in folder.glob("*.png"):
        os.utime(path, (1e9, 1e9))


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    size = ImageReader.size

    def noted(self: ImageReader, path: Any) -> tuple[int, int]:
        names.append(Path(path).name)
        return size(self, path)

    monkeypatch.setattr(ImageReader, "size", noted)
    return names


def outcome(source: DatasetSource, **reader: Any) -> tuple[str, list[str], list[str]]:
    data = load_coco(source, max_bad=10, reader=ImageReader(**reader))
    return str(list(data.records)), data.bad, data.notes


def test_only_changed_files_are_opened_again(source: DatasetSource, opened: list[str]) -> None:
    first = outcome(source)
    assert len(opened) == 4
    opened.clear()
    assert outcome(source) == first and opened == []
    changed = Path(source.image_root) / "im 6é.png"
    Image.fromarray(np.zeros((31, 40, 3), np.uint8)).save(changed)  # another length, another time, another size
    assert "is 40x31 pixels" in outcome(source)[1][0] and opened == ["im 6é.png"]
    (Path(source.image_root) / "im 7é.png").unlink()
    assert "image not found" in outcome(source)[1][1]


def test_files_that_have_just_changed_are_not_remembered(source: DatasetSource, opened: list[str]) -> None:
    (Path(source.image_root) / "im 6é.png").touch()
    outcome(source)
    opened.clear()
    outcome(source)
    assert opened == ["im 6é.png"]


def test_damaged_files_are_never_remembered(source: DatasetSource, opened: list[str]) -> None:
    bad = Path(source.image_root) / "im 5é.png"
    bad.write_bytes(bad.read_bytes()[:600])
    age(bad.parent)
    first = outcome(source)
    assert len(first[1]) == 1
    assert outcome(source) == first and opened[4:] == ["im 5é.png"]


def test_other_settings_have_another_cache(source: DatasetSource) -> None:
    outcome(source)
    with pytest.raises(DataError, match="none of its 4 images can be used"):
        outcome(source, max_pixels=1000)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[" * 100_000,
        b"\xff\xfe",
        b'{"version": 1, "files": {"im 5\xc3\xa9.png": [1, 2, 0, 4]}}',
        b'{"version": 1, "files": {"im 5\xc3\xa9.png": ["a", 2, 3, 4]}}',
        b'{"version": 2, "files": {}}',
        b'{"version": 1, "files": {"im 5\xc3\xa9.png": [9999, 2, 3, 4]}, "more": 1}',
        b'{"version": 1, "files": {"im 5\xc3\xa9.png": [1e400, 2, 3, 4]}}',
    ],
)
def test_a_hostile_cache_changes_nothing(source: DatasetSource, content: bytes) -> None:
    first = outcome(source)
    path = KnownSizes(source.image_root, ImageReader()).path
    assert path.is_file() and path.stat().st_size > 100
    path.write_bytes(content)
    assert outcome(source) == first


def test_a_cache_that_is_no_file(source: DatasetSource) -> None:
    path = KnownSizes(source.image_root, ImageReader()).path
    if hasattr(os, "mkfifo"):
        path.parent.mkdir(parents=True)
        os.mkfifo(path)
    assert not outcome(source)[1]
    assert not path.is_file()
