"""benchmarks/nuclei_floor.py finds separate bright or dark objects exactly."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

cv2 = pytest.importorskip("cv2", reason="the floor is computed with OpenCV")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))
nuclei_floor: Any = __import__("nuclei_floor")


@pytest.mark.parametrize("dark", [False, True])
def test_separate_objects_are_found_and_touching_ones_are_one(tmp_path: Path, dark: bool) -> None:
    """Three disks, of which two touch, and a speck: the merged ones overlap neither by three quarters."""
    y, x = np.mgrid[:80, :120]
    disks = [(y - cy) ** 2 + (x - cx) ** 2 <= 144 for cy, cx in ((20, 20), (50, 70), (50, 92))]
    pixels = np.where(np.any(disks, axis=0), 200, 40).astype(np.uint8)
    pixels[5:7, 100:102] = 200
    Image.fromarray(255 - pixels if dark else pixels).save(tmp_path / "a.png")
    found = nuclei_floor.detect(tmp_path / "a.png", 7, 1)
    masks = [coco_mask.decode(r["segmentation"]).astype(bool) for r in found]
    assert sorted(int(m.sum()) for m in masks) == pytest.approx([disks[0].sum(), (disks[1] | disks[2]).sum()], rel=0.05)
    annotations = []
    for number, disk in enumerate(disks, 1):
        rle = coco_mask.encode(np.asfortranarray(disk.astype(np.uint8)))
        box, area = coco_mask.toBbox(rle).tolist(), float(coco_mask.area(rle))
        rle["counts"] = rle["counts"].decode()
        keys = {"id": number, "image_id": 7, "category_id": 1, "iscrowd": 0}
        annotations.append({**keys, "bbox": box, "area": area, "segmentation": rle})
    images = [{"id": 7, "file_name": "a.png", "width": 120, "height": 80}]
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "nucleus"}]}
    (tmp_path / "a.json").write_text(json.dumps(content))
    nuclei_floor.main([str(tmp_path / "a.json"), str(tmp_path), "--output", str(tmp_path / "out.json")])
    out = json.loads((tmp_path / "out.json").read_text())
    # one of three objects is found, at 34 of 101 recalls; half of that where the merged ones rank first
    assert out["objects"] == 2 and out["segm"]["AP75"] in (pytest.approx(33.66, abs=0.1), pytest.approx(16.83, abs=0.1))
