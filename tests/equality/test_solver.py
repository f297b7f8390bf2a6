"""Optimizer groups, learning rates and clipping are Detectron2's, compared with the installed package."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("detectron2.solver", reason="compares with an installed Detectron2")

import torch
from detectron2.config import get_cfg as d2_get_cfg
from detectron2.engine import DefaultTrainer
from detectron2.solver import build_lr_scheduler as d2_scheduler
from detectron2.solver import build_optimizer as d2_optimizer
from torch import nn

from gn_det import config_file
from gn_det.config import get_cfg, load_config
from gn_det.engine.optimizer import build_optimizer, clip_gradients
from gn_det.engine.schedule import build_lr_scheduler, lr_multiplier, scale_schedule
from tests.engine.cases import SCHEDULES, Tiny
from tests.equality.table import SHIPPED
from tests.golden.d2_side import registered_cfg

pytestmark = pytest.mark.detectron2

GOLDEN = Path(__file__).parent.parent / "golden" / "solver.json"


def both(overrides: list) -> tuple:
    ours, theirs = get_cfg(), d2_get_cfg()
    for cfg in (ours, theirs):
        cfg.merge_from_list(overrides)
    return ours, theirs


def step(opt, sched) -> None:
    for group in opt.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    opt.step()
    sched.step()


@pytest.mark.parametrize("name", SCHEDULES)
def test_lr_equal_at_every_iteration(name: str) -> None:
    ours, theirs = both(SCHEDULES[name])
    model_a, model_b = Tiny(), Tiny()
    opt_a, opt_b = build_optimizer(ours, model_a), d2_optimizer(theirs, model_b)
    sched_a, sched_b = build_lr_scheduler(ours, opt_a), d2_scheduler(theirs, opt_b)
    for iteration in range(ours.SOLVER.MAX_ITER):
        lrs = [g["lr"] for g in opt_a.param_groups]
        assert lrs == [g["lr"] for g in opt_b.param_groups], iteration
        if iteration + 1 < ours.SOLVER.MAX_ITER:  # Detectron2's fixed-gamma curve fails one step after the end
            step(opt_a, sched_a)
            step(opt_b, sched_b)


@pytest.mark.parametrize("case", SHIPPED)
def test_lr_of_the_shipped_configs(case: str, measured: Callable[[str, str, str, float], None]) -> None:
    """Every one of the 180k to 270k iterations; Detectron2 reads the YAML with gn_det's keys and without."""
    ours = lr_multiplier(load_config(SHIPPED[case]))
    for side in ("own", "registered"):
        cfg = registered_cfg()
        cfg.merge_from_file(config_file(SHIPPED[case]))
        if side == "own":
            del cfg.MODEL["GN"]
        schedule = d2_scheduler(cfg, d2_optimizer(cfg, Tiny()))
        last = cfg.SOLVER.MAX_ITER
        off = max(abs(ours(i) - schedule._multiplier(i / last)) for i in range(last))
        measured(case, "lr", side, off)
        assert off == 0.0


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["SOLVER.WEIGHT_DECAY_NORM", 0.01],
        ["SOLVER.WEIGHT_DECAY_BIAS", 0.0, "SOLVER.BIAS_LR_FACTOR", 2.0],
        ["SOLVER.NESTEROV", True],
    ],
)
def test_groups_equal_in_order_and_values(overrides: list) -> None:
    ours, theirs = both(overrides)
    model = Tiny()
    opt_a, opt_b = build_optimizer(ours, model), d2_optimizer(theirs, model)
    assert len(opt_a.param_groups) == len(opt_b.param_groups)
    for a, b in zip(opt_a.param_groups, opt_b.param_groups):
        assert [id(p) for p in a["params"]] == [id(p) for p in b["params"]]
        assert {k: v for k, v in a.items() if k != "params"} == {k: v for k, v in b.items() if k != "params"}


