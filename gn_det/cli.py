"""The command line: ``gn-det train | eval | predict | check | pretrain | quickstart | weights | convert | ...``.

Only argparse is imported at the top; each command imports what it needs, so ``--help`` answers at once. A
:class:`~gn_det.errors.UserError` ends as one line on stderr and exit status 2.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from gn_det import __version__, engines
from gn_det.engines import ENGINES
from gn_det.errors import ConfigError, UserError

if TYPE_CHECKING:
    from fvcore.common.config import CfgNode

Command = Callable[[argparse.Namespace], int]

_OVERRIDES = "config keys after the flags, as in SOLVER.BASE_LR 0.01 or SEED=1; they win over the file"


class _Parser(argparse.ArgumentParser):
    """A mistake in the flags is one line, like any other mistake; the usage is what --help is for."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def _add_config(parser: argparse.ArgumentParser, *, required: bool) -> None:
    parser.add_argument(
        "--config",
        "--config-file",
        metavar="FILE",
        required=required,
        help="a YAML file or the name of a shipped config (gn-det configs lists them)",
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help=_OVERRIDES)


def _add_data(parser: argparse.ArgumentParser, splits: Sequence[str]) -> None:
    group = parser.add_argument_group("own data in COCO format")
    for split in splits:
        key = f"DATASETS.{split.upper()}_JSON"
        group.add_argument(f"--{split}-json", metavar="FILE", help=f"{split} annotations ({key})")
        group.add_argument(f"--{split}-images", metavar="DIR", help=f"folder of the {split} images")


def _add_engine(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default="auto",
        help="auto (default) takes detectron2 where it is installed; embedded needs nothing but gn_det",
    )


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", metavar="DIR", help="OUTPUT_DIR")
    _add_engine(parser)
    parser.add_argument("--device", metavar="NAME", help="MODEL.DEVICE: auto, cpu, cuda, cuda:1")


def _train_parser(prog: str) -> argparse.ArgumentParser:
    parser = _Parser(prog=prog, description="Fine-tune, train from scratch, or evaluate.")
    _add_config(parser, required=True)
    _add_data(parser, ("train", "val"))
    _add_common(parser)
    parser.add_argument("--weights", metavar="FILE", help="MODEL.WEIGHTS: initial weights, path or URI")
    parser.add_argument("--allow-partial", action="store_true", help="load of the weights what fits, report the rest")
    parser.add_argument("--epochs", type=float, metavar="N", help="train N passes over the data (SOLVER.EPOCHS)")
    parser.add_argument(
        "--max-hours",
        type=float,
        metavar="H",
        help="end after H hours, with an evaluated checkpoint (SOLVER.MAX_HOURS)",
    )
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in OUTPUT_DIR")
    parser.add_argument("--overwrite", action="store_true", help="start anew where OUTPUT_DIR holds an earlier run")
    parser.add_argument("--eval-only", action="store_true", help="evaluate MODEL.WEIGHTS, train nothing")
    parser.add_argument("--dry-run", action="store_true", help="print all that is resolved; needs no data or weights")
    group = parser.add_argument_group("several GPUs or machines (or launch with torchrun)")
    group.add_argument("--num-gpus", type=int, default=1, metavar="N", help="GPUs on this machine")
    group.add_argument("--num-machines", type=int, default=1, metavar="N")
    group.add_argument("--machine-rank", type=int, default=0, metavar="R")
    group.add_argument("--dist-url", default="auto", metavar="URL", help="tcp://host:port of machine 0")
    return parser


def _eval_parser(prog: str) -> argparse.ArgumentParser:
    parser = _Parser(prog=prog, description="Evaluate a checkpoint: COCO box and mask AP.")
    _add_config(parser, required=False)
    _add_data(parser, ("val",))
    _add_common(parser)
    parser.add_argument("--weights", metavar="FILE", required=True, help="checkpoint; brings its config along")
    return parser


