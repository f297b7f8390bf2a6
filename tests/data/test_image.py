"""Pictures of every mode arrive as upright uint8 arrays; unreadable ones raise one line with their name."""

from __future__ import annotations

import os
import random
import re
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import gn_det
from gn_det.config import get_cfg, load_config
from gn_det.data.image import (
    MAX_PIXELS,
    ImageError,
    ImageReader,
    one_color,
)
from gn_det.errors import ConfigError, DataError


@pytest.fixture
def rgb() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8))


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "RGB", "CMYK"])
def test_modes(tmp_path: Path, rgb: Image.Image, mode: str) -> None:
    path = tmp_path / ("a.tiff" if mode == "CMYK" else "a.png")
    rgb.convert(mode).save(path)
    want = np.asarray(rgb.convert(mode).convert("RGB"))
    assert np.array_equal(ImageReader("RGB").read(path), want)
    assert np.array_equal(ImageReader("BGR").read(path), want[:, :, ::-1])
    assert ImageReader("L").read(path).shape == (5, 7, 1)
    assert ImageReader().size(path) == (7, 5)


def deep(folder: Path, kind: str, values: np.ndarray) -> Path:
    """Gray pictures of more than 8 bits: 16-bit PNG, 16-bit TIFF of either byte order, 32-bit integers, floats."""
    path = folder / f"{kind.replace(';', '')}.{'png' if kind == 'png' else 'tif'}"
    if kind == "I;16B":
        raw = Image.frombytes("I;16B", values.shape[::-1], values.astype(">u2").tobytes())
        raw.save(path)
    else:
        types = {"png": np.uint16, "I;16": np.uint16, "I": np.int32, "F": np.float32}
        Image.fromarray(values.astype(types[kind])).save(path)
    return path


VALUES = np.array([[0, 100, 300], [1000, 2047, 4095]])


@pytest.mark.parametrize("kind", ["png", "I;16", "I;16B", "I", "F"])
def test_deep_gray_is_refused_by_mode_and_range(tmp_path: Path, kind: str) -> None:
    """Pillow's own conversion would clip it at 255."""
    path = deep(tmp_path, kind, VALUES)
    with Image.open(path) as opened:
        mode = opened.mode
    with pytest.raises(ImageError) as refused:
        ImageReader().read(path)
    text = str(refused.value)
    assert f"(mode {mode})" in text and "values from 0 to 4095" in text and "set INPUT.BIT_DEPTH to LOW,HIGH" in text
    assert refused.value.kind == "image-depth"
    with pytest.raises(ImageError, match=r"INPUT.BIT_DEPTH"):  # the header alone tells the mode
        ImageReader().size(path)


@pytest.mark.parametrize("kind", ["png", "I;16", "I;16B", "I", "F"])
def test_bit_depth_scales_deep_gray(tmp_path: Path, kind: str) -> None:
    """LOW,HIGH and percentiles: rounded linear maps, cut at both ends; equal for every mode that holds the values."""
    path = deep(tmp_path, kind, VALUES)
    for depth, low, high in (("0,4095", 0, 4095), ("[50, 1000]", 50, 1000), ("-100,9999.5", -100, 9999.5)):
        want = np.floor(np.clip((VALUES - low) / (high - low), 0, 1) * 255 + 0.5)
        reader = ImageReader("BGR", depth)
        assert np.array_equal(reader.read(path), np.repeat(want[:, :, None], 3, axis=2))
        assert np.array_equal(ImageReader("L", depth).read(path)[:, :, 0], want)
        assert reader.size(path) == (3, 2)
    low, high = np.percentile(VALUES, (0.5, 99.5))
    want = np.floor(np.clip((VALUES - low) / (high - low), 0, 1) * 255 + 0.5)
    assert np.array_equal(ImageReader("L", "percentiles").read(path)[:, :, 0], want)
    if kind in ("I", "F"):
        with pytest.raises(ImageError, match=f"INPUT.BIT_DEPTH full has no meaning for pixels of mode {kind}"):
            ImageReader("L", "full").read(path)
    else:
        assert np.array_equal(ImageReader("L", "full").read(path)[:, :, 0], np.floor(VALUES / 65535 * 255 + 0.5))


def test_the_full_range_of_16_bits(tmp_path: Path) -> None:
    """Both sides of each step, in a file that Pillow gives as 32-bit integers, too."""
    steps = np.arange(255) * 257 + 128
    values = np.array([steps, steps + 1])
    (tmp_path / "a.pgm").write_bytes(b"P5 255 2 65535\n" + values.astype(">u2").tobytes())
    for path in (deep(tmp_path, "png", values), tmp_path / "a.pgm"):
        assert np.array_equal(ImageReader("L", "full").read(path)[:, :, 0], [np.arange(255), np.arange(255) + 1])


