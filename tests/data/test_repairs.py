"""What is certainly meant is read as meant, noted and mended by --fix; the rest ends in one line with its cause."""

from __future__ import annotations

import gzip
import json
import math
import os
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from gn_det.cli import main
from gn_det.data.catalog import DatasetSource
from gn_det.data.coco import CocoDataset, check_objects, load_coco
from gn_det.data.coco_json import read_json
from gn_det.errors import DataError
from tests.data.own_coco import CONTENT, Change, write

Content = dict[str, Any]


def same_records(a: CocoDataset, b: CocoDataset) -> bool:
    return str(list(a.records)) == str(list(b.records)) and a.category_ids == b.category_ids


def repaired(folder: Path, change: Change, note: str) -> DatasetSource:
    """The changed set is read as the clean one, with a note; the copy of --fix needs none and evaluates the same."""
    (folder / "clean").mkdir()
    clean = load_coco(write(folder / "clean"), max_bad=0)
    (folder / "clean").rename(folder / "changed")
    clean_text = str(list(clean.records)).replace(str(folder / "clean"), str(folder / "changed"))
    source = write(folder / "changed", change)
    data = load_coco(source, max_bad=0)
    assert str(list(data.records)) == clean_text and data.category_ids == clean.category_ids
    assert not clean.notes and len(data.notes) == 1 and note in data.notes[0] and note in data.summary()
    truth = data.ground_truth()
    assert {k: truth[k] for k in truth} == clean.ground_truth()
    fixed = folder / "fixed.json"
    words = ["check", "--train-images", source.image_root, "--train-json"]
    assert main([*words, source.json_file, "--fix", str(fixed)]) == 1
    assert main([*words, str(fixed)]) == 0
    mended = load_coco(DatasetSource("own", str(fixed), source.image_root), max_bad=0)
    assert same_records(mended, data) and not mended.notes
    return source


def each(section: str, **changes: Any) -> Change:
    def change(content: Content) -> None:
        for entry in content[section]:
            entry.update({key: make(entry[key]) for key, make in changes.items()})

    return change


@pytest.mark.parametrize(
    "change",
    [
        each("images", id=float),
        each("annotations", id=float, image_id=float, category_id=float),
        each("annotations", image_id=str, category_id=str),
        each("categories", id=str),
        each("categories", id=float),
    ],
)
def test_ids_as_floats_or_text(tmp_path: Path, change: Change) -> None:
    """77.0 is 77 everywhere; "77" is 77 where a reference has no other meaning."""
    repaired(tmp_path, change, "read as integers")


@pytest.mark.parametrize("key", ["width", "height"])
def test_sizes_that_the_files_have(tmp_path: Path, key: str) -> None:
    repaired(
        tmp_path,
        lambda c: [i.pop(key) for i in c["images"]],
        "width and height: taken from the image files",
    )


@pytest.mark.parametrize("position", [0, 1])
def test_boxes_that_the_masks_have(tmp_path: Path, position: int) -> None:
    """The hull of the polygon's vertices, the box of the RLE's pixels."""
    source = write(tmp_path, lambda c: c["annotations"][position].pop("bbox"))
    data = load_coco(source, max_bad=0)
    assert data.records[0]["annotations"][position]["bbox"] == CONTENT["annotations"][position]["bbox"]
    assert data.notes == [f"annotations without a box: computed from the mask (1, first: annotation {11 + position} "
                          "of image 5 (im 5é.png))"]  # fmt: skip


UNUSABLE = [[0, 0, 0, 0], [2, 3, -10, -8], [2, 3, 0, 8], [99, 99, 5, 5], [0, 0, 1e300, 5], [1, 2, 3], [math.nan] * 4]
UNUSABLE += ["none", [None] * 4, {}, [], 7]


def test_unusable_boxes_of_good_masks(tmp_path: Path) -> None:
    """The box of the mask, as where there is no box; --fix writes it."""
    repaired(tmp_path, lambda c: c["annotations"][0].update(bbox=[0, 0, 0, 0]), "computed from the mask")
    right = load_coco(write(tmp_path), max_bad=0)
    for position in (0, 1):
        for box in UNUSABLE:

            def change(content: Content, box: Any = box, position: int = position) -> None:
                content["annotations"][position].update(bbox=box)

            data = load_coco(write(tmp_path, change), max_bad=0)
            assert (
                list(data.records[0]["annotations"][position].items())[:5]
                == (list(right.records[0]["annotations"][position].items())[:5])
            )
            assert len(data.notes) == 1 and "unusable boxes of objects that have a mask" in data.notes[0]


