"""SOLVER.AUTO_BATCH: put as many images on the GPU at a time as fit, without changing the batch of the config.

A batch that does not fit is divided into micro-batches (SOLVER.ACCUMULATE). With GN this changes only memory and time,
because no layer combines several images.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress

import torch
from fvcore.common.config import CfgNode
from torch import nn

from gn_det.config.defaults import edited
from gn_det.engine import dist
from gn_det.engine.precision import DTYPES, lay_out
from gn_det.engine.schedule import images_per_rank
from gn_det.engine.state import capture_rng, restore_rng
from gn_det.errors import ConfigError
from gn_det.structures import Masks, Sample, Targets

logger = logging.getLogger(__name__)

#: Share of the memory for a trial; the rest is for fragmentation and images with more objects.
_SHARE = 0.85
_OBJECTS = 50


def largest_fit(choices: Sequence[int], peak: Callable[[int], int], limit: int) -> int:
    """Return the first of ``choices`` (numbers of images, descending) whose training step fits; 0 if none does.

    Args:
        peak: bytes that a step on that many images takes at most; may raise torch.OutOfMemoryError.
        limit: bytes that it may take.
    """
    for images in choices:
        with suppress(torch.OutOfMemoryError):
            if peak(images) <= limit:
                return images
    return 0


def trial_batch(cfg: CfgNode, images: int) -> list[Sample]:
    """Return ``images`` gray samples of the largest training size, each with 50 objects."""
    longest = max(cfg.INPUT.MIN_SIZE_TRAIN)
    height, width = longest, max(longest, cfg.INPUT.MAX_SIZE_TRAIN)
    if cfg.INPUT.LSJ.ENABLED:
        height = width = cfg.INPUT.LSJ.SIZE
    corners = torch.arange(_OBJECTS) * (min(height, width) / (2 * _OBJECTS))
    boxes = torch.stack([corners, corners, corners + height / 3, corners + height / 3], dim=1)
    masks = Masks([[box[[0, 1, 2, 1, 2, 3, 0, 3]].double().numpy()] for box in boxes])
    targets = Targets((height, width), boxes, torch.zeros(_OBJECTS, dtype=torch.int64), masks)
    image = torch.full((len(cfg.MODEL.PIXEL_MEAN), height, width), 128, dtype=torch.uint8)
    return [{"image": image, "height": height, "width": width, "targets": targets} for _ in range(images)]


def train_once(cfg: CfgNode, model: nn.Module, images: int) -> None:
    """Run forward and backward pass of a trial batch and drop the gradients; may raise torch.OutOfMemoryError."""
    autocast = DTYPES[cfg.SOLVER.AMP.DTYPE] if cfg.SOLVER.AMP.ENABLED is True else None
    kind = next(model.parameters()).device.type
    try:
        with torch.autocast(kind, autocast, autocast is not None):
            losses = model(trial_batch(cfg, images))
        sum(losses.values()).backward()
    finally:
        model.zero_grad(set_to_none=True)


def choose_accumulate(cfg: CfgNode, model: nn.Module) -> CfgNode:
    """Return ``cfg`` with the smallest SOLVER.ACCUMULATE that fits on the GPUs of this run; all ranks must call this.

    Args:
        cfg: after :func:`gn_det.engine.schedule.scale_schedule`.
        model: model on the CPU; a copy is tried, and random streams do not change.

    Raises:
        ConfigError: a single image does not fit.
    """
    total = images_per_rank(cfg, dist.world_size()) * int(cfg.SOLVER.ACCUMULATE)
    device = torch.device(dist.local_device(cfg.MODEL.DEVICE))
    streams, trial = capture_rng(), lay_out(copy.deepcopy(model).train().to(device), cfg)
    # Beside the step: the optimizer's averages, the moving average of the weights, and the buckets of several GPUs.
    per_weight = (2 if cfg.SOLVER.OPTIMIZER == "ADAMW" else 1) + bool(cfg.SOLVER.EMA.ENABLED) + (dist.world_size() > 1)
    beside = 4 * per_weight * sum(p.numel() for p in model.parameters())
    limit = int(_SHARE * (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_allocated(device))) - beside

    def peak(images: int) -> int:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        train_once(cfg, trial, images)
        return torch.cuda.max_memory_allocated(device)

    found = largest_fit([n for n in range(total, 0, -1) if total % n == 0], peak, limit)
    torch.cuda.empty_cache()
    restore_rng(streams)
    fits = min(row[0] for row in dist.gather_rows(torch.tensor([float(found)], device=device)))
    return with_accumulate(cfg, total, int(fits))


def with_accumulate(cfg: CfgNode, total: int, fits: int) -> CfgNode:
    """Return ``cfg`` with ``total`` images in micro-batches of at most ``fits``; raise ConfigError if that is 0."""
    if not fits:
        raise ConfigError(
            "SOLVER.AUTO_BATCH: a training step on a single image does not fit into the memory of the GPU; lower "
            "INPUT.MIN_SIZE_TRAIN and INPUT.MAX_SIZE_TRAIN, or set SOLVER.AMP.ENABLED or MODEL.BACKBONE.RECOMPUTE True"
        )
    images = max(n for n in range(1, fits + 1) if total % n == 0)
    cfg = edited(cfg, {"SOLVER.AUTO_BATCH": False, "SOLVER.ACCUMULATE": total // images})
    accumulate = cfg.SOLVER.ACCUMULATE
    logger.info("SOLVER.AUTO_BATCH: SOLVER.ACCUMULATE is %d (%d of %d images fit).", accumulate, images, total)
    return cfg
