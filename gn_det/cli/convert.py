"""Convert weights of any known source to another layout, bit for bit."""

from __future__ import annotations

import argparse


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="IN", help="path or URI")
    parser.add_argument("target", metavar="OUT", help=".pth or .safetensors")
    text = "detectron2 (default), torchvision, timm (backbone only) or safetensors"
    parser.add_argument("--to", default="", metavar="LAYOUT", help=text)
    parser.add_argument("--fold", action="store_true", help="fold the target's usual preprocessing into the stem")


def run(args: argparse.Namespace) -> int:
    from gn_det.checkpoint.compatibility import expects
    from gn_det.checkpoint.convert import convert
    from gn_det.terminal import say
    from gn_det.text import one_line, some

    done = convert(args.source, args.target, args.to, fold_stem=args.fold)
    say(f"Wrote {done.path}: {done.tensors} tensors of {args.source} ({one_line(done.kind)})")
    if done.left_out:
        say(f"  left out: {some(done.left_out)}")
    if done.preprocessing is not None:
        say(f"  expects {expects(done.preprocessing)}")
    return 0
