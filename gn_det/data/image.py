"""Read images of any PIL mode, with EXIF orientation applied, in the channel order of ``INPUT.FORMAT``.

8-bit images are read as Detectron2's ``read_image`` reads them (decoded by PIL, rotated by orientation tag 1-8, mode
mapped by ``convert``), so both engines feed the same pixels to the same weights. Two rules are stricter:

- Gray images of 16 or 32 bits or floats are refused unless ``INPUT.BIT_DEPTH`` says how to scale them to 8 bits. PIL's
  conversion clips them, which makes most of them plain white or black. (PIL reads 16-bit *color* by its upper 8 bits.)
- A damaged PNG is refused. Pillow ignores pixel checksums and may return wrong pixels. Detectron2 may return black,
  because it takes an error while reading the orientation for a missing one.
"""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from gn_det.config.check import bit_depth_range
from gn_det.errors import ConfigError, DataError
from gn_det.files import NotRegularFile, StrPath, open_regular
from gn_det.text import one_line, printable

#: Supported values of INPUT.FORMAT.
FORMATS = ("BGR", "RGB", "L")
#: Default of INPUT.MAX_PIXELS: Pillow's own limit.
MAX_PIXELS = 178_956_970

#: PIL modes of more than 8 bits a channel.
_DEEP = frozenset({"I", "F", "I;16", "I;16L", "I;16B", "I;16N"})
#: Percentiles that INPUT.BIT_DEPTH "percentiles" maps to 0 and 255.
_PERCENTILES = (0.5, 99.5)
#: Longest file name in a message, in characters.
_NAME = 300

#: Tags of EXIF and TIFF.
_WIDTH, _LENGTH, _ORIENTATION = 256, 257, 274
#: Of each orientation. ImageOps.exif_transpose() copies every image, and Pillow 9 cannot do it in place.
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
#: Last bytes of complete files, by PIL's name of the format.
_ENDS = {"JPEG": b"\xff\xd9", "PNG": b"IEND\xaeB`\x82"}


