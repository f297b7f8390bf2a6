"""Train, evaluate, or only show what would be done: the three things the command line asks for.

``train`` and ``evaluate`` start processes where several GPUs are asked for; what follows happens in each of them.
"""

from __future__ import annotations

import logging
import os
import platform
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import nn

from gn_det.about import __version__
from gn_det.checkpoint.io import read_checkpoint
from gn_det.checkpoint.last import remove_leftovers
from gn_det.checkpoint.meta import read_meta
from gn_det.config import dump_config
from gn_det.engine import dist
from gn_det.engine.advice import half_gn, short_for_scratch
from gn_det.engine.interface import Engine
from gn_det.engine.log import FILE_ONLY, run_log
from gn_det.engine.loop import Hook
from gn_det.engine.optim import format_groups, group_rows
from gn_det.engine.output import (
    alone_in,
    check_output_name,
    check_space,
    check_writable,
    refuse_old_run,
    start_afresh,
)
from gn_det.engine.prepare import prepare, with_classes
from gn_det.engine.schedule import format_schedule, lr_multiplier, scale_schedule
from gn_det.engine.state import ModelMeta, find_resume
from gn_det.errors import ConfigError, WeightsError
from gn_det.files import atomic_write
from gn_det.text import as_line

logger = logging.getLogger(__name__)


def train(
    engine: Engine,
    cfg: CfgNode,
    *,
    resume: bool = False,
    overwrite: bool = False,
    hooks: Sequence[Hook] = (),
    num_gpus: int = 1,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
) -> dict[str, float]:
    """Train as ``cfg`` says and evaluate; everything is written to ``OUTPUT_DIR``.

    Args:
        engine: what trains.
        cfg: from :func:`gn_det.config.load_config`; not changed.
        resume: go on from the newest checkpoint of OUTPUT_DIR; where there is none, start.
        overwrite: allow OUTPUT_DIR to hold an earlier run: its checkpoints are deleted, its metrics.json moved aside.
        hooks: your own, see :class:`gn_det.engine.loop.Hook`; with several processes they travel there by pickle.
        num_gpus: processes on this machine, one GPU each (on a CPU: plain processes).
        num_machines: machines that take part; each runs this call with its own ``machine_rank``.
        machine_rank: 0-based number of this machine.
        dist_url: ``tcp://address-of-machine-0:port``; "auto" on one machine.

    Returns:
        Metrics of the last evaluation: ``{"bbox/AP": ..., "segm/AP": ..., ...}`` in percent; empty without a test set.

    Raises:
        UserError: configuration, data, weights or folder cannot be used; a non-finite loss; an interruption.
    """
    device = dist.resolve_device(cfg.MODEL.DEVICE)
    check_run(cfg, device, num_gpus * num_machines)
    folder = check_writable(cfg.OUTPUT_DIR)
    if not resume:
        refuse_old_run(folder, overwrite=overwrite)
    return dist.launch(
        _train_rank,
        (engine, cfg, resume, overwrite, hooks),
        device=device,
        num_gpus=num_gpus,
        num_machines=num_machines,
        machine_rank=machine_rank,
        dist_url=dist_url,
    )


def evaluate(engine: Engine, cfg: CfgNode, *, num_gpus: int = 1) -> dict[str, float]:
    """Evaluate ``MODEL.WEIGHTS`` on the test sets; returns what :func:`train` returns.

    Raises:
        UserError: no weights or test set given, or they cannot be used.
    """
    if not cfg.MODEL.WEIGHTS:
        raise ConfigError("MODEL.WEIGHTS is empty; give the checkpoint to evaluate (--weights output/model_best.pth)")
    check_writable(cfg.OUTPUT_DIR)
    return dist.launch(_evaluate_rank, (engine, cfg), device=dist.resolve_device(cfg.MODEL.DEVICE), num_gpus=num_gpus)


def dry_run(engine: Engine, cfg: CfgNode, *, num_gpus: int = 1, num_machines: int = 1) -> None:
    """Print what a run would be: config, model, optimizer, schedule, data sets; needs neither data nor weights.

    Raises:
        ConfigError: the configuration contradicts itself.
        TrainingError: OUTPUT_DIR cannot be a folder.
    """
    from gn_det.data.sets import estimate_sizes

    check_output_name(cfg.OUTPUT_DIR)
    with run_log(None, times=False):
        sizes = estimate_sizes(cfg)
        logger.info(format_engine(engine))
        for line in sizes.lines:
            logger.info("%s", line)
        world = int(os.environ["WORLD_SIZE"]) if dist.under_torchrun() else num_gpus * num_machines
        written = format_schedule(cfg, sizes.images)
        cfg, sentences = scale_schedule(cfg, world, sizes.images)
        cfg = with_classes(cfg, sizes.classes or int(cfg.MODEL.ROI_HEADS.NUM_CLASSES), sizes.class_names)
        logger.info("Resolved configuration\n%s", _indent(dump_config(cfg, implemented_only=engine.name == "embedded")))
        check_metric(cfg)
        check_freeze(cfg, strict=False)
        model = engine.build_model(cfg)
        describe_model(cfg, model)
        if sentences:
            logger.info("As configured\n%s", _indent(written))
        for sentence in sentences:
            logger.info(sentence)
        logger.info("As it would run here\n%s", _indent(format_schedule(cfg, sizes.images, world)))
        lr_multiplier(cfg)
        if short_for_scratch(cfg, sizes.images):
            logger.warning(short_for_scratch(cfg, sizes.images))
        weights, output = as_line(cfg.MODEL.WEIGHTS) or "none (from scratch)", as_line(cfg.OUTPUT_DIR)
        logger.info("Weights: %s\nOutput: %s\nDry run: nothing was trained or written.", weights, output)


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.rstrip().splitlines())


