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
from typing import TYPE_CHECKING

from gn_det import __version__
from gn_det.cli import flags
from gn_det.engine import choice as engines
from gn_det.errors import ConfigError, UserError
from gn_det.terminal import guarded
from gn_det.text import as_line, shown

if TYPE_CHECKING:
    from fvcore.common.config import CfgNode

Command = Callable[[argparse.Namespace], int]

_LESS_MEMORY = "give the machine more memory, or give this command smaller or fewer images"


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
    from gn_det.engine import commands

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
    from gn_det.engine import commands

    commands.evaluate(engine, cfg)
    return 0


def _predict(args: argparse.Namespace) -> int:
    if not 0 <= args.threshold <= 1:
        raise ConfigError(f"--threshold {args.threshold} must lie between 0 and 1")
    from gn_det.engine.predictor import predict

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
    from gn_det.cli.check import check

    return check(cfg, config=args.config, decode=args.images, json_out=args.json, html_out=args.html, fix_out=args.fix)


def _pretrain(args: argparse.Namespace) -> int:
    from dataclasses import fields

    from gn_det import classification as room

    given = {f.name: getattr(args, f.name, None) for f in fields(room.Settings)}
    given["output"] = args.output or f"output/pretrain_{args.arch}_{args.norm}"
    settings = room.Settings.from_dict({name: value for name, value in given.items() if value is not None})
    if args.dry_run:
        from gn_det.classification.pretraining import dry_run

        dry_run(settings, num_gpus=args.num_gpus)
    else:
        room.pretrain(settings, resume=args.resume, overwrite=args.overwrite, num_gpus=args.num_gpus)
    return 0


def _compare(args: argparse.Namespace) -> int:
    from gn_det.cli.compare import Request, compare

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
        overrides=[*([] if args.epochs is None else ["SOLVER.EPOCHS", str(args.epochs)]), *words[is_suite:]],
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
    from gn_det.cli.quickstart import quickstart

    quickstart(args.output, args.overrides, engine=args.engine)
    return 0


def _weights(args: argparse.Namespace) -> int:
    from gn_det.cli.weights import describe

    describe(args.weights, args.config, args.overrides)
    return 0


def _convert(args: argparse.Namespace) -> int:
    from gn_det.cli.weights import run_convert

    run_convert(args.source, args.target, args.to, args.fold)
    return 0


def _configs(args: argparse.Namespace) -> int:
    from gn_det.config.load import shipped_config, shipped_configs

    for name in shipped_configs():
        comment = [line[2:].strip() for line in shipped_config(name).read_text(encoding="utf-8").splitlines()[:2]]
        print(f"{name:28s} {' '.join(comment)}")
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from gn_det.cli.doctor import doctor

    return doctor()


_COMMANDS: dict[str, tuple[str, Callable[[str], argparse.ArgumentParser], Command]] = {
    "train": ("fine-tune, train from scratch or evaluate", flags.train_parser, _train),
    "eval": ("COCO AP of a checkpoint", flags.eval_parser, _eval),
    "predict": ("detect and draw on images", flags.predict_parser, _predict),
    "check": ("what is wrong with a dataset, before training finds out", flags.check_parser, _check),
    "pretrain": ("a backbone with any norm, by the paper's recipe", flags.pretrain_parser, _pretrain),
    "compare": ("run a suite of rows and report them side by side", flags.compare_parser, _compare),
    "quickstart": ("train on generated shapes and show the result", flags.quickstart_parser, _quickstart),
    "weights": ("what a weights file is and where it would load", flags.weights_parser, _weights),
    "convert": ("weights into another layout, bit for bit", flags.convert_parser, _convert),
    "configs": ("list the shipped configs", flags.configs_parser, _configs),
    "doctor": ("what is installed, what works, and the fix for what does not", flags.doctor_parser, _doctor),
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
    received: list[int] = []

    def end(number: int, frame: object) -> None:
        received.append(number)
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        if received:
            print("gn-det: terminated", file=sys.stderr)


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run a command; returns the exit status.

    0 done, 2 a user's mistake, 130 or 143 interrupted; 141 or 2 where all was done and the output could not be printed.
    """
    with guarded(for_good=argv is None) as screen:
        try:
            return screen.status(_run(list(sys.argv[1:] if argv is None else argv), prog))
        except SystemExit as end:  # of argparse, or by SIGTERM
            raise SystemExit(screen.status(end.code) if isinstance(end.code, int) else end.code) from None


def _run(argv: Sequence[str], prog: str | None) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0 if argv else 2
    if argv[0] == "--version":
        print(f"gn_det {__version__}")
        return 0
    if argv[0] not in _COMMANDS:
        print(f"gn-det: error: unknown command {shown(argv[0])}; commands are {', '.join(_COMMANDS)}", file=sys.stderr)
        return 2
    _, make_parser, run = _COMMANDS[argv[0]]
    args = make_parser(prog or f"gn-det {argv[0]}").parse_intermixed_args(argv[1:])
    try:
        with _ended_by_sigterm():
            return run(args)
    except UserError as e:
        print(f"gn-det: error: {as_line(e)}", file=sys.stderr)
        # An interrupted run says so to the shell: 130 for Ctrl-C, 143 for SIGTERM.
        return int(getattr(e, "exit_code", 2))
    except MemoryError as e:
        print(f"gn-det: error: out of memory ({as_line(e) or 'allocation failed'}); {_LESS_MEMORY}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("gn-det: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
