"""Find problems in a dataset before training: what is wrong, where, and what to do about it."""

from __future__ import annotations

import argparse

from gn_det.cli import flags
from gn_det.errors import ConfigError


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.epilog = (
        "Exit status: 0 no problems (notes do not count), 1 warnings only, 2 errors: training would refuse the dataset "
        "or drop entries."
    )
    flags.add_config(parser)
    flags.add_own_data(parser)
    flags.add_augment(parser)
    add = parser.add_argument
    add("--images", action="store_true", help="decode every image, on all cores")
    add("--json", metavar="FILE", help="write the report as JSON")
    add("--html", metavar="FILE", help="write the report as one HTML page with drawn samples")
    add("--augmented", metavar="FILE", help="draw training images as the model sees them (PNG)")
    text = "write a repaired copy of --train-json without what training drops, and a list of the changes beside it"
    add("--fix", metavar="FILE", help=text)


def run(args: argparse.Namespace) -> int:
    if not vars(args)["DATASETS.TRAIN_JSON"] and not args.data and not args.config:
        raise ConfigError("give --data, or --train-json and --train-images, or a --config that names the datasets")
    args.config = args.config or "gn_fpn.yaml"
    cfg = flags.config_from_args(args)
    from gn_det.check.check_sets import check

    return check(
        cfg,
        config=args.config,
        decode=args.images,
        json_out=args.json,
        html_out=args.html,
        fix_out=args.fix,
        augmented_out=args.augmented,
    )
