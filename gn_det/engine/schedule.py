"""Learning rate schedule, and the rules that adapt it to batch, GPUs and epochs.

The learning rate multiplier is Detectron2's: a multi-step, cosine or fixed-gamma curve over the whole run, whose first
``WARMUP_ITERS`` iterations are replaced by a ramp that ends on the curve.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Collection

import torch
from fvcore.common import param_scheduler as curves
from fvcore.common.config import CfgNode
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from gn_det.config.defaults import edited, get_value, set_value
from gn_det.data.split import held_out
from gn_det.errors import ConfigError
from gn_det.text import count

#: More epochs cause a remark; an automatic length is between the two, by the total number of images seen.
_LEAST_EPOCHS, _MANY_EPOCHS, _DEFAULT_IMAGES = 12, 100, 6000


def _main_curve(cfg: CfgNode) -> curves.ParamScheduler:
    """Return the curve without warm-up, a function of progress in [0, 1] that starts at 1."""
    solver = cfg.SOLVER
    if solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR":
        steps = [s for s in solver.STEPS if s <= solver.MAX_ITER]
        values = [solver.GAMMA**k for k in range(len(steps) + 1)]
        return curves.MultiStepParamScheduler(values=values, milestones=steps, num_updates=solver.MAX_ITER)
    if solver.LR_SCHEDULER_NAME == "WarmupCosineLR":
        end = solver.BASE_LR_END / solver.BASE_LR
        if end > 1.0:
            raise ConfigError(f"SOLVER.BASE_LR_END {solver.BASE_LR_END:g} must not exceed SOLVER.BASE_LR")
        return curves.CosineParamScheduler(1, end)
    return curves.StepWithFixedGammaParamScheduler(
        base_value=1.0, gamma=solver.GAMMA, num_decays=solver.NUM_DECAYS, num_updates=solver.MAX_ITER
    )


def lr_multiplier(cfg: CfgNode) -> Callable[[int], float]:
    """Return the learning rate factor of all groups as a function of the 0-based iteration in [0, MAX_ITER]."""
    solver, max_iter = cfg.SOLVER, int(cfg.SOLVER.MAX_ITER)
    curve = _main_curve(cfg)
    length = min(solver.WARMUP_ITERS / max_iter, 1.0)
    start = solver.WARMUP_FACTOR * curve(0.0)
    ramp: curves.ParamScheduler = curves.ConstantParamScheduler(start)
    if solver.WARMUP_METHOD == "linear":
        ramp = curves.LinearParamScheduler(start, curve(0.0) if solver.RESCALE_INTERVAL else curve(length))
    whole = curves.CompositeParamScheduler(
        [ramp, curve],
        lengths=[length, 1 - length],
        interval_scaling=["rescaled", "rescaled" if solver.RESCALE_INTERVAL else "fixed"],
    )
    # The scheduler is stepped once more after the last iteration, where the fixed-gamma curve is undefined.
    return lambda iteration: whole(min(iteration, max_iter - 1) / max_iter)


def build_lr_scheduler(cfg: CfgNode, optimizer: torch.optim.Optimizer) -> LambdaLR:
    """Build a scheduler to step once per iteration; at iteration i each group has ``lr * lr_multiplier(cfg)(i)``."""
    return LambdaLR(optimizer, lr_multiplier(cfg))


def set_iteration(scheduler: LRScheduler, iteration: int) -> None:
    """Move a scheduler to ``iteration`` and write the learning rates that belong there into its optimizer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch means step() to be called without a number
        scheduler.step(iteration)


def _scale_iterations(cfg: CfgNode, scale: float, literal: Collection[str]) -> None:
    """Divide length, periods and steps by ``scale``, except the keys in ``literal``; no period becomes 0."""
    for name in ("SOLVER.MAX_ITER", "TEST.EVAL_PERIOD", "SOLVER.CHECKPOINT_PERIOD"):
        if name not in literal and get_value(cfg, name) > 0:
            set_value(cfg, name, max(round(get_value(cfg, name) / scale), 1))
    if "SOLVER.STEPS" not in literal:
        cfg.SOLVER.STEPS = tuple(round(s / scale) for s in cfg.SOLVER.STEPS)


def _scale_all(cfg: CfgNode, scale: float, literal: Collection[str]) -> str:
    """Scale learning rate and iterations; return a description of the changes.

    If the user gave MAX_ITER, nothing counted in iterations is scaled.
    """
    solver = cfg.SOLVER
    lr, iterations = solver.BASE_LR, solver.MAX_ITER
    rate = f"learning rate {lr:g} as given"
    if "SOLVER.BASE_LR" not in literal:
        solver.BASE_LR, solver.BASE_LR_END = lr * scale, solver.BASE_LR_END * scale
        rate = f"learning rate scaled linearly {lr:g} -> {solver.BASE_LR:g}"
    if "SOLVER.MAX_ITER" in literal:
        return f"{rate}, {iterations} iterations as given"
    _scale_iterations(cfg, scale, literal)
    if "SOLVER.WARMUP_ITERS" not in literal:
        solver.WARMUP_ITERS = round(solver.WARMUP_ITERS / scale)
    return f"{rate}, {iterations} -> {solver.MAX_ITER} iterations (the same epochs), {_steps_and_warmup(cfg)}"


