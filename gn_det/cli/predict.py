"""Detect objects in images and videos and draw them.

With the weights of a classifier of videos, it prints the top classes of each video instead.
"""

from __future__ import annotations

import argparse

from gn_det.cli import flags


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("inputs", nargs="+", metavar="INPUT", help="images, folders, globs, videos, 0 (a camera), rtsp://...")
    add("--weights", metavar="FILE", required=True, help="checkpoint, or file of gn-det export (.onnx)")
    add("--output", metavar="DIR", required=True, help="folder for what is written")
    add("--threshold", type=float, metavar="P", help="lowest score kept (default: that of the checkpoint, or 0.5)")
    add("--classes", metavar="A,B", help="only these classes, by name, separated by commas")
    add("--agnostic-nms", action="store_true", help="of overlapping objects of different classes keep the best")
    text = "drawings, coco (predictions.json), csv, labelme, cvat, yolo, masks (default drawings,coco)"
    add("--save", metavar="A,B", default="drawings,coco", help=text)
    add("--labels", choices=("fit", "all", "none"), default="fit", help="labels drawn (default fit)")
    add("--colors", choices=("class", "instance"), default="class", help="color by class or by object")
    tiles = parser.add_argument_group("large images")
    tiles.add_argument("--tiles", type=flags.whole(1), metavar="N", help="cut images into tiles of N x N pixels")
    tiles.add_argument("--overlap", type=float, metavar="P", help="share of a tile in the next one (default 0.2)")
    text = "pixels of the largest image that is read"
    flags.add_key(tiles, "--max-pixels", "INPUT.MAX_PIXELS", text, metavar="N", type=flags.whole(1, 10**10))
    text = "values of images of more than 8 bits: LOW,HIGH (black, white), full or percentiles"
    flags.add_key(parser, "--bit-depth", "INPUT.BIT_DEPTH", text, metavar="RANGE")
    videos = parser.add_argument_group("videos, cameras and streams")
    videos.add_argument("--every", type=flags.whole(1), default=1, metavar="N", help="use every N-th frame (default 1)")
    videos.add_argument("--max-frames", type=flags.whole(1), metavar="N", help="stop after N frames")
    videos.add_argument("--resume", action="store_true", help="keep the frames that an interrupted run has done")
    flags.add_config(parser, overrides=False)
    text = "mixed precision, bf16 on a CPU; auto: where the CPU computes in it"
    flags.add_key(parser, "--amp", "TEST.AMP", text, choices=("True", "False", "auto"))
    add("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:1; of an .onnx file its provider")


def run(args: argparse.Namespace) -> int:
    from gn_det.data.video_frames import is_video
    from gn_det.errors import ConfigError
    from gn_det.prediction.images import predict
    from gn_det.prediction.tiles import Tiling
    from gn_det.prediction.video import predict_videos

    videos = [word for word in args.inputs if is_video(word)]
    images = [word for word in args.inputs if not is_video(word)]
    if args.overlap is not None and args.tiles is None:
        raise ConfigError("--overlap needs --tiles")
    if videos and args.tiles is not None:
        raise ConfigError("--tiles is for images; leave it out for videos")
    if not videos and (args.resume or args.max_frames or args.every > 1):
        raise ConfigError("--every, --max-frames and --resume are for videos")
    options = {
        "threshold": args.threshold,
        "classes": None if args.classes is None else flags.comma_separated(args.classes),
        "agnostic_nms": args.agnostic_nms,
        "save": flags.comma_separated(args.save),
        "labels": args.labels,
        "colors": args.colors,
        "config": args.config,
        "overrides": flags.flag_keys(args),
        "device": args.device,
    }
    if args.weights.lower().endswith(".onnx"):
        from gn_det.deploy.detector import as_predictor

        given = vars(args)
        for flag, value in (("--config", args.config), ("--amp", given["TEST.AMP"])):
            if value is not None:
                raise ConfigError(f"{flag} is for checkpoints; leave it out with the exported file {args.weights}")
        options["predictor"] = as_predictor(
            args.weights, args.device, max_pixels=given["INPUT.MAX_PIXELS"], bit_depth=given["INPUT.BIT_DEPTH"]
        )
    elif videos and not images:
        from gn_det.classification.predict_clips import predict_clips

        values = {"--threshold": args.threshold, "--classes": args.classes, "--max-frames": args.max_frames}
        values |= {"--config": args.config, "--resume": args.resume or None, "--every": args.every - 1 or None}
        unused = [flag for flag, value in values.items() if value is not None]
        if predict_clips(args.weights, videos, args.output, device=args.device, unused=unused):
            return 0
    if images:
        tiling = None if args.tiles is None else Tiling(args.tiles, 0.2 if args.overlap is None else args.overlap)
        predict(args.weights, images, args.output, tiling=tiling, **options)
    if videos:
        options |= {"every": args.every, "max_frames": args.max_frames, "resume": args.resume}
        predict_videos(args.weights, videos, args.output, **options)
    return 0
