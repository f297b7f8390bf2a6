"""resize.cpp against Pillow: equal to the bit at every size, or left to Pillow."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from gn_det.data import resize as module
from gn_det.data.resize import can_resize, resize
from gn_det.data.transforms import Crop, Resize

needs_compiler = pytest.mark.skipif(module._library() is None, reason="needs a C++ compiler")


def pillow(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    return np.asarray(picture.resize((width, height), Image.Resampling.BILINEAR)).reshape(height, width, -1)


@needs_compiler
def test_equal_to_pillow_at_any_size() -> None:
    """Up, down, one axis alone, single pixels, large factors; noise, and the black and white that ties come from."""
    rng = np.random.default_rng(0)
    taken = 0
    for number in range(600):
        sizes = np.exp(rng.uniform(0, 5.7, 4)).astype(int).tolist()
        sizes = sizes[:3] + [sizes[1]] if number % 7 == 0 else sizes
        height, width, new_height, new_width = sizes
        pixels = rng.integers(0, 256, (height, width, 3 if number % 5 else 1), dtype=np.uint8)
        pixels = pixels // 128 * 255 if number % 3 == 0 else pixels
        if can_resize(pixels, new_height, new_width):
            taken += 1
            assert np.array_equal(resize(pixels, new_height, new_width), pillow(pixels, new_height, new_width)), sizes
        assert np.array_equal(Resize(*sizes).image(pixels), pillow(pixels, new_height, new_width)), sizes
    assert taken > 300


@needs_compiler
@pytest.mark.parametrize("size, new", [((480, 640), (800, 1067)), ((640, 427), (1199, 800)), ((700, 500), (300, 214))])
def test_views_and_parts(size: tuple[int, int], new: tuple[int, int]) -> None:
    """BGR, mirrored and cut views give what a copy gives; a part is the part of the whole."""
    pixels = np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)
    whole = pillow(pixels, *new)
    assert np.array_equal(resize(pixels[:, :, ::-1], *new), whole[:, :, ::-1])
    for view in (pixels[:, ::-1], pixels[10:-7, 3:-5]):
        assert np.array_equal(resize(view, *new), pillow(np.ascontiguousarray(view), *new))
    part = resize(pixels, *new, slice(20, 200), slice(150, 210))
    assert np.array_equal(part, whole[20:200, 150:210])
    assert np.array_equal(Resize(*size, *new).window(pixels, Crop(150, 20, 5000, 180)), whole[20:200, 150:])


@pytest.mark.parametrize("compiled", [pytest.param(True, marks=needs_compiler), False])
def test_tall_images_are_cut_as_pillow_resizes_them(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Pillow 13 scales columns first, and where it does not."""
    if not compiled:
        monkeypatch.setattr(module, "_library", lambda: None)
    for size, new in (((300, 60), (40, 50)), ((300, 60), (40, 70)), ((300, 200), (100, 66)), ((60, 50), (90, 75))):
        pixels = np.random.default_rng(2).integers(0, 256, (*size, 3), dtype=np.uint8)
        crop = Crop(11, 5, 30, 25)
        assert np.array_equal(Resize(*size, *new).window(pixels, crop), crop.image(pillow(pixels, *new)))
        if compiled:
            assert can_resize(pixels, *new) is (size != (300, 60))


def test_a_pillow_that_resizes_otherwise_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Pixels are those of the installed Pillow, whose other releases may round in another way."""
    library = SimpleNamespace(resize_bilinear=SimpleNamespace())
    monkeypatch.setattr(module.compiler, "load", lambda source, fallback: library)
    monkeypatch.setattr(module, "resize", lambda pixels, height, width, **_: np.zeros((height, width, 3), np.uint8))
    with caplog.at_level(logging.WARNING):
        assert module._library.__wrapped__() is None
    assert "resized by Pillow" in caplog.text