def test_bit_depth_of_odd_pictures(tmp_path: Path) -> None:
    """NaN counts as black, a picture of one value or without a number is black; 8-bit pictures are never scaled."""
    path = deep(tmp_path, "F", np.array([[np.nan, 1.0, np.inf, 2.0]]))
    assert ImageReader("L", "1,2").read(path).ravel().tolist() == [0, 0, 0, 255]
    for values in ([[np.nan, np.nan]], [[5.0, 5.0]]):
        assert not ImageReader("L", "percentiles").read(deep(tmp_path, "F", np.array(values))).any()
    Image.fromarray(np.array([[3, 200]], np.uint8)).save(tmp_path / "a.png")
    assert ImageReader("L", "0,4095").read(tmp_path / "a.png").ravel().tolist() == [3, 200]


@pytest.mark.parametrize("depth", ["16", "4095,0", "1,1", "nan,5", "0,inf", "a,b", "FULL", "1,2,3"])
def test_bit_depth_is_checked(depth: str) -> None:
    with pytest.raises(ConfigError, match=r"INPUT.BIT_DEPTH is .*; it must be .*percentiles\" or \"LOW,HIGH\""):
        load_config("quickstart.yaml", ["INPUT.BIT_DEPTH", depth])


def test_max_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own limit below and above Pillow's, which it raises; the default is where Pillow stops."""
    Image.new("1", (40, 30)).save(tmp_path / "a.png")
    assert ImageReader(max_pixels=1200).size(tmp_path / "a.png") == (40, 30)
    for read in (ImageReader(max_pixels=1199).read, ImageReader(max_pixels=1199).size):
        with pytest.raises(ImageError, match=r"a.png: its size of 40x30 pixels is more than the 1199 .*INPUT.MAX_PIX"):
            read(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow refuses above 200
    with pytest.raises(ImageError, match=r"raise INPUT.MAX_PIXELS if you trust the file") as refused:
        ImageReader(max_pixels=200).size(tmp_path / "a.png")
    assert refused.value.kind == "image-large"
    assert ImageReader(max_pixels=1200).read(tmp_path / "a.png").shape == (30, 40, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 400)  # and here above 800
    assert ImageReader(max_pixels=1200).read(tmp_path / "a.png").shape == (30, 40, 3)
    assert 2 * (1024**3 // 4 // 3) == MAX_PIXELS == get_cfg().INPUT.MAX_PIXELS


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    """A pipe without a writer would hang; Ghostscript would run what an EPS file says."""
    os.mkfifo(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    for name, reason in (("a.png", "a named pipe, not a regular file"), ("b.png", "EPS files are programs")):
        for read in (ImageReader().read, ImageReader().size):
            with pytest.raises(ImageError, match=reason):
                read(tmp_path / name)


@pytest.mark.parametrize("name", ["a\0b.png", "x" * 5000, "esc\x1b[2J.png", "../" * 40 + "none.png", "/none/a.png"])
def test_hostile_names_end_in_one_printable_line(tmp_path: Path, name: str) -> None:
    for read in (ImageReader().read, ImageReader().size):
        with pytest.raises(ImageError) as refused:
            read(os.path.join(tmp_path, name))
        assert str(refused.value).isprintable() and len(str(refused.value)) < 500


def test_arrays_are_rgb(rgb: Image.Image, tmp_path: Path) -> None:
    """An array gives what its file would give."""
    rgb.save(tmp_path / "a.png")
    for image_format in ("BGR", "RGB", "L"):
        reader = ImageReader(image_format)
        assert np.array_equal(reader.from_array(np.asarray(rgb)), reader.read(tmp_path / "a.png"))
    for wrong in (np.zeros((4, 5, 3)), np.zeros((4, 5), np.uint8), np.zeros((4, 5, 4), np.uint8)):
        with pytest.raises(DataError, match=r"must be an .* uint8 array in RGB order, got"):
            ImageReader().from_array(wrong)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, orientation: int) -> None:
    """The array is what a viewer shows, and the header check knows its size without decoding."""
    from PIL import ImageOps

    picture = Image.fromarray(np.arange(35, dtype=np.uint8).reshape(5, 7))
    exif = Image.Exif()
    exif[274] = orientation
    for name in ("a.png", "a.jpg", "a.webp", "a.tif"):
        picture.convert("RGB").save(tmp_path / name, exif=exif)
        with Image.open(tmp_path / name) as opened:
            want = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
        got = ImageReader("RGB").read(tmp_path / name)
        assert np.array_equal(got, want), name
        assert ImageReader().size(tmp_path / name) == (got.shape[1], got.shape[0]), name


def test_exif_orientation_with_pillow_9(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its exif_transpose() has no in_place, and an error about EXIF is no error of the image."""
    from PIL import ImageOps

    monkeypatch.setattr(ImageOps, "exif_transpose", lambda image: image)
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (7, 5)).save(tmp_path / "a.jpg", exif=exif)
    assert ImageReader().read(tmp_path / "a.jpg").shape == (7, 5, 3)


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
            ImageReader().read(tmp_path / name)
        text = str(error.value)
        assert reason in text and str(tmp_path) in text and "\n" not in text
        with pytest.raises(DataError, match=reason):
            ImageReader().size(tmp_path / name)


def test_png_that_decodes_to_other_pixels_is_refused(tmp_path: Path) -> None:
    """Random damage of the compressed pixels, and bytes cut out of them (the last chunk then has more bytes than the
    file): refused, or the same pixels; Pillow alone gives others for a part.
    """
    rows, columns = np.mgrid[:30, :40]
    pixels = np.stack([rows * columns % 251, rows, columns], axis=2).astype(np.uint8)
    path = tmp_path / "a.png"
    Image.fromarray(pixels).save(path)
    data, rng, others, refused = path.read_bytes(), random.Random(3), [0, 0], 0
    start = data.index(b"IDAT") + 4
    for number in range(600):
        damaged = bytearray(data)
        at = rng.randrange(start, len(data) - 16)
        if number % 2:
            damaged[at : at + 4] = bytes(rng.randrange(256) for _ in damaged[at : at + 4])
        else:
            del damaged[at : at + rng.choice((1, 14, 60))]
        path.write_bytes(damaged)
        try:
            assert np.array_equal(ImageReader("RGB").read(path), pixels)
        except DataError as error:
            refused += 1
            if "the checksum of its pixels is wrong: download or copy this file again" in str(error):
                others[number % 2] += not np.array_equal(np.asarray(Image.open(path)), pixels)  # Pillow takes it
    assert refused > 500 and min(others) > 5


def test_a_png_that_training_refuses_does_not_pass_the_header_check(tmp_path: Path, rgb: Image.Image) -> None:
    """Cut anywhere near its end, whether Pillow takes it or not."""
    rgb.save(tmp_path / "whole.png")
    data = (tmp_path / "whole.png").read_bytes()
    refused = []
    for left_out in range(1, 30):
        path = tmp_path / f"{left_out}.png"
        path.write_bytes(data[:-left_out])
        results = []
        for look in (ImageReader().read, ImageReader().size):
            try:
                look(path)
                results.append("")
            except DataError as error:
                results.append(str(error))
        assert results[0] == results[1]
        refused.append(bool(results[0]))
    assert refused == [False] * 12 + [True] * 17  # the last chunk, and then the checksum of the pixels


def test_only_checksums_of_pixels_count(tmp_path: Path, rgb: Image.Image) -> None:
    """Pillow does not look at those of what follows the pixels, and a wrong one there changes none."""
    rgb.save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    text = struct.pack(">I", 3) + b"tEXta\0b" + bytes(4)
    (tmp_path / "a.png").write_bytes(data[:-12] + text + data[-12:])
    assert np.array_equal(ImageReader("RGB").read(tmp_path / "a.png"), np.asarray(rgb))


def test_size_of_a_png_decodes_nothing(tmp_path: Path, rgb: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL.PngImagePlugin import PngImageFile

    decoded: list[int] = []
    load = PngImageFile.load
    monkeypatch.setattr(PngImageFile, "load", lambda self: (decoded.append(1), load(self))[1])
    rgb.save(tmp_path / "a.png")
    decoded.clear()
    assert ImageReader().size(tmp_path / "a.png") == rgb.size and not decoded
    ImageReader().read(tmp_path / "a.png")
    assert decoded


@pytest.mark.parametrize("name", ["a.jpg", "a.png"])
def test_size_decodes_only_files_that_end_oddly(tmp_path: Path, rgb: Image.Image, name: str) -> None:
    """Bytes after the end do no harm; a file that broke off is found although its header is whole."""
    path = tmp_path / name
    rgb.save(path)
    size, data = ImageReader().size(path), path.read_bytes()
    path.write_bytes(data + b"trailing")
    assert ImageReader().size(path) == size == rgb.size
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match=r"(?i)truncated"):
        ImageReader().size(path)


def test_format_is_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"INPUT.FORMAT 'YUV-BT.601' is not implemented"):
        ImageReader("YUV-BT.601").read(tmp_path / "a.png")


def test_pictures_are_opened_in_one_place() -> None:
    """Whatever reads pictures or sets goes by the config's reader, so that all commands follow INPUT.BIT_DEPTH."""
    package = Path(gn_det.__file__).parent
    sources = {str(path.relative_to(package)): path.read_text(encoding="utf-8") for path in package.rglob("*.py")}
    opens = {name for name, text in sources.items() if re.search(r"Image\.open\(", text)}
    # besides the reader: checksums, the tiles of a TIFF, masks, which are not pictures, and drawings of our own
    others = {"check/decode.py", "data/tiff_windows.py", "data/formats/labelme.py", "data/formats/png_masks.py"}
    others |= {"engine/loggers.py"}
    assert opens == {"data/image.py", *others}
    for name, text in sources.items():
        for call in re.findall(r"(?<!def )load_coco\((?!`)[^`]*?\)$", text, re.M):
            assert "reader=" in call, (name, call)


def test_one_color() -> None:
    """A single other pixel anywhere is enough; a color is one color, too."""
    pixels = np.full((120, 130, 3), (9, 8, 7), np.uint8)
    assert one_color(pixels) and one_color(pixels[:, :, :1])
    for y, x, c in ((0, 0, 0), (119, 129, 2), (50, 51, 1)):
        other = pixels.copy()
        other[y, x, c] += 1
        assert not one_color(other)
