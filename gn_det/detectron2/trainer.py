"""Detectron2's default trainer, with the evaluator that it leaves open."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from detectron2.engine import DefaultTrainer
from detectron2.evaluation import COCOEvaluator

if TYPE_CHECKING:
    from detectron2.config import CfgNode


class Trainer(DefaultTrainer):
    """``DefaultTrainer`` that evaluates DATASETS.TEST with COCO AP, every TEST.EVAL_PERIOD and at the end.

    Plain ``DefaultTrainer`` trains the same, but has no evaluator of its own and skips evaluation.
    """

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> COCOEvaluator:
        """COCO AP of boxes, and of masks where the model has them; results go to OUTPUT_DIR/inference."""
        return COCOEvaluator(dataset_name, output_dir=os.path.join(cfg.OUTPUT_DIR, "inference"))