def _predict_parser(prog: str) -> argparse.ArgumentParser:
    parser = _Parser(prog=prog, description="Detect and draw on images.")
    parser.add_argument("inputs", nargs="+", metavar="IMAGE", help="images, folders or globs")
    parser.add_argument("--weights", metavar="FILE", required=True, help="checkpoint of gn-det train")
    parser.add_argument("--output", metavar="DIR", required=True, help="folder for drawings and predictions.json")
    parser.add_argument("--threshold", type=float, default=0.5, metavar="P", help="lowest score shown (default 0.5)")
    parser.add_argument("--classes", metavar="A,B", help="only these classes, by name, separated by commas")
    parser.add_argument("--config", "--config-file", metavar="FILE", help="default: the config in the checkpoint")
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda, cuda:1")
    return parser


def _check_parser(prog: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=prog,
        description="Find what is wrong with a dataset before training does: every problem, where it is, what to do.",
        epilog="Exit status: 0 clean (notes do not count), 1 warnings only, 2 errors: training would refuse the set or "
        "drop entries of it.",
    )
    _add_config(parser, required=False)
    _add_data(parser, ("train", "val"))
    parser.add_argument("--images", action="store_true", help="decode every image, on all cores")
    parser.add_argument("--json", metavar="FILE", help="write the report for machines")
    parser.add_argument("--html", metavar="FILE", help="write the report as one page with drawn samples")
    parser.add_argument(
        "--fix",
        metavar="FILE",
        help="write a copy of --train-json without what training drops, repairs made; the changes are listed beside it",
    )
    return parser


def _pretrain_parser(prog: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=prog, description="Train a classifier by the paper's recipe: a backbone with any norm for MODEL.WEIGHTS."
    )
    parser.add_argument(
        "--arch", required=True, metavar="NAME", help="resnet18|34|50|101, or resnet8|14|20 (tiny images)"
    )
    parser.add_argument("--norm", required=True, metavar="NAME", help="BN, LN, IN or GN")
    parser.add_argument(
        "--data", required=True, metavar="DIR", help="folder with train/<class>/* and val/<class>/*; or digits, shapes"
    )
    parser.add_argument("--output", metavar="DIR", help="default output/pretrain_ARCH_NORM")
    parser.add_argument("--groups", type=int, metavar="N", help="GN's groups in every layer (default 32)")
    parser.add_argument("--channels-per-group", type=int, metavar="N", help="GN's channels per group instead")
    parser.add_argument("--batch-size", type=int, metavar="N", help="images of one process (default 32)")
    parser.add_argument(
        "--epochs", type=float, metavar="N", help="default 100; lr drops after 30, 60 and 90 %% of them"
    )
    parser.add_argument("--lr", type=float, metavar="X", help="default 0.1 for 256 images in an iteration, linear")
    parser.add_argument("--seed", type=int, metavar="N", help="default 1")
    parser.add_argument("--image-size", type=int, metavar="N", help="side of the crops (default 224)")
    parser.add_argument("--images", type=int, metavar="N", help="generated training images of --data shapes")
    parser.add_argument("--no-color", dest="color", action="store_false", default=None, help="no colour augmentation")
    parser.add_argument(
        "--stride-in-1x1",
        action="store_true",
        default=None,
        help="bottlenecks stride in the first 1x1, as the bn_* configs have it; without, as the gn_* configs",
    )
    parser.add_argument("--amp", metavar="TYPE", help="autocast: bf16, fp16 or off (default)")
    parser.add_argument("--device", metavar="NAME", help="auto, cpu, cuda, cuda:1")
    parser.add_argument("--workers", type=int, metavar="N", help="processes that read images (default 4)")
    parser.add_argument("--num-gpus", type=int, default=1, metavar="N", help="GPUs on this machine, or use torchrun")
    parser.add_argument("--resume", action="store_true", help="go on after the last finished epoch")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier run in the folder")
    parser.add_argument("--dry-run", action="store_true", help="print data, network and recipe; train nothing")
    return parser


