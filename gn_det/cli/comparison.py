"""Run the rows of a suite that are missing, and report them side by side with their noise."""

from __future__ import annotations

import argparse

from gn_det.cli import flags


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "Exit status: 0 all rows done, 1 a row failed (the others are reported), 2 refused before any run."
    add = parser.add_argument
    add("words", nargs="*", metavar="SUITE.yaml | KEY VALUE", help="a suite, and " + flags.OVERRIDES)
    add("--output", metavar="DIR", help="folder of runs and report (default output/compare/NAME)")
    add("--rows", metavar="A,B", help="only these rows, by id, * for any text")
    add("--seeds", type=int, metavar="N", help="N runs of every row, with seeds 1 to N")
    text = "train every detection row for N passes over the data"
    flags.add_key(parser, "--epochs", "SOLVER.EPOCHS", text, type=float, metavar="N")
    flags.add_gpus(parser, "GPUs of each run on this machine")
    add("--dry-run", action="store_true", help="print the rows and what is missing, then exit")
    add("--report-only", action="store_true", help="report what has been run, without running anything")
    add("--any-version", action="store_true", help="count finished runs of another version of gn_det as done")
    flags.add_engine(parser)
    flags.add_data(parser, "train", "val")
    add("--configs", nargs="+", metavar="FILE", help="rows on your own data; the first is the baseline")


def run(args: argparse.Namespace) -> int:
    from gn_det.cli.compare import Request, compare

    # --configs takes all words up to the next flag, and overrides may be among them
    named = list(args.configs or ())
    cut = next((i for i, word in enumerate(named) if _is_key(word)), len(named))
    words = named[cut:] + args.words
    is_suite = bool(words) and not _is_key(words[0])
    epochs = vars(args)["SOLVER.EPOCHS"]
    data = {key.split(".")[1].lower(): value for key, value in vars(args).items() if key.startswith("DATASETS.")}
    request = Request(
        suite=words[0] if is_suite else "",
        configs=named[:cut],
        data={key: value for key, value in data.items() if value},
        overrides=[*([] if epochs is None else ["SOLVER.EPOCHS", str(epochs)]), *words[is_suite:]],
        output=args.output or "",
        rows=flags.comma_separated(args.rows),
        seeds=args.seeds,
        num_gpus=args.num_gpus,
        engine=args.engine,
        any_version=args.any_version,
        dry_run=args.dry_run,
        report_only=args.report_only,
    )
    return compare(request)


def _is_key(word: str) -> bool:
    """Whether a word looks like a config key (SOLVER.BASE_LR, SEED=1) rather than a file."""
    return word.partition("=")[0].replace(".", "").replace("_", "").isupper()
