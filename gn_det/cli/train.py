"""Fine-tune, train from scratch, or evaluate."""

from __future__ import annotations

import argparse
import time

from gn_det.cli import flags
from gn_det.cli.outcome import show_outcome
from gn_det.engine import choice


def add_flags(parser: argparse.ArgumentParser) -> None:
    flags.add_config(parser, required=True)
    flags.add_own_data(parser)
    text = "hold out this part of the training images for validation"
    flags.add_key(parser, "--val-fraction", "DATASETS.VAL_FRACTION", text, type=float, metavar="F")
    text = "train no masks (MODEL.MASK_ON False), as happens anyway if no object has one"
    parser.add_argument("--boxes-only", dest="MODEL.MASK_ON", action="store_const", const=False, help=text)
    flags.add_augment(parser)
    text = (
        "show images with rare classes more often: those of classes that fewer than this part of the images have, "
        "such as 0.1 (DATALOADER.SAMPLER_TRAIN, REPEAT_THRESHOLD)"
    )
    parser.add_argument("--balance", type=float, metavar="F", help=text)
    text = (
        "images of an optimizer step, over all GPUs (SOLVER.IMS_PER_BATCH); auto: the batch of the config, in "
        "micro-batches that fill the GPU"
    )
    parser.add_argument("--batch", type=flags.batch, metavar="N", help=text)
    flags.add_run(parser)
    flags.add_key(parser, "--weights", "MODEL.WEIGHTS", "initial weights, a path or URI", metavar="FILE")
    parser.add_argument("--allow-partial", action="store_true", help="load matching tensors and report the rest")
    flags.add_key(parser, "--epochs", "SOLVER.EPOCHS", "train for N passes over the data", type=float, metavar="N")
    text = "evaluate, save and stop after H hours"
    flags.add_key(parser, "--max-hours", "SOLVER.MAX_HOURS", text, type=float, metavar="H")
    text = "loggers besides metrics.json: tensorboard (default), wandb, mlflow, csv"
    flags.add_key(parser, "--logger", "LOGGERS", text, type=flags.names, metavar="NAMES")
    flags.add_restart(parser, dry_run="print the resolved config, model and schedule, then exit; needs no data")
    parser.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS without training")
    group = parser.add_argument_group("several GPUs or machines (torchrun works too)")
    flags.add_gpus(group)
    group.add_argument("--num-machines", type=flags.whole(1), default=1, metavar="N")
    group.add_argument("--machine-rank", type=flags.whole(0), default=0, metavar="R")
    group.add_argument("--dist-url", default="auto", metavar="URL", help="tcp://host:port of machine 0")


def run(args: argparse.Namespace) -> int:
    from gn_det.engine.run import dry_run, evaluate, train

    chosen = choice.choose(args.engine)
    cfg = flags.config_from_args(args, chosen.name)
    if args.dry_run:
        dry_run(cfg, choice.load(chosen), num_gpus=args.num_gpus, num_machines=args.num_machines)
    elif args.eval_only:
        evaluate(cfg, engine=args.engine, num_gpus=args.num_gpus)
    else:
        started = time.perf_counter()
        results = train(
            cfg,
            engine=args.engine,
            resume=args.resume,
            overwrite=args.overwrite,
            num_gpus=args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
        )
        if args.machine_rank == 0:
            show_outcome(cfg, results, time.perf_counter() - started)
    return 0
