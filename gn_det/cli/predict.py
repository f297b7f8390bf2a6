"""Detect objects in images and draw them."""

from __future__ import annotations

import argparse

from gn_det.cli import flags


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("inputs", nargs="+", metavar="IMAGE", help="images, folders or globs")
    parser.add_argument("--weights", metavar="FILE", required=True, help="checkpoint of gn-det train")
    parser.add_argument("--output", metavar="DIR", required=True, help="folder for what is written")
    parser.add_argument(
        "--threshold", type=float, metavar="P", help="lowest score kept (default: that of the checkpoint, or 0.5)"
    )
    parser.add_argument("--classes", metavar="A,B", help="only these classes, by name, separated by commas")
    parser.add_argument(
        "--agnostic-nms", action="store_true", help="of overlapping objects of different classes keep the best"
    )
    parser.add_argument(
        "--save",
        metavar="A,B",
        default="drawings,coco",
        help="drawings, coco (predictions.json), csv, labelme, cvat, yolo, masks (default drawings,coco)",
    )
    parser.add_argument("--labels", choices=("fit", "all", "none"), default="fit", help="labels drawn (default fit)")
    parser.add_argument("--colors", choices=("class", "instance"), default="class", help="one colour a class or object")
    tiles = parser.add_argument_group("large images")
    tiles.add_argument("--tiles", type=flags.whole(1), metavar="N", help="cut images into tiles of N x N pixels")
    tiles.add_argument("--overlap", type=float, metavar="P", help="share of a tile in the next one (default 0.2)")
    flags.add_key(tiles, "--max-pixels", "INPUT.MAX_PIXELS", "pixels of the largest image that is read", metavar="N")
    flags.add_config(parser, overrides=False)
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:1")


def run(args: argparse.Namespace) -> int:
    from gn_det.errors import ConfigError
    from gn_det.prediction.images import predict
    from gn_det.prediction.tiles import Tiling

    if args.overlap is not None and args.tiles is None:
        raise ConfigError("--overlap needs --tiles")
    predict(
        args.weights,
        args.inputs,
        args.output,
        threshold=args.threshold,
        classes=None if args.classes is None else flags.comma_separated(args.classes),
        agnostic_nms=args.agnostic_nms,
        save=flags.comma_separated(args.save),
        labels=args.labels,
        colors=args.colors,
        tiling=None if args.tiles is None else Tiling(args.tiles, 0.2 if args.overlap is None else args.overlap),
        config=args.config,
        overrides=flags.flag_keys(args),
        device=args.device,
    )
    return 0
