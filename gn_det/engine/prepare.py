"""Prepare a training run: checks across keys, data, schedule, seed, initial weights and folder."""

from __future__ import annotations

import logging
import re
import secrets
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from fvcore.common.config import CfgNode
from torch import nn

from gn_det.checkpoint.last import remove_leftovers
from gn_det.checkpoint.weights import format_report, load_weights
from gn_det.config import dump_config
from gn_det.config.defaults import edited
from gn_det.data.augment import OwnTransform
from gn_det.data.loader import build_train_loader
from gn_det.data.sets import RunData, load_run_data, without_masks
from gn_det.engine import dist
from gn_det.engine.advice import half_gn, high_rate, large_crop, short_for_scratch
from gn_det.engine.log import on_screen
from gn_det.engine.loggers import check_loggers
from gn_det.engine.optimizer import format_groups
from gn_det.engine.output import check_space, start_afresh
from gn_det.engine.schedule import format_schedule, images_per_rank, scale_schedule
from gn_det.engine.shared_copy import load_once
from gn_det.engine.state import seed_everything
from gn_det.errors import ConfigError
from gn_det.files import atomic_write
from gn_det.modeling.census import format_census, frozen_by, norm_census, sum_census

logger = logging.getLogger(__name__)


def indented(text: str) -> str:
    """Indent ``text`` by two spaces, for log messages of several lines."""
    return textwrap.indent(text.rstrip(), "  ")


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to build its model."""

    cfg: CfgNode  # with the classes of the data and the schedule for this number of processes
    data: RunData
    seed: int  # of initialization and data stream; equal on every rank
    augment: OwnTransform | None = None

    def make_loader(self, start_batch: int, seed: int) -> Iterable[Any]:
        """Return this rank's endless micro-batches; see :data:`gn_det.engine.detector_loop.LoaderFactory`."""
        world = dist.world_size()
        loader = build_train_loader(
            self.cfg,
            self.data.train,
            images_per_rank=images_per_rank(self.cfg, world),
            start_batch=start_batch,
            rank=dist.rank(),
            world_size=world,
            seed=seed,
            augment=self.augment,
        )
        logger.info(loader.summary)
        return loader


def prepare(cfg: CfgNode, augment: OwnTransform | None = None) -> Prepared:
    """Read the data, log classes and schedule, and seed this process; all ranks must call this."""
    data = load_once(lambda: load_run_data(cfg))
    cfg = with_classes(without_masks(cfg) if data.boxes_only else cfg, len(data.class_names), data.class_names)
    cfg, sentences = scale_schedule(cfg, dist.world_size(), data.images)
    for sentence in [*sentences, format_schedule(cfg, data.images, dist.world_size())]:
        logger.info(sentence)
    if data.train and (advice := large_crop(cfg, np.concatenate([dataset.sizes for dataset in data.train]))):
        logger.warning(advice)
    seed = dist.broadcast(int(cfg.SEED) if cfg.SEED >= 0 else secrets.randbelow(2**31))
    logger.info("Seed %d%s.", seed, "" if cfg.SEED >= 0 else " (random; set SEED to repeat the run)")
    seed_everything(seed + dist.rank())
    return Prepared(cfg, data, seed, augment)


def with_classes(cfg: CfgNode, count: int, names: tuple[str, ...]) -> CfgNode:
    """Return a copy of ``cfg`` with number and names of classes; raise ConfigError if the number is unknown (0)."""
    if count < 1:
        raise ConfigError("the number of classes is unknown: set MODEL.ROI_HEADS.NUM_CLASSES or name a training json")
    return edited(cfg, {"MODEL.ROI_HEADS.NUM_CLASSES": count, "MODEL.CLASS_NAMES": tuple(names)})


def describe_model(cfg: CfgNode, model: nn.Module) -> None:
    """Log the norm census and the optimizer groups."""
    rows = norm_census(model)
    short = on_screen(f"Norm layers: {sum_census(rows)}")
    logger.info("Norm layers\n%s", indented(format_census(rows, frozen_by(cfg))), extra=short)
    if advice := half_gn(rows):
        logger.info(advice)
    if advice := high_rate(cfg):
        logger.warning(advice)
    table, sentence = format_groups(cfg, model)
    logger.info(table, extra=on_screen(f"Weight decay {cfg.SOLVER.WEIGHT_DECAY:g}; {sentence}"))