# ------------------------------------------------------------ in each process


def _train_rank(engine: Engine, cfg: CfgNode, resume: bool, overwrite: bool, hooks: Sequence[Hook]) -> dict[str, float]:
    from gn_det.data.workers import worker_failure

    with alone_in(cfg.OUTPUT_DIR), run_log(cfg.OUTPUT_DIR, rank=dist.rank()):
        try:
            if not resume and not overwrite:  # again: a run may have ended since
                dist.on_first_rank(partial(refuse_old_run, Path(cfg.OUTPUT_DIR), overwrite=False))
            return _train(engine, cfg, resume, hooks)
        except Exception as error:
            failure = worker_failure(error) if isinstance(error, RuntimeError) else None
            _note_in_file(failure or error)
            if failure is not None:
                raise failure from error
            raise


def _train(engine: Engine, cfg: CfgNode, resume: bool, hooks: Sequence[Hook]) -> dict[str, float]:
    from gn_det.engine.evaluator import evaluate_model, verify_expected
    from gn_det.engine.fit import fit

    _say_environment(engine, cfg)
    point = find_resume(cfg.OUTPUT_DIR) if resume else None
    if point is None:
        check_freeze(cfg)
    prepared = prepare(cfg)
    cfg, data = prepared.cfg, prepared.data
    model = engine.build_model(cfg)
    describe_model(cfg, model)
    if point is None:
        load_initial(cfg, model)
        if short_for_scratch(cfg, data.images):
            logger.warning(short_for_scratch(cfg, data.images))
    if dist.rank() == 0:
        remove_leftovers(cfg.OUTPUT_DIR)
        check_space(Path(cfg.OUTPUT_DIR), model, replaced=point is None)
        if point is None:
            start_afresh(Path(cfg.OUTPUT_DIR), keep=cfg.MODEL.WEIGHTS)
        atomic_write(Path(cfg.OUTPUT_DIR) / "config.yaml", dump_config(cfg))

    def run_evaluation(current: nn.Module, on_progress: Any) -> Mapping[str, float]:
        return evaluate_model(cfg, engine.detector(current), data.test, data.class_names, on_progress)

    results = fit(
        engine,
        cfg,
        model=model,
        make_loader=prepared.make_loader,
        meta=ModelMeta(cfg, data.class_names, data.category_ids),
        seed=prepared.seed,
        evaluate=run_evaluation if data.test else None,
        resume=point,
        hooks=hooks,
    )
    verify_expected(cfg, results)
    logger.info("Done: %s", cfg.OUTPUT_DIR)
    return results


def _evaluate_rank(engine: Engine, cfg: CfgNode) -> dict[str, float]:
    from gn_det.checkpoint.weights import format_report, load_weights
    from gn_det.data.sets import load_test_sets
    from gn_det.engine.evaluator import evaluate_model, verify_expected
    from gn_det.engine.fit import local_device

    with alone_in(cfg.OUTPUT_DIR), run_log(cfg.OUTPUT_DIR, rank=dist.rank()):
        _say_environment(engine, cfg)
        names = _classes_of(cfg.MODEL.WEIGHTS)
        test = load_test_sets(cfg, names)
        if not test:
            raise ConfigError("DATASETS.TEST is empty; name a test set, or give --val-json and --val-images")
        names = names or test[0].class_names
        if cfg.MODEL.ROI_HEADS.NUM_CLASSES not in (0, len(names)):
            raise ConfigError(
                f"MODEL.ROI_HEADS.NUM_CLASSES is {cfg.MODEL.ROI_HEADS.NUM_CLASSES} but there are {len(names)} classes "
                f"({', '.join(names[:5])} ...); remove the key or set it to {len(names)}"
            )
        cfg = with_classes(cfg, len(names), names)
        model = engine.build_model(cfg)
        logger.info(format_report(load_weights(model, cfg.MODEL.WEIGHTS, cfg, require_all=True)))
        model.to(local_device(dist.resolve_device(cfg.MODEL.DEVICE))).eval()
        results = evaluate_model(cfg, engine.detector(model), test, names)
        logger.info("Log and detections are in %s.", cfg.OUTPUT_DIR)
        verify_expected(cfg, results)
        return results


