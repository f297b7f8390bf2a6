"""Train a classifier with the paper's recipe and any norm.

Of images: a backbone for MODEL.WEIGHTS. Of videos: I3D, a 2-D backbone inflated over time.
"""

from __future__ import annotations

import argparse
from dataclasses import fields

from gn_det.cli import flags


def add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--arch",
        required=True,
        metavar="NAME",
        help="resnet18|34|50|101, vgg16; resnet8|14|20|32|44|56|110 (tiny images); i3d_r18|50 (videos)",
    )
    add(
        "--norm",
        required=True,
        metavar="NAME",
        help="BN, SyncBN, LN, IN, GN, WN (Weight Norm), BR (Batch Renorm) or none",
    )
    add(
        "--data",
        required=True,
        metavar="DIR",
        help="folder with train/CLASS/* and val/CLASS/*; or digits, shapes, cifar10[:DIR], motions[:DIR] (videos)",
    )
    add("--output", metavar="DIR", help="default output/classify_ARCH_NORM")
    add("--groups", type=int, metavar="N", help="number of GN groups (default 32)")
    add("--channels-per-group", type=int, metavar="N", help="size of GN groups, instead of --groups")
    add("--batch-size", type=int, metavar="N", help="images per process (default 32; 8 clips)")
    add("--epochs", type=float, metavar="N", help="default 100; the learning rate drops after 30, 60 and 90%%")
    add("--iterations", type=int, metavar="N", help="of clips, instead of --epochs (default 400000)")
    add("--lr", type=float, metavar="X", help="learning rate, not scaled (default 0.1 x batch / 256; vgg16 0.01)")
    add("--r-max", type=float, metavar="X", help="limit of Batch Renorm's r (default 1.5)")
    add("--d-max", type=float, metavar="X", help="limit of Batch Renorm's d (default 0.5)")
    add("--seed", type=int, metavar="N", help="default 1")
    add("--image-size", type=int, metavar="N", help="side of the crops (default 224)")
    add("--images", type=int, metavar="N", help="number of training images (default: all; shapes, motions: 3000)")
    add("--augment", metavar="NAME", help="of a folder: crop (default), or shift: small images, as CIFAR's")
    add("--no-color", dest="color", action="store_false", default=None, help="turn off color augmentation")
    add(
        "--stride-in-1x1",
        action="store_true",
        default=None,
        help="stride in the first 1x1 of each bottleneck, as in the bn_* configs (default: in the 3x3, as in gn_*)",
    )
    add("--amp", metavar="TYPE", help="autocast: bf16, fp16, off (default), or auto: bf16 where a CPU computes in it")
    add(
        "--channels-last",
        nargs="?",
        const=True,
        choices=("auto",),
        help="keep activations in this layout, faster on CPUs; auto: where --amp auto takes bf16",
    )
    add("--record", metavar="LAYER", help="percentiles of its output before norm and ReLU over training, e.g. conv5_3")
    clips = parser.add_argument_group("videos")
    clips.add_argument("--frames", type=int, metavar="N", help="frames of a clip (default 32)")
    clips.add_argument("--frame-stride", type=int, metavar="N", help="take every N-th frame (default 2)")
    clips.add_argument("--weights", metavar="FILE", help="2-D backbone to inflate, any that MODEL.WEIGHTS takes")
    clips.add_argument("--train-list", metavar="FILE", help="videos of --data: Kinetics' csv or UCF101's list")
    clips.add_argument("--val-list", metavar="FILE", help="the same for validation")
    clips.add_argument("--dropout", type=float, metavar="P", help="before the linear layer (default 0.5)")
    clips.add_argument("--test-clips", type=int, metavar="N", help="clips of a video in the final test (default 10)")
    clips.add_argument("--test-crops", type=int, metavar="N", help="crops of each of them, 1 or 3 (default 3)")
    clips.add_argument(
        "--precise-bn", type=int, metavar="N", help="batches for BN's statistics before it (default 200)"
    )
    clips.add_argument("--max-bad", type=int, metavar="N", help="bad videos to skip before the run stops (default 10)")
    add("--device", metavar="NAME", help="auto, cpu, cuda or cuda:1")
    add("--workers", type=int, metavar="N", help="data loading processes (default 4)")
    flags.add_gpus(parser, "GPUs on this machine; or use torchrun")
    flags.add_restart(parser, dry_run="print data, network and recipe, then exit")


def run(args: argparse.Namespace) -> int:
    from gn_det import classification

    given = {f.name: getattr(args, f.name, None) for f in fields(classification.Settings)}
    given["output"] = args.output or f"output/classify_{args.arch}_{args.norm}"
    settings = classification.Settings.from_dict({name: value for name, value in given.items() if value is not None})
    if args.dry_run:
        from gn_det.classification.pretraining import dry_run

        dry_run(settings, num_gpus=args.num_gpus)
    else:
        classification.pretrain(settings, resume=args.resume, overwrite=args.overwrite, num_gpus=args.num_gpus)
    return 0
