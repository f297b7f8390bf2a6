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


def run(args: argparse.Namespace) -> int:
    from gn_det.engine.run import evaluate

    evaluate(flags.config_from_args(args, choice.choose(args.engine).name), engine=args.engine)
    return 0
