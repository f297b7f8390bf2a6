"""What a user means by "these images": files, folders and globs, and where their drawings go."""

from __future__ import annotations

import fnmatch
import glob
import os
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from gn_det.errors import DataError
from gn_det.text import one_line

#: Longest name of a path, and of a file, that common file systems take (bytes).
_PATH_MAX, _NAME_MAX = 4096, 255
#: Parts of a glob with wildcards; each costs a look at every folder.
_MOST_PARTS = 32

#: File name endings taken for images when a folder is searched.
IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm", ".pnm"}
    | {".jp2", ".avif", ".tga"}
)


def collect_images(
    inputs: Sequence[str | os.PathLike[str]], *, exclude: Path | None = None
) -> tuple[list[Path], list[str]]:
    """Image files of the inputs, each once, and notes about what was passed over.

    A folder gives its images with all subfolders, sorted; hidden files and folders are left out, and links to folders
    are not followed. A file named outright is taken whatever its ending. A name that exists is never read as a glob
    (``a[1].jpg``). A glob follows links, but looks at no folder twice for the same part of the pattern.

    Args:
        inputs: files, folders and globs.
        exclude: a folder that is not searched where it lies inside an input folder (earlier drawings).

    Raises:
        DataError: an input does not exist, a glob matches nothing, or no image is left.
    """
    found: dict[Path, Path] = {}
    notes: list[str] = []
    for entry in inputs:
        path = _expanded(entry)
        if os.path.isdir(path):
            matches = _folder(path, notes, exclude)
        elif os.path.exists(path):
            matches = [path]
        else:
            matches = _glob(path, notes)
        for match in matches:
            found.setdefault(Path(os.path.realpath(match)), match)
    if not found:
        named = ", ".join(one_line(os.fspath(i)) for i in inputs[:3]) + (", ..." if len(inputs) > 3 else "")
        raise DataError(f"no image in {named or 'an empty list of inputs'}")
    return list(found.values()), notes


def _expanded(entry: str | os.PathLike[str]) -> Path:
    """The path without ``~``, refused where no file system has such a name."""
    text = os.fspath(entry)
    if not text:
        raise DataError("an input is an empty name; give an image, a folder or a glob")
    if "\0" in text or len(text.encode("utf-8", "surrogatepass")) > _PATH_MAX:
        raise DataError(f"{one_line(text)}: no file can have this name; give an image, a folder or a glob")
    return Path(os.path.expanduser(text))


def _folder(folder: Path, notes: list[str], exclude: Path | None) -> list[Path]:
    images: list[Path] = []
    others: list[Path] = []
    skip = None if exclude is None else exclude.resolve()
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and (Path(root) / f).resolve() != skip)
        for name in sorted(f for f in files if not f.startswith(".")):
            (images if Path(name).suffix.lower() in IMAGE_SUFFIXES else others).append(Path(root) / name)
    if others:
        notes.append(f"{folder}: {len(others)} file(s) are no images by their names and are skipped ({_first(others)})")
    if not images:
        notes.append(f"{folder}: no image in this folder")
    return images


def _glob(pattern: Path, notes: list[str]) -> list[Path]:
    name = one_line(os.fspath(pattern))
    if not glob.has_magic(os.fspath(pattern)):
        raise DataError(f"{name}: no such image, folder or glob")
    if sum(glob.has_magic(part) for part in pattern.parts) > _MOST_PARTS:
        raise DataError(f"{name}: a pattern may have at most {_MOST_PARTS} parts with wildcards")
    matches = [path for path in _matching(pattern) if not os.path.isdir(path)]
    images = [path for path in matches if path.suffix.lower() in IMAGE_SUFFIXES]
    others = [path for path in matches if path.suffix.lower() not in IMAGE_SUFFIXES]
    if others:
        notes.append(f"{name}: {len(others)} file(s) are no images by their names and are skipped ({_first(others)})")
    if not images:
        raise DataError(f"{name}: no image matches this pattern")
    return images


def _first(paths: Sequence[Path]) -> str:
    return ", ".join(one_line(p.name) for p in paths[:3]) + (", ..." if len(paths) > 3 else "")


def _matching(pattern: Path) -> list[Path]:
    """What ``glob.glob(pattern, recursive=True)`` finds, each once, sorted.

    It tries every split of a path among the ``**`` of a pattern and follows links in circles; here each part of the
    pattern looks at a folder once.
    """
    parts = pattern.parts
    found: set[Path] = set()
    seen: set[tuple[int, int, int]] = set()
    todo = [(Path(pattern.anchor), int(bool(pattern.anchor)))]
    while todo:
        folder, at = todo.pop()
        part, last = parts[at], at == len(parts) - 1
        if part != "**" and not glob.has_magic(part):
            if last and os.path.lexists(folder / part):
                found.add(folder / part)
            elif not last:
                todo.append((folder / part, at + 1))
            continue
        entries = _entries(folder, at, seen)
        if part == "**":
            # No folder at all, or one more; the last ** takes files as well.
            todo += [] if last else [(folder, at + 1)]
            todo += [(folder / e.name, at) for e in entries if not e.name.startswith(".") and os.path.isdir(e)]
            found.update(folder / e.name for e in entries if last and not e.name.startswith("."))
            continue
        fits = re.compile(fnmatch.translate(os.path.normcase(part))).match
        for entry in entries:
            if (part.startswith(".") or not entry.name.startswith(".")) and fits(os.path.normcase(entry.name)):
                if last:
                    found.add(folder / entry.name)
                elif os.path.isdir(entry):
                    todo.append((folder / entry.name, at + 1))
    return sorted(found)


def _entries(folder: Path, at: int, seen: set[tuple[int, int, int]]) -> list[os.DirEntry[str]]:
    """Of a folder, nothing where it cannot be read or was ``seen`` for this part of the pattern."""
    try:
        status = os.stat(folder)
        key = (status.st_dev, status.st_ino, at)
        if key in seen:
            return []
        seen.add(key)
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        return []


#: Unicode's categories of control and format characters, surrogates, unassigned ones and line breaks.
_UNSAFE = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def _cut(stem: str, ending: str) -> str:
    room = _NAME_MAX - len(ending.encode())
    return stem.encode()[:room].decode("utf-8", "ignore") + ending


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def output_names(paths: Sequence[Path], suffix: str = ".png") -> list[str]:
    """File name of the drawing of each image, all different: ``a/x.jpg`` and ``b/x.jpg`` become ``x.png``, ``x-2.png``.

    Names are compared without case and accents' forms, as Windows and macOS file systems do; they are cut to what a
    file system takes, and hold ``_`` for control characters and bytes that are not UTF-8.
    """
    taken: set[str] = set()
    counts: dict[str, int] = {}
    names = []
    for path in paths:
        stem = "".join("_" if unicodedata.category(c) in _UNSAFE else c for c in path.stem)
        name = _cut(stem, suffix)
        while _plain(name) in taken:
            # Counted for each stem: many images of one name do not try all numbers again.
            counts[stem] = counts.get(stem, 1) + 1
            name = _cut(stem, f"-{counts[stem]}{suffix}")
        taken.add(_plain(name))
        names.append(name)
    return names
