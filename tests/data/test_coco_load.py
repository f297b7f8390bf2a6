"""A valid COCO json arrives complete, in defined order, compact; what can be repaired is repaired and noted."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from gn_det.data.coco import check_num_classes, check_same_classes, load_coco
from gn_det.errors import DataError
from tests.data.own_coco import write


def test_everything_arrives(tmp_path: Path) -> None:
    data = load_coco(write(tmp_path), max_bad=0)
    assert data.class_names == ("two", "nine")  # sorted by id, gaps closed
    assert data.category_ids == (2, 9)
    assert [r["image_id"] for r in data.records] == [5, 6, 7, 8]
    first = data.records[0]
    assert first["file_name"] == str(tmp_path / "im 5é.png")
    assert (first["height"], first["width"]) == (30, 40)
    polygon, rle = first["annotations"]
    assert (polygon["id"], polygon["category_id"], polygon["bbox"]) == (11, 1, [2.0, 3.0, 10.0, 8.0])
    assert polygon["segmentation"][0].tolist() == [2.0, 3.0, 12.0, 3.0, 12.0, 11.0, 2.0, 11.0]
    assert rle["segmentation"]["size"] == [30, 40]
    assert isinstance(rle["segmentation"]["counts"], bytes)  # uncompressed lists are compressed
    assert data.object_counts.tolist() == [2, 1, 0, 0]
    assert data.class_counts.tolist() == [2, 1]
    assert data.crowds == 1
    assert data.sizes.tolist() == [[40, 30]] * 4
    assert not data.bad and not data.notes
    assert "4 images, 3 objects of 2 classes, 1 crowd region, 2 images without objects" in data.summary()


def test_ground_truth_is_the_file_again(tmp_path: Path) -> None:
    from pycocotools import mask as coco_mask

    source = write(tmp_path)
    truth = load_coco(source, max_bad=0).ground_truth()
    file = json.loads(Path(source.json_file).read_text())
    assert sorted(truth["images"], key=lambda i: i["id"]) == sorted(file["images"], key=lambda i: i["id"])
    assert [a["id"] for a in truth["annotations"]] == [1, 2, 3, 4]
    for got, want in zip(truth["annotations"], file["annotations"]):
        for key in ("image_id", "category_id", "bbox", "area", "iscrowd"):
            assert got[key] == want[key], key
        masks = []
        for segmentation in (got["segmentation"], want["segmentation"]):
            if isinstance(segmentation, list) or isinstance(segmentation["counts"], list):
                segmentation = coco_mask.frPyObjects(segmentation, 30, 40)
            masks.append(coco_mask.decode(segmentation))
        assert np.array_equal(*masks)
    json.dumps(truth)


def test_repairs_are_noted(tmp_path: Path) -> None:
    def change(content: dict) -> None:
        first, second, third, fourth = content["annotations"]
        del first["area"], first["iscrowd"]
        second["id"] = 0
        third["id"] = fourth["id"]
        first["segmentation"].append([1.0, 2.0, 3.0, 4.0])
        content["images"][0]["width"] = 40.0
        content["annotations"].append(dict(second, id=15))
        content["annotations"].append(dict(second, id=15))

    data = load_coco(write(tmp_path, change), max_bad=0)
    annotations = [a for r in data.records for a in r["annotations"]]
    assert len({a["id"] for a in annotations}) == len(annotations) == 5 and all(a["id"] > 0 for a in annotations)
    assert annotations[0]["area"] == 80.0 and annotations[0]["iscrowd"] == 0
    assert len(annotations[0]["segmentation"]) == 1
    text = data.summary()
    for part in (
        "without iscrowd: taken as 0",
        "without usable area",
        "ids of 0 or below",
        "ids used twice",
        "listed twice",
        "first: annotation 0 of image 5",
        "fewer than 3 points",
    ):
        assert part in text, part


def test_no_annotations_are_fine_where_none_are_needed(tmp_path: Path) -> None:
    source = write(tmp_path, lambda c: c.pop("annotations"))
    with pytest.raises(DataError, match="'annotations' is missing"):
        load_coco(source, max_bad=0)
    assert load_coco(source, max_bad=0, need_annotations=False).object_counts.sum() == 0


def test_bom_and_text_ids(tmp_path: Path) -> None:
    def rename(content: dict) -> None:
        for entry in content["images"]:
            entry["id"] = f"x{entry['id']}"
        for entry in content["annotations"]:
            entry["image_id"] = f"x{entry['image_id']}"

    source = write(tmp_path, rename)
    text = Path(source.json_file).read_text()
    Path(source.json_file).write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert [r["image_id"] for r in load_coco(source, max_bad=0).records] == ["x5", "x6", "x7", "x8"]


def test_class_checks(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    data = load_coco(write(tmp_path), max_bad=0)
    check_num_classes(0, data)
    check_num_classes(2, data)
    with pytest.raises(DataError, match=r"NUM_CLASSES is 80, but .*own.json has 2 categories \(two, nine\)"):
        check_num_classes(80, data)
    other = load_coco(write(tmp_path / "b", lambda c: c["categories"][0].update(name="neun")), max_bad=0)
    check_same_classes([data, data])
    with pytest.raises(DataError, match=r"class 1 .* 'nine' in the first and 'neun'"):
        check_same_classes([data, other])


def test_records_are_a_flat_buffer(tmp_path: Path) -> None:
    data = load_coco(write(tmp_path), max_bad=0)
    again = pickle.loads(pickle.dumps(data.records))  # as a spawned worker gets it
    assert str(again[0]) == str(data.records[0])
    changed = data.records[0]
    changed["annotations"].clear()
    changed["height"] = 1
    assert data.records[0]["annotations"] and data.records[0]["height"] == 30  # a copy every time
    assert data.records[-1]["image_id"] == 8
    with pytest.raises(IndexError):
        data.records[4]
