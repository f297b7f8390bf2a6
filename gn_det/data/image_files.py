"""Check the headers of a COCO json's image files before training.

The sizes of large sets are cached in the user's cache folder. A file counts as unchanged while its length and
modification time are. The cache file is validated like any outside file; at worst, a damaged image goes unnoticed until
it is read.
"""

from __future__ import annotations

import hashlib
import logging
import os
import posixpath
import time
import unicodedata
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import unquote

import msgspec

from gn_det.data.catalog import DatasetSource
from gn_det.data.image import ImageError, ImageReader, wrong_size
from gn_det.data.problems import NOWHERE, Problem, Problems, Where
from gn_det.errors import WriteError
from gn_det.files import atomic_write, open_regular
from gn_det.text import one_line, some

logger = logging.getLogger(__name__)

_THREADS = 16
#: From this number of images on, the log announces the check, because it takes a while.
_MANY_IMAGES = 20_000
#: From this number of images on, sizes are cached for the next run.
_REMEMBERED = 2000
#: How many images of more than 8 bits are reported with their range of values, which means decoding them.
_RANGES = 3
#: How many files of an image folder are searched for a misspelled name.
_MOST_FILES = 1_000_000
#: Larger cache files (bytes) are ignored.
_LARGEST = 1 << 30
#: A file modified this recently may change again without a new time stamp (nanoseconds).
_SETTLED = 2 * 10**9
_Side = Annotated[int, msgspec.Meta(ge=1, le=2**31)]


def look_at_images(
    images: Sequence[dict[str, Any]],
    source: DatasetSource,
    problems: Problems,
    step: Callable[[], object] | None = None,
    reader: ImageReader | None = None,
) -> set[Any]:
    """Return the ids of images that are missing, damaged, or not of the size in the json.

    Missing sizes, and names that differ only in spelling from the one file they can mean, are corrected in ``images``.

    Args:
        images: those of a :class:`gn_det.data.coco_json.CocoJson`.
        source: where the files are.
        problems: receives each problem, and refuses the set if no image can be used.
        step: called after each image.
        reader: the reader that will be used for the images.
    """
    reader = reader or ImageReader()
    root, advice = source.image_root, f"check {source.origin or 'the image folder'}"
    if not os.path.isdir(root):
        what = "is not a folder" if os.path.exists(root) else "does not exist"
        problems.stop("image-folder", f"the image folder {root} {what}: {advice}")
    if len(images) > _MANY_IMAGES:
        logger.info("%s: checking the headers of %d images", source.name, len(images))
    unusable: dict[Any, Problem] = {}
    near_names = cache(partial(_unnamed_files, root, images))
    known = KnownSizes(root, reader, remember=len(images) >= _REMEMBERED)
    deep = 0
    with warnings.catch_warnings(), ThreadPoolExecutor(_THREADS) as pool:
        # Pillow warns about odd metadata and very large images; neither is an error in the dataset.
        warnings.simplefilter("ignore")
        for image, found in zip(images, pool.map(partial(_size, known), images)):
            if step is not None:
                step()
            where = Where(image["id"], image["file_name"])
            if isinstance(found, ImageError) and found.kind == "image-missing":
                found = _by_other_name(image, root, near_names(), found, problems) or _size(known, image)
            if isinstance(found, ImageError):
                if found.kind == "image-depth" and (deep := deep + 1) <= _RANGES:
                    try:
                        reader.read(os.path.join(root, image["file_name"]))
                    except ImageError as error:
                        found = error  # with the range of values
                problems.drop(found.kind, where, found.text)
                unusable.setdefault(image["id"], Problem(found.kind, where, (found.text,)))
            elif not image["width"]:
                image["width"], image["height"] = found
                problems.repair("image-no-size", where)
    known.write()
    if images and len(unusable) == len(images):
        first = next(iter(unusable.values()))
        by_key = {problem.kind for problem in unusable.values()} <= {"image-depth", "image-large"}
        hint = "" if by_key else f": {advice}"  # a problem that a config key solves is none of the folder
        text = f"none of its {len(images)} images can be used from {root} (first: {first}){hint}"
        problems.refuse("image-folder", NOWHERE, text)
    return set(unusable)