def _compare_parser(prog: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=prog,
        description="Run the rows of a suite that are missing, and report them side by side with their noise.",
        epilog="Exit status: 0 all rows done, 1 a row failed (the others are done and reported), 2 refused before the "
        "first run.",
    )
    parser.add_argument("words", nargs="*", metavar="SUITE.yaml | KEY VALUE", help="a suite, and " + _OVERRIDES)
    parser.add_argument("--output", metavar="DIR", help="folder of runs and report (default output/compare/NAME)")
    parser.add_argument("--rows", metavar="A,B", help="only these rows, by id, * for any text")
    parser.add_argument("--seeds", type=int, metavar="N", help="N runs of every row, with seeds 1 to N")
    parser.add_argument("--num-gpus", type=int, default=1, metavar="N", help="GPUs of each run on this machine")
    parser.add_argument("--dry-run", action="store_true", help="print the rows and what is missing; run nothing")
    parser.add_argument("--report-only", action="store_true", help="write the report of what is there; run nothing")
    parser.add_argument(
        "--any-version", action="store_true", help="finished runs of another version of gn_det count as done"
    )
    _add_engine(parser)
    _add_data(parser, ("train", "val"))
    parser.add_argument("--configs", nargs="+", metavar="FILE", help="rows on own data; the first is the baseline")
    return parser


def _quickstart_parser(prog: str) -> argparse.ArgumentParser:
    parser = _Parser(
        prog=prog, description="Train a small GN Mask R-CNN on generated shapes, evaluate it, draw what it sees."
    )
    parser.add_argument("--output", default="output/quickstart", metavar="DIR")
    _add_engine(parser)
    parser.add_argument("overrides", nargs="*", metavar="KEY VALUE", help=_OVERRIDES)
    return parser


def _weights_parser(prog: str) -> argparse.ArgumentParser:
    parser = _Parser(prog=prog, description="What a weights file is, where it would load, what preprocessing it wants.")
    parser.add_argument("weights", metavar="PATH|URI")
    _add_config(parser, required=False)
    return parser


def _convert_parser(prog: str) -> argparse.ArgumentParser:
    parser = _Parser(prog=prog, description="Write weights of any known source in another layout, bit for bit.")
    parser.add_argument("source", metavar="IN", help="path or URI")
    parser.add_argument("target", metavar="OUT", help=".pth or .safetensors")
    parser.add_argument(
        "--to",
        default="",
        metavar="LAYOUT",
        help="detectron2 (default), torchvision, timm (backbone alone), safetensors",
    )
    parser.add_argument("--fold", action="store_true", help="fold the target's usual preprocessing into the stem")
    return parser


def _configs_parser(prog: str) -> argparse.ArgumentParser:
    return _Parser(prog=prog, description="List the shipped configs and what each reproduces.")


