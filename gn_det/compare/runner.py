"""Run the missing runs of a plan: finished ones are skipped, interrupted ones resume, failures do not stop the rest.

Each run has a folder ``runs/<row>/seed-<n>-<key>/`` with its record in ``run.json``. The key changes with settings,
weights and code, so that results are never overwritten.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import shlex
import subprocess
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from fvcore.common.config import CfgNode

from gn_det.checkpoint.weights_uri import local_path
from gn_det.compare.execute import Outcome
from gn_det.compare.plan import Job, Plan, file_hash
from gn_det.data.sets import estimate_sizes
from gn_det.engine import choice as engines
from gn_det.engine import dist
from gn_det.engine.hooks import Interrupted
from gn_det.engine.output import FINAL, alone_in
from gn_det.engine.schedule import scale_schedule
from gn_det.errors import UserError, WeightsError
from gn_det.files import atomic_write, check_writable, json_bytes
from gn_det.terminal import say
from gn_det.text import count, one_line

#: Raise it by one with every change of gn_det that can change the result of a run (model, loss, schedule, data,
#: evaluation, pre-training): finished runs of another number are then run again, and marked in reports.
#: Until November 2026 a hash of the source stood here, which differs from every number.
RESULTS_VERSION = 2

RUNNING, DONE, FAILED, INTERRUPTED = "running", "done", "failed", "interrupted"
RECORD = "run.json"


@dataclass
class Record:
    """Record of one run; metrics, cost and size by column, None if a number is unavailable."""

    row: str
    seed: int
    key: str  # hash of settings_key and version; names the folder
    settings_key: str  # hash of settings, data and weights
    version: str  # RESULTS_VERSION
    status: str = RUNNING  # also after the run was killed
    reason: str = ""  # why it failed, in one line
    sessions: list[dict[str, Any]] = field(default_factory=list)  # host, device and day of each start
    software: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float | None] = field(default_factory=dict)
    cost: dict[str, float | None] = field(default_factory=dict)
    size: dict[str, float | None] = field(default_factory=dict)
    curve: list[dict[str, float]] = field(default_factory=list)
    weights: str = ""  # final weights, relative to the record
    weights_sha: str = ""
    config: str = ""  # resolved config or settings, as text


class Store:
    """The folder of a comparison."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)

    def folder_of(self, record: Record) -> Path:
        """Return the folder of a run; replaces ``*``, which is not allowed in file names."""
        return self.root / "runs" / record.row.replace("*", "_star") / f"seed-{record.seed}-{record.key[:8]}"

    def read(self, row: str, seed: int) -> list[Record]:
        """Return all records of a row and seed, newest last; unreadable ones are skipped."""
        names = {f.name for f in fields(Record)}
        found = []
        for path in (self.root / "runs" / row.replace("*", "_star")).glob(f"seed-{seed}-*/{RECORD}"):
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
                record = Record(**{k: v for k, v in content.items() if k in names})
            except (OSError, ValueError, TypeError, AttributeError):
                continue
            if (record.row, record.seed) == (row, seed) and self.folder_of(record) == path.parent:
                started = str(record.sessions[-1].get("started", "")) if record.sessions else ""
                found.append((started, path.parent.name, record))
        return [entry[-1] for entry in sorted(found, key=lambda entry: entry[:2])]

    def write(self, record: Record) -> None:
        """Write a record atomically, or raise WriteError."""
        write_json(self.folder_of(record) / RECORD, vars(record))


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write readable json atomically; numbers that are not finite become null."""
    finite = json.loads(json.dumps(content), parse_constant=lambda _: None)
    atomic_write(path, json_bytes(finite, indent=1) + b"\n")


# ------------------------------------------------------------ which record counts


class MissingWeights(UserError):
    """The run that produces a job's initial weights did not succeed."""


def find(
    job: Job, plan: Plan, store: Store, *, any_version: bool = False, else_any: bool = False
) -> tuple[Record, str]:
    """Return the record of a job (a new one if there is none), and its initial weights if another row makes them.

    Finished runs of another version count with ``any_version``; with ``else_any`` only if this version has no run.

    Raises:
        MissingWeights: the run that produces its initial weights is not done.
    """
    weights, sha = "", job.initial_sha()
    if job.needs is not None:
        row, seed = job.needs
        maker = next(j for j in plan.jobs if (j.row.id, j.seed) == job.needs)
        made, _ = find(maker, plan, store, any_version=any_version, else_any=else_any)
        if made.status != DONE or not made.weights:
            raise MissingWeights(f"it starts from '{row}' (seed {seed}), which is {made.status}")
        weights, sha = str(store.folder_of(made) / made.weights), made.weights_sha
    key, version = job.settings_key(sha), str(RESULTS_VERSION)
    same = [r for r in store.read(job.row.id, job.seed) if r.settings_key == key]
    found = choose(same, version, any_version=any_version, else_any=else_any)
    return found or Record(job.row.id, job.seed, run_key(key, version), key, version), weights


