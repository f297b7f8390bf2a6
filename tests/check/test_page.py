"""The page of a check: self-contained, escaped, with images of samples and problems, and within its memory."""

from __future__ import annotations

import base64
import io
import json
import re
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from gn_det.check.audit import Training, survey
from gn_det.check.page import draw_sample
from gn_det.cli import main
from gn_det.config import load_config
from gn_det.data.catalog import DatasetSource
from gn_det.data.shapes import make_shapes
from tests.check.test_command import words


def images(page: str) -> list[bytes]:
    return [base64.b64decode(text) for text in re.findall(r"data:image/jpeg;base64,([^\"]+)", page)]


def test_page_is_self_contained_and_shows_samples(tmp_path: Path) -> None:
    """12 drawn samples that differ from the bare images, an image of the wrong box, histograms; no address."""
    train = make_shapes(tmp_path / "å", "train", 15)
    content = json.loads(Path(train.json_file).read_text())
    content["annotations"][0]["bbox"][0] -= 60
    content["categories"][0]["name"] = "Kreis <b>&é"
    Path(train.json_file).write_text(json.dumps(content))
    out = tmp_path / "report é.html"
    assert main(words(train, None, "--html", str(out))) == 1
    page = out.read_text(encoding="utf-8")
    assert len(images(page)) == 13
    for data in images(page):
        path = tmp_path / "one.jpg"
        path.write_bytes(data)
        pixels = np.asarray(Image.open(path))
        assert pixels.ndim == 3 and 150 < max(pixels.shape) < 700
        assert pixels.std() > 5
    assert page.count("Kreis &lt;b&gt;&amp;é") >= 2 and "<b>" not in page
    assert page.count("<svg") == 1 and "<script" not in page
    assert not re.search(r"(src|href)=\"(?!data:|#)", page) and "http" not in page
    assert "000001.jpg" in page and "boxes that do not fit their masks" in page


def test_images_of_another_size_than_the_json_says_are_no_samples(tmp_path: Path) -> None:
    """The orientation behind the pixels of a PNG is unknown until it is decoded; its objects would be distorted."""
    train = make_shapes(tmp_path, "train", 2)
    first = next(Path(train.image_root).glob("*1.jpg"))
    file = io.BytesIO()
    Image.open(first).save(file, "PNG")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    chunk = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    turned = len(chunk[4:]).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
    pixels, end = file.getvalue()[:-12], file.getvalue()[-12:]
    first.write_bytes(pixels + turned + end)
    found = survey(train, "train", Training.of(load_config("quickstart.yaml")))
    assert not found.findings.total("error")
    assert draw_sample(found, 0) is None and draw_sample(found, 1) is not None


def test_page_takes_the_memory_of_one_mask(tmp_path: Path) -> None:
    """Sixty objects on a picture: 20 times its pixels as masks of the whole set."""
    size = (800, 600)
    Image.fromarray(np.zeros((size[1], size[0], 3), np.uint8)).save(tmp_path / "large.png")
    box = [0, 0, *size]
    corners = [0, 0, size[0], 0, size[0], size[1], 0, size[1]]
    objects = [
        {"id": i, "image_id": 1, "category_id": 1, "bbox": box, "area": 1e6, "iscrowd": 0, "segmentation": [corners]}
        for i in range(1, 61)
    ]
    content = {
        "images": [{"id": 1, "file_name": "large.png", "width": size[0], "height": size[1]}],
        "annotations": objects,
        "categories": [{"id": 1, "name": "a"}],
    }
    (tmp_path / "large.json").write_text(json.dumps(content))
    found = survey(
        DatasetSource("large", str(tmp_path / "large.json"), str(tmp_path)),
        "train",
        Training.of(load_config("gn_fpn.yaml")),
    )
    draw_sample(found, 0)
    tracemalloc.start()
    try:
        draw_sample(found, 0)
        assert tracemalloc.get_traced_memory()[1] < 5 * 3 * size[0] * size[1]
    finally:
        tracemalloc.stop()
