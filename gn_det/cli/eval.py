"""Evaluate a checkpoint: COCO box and mask AP."""

from __future__ import annotations

import argparse

from gn_det.cli import flags
from gn_det.engine import choice


def add_flags(parser: argparse.ArgumentParser) -> None:
    flags.add_config(parser)
    flags.add_data(parser, "val")
    flags.add_run(parser)
    text = "checkpoint; its own config is used unless --config is given"
    flags.add_key(parser, "--weights", "MODEL.WEIGHTS", text, metavar="FILE", required=True)

    parser.add_argument("--html", metavar="FILE", help="write a page: intervals, curves, confusions, images that fail")
    text = "store the score of best F1 of each class in the checkpoint; gn-det predict uses it"
    parser.add_argument("--save-thresholds", action="store_true", help=text)
    flags.add_gpus(parser)


def run(args: argparse.Namespace) -> int:
    from gn_det.engine.run import evaluate

    evaluate(
        flags.config_from_args(args, choice.choose(args.engine).name),
        engine=args.engine,
        html=args.html,
        save_thresholds=args.save_thresholds,
        num_gpus=args.num_gpus,
    )
    return 0