def choose(records: Sequence[Record], version: str, *, any_version: bool, else_any: bool = False) -> Record | None:
    """Return the record of this version, or the newest finished one of any; see :func:`find`."""
    exact = [r for r in records if r.version == version]
    other = [r for r in records if r.status == DONE] if any_version or (else_any and not exact) else []
    if exact and (exact[-1].status == DONE or not other):
        return exact[-1]
    return other[-1] if other else None


def run_key(settings_key: str, version: str) -> str:
    return hashlib.sha256(f"{settings_key} {version}".encode()).hexdigest()[:16]


# ------------------------------------------------------------ running


@dataclass
class Runner:
    """Runs the jobs of a plan one after another.

    ``execute`` runs or resumes one in a folder, from initial weights ("" for the config's). With ``any_version``, runs
    of another version of gn_det count, too. Only one rank of torchrun is ``recording``, and prints.
    """

    plan: Plan
    store: Store
    execute: Callable[[Job, Path, str], Outcome]
    any_version: bool = False
    recording: bool = True

    def run(self) -> dict[str, str]:
        """Run all jobs and return {name: reason} of failures; a signal marks the current run as interrupted."""
        if dist.under_torchrun() and self.plan.jobs:
            dist.start_group(self.plan.jobs[0].device)
        try:
            check_writable(self.store.root, "--output")
            with alone_in(self.store.root, key="--output"):
                reasons = {job.name: self._run(job, number) for number, job in enumerate(self.plan.jobs, 1)}
        finally:
            dist.stop_group()
        return {name: reason for name, reason in reasons.items() if reason}

    def _run(self, job: Job, number: int) -> str:
        """Run a job unless it is done; return why it failed, or ""."""
        head = f"[{number}/{len(self.plan.jobs)}] {job.name}"
        # Use rank 0's view of the disk on all ranks of torchrun, because others might look before it has written.
        record, weights, reason = dist.broadcast(self._decide(job) if dist.rank() == 0 else None)
        if record is not None:
            folder = self.store.folder_of(record)
            if record.status == DONE:
                self._say(f"{head}: already done ({folder})")
                return ""
            self._say(f"{head}: {'resuming' if record.sessions else 'starting'} in {folder}")
            self._execute(job, record, folder, weights)
            reason = record.reason
        if record is None or reason:
            self._say(f"{head}: failed: {reason}")
        else:
            self._say(f"{head}: {_numbers(record)} ({record.sessions[-1]['seconds']:.0f} s)")
        return str(reason)

    def _decide(self, job: Job) -> tuple[Record | None, str, str]:
        """Return record and initial weights of a job, or no record and the reason if its pre-training failed."""
        try:
            record, weights = find(job, self.plan, self.store, any_version=self.any_version)
        except MissingWeights as error:
            return None, "", str(error)
        if record.status == DONE and record.weights and not (self.store.folder_of(record) / record.weights).is_file():
            record.status = RUNNING  # its weights were deleted, and a row that starts from them would fail
        return record, weights, ""

    def _execute(self, job: Job, record: Record, folder: Path, weights: str) -> None:
        record.status, record.reason = RUNNING, ""
        record.sessions.append(_session(job, self.plan.num_gpus))
        engine = "pretrain" if job.cfg is None else f"{self.plan.engine.name} ({self.plan.engine.version()})"
        software = {"torch": torch.__version__, "python": platform.python_version(), "engine": engine}
        record.software = {**software, "commit": package_commit()}
        self._write(record)
        began = time.perf_counter()
        try:
            for name, value in vars(self.execute(job, folder, weights)).items():
                setattr(record, name, value)
            if self.recording:
                record.weights, record.weights_sha = FINAL, file_hash(folder / FINAL)
            record.status = DONE
        except (Interrupted, KeyboardInterrupt, SystemExit) as error:
            record.status, record.reason = INTERRUPTED, engines.error_line(error)
            raise
        except Exception as error:
            bug = not isinstance(error, UserError)  # ends one row, not the whole suite; the stack trace is kept
            record.status, record.reason = FAILED, one_line(engines.error_line(error) if bug else error, limit=None)
            if bug and self.recording:
                atomic_write(folder / "trace.txt", traceback.format_exc())
        finally:
            record.sessions[-1]["seconds"] = round(time.perf_counter() - began, 1)
            self._write(record)

    def _write(self, record: Record) -> None:
        if self.recording:
            self.store.write(record)

    def _say(self, line: str) -> None:
        if self.recording:
            say(line)


