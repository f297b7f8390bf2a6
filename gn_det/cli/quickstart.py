"""Train a small GN Mask R-CNN on generated shapes, evaluate it, and draw its predictions."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from gn_det.cli import flags
from gn_det.cli.outcome import show_outcome
from gn_det.errors import TrainingError

_OWN_DATA = """
Your own data in COCO format:
  gn-det train --config gn_fpn_finetune.yaml \\
      --train-json a.json --train-images imgs/ \\
      --val-json b.json --val-images imgs/"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    text = "output folder; an earlier run in it is replaced (default output/quickstart)"
    parser.add_argument("--output", default="output/quickstart", metavar="DIR", help=text)
    parser.add_argument("--resume", action="store_true", help="continue an interrupted run instead")
    flags.add_engine(parser)
    flags.add_verbose(parser)
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help=flags.OVERRIDES)


def run(args: argparse.Namespace) -> int:
    from gn_det.config import load_config
    from gn_det.engine.run import train

    fastest = ["SOLVER.AMP.ENABLED", "auto", "MODEL.CHANNELS_LAST", "auto"]
    cfg = load_config("quickstart.yaml", ["OUTPUT_DIR", args.output, *fastest, *args.overrides])
    started = time.perf_counter()
    results = train(cfg, engine=args.engine, resume=args.resume, overwrite=not args.resume)
    weights = Path(args.output) / "model_best.pth"
    if not weights.is_file():
        raise TrainingError(f"no evaluation gave an AP, so {weights} was not written; train longer (SOLVER.MAX_ITER)")
    show_outcome(cfg, results, time.perf_counter() - started, _OWN_DATA)
    return 0
