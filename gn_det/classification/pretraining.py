"""``gn-det classify``: one run from settings to a weights file and a summary."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from gn_det.checkpoint.last import remove_leftovers
from gn_det.classification.classifier_loop import (
    LAST,
    ClassifierLoop,
    ClassifierLoss,
    Epochs,
    Plan,
    Progressed,
    final_test,
    summarize,
    write_weights,
)
from gn_det.classification.clip_sources import load_videos
from gn_det.classification.earlier_run import SUMMARY, finished, refuse_old, restore, settings_of
from gn_det.classification.image_sources import Batch, Source, epoch_batches, open_images
from gn_det.classification.inflated import InflatedResNet, inflate_
from gn_det.classification.motions import load_motions
from gn_det.classification.network import Classifier, build_classifier, build_optimizer
from gn_det.classification.other_norms import RenormLimits
from gn_det.classification.recording import Recorder, layer_of
from gn_det.classification.settings import BUILTIN, VGG, Settings, base_lr, lr_factor, reference
from gn_det.data.workers import worker_failure
from gn_det.engine import dist
from gn_det.engine.hooks import Schedule
from gn_det.engine.log import FILE_ONLY, run_log
from gn_det.engine.loggers import TensorBoardLogger
from gn_det.engine.loop import make_scaler, parallel
from gn_det.engine.output import FINAL, alone_in
from gn_det.engine.precision import DTYPES
from gn_det.engine.scalars import Metrics
from gn_det.engine.schedule import set_iteration
from gn_det.engine.state import TrainState, seed_everything
from gn_det.errors import ConfigError, DataError, TrainingError, UserError, out_of_memory
from gn_det.files import atomic_write, check_writable, json_bytes
from gn_det.modeling.precise_bn import precise_bn
from gn_det.terminal import say
from gn_det.text import as_line, count

logger = logging.getLogger(__name__)


def pretrain(settings: Settings, *, resume: bool = False, overwrite: bool = False, num_gpus: int = 1) -> dict[str, Any]:
    """Train a classifier from scratch.

    ``<output>`` gets ``model_final.pth`` and ``model_best.pth`` (weights for MODEL.WEIGHTS), ``last.ckpt`` after every
    epoch, ``metrics.jsonl``, TensorBoard events, ``log.txt``, and at the very end ``summary.json``.

    Args:
        resume: continue after the last finished epoch; without one, start; if all are done, return the summary.
        overwrite: replace an earlier run in the folder.
        num_gpus: processes on this machine, one GPU each (on a CPU: plain processes); torchrun decides by itself.

    Returns:
        The content of ``summary.json``.

    Raises:
        UserError: settings, data or folder cannot be used; the training diverged.
    """
    device = _check(settings)
    folder = check_writable(settings.output, "--output")
    settings = settings.settled(device, settings_of(folder) if resume else {})
    if not resume:
        refuse_old(folder, overwrite)
    elif (done := finished(folder, settings)) is not None:
        say(f"{folder}: finished already, top-1 error {done['top1_error']:.2f} %.")
        return done
    return dist.launch(_rank, (settings, resume, overwrite), device=device, num_gpus=num_gpus)


def dry_run(settings: Settings, *, num_gpus: int = 1) -> None:
    """Print data, network and recipe of a run; raise UserError if they cannot be used."""
    device = _check(settings)
    with run_log(None):
        _prepare(settings.settled(device, {}), dist.planned_world_size(num_gpus))
        logger.info(
            "Device: %s\nOutput: %s\nDry run: nothing was trained or written.", device, as_line(settings.output)
        )


def _check(settings: Settings) -> str:
    """Refuse what can be refused before a folder is made and processes are started; return the device."""
    device = dist.resolve_device(settings.device, "classify device")
    for name, value, other in (("amp", "fp16", "bf16 or off"), ("norm", "SyncBN", "BN")):
        if getattr(settings, name) == value and not device.startswith("cuda"):
            raise ConfigError(f"classify {name} is {value}, which needs a GPU; use {other}")
    if settings.source not in BUILTIN and not Path(settings.data).expanduser().is_dir():
        raise DataError(
            f"classify data {settings.data!r}: no such folder; give one with train/<class>/* and val/<class>/*, or "
            f"{' or '.join(BUILTIN)}"
        )
    with torch.device("meta"):
        build_classifier(settings, 2)
    return device


# ------------------------------------------------------------ in each process


def _rank(settings: Settings, resume: bool, overwrite: bool) -> dict[str, Any]:
    with alone_in(settings.output, key="--output"), run_log(settings.output, rank=dist.rank()):
        try:
            if not resume:
                dist.on_first_rank(partial(_clear, Path(settings.output), overwrite))
            return _train(settings, resume)
        except UserError as error:
            logger.error("stopped: %s", error, extra=FILE_ONLY)
            raise
        except (RuntimeError, MemoryError) as error:
            if out_of_memory(error):
                what = f"out of memory with batch_size {settings.batch_size}"
                raise TrainingError(f"{what}: lower it, or use amp bf16") from error
            if isinstance(error, RuntimeError) and (failure := worker_failure(error)):
                raise failure from error
            raise
        except (KeyboardInterrupt, SystemExit):
            logger.info("Interrupted; rerun with --resume to continue after the last finished epoch.")
            raise


def _clear(folder: Path, overwrite: bool) -> None:
    for file in refuse_old(folder, overwrite):
        file.unlink()


def _train(settings: Settings, resume: bool) -> dict[str, Any]:
    folder, device = Path(settings.output), dist.local_device(settings.device)
    processes = dist.world_size()
    source, model, plan = _prepare(settings, processes)
    if device.startswith("cuda"):
        torch.backends.cudnn.benchmark = True  # all images have one size
        torch.cuda.reset_peak_memory_stats()
    loss = ClassifierLoss(model, source.input).to(device)
    if settings.channels_last:
        model.to(memory_format=torch.channels_last_3d if settings.of_clips else torch.channels_last)
    optimizer = build_optimizer(settings, model, plan.lr)
    scheduler = LambdaLR(optimizer, lambda iteration: lr_factor(settings, iteration, plan.total, processes))
    autocast = DTYPES.get(settings.amp)
    state = TrainState(model, optimizer, scheduler, settings.seed, make_scaler(autocast, torch.device(device).type))
    done = Progressed()
    if resume and (folder / LAST).is_file():
        done = restore(folder / LAST, settings, state)
        logger.info("Resumed from %s: epoch %d of %d is done.", folder / LAST, done.epochs, plan.epochs)
    elif resume:
        logger.info("--resume: %s holds no %s; the run starts from the beginning.", folder, LAST)
    state.iteration = min(done.epochs * plan.per_epoch, plan.total) - 1
    set_iteration(scheduler, state.iteration + 1)
    if dist.rank() == 0:
        remove_leftovers(folder)
    metrics = Metrics([TensorBoardLogger(folder, state.iteration)] if dist.rank() == 0 else [])
    metrics.DIVERGED = math.inf  # its advice names keys of detection
    if done.epochs < plan.epochs:
        hooks = [Schedule(), metrics, Epochs(settings, source, plan, loss, done, folder)]
        hooks += [RenormLimits(settings)] if settings.norm == "BR" else []
        if settings.record is not None and dist.rank() == 0:
            layer = layer_of(model.trunk, settings.record)
            hooks.insert(0, Recorder(layer, done.recorded, total=plan.total, per_epoch=plan.per_epoch))
        loop = ClassifierLoop(state, parallel(loss), hooks, total=plan.total, autocast=autocast)
        loop.run(partial(_batches, settings, source, plan, done.epochs))
    weights = folder / FINAL
    tested = _test(settings, source, plan, loss, autocast) if settings.of_clips else {}
    summary = {**summarize(settings, done, model, weights, device), **tested}
    if dist.rank() == 0:
        facts = {"epoch": done.epochs, "top1_error": summary["top1_error"], "date": summary["date"]}
        write_weights(weights, model, settings, source, facts)
        atomic_write(folder / SUMMARY, json_bytes(summary, indent=1))
    if tested:
        crops = f"{settings.test_clips} clips × {settings.test_crops} crops"
        more = f"top-5 error {tested['top5_error']:.2f} % ({tested['test_videos']:.0f} videos, {crops})"
    else:
        epochs = count(summary["median_of_epochs"], "epoch")
        more = f"the median of the last {epochs}, best {done.best['val_error']:.2f} %"
    logger.info("Top-1 error %.2f %%, %s. Weights: %s", summary["top1_error"], more, weights)
    return summary


def _test(
    settings: Settings, source: Source, plan: Plan, loss: ClassifierLoss, autocast: torch.dtype | None
) -> dict[str, float]:
    """Errors of the final test on videos, with precise statistics of BN."""
    if settings.precise_bn:
        loss.train()
        batches = islice(_batches(settings, source, replace(plan, total=10**12), plan.epochs), settings.precise_bn)
        with torch.autocast(loss.mistakes.device.type, autocast, enabled=autocast is not None):
            precise_bn(loss.classifier, loss, batches)
    return final_test(loss, source, autocast)


def _batches(settings: Settings, source: Source, plan: Plan, first: int) -> Iterator[Batch]:
    """Training batches of this process from epoch ``first`` on."""
    for epoch in range(first, plan.epochs):
        seed_everything(hash((settings.seed, epoch, dist.rank())) % 2**63)  # dropout; a resumed run draws the same
        numbers = epoch_batches(settings, epoch, source.train_images, dist.rank(), dist.world_size())
        yield from source.train_batches(epoch, numbers[: plan.total - epoch * plan.per_epoch])


# ------------------------------------------------------------ small parts


def open_source(settings: Settings) -> Source:
    """Open the set that ``settings.data`` names; raise DataError if it cannot be used."""
    if not settings.of_clips:
        return open_images(settings)
    return load_motions(settings) if settings.source == "motions" else load_videos(settings)


def _prepare(settings: Settings, processes: int) -> tuple[Source, Classifier, Plan]:
    """Data, a fresh network and the schedule, described in the log."""
    source = open_source(settings)
    seed_everything(settings.seed)
    model = build_classifier(settings, len(source.class_names), len(source.input.mean))
    if settings.weights is not None:
        assert isinstance(model.trunk, InflatedResNet)
        # the weights decide the preprocessing
        source.input = inflate_(model.trunk, settings.weights, settings.norm, settings.group_rule)
    per_epoch = len(epoch_batches(settings, 0, source.train_images, 0, processes))
    total = settings.iterations or max(round(settings.epochs * per_epoch), 1)
    plan = Plan(base_lr(settings, processes), per_epoch, total)
    _describe(settings, source, model, plan, processes)
    return source, model, plan


def _describe(settings: Settings, source: Source, model: Classifier, plan: Plan, processes: int) -> None:
    groups, per_group = settings.group_rule
    division = f", {per_group} channels per group" if per_group else f", {groups} groups"
    logger.info(
        f"{settings.arch}, {settings.norm}{division if settings.norm == 'GN' else ''}, "
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters; {settings.data}: "
        f"{len(source.class_names)} classes, {source.train_images} training and {source.val_images} validation "
        + (f"videos, {settings.frames} x {settings.frame_stride} frames" if settings.of_clips else "images")
        + f" of {settings.side} px"
    )
    epochs = plan.total / plan.per_epoch if settings.epochs is None else settings.epochs
    steps = ", ".join(f"{step * epochs:g}" for step in settings.steps) or "none"
    why = "{:g} for a batch of {}, linear".format(*reference(settings)) if settings.lr is None else "as given"
    decayed = "weights" if settings.arch == VGG else "parameters, gamma and beta included"
    decayed = "parameters but gamma and beta" if settings.of_clips else decayed
    logger.info(
        f"batch {settings.batch_size * processes} ({count(processes, 'process', 'processes')} × "
        f"{count(settings.batch_size, 'clip' if settings.of_clips else 'image')}), "
        f"{epochs:g} {'epoch' if epochs == 1 else 'epochs'} = {count(plan.total, 'iteration')}, "
        f"lr {plan.lr:g} ({why}), x {settings.gamma:g} after epochs {steps}; "
        f"weight decay {settings.weight_decay:g} on all {decayed}; autocast {settings.amp}"
        f"{', channels_last' if settings.channels_last else ''}; seed {settings.seed}"
    )