def test_backbone_factor_and_adamw_are_those_of_detectron2s_lazy_configs() -> None:
    """``get_default_optimizer_params(lr_factor_func=...)`` under AdamW, as in ViTDet's config: equal weights."""
    from detectron2.solver.build import get_default_optimizer_params

    cfg = get_cfg()
    cfg.merge_from_list(["SOLVER.OPTIMIZER", "ADAMW", "SOLVER.BACKBONE_LR_FACTOR", 0.1, "SOLVER.WEIGHT_DECAY", 0.05])
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(nn.ModuleDict({"backbone": Tiny(), "head": nn.Linear(8, 2)}))
    params = get_default_optimizer_params(
        models[1],
        base_lr=cfg.SOLVER.BASE_LR,
        weight_decay_norm=0.0,
        lr_factor_func=lambda name: 0.1 if name.startswith("backbone") else 1.0,
    )
    ours = build_optimizer(cfg, models[0])
    theirs = torch.optim.AdamW(params, lr=cfg.SOLVER.BASE_LR, betas=(0.9, 0.999), weight_decay=0.05, foreach=True)
    assert [len(g["params"]) for g in ours.param_groups] == [len(g["params"]) for g in theirs.param_groups]
    x = torch.randn(2, 3, 8, 8)
    for _ in range(3):
        for model, optimizer in zip(models, (ours, theirs)):
            optimizer.zero_grad()
            model["head"](model["backbone"].features(x)).pow(2).sum().backward()
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters()))


@pytest.mark.parametrize("kind", ["value", "norm"])
def test_clipped_steps_give_equal_weights(kind: str) -> None:
    ours, theirs = both(
        ["SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", kind,
         "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 0.3]
    )  # fmt: skip
    torch.manual_seed(0)
    model_a, model_b = Tiny(), Tiny()
    model_b.load_state_dict(model_a.state_dict())
    opt_a, opt_b = build_optimizer(ours, model_a), d2_optimizer(theirs, model_b)
    x = torch.randn(2, 3, 8, 8) * 10
    for _ in range(3):
        for model, opt in ((model_a, opt_a), (model_b, opt_b)):
            opt.zero_grad()
            nn.functional.mse_loss(model.features(x), torch.zeros(2, 8)).backward()
        clip_gradients(ours, model_a.parameters())
        opt_a.step()
        opt_b.step()
    for a, b in zip(model_a.parameters(), model_b.parameters()):
        assert torch.equal(a, b)


@pytest.mark.parametrize(("reference", "world"), [(8, 1), (8, 16), (2, 3)])
def test_auto_scale_workers(reference: int, world: int) -> None:
    ours, theirs = both(
        ["SOLVER.REFERENCE_WORLD_SIZE", reference, "SOLVER.STEPS", (210000, 250000), "SOLVER.MAX_ITER", 270000,
         "SOLVER.BASE_LR", 0.02, "TEST.EVAL_PERIOD", 5000, "SOLVER.IMS_PER_BATCH", 48]
    )  # fmt: skip
    scaled, sentences = scale_schedule(ours, world, 0)
    expected = DefaultTrainer.auto_scale_workers(theirs, world)
    assert len(sentences) == 1
    for key in ("IMS_PER_BATCH", "BASE_LR", "MAX_ITER", "WARMUP_ITERS", "STEPS", "CHECKPOINT_PERIOD"):
        assert scaled.SOLVER[key] == expected.SOLVER[key], key
    assert scaled.TEST.EVAL_PERIOD == expected.TEST.EVAL_PERIOD


def recorded_rates() -> dict[str, list[float]]:
    """Detectron2's learning rate of the first group before every iteration, for each schedule."""
    out = {}
    for name, overrides in SCHEDULES.items():
        cfg = d2_get_cfg()
        cfg.merge_from_list(overrides)
        opt = d2_optimizer(cfg, Tiny())
        sched = d2_scheduler(cfg, opt)
        rates = []
        for iteration in range(cfg.SOLVER.MAX_ITER):
            rates.append(opt.param_groups[0]["lr"])
            if iteration + 1 < cfg.SOLVER.MAX_ITER:
                step(opt, sched)
        out[name] = rates
    return out


def test_golden_file_is_what_detectron2_says() -> None:
    """tests/golden/solver.json serves machines without Detectron2; ``GN_DET_RECORD=1`` writes it anew."""
    rates = recorded_rates()
    if os.environ.get("GN_DET_RECORD"):
        GOLDEN.write_text(json.dumps(rates, indent=None, separators=(",", ":")) + "\n")
    assert json.loads(GOLDEN.read_text()) == rates


def test_detection_checkpointer_loads_our_file(tmp_path: Path) -> None:
    """{"model": ...} written by a run loads by Detectron2's own class without renaming, tensor for tensor."""
    from detectron2.checkpoint import DetectionCheckpointer

    from tests.engine.cases import run

    run(tmp_path, max_iter=3)
    model = Tiny()
    rest = DetectionCheckpointer(model, save_to_disk=False).load(str(tmp_path / "model_final.pth"))
    written = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert rest["iteration"] == 2
    for name, value in model.state_dict().items():
        assert torch.equal(value, written["model"][name]), name
