"""Check the headers of a COCO json's image files before training."""

from __future__ import annotations

import logging
import os
import posixpath
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from typing import Any
from urllib.parse import unquote

from gn_det.data.catalog import DatasetSource
from gn_det.data.image import ImageError, ImageReader, values_in_words, wrong_size
from gn_det.data.known_sizes import KnownSizes
from gn_det.data.problems import NOWHERE, Problem, Problems, Where
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
    names = _NearNames(root, images)
    known = KnownSizes(root, reader) if len(images) >= _REMEMBERED else None
    deep = 0
    with warnings.catch_warnings(), ThreadPoolExecutor(_THREADS) as pool:
        # Pillow warns about odd metadata and very large images; neither is an error in the dataset.
        warnings.simplefilter("ignore")
        for image, found in zip(images, pool.map(partial(_size, root, reader, known), images)):
            if step is not None:
                step()
            where = Where(image["id"], image["file_name"])
            if isinstance(found, ImageError) and found.kind == "image-missing":
                found = _by_other_name(image, names, found, problems) or _size(root, reader, known, image)
            if isinstance(found, ImageError):
                if found.kind == "image-depth" and (deep := deep + 1) <= _RANGES:
                    found = ImageError(values_in_words(os.path.join(root, image["file_name"])), found.kind)
                problems.drop(found.kind, where, found.text)
                unusable.setdefault(image["id"], Problem(found.kind, where, (found.text,)))
            elif not image["width"]:
                image["width"], image["height"] = found
                problems.repair("image-no-size", where)
    if known is not None:
        known.write()
    if images and len(unusable) == len(images):
        first = next(iter(unusable.values()))
        # a problem that a config key solves is not a problem with the folder
        settings = first.kind in ("image-depth", "image-large") and len({p.kind for p in unusable.values()}) == 1
        text = f"none of its {len(images)} images can be used from {root} (first: {first})"
        problems.refuse("image-folder", NOWHERE, text if settings else f"{text}: {advice}")
    return set(unusable)


def _size(
    root: str, reader: ImageReader, known: KnownSizes | None, image: dict[str, Any]
) -> tuple[int, int] | ImageError:
    """Return the width and height of an image file, or its error."""
    name = image["file_name"]
    path = os.path.join(root, name)
    try:
        size = reader.size(path) if known is None else known.size(name, path)
    except ImageError as error:
        return error
    expected = (image["width"], image["height"])
    return wrong_size(path, size, expected) if image["width"] and size != expected else size


class _NearNames:
    """Finds files whose names differ only in slashes, letter case, Unicode form or escapes."""

    def __init__(self, root: str, images: Sequence[dict[str, Any]]) -> None:
        self.root, self._images = root, images
        self._files: dict[str, list[str]] | None = None
        self._named: set[str] = set()

    def find(self, name: str) -> list[str]:
        """Return the files that ``name`` may mean, relative to the folder, except those of other images in the json."""
        if self._files is None:
            self._named = {os.path.normpath(image["file_name"]) for image in self._images}
            self._files = {}
            found = (os.path.join(folder, file) for folder, _, files in os.walk(self.root) for file in files)
            for path in islice(found, _MOST_FILES):
                relative = os.path.relpath(path, self.root)
                self._files.setdefault(_plain_name(relative), []).append(relative)
        return [path for path in self._files.get(_plain_name(name), ()) if path not in self._named]


def _plain_name(name: str) -> str:
    return unicodedata.normalize("NFC", posixpath.normpath(unquote(name.replace("\\", "/")))).casefold()


def _by_other_name(
    image: dict[str, Any], names: _NearNames, missing: ImageError, problems: Problems
) -> ImageError | None:
    """Correct ``image`` if its name can mean only one file; otherwise return the error with a hint."""
    given = image["file_name"]
    near = names.find(given)
    if len(near) == 1:
        image["file_name"] = near[0]
        problems.repair("image-name", Where(image["id"], given))
        return None
    hint = ""
    beside = os.path.join(names.root, os.path.basename(given.replace("\\", "/")))
    if near:
        hint = f"it may mean {some(near, 3)}: correct file_name"
    elif os.path.exists(beside):
        hint = f"there is {one_line(beside, 300)}: correct file_name"
    return ImageError(f"{missing.text}; {hint}" if hint else missing.text, missing.kind)
