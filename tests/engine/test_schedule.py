"""Learning rates equal the numbers recorded from Detectron2; scaling rules; epochs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gn_det import config_file
from gn_det.config import get_cfg, load_config
from gn_det.engine.optimizer import build_optimizer
from gn_det.engine.schedule import (
    build_lr_scheduler,
    format_schedule,
    images_per_rank,
    lr_multiplier,
    scale_schedule,
    set_iteration,
)
from gn_det.errors import ConfigError
from tests.engine.cases import SCHEDULES, Tiny

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "solver.json").read_text())


def cfg_of(overrides: list[Any]) -> Any:
    cfg = get_cfg()
    cfg.merge_from_list(overrides)
    return cfg


@pytest.mark.parametrize("name", SCHEDULES)
def test_recorded_rates_of_detectron2(name: str) -> None:
    """Equal to the last bit, before every iteration."""
    cfg = cfg_of(SCHEDULES[name])
    multiplier = lr_multiplier(cfg)
    rates = [cfg.SOLVER.BASE_LR * multiplier(i) for i in range(cfg.SOLVER.MAX_ITER)]
    assert rates == GOLDEN[name]


@pytest.mark.parametrize("name", SCHEDULES)
def test_jumping_to_an_iteration_equals_stepping_there(name: str) -> None:
    cfg = cfg_of(SCHEDULES[name])
    stepped = build_optimizer(cfg, Tiny())
    scheduler = build_lr_scheduler(cfg, stepped)
    for iteration in range(cfg.SOLVER.MAX_ITER + 1):
        jumped = build_optimizer(cfg, Tiny())
        other = build_lr_scheduler(cfg, jumped)
        set_iteration(other, iteration)
        assert [g["lr"] for g in jumped.param_groups] == [g["lr"] for g in stepped.param_groups]
        stepped.step()
        scheduler.step()


def test_scaling_by_world_size_is_linear_and_idempotent() -> None:
    cfg = cfg_of(["SOLVER.BASE_LR", 0.02, "SOLVER.MAX_ITER", 90000, "SOLVER.STEPS", (60000, 80000),
                  "SOLVER.REFERENCE_WORLD_SIZE", 8, "SOLVER.REFERENCE_BATCH", 16,
                  "TEST.EVAL_PERIOD", 5000])  # fmt: skip
    scaled, sentences = scale_schedule(cfg, 1, 0)
    assert (scaled.SOLVER.IMS_PER_BATCH, scaled.SOLVER.BASE_LR, scaled.SOLVER.MAX_ITER) == (2, 0.0025, 720000)
    assert scaled.SOLVER.STEPS == (480000, 640000)
    assert (scaled.SOLVER.WARMUP_ITERS, scaled.TEST.EVAL_PERIOD) == (8000, 40000)
    assert len(sentences) == 1 and "0.02 -> 0.0025" in sentences[0]
    again, nothing = scale_schedule(scaled, 1, 0)
    assert again == scaled and nothing == []
    assert cfg.SOLVER.MAX_ITER == 90000  # the given config is not changed


def test_typed_batch_goes_by_the_reference_batch() -> None:
    cfg = cfg_of(["SOLVER.BASE_LR", 0.02, "SOLVER.MAX_ITER", 90000, "SOLVER.STEPS", (60000, 80000),
                  "SOLVER.REFERENCE_WORLD_SIZE", 8, "SOLVER.REFERENCE_BATCH", 16,
                  "SOLVER.IMS_PER_BATCH", 4, "SOLVER.NO_RESCALE", ("SOLVER.IMS_PER_BATCH",)])  # fmt: skip
    scaled, sentences = scale_schedule(cfg, 1, 0)
    assert (scaled.SOLVER.IMS_PER_BATCH, scaled.SOLVER.BASE_LR, scaled.SOLVER.MAX_ITER) == (4, 0.005, 360000)
    assert len(sentences) == 1


@pytest.mark.parametrize(
    ("name", "gpus", "expected"),
    [
        ("gn_fpn.yaml", 1, (2, 0.0025, 1440000)),
        ("gn_fpn.yaml", 4, (8, 0.01, 360000)),
        ("gn_fpn.yaml", 8, (16, 0.02, 180000)),
        ("gn_c4.yaml", 1, (1, 0.00125, 2880000)),
        ("gn_c4.yaml", 8, (8, 0.01, 360000)),
        ("bn_c4_tuned.yaml", 1, (2, 0.0025, 1440000)),
        ("gn_fpn_scratch_9x.yaml", 1, (64, 0.08, 202500)),
        ("quickstart.yaml", 1, (4, 0.06, 390)),
    ],
)
def test_shipped_configs_on_the_command_line(
    name: str, gpus: int, expected: tuple[int, float, int], tmp_path: Path
) -> None:
    """Batch, lr and iterations; a config built on a shipped one is scaled alike."""
    own = tmp_path / "own.yaml"
    own.write_text(f"_BASE_: {config_file(name)}\nSEED: 1\n")
    for path in (name, str(own)):
        solver = scale_schedule(load_config(path), gpus, 0)[0].SOLVER
        assert expected == (solver.IMS_PER_BATCH, solver.BASE_LR, solver.MAX_ITER)
    own.write_text(f"_BASE_: {config_file(name)}\nSOLVER: {{REFERENCE_WORLD_SIZE: 0, REFERENCE_BATCH: 0}}\n")
    written = load_config(name).SOLVER
    solver = scale_schedule(load_config(str(own)), gpus, 0)[0].SOLVER
    keys = ("IMS_PER_BATCH", "BASE_LR", "MAX_ITER")
    assert [solver[k] for k in keys] == [written[k] for k in keys]


def test_typed_batch_of_a_shipped_config_scales_the_rate() -> None:
    solver = scale_schedule(load_config("gn_c4.yaml", ["SOLVER.IMS_PER_BATCH", "4"]), 1, 0)[0].SOLVER
    assert (solver.IMS_PER_BATCH, solver.BASE_LR, solver.MAX_ITER) == (4, 0.005, 720000)


def test_typed_length_and_rate_are_taken_literally() -> None:
    cfg = cfg_of(["SOLVER.BASE_LR", 0.01, "SOLVER.MAX_ITER", 2000, "SOLVER.STEPS", (60000, 80000),
                  "SOLVER.REFERENCE_WORLD_SIZE", 8,
                  "SOLVER.NO_RESCALE", ("SOLVER.MAX_ITER", "SOLVER.BASE_LR")])  # fmt: skip
    scaled, sentences = scale_schedule(cfg, 1, 0)
    assert (scaled.SOLVER.BASE_LR, scaled.SOLVER.MAX_ITER, scaled.SOLVER.WARMUP_ITERS) == (0.01, 2000, 1000)
    assert any("as given" in s for s in sentences)
    assert any("never drops" in s for s in sentences)  # both steps lie beyond the end


def test_epochs_set_the_length_and_keep_proportions() -> None:
    cfg = cfg_of(["SOLVER.EPOCHS", 12.0, "SOLVER.IMS_PER_BATCH", 4, "SOLVER.MAX_ITER", 9000,
                  "SOLVER.STEPS", (6000, 8000), "TEST.EVAL_PERIOD", 900])  # fmt: skip
    scaled, sentences = scale_schedule(cfg, 1, 300)
    assert (scaled.SOLVER.MAX_ITER, scaled.SOLVER.STEPS, scaled.TEST.EVAL_PERIOD) == (900, (600, 800), 75)
    # 75 iterations are one epoch, and the checkpoint period of 5000 of 9000 iterations became 7 epochs
    assert scaled.SOLVER.CHECKPOINT_PERIOD == 525
    assert scaled.SOLVER.WARMUP_ITERS == 90  # a tenth of a run that became short
    assert "12 over 300 images" in sentences[0]
    assert "900 iterations (12.00 epochs)" in format_schedule(scaled, 300)
    with pytest.raises(ConfigError, match="training set"):
        scale_schedule(cfg, 1, 0)


@pytest.mark.parametrize(("images", "epochs", "evaluations"), [(50, 100, 17), (160, 38, 19), (2000, 12, 12)])
def test_own_data_gets_a_short_length(images: int, epochs: int, evaluations: int) -> None:
    """180,000 iterations for COCO would be thousands of epochs; evaluations fall on whole epochs, at most 20."""
    own = {"DATASETS.TRAIN_JSON": "a.json", "DATASETS.TRAIN_IMAGES": "a"}
    scaled, sentences = scale_schedule(load_config("gn_fpn.yaml", own), 1, images)
    assert epochs == scaled.SOLVER.EPOCHS and round(epochs * images / 2) == scaled.SOLVER.MAX_ITER
    assert any(f"Length chosen for {images:,} images: {epochs} epochs" in s for s in sentences)
    every = scaled.TEST.EVAL_PERIOD * 2 / images
    assert every == round(every) and -(-epochs // every) == evaluations
    assert scale_schedule(scaled, 1, images) == (scaled, [])


def test_a_length_of_the_users_is_kept(tmp_path: Path) -> None:
    own = {"DATASETS.TRAIN_JSON": "a.json", "DATASETS.TRAIN_IMAGES": "a"}
    path = tmp_path / "mine.yaml"
    path.write_text("_BASE_: gn_fpn.yaml\nSOLVER: {MAX_ITER: 90000}\n")
    for config, more in (
        (str(path), {}), ("gn_fpn.yaml", {"SOLVER.MAX_ITER": 90000}), ("gn_fpn.yaml", {"SOLVER.EPOCHS": 101.0})
    ):  # fmt: skip
        scaled, sentences = scale_schedule(load_config(config, {**own, **more}), 8, 160)
        assert (1010 if more.get("SOLVER.EPOCHS") else 90000) == scaled.SOLVER.MAX_ITER
        assert any("times over 160 images: small sets overfit" in s for s in sentences)
    assert scale_schedule(load_config("gn_fpn.yaml"), 8, 160)[0].SOLVER.MAX_ITER == 180000  # a named set


def test_batch_must_be_divisible() -> None:
    cfg = cfg_of(["SOLVER.IMS_PER_BATCH", 6, "SOLVER.ACCUMULATE", 2])
    assert images_per_rank(cfg, 3) == 1
    with pytest.raises(ConfigError, match="multiple of 4"):
        images_per_rank(cfg, 2)


def test_a_cosine_that_ends_above_its_start_is_refused() -> None:
    with pytest.raises(ConfigError, match="BASE_LR_END 1 must not exceed"):
        lr_multiplier(cfg_of(["SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", "SOLVER.BASE_LR_END", 1.0]))


def test_scheduler_is_a_torch_scheduler() -> None:
    cfg = cfg_of(SCHEDULES["multistep"])
    scheduler = build_lr_scheduler(cfg, build_optimizer(cfg, Tiny()))
    assert isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler)


def test_another_batch_keeps_the_end_of_a_cosine_and_what_was_typed() -> None:
    """BASE_LR_END keeps its proportion to BASE_LR; a typed EVAL_PERIOD stays, a CHECKPOINT_PERIOD follows."""
    keys = ["SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", "SOLVER.BASE_LR", 0.02, "SOLVER.BASE_LR_END", 0.002]
    keys += ["SOLVER.REFERENCE_BATCH", 16, "SOLVER.IMS_PER_BATCH", 4, "SOLVER.MAX_ITER", 100]
    keys += ["TEST.EVAL_PERIOD", 10, "SOLVER.CHECKPOINT_PERIOD", 20, "SOLVER.NO_RESCALE", ("TEST.EVAL_PERIOD",)]
    cfg, _ = scale_schedule(cfg_of(keys), 1, 0)
    assert pytest.approx(0.005) == cfg.SOLVER.BASE_LR and pytest.approx(0.0005) == cfg.SOLVER.BASE_LR_END
    assert (cfg.SOLVER.MAX_ITER, cfg.TEST.EVAL_PERIOD, cfg.SOLVER.CHECKPOINT_PERIOD) == (400, 10, 80)
