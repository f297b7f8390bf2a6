"""The check command: exit codes, table, json and page; train against val; what training says about it."""

from __future__ import annotations

import copy
import json
import math
import os
import random
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gn_det.check.audit import Training
from gn_det.check.sizes import LABELS, size_table
from gn_det.cli import main
from gn_det.config import load_config
from gn_det.data.catalog import DatasetSource
from gn_det.data.coco import load_coco
from gn_det.data.image import ImageReader
from gn_det.data.shapes import make_shapes
from gn_det.errors import DataError
from tests.data.own_coco import Change, write


def words(train: DatasetSource, val: DatasetSource | None = None, *more: str) -> list[str]:
    found = ["check", "--train-json", train.json_file, "--train-images", train.image_root]
    if val is not None:
        found += ["--val-json", val.json_file, "--val-images", val.image_root]
    return [*found, *more]


def in_folder(folder: Path, *changes: Change) -> DatasetSource:
    folder.mkdir()
    return write(folder, *changes)


def other_pictures(source: DatasetSource) -> DatasetSource:
    """Give the set images of its own."""
    for path in Path(source.image_root).glob("*.png"):
        Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    return source


def bad_box(content: dict[str, Any]) -> None:
    content["annotations"][0].update(bbox=[2, 3, 0, 8], segmentation=[])


def no_area(content: dict[str, Any]) -> None:
    del content["annotations"][0]["area"]


@pytest.mark.parametrize(("change", "code"), [(None, 0), (no_area, 1), (bad_box, 2)])
def test_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Change | None, code: int) -> None:
    source = write(tmp_path, *([change] if change else []))
    report = tmp_path / "out" / "report.json"
    assert main(words(source, None, "--json", str(report))) == code
    out = capsys.readouterr().out
    assert f"(exit code {code})" in out and "4 usable images" in out
    data = json.loads(report.read_text())
    assert data["exit_code"] == code
    if code == 2:
        assert data["totals"]["errors"] == 1
        listed = next(p for p in data["sets"][0]["problems"] if p["kind"] == "bbox-no-area")
        place = {k: listed["listed"][0][k] for k in ("image_id", "file_name", "annotation_id")}
        assert place == {"image_id": 5, "file_name": "im 5é.png", "annotation_id": 11}
        assert "annotation 11 of image 5 (im 5é.png): bbox [2, 3, 0, 8] has no area" in out
        assert "--fix: the annotation is left out" in out


