"""Find what is wrong with a dataset before training does: every problem, where it is, what to do."""

from __future__ import annotations

import argparse

from gn_det.cli import flags
from gn_det.errors import ConfigError


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Exit status: 0 clean (notes do not count), 1 warnings only, 2 errors: training would refuse the set or drop "
        "entries of it."
    )
    flags.add_config(parser)
    flags.add_data(parser, "train", "val")
    parser.add_argument("--images", action="store_true", help="decode every image, on all cores")
    parser.add_argument("--json", metavar="FILE", help="write the report as JSON")
    parser.add_argument("--html", metavar="FILE", help="write the report as one HTML page with drawn samples")
    parser.add_argument(
        "--fix",
        metavar="FILE",
        help="write a copy of --train-json with repairs made and without what training drops; changes are listed "
        "beside it",
    )


def run(args: argparse.Namespace) -> int:
    if not vars(args)["DATASETS.TRAIN_JSON"] and not args.config:
        raise ConfigError("give --train-json and --train-images, or a --config that names the sets to check")
    args.config = args.config or "gn_fpn.yaml"
    cfg = flags.config_from_args(args)
    from gn_det.check.check_sets import check

    return check(cfg, config=args.config, decode=args.images, json_out=args.json, html_out=args.html, fix_out=args.fix)
