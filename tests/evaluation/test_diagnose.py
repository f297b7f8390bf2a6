"""Every AP of 0 or nan comes with its reason; a good result with none."""

from __future__ import annotations

import copy
import math
from typing import Any

from gn_det.evaluation.coco_eval import evaluate_coco
from tests.evaluation.coco_oracle import compressed, ellipse

Json = dict[str, Any]


def perfect(images: int = 4) -> tuple[Json, list[Json]]:
    """Ten objects of every size and both classes an image, and the results that find them all."""
    data: Json = {"images": [], "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}], "annotations": []}
    results = []
    for i in range(1, images + 1):
        data["images"].append({"id": i, "height": 300, "width": 400})
        for k, side in enumerate((10, 20, 50, 60, 120)):
            box = [30.0 + 10 * i + 30 * k, 60.0 + 20 * k, float(side), float(side)]
            ann = {"image_id": i, "category_id": 1 + (i + k) % 2, "bbox": box, "area": float(side * side)}
            segmentation = compressed(ellipse(300, 400, box))
            ann |= {"id": len(data["annotations"]) + 1, "iscrowd": 0, "segmentation": segmentation}
            data["annotations"].append(ann)
            result = {k: ann[k] for k in ("image_id", "category_id", "bbox", "segmentation")}
            results.append(result | {"score": 0.5 + k / 10})
    return data, results


def reasons(data: Json, results: list[Json], **kwargs: Any) -> str:
    return "\n".join(evaluate_coco(data, results, **kwargs).reasons)


def test_nothing_to_explain() -> None:
    data, results = perfect()
    out = evaluate_coco(data, results)
    assert out["bbox"]["AP"] > 99.9 and out["segm"]["AP"] > 99.9
    assert out.reasons == []


def test_no_detections() -> None:
    assert "detected nothing in the 4 images" in reasons(perfect()[0], [])


def test_no_ground_truth() -> None:
    data, results = perfect()
    empty = data | {"annotations": []}
    out = evaluate_coco(empty, results)
    assert math.isnan(out["bbox"]["AP"]) and "no ground-truth object" in out.reasons[0]
    crowds = [a | {"iscrowd": 1} for a in data["annotations"]]
    assert "that is not a crowd" in reasons(data | {"annotations": crowds}, results)


def test_no_object_of_a_size() -> None:
    data, results = perfect()
    data["annotations"] = [a for a in data["annotations"] if a["area"] < 96**2]
    out = evaluate_coco(data, results)
    assert math.isnan(out["bbox"]["APl"])
    assert len(out.reasons) == 1 and "APl is undefined" in out.reasons[0] and "above 96²" in out.reasons[0]


def test_category_without_objects() -> None:
    data, results = perfect()
    data["categories"].append({"id": 9, "name": "unicorn"})
    assert "1 of 3 categories have no object" in reasons(data, results) and "unicorn" in reasons(data, results)


def test_ids_that_do_not_match() -> None:
    data, results = perfect()
    strange = [r | {"category_id": r["category_id"] + 50} for r in results]
    assert "category ids that ground truth does not have (51, 52; it has 1, 2)" in reasons(data, strange)
    assert "does not know" in reasons(data, results, class_names=["cat"], category_ids=[1])
    half = copy.deepcopy(data)
    half["annotations"] = [a for a in half["annotations"] if a["image_id"] <= 2]
    assert "Only 0 of the 2 images" in (text := reasons(half, [r for r in results if r["image_id"] > 2]))
    assert "missed: the ids of the" in text


def test_most_images_without_detections() -> None:
    data, results = perfect()
    assert "Only 1 of the 4 images" in reasons(data, [r for r in results if r["image_id"] == 3])


def test_swapped_classes() -> None:
    data, results = perfect()
    swapped = [r | {"category_id": 3 - r["category_id"]} for r in results]
    assert "class order or category ids" in reasons(data, swapped)


def as_corners(entry: Json) -> Json:
    x, y, w, h = entry["bbox"]
    return entry | {"bbox": [x, y, x + w, y + h]}


def test_box_conventions() -> None:
    data, results = perfect()
    assert "the detected boxes fit when read as [x0, y0, x1, y1]" in reasons(data, [as_corners(r) for r in results])
    normalized = [r | {"bbox": [v / 400 for v in r["bbox"]]} for r in results]
    assert "the detected boxes are all within 0..1.5" in reasons(data, normalized)
    data["annotations"] = [as_corners(a) for a in data["annotations"]]
    assert "the ground-truth boxes fit when read as [x0, y0, x1, y1]" in reasons(data, results)


def test_equal_scores_single_image_and_untrained() -> None:
    data, results = perfect(1)
    assert "single image" in reasons(data, results)
    data, results = perfect()
    assert "the same score" in reasons(data, [r | {"score": 0.5} for r in results])
    nowhere = [r | {"bbox": [0.0, 0.0, 5.0, 5.0]} for r in results]
    assert "train longer" in reasons(data, nowhere, iou_types=["bbox"])


def test_no_masks_in_ground_truth() -> None:
    data, results = perfect()
    for ann in data["annotations"]:
        del ann["segmentation"]
    out = evaluate_coco(data, results)
    assert out["bbox"]["AP"] > 99.9 and math.isnan(out["segm"]["AP"])
    assert "no object of ground truth has a usable segmentation" in "\n".join(out.reasons)


def test_half_of_the_images_without_detections_is_told() -> None:
    data, results = perfect()
    assert "Only 2 of the 4 images" in reasons(data, [r for r in results if r["image_id"] <= 2])
    assert "of the 4 images" not in reasons(data, [r for r in results if r["image_id"] <= 3])


def test_box_convention_is_told_of_a_model_that_finds_a_part() -> None:
    """Objects of 3 of 5 images are found, so that at most 60 % of them can tell."""
    data, results = perfect(5)
    data["annotations"] = [as_corners(a) for a in data["annotations"]]
    assert "the ground-truth boxes fit when read as" in reasons(data, [r for r in results if r["image_id"] <= 3])


def test_unsure_detections_of_the_wrong_class_do_not_blame_the_classes() -> None:
    """A model that hardly trained names classes at random."""
    data, results = perfect()
    swapped = [r | {"category_id": 3 - r["category_id"], "score": r["score"] / 2} for r in results]
    assert "class order" not in reasons(data, swapped) and "train longer" in reasons(data, swapped)