def _doctor_parser(prog: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(prog=prog, description="Versions, GPUs, engines; what is broken, and the fix.")


def config_from_args(args: argparse.Namespace, engine: str = "embedded") -> CfgNode:
    """The config named by ``--config`` with flags and overrides applied; flags win over the YAML, keys over flags.

    What the engine of that name does not implement is refused.
    """
    from gn_det.config import load_config
    from gn_det.config.check import check_config
    from gn_det.config.load import merge_overrides

    cfg = load_config(args.config, check=False)
    merge_overrides(cfg, [word for pair in _flag_keys(args) for word in pair])
    if getattr(args, "train_json", None) and not args.val_json:
        cfg.DATASETS.TEST = ()  # the config's own test set belongs to its own training set
    merge_overrides(cfg, args.overrides)
    if getattr(args, "allow_partial", False):
        from gn_det.checkpoint.catalog import with_option

        cfg.MODEL.WEIGHTS = with_option(cfg.MODEL.WEIGHTS, "allow_partial=True")
    check_config(cfg, engine)
    return cfg


def _flag_keys(args: argparse.Namespace) -> list[tuple[str, str]]:
    keys = {
        "train_json": "DATASETS.TRAIN_JSON",
        "train_images": "DATASETS.TRAIN_IMAGES",
        "val_json": "DATASETS.VAL_JSON",
        "val_images": "DATASETS.VAL_IMAGES",
        "weights": "MODEL.WEIGHTS",
        "output": "OUTPUT_DIR",
        "device": "MODEL.DEVICE",
        "epochs": "SOLVER.EPOCHS",
        "max_hours": "SOLVER.MAX_HOURS",
    }
    return [(key, str(getattr(args, flag))) for flag, key in keys.items() if getattr(args, flag, None) is not None]


def _train(args: argparse.Namespace) -> int:
    choice = engines.choose(args.engine)
    cfg = config_from_args(args, choice.name)
    engine = engines.load(choice)
    from gn_det.run import commands

    if args.dry_run:
        commands.dry_run(engine, cfg, num_gpus=args.num_gpus, num_machines=args.num_machines)
    elif args.eval_only:
        commands.evaluate(engine, cfg, num_gpus=args.num_gpus)
    else:
        commands.train(
            engine,
            cfg,
            resume=args.resume,
            overwrite=args.overwrite,
            num_gpus=args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
        )
    return 0


def _eval(args: argparse.Namespace) -> int:
    choice = engines.choose(args.engine)
    if args.config is None:
        from gn_det.checkpoint.meta import config_of_checkpoint
        from gn_det.config.check import check_config
        from gn_det.config.load import merge_overrides

        cfg = config_of_checkpoint(args.weights)
        merge_overrides(cfg, [word for pair in _flag_keys(args) for word in pair])
        merge_overrides(cfg, args.overrides)
        check_config(cfg, choice.name)
    else:
        cfg = config_from_args(args, choice.name)
    engine = engines.load(choice)
    from gn_det.run import commands

    commands.evaluate(engine, cfg)
    return 0


def _predict(args: argparse.Namespace) -> int:
    if not 0 <= args.threshold <= 1:
        raise ConfigError(f"--threshold {args.threshold} must lie between 0 and 1")
    from gn_det.predict import predict

    classes = None if args.classes is None else [name.strip() for name in args.classes.split(",") if name.strip()]
    predict(
        args.weights,
        args.inputs,
        args.output,
        threshold=args.threshold,
        classes=classes,
        config=args.config,
        device=args.device,
    )
    return 0


def _check(args: argparse.Namespace) -> int:
    if not args.train_json and not args.config:
        raise ConfigError("give --train-json and --train-images, or a --config that names the sets to check")
    args.config = args.config or "gn_fpn.yaml"
    cfg = config_from_args(args)
    from gn_det.check.command import check

    return check(cfg, config=args.config, decode=args.images, json_out=args.json, html_out=args.html, fix_out=args.fix)


def _pretrain(args: argparse.Namespace) -> int:
    from dataclasses import fields

    from gn_det import pretrain as room

    given = {f.name: getattr(args, f.name, None) for f in fields(room.Settings)}
    given["output"] = args.output or f"output/pretrain_{args.arch}_{args.norm}"
    settings = room.Settings.from_dict({name: value for name, value in given.items() if value is not None})
    if args.dry_run:
        from gn_det.pretrain.command import dry_run

        dry_run(settings, num_gpus=args.num_gpus)
    else:
        room.pretrain(settings, resume=args.resume, overwrite=args.overwrite, num_gpus=args.num_gpus)
    return 0


def _compare(args: argparse.Namespace) -> int:
    from gn_det.compare.command import Request, compare

    keys = ("train_json", "train_images", "val_json", "val_images")
    # --configs takes all words up to the next flag, and the keys may stand there
    named = list(args.configs or ())
    cut = next((i for i, word in enumerate(named) if _is_key(word)), len(named))
    words = named[cut:] + args.words
    is_suite = bool(words) and not _is_key(words[0])
    request = Request(
        suite=words[0] if is_suite else "",
        configs=named[:cut],
        data={key: getattr(args, key) for key in keys if getattr(args, key)},
        overrides=words[is_suite:],
        output=args.output or "",
        rows=[word.strip() for word in (args.rows or "").split(",") if word.strip()],
        seeds=args.seeds,
        num_gpus=args.num_gpus,
        engine=args.engine,
        any_version=args.any_version,
        dry_run=args.dry_run,
        report_only=args.report_only,
    )
    return compare(request)


def _is_key(word: str) -> bool:
    """Whether a word looks like a config key (SOLVER.BASE_LR, SEED=1) rather than a file."""
    return word.partition("=")[0].replace(".", "").replace("_", "").isupper()


def _quickstart(args: argparse.Namespace) -> int:
    from gn_det.quickstart import quickstart

    quickstart(args.output, args.overrides, engine=args.engine)
    return 0


def _weights(args: argparse.Namespace) -> int:
    from gn_det.weights_cli import describe

    describe(args.weights, args.config, args.overrides)
    return 0


def _convert(args: argparse.Namespace) -> int:
    from gn_det.weights_cli import run_convert

    run_convert(args.source, args.target, args.to, args.fold)
    return 0


def _configs(args: argparse.Namespace) -> int:
    from gn_det.config.load import shipped_config, shipped_configs

    for name in shipped_configs():
        comment = [line[2:].strip() for line in shipped_config(name).read_text(encoding="utf-8").splitlines()[:2]]
        print(f"{name:28s} {' '.join(comment)}")
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from gn_det.doctor import doctor

    return doctor()


_COMMANDS: dict[str, tuple[str, Callable[[str], argparse.ArgumentParser], Command]] = {
    "train": ("fine-tune, train from scratch or evaluate", _train_parser, _train),
    "eval": ("COCO AP of a checkpoint", _eval_parser, _eval),
    "predict": ("detect and draw on images", _predict_parser, _predict),
    "check": ("what is wrong with a dataset, before training finds out", _check_parser, _check),
    "pretrain": ("a backbone with any norm, by the paper's recipe", _pretrain_parser, _pretrain),
    "compare": ("run a suite of rows and report them side by side", _compare_parser, _compare),
    "quickstart": ("train on generated shapes and show the result", _quickstart_parser, _quickstart),
    "weights": ("what a weights file is and where it would load", _weights_parser, _weights),
    "convert": ("weights into another layout, bit for bit", _convert_parser, _convert),
    "configs": ("list the shipped configs", _configs_parser, _configs),
    "doctor": ("what is installed, what works, and the fix for what does not", _doctor_parser, _doctor),
}


def _usage() -> str:
    lines = [f"gn-det {__version__}: fine-tune Mask R-CNN with Group Normalization", "", "usage: gn-det COMMAND ..."]
    lines += ["", "commands (gn-det COMMAND --help tells more):"]
    return "\n".join(lines + [f"  {name:12s}{what}" for name, (what, _, _) in _COMMANDS.items()])


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM unwinds like Ctrl-C, so that no temporary file is left; training has its own way to stop."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, frame: object) -> None:
        print("gn-det: terminated", file=sys.stderr)
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run a command; returns the exit status: 0 done, 2 a user's mistake, 130 or 143 interrupted."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"gn_det {__version__}")
        return 0
    if argv[0] not in _COMMANDS:
        print(f"gn-det: error: unknown command '{argv[0]}'; commands are {', '.join(_COMMANDS)}", file=sys.stderr)
        return 2
    _, make_parser, run = _COMMANDS[argv[0]]
    args = make_parser(prog or f"gn-det {argv[0]}").parse_intermixed_args(argv[1:])
    try:
        with _ended_by_sigterm():
            return run(args)
    except UserError as e:
        print(f"gn-det: error: {e}", file=sys.stderr)
        # An interrupted run says so to the shell: 130 for Ctrl-C, 143 for SIGTERM.
        return int(getattr(e, "exit_code", 2))
    except KeyboardInterrupt:
        print("gn-det: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
