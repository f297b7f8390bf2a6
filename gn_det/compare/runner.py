"""Run what is missing of a plan: done runs are skipped, interrupted ones go on, failed ones do not stop the others."""

from __future__ import annotations

import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch

from gn_det.checkpoint.catalog import local_path, split_options
from gn_det.compare.execute import Executor, Outcome
from gn_det.compare.plan import Job, Plan, file_hash, place_of
from gn_det.compare.store import DONE, FAILED, INTERRUPTED, RUNNING, Record, Store, new_session
from gn_det.compare.version import code_version
from gn_det.engine import choice as engines
from gn_det.engine import dist
from gn_det.engine.hooks import Interrupted
from gn_det.engine.output import alone_in, check_writable
from gn_det.errors import UserError
from gn_det.files import atomic_write
from gn_det.text import one_line

logger = logging.getLogger(__name__)

_say = partial(print, flush=True)
_T = TypeVar("_T")


@dataclass
class Summary:
    """What came of a suite.

    Attributes:
        done: runs that were finished now or before.
        skipped: of those, the ones that were there already.
        failed: name of the run -> reason.
    """

    done: int = 0
    skipped: int = 0
    failed: dict[str, str] = field(default_factory=dict)


@dataclass
class Runner:
    """Runs the jobs of a plan one after another.

    Attributes:
        plan: checked.
        store: where they lie.
        execute: runs one.
        any_version: runs of another version of gn_det count too.
        say: receives a line for every run.
        recording: this process writes the records; the other ranks of torchrun only read them.
    """

    plan: Plan
    store: Store
    execute: Executor
    any_version: bool = False
    say: Callable[[str], None] = _say
    recording: bool = True

    def run(self) -> Summary:
        """All jobs; what fails is recorded and told.

        Raises:
            InUse: another comparison runs in the store.
            Interrupted, KeyboardInterrupt, SystemExit: asked to stop; what ran is recorded as interrupted.
            WriteError: a record cannot be written.
        """
        jobs = self.plan.jobs
        if dist.under_torchrun() and jobs:
            dist.start_group(_device(jobs[0]))
        try:
            check_writable(self.store.root)
            with alone_in(self.store.root, key="--output"):
                return self._run_all(jobs)
        finally:
            if dist.under_torchrun():
                dist.stop_group()

    def _run_all(self, jobs: Sequence[Job]) -> Summary:
        summary = Summary()
        for number, job in enumerate(jobs, 1):
            head = f"[{number}/{len(jobs)}] {job.name}"
            record, weights, reason = _of_first_rank(lambda job=job: self._decide(job))  # type: ignore[misc]
            if record is None:
                summary.failed[job.name] = reason
                self.say(f"{head}: failed: {reason}")
                continue
            if record.status == DONE:
                summary.done, summary.skipped = summary.done + 1, summary.skipped + 1
                self.say(f"{head}: done before ({self.store.folder_of(record)})")
                continue
            again = "goes on" if record.sessions else "begins"
            self.say(f"{head}: {again} in {self.store.folder_of(record)}")
            started = time.perf_counter()
            self._run_one(job, record, weights)
            if record.status == DONE:
                summary.done += 1
                self.say(f"{head}: {_numbers(record)} ({time.perf_counter() - started:.0f} s)")
            else:
                summary.failed[job.name] = record.reason
                self.say(f"{head}: failed: {record.reason}")
        return summary

    def fetch_weights(self) -> None:
        """Download what is not there yet: a name that leads nowhere must not end the third day.

        Raises:
            UserError: names the row.
        """
        for job in self.plan.jobs:
            if job.cfg is not None and job.needs is None and job.cfg.MODEL.WEIGHTS:
                try:
                    local_path(str(job.cfg.MODEL.WEIGHTS))
                except UserError as error:
                    raise type(error)(f"row '{job.row.id}': weights: {error}") from None

    # ------------------------------------------------------------ one run

    def _decide(self, job: Job) -> tuple[Record | None, str, str]:
        """Record and initial weights of a job; no record, and why, where the run that it starts from failed."""
        try:
            return *self.find(job), ""
        except NotThere as reason:
            return None, "", str(reason)

    def find(self, job: Job) -> tuple[Record, str]:
        """The record of a job, new where there is none, and its initial weights where another row makes them.

        Raises:
            NotThere: the run that it starts from did not succeed.
        """
        weights, sha = self.weights_of(job)
        settings_key = job.settings_key(sha)
        version = version_of(job, self.plan)
        found = choose(self.store.read(job.row.id, job.seed), settings_key, version, any_version=self.any_version)
        if found is None:
            key = run_key(settings_key, version)
            found = Record(job.row.id, job.seed, key, settings_key, version)
        elif found.status == DONE and not (self.store.folder_of(found) / found.weights).is_file() and found.weights:
            found.status = RUNNING  # its weights were deleted: a row that starts from them would fail
        return found, weights

    def weights_of(self, job: Job) -> tuple[str, str]:
        """Path ("" where the config names the weights) and sha256 of what a job starts from.

        Raises:
            NotThere: they do not exist: the row that makes them failed.
        """
        if job.needs is None:
            return "", initial_sha(job)
        row, seed = job.needs
        maker = next(j for j in self.plan.jobs if (j.row.id, j.seed) == (row, seed))
        record, _ = self.find(maker)
        if record.status != DONE or not record.weights:
            raise NotThere(f"it starts from '{row}' (seed {seed}), which is {record.status}")
        return str(self.store.folder_of(record) / record.weights), record.weights_sha

    def _run_one(self, job: Job, record: Record, weights: str) -> None:
        folder = self.store.folder_of(record)
        record.status, record.reason = RUNNING, ""
        record.sessions.append(new_session(device_name(job, self.plan)))
        record.software = {
            "torch": torch.__version__,
            "python": sys.version.split()[0],
            "engine": _engine(job, self.plan),
        }
        self._write(record)
        began = time.perf_counter()
        try:
            outcome = self.execute(job, folder, weights)
        except (Interrupted, KeyboardInterrupt, SystemExit) as error:
            record.status, record.reason = INTERRUPTED, engines.error_line(error)
            self._write(record)
            raise
        except UserError as error:
            record.status, record.reason = FAILED, one_line(error, limit=None)
        except Exception as error:  # a defect ends one row, not the night's suite; its trace is kept
            record.status, record.reason = FAILED, one_line(engines.error_line(error), limit=None)
            if self.recording:
                atomic_write(folder / "trace.txt", traceback.format_exc())
        else:
            take(record, outcome, folder)
        record.sessions[-1]["seconds"] = round(time.perf_counter() - began, 1)
        self._write(record)

    def _write(self, record: Record) -> None:
        if self.recording:
            self.store.write(record)