def dry_run(plan: Plan, store: Store, *, any_version: bool) -> int:
    """Print what would run; return 2 if a row is wrong (missing data or weights are listed but are not errors)."""
    images: dict[str, int] = {}  # of an epoch by data settings, because COCO's annotations take long to read
    for job in plan.jobs:
        try:
            record, _ = find(job, plan, store, any_version=any_version)
            state = "done" if record.status == DONE else "resumes" if record.sessions else "to run"
        except MissingWeights:
            state = f"after {job.needs[0]}" if job.needs else ""
        if job.cfg is None:
            what = "{arch} {norm} on {data}, batch {batch_size}".format(**job.settings)
        else:
            keys = (shlex.join((key, str(value))) for key, value in job.row.overrides.items())
            what = " ".join(filter(None, (job.row.config, _length(job.cfg, job.inputs["processes"], images), *keys)))
        say(f"{job.name:40s} {state:10s} {what}".rstrip())
    for identity, why in plan.left_out.items():
        say(f"{identity:40s} left out   {why}")
    for problem in plan.problems:
        say(f"{'missing' if problem.absent else 'wrong'}: {problem}")
    say("Dry run: nothing was trained or written.")
    return 2 if any(not p.absent for p in plan.problems) else 0


def _length(cfg: CfgNode, processes: int, images: dict[str, int]) -> str:
    """Return how long a detection row trains here, in brackets; "" where its data are missing."""
    key = f"{cfg.DATASETS} {cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS}"
    try:
        if key not in images:
            images[key] = estimate_sizes(cfg).images
        solver = scale_schedule(cfg, processes, images[key])[0].SOLVER
    except UserError:
        return ""
    epochs = f", {solver.MAX_ITER * solver.IMS_PER_BATCH / images[key]:.3g} epochs" if images[key] else ""
    return f"({solver.MAX_ITER} iterations of {solver.IMS_PER_BATCH} images{epochs})"


def fetch_weights(plan: Plan) -> None:
    """Download missing weights before the first run, not days later; a UserError names the row."""
    for job in plan.jobs:
        if job.weights:
            try:
                local_path(job.weights)
            except UserError as error:
                raise WeightsError(f"row '{job.row.id}': weights: {error}") from None


def _session(job: Job, num_gpus: int) -> dict[str, Any]:
    """Return machine and day of a start; costs are only compared if both are equal."""
    now = datetime.now().astimezone()
    device = dist.device_name(job.device)
    if not job.device.startswith("cuda"):
        device += f", {count(torch.get_num_threads(), 'thread')}"
    return {
        "host": platform.node(),
        "device": f"{num_gpus} x {device}" if num_gpus > 1 else device,
        "day": now.date().isoformat(),
        "started": now.isoformat(timespec="seconds"),
        "load": round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None,
    }


@functools.lru_cache(maxsize=1)
def package_commit() -> str:
    """Return the commit of gn_det's checkout, with "+" if its code was changed since; "" for an installed package."""
    root = Path(__file__).resolve().parent.parent.parent
    if not (root / ".git").exists():
        return ""
    git = functools.partial(subprocess.run, cwd=root, capture_output=True, text=True, timeout=20, check=True)
    try:
        changed = git(["git", "status", "--porcelain", "--untracked-files=no", "gn_det"]).stdout
        return git(["git", "rev-parse", "HEAD"]).stdout[:12] + "+" * bool(changed)
    except (OSError, subprocess.SubprocessError):
        return ""


def _numbers(record: Record) -> str:
    shown = {"box AP": "box_ap", "mask AP": "mask_ap", "top-1 error": "top1_error"}
    found = {name: record.metrics.get(key) for name, key in shown.items()}
    return ", ".join(f"{name} {value:.2f}" for name, value in found.items() if value is not None)
