"""From a suite to runs: configs resolved, models built once on no device, all checked before the first run."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from gn_det.checkpoint.catalog import cache_path, mirrored, resolve_url, sha256_of, split_digest, split_options
from gn_det.compare.build import build_classifier, build_empty
from gn_det.compare.fields import SuiteError
from gn_det.compare.references import load_references
from gn_det.compare.suite import DETECT, MAX_SEEDS, Row, Suite, matching
from gn_det.config import dump_config, load_config
from gn_det.config.check import check_config
from gn_det.config.load import merge_overrides
from gn_det.data.catalog import GENERATED, datasets_for
from gn_det.engine import commands, dist
from gn_det.engine.interface import Engine
from gn_det.errors import ConfigError, UserError
from gn_det.text import one_line, shown

#: Runs of a plan.
MAX_RUNS = 2000

logger = logging.getLogger(__name__)

#: Keys that say where and how fast, not what comes out.
_NOT_RESULT = {"OUTPUT_DIR": "", "MODEL.WEIGHTS": "", "DATALOADER.NUM_WORKERS": 0}


@dataclass(frozen=True)
class Job:
    """One run: a row with one seed.

    Attributes:
        row: what is run.
        seed: of the run.
        cfg: of a detection, resolved but for OUTPUT_DIR and the weights of ``needs``; None for a pre-training.
        settings: of a pre-training, without its output; None for a detection.
        needs: (row id, seed) of the pre-training whose weights it starts from.
        inputs: what else its result depends on: engine, processes, contents of the annotation files.
    """

    row: Row
    seed: int
    cfg: CfgNode | None = None
    settings: Mapping[str, Any] | None = None
    needs: tuple[str, int] | None = None
    inputs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.row.id}, seed {self.seed}"

    def settings_key(self, weights_sha: str) -> str:
        """Hash of everything that decides the result but the code of gn_det.

        Args:
            weights_sha: sha256 of the initial weights, "" for none.
        """
        content: dict[str, Any] = {"kind": self.row.kind, "weights": weights_sha, "seed": self.seed, **self.inputs}
        if self.cfg is not None:
            cfg = self.cfg.clone()
            cfg.defrost()
            merge = [word for key, value in _NOT_RESULT.items() for word in (key, value)]
            cfg.merge_from_list(merge)
            content["config"] = dump_config(cfg)
        if self.settings is not None:
            content["settings"] = {k: v for k, v in self.settings.items() if k not in ("output", "workers")}
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Problem:
    """What stands in the way of a row.

    Attributes:
        row: its id.
        text: one line with the key.
        absent: something is not there (data, weights), rather than wrong.
    """

    row: str
    text: str
    absent: bool = False

    def __str__(self) -> str:
        return f"row '{self.row}': {self.text}"


@dataclass(frozen=True)
class Plan:
    """Runs in their order, and what is wrong with them.

    Attributes:
        suite: as written.
        engine: that trains the detection rows.
        jobs: pre-trainings before what needs them; every row once before any row twice.
        problems: none may be left when the first run starts.
        left_out: id -> why an optional row is not run.
        num_gpus: processes of each run.
    """

    suite: Suite
    engine: Engine
    jobs: tuple[Job, ...]
    problems: tuple[Problem, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    num_gpus: int = 1

    def check(self) -> None:
        """Refuse to start with a problem.

        Raises:
            SuiteError: the first problem, and how many more there are.
        """
        if self.problems:
            more = len(self.problems) - 1
            rest = f" (and {more} more problem(s): gn-det compare --dry-run lists them)" if more else ""
            raise SuiteError(f"{self.suite.source}: {self.problems[0]}{rest}")


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
        suite: from :func:`gn_det.compare.suite.load_suite`.
        engine: of the detection rows.
        overrides: config keys from the command line, for every detection row.
        only: ids or patterns with ``*``; the pre-training rows they start from come along. Empty takes all.
        seeds: runs of every row, instead of what the suite says.
        num_gpus: processes of each run.

    Raises:
        SuiteError: ``only`` names no row.
    """
    wanted = _wanted(suite, only)
    runs = sum(seeds or len(row.seeds) for row in suite.rows if row.id in wanted)
    if runs > MAX_RUNS or (seeds or 1) > MAX_SEEDS:
        raise SuiteError(f"{suite.source}: rows and seeds make {runs} runs; at most {MAX_RUNS} are possible")
    jobs: list[Job] = []
    problems: list[Problem] = []
    left_out: dict[str, str] = {}
    built: set[str] = set()
    for row in suite.rows:
        if row.id not in wanted:
            continue
        mine = tuple(range(1, seeds + 1)) if seeds else row.seeds
        found = [*_reference_problems(row)]
        try:
            of_row = [_job(suite, row, seed, engine, overrides, num_gpus, seeds) for seed in mine]
            found += _absent(of_row[0], suite)
            _check_builds(of_row[0], engine, built)
        except UserError as error:
            found.append(Problem(row.id, str(error)))
            of_row = []
        if row.optional and found and all(p.absent for p in found):
            left_out[row.id] = found[0].text
            continue
        problems += found
        jobs += of_row
    return Plan(suite, engine, _ordered(jobs), tuple(problems), left_out, num_gpus)


