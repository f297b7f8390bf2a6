"""Train, evaluate, or show what a run would do; the package exports ``train`` and ``evaluate``."""

from __future__ import annotations

import dataclasses
import logging
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import nn

from gn_det.about import __version__
from gn_det.checkpoint.io import read_checkpoint
from gn_det.checkpoint.meta import config_of_checkpoint, read_meta
from gn_det.checkpoint.weights import format_report, load_weights
from gn_det.config import dump_config, load_config
from gn_det.config.check import check_config
from gn_det.config.defaults import edited
from gn_det.config.load import Overrides, merge_overrides
from gn_det.config.presets import apply_augmentation
from gn_det.data.augment import OwnTransform
from gn_det.data.sets import estimate_sizes, load_test_sets
from gn_det.data.split import write_split
from gn_det.data.workers import worker_failure
from gn_det.engine import choice, dist, prepare
from gn_det.engine.auto_batch import choose_accumulate
from gn_det.engine.detector_loop import fit
from gn_det.engine.engines import Engine
from gn_det.engine.evaluator import EvalReport, evaluate_model, store_thresholds, verify_expected
from gn_det.engine.heap import keep_freed_memory
from gn_det.engine.log import FILE_ONLY, run_log
from gn_det.engine.loop import Hook
from gn_det.engine.output import alone_in, check_output_name, checkpoints, refuse_old_run
from gn_det.engine.precision import lay_out_for_inference, settle
from gn_det.engine.schedule import format_schedule, lr_multiplier, scale_schedule
from gn_det.engine.shared_copy import load_once
from gn_det.engine.state import ModelMeta, find_resume, stored_config
from gn_det.errors import ConfigError, WeightsError
from gn_det.files import atomic_write, check_writable, json_bytes
from gn_det.text import as_line, count

logger = logging.getLogger(__name__)


def train(
    config: CfgNode | str | os.PathLike[str],
    overrides: Overrides = (),
    *,
    engine: str | Engine = "auto",
    resume: bool = False,
    overwrite: bool = False,
    hooks: Sequence[Hook] = (),
    augment: str | OwnTransform | None = None,
    num_gpus: int = 1,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
) -> dict[str, float]:
    """Train and evaluate like ``gn-det train``; all files are written to ``OUTPUT_DIR``.

    A script that calls this with several GPUs or data workers needs ``if __name__ == "__main__":``.

    Args:
        config: a path, the name of a shipped config, or the result of :func:`load_config`; it is not modified.
        overrides: values of keys, such as ``{"SOLVER.EPOCHS": 12, "OUTPUT_DIR": "output/a"}``.
        engine: ``"auto"`` (Detectron2 if it is installed), ``"embedded"`` or ``"detectron2"``.
        resume: continue from the newest checkpoint in OUTPUT_DIR, or start a new run if there is none.
        overwrite: replace an earlier run in OUTPUT_DIR: delete its checkpoints and rename its metrics.json.
        hooks: your own :class:`gn_det.engine.loop.Hook` objects; pickled if there are several processes.
        augment: ``"none"``, ``"light"``, ``"strong"`` or ``"lsj"`` instead of the config's augmentation; or your own
            ``torchvision.transforms.v2`` transform, applied after it to an RGB image and a dict of boxes, labels and
            masks.
        num_gpus: processes on this machine, one per GPU (on a CPU: plain processes).
        num_machines: number of machines; each makes this call with its own ``machine_rank``.
        machine_rank: 0-based index of this machine.
        dist_url: ``tcp://host:port`` of machine 0; ``"auto"`` on one machine.

    Returns:
        Metrics of the last evaluation in percent, such as ``{"bbox/AP": 40.3, "segm/AP": 35.7}``; empty without a
        test set.

    Raises:
        UserError: the config, data, weights or folder cannot be used, a loss is not finite, or the run was interrupted.
    """
    preset, augment = (augment, None) if isinstance(augment, str) else (None, augment)
    cfg, engine = _resolve(config, overrides, engine, preset)
    device = dist.resolve_device(cfg.MODEL.DEVICE)
    prepare.check_run(cfg, device, num_gpus * num_machines)
    folder = check_writable(cfg.OUTPUT_DIR)
    if not resume:
        refuse_old_run(folder, overwrite=overwrite)
    cfg = write_split(cfg, started=resume and bool(checkpoints(folder)))
    return dist.launch(
        _train,
        (cfg, engine, resume, overwrite, hooks, augment),
        device=device,
        num_gpus=num_gpus,
        num_machines=num_machines,
        machine_rank=machine_rank,
        dist_url=dist_url,
    )