def _steps_and_warmup(cfg: CfgNode) -> str:
    return f"steps {tuple(cfg.SOLVER.STEPS)}, warm-up {cfg.SOLVER.WARMUP_ITERS} iterations"


def _for_world_size(cfg: CfgNode, world_size: int, literal: Collection[str]) -> list[str]:
    """Detectron2's ``auto_scale_workers``: batch and lr scale with the number of GPUs, iterations inversely."""
    solver = cfg.SOLVER
    reference, end = solver.REFERENCE_WORLD_SIZE, solver.BASE_LR_END
    if reference <= 0 or reference == world_size:
        return []
    solver.REFERENCE_WORLD_SIZE = world_size
    if solver.AUTO_BATCH or "SOLVER.IMS_PER_BATCH" in literal:  # SOLVER.REFERENCE_BATCH scales the rest
        return []
    if solver.IMS_PER_BATCH % reference:
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH {solver.IMS_PER_BATCH} is not a multiple of SOLVER.REFERENCE_WORLD_SIZE {reference}"
            ": set SOLVER.REFERENCE_WORLD_SIZE 0 to use batch, learning rate and iterations unchanged"
        )
    scale, batch = world_size / reference, solver.IMS_PER_BATCH
    solver.IMS_PER_BATCH = round(batch * scale)
    if solver.REFERENCE_BATCH > 0:  # with both rules, the reference scales with batch and lr
        solver.REFERENCE_BATCH = round(solver.REFERENCE_BATCH * scale)
    scaled = _scale_all(cfg, scale, literal)
    solver.BASE_LR_END = end  # Detectron2 does not scale it
    return [
        f"Written for {reference} GPUs, running on {world_size} (SOLVER.REFERENCE_WORLD_SIZE, 0 turns this off): "
        f"batch {batch} -> {solver.IMS_PER_BATCH}, {scaled}."
    ]


def _for_batch(cfg: CfgNode, literal: Collection[str]) -> list[str]:
    """Scale linearly from the batch that the schedule was written for."""
    reference, batch = cfg.SOLVER.REFERENCE_BATCH, cfg.SOLVER.IMS_PER_BATCH
    if reference <= 0 or reference == batch:
        return []
    cfg.SOLVER.REFERENCE_BATCH = batch
    return [
        f"Written for a batch of {reference}, running with {batch} (SOLVER.REFERENCE_BATCH, 0 turns this off): "
        f"{_scale_all(cfg, batch / reference, literal)}."
    ]


def _choose_epochs(cfg: CfgNode, images: int, literal: Collection[str]) -> list[str]:
    """Choose SOLVER.EPOCHS for small datasets, which the schedule of a published set would repeat too often."""
    solver = cfg.SOLVER
    planned = solver.EPOCHS or solver.MAX_ITER * solver.IMS_PER_BATCH / max(images, 1)
    if not cfg.DATASETS.TRAIN_JSON or images <= 0 or planned <= _MANY_EPOCHS:
        return []
    if solver.EPOCHS or not solver.AUTO_EPOCHS or "SOLVER.MAX_ITER" in literal:
        return [
            f"The run passes {planned:,.0f} times over {count(images, 'image')}: small sets overfit long before; try "
            "--epochs 30, or stop early with TEST.PATIENCE 5."
        ]
    solver.EPOCHS = float(min(max(round(_DEFAULT_IMAGES / images), _LEAST_EPOCHS), _MANY_EPOCHS))
    return [
        f"Length chosen for {count(images, 'image')}: {solver.EPOCHS:g} epochs (the schedule of the config would take "
        f"{planned:,.0f}); --epochs sets another."
    ]


