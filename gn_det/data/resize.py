"""Bilinear resize of 8-bit images in resize.cpp: bit-identical with Pillow and several times faster.

Pillow weights pixels by triangles as wide as the scale (at least 1), in integers of 2^-22, and scales rows first. Since
version 13 it scales columns first if that shrinks an image much more; Pillow still resizes those.
"""

from __future__ import annotations

import ctypes
import functools
import logging
from pathlib import Path

import numpy as np
from PIL import Image

from gn_det import compiler

logger = logging.getLogger(__name__)

_WHOLE = slice(None)
#: (height, width, new height, new width) of the images that resize.cpp must give as the installed Pillow does.
_SAMPLES = ((9, 13, 15, 22), (31, 40, 13, 9), (12, 30, 20, 11), (64, 48, 33, 31))


def can_resize(pixels: np.ndarray, new_height: int, new_width: int) -> bool:
    """Return whether :func:`resize` supports these pixels; compiles resize.cpp at its first use."""
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] not in (1, 3) or 0 in pixels.shape:
        return False
    height, width, _ = pixels.shape
    rows_first = new_height >= height or height - new_height <= 2 * (width - new_width)  # in every version of Pillow
    return rows_first and _library() is not None


def resize(
    pixels: np.ndarray,
    new_height: int,
    new_width: int,
    rows: slice = _WHOLE,
    columns: slice = _WHOLE,
    library: ctypes.CDLL | None = None,
) -> np.ndarray:
    """Scale pixels that :func:`can_resize` supports.

    Args:
        pixels: (H, W, C) uint8.
        rows, columns: the part of the result that is wanted.
        library: the compiled resize.cpp, if it is not the one in use.

    Returns:
        (H', W', C) uint8, a view of C contiguous planes.
    """
    if pixels.strides[2] < 0:  # BGR as a view of RGB
        return resize(pixels[:, :, ::-1], new_height, new_width, rows, columns, library)[:, :, ::-1]
    library = library or _library()
    assert library is not None
    pixels = np.ascontiguousarray(pixels)
    height, width, channels = pixels.shape
    axes = [_weights(width, new_width, columns), _weights(height, new_height, rows)]
    out = np.empty((channels, len(axes[1][0]), len(axes[0][0])), np.uint8)
    taps = (v for first, weights in axes for v in (first.ctypes.data, weights.ctypes.data, len(first), len(weights)))
    if not library.resize_bilinear(pixels.ctypes.data, width, channels, out.ctypes.data, *taps):
        raise MemoryError(f"cannot resize {width}x{height} pixels to {new_width}x{new_height}")
    hwc: np.ndarray = out.transpose(1, 2, 0)
    return hwc


def _weights(size: int, new_size: int, part: slice) -> tuple[np.ndarray, np.ndarray]:
    """Return :func:`_all_weights` of a part of the new pixels."""
    first, weights = _all_weights(size, new_size)
    return np.ascontiguousarray(first[part]), np.ascontiguousarray(weights[:, part])


@functools.lru_cache(maxsize=64)
def _all_weights(size: int, new_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the first source pixel of each new pixel, (S,) int32, and the weights, (taps, S) int32."""
    scale = size / new_size
    support = max(scale, 1.0)
    center = (np.arange(new_size) + 0.5) * scale
    first = np.maximum((center - support + 0.5).astype(np.int64), 0)
    count = np.minimum((center + support + 0.5).astype(np.int64), size) - first
    taps = int(count.max())
    first = np.minimum(first, size - taps)  # so that all taps lie within the image; those before the old one weigh 0
    distance = np.arange(taps)[:, None] + first - center + 0.5
    share = np.maximum(1.0 - np.abs(distance * (1.0 / support)), 0.0)
    share /= functools.reduce(np.add, share)  # in Pillow's order of summation
    return first.astype(np.int32), (0.5 + share * (1 << 22)).astype(np.int32)


@functools.cache
def _library() -> ctypes.CDLL | None:
    library = compiler.load(Path(__file__).with_suffix(".cpp"), "images are resized by Pillow")
    if library is None:
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    axis = (pointer, pointer, number, number)
    library.resize_bilinear.argtypes = (pointer, number, number, pointer, *axis, *axis)
    if not all(_same_as_pillow(library, *sizes) for sizes in _SAMPLES):
        logger.warning(
            "The installed Pillow resizes differently from gn_det's resize.cpp, so images are resized by Pillow."
        )
        return None
    return library


def _same_as_pillow(library: ctypes.CDLL, height: int, width: int, new_height: int, new_width: int) -> bool:
    pixels = np.random.RandomState(0).randint(0, 256, (height, width, 3)).astype(np.uint8)
    wanted = Image.fromarray(pixels).resize((new_width, new_height), Image.Resampling.BILINEAR)
    return np.array_equal(resize(pixels, new_height, new_width, library=library), np.asarray(wanted))