def test_unusable_boxes_of_unusable_masks_are_dropped(tmp_path: Path) -> None:
    """What is said is what is wrong with the box: the mask gives none."""
    thin = [[9.1, 9, 9.2, 9, 9.2, 25, 9.1, 25]]
    out = [[60, 50, 70, 50, 70, 58]]
    for mask in ([], thin, out):

        def change(content: Content, mask: Any = mask) -> None:
            content["annotations"][0].update(bbox=[0, 0, 0, 0], segmentation=mask)

        assert "bbox [0, 0, 0, 0] has no area" in load_coco(write(tmp_path, change), max_bad=1).bad[0]


def test_area_zero_with_a_mask(tmp_path: Path) -> None:
    """The pixels of the mask; without one the area of the box."""
    source = write(tmp_path, lambda c: c["annotations"][1].update(area=0))
    data = load_coco(source, max_bad=0)
    assert data.records[0]["annotations"][1]["area"] == 30.0 and "without usable area" in data.notes[0]


@pytest.mark.parametrize(
    "written",
    [
        lambda name: "sub\\" + name,
        lambda name: "SUB/" + name.upper(),
        lambda name: "sub/" + unicodedata.normalize("NFD", name),
        lambda name: "sub/" + name.replace(" ", "%20").replace("é", "%C3%A9"),
        lambda name: "./Sub\\" + unicodedata.normalize("NFD", name.replace(" ", "%20")),
    ],
    ids=["backslash", "letter case", "NFD", "escapes", "all"],
)
def test_file_names_written_otherwise(tmp_path: Path, written: Any) -> None:
    """The only file that a name can mean is taken."""
    source = write(tmp_path)
    (tmp_path / "sub").mkdir()
    for path in tmp_path.glob("im *.png"):
        path.rename(tmp_path / "sub" / path.name)
    content = json.loads(Path(source.json_file).read_text())
    for image in content["images"]:
        image["file_name"] = written(image["file_name"])
    Path(source.json_file).write_text(json.dumps(content))
    data = load_coco(source, max_bad=0)
    assert [os.path.relpath(r["file_name"], tmp_path) for r in data.records] == [
        f"sub/im {i}é.png" for i in (5, 6, 7, 8)
    ]
    assert (
        len(data.notes) == 1
        and "file names that differ from the files" in data.notes[0]
        and "(4, first: " in data.notes[0]
    )
    fixed = tmp_path / "fixed.json"
    assert main(["check", "--train-json", source.json_file, "--train-images", str(tmp_path), "--fix", str(fixed)]) == 1
    names = [i["file_name"] for i in json.loads(fixed.read_text())["images"]]
    assert sorted(names) == [f"sub/im {i}é.png" for i in (5, 6, 7, 8)]


def test_file_names_that_may_mean_several_files(tmp_path: Path) -> None:
    source = write(tmp_path, lambda c: c["images"][0].update(file_name="IM 8É.PNG"))
    (tmp_path / "Im 8é.png").write_bytes((tmp_path / "im 8é.png").read_bytes())
    bad = load_coco(source, max_bad=1).bad[0]
    assert "it may mean" in bad and "Im 8é.png" in bad and "correct file_name" in bad
    # a file that another image names is not taken, either
    source = write(tmp_path, lambda c: c["images"][0].update(file_name="IM 6é.png"))
    (tmp_path / "Im 8é.png").unlink()
    assert "image not found" in load_coco(source, max_bad=1).bad[0]


