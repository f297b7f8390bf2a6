"""Tiles: every object once wherever the seams are, masks and boxes joined, windows of a TIFF equal to its pixels."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, TiffImagePlugin
from scipy import ndimage

from gn_det.data.image import ImageError, ImageReader
from gn_det.data.tiff_windows import TiffWindows
from gn_det.errors import ConfigError
from gn_det.prediction.predictor import Predictor, Selection
from gn_det.prediction.tiles import LargeImage, Tiling, _Piece, _union, detect_tiles
from gn_det.structures import Detections, MaskCrop, Sample
from tests.prediction.test_images import NAMES, sample_of


def blobs(sample: Sample) -> Detections:
    """Every connected bright region is an object: what a perfect detector finds in a tile."""
    image = sample["image"].numpy()
    labeled, number = ndimage.label(image[:, :, 0] > 128)
    masks = np.stack([labeled == i + 1 for i in range(number)]) if number else np.zeros((0, *labeled.shape), bool)
    slices = ndimage.find_objects(labeled)
    boxes = np.array([(x.start, y.start, x.stop, y.stop) for y, x in slices], np.float32).reshape(-1, 4)
    # the whole of an object is surer than a part of it
    scores = torch.from_numpy(masks.sum(axis=(1, 2)) / 1e4).float().clamp(0.6, 0.99)
    classes = torch.zeros(number, dtype=torch.int64)
    return Detections(labeled.shape, torch.from_numpy(boxes), scores, classes, torch.from_numpy(masks))


BLOBS = Predictor(sample_of, blobs, NAMES, (7, 8, 19))


def scene(seed: int, height: int = 500, width: int = 640, count: int = 60, large: bool = False) -> np.ndarray:
    """Discs that do not touch, one long bar through several tiles."""
    rng = np.random.RandomState(seed)
    image = np.zeros((height, width), np.uint8)
    taken = np.zeros_like(image, bool)
    if large:
        image[200:230, 10:630] = 255
        taken[190:240] = True
    ys, xs = np.mgrid[:height, :width]
    for _ in range(count):
        y, x, r = rng.randint(0, height), rng.randint(0, width), rng.randint(4, 14)
        disc = (ys - y) ** 2 + (xs - x) ** 2
        if not taken[disc <= (r + 3) ** 2].any():
            image[disc <= r * r] = 255
            taken |= disc <= (r + 3) ** 2
    return np.repeat(image[:, :, None], 3, axis=2)


def masks_of(crops: list, size: tuple[int, int]) -> list[bytes]:
    out = []
    for top, left, bitmap in crops:
        full = np.zeros(size, bool)
        full[top : top + bitmap.shape[0], left : left + bitmap.shape[1]] = bitmap
        out.append(full.tobytes())
    return sorted(out)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("side", "overlap"), [(128, 0.3), (200, 0.2), (64, 0.5), (2000, 0.2)])
def test_tiles_find_what_the_whole_image_shows(tmp_path: Path, seed: int, side: int, overlap: float) -> None:
    """Objects smaller than the overlap: the same masks, boxes and number as without tiles, wherever the seams are."""
    pixels = scene(seed)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    found = detect_tiles(BLOBS, LargeImage(tmp_path / "a.png", ImageReader("RGB")), Tiling(side, overlap), Selection())
    whole = blobs(sample_of(pixels))
    assert whole.masks is not None and found.crops is not None
    assert masks_of(found.crops, (500, 640)) == sorted(m.numpy().tobytes() for m in whole.masks)
    assert sorted(found.detections.boxes.tolist()) == sorted(whole.boxes.tolist())
    assert found.detections.image_size == (500, 640) and not found.notes


def test_an_object_larger_than_the_overlap_is_joined_and_mentioned(tmp_path: Path) -> None:
    pixels = scene(0, large=True)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    found = detect_tiles(BLOBS, LargeImage(tmp_path / "a.png", ImageReader("RGB")), Tiling(128, 0.3), Selection())
    whole = blobs(sample_of(pixels))
    assert whole.masks is not None and found.crops is not None
    assert masks_of(found.crops, (500, 640)) == sorted(m.numpy().tobytes() for m in whole.masks)
    assert found.notes == [
        "1 object did not fit into a tile with its overlap of 38 px and was joined from parts; larger tiles or a "
        "larger overlap find them whole"
    ]


def test_joining_needs_the_memory_of_one_mask() -> None:
    """An object through 64 tiles: its parts are not laid out at the size of the whole."""
    side, tile = 1024, 128
    places = [(y, x) for y in range(0, side, tile) for x in range(0, side, tile)]
    pieces = [
        _Piece(k, np.array([x, y, x + tile, y + tile]), 0.9, 0, MaskCrop(y, x, np.ones((tile, tile), bool)), True)
        for k, (y, x) in enumerate(places)
    ]
    tracemalloc.start()
    try:
        crop = _union(pieces).crop
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert crop is not None and crop.bitmap.shape == (side, side) and crop.bitmap.all()
    assert peak < 4 * side**2


def test_tiles_cover_the_image_with_one_size() -> None:
    windows = Tiling(100, 0.25).windows(333, 90)
    assert [w[0] for w in windows] == [0, 75, 150, 225, 233] and {(w[2] - w[0], w[3] - w[1]) for w in windows} == {
        (100, 90)
    }
    assert Tiling(100, 0).windows(300, 100) == [(0, 0, 100, 100), (100, 0, 200, 100), (200, 0, 300, 100)]
    for size, overlap in ((10, 0.2), (64, 0.95), (64, -0.1)):
        with pytest.raises(ConfigError):
            Tiling(size, overlap)


def tiled_tiff(path: Path, pixels: np.ndarray, side: int, compression: str = "raw", predictor: int = 1) -> None:
    """Write (H, W, C) pixels as a TIFF of ``side`` x ``side`` tiles, each compressed by Pillow as a file of its own."""
    height, width = pixels.shape[:2]
    down, across = -(-height // side), -(-width // side)
    padded = np.pad(pixels, ((0, down * side - height), (0, across * side - width), (0, 0)))
    pieces, tags = [], {}
    for row in range(down):
        for column in range(across):
            tile = padded[row * side : row * side + side, column * side : column * side + side]
            one = path.with_suffix(".one.tif")
            info = TiffImagePlugin.ImageFileDirectory_v2()
            info[278] = side  # one strip
            if predictor != 1:
                info[317] = predictor
            Image.fromarray(tile.squeeze()).save(one, compression=compression, tiffinfo=info)
            with Image.open(one) as image:
                tags = dict(image.tag_v2)
                assert len(tags[273]) == 1
                pieces.append(one.read_bytes()[tags[273][0] :][: tags[279][0]])
    directory = TiffImagePlugin.ImageFileDirectory_v2()
    for tag in (258, 259, 262, 277, 284, 317, 347, 530):
        if tag in tags:
            directory[tag] = tags[tag]
    directory[256], directory[257], directory[322], directory[323] = width, height, side, side
    starts = 8 + np.cumsum([0, *map(len, pieces)])
    directory[324], directory[325] = tuple(starts[:-1].tolist()), tuple(map(len, pieces))
    end = int(starts[-1])
    path.write_bytes(b"II*\0" + end.to_bytes(4, "little") + b"".join(pieces) + directory.tobytes(end))


@pytest.mark.parametrize(
    ("compression", "predictor"), [("raw", 1), ("tiff_lzw", 2), ("tiff_adobe_deflate", 1), ("jpeg", 1)]
)
def test_windows_of_a_tiled_tiff_are_its_pixels(tmp_path: Path, compression: str, predictor: int) -> None:
    """Each window equals the same part of the file decoded whole by Pillow, for every compression."""
    noise = np.random.RandomState(0).randint(0, 255, (25, 33, 3), dtype=np.uint8)
    pixels = np.asarray(Image.fromarray(noise).resize((330, 250)))
    path = tmp_path / "t.tif"
    tiled_tiff(path, pixels, 64, compression, predictor)
    with Image.open(path) as image:
        whole = np.asarray(image.convert("RGB"))
    large = LargeImage(path, ImageReader("RGB", max_pixels=100 * 100))  # less than the image has
    assert isinstance(large._source, TiffWindows) and large.size == (330, 250)
    for x0, y0, x1, y1 in [(0, 0, 330, 250), (60, 60, 70, 70), (64, 128, 128, 192), (300, 200, 330, 250)]:
        assert np.array_equal(large.window((x0, y0, x1, y1)), whole[y0:y1, x0:x1])
    assert large.thumbnail(100).shape == (63, 83, 3)
    if compression == "raw":
        assert np.array_equal(whole, pixels)


def test_a_damaged_tile_is_one_line_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "t.tif"
    tiled_tiff(path, np.full((200, 200, 3), 99, np.uint8), 64, "tiff_adobe_deflate")
    data = bytearray(path.read_bytes())
    data[8:40] = bytes(32)
    path.write_bytes(data)
    with pytest.raises(ImageError, match=r"t\.tif: tile 0 at 0, 0 cannot be read"):
        LargeImage(path, ImageReader("RGB")).window((0, 0, 10, 10))
    with pytest.raises(ImageError, match=r"raise INPUT\.MAX_PIXELS"):
        LargeImage(path, ImageReader("RGB", max_pixels=1000))


def test_thumbnail_is_the_mean_of_blocks(tmp_path: Path) -> None:
    pixels = np.random.RandomState(0).randint(0, 255, (90, 70, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    small = LargeImage(tmp_path / "a.png", ImageReader("RGB")).thumbnail(45)
    assert np.array_equal(small, np.asarray(Image.fromarray(pixels).reduce(2)))
