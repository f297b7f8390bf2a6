"""Keys that ``gn-det check`` proposes: only where the objects ask for them, as lines that the command line takes."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gn_det.cli import main
from gn_det.config import load_config
from gn_det.config.load import merge_overrides


def own_set(root: Path, boxes: list[list[float]], side: int = 256) -> list[str]:
    """Flags for two equal images of that side, each with these boxes."""
    (root / "images").mkdir(parents=True)
    images, annotations = [], []
    for number in (1, 2):
        Image.new("RGB", (side, side), (number, 9, 9)).save(root / "images" / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": side, "height": side})
        for x, y, w, h in boxes:
            corners = [[x, y, x + w, y, x + w, y + h, x, y + h]]
            common = {"iscrowd": 0, "area": w * h, "segmentation": corners, "bbox": [x, y, w, h]}
            annotations.append({"id": len(annotations) + 1, "image_id": number, "category_id": 1, **common})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "cell"}]}
    (root / "a.json").write_text(json.dumps(content))
    return ["--train-json", str(root / "a.json"), "--train-images", str(root / "images")]


def proposed(root: Path, boxes: list[list[float]], capsys: Any, *keys: str, side: int = 256) -> tuple[dict, str]:
    words = ["check", *own_set(root, boxes, side), "--json", str(root / "r.json"), "--html", str(root / "r.html")]
    main([*words, "--config", "gn_fpn.yaml", *keys])
    return json.loads((root / "r.json").read_text())["proposals"], capsys.readouterr().out


def grid(size: float, count: int = 9) -> list[list[float]]:
    return [[28.0 * (i % 9), 28.0 * (i // 9 % 9), size, size] for i in range(count)]


def test_objects_that_fit_need_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys, out = proposed(tmp_path, grid(20), capsys)  # 63 pixels at training size, between anchors of 32 and 64
    assert keys == {} and "keys that fit" not in out and "keys that fit" not in (tmp_path / "r.html").read_text()


def test_small_objects_ask_for_smaller_anchors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """5 pixels become 16 at 800, half the smallest anchor; images are enlarged threefold already."""
    keys, out = proposed(tmp_path, grid(5), capsys)
    assert keys == {"MODEL.ANCHOR_GENERATOR.SIZES": [[16], [32], [64], [128], [256]]}
    lines = [
        line.strip() for line in out.partition("better than the config\n")[2].splitlines() if line.startswith("    ")
    ]
    assert lines == ['MODEL.ANCHOR_GENERATOR.SIZES "[[16], [32], [64], [128], [256]]"']
    assert lines[0].replace('"', "&#34;") in (tmp_path / "r.html").read_text()
    cfg = load_config("gn_fpn.yaml")
    merge_overrides(cfg, shlex.split(" ".join(lines)))
    assert keys["MODEL.ANCHOR_GENERATOR.SIZES"] == cfg.MODEL.ANCHOR_GENERATOR.SIZES
    assert proposed(tmp_path / "again", grid(5), capsys, *shlex.split(lines[0]))[0] == {}


def test_small_objects_in_large_images_ask_for_larger_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """10 pixels in images of 1600 are 5 at 800: the largest size proposed is 1600, where they have 10."""
    keys, _ = proposed(tmp_path, grid(10), capsys, side=1600)
    assert keys["INPUT.MIN_SIZE_TEST"] == max(keys["INPUT.MIN_SIZE_TRAIN"]) == 1600
    assert keys["INPUT.MAX_SIZE_TRAIN"] == keys["INPUT.MAX_SIZE_TEST"] == 2688  # 1333 in proportion
    assert "\nINPUT.MIN_SIZE_TEST 1600\nINPUT.MAX_SIZE_TEST 2688\n" in (tmp_path / "r.html").read_text()


def test_many_objects_ask_for_more_detections(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys, _ = proposed(tmp_path, grid(20, 130), capsys)
    assert keys == {"TEST.DETECTIONS_PER_IMAGE": 200, "TEST.MAX_DETS": 200}