def _of_first_rank(decide: Callable[[], _T]) -> _T:
    """What rank 0 finds on disk, on every rank of torchrun: the others would look before it has written."""
    return dist.broadcast(decide() if dist.rank() == 0 else None)


class NotThere(UserError):
    """The weights of a run do not exist."""


def take(record: Record, outcome: Outcome, folder: Path) -> None:
    """Put an outcome into the record of its run."""
    record.status = DONE
    record.metrics, record.curve, record.config = outcome.metrics, outcome.curve, outcome.config
    record.cost, record.size = outcome.cost, outcome.size
    if outcome.weights is not None:
        record.weights = os.path.relpath(outcome.weights, folder)
        record.weights_sha = file_hash(outcome.weights)


def choose(records: Sequence[Record], settings_key: str, version: str, *, any_version: bool) -> Record | None:
    """The record of these settings: of this version, or with ``any_version`` the newest finished one of any."""
    same = [r for r in records if r.settings_key == settings_key]
    exact = [r for r in same if r.version == version]
    if exact and (exact[-1].status == DONE or not any_version):
        return exact[-1]
    other = [r for r in same if r.status == DONE] if any_version else []
    return other[-1] if other else exact[-1] if exact else None


def run_key(settings_key: str, version: str) -> str:
    import hashlib

    return hashlib.sha256(f"{settings_key} {version}".encode()).hexdigest()[:16]


def version_of(job: Job, plan: Plan) -> str:
    return code_version(plan.engine.name if job.cfg is not None else "pretrain")


def initial_sha(job: Job) -> str:
    """Of the weights that a config names, with the options behind the name; "" where there are none or not here yet."""
    uri = str(job.cfg.MODEL.WEIGHTS) if job.cfg is not None else ""
    if not uri:
        return ""
    plain, options = split_options(uri)
    path = place_of(plain)
    return f"{file_hash(path)} {options}" if path.is_file() else ""


def device_name(job: Job, plan: Plan) -> str:
    """The GPU, or the processor and its threads, and how many of them."""
    device = _device(job)
    count = f"{plan.num_gpus} x " if plan.num_gpus > 1 else ""
    if device.startswith("cuda"):
        return f"{count}{torch.cuda.get_device_name()}"
    return f"{count}{_processor()}, {torch.get_num_threads()} thread(s)"


def _device(job: Job) -> str:
    wanted = str(job.cfg.MODEL.DEVICE) if job.cfg is not None else str((job.settings or {}).get("device", "auto"))
    return dist.resolve_device(wanted)


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        import platform

        return platform.processor() or platform.machine() or "CPU"


def _engine(job: Job, plan: Plan) -> str:
    return f"{plan.engine.name} ({plan.engine.version()})" if job.cfg is not None else "pretrain"


def _numbers(record: Record) -> str:
    shown = {"box_ap": "box AP", "mask_ap": "mask AP", "top1_error": "top-1 error"}
    parts = [f"{name} {record.metrics[key]:.2f}" for key, name in shown.items() if record.metrics.get(key) is not None]
    return ", ".join(parts)
