"""evaluate_coco equals pycocotools to the last digit, and survives what pycocotools does not."""

from __future__ import annotations

import copy
import json
import math

import pytest

from gn_det.errors import DataError
from gn_det.evaluation.coco_eval import evaluate_coco
from tests.evaluation.coco_oracle import oracle, random_set


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


@pytest.mark.parametrize("max_dets", [1, 5, 20, 100, 300])
def test_only_the_best_detections_of_a_class_count(max_dets: int) -> None:
    """As many of an image as max_dets says."""
    data, results = random_set(7, images=3, categories=2, gts=20, dets=300)
    for task, metrics in evaluate_coco(data, results, max_dets=max_dets).items():
        same(metrics, oracle(data, results, task, max_dets))


def crowded(objects: int, classes: int = 1) -> tuple[dict, list[dict]]:
    """Two images, the first with that many objects spread over the classes, the second with one; all found."""
    boxes = [[4.0 + 12 * (k % 25), 4.0 + 12 * (k // 25), 9.0, 9.0] for k in range(objects)]
    places = [(1, 1 + k % classes, box) for k, box in enumerate(boxes)] + [(2, 1, boxes[0])]
    data = {
        "images": [{"id": i, "file_name": f"{i}.png", "height": 400, "width": 320} for i in (1, 2)],
        "categories": [{"id": c, "name": f"c{c}"} for c in range(1, classes + 1)],
        "annotations": [
            {"id": n, "image_id": i, "category_id": c, "bbox": box, "area": 81.0, "iscrowd": 0}
            for n, (i, c, box) in enumerate(places, 1)
        ],
    }
    results = [{k: a[k] for k in ("image_id", "category_id", "bbox")} for a in data["annotations"]]
    return data, [{**r, "score": 1 - n / 1000} for n, r in enumerate(results)]


def test_caps_that_cost_objects_are_told() -> None:
    """Perfect boxes: AP 100 once the caps let all of them count, and a sentence while they do not."""
    data, results = crowded(150)
    capped = evaluate_coco(data, results, iou_types=["bbox"], detections_per_image=300)
    same(capped["bbox"] | {"AP-c1": capped["bbox"]["AP"]}, oracle(data, results, "bbox", 100))
    assert capped["bbox"]["AP"] < 70
    (sentence,) = capped.reasons[:1]
    assert sentence.startswith("1 of 2 images of ground truth have more objects (up to 150) than TEST.MAX_DETS 100 and")
    assert "50 of 151 objects cannot be found" in sentence
    assert sentence.endswith("set TEST.MAX_DETS 200 TEST.DETECTIONS_PER_IMAGE 300.")
    free = evaluate_coco(data, results, iou_types=["bbox"], max_dets=300, detections_per_image=300)
    assert free["bbox"]["AP"] == 100 and not any("MAX_DETS" in s for s in free.reasons)
    assert list(free["bbox"]) == list(capped["bbox"])  # the names of the metrics stay
    same(free["bbox"] | {"AP-c1": free["bbox"]["AP"]}, oracle(data, results, "bbox", 300))


def test_caps_by_class_and_by_image() -> None:
    """MAX_DETS holds for each class of an image, DETECTIONS_PER_IMAGE for all together."""
    data, results = crowded(150, classes=2)
    assert not any("MAX_DETS" in s for s in evaluate_coco(data, results, iou_types=["bbox"]).reasons)
    told = evaluate_coco(data, results, iou_types=["bbox"], detections_per_image=120).reasons[0]
    assert "30 of 151 objects cannot be found" in told and "TEST.DETECTIONS_PER_IMAGE 120" in told
    told = evaluate_coco(data, results, iou_types=["bbox"], max_dets=50).reasons[0]
    assert "50 of 151 objects cannot be found" in told and "DETECTIONS_PER_IMAGE 50" not in told


def test_proposals_are_a_cap_of_their_own() -> None:
    """MODEL.RPN.POST_NMS_TOPK_TEST holds for all classes together; it is named where an image has more objects."""
    data, results = crowded(150, classes=2)
    free = {"iou_types": ["bbox"], "max_dets": 300, "detections_per_image": 300}
    assert not any("MAX_DETS" in s for s in evaluate_coco(data, results, **free, proposals=150).reasons)
    told = evaluate_coco(data, results, **free, proposals=110).reasons[0]
    assert "40 of 151 objects cannot be found" in told and "MODEL.RPN.POST_NMS_TOPK_TEST 110 let count" in told
    assert told.endswith("set TEST.MAX_DETS 300 TEST.DETECTIONS_PER_IMAGE 300 MODEL.RPN.POST_NMS_TOPK_TEST 1000.")
    # no cap is named that has room, and none is lowered
    told = evaluate_coco(data, results, iou_types=["bbox"], detections_per_image=120, proposals=1000).reasons[0]
    assert "POST_NMS" not in told


def test_a_class_that_the_json_lacks_has_no_ap() -> None:
    """A model of more classes: its other detections do not count, and nothing is said of strange ids."""
    data, results = random_set(2)
    names = [c["name"] for c in data["categories"]]
    ids = [c["id"] for c in data["categories"]]
    plain = evaluate_coco(data, results, names, ids)
    more = [*results, *({**r, "category_id": 99} for r in results[:9])]
    out = evaluate_coco(data, more, [*names, "unknown"], [*ids, 99])
    for task, metrics in out.items():
        assert math.isnan(metrics.pop("AP-unknown"))
        same(metrics, plain[task])
    assert out.reasons == plain.reasons


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
        assert any("annotation ids" in w for w in out.warnings)


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
    assert any("without usable area" in w for w in out.warnings)


@pytest.mark.parametrize("vertex", [float("nan"), float("inf"), 1e9])
def test_insane_polygons_do_not_reach_the_mask_api(vertex: float) -> None:
    """Each of them would end the process, or take gigabytes, inside pycocotools."""
    data, results = random_set(5)
    data["annotations"][0]["segmentation"] = [[0, 0, 10, vertex, 10, 10]]
    out = evaluate_coco(data, results)
    assert any("ignored annotation" in w for w in out.warnings)
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


def test_some_results_without_a_mask_are_refused() -> None:
    data, results = random_set(4)
    del results[-1]["segmentation"]
    with pytest.raises(DataError, match=f"image {results[-1]['image_id']!r} has no segmentation"):
        evaluate_coco(data, results)


def test_what_training_drops_does_not_count_here_either() -> None:
    """The reader of training reads the ground truth: the same entries dropped, each in one line, the same repairs."""
    data, results = random_set(5)
    first, second, third, fourth = data["annotations"][:4]
    first["segmentation"] = [[0, 0, 10, 0, 10, 10, 5]]
    second["segmentation"] = {"size": [120, 150], "counts": [1, 2]}
    third["bbox"], third["segmentation"] = [500, 500, 4, 4], None
    fourth["id"] = "text"
    out = evaluate_coco(data, results)
    data["annotations"] = data["annotations"][3:]
    for task, metrics in evaluate_coco(data, results).items():
        same(out[task], metrics)
    told = [w.partition(": ignored ")[2] for w in out.warnings if "ignored" in w]
    assert [" ".join(line.split()[:2]) for line in told] == [f"annotation {a['id']}" for a in (first, second, third)]
    assert "no usable polygon" in told[0] and "RLE" in told[1] and "is outside" in told[2]
    assert any("annotations without integer id" in w for w in out.warnings)
