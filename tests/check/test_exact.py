"""``gn-det check --images`` on the shapes set with one defect of every kind: each is found once, none is invented."""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from gn_det.cli import main
from gn_det.data.problems import KINDS
from gn_det.data.shapes import make_shapes

Entry = dict[str, Any]


class World:
    """Copies of a clean train and val set, and an image of its own, with 3 objects or more, for every defect."""

    def __init__(self, folder: Path, clean: Path) -> None:
        shutil.copytree(clean, folder)
        self.folder, self.words = folder, ["MODEL.MASK_ON", "True"]
        self.train, self.val = (json.loads((folder / s / "instances.json").read_text()) for s in ("train", "val"))
        self.images = folder / "train" / "images"
        self._free = [i for i in self.train["images"] if len(self.of(i)) >= 3]

    def of(self, image: Entry) -> list[Entry]:
        return [a for a in self.train["annotations"] if isinstance(a, dict) and a["image_id"] == image["id"]]

    def image(self) -> Entry:
        """One that no other defect touches."""
        return self._free.pop()

    def object(self) -> Entry:
        """An object with one polygon, on such an image; gets the image's size for the plants below."""
        while True:
            image = self.image()
            for annotation in self.of(image):
                if isinstance(annotation["segmentation"], list):
                    self.height, self.width = image["height"], image["width"]
                    return annotation

    def new_id(self) -> int:
        return max(a["id"] for a in self.train["annotations"] if isinstance(a, dict) and "id" in a) + 1

    def add_image(self, name: str, like: Entry, **more: Any) -> None:
        """A further image of that file, with the objects of ``like``."""
        number = max(i["id"] for i in self.train["images"] if "id" in i) + 1
        self.train["images"].append({**like, "id": number, "file_name": name, **more})
        for annotation in self.of(like):
            self.train["annotations"].append({**annotation, "id": self.new_id(), "image_id": number})

    def found(self) -> Counter[str]:
        for split, content in (("train", self.train), ("val", self.val)):
            (self.folder / split / "instances.json").write_text(json.dumps(content))
        sets = [f"--{s}-{w}={self.folder / s / p}" for s in ("train", "val")
                for w, p in (("json", "instances.json"), ("images", "images"))]  # fmt: skip
        report = self.folder / "report.json"
        main(["check", *sets, "--images", "--json", str(report), *self.words])
        data = json.loads(report.read_text())
        listed = [p for s in data["sets"] for p in s["problems"]] + data["together"]
        return Counter({p["kind"]: sum(q["count"] for q in listed if q["kind"] == p["kind"]) for p in listed})


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("clean")
    make_shapes(folder, "train", 110)
    make_shapes(folder, "val", 6)
    return folder


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    make_shapes(folder, "train", 10)
    make_shapes(folder, "val", 6)
    return folder


def on_object(**values: Any) -> Callable[[World], None]:
    def plant(world: World) -> None:
        entry = world.object()
        for key, value in values.items():
            entry[key] = value(world) if callable(value) else value

    return plant


def without(key: str) -> Callable[[World], None]:
    return lambda world: world.object().pop(key)


def rle(counts: Any, turned: bool = False) -> Callable[[World], Entry]:
    def make(world: World) -> Entry:
        size = [world.height, world.width]
        return {"size": size[::-1] if turned else size, "counts": counts(world) if callable(counts) else counts}

    return make


def another(**values: Any) -> Callable[[World], None]:
    """A copy of an object, with other values."""

    def plant(world: World) -> None:
        entry = copy.deepcopy(world.object())
        world.train["annotations"].append({**entry, **{k: v(world) if callable(v) else v for k, v in values.items()}})

    return plant


def on_file(change: Callable[[Path], None]) -> Callable[[World], None]:
    return lambda world: change(world.images / world.image()["file_name"])


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:400])


def other_size(path: Path) -> None:
    Image.fromarray(np.zeros((9, 7, 3), np.uint8)).save(path)


def sixteen_bit(path: Path) -> None:
    """Under a JPEG's name: Pillow goes by the content."""
    Image.fromarray(np.full((9, 7), 999, np.uint16)).save(path, "PNG")


def huge(path: Path) -> None:
    Image.new("1", (14000, 13000)).save(path, "PNG")


