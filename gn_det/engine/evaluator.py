"""COCO evaluation of a model on the test sets of a run, distributed over ranks, and the report of ``gn-det eval``."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from gn_det.checkpoint.io import read_checkpoint, save_checkpoint
from gn_det.checkpoint.meta import KEY, read_meta
from gn_det.data.coco import CocoDataset
from gn_det.data.image import ImageReader
from gn_det.data.loader import build_test_loader
from gn_det.data.sets import model_category_ids
from gn_det.engine import dist
from gn_det.engine.log import on_screen
from gn_det.engine.precision import inference_autocast
from gn_det.errors import ConfigError, TrainingError
from gn_det.evaluation.analysis import analyze
from gn_det.evaluation.coco_eval import evaluate_coco, load_ground_truth
from gn_det.evaluation.diagnose import Caps
from gn_det.evaluation.eval_page import as_html, write_csv
from gn_det.evaluation.ground_truth import GroundTruth
from gn_det.evaluation.inference import InferenceProgress, run_inference
from gn_det.evaluation.results import CocoResults, format_results
from gn_det.files import atomic_write
from gn_det.structures import Detections, Sample

logger = logging.getLogger(__name__)

#: A model as a function from samples to detections at original size.
Detector = Callable[[list[Sample]], list[Detections]]

_SAY_EVERY_SECONDS = 15.0


@dataclass
class EvalReport:
    """Analyzes the results of an evaluation on rank 0."""

    html: Path  # of the page; with several test sets, each name goes before the extension
    thresholds: dict[str, float] = field(default_factory=dict)  # score of best F1 by class name, for the last set

    def write(
        self,
        cfg: CfgNode,
        dataset: CocoDataset,
        truth: GroundTruth,
        results: Sequence[Mapping[str, Any]],
        class_names: Sequence[str],
        category_ids: Sequence[int],
        tasks: Sequence[str],
    ) -> None:
        """Write page and table of one test set."""
        caps = Caps.of(cfg).max_dets
        analyses = [analyze(truth, results, class_names, category_ids, task=t, max_dets=caps) for t in tasks]
        several = len(cfg.DATASETS.TEST) > 1 and not cfg.DATASETS.VAL_JSON
        page = self.html.with_name(f"{self.html.stem}-{dataset.name}{self.html.suffix}") if several else self.html
        reader, weights = ImageReader.of(cfg), str(cfg.MODEL.WEIGHTS)
        html = as_html(analyses, dataset, results, category_ids, class_names, reader=reader, weights=weights)
        atomic_write(page, html.encode("utf-8", "backslashreplace"))
        table = page.with_suffix(".csv")
        write_csv(table, analyses[-1])
        self.thresholds = analyses[-1].thresholds
        logger.info("Report: %s; table with one row per class: %s.", page, table)


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
        prefix = f"{dataset.name}/" if len(test_sets) > 1 else ""
        folder = os.path.join(cfg.OUTPUT_DIR, "inference", prefix)
        scores = _evaluate_one(cfg, model, dataset, class_names, folder, on_progress, report)
        flat |= {prefix + name: value for name, value in scores.items()}
    return flat


def _evaluate_one(
    cfg: CfgNode,
    model: Detector,
    dataset: CocoDataset,
    class_names: Sequence[str],
    folder: str,
    on_progress: Callable[[Any], None] | None,
    report: EvalReport | None,
) -> dict[str, float]:
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

    def score() -> dict[str, float]:
        merged, caps = CocoResults(image for part in parts for image in part.images), Caps.of(cfg)
        logger.info("%s: %d detections in %d images, %.1f s.", dataset.name, len(merged), len(dataset), seconds)
        truth = load_ground_truth(dataset)
        scores = evaluate_coco(
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
        return {f"{task}/{name}": float(value) for task, part in scores.items() for name, value in part.items()}

    return dist.on_first_rank(score)  # raises on all ranks, which would otherwise wait for the result


def verify_expected(cfg: CfgNode, results: Mapping[str, float]) -> None:
    """Raise TrainingError if a row ``[task, metric, value, tolerance]`` of ``TEST.EXPECTED_RESULTS`` does not hold."""
    for task, metric, expected, tolerance in cfg.TEST.EXPECTED_RESULTS:
        value = results.get(f"{task}/{metric}", float("nan"))
        if not abs(value - expected) <= tolerance:
            raise TrainingError(
                f"TEST.EXPECTED_RESULTS: {task}/{metric} is {value:.4f}, expected {expected} within {tolerance}"
            )


def store_thresholds(weights: str, thresholds: Mapping[str, float]) -> None:
    """Store the score of best F1 of each class (0.5 if undefined) in a checkpoint of gn_det, for prediction."""
    payload = dict(read_checkpoint(weights))
    meta = read_meta(payload, weights)
    if meta is None or not meta["class_names"]:
        raise ConfigError(f"--save-thresholds: {weights} stores no class names; give a checkpoint that gn_det trained")
    stored = [round(float(thresholds.get(name, 0.5)), 4) for name in meta["class_names"]]
    save_checkpoint(weights, {**payload, KEY: {**payload[KEY], "thresholds": stored}})
    logger.info("Stored thresholds in %s; gn-det predict uses them unless --threshold is given.", weights)
