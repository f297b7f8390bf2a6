"""Each mistake is named in one line: file, id or key, and what to do. Few bad entries are dropped, many refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gn_det.data.annotations import resolve_id
from gn_det.data.catalog import DatasetSource
from gn_det.data.coco import load_coco
from gn_det.errors import DataError
from tests.data.own_coco import Change, write


def _first(**values: Any) -> Change:
    return lambda c: c["annotations"][0].update(values)


def _second(**values: Any) -> Change:
    return lambda c: c["annotations"][1].update(values)


def _rle(size: list[int], counts: Any) -> Change:
    return _second(segmentation={"size": size, "counts": counts})


#: What is done to an annotation, the kind of problem, and a part of the message.
BAD_ANNOTATIONS: dict[str, tuple[Change, str, str]] = {
    "missing image": (_first(image_id=99), "image-unknown", "image_id 99 is not in 'images'"),
    "image id of a wrong type": (_first(image_id=[5]), "image-unknown", "image_id [5] is not in 'images'"),
    "image id in other words": (_first(image_id="five"), "image-unknown", "image_id 'five' is not in 'images'"),
    "category id as fraction": (_first(category_id=9.5), "category-unknown", "category_id 9.5 is not in"),
    "far outside": (_first(bbox=[0, 0, 1e308, 5], segmentation=[]), "bbox-far", "reaches far outside the 40x30 image"),
    "missing category": (_first(category_id=3), "category-unknown", "3 is not in the json's categories (2, 9)"),
    "no category": (_first(category_id=None), "category-unknown", "category_id None"),
    "zero width": (_first(bbox=[2, 3, 0, 8], segmentation=[]), "bbox-no-area", "bbox [2, 3, 0, 8] has no area"),
    "negative height": (_first(bbox=[2, 3, 5, -8], segmentation=[]), "bbox-no-area", "has no area"),
    "outside": (_first(bbox=[41, 3, 5, 8], segmentation=[]), "bbox-outside", "is outside the 40x30 image"),
    "left of the image": (_first(bbox=[-9, 3, 9, 8], segmentation=[]), "bbox-outside", "is outside the 40x30 image"),
    "three numbers": (_first(bbox=[2, 3, 5], segmentation=[]), "bbox-format", "is not [x, y, width, height]"),
    "no box": (_first(bbox=None, segmentation=[]), "bbox-format", "bbox None is not"),
    "nan box": (_first(bbox=[2, 3, math.nan, 4], segmentation=[]), "bbox-format", "in finite numbers"),
    "text box": (_first(bbox=["2", 3, 4, 4], segmentation=[]), "bbox-format", "in finite numbers"),
    "nan vertex": (_first(segmentation=[[2, 3, math.nan, 3, 12, 11]]), "polygon-no-number", "not finite numbers"),
    "infinite vertex": (_first(segmentation=[[2, 3, math.inf, 3, 12, 11]]), "polygon-no-number", "not finite numbers"),
    "huge vertex": (_first(segmentation=[[2, 3, 1e7, 3, 12, 11]]), "polygon-far", "vertex at (1e+07, 3), far outside"),
    "huge integer": (_first(segmentation=[[2, 3, 10**30, 3, 12, 11]]), "polygon-no-number", "segmentation has"),
    "two points": (_first(segmentation=[[2, 3, 12, 3]]), "polygon-short", "3 points or more as [x0, y0, x1, y1, ...]"),
    "odd length": (_first(segmentation=[[2, 3, 12, 3, 12, 11, 5]]), "polygon-short", "an even number of coordinates"),
    "flat polygon": (_first(segmentation=[2, 3, 12, 3, 12, 11]), "segmentation-format", "neither a list of polygons"),
    "text polygon": (_first(segmentation=[["2", "3", "4", "5", "6", "7"]]), "polygon-no-number", "not finite numbers"),
    "nested polygon": (_first(segmentation=[[[2, 3], [4, 5], [6, 7]]]), "polygon-short", "no usable polygon"),
    "ragged polygon": (_first(segmentation=[[[2, 3], 4, 5, 6, 7, 8]]), "polygon-no-number", "not finite numbers"),
    "text segmentation": (_first(segmentation="abc"), "segmentation-format", "nor an RLE"),
    "iscrowd 2": (_first(iscrowd=2), "iscrowd", "iscrowd 2 is not 0 or 1"),
    "ignore": (_first(ignore=1), "ignore", "mark regions to ignore with iscrowd 1"),
    "swapped size": (_rle([40, 30], [1200]), "rle-size", "[40, 30] is not the image's [height, width] [30, 40]"),
    "wrong size": (_rle([20, 20], [0, 400]), "rle-size", "RLE size [20, 20] is not the image's"),
    "size is no pair": (_rle([1], [0, 400]), "rle-size", "RLE size [1] is not"),
    "counts too short": (_rle([30, 40], [0, 30]), "rle-length", "RLE counts cover 30 pixels, the image has 1200"),
    "counts too long": (_rle([30, 40], [0, 1201]), "rle-length", "RLE counts cover 1201 pixels"),
    "negative counts": (_rle([30, 40], [1300, -100]), "rle-format", "negative"),
    "fractions": (_rle([30, 40], [599.5, 600.5]), "rle-format", "not integers"),
    "enormous counts": (_rle([30, 40], [2**62, 2**62, 2**62]), "rle-format", "integers below 2^32"),
    "counts beyond 32 bits": (_rle([30, 40], [2**32, 4]), "rle-format", "integers below 2^32"),
    "empty mask": (_rle([30, 40], [1200]), "rle-empty", "no foreground pixel"),
    "cut string": (_rle([30, 40], "oP"), "rle-format", "end in the middle of a number"),
    "strange string": (_rle([30, 40], "0é"), "rle-format", "contain invalid characters"),
    "long number": (_rle([30, 40], "o" * 30 + "0"), "rle-format", "larger than any image"),
    "counts of a wrong type": (_rle([30, 40], 7), "rle-format", "neither a list of run lengths"),
    "no counts": (_second(segmentation={"size": [30, 40]}), "rle-format", "neither a list of run lengths"),
    "not an object": (lambda c: c["annotations"].append("x"), "annotation-entry", "is not an object"),
}


@pytest.mark.parametrize("case", BAD_ANNOTATIONS)
def test_bad_annotation(tmp_path: Path, case: str) -> None:
    """Dropped and listed with MAX_BAD 1, refused with 0; the other objects are untouched."""
    change, _, message = BAD_ANNOTATIONS[case]
    source = write(tmp_path, change)
    data = load_coco(source, max_bad=1)
    assert len(data.bad) == 1 and message in data.bad[0]
    assert data.object_counts.sum() == (3 if case == "not an object" else 2)
    assert message in data.summary()
    with pytest.raises(DataError) as refused:
        load_coco(source, max_bad=0)
    text = str(refused.value)
    assert "\n" not in text and message in text and "own.json" in text and "DATALOADER.MAX_BAD" in text


def test_integer_of_5000_digits(tmp_path: Path) -> None:
    """Python refuses to parse it; here it is a number like any other that is too large."""
    source = write(tmp_path, _first(bbox=[2, 3, "HUGE", 4], segmentation=[]))
    path = Path(source.json_file)
    path.write_text(path.read_text().replace('"HUGE"', "9" * 5000))
    data = load_coco(source, max_bad=1)
    assert len(data.bad) == 1 and "is not [x, y, width, height] in finite numbers" in data.bad[0]


BAD_FILES: dict[str, tuple[Change, str, str]] = {
    "no categories": (lambda c: c.pop("categories"), "categories-missing", "'categories' is missing"),
    "empty categories": (lambda c: c.update(categories=[]), "categories-missing", "'categories' is missing"),
    "category without name": (
        lambda c: c["categories"][0].pop("name"),
        "category-malformed",
        "an integer 'id' and a 'name'",
    ),
    **{
        f"category name {name[:9]!a}": (
            lambda c, name=name: c["categories"][0].update(name=name),
            "category-malformed",
            "without control characters",
        )
        for name in ("", "a\nb", "a\tb", "a\x00", "\x7f", "\ud800", "x" * 481)
    },
    "category twice": (
        lambda c: c["categories"][0].update(id=2),
        "category-id-repeated",
        "id 2 appears more than once",
    ),
    "name twice": (lambda c: c["categories"][0].update(name="two"), "category-name-repeated", "is used by ids 2, 9"),
    "no images": (lambda c: c.pop("images"), "images-missing", "'images' is missing"),
    "empty images": (lambda c: c.update(images=[]), "images-missing", "'images' is missing"),
    "image without id": (lambda c: c["images"][1].pop("id"), "image-no-id", "entry 1 of 'images' has no 'id'"),
    "image twice": (
        lambda c: c["images"][0].update(id=6),
        "image-id-repeated",
        "more than once (im 8é.png, im 6é.png)",
    ),
    "annotations is no list": (lambda c: c.update(annotations={}), "json-structure", "'annotations' is a dict"),
    "misspelt key": (lambda c: c.update(annotation=c.pop("annotations")), "json-structure", "'annotations' is missing"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_structure_is_refused(tmp_path: Path, case: str) -> None:
    change, _, message = BAD_FILES[case]
    with pytest.raises(DataError) as refused:
        load_coco(write(tmp_path, change), max_bad=1000)
    text = str(refused.value)
    assert message in text and "own.json" in text and "\n" not in text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b'{"images": [', "not a json file (Expecting value in line 1"),
        (b"[]", "COCO *results*"),
        (b"\xff\xfe\x00", "not UTF-8"),
        (b"null", "holds a NoneType"),
    ],
)
def test_not_a_coco_json(tmp_path: Path, content: bytes, message: str) -> None:
    source = write(tmp_path)
    Path(source.json_file).write_bytes(content)
    with pytest.raises(DataError) as refused:
        load_coco(source, max_bad=10)
    assert message in str(refused.value) and "own.json" in str(refused.value)


def test_wrong_paths_name_the_key(tmp_path: Path) -> None:
    source = write(tmp_path)
    gone = DatasetSource("own", str(tmp_path / "gone.json"), source.image_root, source.origin)
    with pytest.raises(DataError, match=r"gone.json: .* not found: check DATASETS.TRAIN_JSON"):
        load_coco(gone, max_bad=0)
    with pytest.raises(DataError, match="is a folder"):
        load_coco(DatasetSource("own", str(tmp_path), source.image_root), max_bad=0)
    elsewhere = DatasetSource("own", source.json_file, str(tmp_path / "elsewhere"), source.origin)
    with pytest.raises(DataError, match=r"own.json: the image folder .*elsewhere does not exist: check DATASETS"):
        load_coco(elsewhere, max_bad=100)
    (tmp_path / "empty").mkdir()
    empty = DatasetSource("own", source.json_file, str(tmp_path / "empty"), source.origin)
    with pytest.raises(DataError, match=r"none of its 4 images can be used .*: check DATASETS.* TRAIN_IMAGES"):
        load_coco(empty, max_bad=100)
    for path in tmp_path.glob("im *.png"):  # of another set that numbers its images alike
        Image.new("RGB", (3, 3)).save(tmp_path / "empty" / path.name)
    with pytest.raises(DataError, match=r"\(first: .* is 3x3 pixels, .*\): check DATASETS.* TRAIN_IMAGES"):
        load_coco(empty, max_bad=100)


def test_bad_images_are_dropped_with_their_objects(tmp_path: Path) -> None:
    """Missing, empty, not an image, other size, swapped by EXIF: header checks only, one line each."""
    source = write(tmp_path)
    (tmp_path / "im 5é.png").unlink()
    (tmp_path / "im 6é.png").write_bytes(b"")
    (tmp_path / "im 7é.png").write_bytes(b"GIF89 but not really")
    data = load_coco(source, max_bad=3)
    assert [r["image_id"] for r in data.records] == [8] and len(data.sizes) == len(data.object_counts) == 1
    assert "image 5: " in data.bad[0] and "image not found" in data.bad[0]
    assert "0 bytes" in data.bad[1] and "not an image that Pillow can read" in data.bad[2]
    with pytest.raises(DataError, match=r"3 bad images or annotations, DATALOADER.MAX_BAD allows 2"):
        load_coco(source, max_bad=2)


def test_file_name_with_a_wrong_folder(tmp_path: Path) -> None:
    source = write(tmp_path, lambda c: c["images"][0].update(file_name="train/im 8é.png"))
    assert "image not found; there is " in load_coco(source, max_bad=1).bad[0]


def test_image_of_another_size(tmp_path: Path) -> None:
    source = write(tmp_path)
    exif = Image.Exif()
    exif[274] = 6
    Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(tmp_path / "im 5é.png", exif=exif)
    Image.fromarray(np.zeros((31, 40, 3), np.uint8)).save(tmp_path / "im 6é.png")
    data = load_coco(source, max_bad=2)
    assert "is 30x40 pixels, the json says 40x30: the sides are swapped (EXIF" in data.bad[0]
    assert "is 40x31 pixels, the json says 40x30: correct width" in data.bad[1]


def test_image_entries_without_name_or_file(tmp_path: Path) -> None:
    def change(content: dict) -> None:
        content["images"][2].pop("width")  # image 5, which has two objects
        content["images"][1].pop("file_name")

    source = write(tmp_path, change)
    (tmp_path / "im 5é.png").unlink()
    data = load_coco(source, max_bad=2)
    assert len(data.bad) == 2  # their annotations are not listed once more
    assert "image not found" in data.bad[1] and "'file_name' is missing" in data.bad[0]


def test_refusal_quotes_a_few_of_many(tmp_path: Path) -> None:
    def change(content: dict) -> None:
        content["annotations"] = [
            dict(content["annotations"][0], id=i, bbox=[0, 0, 0, 0], segmentation=[]) for i in range(1, 101)
        ]

    with pytest.raises(DataError) as refused:
        load_coco(write(tmp_path, change), max_bad=10)
    text = str(refused.value)
    assert "100 bad" in text and "and 97 more" in text and len(text) < 900


def test_nan_in_json_does_not_reach_the_mask_api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """json accepts NaN; the mask API would take the process down with it."""
    from pycocotools import mask as coco_mask

    source = write(tmp_path, _first(segmentation=[[2, 3, math.nan, 3, 12, 11]]))
    monkeypatch.setattr(coco_mask, "frPyObjects", lambda *_: pytest.fail("the mask API was called"))
    content = json.loads(Path(source.json_file).read_text())
    del content["annotations"][0]["area"], content["annotations"][1:]
    Path(source.json_file).write_text(json.dumps(content))
    assert len(load_coco(source, max_bad=1).bad) == 1


def test_true_is_no_id() -> None:
    """Although it equals 1, which json writes in other words."""
    assert resolve_id(True, {1: 0}) is None
    assert resolve_id(1.0, {1: 0}) == resolve_id("1", {1: 0}) == 1
