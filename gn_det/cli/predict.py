"""Detect objects in images and draw them."""

from __future__ import annotations

import argparse

from gn_det.cli import flags


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inputs", nargs="+", metavar="IMAGE", help="images, folders or globs")
    parser.add_argument("--weights", metavar="FILE", required=True, help="checkpoint of gn-det train")
    parser.add_argument("--output", metavar="DIR", required=True, help="folder for drawings and predictions.json")
    parser.add_argument("--threshold", type=float, default=0.5, metavar="P", help="lowest score shown (default 0.5)")
    parser.add_argument("--classes", metavar="A,B", help="only these classes, by name, separated by commas")
    flags.add_config(parser, overrides=False)
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:1")


def run(args: argparse.Namespace) -> int:
    from gn_det.engine.predictor import predict

    predict(
        args.weights,
        args.inputs,
        args.output,
        threshold=args.threshold,
        classes=None if args.classes is None else flags.comma_separated(args.classes),
        config=args.config,
        device=args.device,
    )
    return 0
