"""``gn-det compare``: from words to a plan, runs and a report."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from gn_det.compare.document import write_report
from gn_det.compare.execute import Trainer
from gn_det.compare.outcomes import collect
from gn_det.compare.plan import Job, Plan, as_argv, make_plan
from gn_det.compare.runner import DONE, MissingWeights, Runner, Store, Summary, fetch_weights, find
from gn_det.compare.suite import Suite, load_suite, parse_suite
from gn_det.data.sets import estimate_sizes
from gn_det.engine import choice as engines
from gn_det.engine import dist
from gn_det.engine.output import InUse
from gn_det.engine.schedule import scale_schedule
from gn_det.errors import ConfigError, UserError
from gn_det.terminal import say
from gn_det.text import one_line, shown

#: Runs of one row.
_MOST_SEEDS = 1000


@dataclass(frozen=True)
class Request:
    """What the command line asks for.

    Attributes:
        suite: path or shipped name; "" with ``configs``.
        configs: the rows of a comparison on own data; the first is the baseline.
        data: ``train_json`` ... ``val_images`` of own data.
        overrides: config keys for every detection row.
        output: folder; "" is ``output/compare/<suite>``.
        rows: ids or patterns; empty takes all.
        seeds: runs of every row; None as the suite says.
        num_gpus: processes of each run.
        engine: as ``--engine``.
        any_version: finished runs of another version count.
        dry_run, report_only: print the plan; write the report of what is there.
    """

    suite: str = ""
    configs: Sequence[str] = ()
    data: dict[str, str] | None = None
    overrides: Sequence[str] = ()
    output: str = ""
    rows: Sequence[str] = ()
    seeds: int | None = None
    num_gpus: int = 1
    engine: str = "auto"
    any_version: bool = False
    dry_run: bool = False
    report_only: bool = False


def compare(request: Request) -> int:
    """Run what is missing and write the report.

    Returns:
        0, or 1 where a row failed.

    Raises:
        UserError: the suite, a row of it or the folder cannot be used; nothing was run.
        Interrupted: asked to stop; the report holds what is done.
    """
    suite = find_suite(request)
    if request.seeds is not None and not 1 <= request.seeds <= _MOST_SEEDS:
        raise ConfigError(f"--seeds {one_line(request.seeds)} must lie between 1 and {_MOST_SEEDS}")
    engine = engines.load(engines.choose(request.engine))

    def planned(rows: Sequence[str]) -> Plan:
        return make_plan(
            suite, engine, overrides=request.overrides, only=rows, seeds=request.seeds, num_gpus=request.num_gpus
        )

    whole = planned(())
    plan = planned(request.rows) if request.rows else whole
    store = Store(request.output or Path("output") / "compare" / suite.name)
    if request.dry_run:
        return show(plan, store, any_version=request.any_version)
    first_rank = not dist.under_torchrun() or os.environ["RANK"] == "0"
    tell = say if first_rank else _silent
    trainer = Trainer(engine, request.num_gpus, measuring=first_rank)
    runner = Runner(plan, store, trainer, any_version=request.any_version, say=tell, recording=first_rank)
    summary = Summary()
    if not request.report_only:
        plan.check()
        fetch_weights(plan)
    try:
        if not request.report_only:
            summary = runner.run()
    except InUse:
        first_rank = False  # the report is written by who runs there
        raise
    finally:
        if first_rank:
            results = collect(whole, store, any_version=request.any_version, any_settings=request.report_only)
            write_report(results, store, datetime.now().astimezone().strftime("%Y-%m-%d"))
    for name, reason in summary.failed.items():
        tell(f"failed: {name}: {reason}")
    # torchrun ends all ranks when one fails, and rank 0 may still be measuring: it alone tells
    return 1 if summary.failed and first_rank else 0


def show(plan: Plan, store: Store, *, any_version: bool) -> int:
    """Print what would be run; nothing is run or written.

    Returns:
        0, or 2 where a row is wrong (data and weights that are not there yet are told, and no mistake).
    """
    images: dict[str, int] = {}
    for job in plan.jobs:
        try:
            record, _ = find(job, plan, store, any_version=any_version)
            state = "done" if record.status == DONE else "goes on" if record.sessions else "to run"
        except MissingWeights:
            state = f"after {job.needs[0]}" if job.needs else ""
        say(f"{job.name:40s} {state:10s} {_described(job, images)}".rstrip())
    for identity, why in plan.left_out.items():
        say(f"{identity:40s} left out   {why}")
    for problem in plan.problems:
        say(f"{'not there yet' if problem.absent else 'wrong'}: {problem}")
    print("Dry run: nothing was trained or written.")
    return 2 if any(not p.absent for p in plan.problems) else 0


def _described(job: Job, images: dict[str, int]) -> str:
    if job.cfg is not None:
        words = (job.row.config, _length(job.cfg, job.inputs["processes"], images), *as_argv(job.row.overrides))
        return " ".join(word for word in words if word)
    settings = job.settings or {}
    return f"{settings['arch']} {settings['norm']} on {settings['data']}, batch {settings['batch_size']}"


def _length(cfg: CfgNode, processes: int, images: dict[str, int]) -> str:
    """How long a detection row trains here, in brackets; "" where its data are not there to tell.

    Args:
        processes: of the run, one GPU each.
        images: in an epoch, by data settings; filled in, because COCO's annotations take long to read.
    """
    key = f"{cfg.DATASETS} {cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS}"
    try:
        if key not in images:
            images[key] = estimate_sizes(cfg).images
        solver = scale_schedule(cfg, processes, images[key])[0].SOLVER
    except UserError:
        return ""
    count = images[key]
    epochs = f", {solver.MAX_ITER * solver.IMS_PER_BATCH / count:.3g} epochs" if count else ""
    return f"({solver.MAX_ITER} iterations of {solver.IMS_PER_BATCH} images{epochs})"


def _silent(line: str) -> None:
    """Of the other ranks, rank 0 speaks."""


# ------------------------------------------------------------ which suite


def find_suite(request: Request) -> Suite:
    """The suite of a request: a file, a shipped one, or one made of configs and own data.

    Raises:
        ConfigError: neither or both, or it cannot be used.
    """
    if request.configs:
        if request.suite:
            raise ConfigError(f"give a suite ({request.suite}) or --configs, not both")
        return own_suite(request.configs, request.data or {})
    if request.data:
        raise ConfigError("own data (--train-json ...) needs --configs; a suite names its data itself")
    if not request.suite:
        raise ConfigError(f"name a suite, or --configs; shipped suites are {', '.join(shipped_suites())}")
    return load_suite(resolve_suite(request.suite))


def own_suite(configs: Sequence[str], data: dict[str, str]) -> Suite:
    """A suite of one row per config, the first being the baseline of the others."""
    ids: list[str] = []
    for config in configs:
        base = re.sub(r"[^\w.+-]", "_", Path(config).stem).lstrip("._-+") or "config"
        number = 2
        identity = base
        while identity in ids:
            identity, number = f"{base}_{number}", number + 1
        ids.append(identity)
    rows: list[dict[str, Any]] = [
        {"id": identity, "config": config, "baseline": ids[0], **({"data": data} if data else {})}
        for identity, config in zip(ids, configs)
    ]
    content = {"name": "own", "title": "Comparison of " + ", ".join(ids), "rows": rows}
    return parse_suite(content, "--configs")


def shipped_suites() -> list[str]:
    """Names of the suites that ship with gn_det."""
    return sorted(p.name for p in _experiments().glob("*.yaml"))


def resolve_suite(name: str) -> Path:
    """A path where a file is there, otherwise the shipped suite of that name.

    Raises:
        ConfigError: neither.
    """
    path = Path(os.path.expanduser(name))
    if os.path.isfile(path):
        return path
    wanted = path.name if path.suffix in (".yaml", ".yml") else f"{path.name}.yaml"
    shipped = _experiments() / wanted
    if os.path.isfile(shipped) and len(path.parts) == 1 + (path.parts[0] == "experiments"):
        return shipped
    raise ConfigError(
        f"suite {shown(name)} is neither a file nor shipped; shipped suites are {', '.join(shipped_suites())}"
    )


def _experiments() -> Path:
    """Inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "experiments"
    return inside if inside.is_dir() else package.parent / "experiments"
