"""gn-det check finds every defect by its kind, invents none, never disagrees with the loader, and --fix mends them."""

from __future__ import annotations

import copy
import json
import math
import os
import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from gn_det.check import decode
from gn_det.check.audit import Training, survey
from gn_det.check.fix import merged_categories
from gn_det.cli import main
from gn_det.data.catalog import DatasetSource
from gn_det.data.coco import load_coco
from gn_det.data.image import ImageReader
from gn_det.data.problems import KINDS
from gn_det.data.records import Record
from gn_det.errors import DataError
from tests.data.own_coco import CONTENT, Change, write
from tests.data.test_bad_data import BAD_ANNOTATIONS, BAD_FILES

TRAINING = Training(short_sides=(800,), max_size=1333, masks_on=True)


def kinds_of(source: DatasetSource, split: str = "train", training: Training = TRAINING, **how: Any) -> dict[str, int]:
    """Errors and warnings by kind."""
    found = survey(source, split, training, **how).findings
    return {name: n for name, n in found.counts.items() if KINDS[name].severity != "note"}


def first(**values: Any) -> Change:
    return lambda c: c["annotations"][0].update(values)


def test_a_clean_set_is_clean(tmp_path: Path) -> None:
    assert kinds_of(write(tmp_path), decode=True) == {}


@pytest.mark.parametrize("case", BAD_ANNOTATIONS)
def test_bad_annotations_are_found_and_mended(tmp_path: Path, case: str) -> None:
    """One error of the right kind in the loader's own words; without it in the copy; all else as it was."""
    change, kind, message = BAD_ANNOTATIONS[case]
    source = write(tmp_path, change)
    found = survey(source, "train", TRAINING).findings
    errors = {n: c for n, c in found.counts.items() if KINDS[n].severity == "error"}
    assert errors == {kind: 1}
    assert [str(f) for f in found.found[kind]] == load_coco(source, max_bad=1).bad
    assert message in str(found.found[kind][0])
    before = json.loads(Path(source.json_file).read_text())
    after = fixed(source, tmp_path)
    assert load_coco(after, max_bad=0).bad == []
    kept = json.loads(Path(after.json_file).read_text())
    assert kept["images"] == before["images"] and kept["categories"] == before["categories"]
    # compared as text: NaN is not equal to itself, 9.0 is equal to 9
    left = [json.dumps(a) for i, a in enumerate(before["annotations"]) if i != changed_by(change)]
    assert [json.dumps(a) for a in kept["annotations"]] == left


def changed_by(change: Change) -> int:
    """Position of the annotation that ``change`` breaks or adds."""
    content = copy.deepcopy(CONTENT)
    change(content)
    texts = [[json.dumps(a) for a in c["annotations"]] for c in (content, CONTENT)]
    return next(i for i, text in enumerate(texts[0]) if text not in texts[1])


def fixed(source: DatasetSource, folder: Path, *words: str) -> DatasetSource:
    """Run the command with --fix; the cleaned set. The command's exit code for the copy must not be 2."""
    out = folder / "cleaned é.json"
    before = Path(source.json_file).read_bytes()
    data = ["--train-json", source.json_file, "--train-images", source.image_root, *words]
    assert main(["check", *data, "--fix", str(out)]) in (0, 1, 2)
    assert Path(source.json_file).read_bytes() == before
    data[1] = str(out)
    assert main(["check", *data]) in (0, 1)
    return DatasetSource("cleaned", str(out), source.image_root, "test")


def test_all_at_once(tmp_path: Path) -> None:
    """Every annotation defect in one file, found together: nothing stops the check, nothing hides another."""
    content: dict[str, Any] = {}

    def all_of_them(whole: dict[str, Any]) -> None:
        for number, (change, *_) in enumerate(BAD_ANNOTATIONS.values()):
            one = copy.deepcopy(CONTENT)
            change(one)
            changed = one["annotations"][changed_by(change)]
            whole["annotations"].append({**changed, "id": 100 + number} if isinstance(changed, dict) else changed)
        content.update(whole)

    source = write(tmp_path, all_of_them)
    found = survey(source, "train", TRAINING).findings
    expected = Counter(kind for _, kind, _ in BAD_ANNOTATIONS.values())
    assert {n: c for n, c in found.counts.items() if KINDS[n].severity == "error"} == expected
    assert sorted(load_coco(source, max_bad=1000).bad) == sorted(str(f) for k in expected for f in found.found[k])
    assert len(json.loads(Path(fixed(source, tmp_path).json_file).read_text())["annotations"]) == 4
    changes = (tmp_path / "cleaned é.changes.txt").read_text(encoding="utf-8").splitlines()
    assert len(changes) == len(BAD_ANNOTATIONS)


