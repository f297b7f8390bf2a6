"""A cleaned copy of an annotation file: what training drops is left out, what it repairs is written down."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from gn_det.check.audit import Survey
from gn_det.data.checks import check_segmentation, mask_box, usable_pieces
from gn_det.data.coco import AnnotationReader, fits_as_written
from gn_det.data.coco_file import category_id, resolve_id, whole
from gn_det.data.problems import KINDS, Problems
from gn_det.errors import DataError, UserError
from gn_det.files import NotRegularFile, atomic_write, check_regular, json_bytes
from gn_det.text import as_line, shown

#: Repairs that write the box of the mask.
_BOX_OF_MASK = frozenset({"bbox-missing", "bbox-unusable"})
_OUT_WITH_IMAGE = "left out: its image is left out"


def refuse_overwriting(outputs: dict[str, str | None], inputs: list[str]) -> None:
    """Raise UserError where an output (flag to path) is one of the files that are read, or a folder, pipe or device."""
    for flag, path in outputs.items():
        try:
            if path:
                check_regular(path)
        except NotRegularFile as error:
            raise UserError(f"{flag} {path}: {error.strerror}; give the name of a file") from None
        except (OSError, ValueError):
            pass  # not there yet, or the later write reports what is wrong
        for source in inputs if path else ():
            assert path is not None
            same = os.path.realpath(path) == os.path.realpath(source)
            if same or (os.path.exists(path) and os.path.exists(source) and os.path.samefile(path, source)):
                raise UserError(f"{flag} {path}: this is the file that is checked; give another name")


class Cleaner:
    """Turns a surveyed set into its cleaned copy."""

    def __init__(self, survey: Survey) -> None:
        self.survey = survey
        self.changes: list[str] = []
        blocking = [k for k in survey.findings.counts if KINDS[k].blocks]
        if blocking or survey.content is None or survey.data is None:
            first = survey.findings.found[blocking[0]][0] if blocking else "it cannot be read"
            raise DataError(f"--fix: {survey.source.json_file} needs a person first ({first}); nothing was written")
        self.content, self.data = survey.content, survey.data
        self.reader = AnnotationReader(self.content.category_ids, Problems(survey.source.json_file))
        self.image_of = {image["id"]: image for image in survey.images}
        self.corners = "bbox-corners" in survey.findings.counts
        self.merged = _merged_categories(self.content.category_ids, self.content.class_names)

    def write(self, target: str) -> None:
        """Write the copy and, beside it, the list of changes.

        Raises:
            DataError: no object would be left.
            WriteError: ``target`` cannot be written.
        """
        dataset = self.survey.dataset
        objects = 0 if dataset is None else int(dataset.object_counts.sum())
        if objects <= sum(kind == "no-mask" for kind in self.survey.findings.dropped_annotations.values()):
            raise DataError(f"--fix: no object of {self.survey.source.json_file} would be left; nothing was written")
        atomic_write(target, self._parts())
        lines = (f"{as_line(line)}\n".encode() for line in self.changes or ["no change"])
        atomic_write(changes_file(target), lines)

    def _parts(self) -> Iterator[bytes]:
        """The json in pieces, one entry at a time: a whole file as one text would take its size again."""
        fixed = {"images": self._images, "annotations": self._annotations, "categories": self._categories}
        yield b"{"
        for number, (key, value) in enumerate(self.data.items()):
            yield (b",\n" if number else b"\n") + json_bytes(key) + b": "
            if key not in fixed:
                yield json_bytes(value)
                continue
            yield b"["
            for position, entry in enumerate(fixed[key]()):
                yield (b",\n" if position else b"\n") + json_bytes(entry)
            yield b"\n]"
        yield b"\n}\n"

    def _images(self) -> Iterator[dict[str, Any]]:
        seen: set[Any] = set()
        for position, entry in enumerate(self.data["images"]):
            number = whole(entry.get("id")) if isinstance(entry, dict) else None
            if not isinstance(number, (int, str)):
                self.changes.append(f"entry {position} of 'images': left out: it has no id")
                continue
            place = f"image {number} ({entry.get('file_name')})"
            if number in seen:
                self.changes.append(f"{place}: left out: the entry is listed twice")
            elif number in self.image_of:
                seen.add(number)
                read = self.image_of[number]
                what = {
                    k: v for k, v in read.items() if entry.get(k) != v or (k == "id" and type(entry[k]) is not type(v))
                }
                if what:
                    self.changes.append(f"{place}: {', '.join(_told(k, entry, v) for k, v in what.items())}")
                yield {**entry, **what}
            else:
                reason = self.survey.findings.dropped_images.get(number, "image-entry")
                self.changes.append(f"{place}: left out: {KINDS[reason].title}")

    def _categories(self) -> Iterator[dict[str, Any]]:
        seen: set[int] = set()
        for entry in self.data["categories"]:
            place, number = f"category {entry['id']} ({entry['name']})", category_id(entry["id"])
            assert number is not None
            if number in seen:
                self.changes.append(f"{place}: left out: it is listed twice")
            elif number in self.merged:
                self.changes.append(f"{place}: merged into category {self.merged[number]} of the same name")
            else:
                seen.add(number)
                if type(entry["id"]) is not int:
                    self.changes.append(f"{place}: {_told('id', entry, number)}")
                yield {**entry, "id": number}

    def _annotations(self) -> Iterator[dict[str, Any]]:
        for position, entry in enumerate(self.data["annotations"]):
            reason = self._why_left_out(position, entry)
            if reason:
                self.changes.append(f"{_place(position, entry)}: {reason}")
            else:
                yield self._mended(position, entry)

    def _why_left_out(self, position: int, entry: Any) -> str:
        """Empty where the annotation stays."""
        findings = self.survey.findings
        if not isinstance(entry, dict):
            return "left out: it is no object"
        image = resolve_id(entry.get("image_id"), self.image_of)
        if position not in self.content.left_out:
            number = self.content.new_ids.get(position, whole(entry.get("id")))
            kind = findings.dropped_annotations.get(number)
            if not kind and "polygon-empty" in findings.mended.get(number, ()):
                kind = "polygon-empty"
            if kind:
                return f"left out: {KINDS[kind].title}"
            return "" if image is not None else _OUT_WITH_IMAGE
        if image is not None:
            return "left out: the annotation is listed twice"
        listed = resolve_id(entry.get("image_id"), findings.dropped_images) is not None
        return _OUT_WITH_IMAGE if listed else f"left out: {KINDS['image-unknown'].title}"

    def _mended(self, position: int, entry: dict[str, Any]) -> dict[str, Any]:
        number = self.content.new_ids.get(position, whole(entry.get("id")))
        kinds = self.survey.findings.mended.get(number, frozenset())
        category = resolve_id(entry["category_id"], self.reader.index_of)
        image = self.image_of[resolve_id(entry["image_id"], self.image_of)]
        what: dict[str, Any] = {}
        if position in self.content.new_ids or "id-type" in kinds:
            what |= {"id": number}
        if "id-type" in kinds:
            what |= {"image_id": image["id"], "category_id": category}
        if category in self.merged:
            what["category_id"] = self.merged[category]
        if kinds:
            found = self.reader.read({**entry, "id": number}, image)
            assert found is not None
            if "iscrowd-missing" in kinds:
                what["iscrowd"] = 0
            if kinds & _BOX_OF_MASK:
                what["bbox"] = found["bbox"]
            if "area-missing" in kinds:
                what["area"] = found["area"]
            if "polygon-piece" in kinds:
                what["segmentation"] = usable_pieces(entry["segmentation"])
        if self.corners and not kinds & _BOX_OF_MASK and not entry.get("iscrowd"):
            what |= _from_corners(entry, image)
        what = {k: v for k, v in what.items() if k not in entry or entry[k] != v or type(entry[k]) is not type(v)}
        if not what:
            return entry
        told = ", ".join(_told(key, entry, value) for key, value in what.items())
        self.changes.append(f"{_place(position, entry)}: {told}")
        return {**entry, **what}


def _from_corners(entry: dict[str, Any], image: dict[str, Any]) -> dict[str, Any]:
    """Box and area of an annotation whose box is [x1, y1, x2, y2]; an area that the mask gave stays.

    Boxes of such a set that are no corners, or not those of their mask, are left as they are.
    """
    x1, y1, x2, y2 = entry["bbox"]
    if x2 <= x1 or y2 <= y1:
        return {}
    what: dict[str, Any] = {"bbox": [x1, y1, x2 - x1, y2 - y1]}
    mask, _ = check_segmentation(entry.get("segmentation"), image["height"], image["width"])
    if mask is None:
        what["area"] = (x2 - x1) * (y2 - y1)
    elif fits_as_written(entry["bbox"], mask_box(mask)):
        return {}
    return what


def changes_file(target: str) -> str:
    """Where the changes of a cleaned copy are listed: ``cleaned.json`` has ``cleaned.changes.txt``."""
    return os.path.splitext(target)[0] + ".changes.txt"


def _merged_categories(ids: tuple[int, ...], names: tuple[str, ...]) -> dict[int, int]:
    """Category id to the lowest id of the same name, where that is another one."""
    lowest: dict[str, int] = {}
    for number, name in zip(ids, names):
        lowest.setdefault(name, number)
    return {number: lowest[name] for number, name in zip(ids, names) if lowest[name] != number}


def _place(position: int, entry: Any) -> str:
    if not isinstance(entry, dict):
        return f"entry {position} of 'annotations'"
    return f"annotation {entry.get('id')} of image {entry.get('image_id')}"


def _told(key: str, entry: dict[str, Any], value: Any) -> str:
    if key == "segmentation":
        return f"{len(entry[key]) - len(value)} of {len(entry[key])} polygon pieces left out"
    return f"{key} {value} (was {shown(entry[key])})" if key in entry else f"{key} {value} added"