def other_name(world: World) -> None:
    image = world.image()
    image["file_name"] = image["file_name"].upper()


def id_as_float(world: World) -> None:
    image = world.image()
    image["id"] = float(image["id"])


def constant(world: World) -> None:
    image = world.image()
    Image.new("RGB", (image["width"], image["height"]), (7, 7, 7)).save(world.images / image["file_name"], quality=100)


def odd_png(world: World) -> None:
    """A PNG with a wrong checksum of a text behind the pixels."""
    image = world.image()
    extra = PngImagePlugin.PngInfo()
    extra.add(b"teSt", b"x" * 40, after_idat=True)
    picture = Image.open(world.images / image["file_name"])
    image["file_name"] = "odd.png"
    picture.save(world.images / "odd.png", pnginfo=extra)
    data = (world.images / "odd.png").read_bytes()
    (world.images / "odd.png").write_bytes(data.replace(b"xxxx", b"yyyy", 1))


def many_objects(world: World) -> None:
    """In val, where it counts."""
    image = world.val["images"][2]
    for number in range(101):
        x, y = 2.0 + number % 20, 3.0 + number // 20
        box = {"bbox": [x, y, 9.0, 9.0], "segmentation": [[x, y, x + 9, y, x + 9, y + 9, x, y + 9]]}
        category = world.val["categories"][0]["id"]
        entry = {"id": 80000 + number, "image_id": image["id"], "category_id": category, "iscrowd": 0, "area": 81.0}
        world.val["annotations"].append({**entry, **box})


def no_objects_on_it(world: World) -> None:
    image = world.image()
    world.train["annotations"] = [a for a in world.train["annotations"] if a not in world.of(image)]


def same_file_twice(world: World) -> None:
    image = world.image()
    world.add_image(image["file_name"], image)


def same_content_twice(world: World) -> None:
    image = world.image()
    shutil.copy(world.images / image["file_name"], world.images / "again.jpg")
    world.add_image("again.jpg", image)


def in_val_too(link: bool) -> Callable[[World], None]:
    def plant(world: World) -> None:
        source = world.images / world.image()["file_name"]
        entry = world.val["images"][int(link)]
        target = world.folder / "val" / "images" / entry["file_name"]
        target.unlink()
        target.hardlink_to(source) if link else shutil.copy(source, target)
        entry["width"], entry["height"] = Image.open(source).size
        # one object, which fits any size
        world.val["annotations"] = [a for a in world.val["annotations"] if a["image_id"] != entry["id"]]
        world.val["annotations"].append(
            {"id": 90000 + entry["id"], "image_id": entry["id"], "category_id": world.val["categories"][0]["id"],
             "bbox": [3.0, 3.0, 20.0, 20.0], "area": 400.0, "iscrowd": 0,
             "segmentation": [[3.0, 3.0, 23.0, 3.0, 23.0, 23.0, 3.0, 23.0]]}
        )  # fmt: skip

    return plant


def repeated_image_id(world: World) -> None:
    """Both images of the id, and the objects on it, are left out: told once."""
    image = world.image()
    world.train["images"].append({**world.image(), "id": image["id"]})


def box_of(x: float, y: float, w: float, h: float) -> dict[str, Any]:
    return {"bbox": [x, y, w, h], "segmentation": [[x, y, x + w, y, x + w, y + h, x, y + h]]}


