"""Resolve input images given as files, folders and globs, and name their drawings."""

from __future__ import annotations

import fnmatch
import glob
import os
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from gn_det.errors import DataError
from gn_det.text import one_line, some

#: Longest path and file name on common file systems, in bytes.
_PATH_MAX, _NAME_MAX = 4096, 255
#: Most parts with wildcards in a glob; each one scans every folder.
_MOST_PARTS = 32

#: File extensions that count as images when a folder is searched.
IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm", ".pnm"}
    | {".jp2", ".avif", ".tga"}
)


def collect_images(
    inputs: Sequence[str | os.PathLike[str]], *, exclude: Path | None = None
) -> tuple[list[Path], list[str]]:
    """Return the image files of the inputs, each once, and notes about what was skipped.

    A folder yields its images and those of all subfolders, sorted. Hidden files and folders are skipped, and links to
    folders are not followed. A file named explicitly is taken whatever its extension. A name that exists is never read
    as a glob (``a[1].jpg``). A glob follows links, but visits a folder only once for each part of the pattern.

    Args:
        inputs: files, folders and globs.
        exclude: folder to skip inside an input folder (earlier drawings).

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
        raise DataError(f"no image in {some(map(os.fspath, inputs), 3) or 'an empty list of inputs'}")
    return list(found.values()), notes


def _expanded(entry: str | os.PathLike[str]) -> Path:
    """Expand ``~``, and refuse names that no file system allows."""
    text = os.fspath(entry)
    if not text:
        raise DataError("an input name is empty; give an image, a folder or a glob")
    if "\0" in text or len(text.encode("utf-8", "surrogatepass")) > _PATH_MAX:
        raise DataError(f"{one_line(text)}: not a valid file name; give an image, a folder or a glob")
    return Path(os.path.expanduser(text))


def _folder(folder: Path, notes: list[str], exclude: Path | None) -> list[Path]:
    found: list[Path] = []
    skip = None if exclude is None else exclude.resolve()
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and (Path(root) / f).resolve() != skip)
        found += [Path(root) / name for name in sorted(files) if not name.startswith(".")]
    images = _images_of(found, str(folder), notes)
    if not images:
        notes.append(f"{folder}: no images in this folder")
    return images


def _glob(pattern: Path, notes: list[str]) -> list[Path]:
    name = one_line(os.fspath(pattern))
    if not glob.has_magic(os.fspath(pattern)):
        raise DataError(f"{name}: no such image, folder or glob")
    if sum(glob.has_magic(part) for part in pattern.parts) > _MOST_PARTS:
        raise DataError(f"{name}: a pattern may have at most {_MOST_PARTS} parts with wildcards")
    images = _images_of([path for path in _matching(pattern) if not os.path.isdir(path)], name, notes)
    if not images:
        raise DataError(f"{name}: no image matches this pattern")
    return images


def _images_of(paths: Sequence[Path], where: str, notes: list[str]) -> list[Path]:
    """Return the paths with an image extension, and note the others."""
    others = [path for path in paths if path.suffix.lower() not in IMAGE_SUFFIXES]
    if others:
        notes.append(f"{where}: skipped {len(others)} without an image extension ({some([p.name for p in others], 3)})")
    return [path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES]


def _matching(pattern: Path) -> list[Path]:
    """Return what ``glob.glob(pattern, recursive=True)`` finds, each once, sorted.

    glob tries every way to split a path among the ``**`` of a pattern and follows links in circles. Here each part of
    the pattern visits a folder once.
    """
    parts = pattern.parts
    found: set[Path] = set()
    seen: set[tuple[int, int, int]] = set()
    todo = [(Path(pattern.anchor), int(bool(pattern.anchor)))]
    while todo:
        folder, at = todo.pop()
        part, last = parts[at], at == len(parts) - 1
        if glob.has_magic(part):
            names = fnmatch.filter(_entries(folder, at, seen), "*" if part == "**" else part)
            matches = [folder / name for name in names if part.startswith(".") or not name.startswith(".")]
        else:
            matches = [folder / part] if os.path.lexists(folder / part) else []
        if last:
            found.update(matches)
        folders = [path for path in matches if os.path.isdir(path)]
        if part == "**":  # any number of folders, or none
            todo += [(path, at) for path in folders]
            folders = [folder]
        if not last:
            todo += [(path, at + 1) for path in folders]
    return sorted(found)


def _entries(folder: Path, at: int, seen: set[tuple[int, int, int]]) -> list[str]:
    """Return the names in a folder; empty if it cannot be read or was ``seen`` for this part of the pattern."""
    try:
        status = os.stat(folder)
        key = (status.st_dev, status.st_ino, at)
        if key in seen:
            return []
        seen.add(key)
        with os.scandir(folder) as entries:
            return [entry.name for entry in entries]
    except OSError:
        return []


#: Unicode's categories of control and format characters, surrogates, unassigned ones and line breaks.
_UNSAFE = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def output_names(paths: Sequence[Path], suffix: str = ".png") -> list[str]:
    """Return a unique file name for the drawing of each image: ``x.png`` and ``x-2.png`` for ``a/x.jpg``, ``b/x.jpg``.

    Names are compared ignoring case and Unicode form, as Windows and macOS do. They are cut to the longest name that
    file systems allow, with ``_`` for control characters and bytes that are not UTF-8.
    """
    names: dict[str, str] = {}
    counts: dict[str, int] = {}
    for path in paths:
        stem = "".join("_" if unicodedata.category(c) in _UNSAFE else c for c in path.stem)
        ending = suffix
        while True:
            name = stem.encode()[: _NAME_MAX - len(ending.encode())].decode("utf-8", "ignore") + ending
            plain = unicodedata.normalize("NFC", name).casefold()
            if plain not in names:
                break
            # Count per stem, so that many images of one name do not retry all numbers.
            counts[stem] = counts.get(stem, 1) + 1
            ending = f"-{counts[stem]}{suffix}"
        names[plain] = name
    return list(names.values())
