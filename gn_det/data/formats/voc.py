"""Pascal VOC: ``Annotations/NAME.xml`` for ``JPEGImages/NAME.jpg``, boxes with flags.

Pixels count from 1 and the last one is included: ``xmin`` 1 and ``xmax`` W cover the whole width.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

from gn_det.data.formats import draft as tools
from gn_det.data.formats.draft import FLAGS, Draft, Groups, Invalid, Losses
from gn_det.files import atomic_write

#: Attributes of an object that this format can represent.
ATTRIBUTES = FLAGS
#: File with one class per line; not part of VOC itself.
CLASSES = "labels.txt"


def read(source: Path, images: Path | None, classes: Sequence[str]) -> Draft:
    """Read ``source/Annotations`` (or ``source``); images are in ``source/JPEGImages`` or ``images``."""
    folder = source / "Annotations" if (source / "Annotations").is_dir() else source
    found = images or source / "JPEGImages"
    files = tools.Images(found) if found.is_dir() else None
    draft = Draft(tools.class_list(source, classes, CLASSES))
    for path in tools.files_of(folder, {".xml"}, ".xml files in this folder"):
        root = tools.xml_of(path)
        with draft.noting(str(path)):
            if root.tag != "annotation":
                raise Invalid(f"its root is <{root.tag}>, not <annotation>")
            stem = os.path.splitext(path.relative_to(folder).as_posix())[0]
            file = (files.files.get(stem) if files else None) or f"{stem}{Path(root.findtext('filename', '')).suffix}"
            size = _size(root)
            if size is None:
                if files is None or file not in files.files.values():
                    raise Invalid("has no usable <size>, and its image is not there")
                size = files.size(file)
            draft.image(file, size)
            for number, entry in enumerate(root.iter("object"), 1):
                with draft.noting(f"{path} object {number}"):
                    _read_object(draft, file, entry)
    return draft


def _size(root: ElementTree.Element) -> tuple[int, int] | None:
    try:
        width, height = (int(float(root.findtext(f"size/{side}", "0"))) for side in ("width", "height"))
    except (ValueError, OverflowError):
        return None
    return (width, height) if width > 0 and height > 0 else None


def _read_object(draft: Draft, image: str, entry: ElementTree.Element) -> None:
    name = (entry.findtext("name") or "").strip()
    try:
        x0, y0, x1, y1 = (float(entry.findtext(f"bndbox/{side}", "")) for side in ("xmin", "ymin", "xmax", "ymax"))
    except ValueError:
        raise Invalid("has no <bndbox> of four numbers") from None
    if not name:
        raise Invalid("has no <name>")
    if not (x0 - 1 < x1 and y0 - 1 < y1):
        raise Invalid(f"the box {x0:g} {y0:g} {x1:g} {y1:g} has no area")
    flags = {flag: (entry.findtext(flag) or "").strip() in ("1", "true") for flag in FLAGS}
    draft.add(image, name, flags, box=(x0 - 1, y0 - 1, x1, y1))


def write(names: Mapping[int, str], groups: Groups, folder: Path, root: Path, losses: Losses) -> None:
    """Write ``Annotations/`` and the list of classes."""
    for image, objects in groups:
        xml = ElementTree.Element("annotation")
        _text(xml, "filename", Path(image["file_name"]).name)
        size = ElementTree.SubElement(xml, "size")
        for key, value in (("width", image["width"]), ("height", image["height"]), ("depth", 3)):
            _text(size, key, value)
        for a in objects:
            losses["masks"] += "segmentation" in a
            entry = ElementTree.SubElement(xml, "object")
            _text(entry, "name", names[a["category_id"]])
            for flag in FLAGS:
                _text(entry, flag, int(bool(a.get(flag))))
            box = ElementTree.SubElement(entry, "bndbox")
            x0, y0, x1, y1 = tools.corners(a)
            for key, value in (("xmin", x0 + 1), ("ymin", y0 + 1), ("xmax", x1), ("ymax", y1)):
                _text(box, key, f"{round(value, 6):.12g}")
        ElementTree.indent(xml)
        atomic_write(tools.place(folder / "Annotations", image, ".xml"), ElementTree.tostring(xml, encoding="utf-8"))
    atomic_write(folder / CLASSES, "".join(f"{name}\n" for name in names.values()))


def _text(parent: ElementTree.Element, tag: str, value: object) -> None:
    # XML has no control characters
    ElementTree.SubElement(parent, tag).text = "".join(c if c.isprintable() else "_" for c in str(value))
