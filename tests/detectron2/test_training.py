"""Detectron2's own trainer, predictor and checkpointer work with the plugin, and the engines share checkpoints."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("detectron2.config", reason="needs an installed Detectron2")

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.engine import DefaultPredictor, DefaultTrainer
from detectron2.modeling import build_model

from gn_det.checkpoint.io import save_checkpoint
from gn_det.config import get_cfg as embedded_cfg
from gn_det.data.image import ImageReader
from gn_det.data.shapes import make_shapes
from gn_det.detectron2 import Trainer
from gn_det.modeling import build_model as build_embedded
from tests.detectron2.cases import build_plugin, gn_modules, plugin_cfg
from tests.golden.d2_side import detectron2_detections
from tests.golden.model_cases import BATCHES, calibration_batch, configure, fill_weights, flatten, measure_calibration

pytestmark = pytest.mark.detectron2

SHORT = {
    "INPUT.MASK_FORMAT": "bitmask",
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.MAX_ITER": 2,
    "SOLVER.CHECKPOINT_PERIOD": 2,
    "TEST.EVAL_PERIOD": 2,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.0,
    "TEST.DETECTIONS_PER_IMAGE": 3,
    "SEED": 1,
}


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("shapes")
    sources = (make_shapes(root, "train", 6), make_shapes(root, "val", 3))
    return [f"{s.json_file}@{s.image_root}" for s in sources]


def short_cfg(output: Path, sets: list[str], **changes: Any) -> CfgNode:
    values = {**SHORT, "OUTPUT_DIR": str(output), "DATASETS.TRAIN": (sets[0],), "DATASETS.TEST": (sets[1],)}
    values |= {k.replace("__", "."): v for k, v in changes.items()}
    return plugin_cfg("quickstart.yaml", *[part for item in values.items() for part in item])


def test_trains_evaluates_predicts_and_resumes(tmp_path: Path, sets: list[str]) -> None:
    cfg = short_cfg(tmp_path, sets)
    trainer = Trainer(cfg)
    assert {"GNFPN", "GNResNet", "GNFastRCNNConvFCHead", "GNMaskRCNNConvUpsampleHead"} == gn_modules(trainer.model)
    trainer.resume_or_load()
    trainer.train()
    results = trainer._last_eval_results
    assert list(results) == ["bbox", "segm"]
    assert {"AP", "AP50", "AP-circle", "AP-ring"} <= set(results["segm"])
    lines = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert {"total_loss", "loss_mask", "lr", "segm/AP"} <= {key for line in lines for key in line}

    image = ImageReader().read(next(Path(sets[1].split("@")[1]).glob("*.jpg")))
    cfg.MODEL.WEIGHTS = str(tmp_path / "model_final.pth")
    instances = DefaultPredictor(cfg)(image)["instances"]
    assert instances.image_size == image.shape[:2] and len(instances) > 0
    assert MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).thing_classes

    longer = short_cfg(tmp_path, sets, SOLVER__MAX_ITER=3, TEST__EVAL_PERIOD=0)
    again = DefaultTrainer(longer)  # plain: it trains the same, and skips evaluation
    again.resume_or_load(resume=True)
    assert again.start_iter == 2
    again.train()
    assert again.iter == again.max_iter == 3


def test_the_readmes_lines(tmp_path: Path, sets: list[str]) -> None:
    """A fresh interpreter: one import, add_gn_config, Detectron2's own trainer."""
    program = f"""
import gn_det, torch
torch.set_num_threads(1)
import gn_det.detectron2
from detectron2.config import get_cfg
from detectron2.engine import DefaultTrainer

cfg = get_cfg()
gn_det.detectron2.add_gn_config(cfg)
cfg.merge_from_file(gn_det.config_file("quickstart.yaml"))
cfg.merge_from_list({[p for item in SHORT.items() for p in item]!r})
cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = {(sets[0],)!r}, ()
cfg.OUTPUT_DIR = {str(tmp_path)!r}
trainer = DefaultTrainer(cfg)
trainer.resume_or_load()
trainer.train()
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "model_final.pth").is_file()


def test_checkpoints_of_the_embedded_engine(tmp_path: Path) -> None:
    """Written by gn_det, read by Detectron2's checkpointer without a remark, and back: the same detections."""
    embedded = build_embedded(configure(embedded_cfg(), "gn_fpn"))
    fill_weights(embedded)
    measure_calibration(embedded, calibration_batch())
    save_checkpoint(tmp_path / "model.pth", {"model": embedded.state_dict(), "iteration": 7})
    model = build_plugin("gn_fpn")
    rest = DetectionCheckpointer(model).load(str(tmp_path / "model.pth"))
    assert rest["iteration"] == 7
    scenes = BATCHES["two_sizes"]()
    _, instances = detectron2_detections(model, scenes)
    for p, d in zip(instances, embedded.eval().detect(flatten(scenes)), strict=True):
        assert len(p) and torch.equal(p.pred_boxes.tensor, d.boxes) and torch.equal(p.scores, d.scores)
    DetectionCheckpointer(model, str(tmp_path)).save("back")
    back = torch.load(tmp_path / "back.pth", weights_only=True)["model"]
    assert list(back) == list(embedded.state_dict())
    embedded.load_state_dict(back, strict=True)


def test_the_generated_sets_are_registered() -> None:
    cfg = plugin_cfg("quickstart.yaml")
    assert len(MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).thing_classes) == 5
    assert build_model(cfg).roi_heads.num_classes == 5
