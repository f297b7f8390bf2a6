"""PNG masks: ``NAME/CLASS/NUMBER.png`` holds one object of ``NAME.jpg``, white on black, as large as the image.

Also read, both of a single class: ``NAME/ANYTHING/*.png``, one object each, and ``NAME.png``, one object for each gray
value, palette entry or color except black.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from gn_det.data.formats import draft as tools
from gn_det.data.formats.draft import Draft, Groups, Invalid, Losses
from gn_det.data.image import MAX_PIXELS, png_bytes
from gn_det.data.inputs import IMAGE_SUFFIXES
from gn_det.errors import DataError
from gn_det.files import atomic_write, inside, open_regular
from gn_det.structures import MaskCrop, crop_mask, rasterize_polygons
from gn_det.text import one_line, shown

CLASSES = "classes.txt"
#: Attributes of an object that this format can represent.
ATTRIBUTES = ()
#: Most objects in one file: one for each value of 16 bits. A photo has more colors than that.
_MOST_OBJECTS = 65_535


def read(source: Path, images: Path | None, classes: Sequence[str]) -> Draft:
    """Read the masks below ``source`` (or ``source/masks``) for the images in ``images`` or ``source/images``."""
    names = tools.class_list(source, classes, CLASSES)
    if not names:
        raise DataError(f"{source}: no class names; give classes.txt, or name them with --classes")
    masks = source / "masks" if (source / "masks").is_dir() else source
    files = tools.Images(images or source / "images")
    draft = Draft(names)
    base = files.folder.resolve()
    known = {base / file for file in files.files.values()}  # the images may lie in the same folder as the masks
    for stem, file in files.files.items():
        size = files.size(file)
        draft.image(file, size)
        for path, name in _masks_of(masks, stem, names):
            known.add(path.parent.resolve() / path.name)
            with draft.noting(str(path)):
                if name is None:
                    raise Invalid(f"its folder is not one of the classes {', '.join(names)}")
                for crop in _objects(path, size, single=path.parent != (masks / stem).parent):
                    draft.add(file, name, {}, mask=crop)
    for path in sorted(p for p in masks.rglob("[!.]*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file()):
        if path.parent.resolve() / path.name not in known:
            draft.problems.append(
                f"{path}: is not a mask of an image in {files.folder}; a mask is NAME.png or NAME/CLASS/*.png"
            )
    return draft


def _masks_of(masks: Path, stem: str, names: Sequence[str]) -> Iterator[tuple[Path, str | None]]:
    """Yield the mask files of an image with their classes (None if unknown)."""
    only = names[0] if len(names) == 1 else None
    if (masks / f"{stem}.png").is_file():
        yield masks / f"{stem}.png", only
    for root, folders, files in os.walk(masks / stem):
        folders.sort()
        for file in sorted(f for f in files if f.lower().endswith(".png")):
            folder = Path(root).name
            yield Path(root) / file, folder if folder in names else only


def _objects(path: Path, size: tuple[int, int], *, single: bool) -> list[MaskCrop]:
    """Return the object of a file with a ``single`` one, or one object for each value except 0."""
    try:
        with open_regular(path) as file, Image.open(file) as image:
            if image.size != size:
                raise Invalid(f"is {image.width}x{image.height} pixels, its image {size[0]}x{size[1]}; make them equal")
            if size[0] * size[1] > MAX_PIXELS:
                raise Invalid(f"has more than {MAX_PIXELS} pixels")
            values = _values(image, single)
    except Invalid:
        raise
    except Exception as error:  # Pillow raises nearly anything on damaged files
        raise Invalid(f"cannot be read ({one_line(error)})") from None
    found = [value for value in np.unique(values).tolist() if value]
    if not found:
        raise Invalid("the mask is empty; remove it")
    if single and len(found) > 1:  # white with soft edges
        if found[-1] not in (255, 65_535):
            raise Invalid(f"has {len(found)} values besides black; a file in a folder is one object, white on black")
        return [crop_mask(values > found[-1] / 2)]
    if len(found) > _MOST_OBJECTS:
        raise Invalid(f"has {len(found):,} colors; a mask has one color for each object")
    return [crop_mask(values == value) for value in found]


def _values(image: Image.Image, single: bool) -> np.ndarray:
    """Return (H, W) numbers: 0 for black, gray values as they are, other colors above all gray values."""
    if image.mode in ("1", "L", "I", "I;16") or (image.mode == "P" and not single):
        return np.asarray(image)
    pixels: np.ndarray = np.asarray(image.convert("RGB"))
    if (pixels == pixels[..., :1]).all():
        return pixels[..., 0]
    colors: np.ndarray = pixels.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], dtype=np.int32)
    colors[colors > 0] += 1 << 24
    return colors


def write(names: Mapping[int, str], groups: Groups, folder: Path, root: Path, losses: Losses) -> None:
    """Write one PNG per object, and the list of classes."""
    for name in names.values():
        try:
            inside(folder, name)
            if "/" in name:  # the reader would take the inner folder for the class
                raise ValueError
        except ValueError:
            raise DataError(f"class {shown(name)} cannot be the name of a folder; rename it") from None
    for image, objects in groups:
        size = image["height"], image["width"]
        for number, a in enumerate(objects, 1):
            if "segmentation" not in a:
                losses["objects without a mask"] += 1
                continue
            if isinstance(a["segmentation"], dict):
                top, left, part = tools.crop_of_rle(a["segmentation"])
                bitmap = np.zeros(size, dtype=bool)
                bitmap[top : top + part.shape[0], left : left + part.shape[1]] = part
            else:
                bitmap = rasterize_polygons([np.asarray(p, float) for p in a["segmentation"]], *size)
            path = tools.place(folder / "masks", image, "") / names[a["category_id"]] / f"{number:04d}.png"
            atomic_write(path, png_bytes(bitmap))
    atomic_write(folder / CLASSES, "".join(f"{name}\n" for name in names.values()))
