"""The COCO json as a whole: parsing it, and the mistakes that make all of it ambiguous."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gn_det.data.catalog import DatasetSource
from gn_det.data.checks import as_other_type, is_number
from gn_det.errors import DataError


class Repairs:
    """Counts what was repaired, by kind, with the first place of each."""

    def __init__(self) -> None:
        self._count: Counter[str] = Counter()
        self._first: dict[str, str] = {}

    def add(self, what: str, where: str, count: int = 1) -> None:
        self._count[what] += count
        self._first.setdefault(what, where)

    def notes(self) -> list[str]:
        """One line a kind."""
        return [f"{count} {what} (first: {self._first[what]})" for what, count in self._count.items()]


@dataclass
class CocoFile:
    """Raw entries, whose structure was checked: images sorted by id, annotations grouped by image."""

    images: list[dict[str, Any]]
    annotations_of: dict[Any, list[dict[str, Any]]]
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    bad: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_coco_file(source: DatasetSource, *, need_annotations: bool = True) -> CocoFile:
    """Parse and check the structure of ``source.json_file``.

    Raises:
        DataError: not found, not json, not COCO's instances format, no images or categories, repeated ids.
    """
    data = _parse(source)
    path = source.json_file
    if need_annotations and "annotations" not in data:
        keys = ", ".join(map(str, list(data)[:6])) or "none"
        raise DataError(f"{path}: key 'annotations' is missing (keys: {keys}): give a COCO instances json")
    category_ids, class_names = _categories(data.get("categories"), path)
    content = CocoFile([], {}, class_names, category_ids)
    content.images, dropped = _images(data.get("images"), path, content.bad)
    _group_annotations(data.get("annotations", []), path, content, dropped)
    return content


def _parse(source: DatasetSource) -> dict[str, Any]:
    path = Path(source.json_file)
    where = f"check {source.origin}" if source.origin else "check the path"
    if source.origin == "DETECTRON2_DATASETS":
        where = (
            "put the dataset there, set the environment variable DETECTRON2_DATASETS to its parent folder, or give "
            "your own data (--train-json, --train-images, --val-json, --val-images)"
        )
    if not path.exists():
        raise DataError(f"{path}: annotation file of dataset {source.name!r} not found: {where}")
    if path.is_dir():
        raise DataError(f"{path}: is a folder, a COCO json file is needed: {where}")
    try:
        with path.open("r", encoding="utf-8-sig") as file:
            data = json.load(file)
    except json.JSONDecodeError as error:
        size = path.stat().st_size
        what = "the file is empty" if size == 0 else f"{error.msg} in line {error.lineno}, column {error.colno}"
        raise DataError(f"{path}: not a json file ({what}): export or download the annotations again") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not a json file (not UTF-8 text): export or download it again") from error
    except (OSError, RecursionError) as error:
        raise DataError(f"{path}: cannot be read ({error}): {where}") from error
    if not isinstance(data, dict):
        raise DataError(
            f"{path}: holds a {type(data).__name__}, not an object with images, annotations and categories: give a "
            f"COCO instances json (a list is what COCO *results* look like)"
        )
    return data


def _categories(entries: Any, path: str) -> tuple[tuple[int, ...], tuple[str, ...]]:
    if not isinstance(entries, list) or not entries:
        raise DataError(f'{path}: no \'categories\': add one entry {{"id": 1, "name": ...}} for each class')
    for entry in entries:
        ok = isinstance(entry, dict) and isinstance(entry.get("id"), int) and isinstance(entry.get("name"), str)
        if not ok or isinstance(entry["id"], bool):
            raise DataError(f"{path}: category {entry!r} needs an integer 'id' and a text 'name'")
    repeated = [i for i, count in Counter(e["id"] for e in entries).items() if count > 1]
    if repeated:
        raise DataError(f"{path}: category id {repeated[0]} appears more than once: give every category its own id")
    ordered = sorted(entries, key=lambda e: e["id"])
    names = Counter(e["name"] for e in entries)
    for name in (n for n, count in names.items() if count > 1):
        ids = ", ".join(str(e["id"]) for e in ordered if e["name"] == name)
        raise DataError(f"{path}: category name {name!r} is used by ids {ids}: give every category its own name")
    return tuple(e["id"] for e in ordered), tuple(e["name"] for e in ordered)


def _images(entries: Any, path: str, bad: list[str]) -> tuple[list[dict[str, Any]], set[Any]]:
    """Usable images sorted by id, and the ids of those that are not usable."""
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{path}: no 'images': give a COCO instances json that lists at least one image")
    images: dict[Any, dict[str, Any]] = {}
    for position, entry in enumerate(entries):
        if not isinstance(entry, dict) or not isinstance(entry.get("id"), (int, str)):
            raise DataError(f"{path}: entry {position} of 'images' has no 'id' (an integer): add it")
        number = entry["id"]
        if number in images:
            names = f"{images[number].get('file_name')}, {entry.get('file_name')}"
            raise DataError(f"{path}: image id {number} appears more than once ({names}): give every image its own id")
        images[number] = entry
    good = []
    for number, entry in images.items():
        name = entry.get("file_name")
        if not isinstance(name, str) or not name:
            bad.append(f"image {number}: 'file_name' is missing: add it")
        elif not (_is_pixel_count(entry.get("width")) and _is_pixel_count(entry.get("height"))):
            bad.append(
                f"image {number} ({name}): width {entry.get('width')!r} and height {entry.get('height')!r} must be "
                f"positive pixel counts: add them"
            )
        else:
            size = {"width": int(entry["width"]), "height": int(entry["height"])}
            good.append({"id": number, "file_name": name, **size})
    # Text ids are rare but legal; numbers first keeps the order defined where both occur.
    good.sort(key=lambda i: (isinstance(i["id"], str), i["id"]))
    return good, set(images) - {i["id"] for i in good}


def _is_pixel_count(value: Any) -> bool:
    return is_number(value) and value >= 1 and value == int(value)


def _group_annotations(entries: Any, path: str, content: CocoFile, dropped: set[Any]) -> None:
    """Assign annotations to images; give new ids where they are missing, 0 or used twice."""
    if not isinstance(entries, list):
        raise DataError(f"{path}: 'annotations' is a {type(entries).__name__}, a list is needed")
    groups: defaultdict[Any, list[dict[str, Any]]] = defaultdict(list)
    known = {image["id"] for image in content.images}
    seen: dict[Any, dict[str, Any]] = {}
    largest = max((e["id"] for e in entries if isinstance(e, dict) and type(e.get("id")) is int), default=0)
    repairs = Repairs()
    for position, entry in enumerate(entries):
        if not isinstance(entry, dict):
            content.bad.append(f"entry {position} of 'annotations' is not an object: {str(entry)[:40]!r}")
            continue
        image = entry.get("image_id")
        number = entry.get("id")
        if not isinstance(image, (int, str)) or image not in known:
            # Annotations of an image that is itself listed as bad would only repeat that message.
            if not isinstance(image, (int, str)) or image not in dropped:
                what = as_other_type(image, known) or "add the image, or remove the annotation"
                content.bad.append(f"annotation {number}: image_id {image!r} is not in 'images': {what}")
            continue
        problem = ""
        if type(number) is not int:
            problem = "have no integer id"
        elif number <= 0:
            problem = "have id 0 or below (COCO's evaluation counts these as missed)"
        elif number in seen:
            if entry == seen[number]:
                repairs.add("annotations are exact copies of another one: left out", f"annotation {number}")
                continue
            problem = "repeat another annotation's id"
        if problem:
            what = f"annotations {problem}: renumbered in memory, renumber the file for other COCO tools"
            repairs.add(what, f"annotation {number} of image {image}")
            largest += 1
            entry = {**entry, "id": largest}
        else:
            seen[number] = entry
        groups[image].append(entry)
    content.annotations_of = dict(groups)
    content.notes += repairs.notes()
