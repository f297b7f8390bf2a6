"""Train, evaluate, or only show what would be done, as the command line does.

``train`` and ``evaluate`` start processes where several GPUs are asked for; what follows happens in each of them.
"""

from __future__ import annotations

import logging
import os
import platform
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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
from gn_det.checkpoint.weights import format_report, load_weights
from gn_det.config import dump_config
from gn_det.data.loader import build_train_loader
from gn_det.data.sets import RunData, estimate_sizes, load_run_data, load_test_sets
from gn_det.data.workers import worker_failure
from gn_det.engine import dist
from gn_det.engine.advice import half_gn, short_for_scratch
from gn_det.engine.detector_loop import fit
from gn_det.engine.engines import Engine
from gn_det.engine.evaluator import evaluate_model, verify_expected
from gn_det.engine.log import FILE_ONLY, on_screen, run_log
from gn_det.engine.loggers import check_loggers
from gn_det.engine.loop import Hook
from gn_det.engine.optimizer import format_groups
from gn_det.engine.output import alone_in, check_output_name, check_space, check_writable, refuse_old_run, start_afresh
from gn_det.engine.schedule import format_schedule, images_per_rank, lr_multiplier, scale_schedule
from gn_det.engine.state import ModelMeta, find_resume, seed_everything
from gn_det.errors import ConfigError, WeightsError
from gn_det.files import atomic_write
from gn_det.modeling.census import format_census, norm_census, sum_census
from gn_det.text import as_line

logger = logging.getLogger(__name__)


def train(
    cfg: CfgNode,
    engine: Engine | None = None,
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
        cfg: from :func:`gn_det.config.load_config`; not changed.
        engine: what builds and feeds the model; None is the embedded engine.
        resume: continue from the newest checkpoint of OUTPUT_DIR; where there is none, start.
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
    result: dict[str, float] = dist.launch(
        _train_rank,
        (cfg, engine or Engine(), resume, overwrite, hooks),
        device=device,
        num_gpus=num_gpus,
        num_machines=num_machines,
        machine_rank=machine_rank,
        dist_url=dist_url,
    )
    return result


def evaluate(cfg: CfgNode, engine: Engine | None = None, *, num_gpus: int = 1) -> dict[str, float]:
    """Evaluate ``MODEL.WEIGHTS`` on the test sets; returns what :func:`train` returns.

    Raises:
        UserError: no weights or test set given, or they cannot be used.
    """
    if not cfg.MODEL.WEIGHTS:
        raise ConfigError("MODEL.WEIGHTS is empty; give the checkpoint to evaluate (--weights output/model_best.pth)")
    check_writable(cfg.OUTPUT_DIR)
    device = dist.resolve_device(cfg.MODEL.DEVICE)
    result: dict[str, float] = dist.launch(
        _evaluate_rank, (cfg, engine or Engine()), device=device, num_gpus=num_gpus
    )  # fmt: skip
    return result


def dry_run(cfg: CfgNode, engine: Engine | None = None, *, num_gpus: int = 1, num_machines: int = 1) -> None:
    """Print what a run would be: config, model, optimizer, schedule, data sets; needs neither data nor weights.

    Raises:
        ConfigError: the configuration contradicts itself.
        TrainingError: OUTPUT_DIR cannot be a folder.
    """
    engine = engine or Engine()
    check_output_name(cfg.OUTPUT_DIR)
    with run_log(None, times=False, verbose=True):
        sizes = estimate_sizes(cfg)
        for line in (str(engine), *sizes.lines):
            logger.info("%s", line)
        world = int(os.environ["WORLD_SIZE"]) if dist.under_torchrun() else num_gpus * num_machines
        written = format_schedule(cfg, sizes.images)
        cfg, sentences = scale_schedule(cfg, world, sizes.images)
        cfg = with_classes(cfg, sizes.classes or int(cfg.MODEL.ROI_HEADS.NUM_CLASSES), sizes.class_names)
        logger.info("Resolved configuration\n%s", _indent(dump_config(cfg, implemented_only=engine.name == "embedded")))
        check_metric(cfg)
        check_freeze(cfg, strict=False)
        describe_model(cfg, engine.build_model(cfg))
        if sentences:
            logger.info("As configured\n%s", _indent(written))
        for sentence in sentences:
            logger.info("%s", sentence)
        logger.info("As it would run here\n%s", _indent(format_schedule(cfg, sizes.images, world)))
        lr_multiplier(cfg)
        _warn_if_short(cfg, sizes.images)
        weights, output = as_line(cfg.MODEL.WEIGHTS) or "none (from scratch)", as_line(cfg.OUTPUT_DIR)
        logger.info("Weights: %s\nOutput: %s\nDry run: nothing was trained or written.", weights, output)


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.rstrip().splitlines())


# ------------------------------------------------------------ in each process


def _train_rank(cfg: CfgNode, engine: Engine, resume: bool, overwrite: bool, hooks: Sequence[Hook]) -> dict[str, float]:
    with alone_in(cfg.OUTPUT_DIR), run_log(cfg.OUTPUT_DIR, rank=dist.rank()):
        try:
            if not resume and not overwrite:  # again: a run may have ended since
                dist.on_first_rank(partial(refuse_old_run, Path(cfg.OUTPUT_DIR), overwrite=False))
            return _train(cfg, engine, resume, hooks)
        except Exception as error:
            failure = worker_failure(error) if isinstance(error, RuntimeError) else None
            # into log.txt alone: the command line shows it by itself
            logger.error("stopped: %s", failure or error, extra=FILE_ONLY)
            if failure is not None:
                raise failure from error
            raise


