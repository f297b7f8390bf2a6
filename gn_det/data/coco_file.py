"""The COCO json as a whole: parsing it, and the mistakes that make all of it ambiguous."""

from __future__ import annotations

import codecs
import gzip
import io
import json
import os
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Container
from dataclasses import dataclass, field
from typing import Any, NoReturn

from gn_det.data.catalog import DatasetSource
from gn_det.data.checks import is_number
from gn_det.data.problems import FileProblem, Problems, Where
from gn_det.files import StrPath, open_regular
from gn_det.text import one_line, shown

_GZIP = b"\x1f\x8b"
#: A gzipped json may unpack to so many bytes, or to so many times its size. Annotations shrink about tenfold.
_UNZIPPED, _RATIO = 64 << 20, 100


@dataclass
class CocoFile:
    """Raw entries, whose structure was checked: images sorted by id, annotations grouped by image.

    Attributes:
        images: ``id``, ``file_name``, ``width`` and ``height`` of the usable images; 0 where the json has no usable
            size (:func:`gn_det.data.coco.look_at_images` then takes it from the file).
        annotations_of: annotations by image id, as in the file but for new ids.
        class_names, category_ids: in order of the ids.
        left_out: positions in the file's list of the annotations that are in no group.
        new_ids: new id by position, for those that had none of their own.
        has_annotations: False for a test json, which has no ``annotations`` key.
    """

    images: list[dict[str, Any]]
    annotations_of: dict[Any, list[dict[str, Any]]]
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    left_out: set[int] = field(default_factory=set)
    new_ids: dict[int, int] = field(default_factory=dict)
    has_annotations: bool = True


def read_coco_file(
    source: DatasetSource, problems: Problems | None = None, *, need_annotations: bool = True
) -> CocoFile:
    """Parse and check the structure of ``source.json_file``.

    Args:
        source: the json and its images.
        problems: where bad entries and repairs are reported; by default they are dropped and made in silence.
        need_annotations: refuse a json without ``annotations``.

    Raises:
        DataError: not found, not json, not COCO's instances format, no images or categories; and what ``problems``
            refuses (repeated ids), unless it goes on.
    """
    problems = problems or Problems(source.json_file)
    return structure(parse(source, problems), problems, need_annotations=need_annotations)


def structure(data: dict[str, Any], problems: Problems, *, need_annotations: bool = True) -> CocoFile:
    """The second half of :func:`read_coco_file`, on a json that is parsed already; ``data`` is not changed."""
    if need_annotations and "annotations" not in data:
        keys = ", ".join(one_line(key, 40) for key in list(data)[:6]) or "none"
        problems.stop(
            "json-structure",
            f"{problems.path}: key 'annotations' is missing (keys: {keys}): give a COCO instances json",
        )
    category_ids, class_names = _categories(data.get("categories"), problems)
    content = CocoFile([], {}, class_names, category_ids, has_annotations="annotations" in data)
    content.images, dropped = _images(data.get("images"), problems)
    _group_annotations(data.get("annotations", []), content, dropped, problems)
    return content


def parse(source: DatasetSource, problems: Problems) -> dict[str, Any]:
    """The json object of ``source.json_file``.

    Raises:
        DataError: not found, not readable, no json, no object.
    """
    where = f"check {source.origin}" if source.origin else "check the path"
    if source.origin == "DETECTRON2_DATASETS":
        where = (
            "put the dataset there, set the environment variable DETECTRON2_DATASETS to its parent folder, or give "
            "your own data (--train-json, --train-images, --val-json, --val-images)"
        )
    data = read_json(source.json_file, f"annotation file of dataset {shown(source.name)}", where)
    if not isinstance(data, dict):
        problems.stop(
            "json-structure",
            f"{source.json_file}: holds a {type(data).__name__}, not an object with images, annotations and "
            f"categories: give a COCO instances json (a list is what COCO *results* look like)",
        )
    return data


