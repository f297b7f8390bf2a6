"""The same predictions give Detectron2's COCOEvaluator's result, key by key and to the last digit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2.config", reason="compares with an installed Detectron2")
pytestmark = pytest.mark.detectron2

from detectron2.data import MetadataCatalog  # noqa: E402
from detectron2.evaluation import COCOEvaluator, print_csv_format  # noqa: E402
from detectron2.structures import Boxes, Instances  # noqa: E402

from gn_det.evaluation.coco_eval import evaluate_coco  # noqa: E402
from gn_det.evaluation.inference import run_inference  # noqa: E402
from gn_det.evaluation.results import format_results  # noqa: E402
from gn_det.structures import Detections  # noqa: E402
from tests.evaluation.coco_oracle import ellipse, random_set  # noqa: E402


def detections(data: dict[str, Any], seed: int, per_image: int, masks: bool) -> list[Detections]:
    """Jittered ground truth and noise, one entry per image."""
    rng = np.random.default_rng(seed)
    ids = sorted(c["id"] for c in data["categories"])
    out = []
    for image in data["images"]:
        size = (image["height"], image["width"])
        boxes, classes = [], []
        for ann in (a for a in data["annotations"] if a["image_id"] == image["id"]):
            boxes.append([max(v + rng.normal(0, 2), 1.0) for v in ann["bbox"]])
            classes.append(ids.index(ann["category_id"]))
        while len(boxes) < per_image:
            boxes.append([rng.random() * 60, rng.random() * 60, 5 + rng.random() * 90, 5 + rng.random() * 90])
            classes.append(int(rng.integers(len(ids))))
        xywh = np.array(boxes)
        bitmaps = np.stack([ellipse(*size, list(b)) for b in xywh]) if masks else None
        xyxy = torch.tensor(np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1), dtype=torch.float32)
        scores = torch.tensor(rng.random(len(boxes)).round(2), dtype=torch.float32)
        found = None if bitmaps is None else torch.from_numpy(bitmaps)
        out.append(Detections(size, xyxy, scores, torch.tensor(classes), found))
    return out


def theirs(
    name: str, data: dict[str, Any], dets: list[Detections], tmp_path: Path, max_dets: int | None
) -> dict[str, Any]:
    ids = sorted(c["id"] for c in data["categories"])
    (tmp_path / "val.json").write_text(json.dumps({"info": {}, **data}))
    names = {c["id"]: c["name"] for c in data["categories"]}
    MetadataCatalog.get(name).set(
        json_file=str(tmp_path / "val.json"),
        thing_classes=[names[i] for i in ids],
        thing_dataset_id_to_contiguous_id={i: k for k, i in enumerate(ids)},
    )
    evaluator = COCOEvaluator(name, distributed=False, output_dir=str(tmp_path / "theirs"), max_dets_per_image=max_dets)
    evaluator.reset()
    for image, det in zip(data["images"], dets):
        instances = Instances(det.image_size, pred_boxes=Boxes(det.boxes), scores=det.scores, pred_classes=det.classes)
        if det.masks is not None:
            instances.pred_masks = det.masks
        evaluator.process([{"image_id": image["id"]}], [{"instances": instances}])
    return dict(evaluator.evaluate())


@pytest.mark.parametrize(
    ("per_image", "masks", "max_dets", "categories"),
    [(15, True, None, 5), (15, False, None, 5), (130, True, None, 2), (130, True, 120, 2), (9, True, None, 2)],
)
def test_same_result_and_same_file(
    per_image: int, masks: bool, max_dets: int | None, categories: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    data, _ = random_set(per_image, images=8, categories=categories)
    dets = detections(data, per_image, per_image, masks)
    expected = theirs(request.node.name, data, dets, tmp_path, max_dets)
    ids = sorted(c["id"] for c in data["categories"])
    names = [f"class {i}" for i in ids]
    loader = [[{"image_id": image["id"]}] for image in data["images"]]
    outputs = iter(dets)
    results = run_inference(lambda batch: [next(outputs) for _ in batch], loader, ids)  # type: ignore[arg-type]
    ours = evaluate_coco(tmp_path / "val.json", results, names, ids, output_dir=tmp_path / "ours", max_dets=max_dets)
    assert list(ours) == list(expected) == (["bbox", "segm"] if masks else ["bbox"])
    for task, metrics in expected.items():
        assert list(ours[task]) == list(metrics)
        for key, value in metrics.items():
            if max_dets is None:
                assert ours[task][key] == value or (math.isnan(value) and math.isnan(ours[task][key])), (task, key)
            else:  # there Detectron2 falls back to pycocotools, which adds 2.2e-16 to tp + fp
                assert ours[task][key] == pytest.approx(value, rel=1e-14, nan_ok=True)
    files = [json.loads((tmp_path / who / "coco_instances_results.json").read_text()) for who in ("ours", "theirs")]
    assert files[0] == files[1]


def test_same_tables_and_copypaste_lines(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Every line that Detectron2 logs of a result stands in ours."""
    data, _ = random_set(3, images=6)
    dets = detections(data, 3, 12, True)
    with caplog.at_level("INFO", logger="detectron2"):
        expected = theirs("gn_det_tables", data, dets, tmp_path, None)
        print_csv_format(expected)
    logged = [line for r in caplog.records for line in r.getMessage().splitlines()]
    wanted = [line for line in logged if line.startswith(("|", "copypaste"))]
    text = format_results(expected).splitlines()
    assert len(wanted) > 15 and [line for line in text if line.startswith(("|", "copypaste"))] == wanted


def test_no_predictions(tmp_path: Path) -> None:
    data, _ = random_set(0)
    nothing = Detections((9, 9), torch.zeros(0, 4), torch.zeros(0), torch.zeros(0, dtype=torch.int64))
    expected = theirs("gn_det_none", data, [nothing] * len(data["images"]), tmp_path, None)
    ours = evaluate_coco(data, [], iou_types=["bbox"])
    assert list(ours["bbox"]) == list(expected["bbox"])
    assert all(math.isnan(v) for v in (*ours["bbox"].values(), *expected["bbox"].values()))
