"""Convert datasets between COCO json and other formats, with the same checks as training."""

from __future__ import annotations

import importlib
import os
import random
import shutil
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from gn_det.data.annotation_table import check_annotations, refuse_corners
from gn_det.data.catalog import DatasetSource
from gn_det.data.coco_json import collector_paused, read_coco_json, structure
from gn_det.data.formats import FORMATS, MODULES
from gn_det.data.formats.draft import FLAGS, Document, Losses, by_image, names_of, to_outlines
from gn_det.data.image import MAX_PIXELS
from gn_det.data.problems import Problems
from gn_det.errors import ConfigError, DataError, UserError
from gn_det.files import atomic_write, inside, json_bytes
from gn_det.text import count, one_line, shown, some

#: Names of the split parts.
PARTS = ("train", "val", "test")
#: COCO jsons in a folder, ours and Roboflow's.
_COCO = ("annotations.json", "_annotations.coco.json")
_RULES = (
    ("cvat", "annotations.xml"),
    ("voc", "Annotations/**/*.xml"),
    ("voc", "*.xml"),
    ("yolo", "labels/**/*.txt"),
    ("masks", "masks/**/*.png"),
    *(("coco", name) for name in _COCO),
    *(("", f"*/{name}") for name in _COCO),  # a split dataset
    ("labelme", "**/*.json"),
)


def _module(name: str) -> Any:
    return importlib.import_module(f"gn_det.data.formats.{MODULES[name]}")


def detect_format(source: Path) -> str:
    """Detect the format of a file or folder by its files.

    Raises:
        DataError: it does not exist, or no format matches.
    """
    if not source.exists():
        raise DataError(f"{source}: no such file or folder")
    if source.is_file():
        found = {".json": "coco", ".xml": "cvat"}.get(source.suffix.lower(), "")
    else:
        found = _format_of(source)
    if not found:
        parts = sorted(p.name for p in source.iterdir() if p.is_dir() and _format_of(p)) if source.is_dir() else []
        if parts:
            raise DataError(f"{source}: has no annotations itself; give one of its subfolders: {some(parts)}")
        raise DataError(f"{source}: unknown annotation format; name it with --from ({', '.join(FORMATS)})")
    return found


def _format_of(folder: Path) -> str:
    return next((name for name, pattern in _RULES if next(folder.glob(pattern), None)), "")


def read(
    name: str, source: Path, images: Path | None = None, classes: Sequence[str] = (), *, max_bad: int = 0
) -> tuple[Document, list[str]]:
    """Read a dataset as a COCO document that training accepts.

    Args:
        name: one of :data:`gn_det.data.formats.FORMATS`.
        source: file or folder.
        images: folder of the images; None: the format's default place.
        classes: all classes, in order; (): those of the dataset.
        max_bad: how many invalid entries may be left out.

    Returns:
        The document and one line for each entry that was left out.

    Raises:
        DataError: nothing usable, or more than ``max_bad`` invalid entries; names files and lines.
    """
    if images is not None and not images.is_dir():
        raise DataError(f"--images {images}: no such folder")
    if name == "coco" and source.is_dir():
        source = next((source / file for file in _COCO if (source / file).is_file()), source)
    with collector_paused():
        problems, bad = Problems(str(source)), list[str]()
        if name == "coco":
            content = read_coco_json(DatasetSource(source.stem, str(source), "", "the path"), problems)
            if classes and list(classes) != list(content.class_names):
                raise DataError(f"{source}: lists its own classes, {some(content.class_names)}; leave out --classes")
        else:
            draft = _module(name).read(source, images, classes)
            bad = draft.problems
            _refuse(source, bad, max_bad)
            document = draft.document()
            if not document["categories"]:
                raise DataError(f"{source}: no objects, so the classes are unknown; name them with --classes")
            content = structure(document, problems)
        document = _checked(content, problems)
    bad = [*bad, *problems.bad]
    _refuse(source, bad, max_bad)
    return document, bad


def _refuse(source: Path, bad: Sequence[str], max_bad: int) -> None:
    if len(bad) > max_bad:
        quoted = "; ".join([*(one_line(line, 300) for line in bad[:3]), *(["..."] if len(bad) > 3 else [])])
        what = count(len(bad), "invalid entry", "invalid entries")
        raise DataError(f"{source}: {what}: {quoted} (use --max-bad {len(bad)} to leave them out)")


def _checked(content: Any, problems: Problems) -> Document:
    """Return the entries that training would use, with their flags."""
    table = check_annotations(content, content.images, problems)
    refuse_corners(table, problems)
    annotations: list[dict[str, Any]] = []
    repaired = (table.spans != content.entries.spans[table.position]).any(axis=1)
    for row, (image, position) in enumerate(zip(table.image.tolist(), table.position.tolist())):
        raw = checked = content.annotation(position)
        if repaired[row]:
            checked = content.entries.parse(*table.spans[row])
        entry = {key: checked[key] for key in ("id", "bbox", "category_id", "iscrowd", "area")}
        entry["image_id"] = content.images[image]["id"]
        if checked.get("segmentation"):
            entry["segmentation"] = checked["segmentation"]
        entry |= {flag: 1 for flag in FLAGS if raw.get(flag) in (1, True)}
        annotations.append(entry)
    categories = [{"id": i, "name": n} for i, n in zip(content.category_ids, content.class_names)]
    return {"images": content.images, "annotations": annotations, "categories": categories}