def read_json(path: StrPath, what: str = "COCO json", advice: str = "check the path") -> Any:
    """The content of a json file in UTF-8, UTF-16 or UTF-32, gzipped or not.

    Args:
        path: a regular file.
        what: the file, for the message when it is absent.
        advice: what to do then.

    Raises:
        FileProblem: not found, not readable or no json; one line that names the cause.
    """

    def stop(text: str) -> NoReturn:
        raise FileProblem("json-unreadable", f"{os.fspath(path)}: {text}")

    try:
        with open_regular(path) as file:
            data = file.read()
    except FileNotFoundError:
        stop(f"{what} not found: {advice}")
    except (OSError, ValueError) as error:
        if os.path.isdir(path):
            stop(f"is a folder, a COCO json file is needed: {advice}")
        stop(f"cannot be read ({error.strerror if isinstance(error, OSError) else error}): {advice}")
    try:
        if data.startswith(_GZIP):
            data = _unzipped(data)
        text = data.decode(json.detect_encoding(data))
        return json.loads(text)
    except json.JSONDecodeError as error:
        cause = f"{error.msg} in line {error.lineno}, column {error.colno}"
        if not text.strip():
            cause = "the file is empty"
        elif re.match(r"\s*[{\[]\s*'", text):
            cause = "keys are in single quotes, as Python prints a dict: write it with json.dump instead"
        stop(f"not a json file ({cause}): export or download the annotations again")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        chinese = " (it is GBK, it seems)" if _is_text(data[: 1 << 20], "gbk") else ""
        stop(
            f"not a json file (not UTF-8 text{chinese}, line {line}): save it as UTF-8, such as with "
            f"iconv -f {'GBK' if chinese else 'ITS_ENCODING'} -t UTF-8"
        )
    except RecursionError:
        stop("not a COCO json file (its lists are nested too deeply): export or download it again")
    except (OSError, EOFError, ValueError, zlib.error) as error:
        stop(f"cannot be read ({one_line(error)}): {advice}")


def _unzipped(data: bytes) -> bytes:
    """The content of a gzip file; ValueError where it is larger than any json would be."""
    limit = max(_UNZIPPED, _RATIO * len(data))
    with gzip.GzipFile(fileobj=io.BytesIO(data)) as file:
        out = file.read(limit + 1)
    if len(out) > limit:
        raise ValueError(f"unpacks to more than {limit >> 20} MiB: unpack it with gunzip if you trust it")
    return out


def _is_text(data: bytes, encoding: str) -> bool:
    try:
        codecs.getincrementaldecoder(encoding)().decode(data)  # the last character may be cut
    except UnicodeDecodeError:
        return False
    return True


def resolve_id(value: Any, known: Container[Any]) -> Any:
    """The id in ``known`` that ``value`` means, written as ``77``, ``77.0`` or ``"77"``; None where there is none."""
    value = whole(value)
    if not isinstance(value, (int, str)):
        return None
    if value in known:
        return value
    other: Any = str(value) if isinstance(value, int) else _number(value)
    return other if other is not None and other in known else None


