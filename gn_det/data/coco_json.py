"""Parse a COCO json, and find the mistakes that make it ambiguous as a whole."""

from __future__ import annotations

import codecs
import gc
import gzip
import io
import json
import os
import re
import zlib
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn

import msgspec
import numpy as np

from gn_det.data.annotations import is_number, number_in, resolve_id, whole
from gn_det.data.catalog import DatasetSource
from gn_det.data.entries import LARGEST_ID, Entries
from gn_det.data.problems import NOWHERE, FileProblem, Problem, Problems, Where
from gn_det.files import StrPath, open_regular
from gn_det.text import one_line, shown, some

_GZIP = b"\x1f\x8b"
#: A gzipped json may unpack to this many bytes, or to this multiple of its size. Annotations shrink about tenfold.
_UNZIPPED, _RATIO = 64 << 20, 100
#: A class name that configs can store. A checkpoint's keys of metrics, such as "segm/AP-NAME", have at most 512
#: characters.
_NAME = re.compile(r"[^\x00-\x1f\x7f-\x9f\ud800-\udfff]{1,480}")


@dataclass
class CocoJson:
    """Images and annotations with a checked structure."""

    #: ``id``, ``file_name``, ``width`` and ``height`` of the usable images, sorted by id. Sizes that the json
    #: lacks are 0; :func:`gn_det.data.image_files.look_at_images` then reads them from the file.
    images: list[dict[str, Any]]
    class_names: tuple[str, ...]  # in the order of the ids
    category_ids: tuple[int, ...]
    entries: Entries  # the annotations, in file order
    image_of: np.ndarray  # (N,) int64 index into ``images`` of each annotation; -1 if it is dropped
    changed: dict[int, dict[str, Any]] = field(default_factory=dict)  # whose ids differ from the file, by position
    #: reason why an annotation is dropped, by position: a kind of problem, or "" if its image is dropped
    left_out: dict[int, str] = field(default_factory=dict)
    new_ids: dict[int, int] = field(default_factory=dict)  # by position, for annotations without a unique id
    has_annotations: bool = True  # False for a test json, which has no ``annotations`` key

    def annotation(self, position: int) -> dict[str, Any]:
        """Return the annotation at a position of the file, with its new ids."""
        entry: dict[str, Any] = self.changed.get(position) or self.entries[position]
        return entry

    def images_with_objects(self) -> np.ndarray:
        """Return the indices of images with a non-crowd annotation, sound or not."""
        crowd = self.entries.crowd.copy()
        for position, entry in self.changed.items():
            crowd[position] = bool(entry.get("iscrowd"))
        return np.unique(self.image_of[~crowd & (self.image_of >= 0)])

    def find(self, image: Any, annotation: Any) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """Return an image and one of its annotations by their ids."""
        index = next((i for i, entry in enumerate(self.images) if entry["id"] == image), None)
        found = map(self.annotation, np.flatnonzero(self.image_of == index).tolist()) if index is not None else ()
        entry = next((a for a in found if a.get("id") == annotation), None)
        return None if entry is None or index is None else (self.images[index], entry)


