"""evaluate_coco equals pycocotools to the last digit, and survives what pycocotools does not."""

from __future__ import annotations

import copy
import json
import math

import pytest
from coco_oracle import oracle, random_set

from gn_det.errors import DataError
from gn_det.evaluation.coco import evaluate_coco


def same(ours: dict[str, float], theirs: dict[str, float]) -> None:
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
        assert ours[key] == value or (math.isnan(ours[key]) and math.isnan(value)), key


@pytest.mark.parametrize("seed", range(4))
def test_equals_pycocotools_to_the_last_digit(seed: int) -> None:
    """Crowds, gaps in ids, empty images, ties in score, all area ranges, three kinds of masks."""
    data, results = random_set(seed)
    before = copy.deepcopy((data, results))
    ours = evaluate_coco(data, results)
    assert list(ours) == ["bbox", "segm"]
    for task in ours:
        same(ours[task], oracle(data, results, task))
        assert ours[task] == pytest.approx(oracle(data, results, task, exact=False), rel=1e-14, nan_ok=True)
    assert (data, results) == before  # neither input is changed


def test_more_than_100_detections_in_an_image() -> None:
    """Only the 100 best of a category count, or as many as max_dets says."""
    data, results = random_set(7, images=3, categories=2, gts=20, dets=300)
    for max_dets in (100, 300, 20):
        ours = evaluate_coco(data, results, max_dets=max_dets)
        for task in ours:
            same(ours[task], oracle(data, results, task, max_dets))


def test_ids_beyond_the_precision_of_doubles() -> None:
    """Ids made from hashes or text evaluate like small ones."""
    data, results = random_set(3)
    plain = evaluate_coco(data, results)
    for make in (lambda i: i + 2**60, lambda i: i + 10**30, lambda i: f"img {i:03d}"):
        other, found = copy.deepcopy((data, results))
        for image in other["images"]:
            image["id"] = make(image["id"])
        for entry in (*other["annotations"], *found):
            entry["image_id"] = make(entry["image_id"])
        for task, metrics in evaluate_coco(other, found).items():
            same(metrics, plain[task])


def test_boxes_alone_without_masks() -> None:
    data, results = random_set(1)
    for r in results:
        del r["segmentation"]
    assert list(evaluate_coco(data, results)) == ["bbox"]
    results[3]["segmentation"] = {"size": [1, 1], "counts": "1"}
    with pytest.raises(DataError, match="no segmentation"):
        evaluate_coco(data, results)


def test_single_class_has_no_per_category_ap() -> None:
    """As in Detectron2."""
    data, results = random_set(2, categories=2)
    only = [r for r in results if r["category_id"] == 2]
    data["categories"] = data["categories"][:1]
    data["annotations"] = [a for a in data["annotations"] if a["category_id"] == 2]
    assert list(evaluate_coco(data, only)["bbox"]) == ["AP", "AP50", "AP75", "APs", "APm", "APl"]


def test_no_results_gives_nan_for_every_metric() -> None:
    data, _ = random_set(0)
    out = evaluate_coco(data, [])
    assert list(out) == ["bbox", "segm"]
    assert all(math.isnan(v) for task in out.values() for v in task.values())


def test_annotation_ids_zero_and_repeated_do_not_matter() -> None:
    data, results = random_set(3)
    expected = evaluate_coco(data, results)
    for ids in (range(len(data["annotations"])), [4] * len(data["annotations"])):
        for ann, ann_id in zip(data["annotations"], ids):
            ann["id"] = ann_id
        out = evaluate_coco(data, results)
        for task in out:
            same(out[task], expected[task])
        assert any("renumbered" in w for w in out.warnings)


def test_missing_area_and_iscrowd_are_filled() -> None:
    """Area is the mask's; iscrowd is 0."""
    data, results = random_set(4)
    for ann in data["annotations"]:
        ann["iscrowd"] = 0
        if isinstance(ann["segmentation"], list):
            ann["segmentation"] = [[0, 0, 10, 0, 10, 10, 0, 10]]
            ann["area"] = 100.0
    expected = evaluate_coco(data, results)
    for ann in data["annotations"]:
        del ann["area"], ann["iscrowd"]
    out = evaluate_coco(data, results)
    for task in out:
        same(out[task], expected[task])
    assert any("'area'" in w for w in out.warnings)


@pytest.mark.parametrize("vertex", [float("nan"), float("inf"), 1e9])
def test_insane_polygons_do_not_reach_the_mask_api(vertex: float) -> None:
    """Each of them would end the process, or take gigabytes, inside pycocotools."""
    data, results = random_set(5)
    data["annotations"][0]["segmentation"] = [[0, 0, 10, vertex, 10, 10]]
    out = evaluate_coco(data, results)
    assert any("vertex" in w for w in out.warnings)
    assert math.isfinite(out["segm"]["AP"])


def test_text_image_ids() -> None:
    """Ids that are no integers give the same numbers."""
    data, results = random_set(6)
    expected = evaluate_coco(data, results)
    for entry in (*data["annotations"], *results):
        entry["image_id"] = f"image {entry['image_id']:05d}"
    for image in data["images"]:
        image["id"] = f"image {image['id']:05d}"
    out = evaluate_coco(data, results)
    for task in out:
        same(out[task], expected[task])


def test_results_on_unknown_images_are_refused() -> None:
    data, results = random_set(0)
    results[0]["image_id"] = 424242
    with pytest.raises(DataError, match="424242"):
        evaluate_coco(data, results)


def test_results_file(tmp_path) -> None:
    """COCO's result format, entry for entry, and no temporary file left."""
    data, results = random_set(0)
    source = tmp_path / "val.json"
    source.write_text(json.dumps(data))
    evaluate_coco(source, results, output_dir=tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["coco_instances_results.json"]
    assert json.loads((tmp_path / "out" / "coco_instances_results.json").read_text()) == results


def test_json_without_annotations_writes_but_does_not_evaluate(tmp_path) -> None:
    data, results = random_set(0)
    del data["annotations"]
    out = evaluate_coco(data, results, output_dir=tmp_path)
    assert out == {} and "no annotations" in out.reasons[0]
    assert (tmp_path / "coco_instances_results.json").exists()


def test_unusable_json(tmp_path) -> None:
    with pytest.raises(DataError, match="COCO json not found"):
        evaluate_coco(tmp_path / "missing.json", [])
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(DataError, match="not a json file"):
        evaluate_coco(tmp_path / "broken.json", [])
    with pytest.raises(DataError, match="categories"):
        evaluate_coco({"images": [{"id": 1}], "annotations": []}, [])
