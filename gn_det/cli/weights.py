"""Show what a weights file contains, which preprocessing it expects, and what it would load into a model."""

from __future__ import annotations

import argparse

from gn_det.cli import flags


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("weights", metavar="PATH|URI")
    flags.add_config(parser)


def run(args: argparse.Namespace) -> int:
    from gn_det.checkpoint.compatibility import describe
    from gn_det.terminal import say

    for line in describe(args.weights):
        say(line)
    if args.config is not None:
        print(_fit(args.weights, args.config, args.overrides))
    return 0


def _fit(path_or_uri: str, config: str, overrides: list[str]) -> str:
    """Report what would load into the model of a config, or raise WeightsError with the keys to set."""
    import torch

    from gn_det.checkpoint.open_weights import open_weights
    from gn_det.checkpoint.weights import format_report, plan_weights
    from gn_det.checkpoint.weights_uri import split_options
    from gn_det.config import load_config
    from gn_det.modeling.build import build_model
    from gn_det.text import one_line

    source, options = split_options(path_or_uri)
    weights = open_weights(path_or_uri)
    cfg = load_config(config, overrides)
    if cfg.MODEL.ROI_HEADS.NUM_CLASSES < 1:
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = weights.num_classes or 1
    with torch.device("meta"):  # names and shapes, no memory
        model = build_model(cfg)
    report, _ = plan_weights(model, source, weights, cfg, options.allow_partial)
    return f"with {one_line(config, 400)}:\n{format_report(report)}"
