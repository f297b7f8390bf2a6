"""Pictures of every mode arrive as upright uint8 arrays; unreadable ones raise one line with their name."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gn_det.data.image import image_size, read_image
from gn_det.errors import ConfigError, DataError


@pytest.fixture
def rgb() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8))


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "RGB", "CMYK"])
def test_modes(tmp_path: Path, rgb: Image.Image, mode: str) -> None:
    path = tmp_path / ("a.tiff" if mode == "CMYK" else "a.png")
    rgb.convert(mode).save(path)
    want = np.asarray(rgb.convert(mode).convert("RGB"))
    assert np.array_equal(read_image(path, "RGB"), want)
    assert np.array_equal(read_image(path, "BGR"), want[:, :, ::-1])
    assert read_image(path, "L").shape == (5, 7, 1)
    assert image_size(path) == (7, 5)


def test_sixteen_bit_gray(tmp_path: Path) -> None:
    """As Detectron2 (Pillow's conversion): values above 255 become white."""
    Image.fromarray(np.array([[0, 100, 300, 65535]], dtype=np.uint16)).save(tmp_path / "a.png")
    pixels = read_image(tmp_path / "a.png", "BGR")
    assert pixels.shape == (1, 4, 3) and pixels.dtype == np.uint8


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, orientation: int) -> None:
    """The array is what a viewer shows, and the header check knows its size without decoding."""
    from PIL import ImageOps

    picture = Image.fromarray(np.arange(35, dtype=np.uint8).reshape(5, 7))
    exif = Image.Exif()
    exif[274] = orientation
    for name in ("a.png", "a.jpg", "a.webp"):
        picture.convert("RGB").save(tmp_path / name, exif=exif)
        with Image.open(tmp_path / name) as opened:
            want = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
        got = read_image(tmp_path / name, "RGB")
        assert np.array_equal(got, want), name
        assert image_size(tmp_path / name) == (got.shape[1], got.shape[0]), name


def test_unreadable_files_are_named(tmp_path: Path, rgb: Image.Image) -> None:
    rgb.resize((64, 64)).save(tmp_path / "cut.jpg")
    data = (tmp_path / "cut.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(data[: len(data) // 2])
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "empty.jpg").touch()
    for name, reason in {
        "cut.jpg": "truncated",
        "text.jpg": "not an image",
        "empty.jpg": "0 bytes",
        "gone.jpg": "not found",
        ".": "is a folder",
    }.items():
        with pytest.raises(DataError) as error:
            read_image(tmp_path / name)
        text = str(error.value)
        assert reason in text and str(tmp_path) in text and "\n" not in text
        with pytest.raises(DataError, match=reason):
            image_size(tmp_path / name)


def test_png_that_decodes_to_other_pixels_is_refused(tmp_path: Path) -> None:
    """Random damage of the compressed pixels: refused, or the same pixels; Pillow alone gives others for a part."""
    rows, columns = np.mgrid[:30, :40]
    pixels = np.stack([rows * columns % 251, rows, columns], axis=2).astype(np.uint8)
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    data, rng, others, refused = path.read_bytes(), random.Random(3), 0, 0
    start = data.index(b"IDAT") + 4
    for _ in range(300):
        damaged = bytearray(data)
        at = rng.randrange(start, len(data) - 16)
        damaged[at : at + 4] = bytes(rng.randrange(256) for _ in damaged[at : at + 4])
        path.write_bytes(damaged)
        try:
            assert np.array_equal(read_image(path, "RGB"), pixels)
        except DataError as error:
            refused += 1
            if "the checksum of its pixels is wrong: get this file again" in str(error):
                others += not np.array_equal(np.asarray(Image.open(path)), pixels)  # Pillow takes it
    assert refused > 250 and others > 10


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_size_decodes_only_files_that_end_oddly(tmp_path: Path, rgb: Image.Image, name: str) -> None:
    """Bytes after the end do no harm; a file that broke off is found although its header is whole."""
    path = tmp_path / name
    rgb.save(path)
    size, data = image_size(path), path.read_bytes()
    path.write_bytes(data + b"trailing")
    assert image_size(path) == size == rgb.size
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"(?i)truncated"):
        image_size(path)


def test_format_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"INPUT.FORMAT 'YUV-BT.601' is not implemented"):
        read_image(tmp_path / "a.png", "YUV-BT.601")