def evaluate(
    config: CfgNode | str | os.PathLike[str] | None = None,
    overrides: Overrides = (),
    *,
    weights: str | os.PathLike[str] | None = None,
    engine: str | Engine = "auto",
    html: str | os.PathLike[str] | None = None,
    save_thresholds: bool = False,
    num_gpus: int = 1,
) -> dict[str, float]:
    """Evaluate weights on the test sets of a config, like ``gn-det eval``.

    Args:
        config: as for :func:`train`; None uses the config stored in ``weights``.
        overrides: values of keys, such as ``{"DATASETS.VAL_JSON": "b.json", "DATASETS.VAL_IMAGES": "imgs"}``.
        weights: replaces ``MODEL.WEIGHTS``.
        engine: as for :func:`train`.
        html: path for a page with intervals, curves, confusions and the worst images, and a table beside it.
        save_thresholds: store the score of best F1 of each class in the checkpoint, for prediction.
        num_gpus: processes on this machine, one per GPU.

    Returns:
        COCO metrics in percent, such as ``{"bbox/AP": 40.3, "segm/AP": 35.7}``.

    Raises:
        UserError: no weights or no test set is given, or they cannot be used.
    """
    if config is None:
        if weights is None:
            raise ConfigError("evaluate needs weights, a config, or both")
        config = config_of_checkpoint(weights)
    cfg, engine = _resolve(config, overrides, engine)
    if weights is not None:
        merge_overrides(cfg, {"MODEL.WEIGHTS": os.fspath(weights)})
    if not cfg.MODEL.WEIGHTS:
        raise ConfigError("MODEL.WEIGHTS is empty; give the checkpoint to evaluate (--weights output/model_best.pth)")
    check_writable(cfg.OUTPUT_DIR)
    device = dist.resolve_device(cfg.MODEL.DEVICE)
    page = Path(html) if html is not None else Path(cfg.OUTPUT_DIR) / "eval.html" if save_thresholds else None
    return dist.launch(_evaluate, (cfg, engine, page, save_thresholds), device=device, num_gpus=num_gpus)


def _resolve(
    config: CfgNode | str | os.PathLike[str], overrides: Overrides, engine: str | Engine, preset: str | None = None
) -> tuple[CfgNode, Engine]:
    """Return a checked copy of ``config`` with augmentation preset and ``overrides``, and the engine."""
    chosen = choice.choose(engine) if isinstance(engine, str) else engine
    cfg = load_config(config, check=False) if isinstance(config, (str, os.PathLike)) else edited(config)
    literal = merge_overrides(cfg, overrides, "overrides")
    if preset is not None:
        apply_augmentation(cfg, preset, literal)
    check_config(cfg, chosen.name)
    return cfg, choice.load(chosen) if isinstance(chosen, choice.Choice) else chosen


def dry_run(cfg: CfgNode, engine: Engine, *, num_gpus: int = 1, num_machines: int = 1) -> None:
    """Print config, model, optimizer, schedule and datasets of a run, or raise UserError; needs no data or weights."""
    check_output_name(cfg.OUTPUT_DIR)
    with run_log(None):
        cfg = settle(cfg, dist.resolve_device(cfg.MODEL.DEVICE))
        sizes = estimate_sizes(cfg)
        for line in (str(engine), *sizes.lines):
            logger.info("%s", line)
        world = dist.planned_world_size(num_gpus * num_machines)
        written = format_schedule(cfg, sizes.images)
        cfg, sentences = scale_schedule(cfg, world, sizes.images)
        cfg = prepare.with_classes(cfg, sizes.classes or int(cfg.MODEL.ROI_HEADS.NUM_CLASSES), sizes.class_names)
        logger.info(
            "Resolved configuration\n%s", prepare.indented(dump_config(cfg, implemented_only=engine.name == "embedded"))
        )
        prepare.check_metric(cfg)
        prepare.check_freeze(cfg, strict=False)
        prepare.describe_model(cfg, engine.build_model(cfg))
        if sentences:
            logger.info("As configured\n%s", prepare.indented(written))
        for sentence in sentences:
            logger.info("%s", sentence)
        logger.info("As it would run here\n%s", prepare.indented(format_schedule(cfg, sizes.images, world)))
        lr_multiplier(cfg)
        prepare.warn_if_short(cfg, sizes.images)
        weights, output = as_line(cfg.MODEL.WEIGHTS) or "none (from scratch)", as_line(cfg.OUTPUT_DIR)
        logger.info("Weights: %s\nOutput: %s\nDry run: nothing was trained or written.", weights, output)


# ------------------------------------------------------------ in each process


@contextmanager
def _in_output(cfg: CfgNode) -> Iterator[None]:
    """Hold OUTPUT_DIR, log to it, and log there the error that ends the run, which the command line prints itself."""
    with alone_in(cfg.OUTPUT_DIR), run_log(cfg.OUTPUT_DIR, rank=dist.rank()):
        try:
            yield
        except Exception as error:
            failure = worker_failure(error) if isinstance(error, RuntimeError) else None
            logger.error("stopped: %s", failure or error, extra=FILE_ONLY)
            if failure is not None:
                raise failure from error
            raise


