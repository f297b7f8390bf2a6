"""The COCO json as a whole: parsing it, and the mistakes that make all of it ambiguous."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gn_det.data.catalog import DatasetSource
from gn_det.data.checks import as_other_type, is_number
from gn_det.data.problems import Problems, Where


@dataclass
class CocoFile:
    """Raw entries, whose structure was checked: images sorted by id, annotations grouped by image.

    Attributes:
        images: ``id``, ``file_name``, ``width`` and ``height`` of the usable images.
        annotations_of: annotations by image id, as in the file but for new ids.
        class_names, category_ids: in order of the ids.
        left_out: positions in the file's list of the annotations that are in no group.
        new_ids: new id by position, for those that had none of their own.
    """

    images: list[dict[str, Any]]
    annotations_of: dict[Any, list[dict[str, Any]]]
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    left_out: set[int] = field(default_factory=set)
    new_ids: dict[int, int] = field(default_factory=dict)


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
        keys = ", ".join(map(str, list(data)[:6])) or "none"
        problems.stop(
            "json-structure",
            f"{problems.path}: key 'annotations' is missing (keys: {keys}): give a COCO instances json",
        )
    category_ids, class_names = _categories(data.get("categories"), problems)
    content = CocoFile([], {}, class_names, category_ids)
    content.images, dropped = _images(data.get("images"), problems)
    _group_annotations(data.get("annotations", []), content, dropped, problems)
    return content


def parse(source: DatasetSource, problems: Problems) -> dict[str, Any]:
    """The json object of ``source.json_file``.

    Raises:
        DataError: not found, not readable, no json, no object.
    """
    path = Path(source.json_file)
    where = f"check {source.origin}" if source.origin else "check the path"
    if source.origin == "DETECTRON2_DATASETS":
        where = (
            "put the dataset there, set the environment variable DETECTRON2_DATASETS to its parent folder, or give "
            "your own data (--train-json, --train-images, --val-json, --val-images)"
        )
    kind = "json-unreadable"
    if not path.exists():
        problems.stop(kind, f"{path}: annotation file of dataset {source.name!r} not found: {where}")
    if path.is_dir():
        problems.stop(kind, f"{path}: is a folder, a COCO json file is needed: {where}")
    try:
        with path.open("r", encoding="utf-8-sig") as file:
            data = json.load(file)
    except json.JSONDecodeError as error:
        size = path.stat().st_size
        what = "the file is empty" if size == 0 else f"{error.msg} in line {error.lineno}, column {error.colno}"
        problems.stop(kind, f"{path}: not a json file ({what}): export or download the annotations again")
    except UnicodeDecodeError:
        problems.stop(kind, f"{path}: not a json file (not UTF-8 text): export or download it again")
    except (OSError, RecursionError, ValueError) as error:
        problems.stop(kind, f"{path}: cannot be read ({error}): {where}")
    if not isinstance(data, dict):
        problems.stop(
            "json-structure",
            f"{path}: holds a {type(data).__name__}, not an object with images, annotations and categories: give a "
            f"COCO instances json (a list is what COCO *results* look like)",
        )
    return data


def _categories(entries: Any, problems: Problems) -> tuple[tuple[int, ...], tuple[str, ...]]:
    if not isinstance(entries, list) or not entries:
        problems.stop(
            "categories-missing",
            f'{problems.path}: no \'categories\': add one entry {{"id": 1, "name": ...}} for each class',
        )
    found: dict[int, str] = {}
    for entry in entries:
        ok = isinstance(entry, dict) and isinstance(entry.get("id"), int) and isinstance(entry.get("name"), str)
        if not ok or isinstance(entry["id"], bool):
            problems.refuse("category-malformed", f"category {entry!r} needs an integer 'id' and a text 'name'")
            continue
        number, name = entry["id"], entry["name"]
        if number in found:
            kind = "category-copy" if name == found[number] else "category-id-repeated"
            text = f"category id {number} appears more than once: give every category its own id"
            problems.refuse(kind, text if name == found[number] else f"{text} ({found[number]!r}, {name!r})")
            continue
        found[number] = name
    ordered = sorted(found.items())
    names = Counter(name for _, name in ordered)
    for name in (n for n, count in names.items() if count > 1):
        ids = ", ".join(str(number) for number, other in ordered if other == name)
        problems.refuse(
            "category-name-repeated", f"category name {name!r} is used by ids {ids}: give every category its own name"
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
        if not isinstance(entry, dict) or not isinstance(entry.get("id"), (int, str)):
            problems.refuse("image-no-id", f"entry {position} of 'images' has no 'id' (an integer): add it")
            continue
        number = entry["id"]
        if number in images:
            names = f"{images[number].get('file_name')}, {entry.get('file_name')}"
            copy = all(entry.get(k) == images[number].get(k) for k in ("file_name", "width", "height"))
            problems.refuse(
                "image-copy" if copy else "image-id-repeated",
                f"image id {number} appears more than once ({names}): give every image its own id",
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
        elif not (_is_pixel_count(entry.get("width")) and _is_pixel_count(entry.get("height"))):
            problems.drop(
                "image-entry",
                f"width {entry.get('width')!r} and height {entry.get('height')!r} must be positive pixel counts: add "
                f"them",
                Where(number, name),
            )
        else:
            size = {"width": int(entry["width"]), "height": int(entry["height"])}
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
            problems.drop(
                "annotation-entry", f"entry {position} of 'annotations' is not an object: {str(entry)[:40]!r}"
            )
            content.left_out.add(position)
            continue
        image, number = entry.get("image_id"), entry.get("id")
        if not isinstance(image, (int, str)) or image not in known:
            # Annotations of an image that is itself listed as bad would only repeat that message.
            if not isinstance(image, (int, str)) or image not in dropped:
                what = as_other_type(image, known) or "add the image, or remove the annotation"
                text = f"image_id {image!r} is not in 'images': {what}"
                problems.drop("image-unknown", text, Where(annotation=number))
            content.left_out.add(position)
            continue
        where = Where(image, annotation=number)
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