def _classes_of(weights: str) -> tuple[str, ...] | None:
    """Class names stored in a checkpoint of ours; None for other files (their loader explains what is wrong)."""
    if not os.path.isfile(weights) or not weights.endswith(".pth"):
        return None
    try:
        block = read_meta(read_checkpoint(weights, mmap=True))
    except WeightsError:
        return None
    return tuple(block["class_names"]) or None if block else None


# ------------------------------------------------------------ small parts


def check_freeze(cfg: CfgNode, *, strict: bool = True) -> None:
    """Refuse (or, not strict, warn of) layers that would be frozen at random values.

    Raises:
        ConfigError: FREEZE_AT > 0 without weights.
    """
    at = int(cfg.MODEL.BACKBONE.FREEZE_AT)
    if at <= 0 or cfg.MODEL.WEIGHTS:
        return
    message = (
        f"MODEL.BACKBONE.FREEZE_AT is {at} but MODEL.WEIGHTS is empty: the first stages would stay frozen at random "
        "values; set MODEL.BACKBONE.FREEZE_AT 0 to train from scratch, or give MODEL.WEIGHTS"
    )
    if strict:
        raise ConfigError(message)
    logger.warning(message)


def check_run(cfg: CfgNode, device: str, world_size: int) -> None:
    """Refuse what no run on these devices can do, before a process is started or a file is written.

    Raises:
        ConfigError: the batch cannot be shared, or fp16 without a GPU; or see :func:`check_metric`.
    """
    check_metric(cfg)
    world = int(os.environ["WORLD_SIZE"]) if dist.under_torchrun() else world_size
    if world > 0:
        scale_schedule(cfg, world, images=1)
    if cfg.SOLVER.AMP.ENABLED and cfg.SOLVER.AMP.DTYPE == "fp16" and not device.startswith("cuda"):
        raise ConfigError("SOLVER.AMP.DTYPE fp16 needs a GPU; use bf16 or SOLVER.AMP.ENABLED False")


def check_metric(cfg: CfgNode) -> None:
    """Refuse a metric for model_best.pth that no evaluation gives, before hours are spent.

    Raises:
        ConfigError: TEST.BEST_METRIC is not such as "segm/AP", or TEST.PATIENCE is set without TEST.EVAL_PERIOD.
    """
    name = str(cfg.TEST.BEST_METRIC)
    if not re.search(r"(^|/)(bbox|segm)/AP(50|75|s|m|l|-.+)?$", name):
        raise ConfigError(
            f"TEST.BEST_METRIC is '{name}'; use bbox/ or segm/ with AP, AP50, AP75, APs, APm, APl or AP-NAME"
        )
    if cfg.TEST.PATIENCE > 0 and cfg.TEST.EVAL_PERIOD <= 0:
        raise ConfigError(f"TEST.PATIENCE {cfg.TEST.PATIENCE} counts evaluations; set TEST.EVAL_PERIOD too")


def describe_model(cfg: CfgNode, model: nn.Module) -> None:
    """Print the norm census and the optimizer groups."""
    from gn_det.modeling.census import format_census, norm_census

    rows = norm_census(model)
    logger.info("Norm layers\n%s", _indent(format_census(rows)))
    if half_gn(rows):
        logger.info(half_gn(rows))
    logger.info(format_groups(group_rows(cfg, model)))


def load_initial(cfg: CfgNode, model: nn.Module) -> None:
    """Load MODEL.WEIGHTS, checked against the configuration, and print what came of it.

    Raises:
        WeightsError: they cannot be used.
    """
    from gn_det.checkpoint.weights import format_report, load_weights

    if cfg.MODEL.WEIGHTS:
        logger.info(format_report(load_weights(model, cfg.MODEL.WEIGHTS, cfg)))
    else:
        logger.info("Training from scratch: MODEL.WEIGHTS is empty.")


def _say_environment(engine: Engine, cfg: CfgNode) -> None:
    device = dist.resolve_device(cfg.MODEL.DEVICE)
    name = torch.cuda.get_device_name() if device.startswith("cuda") else f"CPU, {torch.get_num_threads()} threads"
    amp = f", {cfg.SOLVER.AMP.DTYPE} autocast" if cfg.SOLVER.AMP.ENABLED else ""
    logger.info(
        "gn_det %s, torch %s, python %s; %d process(es) on %s%s",
        __version__,
        torch.__version__,
        platform.python_version(),
        dist.world_size(),
        name,
        amp,
    )
    logger.info(format_engine(engine))
    if cfg.FLOAT32_PRECISION:
        torch.set_float32_matmul_precision(cfg.FLOAT32_PRECISION)


def format_engine(engine: Engine) -> str:
    """Which engine runs, and why."""
    return f"Engine: {engine.name} ({engine.version()}){f', {engine.why}' if engine.why else ''}."


def _note_in_file(error: Exception) -> None:
    """Why a run ended, into log.txt alone: the command line shows it by itself."""
    logger.error("stopped: %s", error, extra=FILE_ONLY)