def test_shapes_are_clean_and_dirt_in_them_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing invented on a good set with polygons, RLE, overlap and several sizes; val is another set."""
    train, val = make_shapes(tmp_path, "train", 12), make_shapes(tmp_path, "val", 6)
    assert main(words(train, val, "--images")) == 0
    out = capsys.readouterr().out
    assert out.count("no problem found") == 3 and "every image decoded" in out and "triangle" in out


def test_overlap_by_file_and_by_content(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = in_folder(tmp_path / "a")
    val = other_pictures(in_folder(tmp_path / "b"))
    assert main(words(train, val)) == 0
    shutil.copy(tmp_path / "a" / "im 5é.png", tmp_path / "b" / "im 6é.png")
    (tmp_path / "b" / "im 7é.png").unlink()
    os.link(tmp_path / "a" / "im 8é.png", tmp_path / "b" / "im 7é.png")
    capsys.readouterr()
    for more in ((), ("--images",)):
        assert main(words(train, val, "--json", str(tmp_path / "r.json"), *more)) == 1
        found = {p["kind"]: p["listed"] for p in json.loads((tmp_path / "r.json").read_text())["together"]}
        assert set(found) == {"overlap-content", "overlap-file"}
        assert [f["image_id"] for f in found["overlap-content"]] == [5]
        assert "image 6 (im 6é.png) of val" in found["overlap-content"][0]["text"]
        assert [f["image_id"] for f in found["overlap-file"]] == [8] and "image 7 of val" in str(found["overlap-file"])
    assert main(words(train, train)) == 1  # a set against itself: all of it
    assert "4  image files in both train and val" in capsys.readouterr().out


def test_categories_that_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = in_folder(tmp_path / "a")
    named = other_pictures(in_folder(tmp_path / "b", lambda c: c["categories"][0].update(name="neun")))
    assert main(words(train, named)) == 2
    assert "has 'neun', which the model does not know" in capsys.readouterr().out

    def swap(content: dict[str, Any]) -> None:
        first, second = content["categories"]
        first["name"], second["name"] = second["name"], first["name"]

    swapped = other_pictures(in_folder(tmp_path / "c", swap))
    assert main(words(train, swapped)) == 0
    assert "train and val number the same classes differently" in capsys.readouterr().out


def test_sets_without_objects(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = in_folder(tmp_path / "a", lambda c: c.update(annotations=[]))
    assert main(words(empty)) == 2
    assert "no image has an object to learn from" in capsys.readouterr().out
    assert main(words(empty, None, "--fix", str(tmp_path / "x.json"), "--html", str(tmp_path / "x.html"))) == 2
    assert "no object" in capsys.readouterr().err and not (tmp_path / "x.json").exists()
    assert "nothing to learn from" in (tmp_path / "x.html").read_text(encoding="utf-8")
    # for validation that is no error, and neither are missing annotations; nothing can be measured, though
    train = in_folder(tmp_path / "b")
    blind = other_pictures(in_folder(tmp_path / "c", lambda c: c.pop("annotations")))
    assert main(words(train, blind)) == 1
    assert "AP cannot be measured" in capsys.readouterr().out


def test_table_of_sizes(tmp_path: Path) -> None:
    """Three objects by hand: 40x30 images at short side 60 are twice as large; sqrt(80), sqrt(30), sqrt(120)."""
    cfg = load_config("gn_fpn", ["INPUT.MIN_SIZE_TRAIN", "(60,)"])
    training = Training.of(cfg)
    sizes = size_table([load_coco(write(tmp_path), max_bad=0)], training, cfg)
    assert sizes.counts == (0, 0, 1, 2, 0, 0, 0, 0, 0, 0)  # 17.9, 11.0, 21.9 pixels
    assert sizes.anchors == (32, 64, 128, 256, 512) and "shorter side of 60," in sizes.rule
    assert sizes.small == pytest.approx(1 / 3)
    # the best anchor of 20x16, 10x12 and 8x60 is the 32 pixel one of ratio 1, 1 and 2
    whole = (20 * 16 / 1024, 10 * 12 / 1024)
    narrow = 8 * 32 * 2**0.5 / (8 * 60 + 1024 - 8 * 32 * 2**0.5)
    assert max(*whole, narrow) < 0.5 and sizes.fit == (0.0, 0.0)


def test_sizes_on_a_border_belong_to_the_larger_bar(tmp_path: Path) -> None:
    """An object of 8x8 pixels is one of 16 at twice the size: the bar is 16-32."""
    cfg = load_config("gn_fpn", ["INPUT.MIN_SIZE_TRAIN", "(60,)"])

    def square(content: dict[str, Any]) -> None:
        content["annotations"] = [{**content["annotations"][0], "bbox": [2, 3, 8, 8]}]

    sizes = size_table([load_coco(write(tmp_path, square), max_bad=0)], Training.of(cfg), cfg)
    assert LABELS[3] == "16-32" and sizes.counts == (0, 0, 0, 1, 0, 0, 0, 0, 0, 0)


def test_augmented_images_are_drawn(tmp_path: Path) -> None:
    """One sheet for one seed; another preset gives another."""
    source, sheets = in_folder(tmp_path / "a"), []
    for n, preset in enumerate(("none", "strong", "strong")):
        out = tmp_path / f"{n}.png"
        assert main(words(source, None, "--augment", preset, "--augmented", str(out), "SEED", "1")) < 2
        sheets.append(np.asarray(Image.open(out)))
    assert sheets[0].shape[1] > 1900 and np.array_equal(sheets[1], sheets[2])
    assert sheets[0].shape != sheets[1].shape or not np.array_equal(sheets[0], sheets[1])


@pytest.mark.parametrize("flag", ["--fix", "--json", "--html", "--augmented"])
def test_never_over_the_input(tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str) -> None:
    source = write(tmp_path, bad_box)
    before = Path(source.json_file).read_bytes()
    (tmp_path / "link.json").symlink_to(source.json_file)
    os.link(source.json_file, tmp_path / "hard.json")
    for name in ("own.json", "link.json", "hard.json", "./own.json"):
        assert main(words(source, None, flag, f"{tmp_path}/{name}")) == 2
        err = capsys.readouterr().err
        assert "give another name" in err and err.count("\n") == 1
    assert Path(source.json_file).read_bytes() == before
    os.unlink(source.json_file)  # or its disk is not mounted: the report would take its place
    assert main(words(source, None, flag, source.json_file)) == 2
    assert "give another name" in capsys.readouterr().err and not os.path.exists(source.json_file)


def test_fix_into_a_place_that_cannot_be_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path, bad_box)
    (tmp_path / "file").write_text("")
    assert main(words(source, None, "--fix", str(tmp_path / "file" / "out.json"))) == 2
    assert "cannot be written" in capsys.readouterr().err
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".tmp")]


def test_fix_keeps_what_it_does_not_know(tmp_path: Path) -> None:
    """Other keys, their order and numbers as written; the json is still readable text."""

    def change(content: dict[str, Any]) -> None:
        bad_box(content)
        content["annotations"][1]["keypoints"] = [1, 2.5, "é"]
        content["info"] = {"by": "José"}

    source = write(tmp_path, change)
    out = tmp_path / "clean.json"
    assert main(words(source, None, "--fix", str(out))) == 2
    before = json.loads(Path(source.json_file).read_text())
    before["annotations"].pop(0)
    assert json.loads(out.read_text(encoding="utf-8")) == before and "José" in out.read_text(encoding="utf-8")
    changes = out.with_name("clean.changes.txt").read_text(encoding="utf-8")
    assert changes == "annotation 11 of image 5: left out: boxes without area\n"


def test_fix_says_what_it_leaves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train = in_folder(tmp_path / "a")
    val = other_pictures(in_folder(tmp_path / "b", bad_box))
    assert main(words(train, val, "--fix", str(tmp_path / "out.json"))) == 2
    out = capsys.readouterr().out
    assert "0 changes" in out and "has 1 error of its own: give it as --train-json" in out


def test_many_of_a_kind_are_counted_and_not_all_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def change(content: dict[str, Any]) -> None:
        first = content["annotations"][0]
        content["annotations"] += [
            {**first, "id": 100 + i, "bbox": [1, 1, 0, 0], "segmentation": []} for i in range(1500)
        ]

    source = write(tmp_path, change)
    assert main(words(source, None, "--json", str(tmp_path / "r.json"), "--fix", str(tmp_path / "out.json"))) == 2
    out = capsys.readouterr().out
    assert "1500  boxes without area" in out and "... and 1497 more" in out and "1,500 changes" in out
    problem = json.loads((tmp_path / "r.json").read_text())["sets"][0]["problems"][0]
    assert problem["count"] == 1500 and len(problem["listed"]) == 1000
    assert len(json.loads((tmp_path / "out.json").read_text())["annotations"]) == 4
    assert len((tmp_path / "out.changes.txt").read_text().splitlines()) == 1500


def test_mistaken_calls_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check"]) == 2
    assert "give --data, or --train-json and --train-images" in capsys.readouterr().err
    assert main(["check", "--train-json", str(tmp_path / "gone.json"), "--train-images", str(tmp_path)]) == 2
    out = capsys.readouterr()
    assert "annotation file of dataset 'gone' not found" in out.out and out.err == ""


def test_names_that_no_terminal_can_write(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Line breaks, half a surrogate pair and other scripts in names: one line each, in every report."""
    names = ["a\nb.png", "\ud800.png", "画像.png", "\x1b[31mred.png"]

    def change(content: dict[str, Any]) -> None:
        for image, name in zip(content["images"], names):
            image["file_name"] = name
        content["categories"][0]["name"] = "類"

    source = write(tmp_path, change)
    (tmp_path / "im 5é.png").rename(tmp_path / "画像.png")
    out = [str(tmp_path / n) for n in ("r.json", "r.html", "clean.json")]
    assert main(words(source, None, "--json", out[0], "--html", out[1], "--fix", out[2])) == 2
    text = capsys.readouterr().out
    assert "a\\nb.png" in text and "\\ud800.png" in text and "\x1b" not in text
    assert "画像" in Path(out[1]).read_text(encoding="utf-8")
    cleaned = DatasetSource("cleaned", out[2], source.image_root)
    assert [r["image_id"] for r in load_coco(cleaned, max_bad=0).records] == [5]