class ImageError(DataError):
    """An unusable image file: ``text``, and ``kind``, a key of ``problems.KINDS`` (``image-missing`` ...)."""

    def __init__(self, text: str, kind: str = "image-damaged") -> None:
        super().__init__(text, kind)
        self.text, self.kind = text, kind

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class ImageReader:
    """Reads images with the settings of a config."""

    image_format: str = "BGR"  # "BGR", "RGB" or "L" (INPUT.FORMAT)
    bit_depth: str = ""  # how gray images of more than 8 bits are scaled (INPUT.BIT_DEPTH)
    max_pixels: int = MAX_PIXELS  # larger images are refused (INPUT.MAX_PIXELS)

    def __post_init__(self) -> None:
        if self.image_format not in FORMATS:
            raise ConfigError(f"INPUT.FORMAT {self.image_format!r} is not implemented: use one of {', '.join(FORMATS)}")
        bit_depth_range(self.bit_depth)

    @classmethod
    def of(cls, cfg: Any, image_format: str = "") -> ImageReader:
        """Return the reader of ``cfg``, optionally for another format; Detectron2's configs lack two of the keys."""
        keys = cfg.INPUT
        depth, pixels = str(keys.get("BIT_DEPTH", "")), int(keys.get("MAX_PIXELS", MAX_PIXELS))
        return cls(image_format or str(keys.FORMAT), depth, pixels)

    def read(self, path: StrPath) -> np.ndarray:
        """Decode one image.

        Args:
            path: image file in any format and mode that PIL reads.

        Returns:
            (H, W, 3) uint8, or (H, W, 1) for ``"L"``, rotated by EXIF orientation; may be a read-only view.

        Raises:
            ImageError: the file is missing, unreadable, not an image, truncated, too large, or has more than 8 bits and
                ``bit_depth`` is not set.
        """
        pixels = np.asarray(self.decode(path))
        if self.image_format == "BGR":
            return pixels[:, :, ::-1]
        return pixels[:, :, None] if self.image_format == "L" else pixels

    def decode(self, path: StrPath) -> Image.Image:
        """Decode one image like :meth:`read`, to mode ``"RGB"``, or ``"L"`` for that format."""
        mode = "RGB" if self.image_format == "BGR" else self.image_format
        with self._opened(path) as (file, opened):
            opened.load()  # before PNG's getexif(), which would load and swallow the errors
            image: Image.Image = opened
            with suppress(Exception):  # a damaged EXIF block does not make an image unusable
                turn = _TURNS.get(opened.getexif().get(_ORIENTATION, 1))
                if turn is not None and opened.format != "TIFF":  # load() has turned that already
                    image = opened.transpose(turn)
            if opened.mode in _DEEP:
                image = Image.fromarray(self._to_8_bits(path, opened, np.asarray(image)))
            if image.mode != mode:  # convert() copies an image of the same mode
                image = image.convert(mode)
            if opened.format == "PNG":
                _check_png(file)
        return image

    def size(self, path: StrPath) -> tuple[int, int]:
        """Return (width, height) in pixels after EXIF orientation, from the header alone.

        Pixels are decoded only if the file does not end as a complete JPEG or PNG does, to catch broken downloads now
        and not hours later.

        Raises:
            ImageError: as for :meth:`read`, as far as the header shows.
        """
        with self._opened(path) as (file, image):
            width, height = image.size
            if image.mode in _DEEP and not self.bit_depth:
                raise _too_deep(path, image.mode)
            turned = False
            # PNG's getexif() decodes all pixels to look for a trailing chunk; its header is enough here.
            if image.format != "PNG" or "exif" in image.info:
                with suppress(Exception):
                    tags = image.getexif()
                    if image.format == "TIFF":  # whose size newer versions of Pillow have turned already
                        width, height = int(tags[_WIDTH]), int(tags[_LENGTH])
                    turned = tags.get(_ORIENTATION) in (5, 6, 7, 8)
            end = _ENDS.get(image.format or "")
            if end is not None:
                file.seek(max(file.seek(0, os.SEEK_END) - len(end), 0))
                if file.read() != end:
                    file.seek(0)
                    with Image.open(file) as again:
                        again.load()
                    if image.format == "PNG":
                        _check_png(file)
        return (height, width) if turned else (width, height)

    def from_array(self, pixels: np.ndarray) -> np.ndarray:
        """Convert an (H, W, 3) uint8 RGB array to the reader's format, as :meth:`read` returns it.

        Raises:
            DataError: the array has another type or shape.
        """
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
            raise DataError(
                f"an image in memory must be an (H, W, 3) uint8 array in RGB order, got {pixels.dtype} of shape "
                f"{pixels.shape}"
            )
        if self.image_format == "L":
            return np.asarray(Image.fromarray(pixels).convert("L"))[:, :, None]
        return pixels[:, :, ::-1] if self.image_format == "BGR" else pixels

    def rgb_or_none(self, path: StrPath) -> np.ndarray | None:
        """Return (H, W, 3) uint8 RGB pixels that may be drawn on; None if the image cannot be read."""
        try:
            return np.array(replace(self, image_format="RGB").read(path))
        except ImageError:
            return None

    @contextmanager
    def _opened(self, path: StrPath) -> Iterator[tuple[BinaryIO, Image.Image]]:
        """Open a file and read its image header; every failure becomes an ImageError."""
        limit = self.max_pixels
        # Pillow refuses images above twice its own limit, which may be lower.
        if Image.MAX_IMAGE_PIXELS is not None and limit > 2 * Image.MAX_IMAGE_PIXELS:
            Image.MAX_IMAGE_PIXELS = limit
        try:
            with open_regular(path) as file, Image.open(file) as image:
                if image.width * image.height > limit:
                    raise _too_large(path, f"size of {image.width}x{image.height} pixels", limit)
                if image.format == "EPS":
                    raise ValueError("EPS files are programs, not images: convert it to PNG")
                yield file, image
        except ImageError:
            raise
        except Image.DecompressionBombError as error:
            raise _too_large(path, "size", limit) from error
        except Exception as error:
            # PIL plugins raise nearly anything on damaged files (OSError, SyntaxError, struct.error, ValueError ...).
            raise _unreadable(path, error) from error

    def _to_8_bits(self, path: StrPath, image: Image.Image, values: np.ndarray) -> np.ndarray:
        """Scale (H, W) values of any type to uint8: LOW to 0, HIGH to 255, values outside clipped."""
        if not self.bit_depth:
            raise _too_deep(path, image.mode, values)
        span = bit_depth_range(self.bit_depth)
        values = values.astype(np.float64)
        finite = np.isfinite(values)
        if span is None and self.bit_depth == "full":
            # Some versions of PIL return 16-bit PNG and PPM as 32-bit integers.
            if not image.mode.startswith("I;16") and image.format not in ("PNG", "PPM"):
                what = "give LOW,HIGH (such as 0,4095) or percentiles"
                text = f"{_shown(path)}: INPUT.BIT_DEPTH full has no meaning for pixels of mode {image.mode}: {what}"
                raise ImageError(text, "image-depth")
            span = (0.0, 65535.0)
        elif span is None:
            low, high = np.percentile(values[finite], _PERCENTILES) if finite.any() else (0.0, 0.0)
            span = (float(low), float(high))
        scaled = (np.where(finite, values, span[0]) - span[0]) / max(span[1] - span[0], 1e-300)
        return (scaled.clip(0, 1) * 255 + 0.5).astype(np.uint8)