def _for_epochs(cfg: CfgNode, images: int, literal: Collection[str]) -> list[str]:
    """Set MAX_ITER from epochs; steps and periods keep their proportions; warm-up is at most a tenth of a short run."""
    solver = cfg.SOLVER
    if solver.EPOCHS <= 0:
        return []
    if images <= 0:
        raise ConfigError(f"SOLVER.EPOCHS {solver.EPOCHS:g} needs a training set; set SOLVER.MAX_ITER instead")
    iterations, before = max(round(solver.EPOCHS * images / solver.IMS_PER_BATCH), 1), solver.MAX_ITER
    if iterations == before:
        return []
    _scale_iterations(cfg, before / iterations, literal)
    solver.MAX_ITER = iterations
    epoch = images / solver.IMS_PER_BATCH
    for name in ("TEST.EVAL_PERIOD", "SOLVER.CHECKPOINT_PERIOD"):
        period = get_value(cfg, name)
        if period > 0 and name not in literal and solver.EPOCHS >= 1:  # whole epochs, at most 20 times
            epochs = max(round(period / epoch), math.ceil(solver.EPOCHS / 20), 1)
            set_value(cfg, name, max(round(epochs * epoch), 1))
    if "SOLVER.WARMUP_ITERS" not in literal and iterations < before:
        solver.WARMUP_ITERS = min(solver.WARMUP_ITERS, iterations // 10)
    return [
        f"SOLVER.EPOCHS {solver.EPOCHS:g} over {images} images in batches of {solver.IMS_PER_BATCH}: "
        f"{before} -> {iterations} iterations, {_steps_and_warmup(cfg)}."
    ]


def scale_schedule(cfg: CfgNode, world_size: int, images: int) -> tuple[CfgNode, list[str]]:
    """Adapt a schedule to the number of GPUs, the batch and the epochs, in this order.

    No rule changes the keys in ``SOLVER.NO_RESCALE`` (those given on the command line); without such keys, the GPU rule
    is Detectron2's.

    Args:
        world_size: number of processes, one GPU each.
        images: training images in an epoch; only used with ``SOLVER.EPOCHS``.

    Returns:
        A copy, and one sentence for each adjustment. Applying it to the result changes nothing.

    Raises:
        ConfigError: the batch is not divisible, or SOLVER.EPOCHS is set without a training set.
    """
    cfg = edited(cfg)
    literal = tuple(cfg.SOLVER.NO_RESCALE)
    sentences = _for_world_size(cfg, world_size, literal) + _for_batch(cfg, literal)
    sentences += _choose_epochs(cfg, images, literal) + _for_epochs(cfg, images, literal)
    solver = cfg.SOLVER
    late = [s for s in solver.STEPS if s > solver.MAX_ITER]
    if late and solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR":
        kept = tuple(round(s / (solver.STEPS[-1] * 1.1) * solver.MAX_ITER) for s in solver.STEPS)
        hint = f': the learning rate never drops; SOLVER.STEPS "{kept}" would lower it in time'
        sentences.append(
            f"SOLVER.STEPS {tuple(late)} are beyond the last iteration {solver.MAX_ITER} and are ignored"
            f"{hint if len(late) == len(solver.STEPS) else ''}."
        )
    if solver.WARMUP_ITERS >= solver.MAX_ITER:
        sentences.append(
            f"The warm-up of {solver.WARMUP_ITERS} iterations covers the whole run of {solver.MAX_ITER}: the learning "
            "rate never reaches SOLVER.BASE_LR; lower SOLVER.WARMUP_ITERS."
        )
    images_per_rank(cfg, world_size)
    return cfg, sentences


def images_per_rank(cfg: CfgNode, world_size: int) -> int:
    """Return images per micro-batch of a GPU, ``IMS_PER_BATCH / (world_size * ACCUMULATE)``, or raise ConfigError."""
    batch, accumulate = int(cfg.SOLVER.IMS_PER_BATCH), int(cfg.SOLVER.ACCUMULATE)
    parts = world_size * accumulate
    if batch < parts or batch % parts:
        raise ConfigError(
            f"SOLVER.IMS_PER_BATCH {batch} cannot be shared by {count(world_size, 'process', 'processes')} x "
            f"SOLVER.ACCUMULATE {accumulate}; use a multiple of {parts}, such as {max(round(batch / parts), 1) * parts}"
        )
    return batch // parts


def format_schedule(cfg: CfgNode, images: int, world_size: int = 0) -> str:
    """Describe the schedule in a few lines; ``images`` 0 omits epochs, ``world_size`` 0 describes it as configured."""
    solver = cfg.SOLVER

    def both(iterations: int) -> str:
        if images <= 0:
            return f"{iterations} iterations"
        return f"{iterations} iterations ({iterations * solver.IMS_PER_BATCH / images:.2f} epochs)"

    batch = f"batch {solver.IMS_PER_BATCH}"
    if world_size:
        micro = f"{solver.ACCUMULATE} micro-batches × " if solver.ACCUMULATE > 1 else ""
        images_each = count(images_per_rank(cfg, world_size), "image")
        batch += f" ({count(world_size, 'process', 'processes')} × {micro}{images_each})"
    lines = [
        f"Schedule: {solver.LR_SCHEDULER_NAME}, {both(solver.MAX_ITER)}, {batch}",
        f"  learning rate {solver.BASE_LR:g}, {solver.WARMUP_METHOD} warm-up over {both(solver.WARMUP_ITERS)}",
    ]
    if solver.LR_SCHEDULER_NAME == "WarmupMultiStepLR":
        steps = ", ".join(both(s) for s in solver.STEPS if s <= solver.MAX_ITER)
        lines.append(f"  times {solver.GAMMA:g} after {steps or 'no iteration: constant'}")
    period = cfg.TEST.EVAL_PERIOD
    if cfg.DATASETS.TEST or cfg.DATASETS.VAL_JSON or held_out(cfg):
        lines.append(f"  evaluation {'every ' + both(period) + ' and ' if period > 0 else ''}at the end")
    else:
        lines.append("  no evaluation: no test set")
    return "\n".join(lines)