def test_a_closed_pipe_is_no_crash(tmp_path: Path) -> None:
    source = write(tmp_path, no_area)
    command = [sys.executable, "-m", "gn_det", *words(source, None, "--json", str(tmp_path / "r.json"))]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1 and (tmp_path / "r.json").exists()


def test_training_names_the_check(tmp_path: Path) -> None:
    """Where entries were dropped, where too many are bad, and where the file as a whole is refused."""
    source = write(tmp_path, bad_box)
    assert "gn-det check" in load_coco(source, max_bad=1).summary()
    with pytest.raises(DataError, match="gn-det check lists all of them, and --fix"):
        load_coco(source, max_bad=0)
    with pytest.raises(DataError, match="gn-det check lists every problem"):
        load_coco(write(tmp_path, lambda c: c["images"][0].update(id=6)), max_bad=9)
    assert "gn-det check" not in load_coco(write(tmp_path), max_bad=0).summary()


def test_random_damage_reaches_every_report_and_is_mended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """60 files with four random mutations each: no trace from any output, and what is mended loads with MAX_BAD 0."""
    values: list[Any] = [None, -1, 0, 0.5, 1e9, math.nan, "", "\n", [], [1], {}, True, 10**400, [[1, 2, 3, 4, 5, 6]]]
    rng = random.Random(11)
    source = write(tmp_path)
    original = json.loads(Path(source.json_file).read_text())
    out = [str(tmp_path / n) for n in ("r.json", "r.html", "clean.json")]
    outcomes = {"mended": 0, "left to a person": 0}
    for _ in range(60):
        content = copy.deepcopy(original)
        for _ in range(4):
            section = rng.choice(["annotations", "annotations", "annotations", "images", "images", "categories"])
            entry = rng.choice(content[section])
            entry[rng.choice([*entry, "segmentation"])] = rng.choice(values)
        Path(source.json_file).write_text(json.dumps(content))
        Path(out[2]).unlink(missing_ok=True)
        code = main(words(source, None, "--json", out[0], "--html", out[1], "--fix", out[2], "MODEL.MASK_ON", "False"))
        said = capsys.readouterr()
        assert json.loads(Path(out[0]).read_text())["exit_code"] == code or "--fix" in said.err
        if Path(out[2]).exists():
            load_coco(DatasetSource("clean", out[2], source.image_root), max_bad=0)
            outcomes["mended"] += 1
        else:
            assert "nothing was written" in said.err and said.err.count("\n") == 1
            outcomes["left to a person"] += 1
    assert min(outcomes.values()) >= 5, outcomes