def whole(value: Any) -> Any:
    """``77`` for ``77.0``; anything else as it is."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def category_id(value: Any) -> int | None:
    """A category's id as an integer, where it is one or is written as ``1.0`` or ``"1"``."""
    value = _number(value) if isinstance(value, str) else whole(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _number(text: str) -> int | None:
    return int(text) if re.fullmatch(r"-?[0-9]{1,18}", text) else None


#: What is said where ids are not written as integers.
_ID_TYPE = "ids are written as floats or as text: read as whole numbers"


def _categories(entries: Any, problems: Problems) -> tuple[tuple[int, ...], tuple[str, ...]]:
    if not isinstance(entries, list) or not entries:
        problems.stop(
            "categories-missing",
            f'{problems.path}: no \'categories\': add one entry {{"id": 1, "name": ...}} for each class',
        )
    found: dict[int, str] = {}
    for entry in entries:
        number = category_id(entry.get("id")) if isinstance(entry, dict) else None
        if number is None or not isinstance(entry.get("name"), str):
            problems.refuse("category-malformed", f"category {shown(entry)} needs an integer 'id' and a text 'name'")
            continue
        name = entry["name"]
        if type(entry["id"]) is not int:
            problems.repair("id-type", _ID_TYPE, Where(file=f"category {name}"))
        if number in found:
            kind = "category-copy" if name == found[number] else "category-id-repeated"
            text = f"category id {number} appears more than once: give every category its own id"
            names = f" ({shown(found[number])}, {shown(name)})"
            problems.refuse(kind, text if name == found[number] else text + names)
            continue
        found[number] = name
    ordered = sorted(found.items())
    uses = Counter(name for _, name in ordered)
    for name in (n for n, count in uses.items() if count > 1):
        ids = one_line(", ".join(str(number) for number, other in ordered if other == name))
        problems.refuse(
            "category-name-repeated",
            f"category name {shown(name)} is used by ids {ids}: give every category its own name",
        )
    return tuple(number for number, _ in ordered), tuple(name for _, name in ordered)


def _images(entries: Any, problems: Problems) -> tuple[list[dict[str, Any]], set[Any]]:
    """Usable images sorted by id, and the ids of those that are not usable."""
    if not isinstance(entries, list) or not entries:
        problems.stop(
            "images-missing",
            f"{problems.path}: no 'images': give a COCO instances json that lists at least one image",
        )
    images: dict[Any, dict[str, Any]] = {}
    ambiguous: set[Any] = set()
    for position, entry in enumerate(entries):
        number = whole(entry.get("id")) if isinstance(entry, dict) else None
        if not isinstance(number, (int, str)):
            problems.refuse("image-no-id", f"entry {position} of 'images' has no 'id' (an integer): add it")
            continue
        if type(number) is not type(entry["id"]):
            problems.repair("id-type", _ID_TYPE, Where(number, str(entry.get("file_name"))))
        if number in images:
            names = f"{one_line(images[number].get('file_name'))}, {one_line(entry.get('file_name'))}"
            copy = all(entry.get(k) == images[number].get(k) for k in ("file_name", "width", "height"))
            problems.refuse(
                "image-copy" if copy else "image-id-repeated",
                f"image id {one_line(number, 60)} appears more than once ({names}): give every image its own id",
                Where(number, str(entry.get("file_name"))),
            )
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
            problems.drop("image-entry", "'file_name' is missing: add it", Where(number))
            continue
        sized = _is_pixel_count(entry.get("width")) and _is_pixel_count(entry.get("height"))
        size = {key: int(entry[key]) if sized else 0 for key in ("width", "height")}
        good.append({"id": number, "file_name": name, **size})
    # Text ids are rare but legal; numbers first keeps the order defined where both occur.
    good.sort(key=lambda i: (isinstance(i["id"], str), i["id"]))
    return good, set(images) - {i["id"] for i in good}


def _is_pixel_count(value: Any) -> bool:
    return is_number(value) and value >= 1 and value == int(value)


#: What is wrong with an annotation's id, by kind.
_ID_PROBLEMS = {
    "annotation-no-id": "have no integer id",
    "annotation-id-zero": "have id 0 or below (COCO's evaluation counts these as missed)",
    "annotation-id-repeated": "repeat another annotation's id",
}


def _group_annotations(entries: Any, content: CocoFile, dropped: set[Any], problems: Problems) -> None:
    """Assign annotations to images; give new ids where they are missing, 0 or used twice."""
    if not isinstance(entries, list):
        problems.stop(
            "json-structure", f"{problems.path}: 'annotations' is a {type(entries).__name__}, a list is needed"
        )
    groups: defaultdict[Any, list[dict[str, Any]]] = defaultdict(list)
    known = {image["id"] for image in content.images}
    seen: dict[Any, dict[str, Any]] = {}
    largest = max((e["id"] for e in entries if isinstance(e, dict) and type(e.get("id")) is int), default=0)
    largest = max(largest, 0)
    for position, entry in enumerate(entries):
        if not isinstance(entry, dict):
            problems.drop("annotation-entry", f"entry {position} of 'annotations' is not an object: {shown(entry, 40)}")
            content.left_out.add(position)
            continue
        given, number = entry.get("image_id"), whole(entry.get("id"))
        image = resolve_id(given, known)
        if image is None:
            # Annotations of an image that is itself listed as bad would only repeat that message.
            if resolve_id(given, dropped) is None:
                text = f"image_id {shown(given)} is not in 'images': add the image, or remove the annotation"
                problems.drop("image-unknown", text, Where(annotation=number))
            content.left_out.add(position)
            continue
        where = Where(image, annotation=number)
        if type(image) is not type(given) or type(number) is not type(entry.get("id")):
            problems.repair("id-type", _ID_TYPE, where)
            entry = {**entry, "image_id": image, "id": number}
        kind = _id_problem(number, seen)
        if kind == "annotation-id-repeated" and entry == seen[number]:
            what = "annotations are exact copies of another one: left out"
            problems.repair("annotation-copy", what, where)
            content.left_out.add(position)
            continue
        if kind:
            what = f"annotations {_ID_PROBLEMS[kind]}: renumbered in memory, renumber the file for other COCO tools"
            problems.repair(kind, what, where)
            largest += 1
            content.new_ids[position] = largest
            entry = {**entry, "id": largest}
        else:
            seen[number] = entry
        groups[image].append(entry)
    content.annotations_of = dict(groups)


def _id_problem(number: Any, seen: dict[Any, dict[str, Any]]) -> str:
    if type(number) is not int:
        return "annotation-no-id"
    if number <= 0:
        return "annotation-id-zero"
    return "annotation-id-repeated" if number in seen else ""
