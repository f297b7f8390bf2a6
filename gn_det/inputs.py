"""What a user means by "these images": files, folders and globs, and where their drawings go."""

from __future__ import annotations

import glob
import math
import os
from collections.abc import Sequence
from pathlib import Path

from gn_det.errors import ConfigError, DataError
from gn_det.text import one_line

#: File name endings taken for images when a folder is searched.
IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".dib", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm", ".pbm", ".pnm"}
    | {".jp2", ".avif", ".tga"}
)


def collect_images(
    inputs: Sequence[str | os.PathLike[str]], *, exclude: Path | None = None
) -> tuple[list[Path], list[str]]:
    """Image files of the inputs, each once, and notes about what was passed over.

    A folder gives its images with all subfolders, sorted; hidden files and folders are left out. A file named
    outright is taken whatever its ending. A name that exists is never read as a glob (``a[1].jpg``).

    Args:
        inputs: files, folders and globs.
        exclude: a folder that is not searched where it lies inside an input folder (earlier drawings).

    Raises:
        DataError: an input does not exist, a glob matches nothing, or no image is left.
    """
    found: dict[Path, Path] = {}
    notes: list[str] = []
    for entry in inputs:
        path = Path(entry).expanduser()
        if path.is_dir():
            matches = _folder(path, notes, exclude)
        elif path.exists():
            matches = [path]
        else:
            matches = _glob(path, notes)
        for match in matches:
            found.setdefault(match.resolve(), match)
    if not found:
        raise DataError(f"no image in {', '.join(os.fspath(i) for i in inputs) or 'an empty list of inputs'}")
    return list(found.values()), notes


def _folder(folder: Path, notes: list[str], exclude: Path | None) -> list[Path]:
    images: list[Path] = []
    others: list[Path] = []
    skip = None if exclude is None else exclude.resolve()
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and (Path(root) / f).resolve() != skip)
        for name in sorted(f for f in files if not f.startswith(".")):
            (images if Path(name).suffix.lower() in IMAGE_SUFFIXES else others).append(Path(root) / name)
    if others:
        shown = ", ".join(p.name for p in others[:3]) + (", ..." if len(others) > 3 else "")
        notes.append(f"{folder}: {len(others)} file(s) are no images by their names and are skipped ({shown})")
    if not images:
        notes.append(f"{folder}: no image in this folder")
    return images


def _glob(pattern: Path, notes: list[str]) -> list[Path]:
    text = os.fspath(pattern)
    if not glob.has_magic(text):
        raise DataError(f"{text}: no such image, folder or glob")
    matches: list[Path] = []
    for match in sorted(glob.glob(text, recursive=True)):
        path = Path(match)
        if path.is_dir():
            continue
        if path.suffix.lower() in IMAGE_SUFFIXES:
            matches.append(path)
        else:
            notes.append(f"{path}: no image by its name, skipped")
    if not matches:
        raise DataError(f"{text}: no image matches this pattern")
    return matches


def output_names(paths: Sequence[Path], suffix: str = ".png") -> list[str]:
    """File name of the drawing of each image, all different: ``a/x.jpg`` and ``b/x.jpg`` become ``x.png``, ``x-2.png``.

    Names are compared without case, as Windows and macOS file systems do.
    """
    taken: set[str] = set()
    names = []
    for path in paths:
        name, number = path.stem + suffix, 1
        while name.casefold() in taken:
            number += 1
            name = f"{path.stem}-{number}{suffix}"
        taken.add(name.casefold())
        names.append(name)
    return names


def bit_depth_range(bit_depth: str) -> tuple[float, float] | None:
    """LOW and HIGH of an ``INPUT.BIT_DEPTH`` that gives a range; None for "", "full" and "percentiles".

    Raises:
        ConfigError: it is none of these.
    """
    if bit_depth in ("", "full", "percentiles"):
        return None
    try:
        low, high = (float(part) for part in bit_depth.strip("()[] ").split(","))
        if -math.inf < low < high < math.inf:
            return low, high
    except ValueError:
        pass
    raise ConfigError(
        f"INPUT.BIT_DEPTH {one_line(bit_depth)!r} is not known: use full, percentiles, or LOW,HIGH with LOW below HIGH "
        f"(such as 0,4095)"
    )