def png_bytes(pixels: np.ndarray) -> bytes:
    """Encode (H, W) or (H, W, 3) pixels as a PNG file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def one_color(pixels: np.ndarray) -> bool:
    """Return whether all (H, W, C) ``pixels`` are equal; for most images a few pixels decide."""
    first = pixels[:1, :1]
    return bool((pixels[::97, ::89] == first).all() and (pixels == first).all())


def _too_deep(path: StrPath, mode: str, values: np.ndarray | None = None) -> ImageError:
    span = ""
    if values is not None and np.isfinite(values).any():
        finite = values[np.isfinite(values)]
        span = f" with values from {finite.min():.6g} to {finite.max():.6g}"
    bits = {"I": "32-bit integers", "F": "floats"}.get(mode, "16-bit integers")
    return ImageError(
        f"{_shown(path)}: image holds {bits} (mode {mode}){span}, not 8 bits: set INPUT.BIT_DEPTH to LOW,HIGH (the "
        f"values of black and white), full or percentiles; gn-det predict has --bit-depth for it",
        "image-depth",
    )


def wrong_size(path: str, size: tuple[int, int], expected: tuple[int, int]) -> ImageError:
    """Return the error for an image whose (width, height) is ``size`` instead of ``expected``."""
    swapped = "the sides are swapped (EXIF orientation is applied when reading); " if size[::-1] == expected else ""
    return ImageError(
        f"{_shown(path)} is {size[0]}x{size[1]} pixels, the json says {expected[0]}x{expected[1]}: {swapped}correct "
        f"width and height and the annotations",
        "image-size",
    )


def _too_large(path: StrPath, size: str, limit: int) -> ImageError:
    return ImageError(
        f"{_shown(path)}: its {size} is more than the {limit} pixels that INPUT.MAX_PIXELS allows: cut it into tiles "
        f"or make it smaller, or raise INPUT.MAX_PIXELS if you trust the file",
        "image-large",
    )


def _check_png(file: BinaryIO) -> None:
    """Raise ValueError where a checksum of compressed pixels is wrong, or the file ends before it."""
    file.seek(8)
    while len(head := file.read(8)) == 8:  # chunks: length, type, content, CRC-32 of type and content
        left, kind = int.from_bytes(head[:4], "big"), head[4:]
        if kind != b"IDAT":
            file.seek(left + 4, os.SEEK_CUR)
            continue
        checksum = zlib.crc32(kind)
        while left and (piece := file.read(min(left, 1 << 20))):
            checksum = zlib.crc32(piece, checksum)
            left -= len(piece)
        if left or file.read(4) != checksum.to_bytes(4, "big"):
            raise ValueError("the checksum of its pixels is wrong: download or copy this file again")


def _unreadable(path: StrPath, error: Exception) -> ImageError:
    name = _shown(path)
    if not os.path.exists(path):
        return ImageError(f"{name}: image not found", "image-missing")
    reason = one_line(error)
    if isinstance(error, NotRegularFile):
        reason = str(error.strerror)
    elif os.stat(path).st_size == 0:
        reason = "the file is empty, 0 bytes"
    elif isinstance(error, UnidentifiedImageError):
        reason = "not an image that Pillow can read"
    return ImageError(f"{name}: image cannot be read ({reason})")


def _shown(path: StrPath) -> str:
    name = os.fspath(path)
    cut = f"... ({len(name)} characters)" if len(name) > _NAME else ""
    return printable(name[:_NAME], keep="") + cut