#: Files that --fix can mend.
MENDED = {"name twice", "image without id", "image twice"}


@pytest.mark.parametrize("case", BAD_FILES)
def test_bad_files(tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    change, kind, message = BAD_FILES[case]
    source = write(tmp_path, change)
    found = survey(source, "train", TRAINING).findings
    assert kind in found.counts and message in str(found.found[kind][0])
    if case in MENDED:
        load_coco(fixed(source, tmp_path), max_bad=0)
        return
    words = ["check", "--train-json", source.json_file, "--train-images", source.image_root]
    assert main(words) == 2
    assert main([*words, "--fix", str(tmp_path / "out.json")]) == 2
    assert "cannot be repaired automatically" in capsys.readouterr().err and not (tmp_path / "out.json").exists()


def test_copies_of_entries_are_dropped(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["images"].append(dict(content["images"][0]))
        content["categories"].append(dict(content["categories"][0]))
        content["annotations"].append(dict(content["annotations"][0]))

    source = write(tmp_path, change)
    assert kinds_of(source) == {"image-copy": 1, "category-copy": 1, "annotation-copy": 1}
    after = json.loads(Path(fixed(source, tmp_path).json_file).read_text())
    assert [len(after[k]) for k in ("images", "categories", "annotations")] == [4, 2, 4]


def test_merged_category_keeps_its_objects(tmp_path: Path) -> None:
    source = write(tmp_path, lambda c: c["categories"][0].update(name="two"))
    after = load_coco(fixed(source, tmp_path), max_bad=0)
    assert after.class_names == ("two",) and after.class_counts.tolist() == [3]


def test_ambiguous_image_id_takes_its_annotations_along(tmp_path: Path) -> None:
    source = write(tmp_path, lambda c: c["images"][0].update(id=5))  # image 8 becomes a second image 5
    after = load_coco(fixed(source, tmp_path), max_bad=0)
    assert [r["image_id"] for r in after.records] == [6, 7] and after.object_counts.tolist() == [1, 0]


def damage(folder: Path) -> None:
    """One image of each kind of damage; image 8 stays."""
    (folder / "im 5é.png").unlink()
    whole = (folder / "im 6é.png").read_bytes()
    (folder / "im 6é.png").write_bytes(whole[: len(whole) // 2])
    Image.fromarray(np.zeros((31, 40, 3), np.uint8)).save(folder / "im 7é.png")


def test_bad_images(tmp_path: Path) -> None:
    source = write(tmp_path, lambda c: c["annotations"].append({**c["annotations"][1], "id": 20, "image_id": 8}))
    damage(tmp_path)
    assert kinds_of(source) == {"image-missing": 1, "image-damaged": 1, "image-size": 1}
    after = fixed(source, tmp_path, "--images")
    assert [r["image_id"] for r in load_coco(after, max_bad=0).records] == [8]
    changes = (tmp_path / "cleaned é.changes.txt").read_text(encoding="utf-8")
    assert "image 5 (im 5é.png): left out: missing image files" in changes
    assert "annotation 11 of image 5: left out: its image is left out" in changes


def scribble(path: Path, form: str, filler: bytes) -> None:
    """An image whose header and last bytes are whole, but not what lies between."""
    rows, columns = np.mgrid[:30, :40]
    Image.fromarray(np.stack([rows * columns % 251, rows, columns], axis=2).astype(np.uint8)).save(path, form)
    data = bytearray(path.read_bytes())
    middle = len(data) * 3 // 4
    data[middle : middle + len(filler)] = filler
    path.write_bytes(data)


def test_only_decoding_finds_damage_in_the_middle(tmp_path: Path) -> None:
    """What does not decode, or only to other pixels, is an error; a wrong checksum beside the pixels a warning."""
    source = write(tmp_path)
    scribble(tmp_path / "im 6é.png", "JPEG", b"\xff" * 100)
    scribble(tmp_path / "im 5é.png", "PNG", b"\x00" * 20)
    text = PngImagePlugin.PngInfo()
    text.add(b"teSt", b"x" * 40, after_idat=True)
    Image.linear_gradient("L").resize((40, 30)).save(tmp_path / "im 7é.png", pnginfo=text)
    data = (tmp_path / "im 7é.png").read_bytes()
    (tmp_path / "im 7é.png").write_bytes(data.replace(b"xxxx", b"yyyy", 1))
    assert kinds_of(source) == {}
    found = survey(source, "train", TRAINING, decode=True)
    assert found.findings.counts["image-damaged"] == 2 and found.findings.total("error") == 2
    damaged, scribbled = (str(f) for f in found.findings.found["image-damaged"])
    assert "im 5é.png: image cannot be read" in damaged and "im 6é.png: image cannot be read" in scribbled
    assert "im 7é.png" in str(found.findings.found["image-checksum"][0]) and found.findings.total("warning") == 1
    assert [image["id"] for image in found.images] == [7, 8]


def test_a_picture_that_kills_the_decoder_is_one_damaged_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def deadly(record: dict[str, Any], reader: ImageReader) -> np.ndarray:
        if "deadly" in record["file_name"]:
            os.kill(os.getpid(), signal.SIGKILL)
        return np.arange(2).reshape(1, 2, 1)

    monkeypatch.setattr(decode, "read_record_image", deadly)
    names = [f"{'deadly' if i in (3, 40) else 'good'} {i}" for i in range(70)]
    for number, name in enumerate(names):
        Image.new("L", (1, 1), number).save(tmp_path / name, "PNG")
    records = [Record(file_name=str(tmp_path / name), width=1, height=1) for name in names]
    for workers in (1, 2):
        found = list(decode.decode_all(records, ImageReader(), workers))
        assert [f.kind for f in found] == ["image-damaged" if "deadly" in name else "" for name in names]
        assert len({f.digest for f in found}) == 69  # 68 good ones, and none for the deadly


def test_a_picture_that_holds_up_the_decoder_is_one_damaged_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(record: dict[str, Any], reader: ImageReader) -> np.ndarray:
        if "slow" in record["file_name"]:
            time.sleep(3600)
        return np.arange(2).reshape(1, 2, 1)

    monkeypatch.setattr(decode, "read_record_image", slow)
    monkeypatch.setattr(decode, "SECONDS", 1.5)
    monkeypatch.setattr(decode, "_CHUNK", 2)
    names = [f"{'slow' if i == 5 else 'good'} {i}" for i in range(12)]
    for number, name in enumerate(names):
        Image.new("L", (1, 1), number).save(tmp_path / name, "PNG")
    records = [Record(file_name=str(tmp_path / name), width=1, height=1) for name in names]
    found = list(decode.decode_all(records, ImageReader(), 2))
    assert [f.kind for f in found] == ["image-damaged" if "slow" in name else "" for name in names]
    assert "slow 5: not decoded within 1.5 s: replace it" in found[5].text


def test_wrong_folder_is_one_mistake_and_annotations_are_read_all_the_same(tmp_path: Path) -> None:
    source = write(tmp_path, first(bbox=[2, 3, 0, 8], segmentation=[]))
    gone = DatasetSource("own", source.json_file, str(tmp_path / "gone"), "--train-images")
    assert kinds_of(gone) == {"image-folder": 1, "bbox-no-area": 1}
    (tmp_path / "empty").mkdir()
    empty = DatasetSource("own", source.json_file, str(tmp_path / "empty"), "--train-images")
    assert kinds_of(empty) == {"image-missing": 4, "image-folder": 1, "bbox-no-area": 1}


REPAIRED: dict[str, tuple[Change, dict[str, Any]]] = {
    "annotation-no-id": (lambda c: c["annotations"][0].pop("id"), {"id": 15}),
    "annotation-id-zero": (first(id=0), {"id": 15}),
    "annotation-id-repeated": (lambda c: c["annotations"][1].update(id=11), {}),
    "iscrowd-missing": (lambda c: c["annotations"][0].pop("iscrowd"), {"iscrowd": 0}),
    "area-missing": (lambda c: c["annotations"][0].pop("area"), {"area": 80.0}),
    "id-type": (first(id=11.0, image_id="5", category_id="9"), {"id": 11, "image_id": 5, "category_id": 9}),
    "bbox-missing": (lambda c: c["annotations"][0].pop("bbox"), {"bbox": [2.0, 3.0, 10.0, 8.0]}),
    "polygon-piece": (
        lambda c: c["annotations"][0]["segmentation"].append([1.0, 2.0, 3.0, 4.0]),
        {"segmentation": [[2.0, 3.0, 12.0, 3.0, 12.0, 11.0, 2.0, 11.0]]},
    ),
}


@pytest.mark.parametrize("kind", REPAIRED)
def test_repairs_are_warnings_and_are_written_down(tmp_path: Path, kind: str) -> None:
    change, values = REPAIRED[kind]
    source = write(tmp_path, change)
    times = 2 if kind == "id-type" else 1  # references and category are read in two places
    assert kinds_of(source) == {kind: times}
    after = fixed(source, tmp_path)
    assert kinds_of(after) == {}
    entry = json.loads(Path(after.json_file).read_text())["annotations"][0]
    for key, value in values.items():
        assert entry[key] == value
    loaded = [load_coco(s, max_bad=0) for s in (source, after)]
    assert str(list(loaded[0].records)) == str(list(loaded[1].records))  # training sees the same either way
    assert loaded[0].notes and not loaded[1].notes


@pytest.mark.parametrize("number", [{"x": 1}, "first", None])
def test_an_annotation_without_integer_id_is_mended_with_its_other_ids(tmp_path: Path, number: Any) -> None:
    source = write(tmp_path, first(id=number, image_id=str(CONTENT["annotations"][0]["image_id"])))
    assert kinds_of(source) == {"id-type": 1, "annotation-no-id": 1}
    assert kinds_of(fixed(source, tmp_path)) == {}


def test_box_written_as_corners_is_named(tmp_path: Path) -> None:
    source = write(tmp_path, first(bbox=[2, 3, 12, 11]))
    assert kinds_of(source) == {}  # within the slack on a box so small
    wide = [[4.0, 4.0, 39.0, 4.0, 39.0, 16.0, 4.0, 16.0]]
    source = write(tmp_path, first(bbox=[15, 14, 35, 28], segmentation=[[15, 14, 35, 14, 35, 28, 15, 28]]))
    found = survey(source, "train", TRAINING).findings
    assert "it fits as [x0, y0, x1, y1]" in str(found.found["bbox-mask"][0])
    source = write(tmp_path, first(bbox=[0, 0, 10, 30], segmentation=wide))
    assert "use the box of the mask" in str(survey(source, "train", TRAINING).findings.found["bbox-mask"][0])


def test_rule_for_vanishing_objects(tmp_path: Path) -> None:
    """Below one pixel a side at the smallest training size: 40x30 becomes 60 high at scale 2, so 0.5 pixels stay."""
    at = Training((60, 800), 1333, masks_on=False)
    assert kinds_of(write(tmp_path, first(bbox=[2, 3, 0.51, 8], segmentation=[])), training=at) == {}
    thin = write(tmp_path, first(bbox=[2, 3, 0.49, 8], segmentation=[]))
    assert kinds_of(thin, training=at) == {"object-vanishes": 1}
    limited = Training((800,), 40, masks_on=False)  # MAX_SIZE_TRAIN keeps the size as it is
    thin = write(tmp_path, first(bbox=[2, 3, 0.9, 8], segmentation=[]))
    assert kinds_of(thin, training=limited) == {"object-vanishes": 1}


def test_missing_masks_follow_the_config(tmp_path: Path) -> None:
    source = write(tmp_path, lambda c: c["annotations"][0].pop("segmentation"))
    assert kinds_of(source) == {"no-mask": 1}
    assert kinds_of(source, training=Training((800,), 1333, False)) == {}
    assert kinds_of(source, split="val") == {"no-mask-val": 1}
    assert len(load_coco(fixed(source, tmp_path), max_bad=0).records[0]["annotations"]) == 1


def test_random_damage_never_divides_check_and_loader(tmp_path: Path) -> None:
    """400 random mutations: no exception but DataError, and errors in the check exactly where the loader refuses."""
    values: list[Any] = [None, -1, 0, 0.5, 1e9, math.nan, "", "x", [], [1], {}, True, 10**400, [[1, 2, 3, 4, 5, 6]]]
    rng = random.Random(7)
    source = write(tmp_path)
    original = json.loads(Path(source.json_file).read_text())
    outcomes = {"refused": 0, "accepted": 0}
    for _ in range(400):
        content = copy.deepcopy(original)
        section = rng.choice(["annotations", "annotations", "images", "categories"])
        entry = rng.choice(content[section])
        key = rng.choice([*entry, "segmentation", "bbox"]) if section == "annotations" else rng.choice([*entry])
        if rng.random() < 0.2:
            entry.pop(key, None)
        else:
            entry[key] = rng.choice(values)
        Path(source.json_file).write_text(json.dumps(content))
        try:
            load_coco(source, max_bad=0)
            refused = False
        except DataError:
            refused = True
        counts = survey(source, "train", Training((800,), 1333, False)).findings.counts
        errors = [name for name in counts if KINDS[name].severity == "error"]
        assert bool(errors) == refused, (section, key, entry, errors)
        outcomes["refused" if refused else "accepted"] += 1
    assert min(outcomes.values()) > 50


def test_categories_of_one_name_become_the_one_with_the_lowest_id() -> None:
    assert merged_categories((1, 4, 7, 9), ("a", "b", "a", "a")) == {7: 1, 9: 1}
