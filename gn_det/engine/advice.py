"""Advice for runs that are likely to disappoint, or that ran out of memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from fvcore.common.config import CfgNode

from gn_det.engine import dist
from gn_det.engine.loop import Loop
from gn_det.engine.schedule import images_per_rank
from gn_det.errors import TrainingError, out_of_memory
from gn_det.modeling.census import CensusRow
from gn_det.text import count, one_line

#: Parts besides the backbone, to which the res5 head of C4 belongs.
_KEYS = {"fpn": "MODEL.FPN.NORM", "box head": "MODEL.ROI_BOX_HEAD.NORM", "mask head": "MODEL.ROI_MASK_HEAD.NORM"}
#: Epochs of Detectron2's 3x schedule on COCO; published training from scratch took this many, or three times as many.
_SCRATCH_EPOCHS = 36
#: Rates of published detectors trained by AdamW are 1e-4 to 2e-4.
_MOST_OF_ADAMW = 0.001


def half_gn(rows: Sequence[CensusRow]) -> str:
    """Return a sentence for a model with GN in only some of its parts; "" if it has GN everywhere or nowhere.

    The RPN does not count: no published model has a norm there.
    """
    kinds: dict[str, set[str]] = {}
    for row in rows:
        if row.stage != "rpn":
            kinds.setdefault(row.stage if row.stage in _KEYS else "backbone", set()).add(row.norm)
    others = {part: found for part, found in kinds.items() if found != {"GN"}}
    if not others or not any("GN" in found for found in kinds.values()):
        return ""
    parts = ", ".join(f"{part}: {' and '.join(sorted(found))}" for part, found in others.items())
    keys = ", ".join(f"{_KEYS.get(part, 'MODEL.RESNETS.NORM')} GN" for part in others)
    return f"Only part of the model has GN ({parts}); the published GN models use it everywhere: {keys}."


def short_for_scratch(cfg: CfgNode, images: int) -> str:
    """Return a sentence for a scaled ``cfg`` of a run from scratch, far shorter than published ones; "" for others."""
    generated = not cfg.DATASETS.TRAIN_JSON and all(name.startswith("shapes_") for name in cfg.DATASETS.TRAIN)
    if cfg.MODEL.WEIGHTS or images <= 0 or generated:
        return ""
    epochs = cfg.SOLVER.MAX_ITER * cfg.SOLVER.IMS_PER_BATCH / images
    if epochs >= _SCRATCH_EPOCHS:
        return ""
    return (
        f"MODEL.WEIGHTS is empty and the run has {epochs:.1f} epochs; published runs from scratch have at least "
        f"{_SCRATCH_EPOCHS} (of COCO): give pretrained weights (--weights), "
        f"or train longer (--epochs {_SCRATCH_EPOCHS})."
    )


def high_rate(cfg: CfgNode) -> str:
    """A sentence for AdamW with a learning rate of SGD's size, which it does not survive; "" otherwise."""
    solver = cfg.SOLVER
    if solver.OPTIMIZER != "ADAMW" or solver.BASE_LR <= _MOST_OF_ADAMW:
        return ""
    return (
        f"SOLVER.BASE_LR {solver.BASE_LR:g} is a learning rate for SGD; AdamW takes about 0.0001 (SOLVER.BASE_LR "
        "0.0001, SOLVER.WEIGHT_DECAY 0.05)."
    )


def large_crop(cfg: CfgNode, sizes: np.ndarray) -> str:
    """Return a sentence for absolute crops larger than training images of ``sizes`` (N, 2) width, height; else ""."""
    crop = cfg.INPUT.CROP
    if not crop.ENABLED or not crop.TYPE.startswith("absolute") or cfg.INPUT.LSJ.ENABLED:
        return ""
    height, width = crop.SIZE
    smaller = int((sizes < (width, height)).any(axis=1).sum())
    if not smaller:
        return ""
    return (
        f"INPUT.CROP.SIZE [{height:g}, {width:g}] (height, width) is larger than {smaller:,} of "
        f"{count(len(sizes), 'image')}, which keep that side whole; lower it."
    )


# ------------------------------------------------------------ memory


@contextmanager
def explain_oom(cfg: CfgNode, loop: Loop) -> Iterator[None]:
    """Turn errors of the allocators of GPU and host into a TrainingError of one line that says what to lower."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        if not out_of_memory(error):
            raise
        raise TrainingError(_no_memory(cfg, loop, error)) from error


def _no_memory(cfg: CfgNode, loop: Loop, error: BaseException) -> str:
    text = f"out of memory at iteration {loop.state.iteration + 1} ({one_line(error, 200)})"
    if not loop.state.model.training:
        shorter, longer = _four_fifths(cfg.INPUT.MIN_SIZE_TEST), _four_fifths(cfg.INPUT.MAX_SIZE_TEST)
        return (
            f"{text} while evaluating: set INPUT.MIN_SIZE_TEST {shorter} INPUT.MAX_SIZE_TEST {longer} (36% fewer "
            "pixels), or lower TEST.DETECTIONS_PER_IMAGE; then continue with --resume"
        )
    batch = _describe_batch(loop.current.batch if loop.current is not None else ())
    again = "continue with --resume" if loop.state.saved else "start again"
    return f"{text} in a batch of {batch}: {'; or '.join(_smaller(cfg))}; then {again}"


def _four_fifths(side: int) -> int:
    return round(int(side) * 0.8)


def _smaller(cfg: CfgNode) -> list[str]:
    """Return what to lower, and to what; what changes the result least comes first."""
    images, accumulate = images_per_rank(cfg, dist.world_size()), int(cfg.SOLVER.ACCUMULATE)
    out = []
    if images > 1:
        factor = next(f for f in range(2, images + 1) if images % f == 0)
        out.append(
            f"set SOLVER.ACCUMULATE {accumulate * factor} (the same batch, {images // factor} instead of {images} "
            "images on a device at a time)"
        )
    if not cfg.SOLVER.AMP.ENABLED:
        out.append("set SOLVER.AMP.ENABLED True (activations take up to half the memory)")
    sizes, longest = tuple(map(_four_fifths, cfg.INPUT.MIN_SIZE_TRAIN)), _four_fifths(cfg.INPUT.MAX_SIZE_TRAIN)
    return [*out, f'set INPUT.MIN_SIZE_TRAIN "{sizes}" INPUT.MAX_SIZE_TRAIN {longest} (36% fewer pixels)']


def _describe_batch(batch: Sequence[Any]) -> str:
    """Describe a micro-batch of either engine: number, size and objects."""
    height, width = (max((s["image"].shape[axis] for s in batch), default=0) for axis in (-2, -1))
    objects = sum(len(s.get("targets", s.get("instances", ()))) for s in batch)
    return f"{count(len(batch), 'image')} padded to {height}x{width}, with {count(objects, 'object')}"
