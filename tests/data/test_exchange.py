"""Formats of other tools: a round trip gives the same dataset, bad files are one line, and losses are said."""

from __future__ import annotations

import base64
import copy
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from gn_det.cli import main
from gn_det.data.entries import Entries
from gn_det.data.formats import exchange
from gn_det.data.formats.draft import Losses, crop_of_rle, outlines
from gn_det.errors import ConfigError, DataError, UserError
from gn_det.structures import MaskCrop, encode_crop

NAMES = ("cat", "dog", "unused", "日本 x")
SIZES = {"a.jpg": (60, 40), "sub/b.png": (31, 57), "empty.jpg": (20, 20)}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for name, size in SIZES.items():
        path = tmp_path / "images" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, "gray").save(path)
    return tmp_path / "images"


def rle(seed: int, width: int, height: int) -> tuple[dict[str, Any], list[float], float]:
    """A ragged mask with a hole: its RLE, box and area."""
    rng = np.random.RandomState(seed)
    bitmap = np.zeros((height, width), dtype=bool)
    bitmap[5:30, 3:25] = True
    bitmap[10:15, 8:12] = False
    bitmap &= rng.rand(height, width) < 0.9
    encoded = coco_mask.encode(np.asfortranarray(bitmap.astype(np.uint8)))
    box = coco_mask.toBbox(encoded).tolist()
    return {"size": [height, width], "counts": encoded["counts"].decode()}, box, float(bitmap.sum())


def document(*, masks: str = "mixed", flags: bool = True, crowd: bool = True) -> dict[str, Any]:
    """Boxes, polygons of one and several pieces, RLE, a crowd, flags, an empty image and an unused class."""
    polygon = [5.25, 6.0, 20.5, 7.0, 14.0, 30.75]
    pieces = [[2.0, 2.0, 8.0, 2.0, 8.0, 8.0, 2.0, 8.0], [12.0, 2.0, 18.0, 2.0, 18.0, 8.0, 12.0, 8.0]]
    mask, box, area = rle(0, 60, 40)
    every = {
        "polygon": {"bbox": [5.25, 6.0, 15.25, 24.75], "area": 184.34375, "segmentation": [polygon], "difficult": 1},
        "pieces": {"bbox": [2.0, 2.0, 16.0, 6.0], "area": 72.0, "segmentation": pieces, "truncated": 1, "occluded": 1},
        "box": {"bbox": [3.0, 4.0, 10.5, 12.0], "area": 126.0},
        "rle": {"bbox": box, "area": area, "segmentation": mask},
    }
    kinds = {"mixed": list(every), "boxes": ["box"], "polygons": ["polygon"], "rle": ["rle"]}[masks]
    annotations = []
    for kind in kinds:
        for image in (1, 3) if kind != "rle" else (1,):
            entry = {"image_id": image, "category_id": 4 if image == 3 else 1, "iscrowd": 0, **every[kind]}
            annotations.append(entry)
    if crowd and masks in ("mixed", "rle"):
        annotations.append({"image_id": 1, "category_id": 2, "iscrowd": 1, **every["rle"]})
    annotations.sort(key=lambda a: a["image_id"])
    for number, entry in enumerate(annotations, 1):
        entry["id"] = number
        if not flags:
            for flag in ("difficult", "truncated", "occluded"):
                entry.pop(flag, None)
    listed = [
        {"id": i, "file_name": n, "width": w, "height": h} for i, (n, (w, h)) in enumerate(sorted(SIZES.items()), 1)
    ]
    categories = [{"id": i, "name": n} for i, n in enumerate(NAMES, 1)]
    return {"images": listed, "annotations": copy.deepcopy(annotations), "categories": categories}


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("coco", document()),
        ("labelme", document()),
        ("cvat", document()),
        ("voc", document(masks="boxes")),
        ("yolo", document(masks="boxes")),
        ("yolo", document(masks="polygons", flags=False)),
        ("masks", document(masks="rle", crowd=False)),
    ],
)
def test_a_round_trip_gives_the_same_dataset(name: str, given: dict[str, Any], images: Path, tmp_path: Path) -> None:
    """Images (the empty one, too), classes (the unused one, too), boxes, outlines, RLE, flags and crowds; no loss."""
    before = copy.deepcopy(given)
    assert exchange.write(name, given, tmp_path / "out", images) == []
    assert given == before
    source = tmp_path / "out"
    assert exchange.detect_format(source / "annotations.json" if name == "coco" else source) == name
    read, bad = exchange.read(name, source / "annotations.json" if name == "coco" else source, images)
    assert bad == []
    assert read["images"] == given["images"] and read["categories"] == given["categories"]
    key = lambda a: (a["image_id"], a["category_id"], a["bbox"], str(a.get("segmentation")))  # noqa: E731
    for got, expected in zip(sorted(read["annotations"], key=key), sorted(given["annotations"], key=key), strict=True):
        assert {**got, "id": 0} == {**expected, "id": 0}