def load_initial(cfg: CfgNode, model: nn.Module, images: int) -> None:
    """Load MODEL.WEIGHTS and log the result, or raise WeightsError; warn about a short run from scratch."""
    if cfg.MODEL.WEIGHTS:
        logger.info(format_report(load_weights(model, cfg.MODEL.WEIGHTS, cfg)))
    else:
        logger.info("Training from scratch: MODEL.WEIGHTS is empty.")
    warn_if_short(cfg, images)


def warn_if_short(cfg: CfgNode, images: int) -> None:
    if advice := short_for_scratch(cfg, images):
        logger.warning(advice)


def prepare_folder(cfg: CfgNode, model: nn.Module, *, fresh: bool) -> None:
    """Prepare OUTPUT_DIR (rank 0): delete leftovers and, if ``fresh``, an earlier run, and write config.yaml.

    Raises:
        UserError: no space; raised on every rank.
    """
    folder = Path(cfg.OUTPUT_DIR)

    def prepare() -> None:
        remove_leftovers(folder)
        check_space(folder, model, replaced=fresh)
        if fresh:
            start_afresh(folder, keep=cfg.MODEL.WEIGHTS)
        atomic_write(folder / "config.yaml", dump_config(cfg))

    dist.on_first_rank(prepare)


# ------------------------------------------------------------ checks across keys


def check_freeze(cfg: CfgNode, *, strict: bool = True) -> None:
    """Refuse (or, if not strict, warn about) layers that would be frozen at random values."""
    if cfg.MODEL.WEIGHTS or not (cfg.MODEL.BACKBONE.FREEZE_AT > 0 or cfg.MODEL.FREEZE):
        return
    message = (
        f"{frozen_by(cfg)} would freeze layers at random values, but MODEL.WEIGHTS is empty; give MODEL.WEIGHTS, or "
        'set MODEL.BACKBONE.FREEZE_AT 0 MODEL.FREEZE "()" to train from scratch'
    )
    if strict:
        raise ConfigError(message)
    logger.warning(message)


def check_run(cfg: CfgNode, device: str, world_size: int) -> None:
    """Raise ConfigError for what cannot work on these devices, before a process is started or a file is written."""
    check_metric(cfg)
    check_loggers(cfg)
    if cfg.SOLVER.AUTO_BATCH and not device.startswith("cuda"):
        problem = f"SOLVER.AUTO_BATCH (--batch auto) needs a GPU, MODEL.DEVICE is {device}"
        raise ConfigError(f"{problem}; give a number, such as --batch 2")
    if (world := dist.planned_world_size(world_size)) > 0:
        scale_schedule(cfg, world, images=1)
    if cfg.SOLVER.AMP.ENABLED and cfg.SOLVER.AMP.DTYPE == "fp16" and not device.startswith("cuda"):
        raise ConfigError("SOLVER.AMP.DTYPE fp16 needs a GPU; use bf16 or SOLVER.AMP.ENABLED False")


def check_metric(cfg: CfgNode) -> None:
    """Raise ConfigError for a metric that no evaluation computes, and for TEST.PATIENCE without TEST.EVAL_PERIOD."""
    name = str(cfg.TEST.BEST_METRIC)
    if not re.search(r"(^|/)(bbox|segm)/AP(50|75|s|m|l|-.+)?$", name):
        raise ConfigError(
            f"TEST.BEST_METRIC is '{name}'; use bbox/ or segm/ with AP, AP50, AP75, APs, APm, APl or AP-NAME"
        )
    if cfg.TEST.PATIENCE > 0 and cfg.TEST.EVAL_PERIOD <= 0:
        raise ConfigError(f"TEST.PATIENCE {cfg.TEST.PATIENCE} counts evaluations; set TEST.EVAL_PERIOD too")