#: Defects that live together in one set.
TOGETHER: dict[str, Callable[[World], Any]] = {
    "image-copy": lambda w: w.train["images"].append(dict(w.image())),
    "category-copy": lambda w: w.train["categories"].append(dict(w.train["categories"][0])),
    "image-no-id": lambda w: w.train["images"].append({"file_name": "x.jpg", "width": 4, "height": 4}),
    "image-entry": lambda w: w.image().pop("file_name"),
    "image-depth": on_file(sixteen_bit),
    "image-large": on_file(huge),
    "image-no-size": lambda w: w.image().pop("width"),
    "image-name": other_name,
    "id-type": id_as_float,
    "bbox-missing": without("bbox"),
    "bbox-unusable": on_object(bbox=[0, 0, 0, 0]),
    "polygon-empty": on_object(segmentation=[[20, 20, 30, 20, 20, 20]], bbox=[20, 20, 10, 1]),
    "image-constant": constant,
    "image-missing": on_file(Path.unlink),
    "image-damaged": on_file(cut),
    "image-size": on_file(other_size),
    "annotation-entry": lambda w: w.train["annotations"].append("x"),
    "image-unknown": on_object(image_id=10**6),
    "category-unknown": on_object(category_id=99),
    "ignore": on_object(ignore=1),
    "iscrowd": on_object(iscrowd=2),
    "bbox-format": on_object(bbox=[1, 2, 3], segmentation=[]),
    "bbox-no-area": on_object(bbox=[1, 2, 0, 4], segmentation=[]),
    "bbox-outside": on_object(bbox=lambda w: [w.width + 2, 1, 5, 5], segmentation=[]),
    "bbox-far": on_object(bbox=lambda w: [0, 0, 9 * w.width, 5], segmentation=[]),
    "segmentation-format": on_object(segmentation="abc"),
    "polygon-no-number": on_object(segmentation=[[1, 2, math.nan, 4, 5, 6]]),
    "polygon-short": on_object(segmentation=[[1, 2, 3, 4]]),
    "polygon-far": on_object(segmentation=[[1, 2, 1e7, 4, 5, 6]]),
    "rle-format": on_object(segmentation=rle("oP")),
    "rle-size": on_object(segmentation={"size": [3, 2], "counts": [0, 6]}),
    "rle-length": on_object(segmentation=rle([0, 30])),
    "rle-empty": on_object(segmentation=rle(lambda w: [w.height * w.width])),
    "no-mask": without("segmentation"),
    "annotation-no-id": without("id"),
    "annotation-id-zero": on_object(id=0),
    "annotation-id-repeated": another(bbox=[1.0, 1.0, 9.0, 9.0], segmentation=[[1, 1, 10, 1, 10, 10, 1, 10]], area=81),
    "annotation-copy": another(),
    "iscrowd-missing": without("iscrowd"),
    "area-missing": without("area"),
    "polygon-piece": lambda w: w.object()["segmentation"].append([1.0, 2.0, 3.0, 4.0]),
    "bbox-mask": on_object(bbox=lambda w: [0, 0, w.width, w.height]),
    "bbox-normalised": on_object(**box_of(0.1, 0.1, 0.5, 0.5)),
    "object-twice": another(id=World.new_id),
    "object-vanishes": on_object(**box_of(5.0, 5.0, 0.02, 0.02)),
    "image-checksum": odd_png,
    "file-twice": same_file_twice,
    "content-twice": same_content_twice,
    "overlap-file": in_val_too(link=True),
    "overlap-content": in_val_too(link=False),
    "bbox-reaches-out": on_object(**box_of(-6.0, 5.0, 30.0, 20.0)),
    "many-objects": many_objects,
    "image-empty": no_objects_on_it,
    "class-empty": lambda w: [c["categories"].append({"id": 50, "name": "none"}) for c in (w.train, w.val)],
    "image-id-repeated": repeated_image_id,
}
#: What a defect brings along by its nature.
BESIDE = {
    "class-empty": {"class-empty": 1},  # in val, too
    "object-vanishes": {"polygon-empty": 1},
}


def only_boxes(world: World) -> None:
    world.words = ["MODEL.MASK_ON", "False"]
    world.object().pop("segmentation")


def each(split: str, change: Callable[[Entry], Any]) -> Callable[[World], None]:
    def plant(world: World) -> None:
        for annotation in getattr(world, split)["annotations"]:
            change(annotation)

    return plant


def swapped_names(world: World) -> None:
    a, b = world.val["categories"][:2]
    a["name"], b["name"] = b["name"], a["name"]


def lacking_class(world: World) -> None:
    gone = world.val["categories"].pop()["id"]
    world.val["annotations"] = [a for a in world.val["annotations"] if a["category_id"] != gone]


def as_corners(annotation: Entry) -> None:
    x, y, w, h = annotation["bbox"]
    if not annotation["iscrowd"]:
        annotation["bbox"] = [x, y, x + w, y + h]


def tiny_objects(world: World) -> None:
    """A tenth of the size: below the smallest anchor nearly everywhere."""
    for annotation in world.train["annotations"]:
        x, y = annotation["bbox"][:2]
        annotation.update(box_of(min(x, 60.0), min(y, 60.0), 2.0, 2.0))