def _size(known: KnownSizes, image: dict[str, Any]) -> tuple[int, int] | ImageError:
    """Return the width and height of an image file, or its error."""
    path = os.path.join(known.root, image["file_name"])
    try:
        size = known.size(image["file_name"], path)
    except ImageError as error:
        return error
    expected = (image["width"], image["height"])
    return wrong_size(path, size, expected) if image["width"] and size != expected else size


def _unnamed_files(root: str, images: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Return the files below ``root`` that no image names, by their names without what tools write differently."""
    named = {os.path.normpath(image["file_name"]) for image in images}
    files: dict[str, list[str]] = {}
    found = (os.path.join(folder, file) for folder, _, names in os.walk(root) for file in names)
    for path in islice((os.path.relpath(path, root) for path in found), _MOST_FILES):
        if path not in named:
            files.setdefault(_plain_name(path), []).append(path)
    return files


def _plain_name(name: str) -> str:
    return unicodedata.normalize("NFC", posixpath.normpath(unquote(name.replace("\\", "/")))).casefold()


def _by_other_name(
    image: dict[str, Any], root: str, files: dict[str, list[str]], missing: ImageError, problems: Problems
) -> ImageError | None:
    """Correct ``image`` if its name can mean only one file; otherwise return the error with a hint."""
    given = image["file_name"]
    near = files.get(_plain_name(given), [])
    if len(near) == 1:
        image["file_name"] = near[0]
        problems.repair("image-name", Where(image["id"], given))
        return None
    beside = os.path.join(root, os.path.basename(given.replace("\\", "/")))
    if near:
        return ImageError(f"{missing.text}; it may mean {some(near, 3)}: correct file_name", missing.kind)
    if os.path.exists(beside):
        return ImageError(f"{missing.text}; there is {one_line(beside, 300)}: correct file_name", missing.kind)
    return missing


# ------------------------------------------------------------ known sizes


class _Known(msgspec.Struct, forbid_unknown_fields=True):
    """``files``: name to length, modification time in nanoseconds, width and height."""

    version: Literal[1]
    files: dict[str, tuple[int, int, _Side, _Side]]


class KnownSizes:
    """Sizes of the files below one folder for one image reader, cached if ``remember`` is set."""

    def __init__(self, root: str, reader: ImageReader, *, remember: bool = True) -> None:
        self.root, self._reader, self._remember = root, reader, remember
        key = repr((os.path.abspath(root), bool(reader.bit_depth), reader.max_pixels))
        caches = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
        name = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=16).hexdigest()
        self.path = caches / "gn_det" / "image_sizes" / f"{name}.json"
        self._files = _read(self.path) if remember else {}
        self._found: dict[str, tuple[int, int, int, int]] = {}

    def size(self, name: str, path: str) -> tuple[int, int]:
        """Return :meth:`ImageReader.size` of the file ``name``; opens it only if it is new or has changed."""
        try:
            status = os.stat(path)
        except (OSError, ValueError):
            return self._reader.size(path)
        length, changed, width, height = self._files.get(name, (-1, 0, 1, 1))
        if (length, changed) == (status.st_size, status.st_mtime_ns) and width * height <= self._reader.max_pixels:
            return width, height
        size = self._reader.size(path)
        if name.isprintable() and time.time_ns() - status.st_mtime_ns > _SETTLED:
            self._found[name] = (status.st_size, status.st_mtime_ns, *size)
        return size

    def write(self) -> None:
        """Write new entries; ignore a cache that cannot be written."""
        if self._found and self._remember:
            content = msgspec.json.encode(_Known(1, {**self._files, **self._found}))
            with suppress(WriteError):
                atomic_write(self.path, content)


def _read(path: Path) -> Mapping[str, tuple[int, int, int, int]]:
    with suppress(OSError, ValueError, RecursionError, msgspec.MsgspecError), open_regular(path) as file:
        data = file.read(_LARGEST + 1)
        if len(data) <= _LARGEST:
            return msgspec.json.decode(data, type=_Known).files
    return {}