@contextmanager
def collector_paused() -> Iterator[None]:
    """Turn the garbage collector off: a json has millions of lists and no cycles."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def read_coco_json(
    source: DatasetSource, problems: Problems | None = None, *, need_annotations: bool = True
) -> CocoJson:
    """Parse and check the structure of ``source.json_file``.

    Args:
        source: the json and its images.
        problems: receives bad entries and repairs; by default they are dropped and made silently.
        need_annotations: refuse a json without ``annotations``.

    Raises:
        DataError: not found, not json, not COCO's instances format, no images or categories, or refused by ``problems``
            (repeated ids).
    """
    advice = f"check {source.origin or 'the path'}"
    if source.origin == "DETECTRON2_DATASETS":
        advice = (
            "put the dataset there, set the environment variable DETECTRON2_DATASETS to its parent folder, or give "
            "your own data (--train-json, --train-images, --val-json, --val-images)"
        )
    what = f"annotation file of dataset {shown(source.name)}"
    data = read_json(source.json_file, what, advice, keep_text=True)
    return structure(data, problems or Problems(source.json_file), need_annotations=need_annotations)


def structure(data: Any, problems: Problems, *, need_annotations: bool = True) -> CocoJson:
    """Check the structure of a parsed json, without changing ``data``; see :func:`read_coco_json`."""
    if not isinstance(data, Mapping):
        what = f"holds a {type(data).__name__}, not an object with images, annotations and categories"
        problems.stop("json-structure", f"{what} (a list is what COCO *results* look like)")
    if need_annotations and "annotations" not in data:
        problems.stop("json-structure", f"key 'annotations' is missing (keys: {some(data, 6)})")
    category_ids, class_names = _categories(data.get("categories"), problems)
    images, dropped = _images(data.get("images"), problems)
    annotations = data.get("annotations", [])
    if not isinstance(annotations, (list, Entries)):
        problems.stop("json-structure", f"'annotations' is a {type(annotations).__name__}, not a list")
    entries = Entries(annotations) if isinstance(annotations, list) else annotations
    image_of = np.full(len(entries), -1)
    content = CocoJson(images, class_names, category_ids, entries, image_of, has_annotations="annotations" in data)
    _assign(content, dropped, problems)
    return content


class _File(msgspec.Struct):
    """A COCO json whose annotations are kept as text."""

    images: Any
    categories: Any
    annotations: list[msgspec.Raw]


def read_json(
    path: StrPath, what: str = "COCO json", advice: str = "check the path", *, keep_text: bool = False
) -> Any:
    """Read a json file in UTF-8, UTF-16 or UTF-32, gzipped or not.

    Args:
        path: a regular file.
        what: name of the file in the message if it is missing.
        advice: what to do in that case.
        keep_text: return ``annotations`` as :class:`gn_det.data.entries.Entries` if the file is in COCO's format and in
            UTF-8, which takes a fifth of the time and memory.

    Raises:
        FileProblem: not found, not readable or not json; one line that names the cause.
    """

    def stop(text: str) -> NoReturn:
        raise FileProblem(os.fspath(path), Problem("json-unreadable", details=(text,)))

    try:
        with open_regular(path) as file:
            data = bytearray(os.fstat(file.fileno()).st_size)  # file.read() gives bytes, which tensors cannot share
            del data[file.readinto(data) :]  # type: ignore[attr-defined]
        if data.startswith(_GZIP):
            data = _unzipped(data)
        if keep_text and (content := _with_text(data)) is not None:
            return content
        text = data.decode(json.detect_encoding(data))
        with collector_paused():
            return json.loads(text)
    except FileNotFoundError:
        stop(f"{what} not found: {advice}")
    except json.JSONDecodeError as error:
        cause = f"{error.msg} in line {error.lineno}, column {error.colno}"
        if not text.strip():
            cause = "the file is empty"
        elif re.match(r"\s*[{\[]\s*'", text):
            cause = "keys are in single quotes, like a printed Python dict: write it with json.dump instead"
        stop(f"not a json file ({cause}): export or download the annotations again")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        advice = "save it as UTF-8, such as with iconv -f ITS_ENCODING (perhaps GBK) -t UTF-8"
        stop(f"not a json file (not UTF-8 text, line {line}): {advice}")
    except RecursionError:
        stop("not a COCO json file (lists are nested too deeply): export or download it again")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        stop(f"cannot be read ({getattr(error, 'strerror', None) or one_line(error)}): {advice}")


def _with_text(data: bytearray) -> dict[str, Any] | None:
    """Return the sections of a COCO json, ``annotations`` as :class:`Entries`; None if the json module must read it."""
    try:
        decoder = codecs.getincrementaldecoder("utf-8")()  # unparsed parts must be valid text, too
        for start in range(0, 0 if data.isascii() else len(data), 1 << 20):
            decoder.decode(data[start : start + (1 << 20)])
        with collector_paused():
            file = msgspec.json.decode(data, type=_File)
            return {**msgspec.structs.asdict(file), "annotations": Entries(file.annotations, data)}
    except (ValueError, RecursionError, msgspec.MsgspecError):
        return None


def _unzipped(data: bytearray) -> bytearray:
    """Unpack a gzip file; raise ValueError if it is larger than any plausible json."""
    limit = max(_UNZIPPED, _RATIO * len(data))
    with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
        out = file.read(limit + 1)
    if len(out) > limit:
        raise ValueError(f"unpacks to more than {limit >> 20} MiB: unpack it with gunzip if you trust it")
    return bytearray(out)


def category_id(value: Any) -> int | None:
    """Return a category id as an integer if it is ``1``, ``1.0`` or ``"1"``, else None."""
    value = number_in(value) if isinstance(value, str) else whole(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _categories(entries: Any, problems: Problems) -> tuple[tuple[int, ...], tuple[str, ...]]:
    if not isinstance(entries, list) or not entries:
        problems.stop("categories-missing")
    found: dict[int, str] = {}
    for entry in entries:
        number, name = (category_id(entry.get("id")), entry.get("name")) if isinstance(entry, dict) else (None, None)
        if number is None or not isinstance(name, str) or not _NAME.fullmatch(name):
            problems.refuse("category-malformed", NOWHERE, shown(entry))
            continue
        if type(entry["id"]) is not int:
            problems.repair("id-type", Where(file=f"category {name}"))
        if name == found.get(number):
            problems.refuse("category-copy", NOWHERE, number)
        elif number in found:
            problems.refuse("category-id-repeated", NOWHERE, number, shown(found[number]), shown(name))
        else:
            found[number] = name
    found = dict(sorted(found.items()))
    ids_of = defaultdict(list)
    for number, name in found.items():
        ids_of[name].append(str(number))
    for name, ids in ids_of.items():
        if len(ids) > 1:
            problems.refuse("category-name-repeated", NOWHERE, shown(name), some(ids))
    return tuple(found), tuple(found.values())


def _images(entries: Any, problems: Problems) -> tuple[list[dict[str, Any]], set[Any]]:
    """Return the usable images sorted by id, and the ids of the others."""
    if not isinstance(entries, list) or not entries:
        problems.stop("images-missing")
    images: dict[Any, dict[str, Any]] = {}
    ambiguous: set[Any] = set()
    for position, entry in enumerate(entries):
        number = whole(entry.get("id")) if isinstance(entry, dict) else None
        if not isinstance(number, (int, str)):
            problems.refuse("image-no-id", NOWHERE, position)
            continue
        if type(number) is not type(entry["id"]):
            problems.repair("id-type", Where(number, str(entry.get("file_name"))))
        if number in images:
            first = images[number]
            copy = all(entry.get(k) == first.get(k) for k in ("file_name", "width", "height"))
            details = one_line(number, 60), one_line(first.get("file_name")), one_line(entry.get("file_name"))
            where = Where(number, str(entry.get("file_name")))
            problems.refuse("image-copy" if copy else "image-id-repeated", where, *details)
            if not copy:
                ambiguous.add(number)
            continue
        images[number] = entry
    good = []
    for number, entry in images.items():
        name = entry.get("file_name")
        if number in ambiguous:
            continue
        if not isinstance(name, str) or not name:
            problems.drop("image-entry", Where(number), "'file_name' is missing")
            continue
        size = {key: whole(entry.get(key)) for key in ("width", "height")}
        if not all(is_number(v) and isinstance(v, int) and v >= 1 for v in size.values()):
            size = {"width": 0, "height": 0}
        good.append({"id": number, "file_name": name, **size})
    # Text ids are rare but legal; sorting numbers first defines the order when both occur.
    good.sort(key=lambda i: (isinstance(i["id"], str), i["id"]))
    return good, set(images) - {i["id"] for i in good}


def _assign(content: CocoJson, dropped: set[Any], problems: Problems) -> None:
    """Find the image of each annotation; replace ids that are missing, 0 or used twice."""
    entries, position_of = content.entries, {image["id"]: i for i, image in enumerate(content.images)}
    unsound = {position: entries[position] for position in np.flatnonzero(~entries.sound).tolist()}
    ids = [whole(e.get("id")) for e in unsound.values() if isinstance(e, dict)]
    ids = [i for i in ids if type(i) is int and 0 < i <= LARGEST_ID]
    largest = max(int(entries.id.max(initial=0)), max(ids, default=0))
    # Sound annotations with a known image and a unique id need nothing else.
    used, uses = np.unique(np.concatenate([entries.id[entries.sound], np.array(ids, np.int64)]), return_counts=True)
    found = np.array([position_of.get(i, -1) for i in entries.image_id.tolist()], np.int64)
    plain = entries.sound & (found >= 0) & ~np.isin(entries.id, used[uses > 1])
    content.image_of[plain] = found[plain]
    seen: dict[Any, dict[str, Any]] = {}
    for position in np.flatnonzero(~plain).tolist():
        entry = unsound[position] if position in unsound else entries[position]
        if not isinstance(entry, dict):
            problems.drop("annotation-entry", NOWHERE, position, shown(entry, 40))
            content.left_out[position] = "annotation-entry"
            continue
        given, number = entry.get("image_id"), entry.get("id")
        image = resolve_id(given, position_of)
        if image is None:
            # The image itself is already listed as bad.
            content.left_out[position] = "" if resolve_id(given, dropped) is not None else "image-unknown"
            if content.left_out[position]:
                problems.drop("image-unknown", Where(annotation=whole(number)), shown(given))
            continue
        if type(image) is not type(given) or type(number) is float:
            number = whole(number)
            if type(image) is not type(given) or type(number) is int:
                problems.repair("id-type", Where(image, annotation=number))
            entry = {**entry, "image_id": image, "id": number}
        kind = ""
        if type(number) is not int or number > LARGEST_ID:
            kind = "annotation-no-id"
        elif number <= 0:
            kind = "annotation-id-zero"
        elif number in seen:
            kind = "annotation-copy" if entry == seen[number] else "annotation-id-repeated"
        if kind:
            problems.repair(kind, Where(image, annotation=number))
            if kind == "annotation-copy":
                content.left_out[position] = kind
                continue
            largest += 1
            content.new_ids[position] = largest
            entry = {**entry, "id": largest}
        else:
            seen[number] = entry
        content.image_of[position] = position_of[image]
        content.changed[position] = entry
