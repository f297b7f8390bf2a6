"""Detectron2's tutorial pattern: a data set that is a function, its metadata, a trainer, a predictor. No json file."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

pytest.importorskip("detectron2.config", reason="needs an installed Detectron2")

from detectron2.config import CfgNode
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.data import transforms as T
from detectron2.engine import DefaultPredictor, DefaultTrainer
from detectron2.engine.hooks import BestCheckpointer
from detectron2.evaluation import COCOEvaluator, inference_on_dataset
from detectron2.structures import BoxMode

from gn_det.cli import main
from gn_det.data.image import ImageReader
from gn_det.detectron2 import Trainer
from gn_det.detectron2.datasets import _by_files, to_coco
from gn_det.errors import ConfigError, DataError
from tests.detectron2.cases import TINY, lines, plugin_cfg

pytestmark = pytest.mark.detectron2

CLASSES = ["balloon", "kite"]


def draw_pictures(folder: Path, count: int) -> list[dict[str, Any]]:
    """Pictures with two round and one three-sided polygon each, as Detectron2's standard dicts."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    records = []
    for number in range(count):
        image = Image.new("RGB", (96, 72), (90, 140, 200))
        annotations = []
        for k in range(3):
            x, y, r = rng.integers(14, 82), rng.integers(14, 58), rng.integers(6, 13)
            corners = 3 if k == 2 else 12
            angles = [2 * math.pi * i / corners for i in range(corners)]
            px = [float(x + r * math.cos(a)) for a in angles]
            py = [float(y + r * math.sin(a)) for a in angles]
            ImageDraw.Draw(image).polygon(list(zip(px, py)), fill=(230, 40, 40) if k < 2 else (250, 240, 20))
            annotations.append({
                "bbox": [np.min(px), np.min(py), np.max(px), np.max(py)],
                "bbox_mode": BoxMode.XYXY_ABS,
                "segmentation": [[v for point in zip(px, py) for v in point]],
                "category_id": k // 2,
            })  # fmt: skip
        path = folder / f"{number}.png"
        image.save(path)
        records.append({"file_name": str(path), "image_id": number, "height": 72, "width": 96,
                        "annotations": annotations})  # fmt: skip
    return records


@pytest.fixture
def balloons(tmp_path: Path) -> Iterator[str]:
    """The common beginning of the names of two registered sets, with ``_train`` and ``_val``."""
    name = f"balloon_{tmp_path.name}"
    for split, count in (("train", 6), ("val", 3)):
        records = draw_pictures(tmp_path / split, count)
        DatasetCatalog.register(f"{name}_{split}", lambda records=records: records)
        MetadataCatalog.get(f"{name}_{split}").set(thing_classes=CLASSES, color="red")
    yield name
    for split in ("train", "val"):
        DatasetCatalog.remove(f"{name}_{split}")
        MetadataCatalog.remove(f"{name}_{split}")


def tutorial_cfg(name: str, output: Path, *more: Any) -> CfgNode:
    cfg = plugin_cfg("quickstart.yaml")
    cfg.merge_from_list(TINY)
    cfg.DATASETS.TRAIN = (f"{name}_train",)
    cfg.DATASETS.TEST = ()
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.SOLVER.BASE_LR = 0.01
    cfg.SOLVER.MAX_ITER = 2
    cfg.SOLVER.STEPS = []
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 2
    cfg.OUTPUT_DIR = str(output)
    cfg.merge_from_list(list(more))
    return cfg


