"""Turn a suite into runs: resolve configs, build models on the meta device, and check all before the first run."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode

from gn_det.checkpoint.weights_uri import locate, sha256_of, split_options
from gn_det.classification import Settings
from gn_det.classification.network import build_classifier
from gn_det.classification.settings import BUILTIN
from gn_det.compare.suite import DETECT, MAX_SEEDS, Row, Suite, row_ids
from gn_det.config import dump_config, load_config
from gn_det.config.check import check_config
from gn_det.config.defaults import edited, get_value
from gn_det.config.load import merge_overrides
from gn_det.config.schema import KEYS, WS_SECTIONS
from gn_det.data.catalog import GENERATED, datasets_for
from gn_det.data.split import check_split, is_split
from gn_det.engine import dist
from gn_det.engine.engines import Engine
from gn_det.engine.precision import settle
from gn_det.engine.prepare import check_freeze, check_run
from gn_det.errors import ConfigError, UserError
from gn_det.text import shown
from gn_det.values import InvalidValue

#: Most runs of a plan.
MAX_RUNS = 2000
#: Keys that affect location and speed, but not results.
_NOT_RESULT = {"OUTPUT_DIR": "", "VIS_PERIOD": 0, "MODEL.WEIGHTS": "", "DATALOADER.NUM_WORKERS": 0}
#: Keys that came later and decide nothing that the others do not: left out, so that runs from before them still count.
_LEFT_OUT = ("LOGGERS", "SOLVER.AUTO_EPOCHS")
#: Keys and settings that came later and change the result: left out at their default, for the same reason.
_LATER = (
    *("INPUT.COLOR_JITTER", "INPUT.COPY_PASTE", "INPUT.LSJ.ENABLED", "INPUT.LSJ.SIZE", "INPUT.LSJ.SCALE"),
    *("DATASETS.VAL_FRACTION", "DATASETS.VAL_FOLD", "INPUT.ROTATION", "MODEL.CHANNELS_LAST", "TEST.AMP"),
    *("MODEL.FREEZE", "SOLVER.OPTIMIZER", "SOLVER.BETAS", "SOLVER.BACKBONE_LR_FACTOR"),
    *(f"MODEL.WS.{section}" for section in WS_SECTIONS),
    *("MODEL.ROI_BOX_HEAD.CLASS_WEIGHTS", "MODEL.BACKBONE.RECOMPUTE", "SOLVER.AUTO_BATCH", "MODEL.RESNETS.VARIANT"),
)
_LATER_SETTINGS = {"channels_last": False, "augment": "crop", "record": None}


@dataclass(frozen=True)
class Job:
    """One run: a row with one seed."""

    row: Row
    seed: int
    #: of a detection, resolved but for OUTPUT_DIR and the weights of ``needs``; None for a pre-training
    cfg: CfgNode | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)  # of a pre-training, without its output
    needs: tuple[str, int] | None = None  # row id and seed of the pre-training whose weights it starts from
    #: what else its result depends on: engine, processes, contents of the annotation files
    inputs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        folds = 0 if self.cfg is None else self.cfg.DATASETS.VAL_FOLD[1]
        return f"{self.row.id}, fold {self.seed} of {folds}" if folds else f"{self.row.id}, seed {self.seed}"

    @property
    def device(self) -> str:
        """Where it runs: "cpu" or "cuda", whatever "auto" means here."""
        wanted = self.settings.get("device", "auto") if self.cfg is None else self.cfg.MODEL.DEVICE
        return dist.resolve_device(str(wanted))

    @property
    def weights(self) -> str:
        """Path or URI of the initial weights; "" without any, and where another row makes them."""
        if self.needs is not None:
            return ""
        return str(self.settings.get("weights") or "") if self.cfg is None else str(self.cfg.MODEL.WEIGHTS)

    def settings_key(self, weights_sha: str) -> str:
        """Return a hash of all that decides the result but code; ``weights_sha`` of initial weights, "" for none."""
        content = {**self._decides, "weights": weights_sha}
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]

    @functools.cached_property
    def _decides(self) -> dict[str, Any]:
        content: dict[str, Any] = {"kind": self.row.kind, "seed": self.seed, **self.inputs}
        if self.cfg is None:
            kept = {k: v for k, v in self.settings.items() if k not in ("output", "workers")}
            return content | {"settings": {k: v for k, v in kept.items() if _LATER_SETTINGS.get(k, ...) != v}}
        cfg = edited(self.cfg, _NOT_RESULT)
        for key in (*_LEFT_OUT, *_LATER):
            section, _, last = key.rpartition(".")
            if key in _LEFT_OUT or get_value(cfg, key) == KEYS[key].default:
                (get_value(cfg, section) if section else cfg).pop(last)
        return content | {"config": dump_config(cfg)}

    def initial_sha(self) -> str:
        """sha256 and options of the weights that the config names; "" without any, or before they are downloaded."""
        uri = self.weights
        if not uri or not (path := locate(uri)[0]).is_file():
            return ""
        return f"{file_hash(path)} {split_options(uri)[1]}"


@dataclass(frozen=True)
class Problem:
    """Reason why a row cannot run; ``absent``: data or weights are missing, which is not an error."""

    row: str
    text: str
    absent: bool = False

    def __str__(self) -> str:
        return f"row '{self.row}': {self.text}"


@dataclass(frozen=True)
class Plan:
    """Runs in order, and their problems."""

    suite: Suite
    engine: Engine
    jobs: tuple[Job, ...]  # pre-training before its dependents; all rows once before any row twice
    problems: tuple[Problem, ...] = ()  # must be empty to start
    left_out: Mapping[str, str] = field(default_factory=dict)  # id -> why an optional row is not run
    num_gpus: int = 1  # processes of each run

    def check(self) -> None:
        """Raise ConfigError with the first problem, and how many more there are."""
        if self.problems:
            more = len(self.problems) - 1
            rest = f" (and {more} more: gn-det compare --dry-run lists them)" if more else ""
            raise ConfigError(f"{self.suite.source}: {self.problems[0]}{rest}")


def make_plan(
    suite: Suite,
    engine: Engine,
    *,
    overrides: Sequence[str] = (),
    only: Sequence[str] = (),
    seeds: int | None = None,
    num_gpus: int = 1,
) -> Plan:
    """Resolve and check every row of a suite.

    Args:
        engine: of the detection rows.
        overrides: config keys from the command line, for all detection rows.
        only: ids or patterns with ``*``; required pre-training rows are added. Empty means all rows.
        seeds: number of runs per row, instead of the suite's.
        num_gpus: number of processes per run.

    Raises:
        ConfigError: ``only`` names no row; too many runs; ``overrides`` without detection rows.
    """
    if seeds is not None and suite.folds:
        raise ConfigError(f"--seeds {seeds} and --folds {suite.folds}: a fold is trained once, give one of them")
    if seeds is not None and not 1 <= seeds <= MAX_SEEDS:
        raise ConfigError(f"--seeds is {seeds}; it must be from 1 to {MAX_SEEDS}")
    if seeds is not None:
        suite = replace(suite, rows=tuple(replace(row, seeds=tuple(range(1, seeds + 1))) for row in suite.rows))
    try:
        wanted = set(row_ids(only or ["*"], suite.rows, f"{suite.source}: --rows"))
    except InvalidValue as error:
        raise ConfigError(str(error)) from None
    needed = {row.weights for row in suite.rows if row.id in wanted}
    rows = [row for row in suite.rows if row.id in wanted or row.id in needed]
    if overrides and not any(row.kind == DETECT for row in rows):
        raise ConfigError(
            f"{suite.source}: {shown(overrides[0])} sets a config key, but no detection row is run; leave it out (rows "
            "of --rows are separated by commas)"
        )
    runs = sum(len(row.seeds) for row in rows)
    if runs > MAX_RUNS:
        raise ConfigError(f"{suite.source}: rows and seeds make {runs} runs; at most {MAX_RUNS} are allowed")
    jobs: list[tuple[int, Job]] = []
    problems: list[Problem] = []
    left_out: dict[str, str] = {}
    built: set[str] = set()
    for row in rows:
        try:
            of_row = _jobs(suite, row, engine, overrides, num_gpus)
            missing = _missing(of_row[0])
            model = row.id if of_row[0].cfg is None else str(of_row[0].cfg.MODEL)
            if model not in built:
                _build_empty(of_row[0], engine)
                built.add(model)
        except UserError as error:
            problems.append(Problem(row.id, str(error)))
            continue
        if missing and row.optional:
            left_out[row.id] = missing
            continue
        problems += [Problem(row.id, missing, absent=True)] if missing else []
        jobs += enumerate(of_row)
    # Seed by seed, with pre-training first, so that an interrupted suite has every row once.
    jobs.sort(key=lambda entry: (entry[0], entry[1].row.kind == DETECT))
    return Plan(suite, engine, tuple(job for _, job in jobs), tuple(problems), left_out, num_gpus)


def _jobs(suite: Suite, row: Row, engine: Engine, overrides: Sequence[str], num_gpus: int) -> list[Job]:
    """Return the runs of a row, with a resolved and checked config."""
    inputs: dict[str, Any] = {"processes": dist.planned_world_size(num_gpus)}
    if row.kind != DETECT:
        of_seeds = [Settings.from_dict({**row.settings, "output": "-", "seed": seed}) for seed in row.seeds]
        settled = [s.settled(dist.resolve_device(s.device), {}) for s in of_seeds]
        return [Job(row, s.seed, settings=s.to_dict(), inputs=inputs) for s in settled]
    # In this order: file, data and weights of the row, keys of the suite, of the row, of the command line.
    cfg = load_config(row.config, check=False)
    merge_overrides(cfg, {f"DATASETS.{key.upper()}": value for key, value in row.data.items()}, "data")
    if row.weights is not None:
        cfg.MODEL.WEIGHTS = row.weights
    merge_overrides(cfg, suite.overrides, "overrides of the suite")
    merge_overrides(cfg, row.overrides, "overrides")
    merge_overrides(cfg, overrides)
    cfg.SEED = max(row.seeds)
    source = next((r for r in suite.rows if r.id == row.weights), None)
    if source is not None and source.kind == DETECT:
        raise ConfigError(f"weights: '{source.id}' is a detection row; name a pre-training row or a file")
    if suite.folds:
        cfg.DATASETS.VAL_FOLD, cfg.DATASETS.TEST = (1, suite.folds), ()
    check_config(cfg, engine.name)
    cfg = settle(cfg, dist.resolve_device(cfg.MODEL.DEVICE))  # the same for all rows, wherever the suite continues
    if suite.folds and os.path.isfile(os.path.expanduser(cfg.DATASETS.TRAIN_JSON)):
        check_split(cfg)
    if not (cfg.DATASETS.TEST or cfg.DATASETS.VAL_JSON or is_split(cfg)):
        raise ConfigError("data: no validation set (DATASETS.TEST is empty); without one there is no AP to compare")
    check_run(cfg, dist.resolve_device(cfg.MODEL.DEVICE), num_gpus)
    check_freeze(cfg)
    files = [s.json_file for s in _sources(cfg) if os.path.isfile(s.json_file)]
    inputs |= {"engine": engine.name, "data": {file: file_hash(Path(file)) for file in files}}
    jobs = []
    for seed in row.seeds:
        fold = {"DATASETS.VAL_FOLD": (seed, suite.folds)} if suite.folds else {}
        needs = None if source is None else (source.id, seed if seed in source.seeds else source.seeds[0])
        jobs.append(Job(row, seed, cfg=edited(cfg, {"SEED": seed, **fold}), needs=needs, inputs=inputs))
    return jobs


def _build_empty(job: Job, engine: Engine) -> None:
    """Build the model of a run, on the meta device if the engine can; 80 classes if unknown; may raise UserError."""
    with torch.device("meta") if job.cfg is None or engine.name == "embedded" else nullcontext():
        if job.cfg is None:
            build_classifier(Settings.from_dict(job.settings), num_classes=10)
        else:
            classes = job.cfg.MODEL.ROI_HEADS.NUM_CLASSES or 80
            engine.build_model(edited(job.cfg, {"MODEL.ROI_HEADS.NUM_CLASSES": classes}))


# ------------------------------------------------------------ data and weights


def _sources(cfg: CfgNode) -> list[Any]:
    """Return the file-based sets of a config; generated ones are part of the code."""
    return [s for split in ("train", "test") for s in datasets_for(cfg, split) if s.name not in GENERATED]


def _missing(job: Job) -> str:
    """Return the first missing data or weights, "" if all are there or can be downloaded."""
    if job.cfg is None:
        data = str(job.settings["data"])
        if data.partition(":")[0] not in BUILTIN and not os.path.isdir(os.path.expanduser(data)):
            return f"data: folder {data} does not exist"
    for source in [] if job.cfg is None else _sources(job.cfg):
        for path, exists in ((source.json_file, os.path.isfile), (source.image_root, os.path.isdir)):
            if not exists(path):
                return f"data: {path} does not exist ({source.origin or 'DATASETS'})"
    if job.weights:
        path, download = locate(job.weights)
        if not download and not path.is_file():
            return f"weights: {shown(job.weights)}: no file {path}, and no row has this id"
    return ""


def file_hash(path: Path) -> str:
    """Return the sha256 of a file, cached while its size and time stay the same."""
    state = path.stat()
    return _hash(str(path), state.st_size, state.st_mtime_ns)


@functools.lru_cache(maxsize=4096)
def _hash(path: str, size: int, modified: int) -> str:
    return sha256_of(path)