@pytest.mark.parametrize(
    ("name", "losses"),
    [
        ("voc", ["voc cannot represent crowd regions: 1", "voc cannot represent masks: 5"]),
        (
            "yolo",
            [
                "yolo cannot represent 'difficult' flags: 2",
                "yolo cannot represent 'occluded' flags: 2",
                "yolo cannot represent 'truncated' flags: 2",
                "yolo cannot represent crowd regions: 1",
                "yolo cannot represent masks beside boxes without mask (boxes are written): 5",
            ],
        ),
        (
            "masks",
            [
                "masks cannot represent 'difficult' flags: 2",
                "masks cannot represent 'occluded' flags: 2",
                "masks cannot represent 'truncated' flags: 2",
                "masks cannot represent crowd regions: 1",
                "masks cannot represent objects without a mask: 2",
            ],
        ),
    ],
)
def test_what_a_format_cannot_hold_is_said(name: str, losses: list[str], images: Path, tmp_path: Path) -> None:
    notes = exchange.write(name, document(), tmp_path / "out", images)
    assert [n for n in sorted(notes) if "holes" not in n] == losses


def test_images_keep_their_place_and_training_accepts_the_json(images: Path, tmp_path: Path) -> None:
    """YOLO files that another tool wrote become a json that gn-det check finds clean, with split and copied images."""
    exchange.write("yolo", document(masks="polygons"), tmp_path / "y", images)
    words = ["dataset", str(tmp_path / "y"), "--images", str(images), "--output", str(tmp_path / "c")]
    assert main([*words, "--split", "0.7,0.3", "--seed", "3", "--copy-images"]) == 0
    names = []
    for part in ("train", "val"):
        content = json.loads((tmp_path / "c" / part / "annotations.json").read_text("utf-8"))
        names += [image["file_name"] for image in content["images"]]
        assert all((tmp_path / "c" / part / "images" / n["file_name"]).is_file() for n in content["images"])
    assert sorted(names) == sorted(SIZES)
    again = exchange.split(document(), (0.7, 0.3), 3)
    assert [i["file_name"] for part in again.values() for i in part["images"]] == names


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("9 0.5 0.5 0.1 0.1", "a.txt line 1: class 9 is out of range; there are 4 classes"),
        ("0 0.5 0.5 nan 0.1", "a.txt line 1: coordinates must be fractions"),
        ("0 50 50 10 10", "a.txt line 1: coordinates must be fractions"),
        ("\n0 0.5 0.5 0.1", "a.txt line 2: has 3 coordinates"),
        ("0 0.5 0.5 0.1 0", "line 1: the box has no area"),
        ("cat 0.5 0.5 0.1 0.1", "line 1: is not a class number"),
    ],
)
def test_a_bad_line_of_yolo_is_named(text: str, message: str, images: Path, tmp_path: Path) -> None:
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "a.txt").write_text(text)
    with pytest.raises(DataError, match="1 invalid entry") as raised:
        exchange.read("yolo", tmp_path, classes=NAMES)
    assert message in str(raised.value) and "\n" not in str(raised.value)
    read, bad = exchange.read("yolo", tmp_path, classes=NAMES, max_bad=1)
    assert len(bad) == 1 and message in bad[0] and read["annotations"] == [] and len(read["images"]) == 3


