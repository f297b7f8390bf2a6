"""Outputs of ``gn-det eval`` besides the APs: a page, a table of classes, and thresholds in the checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from gn_det.checkpoint.io import read_checkpoint, save_checkpoint
from gn_det.checkpoint.meta import KEY, read_meta
from gn_det.data.coco import CocoDataset
from gn_det.data.image import ImageReader
from gn_det.errors import ConfigError
from gn_det.evaluation.analysis import analyze
from gn_det.evaluation.diagnose import Caps
from gn_det.evaluation.eval_page import as_html, write_csv
from gn_det.evaluation.ground_truth import GroundTruth
from gn_det.files import atomic_write

logger = logging.getLogger(__name__)


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


def save_thresholds(weights: str, thresholds: Mapping[str, float]) -> None:
    """Store the score of best F1 of each class (0.5 if undefined) in a checkpoint of gn_det, for prediction."""
    payload = dict(read_checkpoint(weights))
    meta = read_meta(payload, weights)
    if meta is None or not meta["class_names"]:
        raise ConfigError(f"--save-thresholds: {weights} stores no class names; give a checkpoint that gn_det trained")
    stored = [round(float(thresholds.get(name, 0.5)), 4) for name in meta["class_names"]]
    save_checkpoint(weights, {**payload, KEY: {**payload[KEY], "thresholds": stored}})
    logger.info("Stored thresholds in %s; gn-det predict uses them unless --threshold is given.", weights)