def _wanted(suite: Suite, only: Sequence[str]) -> set[str]:
    ids = [row.id for row in suite.rows]
    if not only:
        return set(ids)
    wanted: set[str] = set()
    for pattern in only:
        found = matching(pattern, ids)
        if not found:
            raise SuiteError(
                f"{suite.source}: --rows: no row {shown(pattern)}; they are {one_line(', '.join(ids), 1000)}"
            )
        wanted.update(found)
    return wanted | {str(row.weights) for row in suite.rows if row.id in wanted and row.weights in ids}


def _ordered(jobs: Sequence[Job]) -> tuple[Job, ...]:
    """Seed by seed, and in each the pre-trainings first: a suite that is cut short has every row once."""
    ranks: dict[str, int] = {}

    def rank(job: Job) -> int:
        ranks[job.row.id] = ranks.get(job.row.id, -1) + 1
        return ranks[job.row.id]

    numbered = [(rank(job), job.row.kind == DETECT, position, job) for position, job in enumerate(jobs)]
    return tuple(entry[-1] for entry in sorted(numbered, key=lambda entry: entry[:3]))


# ------------------------------------------------------------ one row


def _job(
    suite: Suite,
    row: Row,
    seed: int,
    engine: Engine,
    overrides: Sequence[str],
    num_gpus: int,
    seeds: int | None,
) -> Job:
    world = int(os.environ["WORLD_SIZE"]) if dist.under_torchrun() else num_gpus
    inputs: dict[str, Any] = {"processes": world}
    if row.kind != DETECT:
        from gn_det.classification import Settings

        settings = Settings.from_dict({**row.settings, "output": "-", "seed": seed})
        return Job(row, seed, settings=settings.to_dict(), inputs=inputs)
    cfg = _config(suite, row, seed, overrides)
    source = next((r for r in suite.rows if r.id == row.weights), None)
    needs = None
    if source is not None:
        if source.kind == DETECT:
            raise ConfigError(f"weights: '{source.id}' is a detection row; name a pre-training row or a file")
        theirs = tuple(range(1, seeds + 1)) if seeds else source.seeds
        needs = (source.id, seed if seed in theirs else theirs[0])
    check_config(cfg, engine.name)
    if not cfg.DATASETS.TEST and not cfg.DATASETS.VAL_JSON:
        raise ConfigError("data: no validation set (DATASETS.TEST is empty); without one there is no AP to compare")
    commands.check_run(cfg, dist.resolve_device(cfg.MODEL.DEVICE), num_gpus)
    commands.check_freeze(cfg)
    inputs |= {"engine": engine.name, "data": _data_hashes(cfg)}
    return Job(row, seed, cfg=cfg, needs=needs, inputs=inputs)


