"""One run of a comparison, through the commands that a user would call by hand."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from fvcore.common.config import CfgNode

from gn_det.compare import measure
from gn_det.compare.build import build_empty
from gn_det.compare.plan import Job
from gn_det.config import parse_config
from gn_det.engine import commands
from gn_det.engine.interface import Engine
from gn_det.engine.output import FINAL
from gn_det.errors import TrainingError

logger = logging.getLogger(__name__)


@dataclass
class Outcome:
    """What a run gave; see :class:`gn_det.compare.store.Record` for the parts."""

    metrics: dict[str, float | None]
    curve: list[dict[str, float]] = field(default_factory=list)
    cost: dict[str, float | None] = field(default_factory=dict)
    size: dict[str, float | None] = field(default_factory=dict)
    weights: Path | None = None
    config: str = ""


class Executor(Protocol):
    """Runs a job in a folder, going on from a checkpoint where one is there."""

    def __call__(self, job: Job, folder: Path, weights: str) -> Outcome: ...


@dataclass(frozen=True)
class Trainer:
    """The executor: detection rows on an engine, pre-training rows by gn_det.classification.

    Attributes:
        engine: of the detection rows.
        num_gpus: processes of each run.
        measuring: this process writes results; other ranks of torchrun only train.
    """

    engine: Engine
    num_gpus: int = 1
    measuring: bool = True

    def __call__(self, job: Job, folder: Path, weights: str) -> Outcome:
        """Run ``job`` in ``folder``.

        Args:
            job: from the plan.
            folder: of the run; what an interrupted one left there is gone on from.
            weights: initial weights of a detection row that starts from a pre-training row, else "".

        Raises:
            UserError: it cannot be run.
        """
        measure.reset_peak_memory()
        if job.cfg is None:
            return self._pretrain(job.settings or {}, folder)
        cfg = job.cfg.clone()
        cfg.defrost()
        cfg.OUTPUT_DIR = str(folder)
        if weights:
            cfg.MODEL.WEIGHTS = weights
        results = commands.train(self.engine, cfg, resume=True, num_gpus=self.num_gpus)
        if not self.measuring:
            return Outcome({})
        return self._measured(cfg, folder, results)

    def _pretrain(self, values: Mapping[str, Any], folder: Path) -> Outcome:
        from gn_det.classification import Settings, pretrain

        settings = Settings.from_dict({**values, "output": str(folder)})
        summary = pretrain(settings, resume=True, num_gpus=self.num_gpus)
        if not self.measuring:
            return Outcome({})
        curve = [
            {"x": float(p["epoch"]), "loss": float(p["train_loss"]), "top1_error": float(p["val_error"])}
            for p in summary["curve"]
        ]
        last = summary["curve"][-1] if summary["curve"] else {}
        cost = {
            "s_per_iter": summary.get("seconds_per_iteration"),
            "memory_mb": summary.get("peak_memory_mb"),
            "s_per_image": summary.get("inference_seconds_per_image"),
        }
        metrics = {"top1_error": summary["top1_error"], "train_error": last.get("train_error")}
        return Outcome(
            metrics,
            curve,
            cost,
            {"parameters": summary.get("parameters")},
            folder / FINAL,
            json.dumps(settings.to_dict(), indent=1),
        )

    def _measured(self, cfg: CfgNode, folder: Path, results: Mapping[str, float]) -> Outcome:
        from gn_det.data.sets import load_first_test_set
        from gn_det.engine.predictor import load_predictor

        text = (folder / "config.yaml").read_text(encoding="utf-8")
        resolved = parse_config(text, str(folder / "config.yaml"))
        model = build_empty(self.engine, resolved)
        cost = {
            "s_per_iter": measure.seconds_per_iteration(folder),
            "memory_mb": measure.logged_memory_mb(folder),
            "s_per_image": None,
        }
        weights = folder / FINAL
        predictor = load_predictor(weights, device=cfg.MODEL.DEVICE, engine=self.engine)
        held_out = load_first_test_set(cfg)
        metrics = measure.detection_metrics(results)
        if metrics.get("box_ap") is None:
            if not held_out.object_counts.any():
                raise TrainingError(f"data: {held_out.json_file} has no object, so there is no AP to compare")
            # a model that detects nothing has no precision; as a result of a comparison that is zero
            tasks = ("box", "mask") if cfg.MODEL.MASK_ON else ("box",)
            metrics = {f"{task}_ap{limit}": 0.0 for task in tasks for limit in ("", "50", "75")}
        images = [Path(r["file_name"]) for r in held_out.records[: measure.UNTIMED + measure.TIMED]]
        cost["s_per_image"] = measure.seconds_per_image(predictor.detect, images)
        return Outcome(
            metrics,
            measure.detection_curve(folder),
            cost,
            {"parameters": measure.parameters(model)},
            weights,
            text,
        )
