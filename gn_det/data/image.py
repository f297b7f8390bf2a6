"""Reading images: any PIL mode, EXIF orientation applied, in the channel order of ``INPUT.FORMAT``.

The semantics are Detectron2's ``read_image`` (PIL decodes, orientation tag 1-8 turns, ``convert`` maps the mode), so
that both engines feed the same pixels to the same weights. Known consequence, kept on purpose: PIL turns a 16-bit gray
image nearly white, because its conversion clips instead of scaling. One thing is stricter: a
damaged PNG may come out as other pixels from Pillow, which looks at no checksum of pixels, and black from Detectron2,
which takes an error while it looks for the orientation for a missing one; both are refused here.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from gn_det.errors import ConfigError, DataError

#: Values of INPUT.FORMAT that can be read.
FORMATS = ("BGR", "RGB", "L")

_ORIENTATION_TAG = 274
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
#: Last bytes of whole files, by PIL's name of the format.
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}
_SWAPS_SIDES = frozenset({5, 6, 7, 8})


class ImageError(DataError):
    """An image file that cannot be used; ``kind`` is ``image-missing`` or ``image-damaged``."""

    def __init__(self, text: str, kind: str = "image-damaged") -> None:
        super().__init__(text, kind)
        self.text, self.kind = text, kind

    def __str__(self) -> str:
        return self.text


def check_format(image_format: str) -> str:
    """Return ``image_format``, or raise ConfigError where it cannot be read."""
    if image_format not in FORMATS:
        raise ConfigError(f"INPUT.FORMAT {image_format!r} is not implemented: use one of {', '.join(FORMATS)}")
    return image_format


def read_image(path: str | os.PathLike[str], image_format: str = "BGR") -> np.ndarray:
    """Decode one image.

    Args:
        path: image file of any format and mode that PIL reads.
        image_format: ``"BGR"``, ``"RGB"`` or ``"L"``.

    Returns:
        (H, W, 3) uint8, or (H, W, 1) for ``"L"``, turned upright by its EXIF orientation; may be a read-only view.

    Raises:
        ImageError: the file is missing, unreadable, not an image or truncated.
    """
    check_format(image_format)
    try:
        with Image.open(path) as opened:
            opened.load()  # now: PNG's getexif() would do it, and its errors do not count
            image = _upright(opened).convert("RGB" if image_format == "BGR" else image_format)
            pixels = np.asarray(image)
            if opened.format == "PNG":
                _check_png(path)
    except Exception as error:
        # PIL plugins raise nearly anything on damaged files (OSError, SyntaxError, struct.error, ValueError ...).
        raise _image_error(path, error) from error
    if image_format == "BGR":
        return pixels[:, :, ::-1]
    return pixels[:, :, None] if image_format == "L" else pixels


def _check_png(path: str | os.PathLike[str]) -> None:
    """Raise ValueError where a checksum of compressed pixels is wrong."""
    with open(path, "rb") as file:
        data = memoryview(file.read())
    at = 8  # chunks: length, type, content, CRC-32 of type and content
    while at + 12 <= len(data):
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        stored = int.from_bytes(data[end : end + 4], "big")
        if data[at + 4 : at + 8] == b"IDAT" and zlib.crc32(data[at + 4 : end]) != stored:
            raise ValueError("the checksum of its pixels is wrong: get this file again")
        at = end + 4


def image_size(path: str | os.PathLike[str]) -> tuple[int, int]:
    """(width, height) in pixels after EXIF orientation, from the header alone.

    No pixel is decoded, unless the last bytes are not those that a whole JPEG or PNG ends with: a download that broke
    off is found here, not hours later.

    Raises:
        ImageError: the file is missing, unreadable, not an image or truncated.
    """
    try:
        with Image.open(path) as image:
            width, height = image.size
            # PNG's getexif() decodes all pixels to look for a trailing chunk; its header is enough here.
            known = image.format != "PNG" or "exif" in image.info
            turned = known and _orientation(image) in _SWAPS_SIDES
            end = _ENDS.get(image.format or "")
        if end is not None and not _ends_with(path, end):
            with Image.open(path) as image:
                image.load()
        return (height, width) if turned else (width, height)
    except Exception as error:
        raise _image_error(path, error) from error


def _ends_with(path: str | os.PathLike[str], end: bytes) -> bool:
    with open(path, "rb") as file:
        file.seek(max(os.path.getsize(path) - len(end), 0))
        return file.read() == end


def _orientation(image: Image.Image) -> int | None:
    try:
        return image.getexif().get(_ORIENTATION_TAG)
    except Exception:
        # A damaged EXIF block must not make a readable picture unusable.
        return None


def _upright(image: Image.Image) -> Image.Image:
    turn = _TURNS.get(_orientation(image) or 1)
    return image if turn is None else image.transpose(turn)


def _image_error(path: str | os.PathLike[str], error: Exception) -> ImageError:
    return ImageError(_why_unreadable(path, error), "image-damaged" if os.path.exists(path) else "image-missing")


def _why_unreadable(path: str | os.PathLike[str], error: Exception) -> str:
    name = os.fspath(path)
    if not os.path.exists(name):
        return f"{name}: image not found"
    if os.path.isdir(name):
        return f"{name}: is a folder, not an image"
    if Path(name).stat().st_size == 0:
        return f"{name}: image file is empty (0 bytes)"
    if isinstance(error, PermissionError):
        return f"{name}: image may not be read (permissions)"
    reason = " ".join(str(error).split()) or type(error).__name__
    if "cannot identify" in reason:
        reason = "not an image that Pillow knows"
    return f"{name}: image cannot be read ({reason})"