def _config(suite: Suite, row: Row, seed: int, overrides: Sequence[str]) -> CfgNode:
    """File, then data and weights of the row, then the suite's keys, the row's, the command line's."""
    cfg = load_config(row.config, check=False)
    places = {key.upper(): value for key, value in row.data.items()}
    merge_overrides(cfg, [word for key, value in places.items() for word in (f"DATASETS.{key}", value)], "data")
    if row.weights is not None:
        cfg.MODEL.WEIGHTS = row.weights
    merge_overrides(cfg, as_words(suite.overrides), "overrides of the suite")
    merge_overrides(cfg, as_words(row.overrides), "overrides")
    merge_overrides(cfg, overrides)
    cfg.SEED = seed
    return cfg


def as_words(overrides: Mapping[str, Any]) -> list[str]:
    """``{KEY: value}`` as the words of a command line."""
    return [word for key, value in overrides.items() for word in (key, str(value))]


def _check_builds(job: Job, engine: Engine, built: set[str]) -> None:
    """Build the model without memory for it; a model that was built before is not built again.

    Raises:
        UserError: the config describes no model.
    """
    if job.cfg is None:
        build_classifier(job.settings or {})
        return
    text = str(job.cfg.MODEL)
    if text not in built:
        built.add(text)
        build_empty(engine, job.cfg)


# ------------------------------------------------------------ what is there


def _reference_problems(row: Row) -> list[Problem]:
    known, _ = load_references()
    return [Problem(row.id, f"reference: no published row {shown(r)}") for r in row.references if r not in known]


def _absent(job: Job, suite: Suite) -> list[Problem]:
    """Data and weights that are not there."""
    row = job.row
    if job.cfg is None:
        from gn_det.classification.settings import BUILTIN

        data = str((job.settings or {})["data"])
        there = data in BUILTIN or os.path.isdir(os.path.expanduser(data))
        return [] if there else [Problem(row.id, f"data: folder {data} is not there", absent=True)]
    found = []
    for split, key in (("train", "DATASETS.TRAIN"), ("test", "DATASETS.TEST")):
        for source in datasets_for(job.cfg, split):
            if source.name in GENERATED:
                continue
            missing = [] if os.path.isfile(source.json_file) else [source.json_file]
            missing += [] if os.path.isdir(source.image_root) else [source.image_root]
            found += [Problem(row.id, f"data: {path} is not there ({source.origin or key})", True) for path in missing]
    if job.needs is None:
        problem = _weights_problem(str(job.cfg.MODEL.WEIGHTS))
        found += [Problem(row.id, f"weights: {problem}", absent=True)] if problem else []
    return found[:1]


def _weights_problem(uri: str) -> str:
    """Why weights cannot be there, "" where they are or can be fetched."""
    plain = split_options(uri)[0]
    path = place_of(plain)
    if not uri or os.path.isfile(path):
        return ""
    url = resolve_url(split_digest(plain)[0])
    if url is None:
        return f"{path} is not there, and no row has this id"
    source = mirrored(url)
    return "" if "://" in source else f"{uri}: neither {path} nor the mirror's {source} is there"


def place_of(uri: str) -> Path:
    """Where the file of a path or URI lies, or would lie after the download; see :func:`..catalog.local_path`."""
    plain, _ = split_digest(uri)
    url = resolve_url(plain)
    if url is None:
        return Path(os.path.expanduser(re.sub("^file://", "", plain, flags=re.IGNORECASE)))
    source = mirrored(url)
    return Path(source) if "://" not in source and not cache_path(url).is_file() else cache_path(url)


_hashes: dict[tuple[str, int, int], str] = {}


def _data_hashes(cfg: CfgNode) -> dict[str, str]:
    """sha256 of the annotation files that are there; generated sets are part of the code."""
    hashes = {}
    for split in ("train", "test"):
        for source in datasets_for(cfg, split):
            if source.name not in GENERATED and os.path.isfile(source.json_file):
                hashes[source.json_file] = file_hash(Path(source.json_file))
    return hashes


def file_hash(path: Path) -> str:
    """sha256 of a file, remembered as long as its size and time stay."""
    state = path.stat()
    key = (str(path), state.st_size, state.st_mtime_ns)
    if key not in _hashes:
        _hashes[key] = sha256_of(path)
    return _hashes[key]