#: Defects of the set as a whole, one at a time: (plant, findings beside it that follow from it).
ALONE: dict[str, tuple[Callable[[World], Any], set[str]]] = {
    "json-structure": (lambda w: w.train.update(annotations={}), set()),
    "categories-missing": (lambda w: w.train.pop("categories"), set()),
    "category-malformed": (lambda w: w.train["categories"].append({"id": "seven", "name": "x"}), set()),
    "category-id-repeated": (lambda w: w.train["categories"].append({"id": 1, "name": "x"}), set()),
    "category-name-repeated": (
        lambda w: [c["categories"].append({"id": 60, "name": c["categories"][0]["name"]}) for c in (w.train, w.val)],
        {"class-empty", "class-ids-differ"},
    ),
    "images-missing": (lambda w: w.train.update(images=[]), set()),
    "image-folder": (lambda w: shutil.rmtree(w.images), set()),
    "classes-differ": (lambda w: w.val["categories"][0].update(name="other"), set()),
    "classes-lacking": (lacking_class, set()),
    "bbox-corners": (each("train", as_corners), {"bbox-unusable"}),
    "num-classes": (lambda w: w.words.extend(["MODEL.ROI_HEADS.NUM_CLASSES", "80"]), set()),
    "no-objects": (lambda w: w.train.update(annotations=[]), {"image-empty"}),
    "no-masks": (each("train", lambda a: a.pop("segmentation")), {"no-mask"}),
    "no-mask-val": (each("val", lambda a: a.pop("segmentation")), set()),
    "no-truth": (lambda w: w.val.pop("annotations"), {"image-empty"}),
    "class-ids-differ": (swapped_names, set()),
    "no-mask-unused": (only_boxes, set()),
    "small-for-anchors": (tiny_objects, {"object-twice"}),
}  # fmt: skip


def test_every_kind_is_planted() -> None:
    assert set(KINDS) == {*TOGETHER, *ALONE, "json-unreadable"}


def test_kinds_are_sorted_by_severity() -> None:
    """Reports list them in this order."""
    ranks = [("error", "warning", "note").index(kind.severity) for kind in KINDS.values()]
    assert ranks == sorted(ranks)


def test_the_clean_set_is_clean(clean: Path, tmp_path: Path) -> None:
    assert World(tmp_path / "world", clean).found() == Counter()


def test_all_together_are_found_and_nothing_else(clean: Path, tmp_path: Path) -> None:
    world = World(tmp_path / "world", clean)
    expected: Counter[str] = Counter()
    for kind, plant in TOGETHER.items():
        plant(world)
        expected.update({kind: 1})
        expected.update(BESIDE.get(kind, {}))
    assert world.found() == expected


@pytest.mark.parametrize("kind", ALONE)
def test_alone(small: Path, tmp_path: Path, kind: str) -> None:
    plant, beside = ALONE[kind]
    world = World(tmp_path / "world", small)
    plant(world)
    found = world.found()
    assert found[kind] >= 1 and set(found) - beside == {kind}, found


def test_unreadable_json(clean: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.json").write_text("{")
    words = ["check", "--train-json", str(tmp_path / "a.json"), "--train-images", str(clean / "train" / "images")]
    assert main([*words, "--json", str(tmp_path / "r.json")]) == 2
    (problem,) = json.loads((tmp_path / "r.json").read_text())["sets"][0]["problems"]
    assert problem["kind"] == "json-unreadable"
    assert f"{tmp_path / 'a.json'}: not a json file" in capsys.readouterr().out


def test_anchors_are_high_by_their_ratio_and_corners_keep_the_area_of_a_mask() -> None:
    from gn_det.check.fix import from_corners
    from gn_det.check.sizes import anchor_shapes

    assert anchor_shapes([8.0], [4.0, 1.0]).tolist() == [[4.0, 16.0], [8.0, 8.0]]
    image = {"height": 20, "width": 20}
    polygon = [[1.0, 2.0, 4.0, 2.0, 4.0, 8.0]]
    assert from_corners({"bbox": [1, 2, 4, 8], "segmentation": polygon}, image) == {"bbox": [1, 2, 3, 6]}
    assert from_corners({"bbox": [1, 2, 4, 8]}, image) == {"bbox": [1, 2, 3, 6], "area": 18}
