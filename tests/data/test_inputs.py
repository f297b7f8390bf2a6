"""Inputs of predict: files, folders and globs of any name; names of drawings."""

from __future__ import annotations

import glob
import os
import unicodedata
from pathlib import Path

import pytest
from PIL import Image

from gn_det.data import inputs
from gn_det.data.inputs import collect_images, output_names
from gn_det.errors import DataError


def test_inputs(photos: Path) -> None:
    """Globs; names that look like globs; the same image named twice counts once."""
    paths, _ = collect_images([photos / "*.png", photos / "é 1.png"])
    assert sorted(p.name for p in paths) == ["a[1].png", "é 1.png"]
    assert [p.name for p in collect_images([photos / "a[1].png"])[0]] == ["a[1].png"]
    assert len(collect_images([f"{photos}/**/*"])[0]) == 4
    with pytest.raises(DataError, match="no such image"):
        collect_images([photos / "missing.png"])
    with pytest.raises(DataError, match="matches"):
        collect_images([photos / "*.webp"])
    (photos / "empty").mkdir()
    with pytest.raises(DataError, match="no image in"):
        collect_images([photos / "empty"])


def test_output_names_never_collide() -> None:
    names = output_names([Path(p) for p in ("a/x.jpg", "b/x.jpg", "b/X.png", "c/x-2.png")])
    assert len({n.casefold() for n in names}) == 4 and names[:2] == ["x.png", "x-2.png"]


def test_globs_look_at_a_folder_once_for_each_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two links that lead back would give glob 2^40 paths; the same files are found as on a plain tree."""
    deep = tmp_path / "deep"
    for level in range(12):
        deep /= str(level)
    deep.mkdir(parents=True)
    for folder in (deep, tmp_path / "deep", tmp_path):
        (folder / "x.png").write_bytes(b"")
        (folder / ".hidden.png").write_bytes(b"")
    patterns = ("**/*.png", "**/**/**/x.png", "**/deep/**/[0-9]/**/*.png", "*/x.png", "deep/?/1/**", "*.p?g", "**")
    plain = {p: {Path(f) for f in glob.glob(f"{tmp_path}/{p}", recursive=True) if f.endswith("png")} for p in patterns}
    (deep / "back").symlink_to(tmp_path)
    (deep / "again").symlink_to(tmp_path / "deep")
    looked: list[object] = []
    scandir = os.scandir
    monkeypatch.setattr("gn_det.data.inputs.os.scandir", lambda folder: (looked.append(folder), scandir(folder))[1])
    for pattern in patterns:
        looked.clear()
        found = {p.resolve() for p in collect_images([tmp_path / pattern])[0]}
        # A link may lead to one that matches by its way through the link alone.
        assert plain[pattern] <= found <= {f / "x.png" for f in (deep, tmp_path / "deep", tmp_path)}, pattern
        assert len(looked) <= 14 * (pattern.count("/") + 1)
    with pytest.raises(DataError, match="at most 32 parts"):
        collect_images(["*/" * 40 + "*.png"])


def test_links_in_a_circle_and_odd_names_are_no_inputs(photos: Path) -> None:
    (photos / "sub" / "back").symlink_to(photos)
    (photos / "self").symlink_to(photos / "self")
    assert len(collect_images([photos])[0]) == 4
    for name in ("a\0b", "a" * 300, "a/" * 3000, "*" * 5000, "~nobody-here/x.png", str(photos / "self")):
        with pytest.raises(DataError) as caught:
            collect_images([name])
        assert len(str(caught.value)) < 400 and "\0" not in str(caught.value)


def test_names_of_drawings_are_plain_short_and_quickly_made(monkeypatch: pytest.MonkeyPatch) -> None:
    odd = [
        "..png",
        "...png",
        "\x1b[31m\n.png",
        os.fsdecode(b"\xff.png"),
        "a\u202eb.jpg",
        "é.png",
        "e\u0301.png",
        "É.PNG",
    ]
    odd += ["界" * 84 + ".jpg", "界" * 84 + ".png", "x" * 255]
    names = output_names([Path("in") / name for name in odd])
    folded = {unicodedata.normalize("NFC", n).casefold() for n in names}
    assert len(folded) == len(odd) and names[2] == "_[31m_.png" and names[3] == "_.png"
    for name in names:
        assert Path(name).name == name and len(name.encode()) <= 255 and name.endswith(".png") and name.isprintable()
    made: list[str] = []
    plain = unicodedata.normalize
    monkeypatch.setattr(inputs.unicodedata, "normalize", lambda form, name: (made.append(name), plain(form, name))[1])
    assert len(set(output_names([Path(f"{i}/x.png") for i in range(5000)]))) == 5000 and len(made) < 10_001


def test_an_image_with_two_names_is_drawn_once(tmp_path: Path) -> None:
    Image.new("RGB", (4, 3)).save(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to("a.png")
    found, _ = collect_images([tmp_path, tmp_path / "b.png"])
    assert found == [tmp_path / "a.png"]
