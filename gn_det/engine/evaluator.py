"""COCO evaluation of a model on the test sets of a run, distributed over ranks."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fvcore.common.config import CfgNode

from gn_det.data.coco import CocoDataset
from gn_det.data.loader import build_test_loader
from gn_det.data.sets import model_category_ids
from gn_det.engine import dist
from gn_det.engine.eval_report import EvalReport
from gn_det.engine.log import on_screen
from gn_det.engine.precision import inference_autocast
from gn_det.errors import TrainingError
from gn_det.evaluation.coco_eval import evaluate_coco, load_ground_truth
from gn_det.evaluation.diagnose import Caps
from gn_det.evaluation.inference import InferenceProgress, run_inference
from gn_det.evaluation.results import CocoResults, format_results
from gn_det.structures import Detections, Sample

logger = logging.getLogger(__name__)

#: A model as a function from samples to detections at original size.
Detector = Callable[[list[Sample]], list[Detections]]
Scores = Mapping[str, Mapping[str, float]]

_SAY_EVERY_SECONDS = 15.0


def evaluate_model(
    cfg: CfgNode,
    model: Detector,
    test_sets: Sequence[CocoDataset],
    class_names: Sequence[str],
    on_progress: Callable[[Any], None] | None = None,
    report: EvalReport | None = None,
) -> dict[str, float]:
    """Return flat APs of ``model`` on all test sets: ``{"bbox/AP": ..., "segm/AP50": ..., "bbox/AP-<class>": ...}``.

    With several sets, names are ``<set>/bbox/AP``. All ranks must call this, and get the same dict, or a DataError.
    """
    flat: dict[str, float] = {}
    for dataset in test_sets:
        name = dataset.name if len(test_sets) > 1 else ""
        folder = os.path.join(cfg.OUTPUT_DIR, "inference", name)
        scores = _evaluate_one(cfg, model, dataset, class_names, folder, on_progress, report)
        for task, part in scores.items():
            flat |= {"/".join(filter(None, (name, task, metric))): float(value) for metric, value in part.items()}
    return flat


def _evaluate_one(
    cfg: CfgNode,
    model: Detector,
    dataset: CocoDataset,
    class_names: Sequence[str],
    folder: str,
    on_progress: Callable[[Any], None] | None,
    report: EvalReport | None,
) -> Scores:
    ids = model_category_ids(dataset, class_names)
    loader = build_test_loader(cfg, dataset, dist.rank(), dist.world_size())
    start = said = time.perf_counter()

    def progress(p: InferenceProgress) -> None:
        nonlocal said
        if time.perf_counter() - said > _SAY_EVERY_SECONDS:
            said = time.perf_counter()
            eta = "" if p.eta_seconds is None else f", {p.eta_seconds:.0f} s left"
            logger.info("evaluating %s: %d/%s images, %.3f s each%s", dataset.name, p.images, p.total,
                        p.seconds_per_image, eta)  # fmt: skip
        if on_progress is not None:
            on_progress(p)

    with inference_autocast(cfg, dist.resolve_device(cfg.MODEL.DEVICE)):
        results = run_inference(model, loader, ids, on_progress=progress, total=loader.num_images)
    seconds = time.perf_counter() - start
    parts: list[CocoResults] = dist.gather_objects(results)

    def score() -> Scores:
        merged, caps = CocoResults(image for part in parts for image in part.images), Caps.of(cfg)
        logger.info("%s: %d detections in %d images, %.1f s.", dataset.name, len(merged), len(dataset), seconds)
        truth = load_ground_truth(dataset)
        scores: Scores = evaluate_coco(
            truth,
            merged,
            class_names,
            ids,
            iou_types=("bbox", "segm") if cfg.MODEL.MASK_ON else ("bbox",),
            output_dir=folder,
            max_dets=caps.max_dets,
            detections_per_image=caps.detections,
            proposals=caps.proposals,
        )
        if scores:
            text = format_results(scores)
            logger.info(text, extra=on_screen(text.partition("\ncopypaste:")[0]))
            if report is not None:
                report.write(cfg, dataset, truth, merged, class_names, ids, list(scores))
        return {task: dict(metrics) for task, metrics in scores.items()}

    return dist.on_first_rank(score)  # raises on all ranks, which would otherwise wait for the result


def verify_expected(cfg: CfgNode, results: Mapping[str, float]) -> None:
    """Raise TrainingError if a row ``[task, metric, value, tolerance]`` of ``TEST.EXPECTED_RESULTS`` does not hold."""
    for task, metric, expected, tolerance in cfg.TEST.EXPECTED_RESULTS:
        value = results.get(f"{task}/{metric}", float("nan"))
        if not abs(value - expected) <= tolerance:
            raise TrainingError(
                f"TEST.EXPECTED_RESULTS: {task}/{metric} is {value:.4f}, expected {expected} within {tolerance}"
            )
