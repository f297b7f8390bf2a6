"""Run a suite of experiments (only the missing runs) and report them side by side, with confidence intervals."""

from __future__ import annotations

import argparse
import itertools
from typing import TYPE_CHECKING

from gn_det.cli import flags

if TYPE_CHECKING:
    from gn_det.compare.suite import Suite


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Exit status: 0 all rows done, 1 a row failed (the others are reported), 2 refused before the first run."
    )
    add = parser.add_argument
    add("words", nargs="*", metavar="SUITE.yaml | KEY VALUE", help="a suite, and " + flags.OVERRIDES)
    add("--output", metavar="DIR", help="folder of runs and report (default output/compare/NAME)")
    add("--rows", metavar="A,B", help="run only these rows, by id; * matches anything")
    text = "with --configs and --train-json: cross-validate in K folds of the images, K runs a config"
    add("--folds", type=int, metavar="K", help=text)
    add("--seeds", type=int, metavar="N", help="run every row N times, with seeds 1 to N")
    add(
        "--epochs", type=float, metavar="N", help="train every detection row for N passes over the data (SOLVER.EPOCHS)"
    )
    flags.add_gpus(parser, "GPUs per run")
    add("--dry-run", action="store_true", help="list the rows and what is missing, then exit")
    add("--report-only", action="store_true", help="write the report of finished runs; run nothing")
    add("--any-version", action="store_true", help="accept finished runs of other versions of gn_det")
    flags.add_engine(parser)
    flags.add_data(parser, "train", "val")
    add("--configs", nargs="+", metavar="FILE", help="configs to compare on your own data; the first is the baseline")


def run(args: argparse.Namespace) -> int:
    import os
    from datetime import datetime
    from functools import partial
    from pathlib import Path

    from gn_det.compare.document import write_report
    from gn_det.compare.execute import execute
    from gn_det.compare.outcomes import collect
    from gn_det.compare.plan import make_plan
    from gn_det.compare.runner import Runner, Store, dry_run, fetch_weights
    from gn_det.engine import choice as engines
    from gn_det.engine import dist
    from gn_det.engine.output import InUse
    from gn_det.terminal import say

    suite, overrides = _suite_and_overrides(args)
    engine = engines.load(engines.choose(args.engine))
    planned = partial(make_plan, suite, engine, overrides=overrides, seeds=args.seeds, num_gpus=args.num_gpus)
    rows = flags.comma_separated(args.rows)
    whole = planned()
    plan = planned(only=rows) if rows else whole
    store = Store(args.output or Path("output") / "compare" / suite.name)
    if args.dry_run:
        return dry_run(plan, store, any_version=args.any_version)
    first_rank = not dist.under_torchrun() or os.environ["RANK"] == "0"
    failed: dict[str, str] = {}
    if not args.report_only:
        plan.check()
        fetch_weights(plan)
    writes_report = first_rank
    try:
        if not args.report_only:
            runs = partial(execute, plan=plan, measuring=first_rank)
            failed = Runner(plan, store, runs, args.any_version, recording=first_rank).run()
    except InUse:
        writes_report = False  # the comparison that is running there writes it
        raise
    finally:
        if writes_report:
            results = collect(whole, store, any_version=args.any_version, any_settings=args.report_only)
            write_report(results, store, datetime.now().astimezone().strftime("%Y-%m-%d"))
    if not first_rank:
        return 0  # torchrun stops all ranks when one fails, and rank 0 may still be measuring
    for name, reason in failed.items():
        say(f"failed: {name}: {reason}")
    return 1 if failed else 0


def _suite_and_overrides(args: argparse.Namespace) -> tuple[Suite, list[str]]:
    """Return the suite (a file, a shipped one, or --configs with own data) and the config keys given."""
    from gn_det.compare.suite import find_suite, load_suite, own_suite, shipped_suites
    from gn_det.errors import ConfigError

    # --configs takes all words up to the next flag, which may include overrides
    named = list(args.configs or ())
    configs = list(itertools.takewhile(lambda word: not _is_key(word), named))
    words = named[len(configs) :] + args.words
    name = words.pop(0) if words and not _is_key(words[0]) else ""
    overrides = words if args.epochs is None else ["SOLVER.EPOCHS", str(args.epochs), *words]
    data = {key.partition(".")[2].lower(): path for key, path in vars(args).items() if "." in key and path is not None}
    if configs and name:
        raise ConfigError(f"give a suite ({name}) or --configs, not both")
    if configs:
        return own_suite(configs, data, args.folds or 0), overrides
    if data or args.folds is not None:
        raise ConfigError("--folds, --train-json and the like need --configs; a suite names its own data")
    if not name:
        raise ConfigError(f"name a suite or give --configs; shipped suites: {', '.join(shipped_suites())}")
    return load_suite(find_suite(name)), overrides


def _is_key(word: str) -> bool:
    """Whether a word looks like a config key (SOLVER.BASE_LR, SEED=1) rather than a file."""
    return word.partition("=")[0].replace(".", "").replace("_", "").isupper()
