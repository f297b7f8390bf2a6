"""Write a cleaned copy of an annotation file: without what training drops, and with what it repairs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from gn_det.check.audit import Survey
from gn_det.data.annotations import (
    AnnotationReader,
    check_segmentation,
    fits_as_written,
    mask_box,
    resolve_id,
    usable_pieces,
    whole,
)
from gn_det.data.coco_json import category_id, read_json
from gn_det.data.problems import KINDS, Problems
from gn_det.errors import DataError, UserError
from gn_det.files import NotRegularFile, atomic_write, check_regular, json_bytes
from gn_det.text import as_line, shown

#: Repairs that take a value as the reader of training computes it, and its key.
_COMPUTED = {"iscrowd-missing": "iscrowd", "bbox-missing": "bbox", "bbox-unusable": "bbox", "area-missing": "area"}


def refuse_overwriting(outputs: dict[str, str | None], inputs: list[str]) -> None:
    """Raise UserError if an output (flag to path) is an input file, a folder, pipe or device."""
    for flag, path in outputs.items():
        if not path:
            continue
        try:
            check_regular(path)
        except NotRegularFile as error:
            raise UserError(f"{flag} {path}: {error.strerror}; give the name of a file") from None
        except (OSError, ValueError):
            pass  # does not exist yet, or writing it reports the problem
        for source in inputs:
            same = os.path.realpath(path) == os.path.realpath(source)  # also if the input does not exist
            if same or (os.path.exists(path) and os.path.exists(source) and os.path.samefile(path, source)):
                raise UserError(f"{flag} {path}: would overwrite the file being checked; give another name")


def changes_file(target: str) -> str:
    """Return the file that lists the changes of a cleaned copy: ``cleaned.changes.txt`` for ``cleaned.json``."""
    return os.path.splitext(target)[0] + ".changes.txt"


class Cleaner:
    """Makes a cleaned copy of a surveyed set; ``changes`` has a line for each changed entry."""

    def __init__(self, survey: Survey) -> None:
        self.survey, self.findings = survey, survey.findings
        self.changes: list[str] = []
        blocking = [k for k in self.findings.counts if KINDS[k].blocks]
        if blocking or survey.content is None:
            first = self.findings.found[blocking[0]][0] if blocking else "it cannot be read"
            raise DataError(
                f"--fix: {survey.source.json_file} cannot be repaired automatically ({first}): correct that first; "
                "nothing was written"
            )
        self.content = survey.content
        self.reader = AnnotationReader(self.content.category_ids, Problems(survey.source.json_file))
        self.image_of = {image["id"]: image for image in survey.images}
        self.corners = "bbox-corners" in self.findings.counts
        self.merged = merged_categories(self.content.category_ids, self.content.class_names)

    def write(self, target: str) -> None:
        """Write the copy, and the list of changes beside it.

        Raises:
            DataError: no object would be left.
            UserError: ``target`` cannot be written.
        """
        dataset = self.survey.dataset
        objects = 0 if dataset is None else len(dataset.object_images)
        if objects <= sum(kind == "no-mask" for kind in self.findings.dropped_annotations.values()):
            raise DataError(f"--fix: no object of {self.survey.source.json_file} would be left; nothing was written")
        atomic_write(target, self._parts())
        lines = (f"{as_line(line)}\n".encode() for line in self.changes or ["no change"])
        atomic_write(changes_file(target), lines)

    def _parts(self) -> Iterator[bytes]:
        """Yield the json one entry at a time; one string for the file would double the memory."""
        fixed = {"images": self._image, "annotations": self._annotation, "categories": self._category}
        self._seen: set[tuple[str, Any]] = set()
        yield b"{"
        for number, (key, value) in enumerate(read_json(self.survey.source.json_file).items()):
            yield (b",\n" if number else b"\n") + json_bytes(key) + b": "
            if key not in fixed:
                yield json_bytes(value)
                continue
            kept = (e for position, entry in enumerate(value) if (e := fixed[key](position, entry)) is not None)
            yield b"["
            for position, entry in enumerate(kept):
                yield (b",\n" if position else b"\n") + json_bytes(entry)
            yield b"\n]"
        yield b"\n}\n"

    def _changed(self, place: str, entry: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
        """Return the entry with new values, and record those that differ in value or type."""
        new = {k: v for k, v in values.items() if k not in entry or entry[k] != v or type(entry[k]) is not type(v)}
        if new:
            self.changes.append(f"{place}: {', '.join(_in_words(key, entry, value) for key, value in new.items())}")
        return {**entry, **new}

    def _left_out(self, place: str, why: str) -> dict[str, Any] | None:
        self.changes.append(f"{place}: left out: {why}")
        return None

    def _is_copy(self, section: str, number: Any) -> bool:
        copy = (section, number) in self._seen
        self._seen.add((section, number))
        return copy

    def _image(self, position: int, entry: Any) -> dict[str, Any] | None:
        number = whole(entry.get("id")) if isinstance(entry, dict) else None
        if not isinstance(number, (int, str)):
            return self._left_out(f"entry {position} of 'images'", "it has no id")
        place = f"image {number} ({entry.get('file_name')})"
        if number not in self.image_of:
            reason = self.findings.dropped_images.get(number, "image-entry")
            return self._left_out(place, KINDS[reason].title)
        if self._is_copy("images", number):
            return self._left_out(place, KINDS["image-copy"].title)
        read = self.image_of[number].items()
        return self._changed(place, entry, {k: v for k, v in read if k == "id" or entry.get(k) != v})  # keep 40.0

    def _category(self, position: int, entry: dict[str, Any]) -> dict[str, Any] | None:
        number = category_id(entry["id"])
        place = f"category {entry['id']} ({entry['name']})"
        if number in self.merged:
            self.changes.append(f"{place}: merged into category {self.merged[number]} of the same name")
            return None
        if self._is_copy("categories", number):
            return self._left_out(place, KINDS["category-copy"].title)
        return self._changed(place, entry, {"id": number})

    def _annotation(self, position: int, entry: Any) -> dict[str, Any] | None:
        if not isinstance(entry, dict):
            return self._left_out(f"entry {position} of 'annotations'", KINDS["annotation-entry"].title)
        place = f"annotation {entry.get('id')} of image {entry.get('image_id')}"
        kinds: frozenset[str] = frozenset()
        why = self.content.left_out.get(position)
        if why is None:
            number = self.content.new_ids.get(position, whole(entry.get("id")))
            kinds = self.findings.repaired.get(number, kinds)
            why = self.findings.dropped_annotations.get(number, "polygon-empty" if "polygon-empty" in kinds else "")
        if why:
            return self._left_out(place, KINDS[why].title)
        if resolve_id(entry.get("image_id"), self.image_of) is None:
            return self._left_out(place, "its image is left out")
        return self._changed(place, entry, self._repaired(position, entry, number, kinds))

    def _repaired(self, position: int, entry: dict[str, Any], number: int, kinds: frozenset[str]) -> dict[str, Any]:
        """Return the new values of an annotation whose id becomes ``number`` and that needs repairs of these kinds."""
        category = resolve_id(entry["category_id"], self.reader.index_of)
        image = self.image_of[resolve_id(entry["image_id"], self.image_of)]
        what: dict[str, Any] = {}
        if position in self.content.new_ids or "id-type" in kinds:
            what |= {"id": number, "image_id": image["id"], "category_id": category}
        if category in self.merged:
            what["category_id"] = self.merged[category]
        if kinds:
            found = self.reader.read({**entry, "id": number}, image)
            assert found is not None
            what |= {key: getattr(found, key) for kind, key in _COMPUTED.items() if kind in kinds}
        if "polygon-piece" in kinds:
            what["segmentation"] = usable_pieces(entry["segmentation"])
        if self.corners and "bbox" not in what and not entry.get("iscrowd"):
            what |= from_corners(entry, image)
        return what


def from_corners(entry: dict[str, Any], image: dict[str, Any]) -> dict[str, Any]:
    """Return box and area of an annotation whose box is [x1, y1, x2, y2]; keep an area computed from the mask.

    Boxes that are not valid corners, or not those of their mask, are left unchanged.
    """
    x1, y1, x2, y2 = entry["bbox"]
    if x2 <= x1 or y2 <= y1:
        return {}
    mask, _ = check_segmentation(entry.get("segmentation"), image["height"], image["width"])
    if mask is not None and fits_as_written(entry["bbox"], mask_box(mask)):
        return {}
    area = {"area": (x2 - x1) * (y2 - y1)} if mask is None else {}
    return {"bbox": [x1, y1, x2 - x1, y2 - y1], **area}


def merged_categories(ids: tuple[int, ...], names: tuple[str, ...]) -> dict[Any, int]:
    """Map each category id to the lowest id of the same name, if that is another one."""
    lowest: dict[str, int] = {}
    for number, name in zip(ids, names):
        lowest.setdefault(name, number)
    return {number: lowest[name] for number, name in zip(ids, names) if lowest[name] != number}


def _in_words(key: str, entry: dict[str, Any], value: Any) -> str:
    if key == "segmentation":
        return f"{len(entry[key]) - len(value)} of {len(entry[key])} polygon parts left out"
    return f"{key} {value} (was {shown(entry[key])})" if key in entry else f"{key} {value} added"