@pytest.mark.parametrize("form", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig", "gzip"])
def test_json_in_other_forms(tmp_path: Path, form: str) -> None:
    source = write(tmp_path)
    clean = load_coco(source, max_bad=0)
    text = Path(source.json_file).read_text()
    Path(source.json_file).write_bytes(gzip.compress(text.encode()) if form == "gzip" else text.encode(form))
    assert same_records(load_coco(source, max_bad=0), clean)


def test_json_that_cannot_be_read_names_the_cause(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    bomb = gzip.compress(b" " * (70 << 20), 9)
    for data, cause in (
        (json.dumps({"name": "圆形"}, ensure_ascii=False).encode("gbk"), "not UTF-8 text, line 1): save it as UTF-8"),
        (b'{"a": \n"\xff\xfe\xff"}', "not UTF-8 text, line 2"),
        (str(CONTENT).encode(), "keys are in single quotes, like a printed Python dict"),
        (b"[" * 1_000_000, "nested too deeply"),
        (b'{"id": ' + b"9" * 5000 + b"}", "cannot be read"),
        (bomb, "unpacks to more than 64 MiB"),
        (bomb[:5000], "cannot be read"),
    ):  # fmt: skip
        path.write_bytes(data)
        with pytest.raises(DataError) as refused:
            read_json(path)
        assert cause in str(refused.value) and str(refused.value).isprintable() and len(str(refused.value)) < 400
    if hasattr(os, "mkfifo"):
        path.unlink()
        os.mkfifo(path)
        with pytest.raises(DataError, match="it is a named pipe, not a regular file"):
            read_json(path)


def corners(content: Content) -> None:
    """A set of boxes without masks, a third of them in the lower right."""
    content["annotations"] = [
        {"id": i + 1, "image_id": 5, "category_id": 2, "bbox": box, "area": (box[2] - box[0]) * (box[3] - box[1])}
        for i, box in enumerate([[2, 3, 12, 9], [22.5, 10, 38, 28], [1, 1, 8, 8], [24, 12, 40, 30]])
    ]


def test_boxes_as_corners(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Named and refused, and rewritten by --fix; boxes that merely reach out are not taken for corners."""
    source = write(tmp_path, corners)
    with pytest.raises(
        DataError, match=r"own.json: boxes are written as \[x1, y1, x2, y2\].* 2 of 4 boxes leave .* 4 fit"
    ):
        load_coco(source, max_bad=100)
    words = ["check", "--train-images", source.image_root, "MODEL.MASK_ON", "False", "--train-json"]
    assert main([*words, source.json_file, "--fix", str(tmp_path / "fixed.json")]) == 2
    assert "[bbox-corners]" in capsys.readouterr().out
    data = load_coco(DatasetSource("own", str(tmp_path / "fixed.json"), source.image_root), max_bad=0)
    boxes = [a["bbox"] for a in data.records[0]["annotations"]]
    assert boxes == [[2, 3, 10, 6], [22.5, 10, 15.5, 18], [1, 1, 7, 7], [24, 12, 16, 18]]
    assert [a["area"] for a in data.records[0]["annotations"]] == [w * h for _, _, w, h in boxes]

    def sloppy(content: Content) -> None:  # big objects, off by a pixel or two at the border
        corners(content)
        for a in content["annotations"]:
            a["bbox"] = [1, 1, 40, 30]

    load_coco(write(tmp_path, sloppy), max_bad=0)


def masked(content: Content, *, corners: int) -> None:
    """Ten objects with polygons or RLE in the upper left, the boxes of some as corners; none leaves the image."""
    content["annotations"] = []
    for i in range(10):
        x, y, w, h = 1 + i, 2 + i % 3, 8 + i, 6
        box = [x, y, x + w, y + h] if i < corners else [x, y, w, h]
        mask: Any = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        if i % 2:
            bitmap = np.zeros((30, 40), np.uint8, order="F")
            bitmap[y : y + h, x : x + w] = 1
            mask = coco_mask.encode(bitmap)
            mask["counts"] = mask["counts"].decode()
        content["annotations"].append(
            {"id": i + 1, "image_id": 5, "category_id": 2, "bbox": box, "area": w * h, "iscrowd": 0,
             "segmentation": mask}
        )  # fmt: skip


@pytest.mark.parametrize("corners", [10, 7])
def test_boxes_as_corners_of_their_masks(tmp_path: Path, capsys: pytest.CaptureFixture[str], corners: int) -> None:
    """One finding that names the mistake; --fix gives the set back whose boxes are right, of mixed sets, too."""
    right = load_coco(write(tmp_path, lambda c: masked(c, corners=0)), max_bad=0)
    source = write(tmp_path, lambda c: masked(c, corners=corners))
    with pytest.raises(DataError, match=rf"as \[x1, y1, x2, y2\].*: {corners} of 10 boxes match the corners of their"):
        load_coco(source, max_bad=100)
    words = ["check", "--train-images", source.image_root, "--train-json"]
    assert main([*words, source.json_file, "--fix", str(tmp_path / "fixed.json")]) == 2
    out = capsys.readouterr().out
    assert "[bbox-corners]" in out and "1 error" in out and "bbox-mask" not in out
    fixed = load_coco(DatasetSource("own", str(tmp_path / "fixed.json"), source.image_root), max_bad=0)
    assert same_records(fixed, right) and not fixed.notes

    def crowded(content: Content) -> None:  # boxes of crowds are not judged, so they stay as they are
        masked(content, corners=corners)
        rle = {"size": [30, 40], "counts": [0, 30, 1170]}
        content["annotations"].append(
            {"id": 50, "image_id": 5, "category_id": 2, "bbox": [2, 3, 9, 11], "area": 99, "iscrowd": 1,
             "segmentation": rle}
        )  # fmt: skip

    source = write(tmp_path, crowded)
    assert main([*words, source.json_file, "--fix", str(tmp_path / "fixed.json")]) == 2
    crowd = json.loads((tmp_path / "fixed.json").read_text())["annotations"][-1]
    assert (crowd["id"], crowd["bbox"], crowd["area"]) == (50, [2, 3, 9, 11], 99)
    # a few wrong boxes are a few wrong boxes
    few = write(tmp_path, lambda c: masked(c, corners=3))
    assert load_coco(few, max_bad=0).object_counts.sum() == 10


def test_all_objects_are_crowds(tmp_path: Path) -> None:
    data = load_coco(write(tmp_path, lambda c: c.update(annotations=c["annotations"][3:])), max_bad=0)
    with pytest.raises(DataError, match=r"all 1 objects are crowds \(iscrowd 1\), .*set iscrowd 0"):
        check_objects([data])


@pytest.mark.parametrize("polygon", [[9, 9, 20, 20, 9, 9], [9.1, 9, 9.2, 9, 9.2, 25, 9.1, 25]])
def test_polygons_that_cover_no_pixel(tmp_path: Path, polygon: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    """Kept as Detectron2 keeps them, and told; --fix leaves them out."""
    source = write(tmp_path, lambda c: c["annotations"][0].update(segmentation=[polygon], bbox=[9, 9, 11, 16]))
    data = load_coco(source, max_bad=0)
    assert "polygons that cover no pixel" in data.notes[0] and len(data.records[0]["annotations"]) == 2
    words = ["check", "--train-images", source.image_root, "--train-json"]
    assert main([*words, source.json_file, "--fix", str(tmp_path / "fixed.json")]) == 1
    assert "polygons that cover no pixel" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "fixed.json").read_text())["annotations"]) == 3


HOSTILE: dict[str, Change] = {
    "NUL in a name": lambda c: c["images"][0].update(file_name="a\0b.png"),
    "a long name": lambda c: c["images"][0].update(file_name="x" * 5000),
    "a way out": lambda c: c["images"][0].update(file_name="../" * 60 + "none.png"),
    "an absolute name": lambda c: c["images"][0].update(file_name="/none/none.png"),
    "control characters": lambda c: c["images"][0].update(file_name="\x1b[2J\x07.png"),
    "control characters in an id": lambda c: c["annotations"][0].update(image_id="\x1b[2J"),
    "control characters in a class": lambda c: c["annotations"][0].update(category_id="\x1b[2J" * 999),
    "a long integer": lambda c: c["annotations"][0].update(category_id=10**4000),
    "a nested box": lambda c: c["annotations"][0].update(bbox=[[[[[1] * 9] * 9] * 9] * 9], segmentation=[]),
    "a nested entry": lambda c: c["annotations"].append([[[[1] * 9] * 9] * 9]),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_values_end_in_one_printable_line(
    tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path, HOSTILE[case])
    with pytest.raises(DataError) as refused:
        load_coco(source, max_bad=0)
    assert str(refused.value).isprintable() and len(str(refused.value)) < 1200
    assert main(["check", "--train-json", source.json_file, "--train-images", str(tmp_path)]) == 2
    out = capsys.readouterr().out
    assert all(line.isprintable() and len(line) < 1000 for line in out.splitlines())