def test_help_tells_the_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["check", "--help"])
    out = " ".join(capsys.readouterr().out.split())
    assert "0 no problems (notes do not count), 1 warnings only, 2 errors" in out


def test_names_cannot_write_html_or_control_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evil = (
        "\x1b[31m\x9b2J\u202e\nERROR: done\r<img src=x onerror=alert(1)>\"' onload=alert(2) ><script>alert(3)</script>"
    )

    def change(content: dict[str, Any]) -> None:
        bad_box(content)
        content["images"][1]["file_name"] = evil
        content["annotations"][-1]["iscrowd"] = "L" * 10**5
        content["categories"][0]["name"] = re.sub(r"[\x00-\x1f\x7f-\x9f]", "", evil)

    page, report, cleaned = (tmp_path / name for name in ("r.html", "r.json", "c.json"))
    outputs = ["--html", str(page), "--json", str(report), "--fix", str(cleaned)]
    assert main(words(write(tmp_path, change), None, *outputs)) == 2
    text, html = capsys.readouterr().out, page.read_text(encoding="utf-8")
    for shown in (text, html, (tmp_path / "c.changes.txt").read_text()):
        assert not set(shown) & set("\x1b\x9b\u202e\r") and "\nERROR: done" not in shown
    assert "(100000 characters)" in text and len(text) < 20_000
    assert "<script" not in html and "&lt;script&gt;alert(3)" in html

    class Tags(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            assert not [name for name, _ in attrs if name.startswith("on")]
            assert tag != "img" or str(dict(attrs)["src"]).startswith("data:")

    Tags().feed(html)


@pytest.mark.parametrize("flag", ["--json", "--html", "--fix"])
def test_outputs_are_files(tmp_path: Path, capsys: pytest.CaptureFixture[str], flag: str) -> None:
    """A rename would replace a device by a file; refused before anything is read."""
    os.mkfifo(tmp_path / "pipe")
    source = write(tmp_path)
    for target, what in ((tmp_path / "pipe", "a named pipe"), (tmp_path, "a folder"), ("/dev/null", "a device")):
        assert main(words(source, None, flag, str(target))) == 2
        out = capsys.readouterr()
        assert f"it is {what}" in out.err and out.err.count("\n") == 1 and out.out == ""


def test_boxes_alone_without_masks_are_clean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """MODEL.MASK_ON False asks for no masks, in val neither."""

    def strip(content: dict[str, Any]) -> None:
        for annotation in content["annotations"]:
            annotation.pop("segmentation")

    train, val = in_folder(tmp_path / "a", strip), other_pictures(in_folder(tmp_path / "b", strip))
    assert main(words(train, val, "MODEL.MASK_ON", "False")) == 0
    assert "objects without a mask (MODEL.MASK_ON is False)" in capsys.readouterr().out
    assert main(words(train, val, "MODEL.MASK_ON", "True")) == 2


def test_more_objects_than_count_name_the_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A warning with the keys to set, until they are set."""

    def many(content: dict[str, Any]) -> None:
        content["annotations"] = [
            {**content["annotations"][0], "id": i, "bbox": [x, y, 9, 9],
             "segmentation": [[x, y, x + 9, y, x + 9, y + 9, x, y + 9]]}
            for i, (x, y) in enumerate(((x, y) for x in range(20) for y in range(6)), 1)
        ]  # fmt: skip

    train, val = in_folder(tmp_path / "a"), other_pictures(in_folder(tmp_path / "b", many))
    assert main(words(train, val)) == 1
    told = capsys.readouterr().out
    keys = "TEST.MAX_DETS 200 TEST.DETECTIONS_PER_IMAGE 200"
    assert f"120 objects, 20 of which cannot be found: set {keys}" in told
    assert main(words(train, val, *keys.split())) == 0
    capsys.readouterr()
    assert main(words(train, val, *keys.split(), "MODEL.RPN.POST_NMS_TOPK_TEST", "70")) == 1
    told = capsys.readouterr().out
    assert f"120 objects, 50 of which cannot be found: set {keys} MODEL.RPN.POST_NMS_TOPK_TEST 1000" in told


def test_deep_and_constant_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """16 bits: an error with mode and range until INPUT.BIT_DEPTH is set; one color all over: a warning."""
    source = write(tmp_path)
    for number in (5, 6, 7, 8):
        values = np.arange(1200, dtype=np.uint16).reshape(30, 40) * (number != 8) + 3
        Image.fromarray(values).save(tmp_path / f"im {number}é.png")
    assert main(words(source)) == 2
    told = capsys.readouterr().out
    assert "(mode I;16) with values from 3 to 1202" in told and "none of its 4 images can be used" in told
    assert main(words(source, None, "--images", "INPUT.BIT_DEPTH", "3,1202")) == 1
    told = capsys.readouterr().out
    assert "images of a single color" in told and "(im 8é.png): every pixel is 0" in told
    page = tmp_path / "page.html"
    assert main(words(source, None, "--html", str(page), "INPUT.BIT_DEPTH", "3,1202")) == 0
    assert page.read_text().count("<figure") == 4  # samples: every picture is read as training reads it
    with pytest.raises(DataError, match=r"set INPUT.BIT_DEPTH"):
        load_coco(source, max_bad=100)
    assert len(load_coco(source, max_bad=0, reader=ImageReader("BGR", "full"))) == 4


@pytest.mark.parametrize(("how", "side"), [("choice", 96), ("range", 120)])
def test_sizes_are_those_at_the_middle_of_the_training_sizes(how: str, side: int, tmp_path: Path) -> None:
    """The median of the sizes that are chosen from; the middle of a range."""
    sizes = "(200,64,96)" if how == "choice" else "(40,200)"
    cfg = load_config("quickstart.yaml", ["INPUT.MIN_SIZE_TRAIN", sizes, "INPUT.MIN_SIZE_TRAIN_SAMPLING", how])
    training = Training.of(cfg)
    assert f"of {side}," in size_table([load_coco(write(tmp_path), max_bad=0)], training, cfg).rule