def _train(
    cfg: CfgNode, engine: Engine, resume: bool, overwrite: bool, hooks: Sequence[Hook], augment: OwnTransform | None
) -> dict[str, float]:
    with _in_output(cfg):
        if not resume and not overwrite:  # checked again, because a run may have ended since
            dist.on_first_rank(partial(refuse_old_run, Path(cfg.OUTPUT_DIR), overwrite=False))
        device = _set_up_process(cfg, engine, cfg.SOLVER.AMP.ENABLED is True)
        point = find_resume(cfg.OUTPUT_DIR) if resume else None
        cfg = settle(cfg, device, stored_config(point))
        if point is None:
            prepare.check_freeze(cfg)
        prepared = prepare.prepare(cfg, augment)
        cfg, data = prepared.cfg, prepared.data
        model = engine.build_model(cfg)
        if cfg.SOLVER.AUTO_BATCH:
            cfg = choose_accumulate(cfg, model)
            prepared = dataclasses.replace(prepared, cfg=cfg)
        prepare.describe_model(cfg, model)
        if point is None:
            prepare.load_initial(cfg, model, data.images)
        prepare.prepare_folder(cfg, model, fresh=point is None)

        def run_evaluation(current: nn.Module, on_progress: Any) -> Mapping[str, float]:
            return evaluate_model(cfg, engine.detector(current, cfg), data.test, data.class_names, on_progress)

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


def _evaluate(cfg: CfgNode, engine: Engine, page: Path | None, store: bool) -> dict[str, float]:
    with _in_output(cfg):
        device = _set_up_process(cfg, engine, cfg.TEST.AMP is True)
        names = _classes_of(cfg.MODEL.WEIGHTS)
        test = load_once(lambda: load_test_sets(cfg, names))
        if not test:
            raise ConfigError("DATASETS.TEST is empty; name a test set, or give --val-json and --val-images")
        names = names or test[0].class_names
        if cfg.MODEL.ROI_HEADS.NUM_CLASSES not in (0, len(names)):
            raise ConfigError(
                f"MODEL.ROI_HEADS.NUM_CLASSES is {cfg.MODEL.ROI_HEADS.NUM_CLASSES} but there are {len(names)} classes "
                f"({', '.join(names[:5])} ...); remove the key or set it to {len(names)}"
            )
        cfg = settle(prepare.with_classes(cfg, len(names), names), device)
        model = engine.build_model(cfg)
        logger.info(format_report(load_weights(model, cfg.MODEL.WEIGHTS, cfg, require_all=True)))
        lay_out_for_inference(model.to(dist.local_device(cfg.MODEL.DEVICE)).eval(), cfg, device)
        report = EvalReport(page) if page is not None else None
        results = evaluate_model(cfg, engine.detector(model, cfg), test, names, report=report)
        if dist.rank() == 0:
            atomic_write(Path(cfg.OUTPUT_DIR) / "inference" / "metrics.json", json_bytes(results))
            if report is not None and store:
                store_thresholds(cfg.MODEL.WEIGHTS, report.thresholds)
        logger.info("Log and detections are in %s.", cfg.OUTPUT_DIR)
        verify_expected(cfg, results)
        return results


def _classes_of(weights: str) -> tuple[str, ...] | None:
    """Return the class names stored in our checkpoint; None for other files, whose loader reports what is wrong."""
    if not os.path.isfile(weights) or not weights.endswith(".pth"):
        return None
    try:
        block = read_meta(read_checkpoint(weights, mmap=True))
    except WeightsError:
        return None
    return tuple(block["class_names"]) or None if block else None


def _set_up_process(cfg: CfgNode, engine: Engine, autocast: bool) -> str:
    """Make settings of the whole process, write the log's first lines, and return the device."""
    device = dist.resolve_device(cfg.MODEL.DEVICE)
    keep_freed_memory(device)
    on_gpu = device.startswith("cuda")
    name = torch.cuda.get_device_name() if on_gpu else f"CPU, {count(torch.get_num_threads(), 'thread')}"
    amp = f", {cfg.SOLVER.AMP.DTYPE} autocast" if autocast else ""
    processes = count(dist.world_size(), "process", "processes")
    logger.info(
        "gn_det %s, torch %s, python %s; %s on %s%s",
        *(__version__, torch.__version__, platform.python_version(), processes, name, amp),
    )
    logger.info("%s", engine)
    if cfg.FLOAT32_PRECISION:
        torch.set_float32_matmul_precision(cfg.FLOAT32_PRECISION)
    return device