def write(
    name: str,
    document: Document,
    folder: Path,
    root: Path,
    stems: Sequence[str] | None = None,
    *,
    outlines: bool = False,
) -> list[str]:
    """Write a document in a format; return what was lost.

    Args:
        name: one of :data:`gn_det.data.formats.FORMATS`.
        document: images, annotations and categories.
        folder: created if missing.
        root: folder that ``file_name`` is relative to.
        stems: names of the images' annotation files; None: the images' own names.
        outlines: write masks as polygons that can be edited by hand.

    Raises:
        UserError: a file cannot be written, or two images would share one.
    """
    losses = Losses()
    if stems is None and name != "coco":  # predictions, which have stems, are as large as images that were read
        _refuse_huge(name, document)
    if outlines or name == "yolo":
        document = to_outlines(document, losses)
    if name == "coco":
        atomic_write(folder / "annotations.json", json_bytes(document))
        return losses.lines(name)
    images = _with_stems(document["images"], stems)
    module, objects = _module(name), document["annotations"]
    losses["spaces around class names"] += sum(c["name"] != c["name"].strip() for c in document["categories"])
    if "iscrowd" not in module.ATTRIBUTES:
        objects = [a for a in objects if not a.get("iscrowd")]
        losses["crowd regions"] += len(document["annotations"]) - len(objects)
    for flag in (flag for flag in FLAGS if flag not in module.ATTRIBUTES):
        losses[f"'{flag}' flags"] += sum(bool(a.get(flag)) for a in objects)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be created ({error.strerror})") from None
    module.write(names_of(document), by_image(images, objects), folder, root, losses)
    return losses.lines(name)


def _with_stems(images: Sequence[dict[str, Any]], stems: Sequence[str] | None) -> list[dict[str, Any]]:
    """Return the images with the names of their annotation files; DataError if two would share one."""
    stems = stems or [os.path.splitext(PurePosixPath(image["file_name"]))[0] for image in images]
    owners: dict[str, str] = {}
    for image, stem in zip(images, stems):
        if (key := stem.casefold()) in owners:
            pair = f"{image['file_name']} and {owners[key]}"
            raise DataError(f"{pair} would share one annotation file; rename one of them")
        owners[key] = image["file_name"]
    return [{**image, "stem": stem} for image, stem in zip(images, stems)]


def _refuse_huge(name: str, document: Document) -> None:
    """Raise DataError if masks would be drawn at a declared size that no image has."""
    outlines = [(a["image_id"], a.get("segmentation")) for a in document["annotations"]]
    drawn = {image for image, outline in outlines if isinstance(outline, dict) or (outline and name == "masks")}
    for image in document["images"]:
        width, height = image["width"], image["height"]
        if image["id"] in drawn and width * height > MAX_PIXELS:
            raise DataError(
                f"image {image['id']} ({shown(image['file_name'])}): its masks of {width}x{height} pixels are larger "
                f"than {MAX_PIXELS} pixels; correct its width and height, or cut it into tiles"
            )


def split(document: Document, shares: Sequence[float], seed: int) -> dict[str, Document]:
    """Split images randomly by shares, such as (0.8, 0.2) for train and val; the same seed gives the same split.

    Raises:
        ConfigError: the shares are not two or three positive numbers that sum to 1, or there are too few images.
    """
    if not 2 <= len(shares) <= 3 or not min(shares) > 0 or not abs(sum(shares) - 1) <= 1e-6:  # nan fails
        raise ConfigError(f"--split {','.join(f'{s:g}' for s in shares)}: give 2 or 3 positive shares that sum to 1")
    images = sorted(document["images"], key=lambda image: str(image["file_name"]))
    random.Random(seed).shuffle(images)
    ends = [round(sum(shares[: k + 1]) * len(images)) for k in range(len(shares))]
    parts: dict[str, Document] = {}
    for name, start, end in zip(PARTS, [0, *ends], ends):
        if start == end:
            raise ConfigError(f"--split leaves {name} without images; there are only {len(images)}")
        chosen = sorted(images[start:end], key=lambda image: str(image["file_name"]))
        ids = {image["id"] for image in chosen}
        annotations = [a for a in document["annotations"] if a["image_id"] in ids]
        parts[name] = {**document, "images": chosen, "annotations": annotations}
    return parts


def summary(document: Document) -> str:
    """Return ``12 images, 40 objects of 2 classes, 1 image without objects``, and the classes without objects."""
    classes = Counter(a["category_id"] for a in document["annotations"])
    empty = len({i["id"] for i in document["images"]} - {a["image_id"] for a in document["annotations"]})
    text = (
        f"{count(len(document['images']), 'image')}, {count(len(document['annotations']), 'object')} of "
        f"{count(len(document['categories']), 'class', 'classes')}, {count(empty, 'image')} without objects"
    )
    unused = [c["name"] for c in document["categories"] if c["id"] not in classes]
    return text + (f"; no object of {some(unused)}" if unused else "")


def copy_images(document: Document, root: Path, folder: Path) -> None:
    """Copy the images of a document below ``folder`` with their subfolders.

    Raises:
        UserError: an image is missing, its name leads out of ``folder``, or the disk is full.
    """
    for image in document["images"]:
        name = image["file_name"]
        try:
            target = inside(folder, name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(root / name, target)
        except shutil.SameFileError:
            raise UserError(
                f"{folder}: already holds the images; leave out --copy-images or choose another --output"
            ) from None
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise UserError(f"image {shown(os.fspath(root / name))} cannot be copied ({reason})") from None