def _train(cfg: CfgNode, engine: Engine, resume: bool, hooks: Sequence[Hook]) -> dict[str, float]:
    _log_environment(cfg, engine)
    point = find_resume(cfg.OUTPUT_DIR) if resume else None
    if point is None:
        check_freeze(cfg)
    prepared = prepare(cfg)
    cfg, data = prepared.cfg, prepared.data
    model = engine.build_model(cfg)
    describe_model(cfg, model)
    if point is None:
        load_initial(cfg, model, data.images)
    prepare_folder(cfg, model, fresh=point is None)

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


def _evaluate_rank(cfg: CfgNode, engine: Engine) -> dict[str, float]:
    with alone_in(cfg.OUTPUT_DIR), run_log(cfg.OUTPUT_DIR, rank=dist.rank()):
        _log_environment(cfg, engine)
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
        model.to(dist.local_device(cfg.MODEL.DEVICE)).eval()
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


def _log_environment(cfg: CfgNode, engine: Engine) -> None:
    device = dist.resolve_device(cfg.MODEL.DEVICE)
    name = torch.cuda.get_device_name() if device.startswith("cuda") else f"CPU, {torch.get_num_threads()} threads"
    amp = f", {cfg.SOLVER.AMP.DTYPE} autocast" if cfg.SOLVER.AMP.ENABLED else ""
    processes = f"{dist.world_size()} processes" if dist.world_size() > 1 else "1 process"
    logger.info(
        "gn_det %s, torch %s, python %s; %s on %s%s",
        *(__version__, torch.__version__, platform.python_version(), processes, name, amp),
    )
    logger.info("%s", engine)
    if cfg.FLOAT32_PRECISION:
        torch.set_float32_matmul_precision(cfg.FLOAT32_PRECISION)


# ------------------------------------------------------------ before training, whichever loop follows


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
        """This rank's endless micro-batches; see :data:`gn_det.engine.detector_loop.LoaderFactory`."""
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
    """Read the data, settle classes and schedule, seed this process; all ranks together. Logs what was settled.

    Raises:
        UserError: the data cannot be used, or the configuration does not fit it; the same on every rank.
    """
    loaded: list[RunData] = []
    dist.on_first_rank(lambda: loaded.append(load_run_data(cfg)))  # rank 0 first, which writes generated sets
    data = loaded[0] if loaded else load_run_data(cfg)
    cfg = with_classes(cfg, len(data.class_names), data.class_names)
    cfg, sentences = scale_schedule(cfg, dist.world_size(), data.images)
    for sentence in [*sentences, format_schedule(cfg, data.images, dist.world_size())]:
        logger.info(sentence)
    seed = dist.broadcast(int(cfg.SEED) if cfg.SEED >= 0 else secrets.randbelow(2**31))
    logger.info("Seed %d%s.", seed, "" if cfg.SEED >= 0 else " (drawn; SEED repeats the run)")
    seed_everything(seed + dist.rank())
    return Prepared(cfg, data, seed)


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


def describe_model(cfg: CfgNode, model: nn.Module) -> None:
    """Log the norm census and the optimizer groups."""
    rows = norm_census(model)
    short = on_screen(f"Norm layers: {sum_census(rows)}")
    logger.info("Norm layers\n%s", _indent(format_census(rows)), extra=short)
    if half_gn(rows):
        logger.info(half_gn(rows))
    table, sentence = format_groups(cfg, model)
    logger.info(table, extra=on_screen(f"Weight decay {cfg.SOLVER.WEIGHT_DECAY:g}; {sentence}"))


def load_initial(cfg: CfgNode, model: nn.Module, images: int) -> None:
    """Load MODEL.WEIGHTS, checked against the configuration, and log the result; warn of a short run from scratch.

    Raises:
        WeightsError: they cannot be used.
    """
    if cfg.MODEL.WEIGHTS:
        logger.info(format_report(load_weights(model, cfg.MODEL.WEIGHTS, cfg)))
    else:
        logger.info("Training from scratch: MODEL.WEIGHTS is empty.")
    _warn_if_short(cfg, images)


def _warn_if_short(cfg: CfgNode, images: int) -> None:
    if short_for_scratch(cfg, images):
        logger.warning(short_for_scratch(cfg, images))


def prepare_folder(cfg: CfgNode, model: nn.Module, *, fresh: bool) -> None:
    """Make OUTPUT_DIR ready for a run (rank 0): leftovers and, if ``fresh``, an earlier run go; config.yaml is written.

    Raises:
        TrainingError: there is no space for a checkpoint.
    """
    if dist.rank() == 0:
        folder = Path(cfg.OUTPUT_DIR)
        remove_leftovers(folder)
        check_space(folder, model, replaced=fresh)
        if fresh:
            start_afresh(folder, keep=cfg.MODEL.WEIGHTS)
        atomic_write(folder / "config.yaml", dump_config(cfg))


# ------------------------------------------------------------ checks across keys


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
        ConfigError: the batch cannot be shared, a logger is not installed, or fp16 without a GPU; or see
            :func:`check_metric`.
    """
    check_metric(cfg)
    check_loggers(cfg)
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
