"""Push a trained model to the Hugging Face Hub with its config and a model card."""

from __future__ import annotations

import argparse


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--weights", metavar="FILE", required=True, help="checkpoint, such as output/model_best.pth")
    parser.add_argument("--repo", metavar="OWNER/NAME", required=True, help="repository on the Hub, made if absent")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--license", default="", metavar="ID", help="license of the weights, such as apache-2.0")


def run(args: argparse.Namespace) -> int:
    from gn_det.checkpoint.hub import MODEL, push
    from gn_det.terminal import say

    say(f"pushed: {push(args.weights, args.repo, private=args.private, license_name=args.license)}")
    say(f"load it with --weights hf://{args.repo}/{MODEL}")
    return 0
