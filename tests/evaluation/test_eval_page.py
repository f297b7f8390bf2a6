"""The page is one file without a script, shows what the analysis found, and escapes names from outside."""

from __future__ import annotations

import csv
from pathlib import Path

from gn_det.data.coco import load_coco
from gn_det.data.image import ImageReader
from gn_det.data.shapes import make_shapes
from gn_det.evaluation.analysis import analyze
from gn_det.evaluation.coco_eval import load_ground_truth
from gn_det.evaluation.eval_page import as_html, percent, write_csv

EVIL = "=<script>alert(1)</script>"


def test_page_and_table(tmp_path: Path) -> None:
    data = load_coco(make_shapes(tmp_path, "val", 12), max_bad=0)
    truth = load_ground_truth(data)
    # Everything found but the last image; one detection too much, and one of another class.
    found = [
        {**{k: a[k] for k in ("image_id", "category_id", "bbox")}, "score": 0.5 + 0.4 / a["id"]}
        for a in truth.annotations
        if not a["iscrowd"] and a["image_id"] != truth.image_ids[-1]
    ]
    found.append({**found[0], "bbox": [1.0, 1, 3, 3], "score": 0.95})
    found.append({**found[1], "category_id": next(i for i in data.category_ids if i != found[1]["category_id"])})
    found[-1]["score"] = 0.99
    names = [EVIL, *data.class_names[1:]]
    analysis = analyze(truth, found, names, data.category_ids, task="bbox")
    page = as_html([analysis], data, found, data.category_ids, names, reader=ImageReader(), weights="w.pth")
    assert "<script" not in page and "&lt;script&gt;" in page and "http" not in page.replace("http-equiv", "")
    assert page.count("<img") == 2 * 2 + 2  # two images with errors, two doubts
    assert "objects missed" in page
    assert "12 images" in page and "proves nothing" in page and percent(analysis.ap) in page
    assert "no label" in page and "labeled" in page
    write_csv(tmp_path / "a.csv", analysis)
    rows = list(csv.DictReader((tmp_path / "a.csv").open()))
    assert rows[0]["class"] == "'" + EVIL and [int(r["objects"]) for r in rows] == data.class_counts.tolist()
    assert all(0.5 <= float(r["threshold"]) <= 0.9 for r in rows)


def test_missing_numbers_are_dashes() -> None:
    nan = float("nan")
    assert percent((nan, nan, nan)) == "-" and percent((41.234, nan, nan)) == "41.2"
    assert percent((41.2, 38.0, 44.1)) == "41.2 (38.0 to 44.1)"
