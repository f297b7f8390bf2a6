"""``gn_det.detectron2.Trainer`` from Python: the extras of ``gn-det train``, and Detectron2's ways to change it."""

from __future__ import annotations

import logging
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

pytest.importorskip("detectron2.config", reason="needs an installed Detectron2")

from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_train_loader
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import DefaultTrainer, HookBase
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import Instances

from gn_det.cli import main
from gn_det.detectron2 import Trainer, scale_to_machine
from gn_det.detectron2.conversion import MixedMasks
from gn_det.errors import ConfigError, TrainingError
from tests.detectron2.cases import TINY, lines, own_data, plugin_cfg, state, tiny

pytestmark = pytest.mark.detectron2


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return own_data(tmp_path_factory.mktemp("shapes"))


def tiny_cfg(data: list[str], output: Path, *more: Any) -> CfgNode:
    sets = ["DATASETS.TRAIN", (f"{data[1]}@{data[3]}",), "DATASETS.TEST", (f"{data[5]}@{data[7]}",)]
    cfg = plugin_cfg("quickstart.yaml", *sets, "OUTPUT_DIR", str(output))
    cfg.merge_from_list(TINY)
    cfg.merge_from_list(list(more))
    return cfg


def test_python_and_command_line_give_the_same_run(
    data: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Four iterations on four micro-batches each: weights, metrics and the results that are returned, to the bit."""
    keys = ["SOLVER.MAX_ITER", "4", "TEST.EVAL_PERIOD", "2", "SOLVER.ACCUMULATE", "2", "SOLVER.IMS_PER_BATCH", "4"]
    assert main(tiny(data, tmp_path / "cli", *keys)) == 0
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="gn_det"):
        trainer = Trainer(tiny_cfg(data, tmp_path / "python", *keys))
        trainer.resume_or_load(resume=False)
        results = trainer.train()
    for text in ("Norm layers", "Optimizer groups", "is the best so far", "Training from scratch"):
        assert text in caplog.text, text
    assert "does not read this key" not in caplog.text
    a, b = (state(tmp_path / f / "model_final.pth") for f in ("cli", "python"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    timing = {"time", "data_time", "eta_seconds"}
    ours, theirs = (
        [{k: v for k, v in e.items() if k not in timing} for e in lines(tmp_path / f)] for f in ("cli", "python")
    )
    assert ours == theirs
    assert results["segm"]["AP"] == ours[-1]["segm/AP"] == trainer._last_eval_results["segm"]["AP"]
    assert (tmp_path / "python" / "model_best.pth").is_file() and trainer.iter == trainer.max_iter == 4

    again = Trainer(tiny_cfg(data, tmp_path / "python", *keys, "SOLVER.MAX_ITER", "5"))
    again.resume_or_load(resume=True)
    assert again.start_iter == 4
    again.train()
    assert again.iter == 5 and [e["iteration"] for e in lines(tmp_path / "python")][-1] == 5


def test_pictures_are_detectron2s_own(data: list[str], tmp_path: Path) -> None:
    """VIS_PERIOD on every way to train: files of iterations 0 and 2, the same weights, nothing left in the storage."""
    keys = ["SOLVER.MAX_ITER", "3", "TEST.EVAL_PERIOD", "0"]
    for folder, engine, period in (("plain", "detectron2", "0"), ("d2", "detectron2", "2"), ("own", "embedded", "2")):
        assert main(tiny(data, tmp_path / folder, *keys, "VIS_PERIOD", period, engine=engine)) == 0
    trainer = Trainer(tiny_cfg(data, tmp_path / "python", *keys, "VIS_PERIOD", 2))
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert trainer.storage._vis_data == []
    plain, *others = (state(tmp_path / f / "model_final.pth") for f in ("plain", "d2", "own", "python"))
    assert all(torch.equal(plain[k], other[k]) for k in plain for other in others)
    assert not (tmp_path / "plain" / "visualize").exists()
    for folder in ("d2", "own", "python"):
        files = sorted((tmp_path / folder / "visualize").iterdir())
        assert [f.name for f in files] == ["iter_0000000.jpg", "iter_0000002.jpg"]
        assert all(Image.open(file).width > 1.5 * Image.open(file).height for file in files)  # two images side by side


def test_optimizer_frozen_parts_and_rates_are_the_same_everywhere(data: list[str], tmp_path: Path) -> None:
    """AdamW, a slower and recomputed backbone, frozen parts, class weights: equal weights everywhere, to the bit."""
    start = tmp_path / "start"
    assert main(tiny(data, start, "SOLVER.MAX_ITER", "1", engine="embedded")) == 0
    keys = ["SOLVER.OPTIMIZER", "ADAMW", "SOLVER.BASE_LR", "0.001", "SOLVER.BACKBONE_LR_FACTOR", "0.1"]
    keys += ["MODEL.FREEZE", "('proposal_generator', 'backbone.bottom_up.res3')", "SOLVER.MAX_ITER", "3"]
    keys += ["MODEL.ROI_BOX_HEAD.CLASS_WEIGHTS", "[['ring', 3.0], ['background', 0.5]]"]
    keys += ["MODEL.BACKBONE.RECOMPUTE", "True"]
    keys += ["SOLVER.CLIP_GRADIENTS.ENABLED", "True", "MODEL.WEIGHTS", str(start / "model_final.pth")]
    for engine in ("embedded", "detectron2"):
        assert main(tiny(data, tmp_path / engine, *keys, engine=engine)) == 0
    trainer = Trainer(tiny_cfg(data, tmp_path / "python", *keys))
    trainer.resume_or_load(resume=False)
    trainer.train()
    before, *after = (state(tmp_path / f / "model_final.pth") for f in ("start", "embedded", "detectron2", "python"))
    for name, value in before.items():
        frozen = name.startswith(("proposal_generator", "backbone.bottom_up.res3"))
        assert torch.equal(value, after[0][name]) == frozen, name
        assert all(torch.equal(a[name], after[0][name]) for a in after[1:]), name
    with pytest.raises(ConfigError, match=r"SOLVER.AUTO_BATCH True is not implemented by gn_det.detectron2.Trainer"):
        Trainer(tiny_cfg(data, tmp_path / "auto", "SOLVER.AUTO_BATCH", True))
    with pytest.raises(ConfigError, match="CLASS_WEIGHTS: there is no class 'sell'"):
        Trainer(tiny_cfg(data, tmp_path / "sell", "MODEL.ROI_BOX_HEAD.CLASS_WEIGHTS", "[['sell', 3.0]]"))


@pytest.mark.parametrize("trainer_class", [DefaultTrainer, Trainer])
def test_what_is_set_in_python_is_literal(trainer_class: type[DefaultTrainer], data: list[str], tmp_path: Path) -> None:
    """300 iterations of 2 images at lr 0.00025, on a config that was written for 16 images on 8 GPUs."""
    cfg = plugin_cfg("gn_fpn.yaml")
    sets = ["DATASETS.TRAIN", (f"{data[1]}@{data[3]}",), "DATASETS.TEST", ()]
    small = [*TINY, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.RESNETS.WIDTH_PER_GROUP", 32, "MODEL.WEIGHTS", ""]
    cfg.merge_from_list([*sets, *small, "OUTPUT_DIR", str(tmp_path), "INPUT.MASK_FORMAT", "bitmask"])
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.SOLVER.BASE_LR = 0.00025
    cfg.SOLVER.MAX_ITER = 300
    trainer = trainer_class(cfg)
    solver = trainer.cfg.SOLVER
    assert (solver.IMS_PER_BATCH, solver.BASE_LR, solver.MAX_ITER, trainer.max_iter) == (2, 0.00025, 300, 300)
    assert {group["initial_lr"] for group in trainer._trainer.optimizer.param_groups} == {0.00025}
    assert len(next(iter(trainer._trainer.data_loader))) == 2


def test_scaling_is_one_explicit_call(caplog: pytest.LogCaptureFixture) -> None:
    """The same numbers as on the command line (README); a second call changes nothing; 8 GPUs change nothing."""
    from gn_det.config import load_config
    from gn_det.engine.schedule import scale_schedule

    cfg = plugin_cfg("gn_fpn.yaml")
    assert scale_to_machine(cfg, 8) == [] and (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR) == (16, 0.02)
    cfg = plugin_cfg("gn_fpn.yaml", "TEST.EVAL_PERIOD", 10000)
    cfg.freeze()
    with caplog.at_level(logging.INFO, logger="gn_det"):
        (sentence,) = scale_to_machine(cfg)
    assert "batch 16 -> 2, learning rate scaled linearly 0.02 -> 0.0025, 180000 -> 1440000" in sentence
    assert sentence in caplog.text and cfg.is_frozen()
    assert scale_to_machine(cfg) == []
    there = scale_schedule(load_config("gn_fpn.yaml"), 1, 0)[0]
    keys = (
        "IMS_PER_BATCH",
        "BASE_LR",
        "MAX_ITER",
        "STEPS",
        "WARMUP_ITERS",
        "CHECKPOINT_PERIOD",
        "REFERENCE_WORLD_SIZE",
    )
    assert [cfg.SOLVER[k] for k in keys] == [there.SOLVER[k] for k in keys]
    assert cfg.TEST.EVAL_PERIOD == there.TEST.EVAL_PERIOD == 80000
    with pytest.raises(ConfigError, match=r"IMS_PER_BATCH 2 is not a multiple of SOLVER.REFERENCE_WORLD_SIZE 8"):
        scale_to_machine(plugin_cfg("gn_fpn.yaml", "SOLVER.IMS_PER_BATCH", 2))
    for gpus, written_for in ((0, 8), (1, 0), (1, -8)):
        with pytest.raises(ConfigError, match="must be at least 1"):
            scale_to_machine(plugin_cfg("gn_fpn.yaml", "SOLVER.REFERENCE_WORLD_SIZE", 0), gpus, written_for=written_for)


def test_sentences_about_norms_and_short_schedules(
    data: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """What gn-det train says, Trainer says: GN in a part only, from scratch too short, random layers frozen."""
    own = ["DATASETS.TRAIN_JSON", data[1], "DATASETS.TRAIN_IMAGES", data[3], "SOLVER.MAX_ITER", "1"]
    with caplog.at_level(logging.INFO, logger="gn_det"):
        trainer = Trainer(tiny_cfg(data, tmp_path / "a", *own, "MODEL.FPN.NORM", ""))
        trainer.resume_or_load(resume=False)
    assert "Only part of the model has GN (fpn: none)" in caplog.text
    assert "MODEL.WEIGHTS is empty and the run has" in caplog.text and "published runs from scratch" in caplog.text
    with pytest.raises(ConfigError, match=r"MODEL.BACKBONE.FREEZE_AT would freeze layers at random"):
        Trainer(tiny_cfg(data, tmp_path / "b", *own, "MODEL.BACKBONE.FREEZE_AT", 2)).resume_or_load(resume=False)


def test_an_earlier_run_is_not_overwritten(data: list[str], tmp_path: Path) -> None:
    (tmp_path / "model_final.pth").write_bytes(b"x")
    trainer = Trainer(tiny_cfg(data, tmp_path, "SOLVER.MAX_ITER", "1"))
    for start in (lambda: trainer.resume_or_load(resume=False), trainer.train):
        with pytest.raises(TrainingError, match=r"resume=True\), replace it by Trainer\(cfg, overwrite=True\)"):
            start()
    cfg = tiny_cfg(data, tmp_path, "SOLVER.MAX_ITER", "1", "DATASETS.TEST", ())
    trainer = Trainer(cfg, overwrite=True)
    trainer.resume_or_load(resume=False)
    assert trainer.train() == {}
    assert len(state(tmp_path / "model_final.pth")) > 50


class Own(Trainer):
    """Detectron2's loader, mapper and step, an evaluator and a hook of the user's own."""

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        return build_detection_train_loader(cfg)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> DatasetEvaluator:
        class Counts(DatasetEvaluator):
            def reset(self) -> None:
                self.count = 0

            def process(self, inputs: Any, outputs: Any) -> None:
                self.count += len(outputs)

            def evaluate(self) -> Any:
                return OrderedDict(segm={"AP": float(self.count)})

        return Counts()

    def build_hooks(self) -> list[Any]:
        return [*super().build_hooks(), Seen()]

    def run_step(self) -> None:
        """As in Detectron2's DefaultTrainer."""
        self._trainer.iter = self.iter
        self._trainer.run_step()


class Seen(HookBase):
    def __init__(self) -> None:
        self.iterations: list[int] = []

    def after_step(self) -> None:
        self.iterations.append(self.trainer.iter)


def test_overridden_parts_are_used(data: list[str], tmp_path: Path) -> None:
    """A set that Detectron2's catalog alone knows; metrics of the own evaluator choose the best model."""
    name = f"own_{tmp_path.name}"
    register_coco_instances(name, {}, data[1], data[3])
    register_coco_instances(f"{name}_val", {}, data[5], data[7])
    keys = ["SOLVER.MAX_ITER", "3", "INPUT.MASK_FORMAT", "bitmask"]
    cfg = tiny_cfg(data, tmp_path, "DATASETS.TRAIN", (name,), "DATASETS.TEST", (f"{name}_val",), *keys)
    trainer = Own(cfg)
    trainer.resume_or_load(resume=False)
    assert trainer.train() == {"segm": {"AP": 4.0}}
    assert trainer._hooks[-1].iterations == [0, 1, 2]
    assert torch.load(tmp_path / "model_best.pth", weights_only=True)["gn_det"]["best_metric"] == 4.0
    assert {"total_loss", "loss_mask"} <= trainer.storage.histories().keys()  # for writers of the user's own


def test_what_the_trainer_cannot_use_is_one_line(data: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="add_gn_config"):
        Trainer(get_cfg())
    DatasetCatalog.register("a_function", lambda: [])
    try:
        with pytest.raises(ConfigError, match="dataset 'a_function' has no thing_classes: set them by"):
            Trainer(tiny_cfg(data, tmp_path, "DATASETS.TRAIN", ("a_function",)))
    finally:
        DatasetCatalog.remove("a_function")
        MetadataCatalog.remove("a_function")


def test_mixed_masks_in_instances() -> None:
    """Indexing as Detectron2 does it, moving, concatenation; targets equal those of the single masks."""
    import numpy as np

    square = [np.array([1.0, 1, 5, 1, 5, 5, 1, 5])]
    bitmap = np.zeros((8, 8), dtype=bool)
    bitmap[2:6, 3:7] = True
    masks = MixedMasks([square, bitmap, []])
    boxes = torch.tensor([[0.0, 0, 8, 8]]).repeat(3, 1)
    instances = Instances((8, 8), gt_masks=masks).to("cpu")
    assert len(instances) == 3 and instances.gt_masks.nonempty().tolist() == [True, True, False]
    for index in (1, torch.tensor(1), slice(1, 2), torch.tensor([1]), torch.tensor([False, True, False])):
        chosen = masks[index]
        assert isinstance(chosen, MixedMasks) and len(chosen) == 1
        assert torch.equal(chosen.crop_and_resize(boxes[:1], 4), masks.crop_and_resize(boxes, 4)[1:2])
    assert len(Instances.cat([instances, instances[torch.tensor([2, 0])]]).gt_masks) == 5
    assert masks.crop_and_resize(boxes, 4).any(dim=2).any(dim=1).tolist() == [True, True, False]