def test_labels_without_image_and_images_that_share_a_name(images: Path, tmp_path: Path) -> None:
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "zz.txt").write_text("0 0.5 0.5 0.1 0.1")
    with pytest.raises(DataError, match=r"zz\.txt: no image of this name"):
        exchange.read("yolo", tmp_path, classes=NAMES)
    Image.new("RGB", (5, 5)).save(images / "a.png")
    with pytest.raises(DataError, match=r"a\.(jpg|png) and a\.(png|jpg) share one annotation file"):
        exchange.read("yolo", tmp_path, classes=NAMES)
    given = document()
    given["images"][0]["file_name"], given["images"][1]["file_name"] = "x.jpg", "X.png"
    with pytest.raises(DataError, match=r"X\.png and x\.jpg would share one annotation file"):
        exchange.write("voc", given, tmp_path / "out", images)


@pytest.mark.parametrize("name", ["yolo", "voc", "labelme", "masks"])
def test_no_name_leads_out_of_the_folder(name: str, images: Path, tmp_path: Path) -> None:
    given = document(masks="rle", crowd=False)
    given["images"][0]["file_name"] = "../../evil.jpg"
    with pytest.raises(DataError, match="evil"):
        exchange.write(name, given, tmp_path / "in" / "out", images)
    assert not list(tmp_path.glob("evil*"))
    given = document(masks="rle", crowd=False)
    given["categories"][0]["name"] = "../evil"
    if name == "masks":
        with pytest.raises(DataError, match="cannot be the name of a folder"):
            exchange.write(name, given, tmp_path / "in" / "out", images)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("cvat", "<a", "is not XML"),
        ("cvat", '<!DOCTYPE a [<!ENTITY b "c">]><annotations/>', "DOCTYPE or entities"),
        ("cvat", "<annotation/>", "not <annotations>"),
        ("cvat", "<annotations><image name='a.jpg' width='9' height='0'/></annotations>", "no name, width and height"),
        (
            "cvat",
            "<annotations><image name='a.jpg' width='9' height='9'><mask label='x' left='0' top='0' width='9' "
            "height='9' rle='99999999999'/></image></annotations>",
            "has no area or unusable coordinates",
        ),
        (
            "cvat",
            "<annotations><track id='0' label='x'/></annotations>",
            "annotations of videos cannot be read: export as",
        ),
        (
            "cvat",
            "<annotations><image name='a.jpg' width='9' height='9'><ellipse label='x'/></image></annotations>",
            "<ellipse> is not supported; draw a box",
        ),
        (
            "cvat",
            "<annotations><image name='a.jpg' width='9' height='9'><box label='x' xtl='1' ytl='1' xbr='5' ybr='5' "
            "rotation='nan'/></image></annotations>",
            "unusable coordinates",
        ),
        ("labelme", "[1", "is not json"),
        (
            "labelme",
            '{"imageWidth": 9, "imageHeight": 9, "shapes": [], "imagePath": "x/.."}',
            "imagePath '..' is not the name of a file",
        ),
        (
            "labelme",
            '{"imageWidth": 9, "imageHeight": 9, "shapes": [], "imagePath": "a\\u0000.png"}',
            "is not the name of a file",
        ),
        (
            "labelme",
            '{"imageWidth": 9, "imageHeight": 9, "shapes": [], "imagePath": "' + "x" * 252 + '.png"}',
            "is not the name of a file",
        ),
        ("labelme", '{"shapes": 3}', "has no list 'shapes'"),
        ("labelme", '{"shapes": [], "imageWidth": 0, "imageHeight": 5}', "imageWidth and imageHeight"),
        (
            "labelme",
            '{"imageWidth": 9, "imageHeight": 9, "shapes": [{"label": "x", "points": [[NaN, 1]]}]}',
            "needs a label and points",
        ),
        (
            "labelme",
            '{"imageWidth": 9, "imageHeight": 9, "shapes": [{"label": "x", "points": [[1' + "0" * 400 + ", 1]]}]}",
            "needs a label and points",
        ),
        (
            "labelme",
            '{"imageWidth": 9, "imageHeight": 9, "shapes": [{"label": "x", "points": [[1, 1]], '
            '"shape_type": "point"}]}',
            "of type 'point' with 1 points has no area",
        ),
        ("voc", "<annotation><filename>a.jpg</filename></annotation>", "has no usable <size>"),
        (
            "voc",
            "<annotation><size><width>9</width><height>9</height></size><object><name>x</name></object></annotation>",
            "no <bndbox>",
        ),
    ],
)
def test_hostile_files_are_one_line(name: str, content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "in" / {"cvat": "annotations.xml", "labelme": "a.json", "voc": "a.xml"}[name]
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(DataError) as raised:
        exchange.read(name, tmp_path / "in")
    assert message in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("side", ["200000", "1" + "0" * 30])
@pytest.mark.parametrize("name", ["cvat", "labelme"])
def test_a_mask_of_an_image_of_impossible_size_is_one_line(name: str, side: str, tmp_path: Path) -> None:
    """It has more pixels than a run length can count."""
    buffer = io.BytesIO()
    Image.new("L", (2, 2), 255).save(buffer, "PNG")
    png = base64.b64encode(buffer.getvalue()).decode()
    shape = {"label": "x", "points": [[0, 0], [1, 1]], "shape_type": "mask", "mask": png}
    content = json.dumps({"imageWidth": int(side), "imageHeight": int(side), "shapes": [shape]})
    if name == "cvat":
        mask = "<mask label='x' left='0' top='0' width='2' height='2' rle='0, 4'/>"
        content = f"<annotations><image name='a.jpg' width='{side}' height='{side}'>{mask}</image></annotations>"
    (tmp_path / {"cvat": "annotations.xml", "labelme": "a.json"}[name]).write_text(content)
    with pytest.raises(DataError, match=r"no mask can have the .* pixels of its image"):
        exchange.read(name, tmp_path)


def test_unknown_classes_are_refused(images: Path, tmp_path: Path) -> None:
    exchange.write("cvat", document(), tmp_path / "out", images)
    with pytest.raises(DataError, match="class 'cat' is not one of dog, 日本 x"):
        exchange.read("cvat", tmp_path / "out", classes=("dog", "日本 x"))
    with pytest.raises(DataError, match="is listed twice"):
        exchange.read("cvat", tmp_path / "out", classes=("dog", "dog"))


def test_masks_of_other_layouts(images: Path, tmp_path: Path) -> None:
    """A folder of masks per image, and one picture whose values number the objects."""
    bitmap = np.zeros((40, 60), np.uint8)
    bitmap[2:9, 3:20] = 255
    (tmp_path / "one" / "a" / "masks").mkdir(parents=True)
    Image.fromarray(bitmap).save(tmp_path / "one" / "a" / "masks" / "x.png")
    read, _ = exchange.read("masks", tmp_path / "one", images, ["cell"])
    assert [a["bbox"] for a in read["annotations"]] == [[3, 2, 17, 7]]
    values = np.zeros((40, 60), np.int32)
    values[0:5, 0:5], values[10:20, 10:30] = 1, 700
    (tmp_path / "two").mkdir()
    Image.fromarray(values.astype(np.uint16)).save(tmp_path / "two" / "a.png")
    read, _ = exchange.read("masks", tmp_path / "two", images, ["cell"])
    assert [(a["bbox"], a["area"]) for a in read["annotations"]] == [([0, 0, 5, 5], 25), ([10, 10, 20, 10], 200)]
    Image.new("L", (7, 7), 255).save(tmp_path / "two" / "a.png")
    with pytest.raises(DataError, match="is 7x7 pixels, its image 60x40"):
        exchange.read("masks", tmp_path / "two", images, ["cell"])


def test_a_crop_of_an_rle_is_its_mask() -> None:
    rng = np.random.RandomState(1)
    for _ in range(300):
        height, width = rng.randint(1, 14, 2)
        bitmap = rng.rand(height, width) < rng.choice([0, 0.2, 0.8, 1])
        encoded = coco_mask.encode(np.asfortranarray(bitmap.astype(np.uint8)))
        top, left, part = crop_of_rle(encoded)
        full = np.zeros((height, width), bool)
        full[top : top + part.shape[0], left : left + part.shape[1]] = part
        assert np.array_equal(full, bitmap)
        assert encode_crop(MaskCrop(top, left, part), height, width)["counts"] == encoded["counts"].decode()


@pytest.mark.parametrize("radius", [3, 8, 40])
def test_outlines_have_few_points_and_cover_the_mask(radius: int) -> None:
    """IoU of the polygon with the mask it came from, and a tenth of the points that a pixel outline has."""
    ys, xs = np.mgrid[:100, :120]
    bitmap = (ys - 50) ** 2 + (xs - 60) ** 2 <= radius**2
    losses = Losses()
    (polygon,) = outlines(MaskCrop(0, 0, bitmap), losses)
    again = coco_mask.decode(coco_mask.frPyObjects([polygon], 100, 120))[:, :, 0].astype(bool)
    assert (again & bitmap).sum() / (again | bitmap).sum() > 0.9 and len(polygon) // 2 <= 8 * radius // 3
    assert not losses.lines("x")
    bitmap[49:52, 59:62] = False
    outlines(MaskCrop(0, 0, bitmap), losses)
    assert losses.lines("x") == ["x cannot represent holes in masks: 1"]


def test_split_refuses_what_makes_no_sense() -> None:
    nan, inf = float("nan"), float("inf")
    for shares in ((1.0,), (0.5, 0.6), (0.9, -0.1, 0.2), (0.99, 0.01), (nan, 0.5), (0.5, nan), (0.5, inf)):
        with pytest.raises(ConfigError, match="--split"):
            exchange.split(document(), shares, 0)


def test_a_rotated_box_of_cvat_is_a_polygon(tmp_path: Path) -> None:
    """CVAT turns a box clockwise around its center; a small angle tells the direction."""
    box = "<box label='car' xtl='10' ytl='30' xbr='70' ybr='40' rotation='{}'/>"
    (tmp_path / "annotations.xml").write_text(
        "<annotations><image name='a.png' width='100' height='80'>"
        + "".join(map(box.format, ("90.00", "0.00", "45")))
        + "</image></annotations>"
    )
    turned, plain, slanted = exchange.read("cvat", tmp_path)[0]["annotations"]
    assert turned["bbox"] == [35, 5, 10, 60] and turned["area"] == 600
    assert turned["segmentation"] == [[45, 5, 45, 65, 35, 65, 35, 5]]
    assert plain["bbox"] == [10, 30, 60, 10] and "segmentation" not in plain
    # the left end of the box goes up, the right end down
    np.testing.assert_allclose(slanted["segmentation"][0][:4], [22.322330, 10.251263, 64.748737, 52.677670], atol=1e-5)


def _png(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(values).save(path)


def test_a_mask_with_soft_edges_is_one_object(images: Path, tmp_path: Path) -> None:
    """White with gray edges in a folder; other values there are refused, not guessed."""
    soft = np.zeros((40, 60), np.uint8)
    soft[2:12, 3:23], soft[3:11, 4:22], soft[4:10, 5:21] = 100, 180, 255
    _png(tmp_path / "m" / "a" / "cell" / "1.png", soft)
    _png(tmp_path / "m" / "a" / "cell" / "2.png", np.stack([soft] * 3, axis=2))
    read, _ = exchange.read("masks", tmp_path / "m", images, ["cell"])
    assert [(a["bbox"], a["area"]) for a in read["annotations"]] == [([4, 3, 18, 8], 144)] * 2
    _png(tmp_path / "m" / "a" / "cell" / "2.png", soft // 100)
    with pytest.raises(DataError, match=r"2\.png: has 2 values besides black; a file in a folder is one object"):
        exchange.read("masks", tmp_path / "m", images, ["cell"])


def test_colors_of_a_mask_number_its_objects(images: Path, tmp_path: Path) -> None:
    """Red and a green of the same brightness; a photo is not a mask."""
    colors = np.zeros((40, 60, 3), np.uint8)
    colors[0:5, 0:5], colors[10:20, 10:30] = (255, 0, 0), (0, 130, 0)
    _png(tmp_path / "m" / "a.png", colors)
    read, _ = exchange.read("masks", tmp_path / "m", images, ["cell"])
    assert sorted((a["bbox"], a["area"]) for a in read["annotations"]) == [([0, 0, 5, 5], 25), ([10, 10, 20, 10], 200)]
    big = np.random.RandomState(0).randint(0, 256, (300, 300, 3)).astype(np.uint8)
    _png(tmp_path / "photos" / "a.png", big)
    _png(tmp_path / "m" / "a.png", big)
    with pytest.raises(DataError, match=r"a\.png: has \d\d,\d{3} colors; a mask has one color for each object"):
        exchange.read("masks", tmp_path / "m", tmp_path / "photos", ["cell"])


def test_masks_without_image_are_named(images: Path, tmp_path: Path) -> None:
    """Files and folders; the images themselves may lie in the folder of the masks."""
    mask = np.full((40, 60), 255, np.uint8)
    for name in ("a.png", "a_mask.png", "zz/cell/1.png"):
        _png(tmp_path / "m" / name, mask)
    with pytest.raises(DataError, match="2 invalid entries") as raised:
        exchange.read("masks", tmp_path / "m", images, ["cell"])
    for name in ("a_mask.png", "zz/cell/1.png"):
        assert f"{tmp_path / 'm' / name}: is not a mask of an image in {images}" in str(raised.value)
    _png(images.parent / "a" / "cell" / "1.png", mask)
    (tmp_path / "m").rename(tmp_path.parent / f"{tmp_path.name}-m")
    read, bad = exchange.read("masks", images.parent, None, ["cell"])
    assert bad == [] and len(read["annotations"]) == 1


@pytest.mark.parametrize("classes", [(), ("cat",)])
def test_pose_data_of_yolo_are_refused(classes: tuple[str, ...], images: Path, tmp_path: Path) -> None:
    (tmp_path / "labels").mkdir()
    (tmp_path / "data.yaml").write_text("names: 3")
    exchange.read("yolo", tmp_path, classes=["cat"])  # the remedy for a file without names
    (tmp_path / "data.yaml").write_text("kpt_shape: [2, 2]\nnames: [cat]")
    with pytest.raises(DataError, match=r"data\.yaml: 'kpt_shape': keypoints are not supported"):
        exchange.read("yolo", tmp_path, classes=classes)


@pytest.mark.parametrize("name", ["yolo", "labelme", "cvat", "masks"])
def test_a_huge_declared_size_is_one_line(name: str, tmp_path: Path) -> None:
    """Drawing it would need 40 GB; outlines that stay polygons are written."""
    side = 200_000
    entry = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [9, 9, 99, 99], "area": 9, "iscrowd": 0}
    given = {
        "images": [{"id": 1, "file_name": "a.png", "width": side, "height": side}],
        "annotations": [{**entry, "segmentation": {"size": [side, side], "counts": [9, side * side - 9]}}],
        "categories": [{"id": 1, "name": "a"}],
    }
    with pytest.raises(DataError, match=r"image 1 \('a\.png'\): its masks of 200000x200000 pixels are larger than"):
        exchange.write(name, given, tmp_path / "out", tmp_path)
    given["annotations"] = [{**entry, "segmentation": [[9, 9, 99, 9, 99, 99]]}]
    if name == "masks":
        with pytest.raises(DataError, match="correct its width and height"):
            exchange.write(name, given, tmp_path / "out", tmp_path)
    else:
        exchange.write(name, given, tmp_path / "out", tmp_path)


@pytest.mark.parametrize("name", ["yolo", "voc", "labelme", "cvat", "masks"])
def test_class_names_of_a_round_trip(name: str, images: Path, tmp_path: Path) -> None:
    """Spaces around a name are lost, which is said; a slash is kept, or refused where it would make folders."""
    given = document(masks={"masks": "rle", "labelme": "mixed", "cvat": "mixed"}.get(name, "boxes"), flags=False)
    given["annotations"] = [a for a in given["annotations"] if not a["iscrowd"]]
    given["categories"][0]["name"] = " cat "
    assert exchange.write(name, given, tmp_path / "out", images) == [
        f"{name} cannot represent spaces around class names: 1"
    ]
    read, bad = exchange.read(name, tmp_path / "out", images)
    assert bad == [] and [c["name"] for c in read["categories"]] == list(NAMES)
    assert len(read["annotations"]) == len(given["annotations"])
    given["categories"][1]["name"] = "cat"
    with pytest.raises(DataError, match="class 'cat' is there twice"):
        exchange.write(name, given, tmp_path / "out", images)
    given["categories"][0]["name"] = "cat/dog"
    if name == "masks":
        with pytest.raises(DataError, match="class 'cat/dog' cannot be the name of a folder"):
            exchange.write(name, given, tmp_path / "out2", images)
        return
    exchange.write(name, given, tmp_path / "out2", images)
    assert exchange.read(name, tmp_path / "out2", images)[0]["categories"][0]["name"] == "cat/dog"


def test_a_sound_annotation_is_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = document(masks="polygons", crowd=False)
    (tmp_path / "a.json").write_text(json.dumps(given))
    parsed, parse = [], Entries.parse
    monkeypatch.setattr(Entries, "parse", lambda *place: parsed.append(place) or parse(*place))
    read, _ = exchange.read("coco", tmp_path / "a.json")
    assert len(parsed) == len(read["annotations"]) == len(given["annotations"])


def test_folders_of_coco_and_of_subfolders(images: Path, tmp_path: Path) -> None:
    """A folder that --to coco wrote is read back; of a split, or of Roboflow's YOLO, the subfolders are named."""
    for part in ("train", "val"):
        exchange.write("coco", document(), tmp_path / "c" / part, images)
    assert exchange.detect_format(tmp_path / "c" / "train") == "coco"
    read, _ = exchange.read("coco", tmp_path / "c" / "train")
    assert read["images"] == document()["images"]
    for part in ("train", "valid"):
        (tmp_path / "r" / part / "labels").mkdir(parents=True)
        (tmp_path / "r" / part / "labels" / "a.txt").write_text("")
    (tmp_path / "r" / "data.yaml").write_text("names: [a]")
    with pytest.raises(DataError, match=r"c: has no annotations itself; give one of its subfolders: train, val$"):
        exchange.detect_format(tmp_path / "c")
    with pytest.raises(DataError, match=r"r: has no annotations itself; give one of its subfolders: train, valid$"):
        exchange.detect_format(tmp_path / "r")
    assert exchange.detect_format(tmp_path / "r" / "train") == "yolo"


def test_labelme_names_its_image(tmp_path: Path) -> None:
    """Only the name of imagePath counts, and the json's own name where there is none or it belongs to another json."""
    (tmp_path / "sub").mkdir()
    paths = {"photo_ann.json": r"..\\x\\photo.png", "sub/b.json": "../../b2.jpg", "c.json": "", "c-2.json": "../c.png"}
    for file, path in paths.items():
        content = {"shapes": [], "imagePath": path, "imageWidth": 9, "imageHeight": 9}
        (tmp_path / file).write_text(json.dumps(content))
    read, _ = exchange.read("labelme", tmp_path, classes=["x"])
    assert [image["file_name"] for image in read["images"]] == ["c-2.png", "c.jpg", "photo.png", "sub/b2.jpg"]


def test_classes_and_images_that_do_not_fit_are_refused(images: Path, tmp_path: Path) -> None:
    exchange.write("coco", document(), tmp_path / "c", images)
    exchange.read("coco", tmp_path / "c", images, NAMES)
    with pytest.raises(DataError, match="lists its own classes, cat, dog, unused, 日本 x; leave out --classes"):
        exchange.read("coco", tmp_path / "c", images, ["cat", "dog"])
    with pytest.raises(DataError, match=r"--images .*nope: no such folder"):
        exchange.read("coco", tmp_path / "c", tmp_path / "nope")


def test_images_are_not_copied_onto_themselves(images: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="already holds the images; leave out --copy-images or choose another --output"):
        exchange.copy_images(document(), images, images)
