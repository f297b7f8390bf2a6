"""The analysis agrees with the APs of COCO's evaluation, and says where detections and labels differ."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from gn_det.evaluation import analysis
from gn_det.evaluation.analysis import IOUS, Matches, analyze, average_precision
from gn_det.evaluation.coco_eval import evaluate_coco, load_ground_truth
from tests.evaluation.coco_oracle import random_set

_SIZES = {"small": "APs", "medium": "APm", "large": "APl"}


def _analysed(data: Any, results: Any, task: str, max_dets: int = 100) -> Any:
    truth = load_ground_truth(data)
    names = [c["name"] for c in truth.categories]
    return analyze(truth, results, names, truth.category_ids, task=task, max_dets=max_dets)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_aps_are_those_of_the_evaluation(seed: int, task: str) -> None:
    """Overall, by class and by size, with crowds, ties and classes without objects."""
    data, results = random_set(seed)
    want, got = evaluate_coco(data, results)[task], _analysed(data, results, task)
    assert got.ap[0] == pytest.approx(want["AP"], rel=1e-5)
    assert got.ap50[0] == pytest.approx(want["AP50"], rel=1e-5)
    for name, key in _SIZES.items():
        assert got.sizes[name][0][0] == pytest.approx(want[key], rel=1e-5, nan_ok=True)
    for c in got.classes:
        assert c.ap[0] == pytest.approx(want[f"AP-{c.name}"], rel=1e-5, nan_ok=True)


@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_max_dets(task: str) -> None:
    data, results = random_set(7, images=3, categories=2, gts=20, dets=300)
    for most in (20, 300):
        want = evaluate_coco(data, results, max_dets=most)[task]["AP"]
        assert _analysed(data, results, task, most).ap[0] == pytest.approx(want, rel=1e-5)


def test_an_image_counted_twice_is_two_images() -> None:
    """A resample's weight is the same as copies of the image."""
    rng = np.random.default_rng(0)
    scores = np.sort(rng.random(40))[::-1]
    images, hits = rng.integers(0, 4, 40), rng.random((len(IOUS), 40)) < 0.5
    objects = np.array([12.0, 9, 20, 15], np.float32)
    once = Matches(scores, images, hits, np.zeros_like(hits), objects)
    weights = np.array([[2, 0, 1, 1]], np.float32)
    keep = np.concatenate([np.flatnonzero(images != 1), np.flatnonzero(images == 0)])
    keep = keep[np.argsort(-scores[keep], kind="stable")]
    twice = Matches(scores[keep], images[keep], hits[:, keep], np.zeros_like(hits[:, keep]), objects * [2, 0, 1, 1])
    want = average_precision(twice, np.ones((1, 4), np.float32))
    assert average_precision(once, weights) == pytest.approx(want, rel=1e-5)


def test_resamples_do_not_depend_on_how_many_are_taken_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is bounded by taking few resamples at a time where there are many detections."""
    rng = np.random.default_rng(0)
    hits = rng.random((len(IOUS), 40)) < 0.5
    objects = np.array([12.0, 9, 20, 15], np.float32)
    matches = Matches(np.sort(rng.random(40))[::-1], rng.integers(0, 4, 40), hits, np.zeros_like(hits), objects)
    weights = rng.integers(0, 3, (7, 4)).astype(np.float32)
    want = average_precision(matches, weights)
    monkeypatch.setattr(analysis, "_CELLS", 80)  # two at a time
    assert np.array_equal(average_precision(matches, weights), want, equal_nan=True)


def _entry(image: int, category: int, box: list[float], **more: Any) -> dict[str, Any]:
    return {"image_id": image, "category_id": category, "bbox": box, **more}


def _small_set() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    boxes = [[10.0 + 40 * k, 10.0, 20.0, 20.0] for k in range(6)]
    truth = [_entry(1, 1, boxes[0]), _entry(1, 2, boxes[1]), _entry(1, 1, boxes[2]), _entry(2, 1, boxes[0])]
    data = {
        "images": [{"id": i, "file_name": f"{i}.png", "height": 60, "width": 300} for i in (1, 2, 3)],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": [{"id": n, "area": 400.0, "iscrowd": 0, **a} for n, a in enumerate(truth, 1)],
    }
    found = [
        _entry(1, 1, boxes[0], score=0.9),
        _entry(1, 1, boxes[1], score=0.95),  # a dog taken for a cat
        _entry(2, 1, boxes[0], score=0.6),
        _entry(2, 1, boxes[3], score=0.85),  # nothing is labeled there
        _entry(3, 1, boxes[5], score=0.1),
    ]
    return data, found


def test_threshold_confusions_and_doubts() -> None:
    got = _analysed(*_small_set(), "bbox")
    cat, dog = got.classes
    # at 0.6: 2 hits of 4 detections and 3 objects
    assert (cat.threshold, cat.precision, cat.recall) == (0.6, 0.5, pytest.approx(2 / 3))
    assert cat.f1 == pytest.approx(2 * 2 / (4 + 3)) and math.isnan(dog.threshold)
    assert got.thresholds == {"cat": 0.6}
    assert got.confusion.tolist() == [[2, 0, 1], [1, 0, 0], [1, 0, 0]]
    assert [(d.kind, d.found, d.labeled, d.index) for d in got.doubts] == [
        ("class", "cat", "dog", 0), ("missing", "cat", "", 1)
    ]  # fmt: skip
    assert [(e.index, e.missed, e.false) for e in got.worst] == [(0, 1, 1), (1, 0, 1), (2, 0, 0)]
    assert math.isnan(got.ap[1])  # too few images for an interval
    assert got.calibration[:, 2].sum() == 5


def test_nothing_found_and_nothing_labeled() -> None:
    data, _ = _small_set()
    nothing = _analysed(data, [], "bbox")
    assert nothing.ap[0] == 0 and not nothing.thresholds and nothing.confusion[:, -1].tolist() == [3, 1, 0]
    empty = _analysed({**data, "annotations": []}, [], "bbox")
    assert math.isnan(empty.ap[0]) and not empty.confusion.any()


def test_interval_holds_the_value_and_narrows_with_images() -> None:
    data, results = random_set(1, images=40)
    low, high = (_analysed(data, results, "bbox").ap[k] for k in (1, 2))
    assert low < _analysed(data, results, "bbox").ap[0] < high
    # the same images four times: half the width
    images, annotations, many = [], [], []
    for k in range(4):
        images += [{**i, "id": i["id"] + 10_000 * k} for i in data["images"]]
        annotations += [
            {**a, "id": a["id"] + 10**6 * k, "image_id": a["image_id"] + 10_000 * k} for a in data["annotations"]
        ]
        many += [{**r, "image_id": r["image_id"] + 10_000 * k} for r in results]
    four = _analysed({**data, "images": images, "annotations": annotations}, many, "bbox").ap
    assert 0.3 < (four[2] - four[1]) / (high - low) < 0.8
