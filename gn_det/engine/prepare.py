"""What a training run needs before there is a model: data, classes, the schedule for this machine, a seed."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fvcore.common.config import CfgNode

from gn_det.data.sets import RunData, load_run_data
from gn_det.engine import dist
from gn_det.engine.schedule import format_schedule, images_per_rank, scale_schedule
from gn_det.engine.state import seed_everything
from gn_det.errors import ConfigError, UserError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to build its model.

    Attributes:
        cfg: with the classes of the data and the schedule for this number of processes.
        data: training and test sets.
        seed: of initialisation and data stream; equal on every rank.
    """

    cfg: CfgNode
    data: RunData
    seed: int

    def make_loader(self, start_batch: int, seed: int) -> Iterable[Any]:
        """This rank's endless micro-batches from ``start_batch`` on; see :data:`gn_det.engine.fit.LoaderFactory`."""
        from gn_det.data.loader import build_train_loader

        world = dist.world_size()
        loader = build_train_loader(
            self.cfg,
            self.data.train,
            images_per_rank=images_per_rank(self.cfg, world),
            start_batch=start_batch,
            rank=dist.rank(),
            world_size=world,
            seed=seed,
        )
        logger.info(loader.summary())
        return loader


def prepare(cfg: CfgNode) -> Prepared:
    """Read the data, settle classes and schedule, seed this process; all ranks together, and say what was settled.

    Raises:
        UserError: the data cannot be used, or the configuration does not fit it; the same on every rank.
    """
    data = _load_together(cfg)
    cfg = with_classes(cfg, len(data.class_names), data.class_names)
    cfg, sentences = scale_schedule(cfg, dist.world_size(), data.images)
    for sentence in sentences:
        logger.info(sentence)
    logger.info(format_schedule(cfg, data.images, dist.world_size()))
    seed = dist.broadcast(int(cfg.SEED) if cfg.SEED >= 0 else secrets.randbelow(2**31))
    logger.info("Seed %d%s.", seed, "" if cfg.SEED >= 0 else " (drawn; SEED repeats the run)")
    seed_everything(seed + dist.rank())
    return Prepared(cfg, data, seed)


def _load_together(cfg: CfgNode) -> RunData:
    """Rank 0 first: generated sets are made by one process."""
    problem: UserError | None = None
    if dist.rank() == 0:
        try:
            data = load_run_data(cfg)
        except UserError as error:
            problem = error
    problem = dist.broadcast(problem)  # the others would wait for a partner that is gone
    if problem is not None:
        raise problem
    return data if dist.rank() == 0 else load_run_data(cfg)


def with_classes(cfg: CfgNode, count: int, names: tuple[str, ...]) -> CfgNode:
    """``cfg`` with the number and names of classes filled in.

    Raises:
        ConfigError: the number is unknown (0).
    """
    if count < 1:
        raise ConfigError("the number of classes is not known: set MODEL.ROI_HEADS.NUM_CLASSES or name a training json")
    frozen = cfg.is_frozen()
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = count
    cfg.MODEL.CLASS_NAMES = tuple(names)
    if frozen:
        cfg.freeze()
    return cfg
