"""Read windows of a tiled TIFF without decoding the rest of it."""

from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, TiffImagePlugin

from gn_det.data.image import ImageError, ImageReader
from gn_det.files import open_regular
from gn_det.text import one_line

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _SAMPLES, _PLANES, _ORIENTATION = 256, 257, 258, 259, 277, 284, 274
_TILE_WIDTH, _TILE_HEIGHT, _OFFSETS, _COUNTS = 322, 323, 324, 325
_STRIP_OFFSETS, _ROWS_PER_STRIP, _STRIP_COUNTS = 273, 278, 279
#: Tags that say how pixels are stored: photometric, fill order, predictor, color map, extra samples, sample format,
#: JPEG tables, YCbCr coefficients, subsampling and positions.
_KEPT = (_BITS, _COMPRESSION, _SAMPLES, _PLANES, 262, 266, 317, 320, 338, 339, 347, 529, 530, 531)
#: Size of the cache of decoded tiles, which neighboring windows share, in bytes.
_CACHE = 128 << 20


def open_windows(path: Path, reader: ImageReader) -> TiffWindows | None:
    """Open a TIFF of 8-bit tiles; None for any other file, which must be decoded whole."""
    try:
        file = open_regular(path)
    except (OSError, ValueError):
        return None  # decoding the file will raise the error
    try:
        tags = _tags(file)
    except Exception:  # Pillow's reader of tags raises nearly anything on damaged files
        tags = None
    if tags is None:
        file.close()
        return None
    return TiffWindows(path, file, tags, reader.max_pixels)


def _tags(file: BinaryIO) -> Any:
    """Return the tags of the first image; None unless it has 8-bit tiles, upright and in one plane."""
    header = file.read(8)
    if header[:4] not in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"):
        return None
    if 43 in header[2:4]:
        header += file.read(8)
    tags = TiffImagePlugin.ImageFileDirectory_v2(header)
    file.seek(tags.next)
    tags.load(file)
    plain = set(tags.get(_BITS, (1,))) == {8} and tags.get(_PLANES, 1) == 1 and tags.get(_ORIENTATION, 1) == 1
    across, down = -(-tags[_WIDTH] // tags[_TILE_WIDTH]), -(-tags[_HEIGHT] // tags[_TILE_HEIGHT])
    whole = len(tags[_OFFSETS]) == len(tags[_COUNTS]) == across * down
    return tags if plain and whole else None


class TiffWindows:
    """RGB windows of an open TIFF; Pillow decodes each tile as a separate image.

    Attributes:
        size: (width, height) in pixels.
    """

    def __init__(self, path: Path, file: BinaryIO, tags: Any, max_pixels: int) -> None:
        self._path, self._file, self._tags = path, file, tags
        self.size = (int(tags[_WIDTH]), int(tags[_HEIGHT]))
        self._tile = (int(tags[_TILE_WIDTH]), int(tags[_TILE_HEIGHT]))
        pixels = self._tile[0] * self._tile[1]
        if pixels > max_pixels:
            raise ImageError(
                f"{path}: its tiles of {self._tile[0]}x{self._tile[1]} pixels are larger than the {max_pixels} pixels "
                f"that INPUT.MAX_PIXELS allows: raise INPUT.MAX_PIXELS if you trust the file",
                "image-large",
            )
        self._decoded = functools.lru_cache(maxsize=max(_CACHE // (3 * pixels), 1))(self._decode)

    def read(self, window: tuple[int, int, int, int]) -> np.ndarray:
        """Return the (h, w, 3) uint8 RGB pixels of an XYXY window.

        Raises:
            ImageError: a tile is damaged.
        """
        x0, y0, x1, y1 = window
        width, height = self._tile

        def part(row: int, column: int) -> np.ndarray:
            top, left = row * height, column * width
            return self._decoded(row, column)[max(y0 - top, 0) : y1 - top, max(x0 - left, 0) : x1 - left]

        rows, columns = range(y0 // height, -(-y1 // height)), range(x0 // width, -(-x1 // width))
        return np.vstack([np.hstack([part(row, column) for column in columns]) for row in rows])

    def _decode(self, row: int, column: int) -> np.ndarray:
        """Decode one tile by wrapping its bytes as the only strip of a small TIFF."""
        width, height = self._tile
        number = row * -(-self.size[0] // width) + column
        try:
            self._file.seek(self._tags[_OFFSETS][number])
            data = self._file.read(self._tags[_COUNTS][number])
            # "_prefix" is the byte order; Pillow has no other name for it
            tags = TiffImagePlugin.ImageFileDirectory_v2(prefix=self._tags._prefix)
            for tag in _KEPT:
                if tag in self._tags:
                    tags.tagtype[tag] = self._tags.tagtype[tag]
                    tags[tag] = self._tags[tag]
            tags[_WIDTH], tags[_HEIGHT], tags[_ROWS_PER_STRIP] = width, height, height
            tags[_STRIP_OFFSETS], tags[_STRIP_COUNTS] = 0, len(data)  # counted from the end of the tags
            strip = io.BytesIO()
            tags.save(strip)
            strip.write(data)
            strip.seek(0)
            with Image.open(strip) as image:
                return np.asarray(image.convert("RGB"))
        except Exception as error:  # decoders raise nearly anything, as in ImageReader
            where = f"tile {number} at {column * width}, {row * height}"
            raise ImageError(f"{self._path}: {where} cannot be read ({one_line(error)})") from error
