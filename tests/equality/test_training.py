"""Identity: 30 iterations of training are the same run on both engines.

The embedded engine trains as ``gn-det train`` does; Detectron2's ``DefaultTrainer`` trains its own model and the one on
gn_det's registered modules. Same initial weights, same seed at the first iteration, same samples in the same order (by
gn_det's loader); optimizer, schedule and loop are each engine's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("detectron2.engine", reason="compares with an installed Detectron2")

from detectron2.config import get_cfg as detectron2_cfg
from detectron2.engine import DefaultTrainer, hooks
from detectron2.modeling import GeneralizedRCNN

from gn_det.cli import main
from gn_det.config import dump_config, get_cfg
from gn_det.data.catalog import resolve
from gn_det.data.coco import load_coco
from gn_det.data.loader import build_train_loader
from gn_det.data.shapes import make_shapes
from gn_det.modeling import MaskRCNN, build_model
from tests.equality.table import FAMILIES
from tests.golden.d2_side import registered_cfg, registered_names, sample_to_detectron2
from tests.golden.model_cases import CASES, configure

pytestmark = pytest.mark.detectron2

ITERATIONS = 30
SEED = 4
#: Relative to the loss, or absolute below 1. The issue asks for it; measured: see the table at the end of the run.
CURVE_TOL = 1e-4
#: Norm of the difference over the norm of the way each tensor went in 30 iterations.
WEIGHT_RTOL = 1e-3

SMALL = {
    "MODEL.RESNETS.DEPTH": 18,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 64,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 8,
    "MODEL.ROI_HEADS.NUM_CLASSES": 5,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 16,
    "MODEL.PIXEL_STD": [57.375, 57.12, 58.395],
    "INPUT.MIN_SIZE_TRAIN": (48, 64),
    "INPUT.MAX_SIZE_TRAIN": 96,
    "INPUT.MASK_FORMAT": "bitmask",
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.IMS_PER_BATCH": 2,
    "SOLVER.BASE_LR": 0.01,
    "SOLVER.WARMUP_ITERS": 5,
    "SOLVER.STEPS": (20, 26),
    "SOLVER.MAX_ITER": ITERATIONS,
    "SOLVER.WEIGHT_DECAY_NORM": 0.0,
    "SEED": SEED,
}

Curve = list[tuple[list[Any], dict[str, float]]]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    source = make_shapes(tmp_path_factory.mktemp("shapes"), "train", 12)
    return f"{source.json_file}@{source.image_root}"


def settings(cfg: Any, case: str, data: str, weights: Path, output: Path) -> Any:
    """The same values for either engine's config."""
    values = {**SMALL, "DATASETS.TRAIN": (data,), "MODEL.WEIGHTS": str(weights), "OUTPUT_DIR": str(output)}
    if "c4" in case:
        values["MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE"] = 8
    return configure(cfg, case, **{k.replace(".", "__"): v for k, v in values.items()})


def watch(patch: pytest.MonkeyPatch, kind: type[nn.Module]) -> Curve:
    """Seed the first training forward of a model class, and keep image ids and losses of them all."""
    seen: Curve = []
    forward = kind.forward

    def watched(self: nn.Module, batch: list[Any]) -> Any:
        if not self.training:
            return forward(self, batch)
        if not seen:
            torch.manual_seed(SEED)
        losses = forward(self, batch)
        seen.append(([s["image_id"] for s in batch], {k: float(v.detach()) for k, v in losses.items()}))
        return losses

    patch.setattr(kind, "forward", watched)
    return seen


def train_embedded(case: str, data: str, weights: Path, output: Path) -> dict[str, Tensor]:
    cfg = settings(get_cfg(), case, data, weights, output)
    cfg.MODEL.DEVICE = "cpu"
    output.mkdir()
    (output.parent / "embedded.yaml").write_text(dump_config(cfg))
    assert main(["train", "--engine", "embedded", "--config", str(output.parent / "embedded.yaml")]) == 0
    return torch.load(output / "model_final.pth", weights_only=True)["model"]


class Converted:
    """gn_det's loader with its samples in Detectron2's types."""

    def __init__(self, cfg: Any, data: str) -> None:
        dataset = load_coco(resolve(data), max_bad=0)
        self.loader = build_train_loader(cfg, [dataset], images_per_rank=2, seed=SEED)

    def __iter__(self) -> Iterator[list[dict[str, Any]]]:
        for batch in self.loader:
            yield [sample_to_detectron2(sample) for sample in batch]


def train_detectron2(side: str, case: str, data: str, weights: Path, output: Path) -> dict[str, Tensor]:
    ours = settings(get_cfg(), case, data, weights, output)
    cfg = settings(registered_cfg() if side == "registered" else detectron2_cfg(), case, data, weights, output)
    cfg.MODEL.DEVICE = "cpu"
    if side == "registered":
        registered_names(cfg)

    class Trainer(DefaultTrainer):
        @classmethod
        def build_train_loader(cls, cfg: Any) -> Any:
            return Converted(ours, data)

        def build_hooks(self) -> list[Any]:  # without checkpoints, evaluation and writers
            return [hooks.IterationTimer(), hooks.LRScheduler()]

    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=False)
    trainer.train()
    return trainer.model.state_dict()


def differences(ours: Curve, theirs: Curve) -> float:
    assert [ids for ids, _ in ours] == [ids for ids, _ in theirs] and len(ours) == ITERATIONS
    assert [list(losses) for _, losses in ours] == [list(losses) for _, losses in theirs]
    return max(abs(a[name] - b[name]) / max(1.0, abs(b[name])) for (_, a), (_, b) in zip(ours, theirs) for name in b)


@pytest.mark.parametrize("case", FAMILIES)
def test_thirty_iterations(
    case: str,
    data: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    measured: Callable[[str, str, str, float], None],
) -> None:
    assert case in CASES
    torch.manual_seed(SEED)
    cfg = settings(get_cfg(), case, data, Path(), tmp_path)
    start = build_model(cfg).state_dict()
    torch.save({"model": start}, tmp_path / "start.pth")
    curve = watch(monkeypatch, MaskRCNN)
    end = train_embedded(case, data, tmp_path / "start.pth", tmp_path / "embedded")
    assert curve[0][1] != curve[-1][1] and all(v == v for _, losses in curve for v in losses.values())
    assert any(not torch.equal(end[k], start[k]) for k in end)
    for side in ("own", "registered"):
        with pytest.MonkeyPatch.context() as patch:
            other = watch(patch, GeneralizedRCNN)
            expected = train_detectron2(side, case, data, tmp_path / "start.pth", tmp_path / side)
        off = differences(curve, other)
        assert list(end) == list(expected)
        moved = {k: float((expected[k] - start[k]).float().norm()) for k in end}
        away = max(float((end[k] - expected[k]).float().norm()) / (moved[k] + 1e-6) for k in end)
        measured(case, "curve", side, off)
        measured(case, "weights", side, away)
        assert off <= CURVE_TOL
        assert away <= WEIGHT_RTOL
