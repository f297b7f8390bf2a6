"""Identity: a checkpoint of either engine, evaluated on the other, gives the same APs to the last digit.

The ground truth is made from what the calibrated model finds (boxes moved, some left out, some added), so AP lies well
between 0 and 100 without any training. Loader, model, results and scoring are each engine's own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("detectron2.config", reason="compares with an installed Detectron2")

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg as detectron2_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_test_loader
from detectron2.data.datasets import register_coco_instances
from detectron2.evaluation import COCOEvaluator, inference_on_dataset
from pycocotools import mask as coco_mask
from torch import nn

from gn_det.checkpoint.io import save_checkpoint
from gn_det.checkpoint.meta import build_meta
from gn_det.checkpoint.weights import load_weights
from gn_det.config import get_cfg
from gn_det.data.catalog import DatasetSource
from gn_det.data.coco import CocoDataset, load_coco
from gn_det.data.loader import build_test_loader
from gn_det.evaluation.coco_eval import evaluate_coco
from gn_det.evaluation.inference import run_inference
from gn_det.modeling import build_model
from tests.equality.pairs import make_pair
from tests.equality.table import FAMILIES
from tests.golden.d2_side import SIDES
from tests.golden.model_cases import NUM_CLASSES, configure, make_scene

pytestmark = pytest.mark.detectron2

INPUT = {"INPUT__MIN_SIZE_TEST": 96, "INPUT__MAX_SIZE_TEST": 140, "DATALOADER__NUM_WORKERS": 0}
IDS = list(range(1, NUM_CLASSES + 1))
NAMES = [f"class {i}" for i in IDS]
Scores = dict[str, dict[str, float]]


def write_dataset(folder: Path, results: list[dict[str, Any]]) -> CocoDataset:
    """Three images of odd sizes, with the given results as ground truth."""
    images = []
    for number, (height, width) in enumerate([(75, 99), (120, 80), (64, 64)], start=1):
        pixels = make_scene(30 + number, height, width, 0).image.transpose(1, 2, 0)[..., ::-1]
        Image.fromarray(np.ascontiguousarray(pixels)).save(folder / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "width": width, "height": height})
    rng = np.random.default_rng(0)
    annotations = []
    visible = [r for r in results if coco_mask.area(r["segmentation"]) > 0]
    for k, result in enumerate(r for i, r in enumerate(visible) if i % 4):
        x, y, w, h = result["bbox"]
        shift = rng.uniform(-0.1, 0.1, 2) * (w, h)
        box = [max(0.0, x + float(shift[0])), max(0.0, y + float(shift[1])), w, h]
        kept = {key: result[key] for key in ("image_id", "category_id", "segmentation")}
        annotations.append({**kept, "id": k + 1, "bbox": box, "area": w * h * 0.8, "iscrowd": 0})
    categories = [{"id": i, "name": name} for i, name in zip(IDS, NAMES)]
    content = {"info": {}, "images": images, "annotations": annotations, "categories": categories}
    (folder / "val.json").write_text(json.dumps(content))
    source = DatasetSource("val", str(folder / "val.json"), str(folder))
    return load_coco(source, max_bad=0, need_annotations=False)


def embedded_scores(model: nn.Module, cfg: Any, dataset: CocoDataset) -> tuple[Scores, list[dict[str, Any]]]:
    results = run_inference(model, build_test_loader(cfg, dataset), IDS)
    return score(dataset, results), results


def score(dataset: CocoDataset, results: list[dict[str, Any]]) -> Scores:
    return evaluate_coco(dataset.json_file, results, NAMES, IDS, iou_types=("bbox", "segm"))


def detectron2_scores(model: nn.Module, cfg: Any, dataset: CocoDataset, name: str, output: Path) -> Scores:
    register_coco_instances(name, {}, dataset.json_file, dataset.image_root)
    try:
        loader = build_detection_test_loader(cfg, name)
        evaluator = COCOEvaluator(name, distributed=False, output_dir=str(output))
        return inference_on_dataset(model, loader, evaluator)
    finally:
        DatasetCatalog.pop(name)
        MetadataCatalog.pop(name)


def largest(a: Scores, b: Scores) -> float:
    assert {task: list(metrics) for task, metrics in a.items()} == {task: list(metrics) for task, metrics in b.items()}
    pairs = [(value, b[task][key]) for task, metrics in a.items() for key, value in metrics.items()]
    return max(abs(x - y) for x, y in pairs if not (math.isnan(x) and math.isnan(y)))


@pytest.mark.parametrize("case", FAMILIES)
def test_same_ap_each_way(case: str, tmp_path: Path, measured: Callable[[str, str, str, float], None]) -> None:
    cfg = configure(get_cfg(), case, **INPUT)
    ours, _ = make_pair(case)
    empty = write_dataset(tmp_path, [])
    _, found = embedded_scores(ours, cfg, empty)
    dataset = write_dataset(tmp_path, found)
    expected = score(dataset, found)
    assert 5 < expected["bbox"]["AP"] < 95 and 5 < expected["segm"]["AP"] < 95
    meta = build_meta(cfg, NAMES, IDS, iteration=3)
    save_checkpoint(tmp_path / "ours.pth", {"model": ours.state_dict(), "iteration": 3, "gn_det": meta})
    for side, build in SIDES.items():
        theirs = build(case)
        DetectionCheckpointer(theirs).load(str(tmp_path / "ours.pth"))
        there = detectron2_scores(
            theirs, configure(detectron2_cfg(), case, **INPUT), dataset, f"ap_{case}_{side}", tmp_path / side
        )
        DetectionCheckpointer(theirs, str(tmp_path)).save(f"theirs_{side}", iteration=4)
        torch.manual_seed(9)
        back = build_model(cfg)
        load_weights(back, tmp_path / f"theirs_{side}.pth", cfg, require_all=True)
        here, _ = embedded_scores(back, cfg, dataset)
        off = max(largest(there, expected), largest(here, expected))
        measured(case, "ap", side, off)
        assert off == 0.0