@pytest.mark.parametrize("trainer_class", [DefaultTrainer, Trainer])
def test_the_tutorial(trainer_class: type[DefaultTrainer], balloons: str, tmp_path: Path) -> None:
    """Train, predict and evaluate, line by line."""
    cfg = tutorial_cfg(balloons, tmp_path / "out")
    Path(cfg.OUTPUT_DIR).mkdir()
    trainer = trainer_class(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()

    cfg.MODEL.WEIGHTS = str(tmp_path / "out" / "model_final.pth")
    cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    predictor = DefaultPredictor(cfg)
    for record in DatasetCatalog.get(f"{balloons}_val"):
        instances = predictor(ImageReader().read(record["file_name"]))["instances"]
        assert instances.image_size == (72, 96) and set(instances.pred_classes.tolist()) <= {0, 1}
    evaluator = COCOEvaluator(f"{balloons}_val", output_dir=str(tmp_path / "eval"))
    loader = build_detection_test_loader(cfg, f"{balloons}_val")
    results = inference_on_dataset(predictor.model, loader, evaluator)
    assert {"bbox", "segm"} == set(results) and "AP-balloon" in results["segm"]


def test_our_evaluation_of_it_is_coco_evaluators(balloons: str, tmp_path: Path) -> None:
    """Classes come from the metadata; our AP equals that of COCOEvaluator's own conversion; the run resumes by CLI."""
    keys = ["MODEL.ROI_HEADS.NUM_CLASSES", 0, "SOLVER.MAX_ITER", 12, "MODEL.ROI_HEADS.SCORE_THRESH_TEST", 0.0]
    cfg = tutorial_cfg(balloons, tmp_path / "out", *keys, "DATASETS.TEST", (f"{balloons}_val",))
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    results = trainer.train()
    assert cfg.DATASETS.TRAIN == trainer.cfg.DATASETS.TRAIN == (f"{balloons}_train",)
    evaluator = COCOEvaluator(f"{balloons}_val", output_dir=str(tmp_path / "eval"))
    theirs = inference_on_dataset(trainer.model, build_detection_test_loader(cfg, f"{balloons}_val"), evaluator)
    assert list(results["segm"]) == list(theirs["segm"])
    for task, metrics in theirs.items():
        assert results[task] == pytest.approx(dict(metrics), abs=1e-6, nan_ok=True)
    saved = torch.load(tmp_path / "out" / "model_final.pth", weights_only=True)["gn_det"]
    assert saved["class_names"] == CLASSES
    stored = str(tmp_path / "out" / "config.yaml")
    assert main(["train", "--engine", "detectron2", "--config", stored, "--resume", "SOLVER.MAX_ITER", "13"]) == 0
    assert lines(tmp_path / "out")[-1]["iteration"] == 13


class Own(Trainer):
    """A mapper with an augmentation, Detectron2's evaluator, and a hook that keeps the best model."""

    asked: list[str] = []  # noqa: RUF012

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Any:
        cls.asked += cfg.DATASETS.TRAIN
        mapper = DatasetMapper(cfg, is_train=True, augmentations=[T.Resize((48, 64)), T.RandomFlip()])
        return build_detection_train_loader(cfg, mapper=mapper)

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> COCOEvaluator:
        cls.asked += [dataset_name, MetadataCatalog.get(dataset_name).color]
        return COCOEvaluator(dataset_name, output_dir=str(Path(cfg.OUTPUT_DIR) / "inference"))

    def build_hooks(self) -> list[Any]:
        best = BestCheckpointer(2, self.checkpointer, "segm/AP", "max", file_prefix="by_hook")
        return [*super().build_hooks(), best]


def test_overridden_loader_evaluator_and_hooks(balloons: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They see the names that the user gave; BestCheckpointer finds its metric at each evaluation."""
    keys = ["SOLVER.MAX_ITER", 4, "TEST.EVAL_PERIOD", 2, "DATASETS.TEST", (f"{balloons}_val",)]
    trainer = Own(tutorial_cfg(balloons, tmp_path / "out", *keys))
    trainer.resume_or_load(resume=False)
    with caplog.at_level("INFO", logger="detectron2"):
        results = trainer.train()
    assert set(Own.asked) == {f"{balloons}_train", f"{balloons}_val", "red"}
    best = trainer._hooks[-1]
    assert "does not seem to be computed" not in caplog.text
    evaluated = [e["segm/AP"] for e in lines(tmp_path / "out") if "segm/AP" in e]
    assert len(evaluated) == 2 and best.best_metric == max(evaluated) and results["segm"]["AP"] == evaluated[-1]
    saved = torch.load(tmp_path / "out" / "by_hook.pth", weights_only=True)
    assert saved["gn_det"]["class_names"] == CLASSES
    # what the hook saved is not what a run resumes from
    assert (tmp_path / "out" / "last_checkpoint").read_text() == "model_final.pth"


def test_scalars_of_hooks_are_recorded(balloons: str, tmp_path: Path) -> None:
    """A hook of the user's sees the loss of its iteration, and what it puts is in metrics.json."""
    from detectron2.engine import HookBase

    class Twice(HookBase):
        def after_step(self) -> None:
            storage = self.trainer.storage
            storage.put_scalar("twice", 2 * storage.latest()["total_loss"][0])

    trainer = Trainer(tutorial_cfg(balloons, tmp_path / "out"))
    trainer.register_hooks([Twice()])
    trainer.resume_or_load(resume=False)
    trainer.train()
    (last,) = lines(tmp_path / "out")
    assert last["twice"] == pytest.approx(2 * last["total_loss"])  # both are medians of the window


def test_a_json_of_another_kind_is_not_read_as_coco(tmp_path: Path) -> None:
    """LVIS's metadata name a json, too: what its function returns is written as COCO json instead."""
    for kind, expected in (("coco", "own.json@."), ("lvis", "")):
        name = f"{kind}_{tmp_path.name}"
        DatasetCatalog.register(name, lambda: [])
        MetadataCatalog.get(name).set(json_file="own.json", image_root=".", evaluator_type=kind, thing_classes=["x"])
        found = _by_files(name, str(tmp_path))
        assert found == expected or (kind == "lvis" and found.startswith(f"{tmp_path}/datasets/{name}.json@"))


def test_what_a_function_returns_is_checked(tmp_path: Path) -> None:
    """Set, record and annotation are named, in one line."""
    good = {"file_name": "a.png", "image_id": 0, "height": 4, "width": 4}
    box = {"bbox": [0, 0, 2, 2], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
    for records, text in (
        ([{k: v for k, v in good.items() if k != "height"}], r"'s', record 0: key 'height' is missing"),
        ([{**good, "annotations": [{k: v for k, v in box.items() if k != "bbox_mode"}]}],
         r"record 0 \('a.png'\), annotation 0: key 'bbox_mode' is missing"),
        ([{**good, "annotations": [{**box, "bbox_mode": BoxMode.XYWHA_ABS}]}], "bbox_mode XYWHA_ABS: use XYXY_ABS"),
        ([{**good, "annotations": [{**box, "category_id": "x"}]}], "annotation 0: .*; see Detectron2's standard"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=text):
            to_coco("s", records, ["x"])
    rle = {"size": [4, 4], "counts": [0, 2, 14]}
    for mask, area in ((None, 4.0), ([[0, 0, 2, 0, 2, 2]], 2.0), (rle, 2.0)):
        extra = {} if mask is None else {"segmentation": mask}
        content = to_coco("s", [{**good, "annotations": [{**box, **extra}]}], ["x"])
        assert content["annotations"][0]["area"] == area and content["annotations"][0]["bbox"] == [0, 0, 2, 2]
    crowd = to_coco("s", [{**good, "annotations": [{**box, "iscrowd": 1}, box]}], ["x"])
    assert [a["iscrowd"] for a in crowd["annotations"]] == [1, 0]
    missing = f"missing_{tmp_path.name}"
    DatasetCatalog.register(missing, lambda: open(tmp_path / "nothing"))  # noqa: SIM115
    with pytest.raises(DataError, match=f"dataset '{missing}': its registered function cannot read its files"):
        Trainer(plugin_cfg("quickstart.yaml", "DATASETS.TRAIN", (missing,), "OUTPUT_DIR", str(tmp_path / "out")))
    DatasetCatalog.register(f"no_classes_{tmp_path.name}", lambda: [good])
    with pytest.raises(ConfigError, match="has no thing_classes"):
        Trainer(plugin_cfg("quickstart.yaml", "DATASETS.TRAIN", (f"no_classes_{tmp_path.name}",), "OUTPUT_DIR",
                           str(tmp_path / "out")))  # fmt: skip


@pytest.mark.parametrize("image_format", ["BGR", "L"])
def test_default_trainer_follows_bit_depth(tmp_path: Path, image_format: str) -> None:
    """Detectron2's own loader, mapper and trainer see the pictures of 16 bits as gn_det's reader gives them."""
    records = draw_pictures(tmp_path / "deep", 4)
    for record in records:
        gray = np.asarray(Image.open(record["file_name"]).convert("L")).astype(np.uint16) * 16 + 5
        Image.fromarray(gray).save(record["file_name"])
    content = to_coco("deep", records, CLASSES)
    (tmp_path / "deep.json").write_text(json.dumps(content))
    name = f"{tmp_path / 'deep.json'}@{tmp_path / 'deep'}"
    one = ("MODEL.PIXEL_MEAN", [100.0], "MODEL.PIXEL_STD", [1.0]) if image_format == "L" else ()
    cfg = plugin_cfg("quickstart.yaml", *TINY, "DATASETS.TRAIN", (name,), "DATASETS.TEST", (name,), *one,
                     "INPUT.FORMAT", image_format, "SOLVER.MAX_ITER", 1, "OUTPUT_DIR", str(tmp_path / "out"),
                     "MODEL.WEIGHTS", "")  # fmt: skip
    plain = cfg.clone()
    with pytest.raises(DataError, match=r"set INPUT.BIT_DEPTH"):
        DefaultTrainer(plain)
    cfg.INPUT.BIT_DEPTH = "5,4085"
    (tmp_path / "out").mkdir(exist_ok=True)
    trainer = DefaultTrainer(cfg)
    trainer.train()
    assert math.isfinite(trainer.storage.latest()["total_loss"][0])
    cfg.merge_from_list(["INPUT.MIN_SIZE_TEST", 0])
    reader, seen = ImageReader.of(cfg), 0
    for (one_input,), record in zip(build_detection_test_loader(cfg, name), records):
        want = reader.read(record["file_name"])
        assert np.array_equal(one_input["image"].numpy(), want.transpose(2, 0, 1)) and 20 < want.max() < 255
        seen += 1
    assert seen == 4
