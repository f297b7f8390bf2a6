"""The command line: ``gn-det COMMAND ...``, one module of this package a command.

A command's module has ``add_flags(parser)`` and ``run(args)``, which returns the exit status; its docstring is the
help. Heavy imports are inside ``run``, so that ``--help`` is quick. A :class:`~gn_det.errors.UserError` ends in one
line on stderr and exit status 2.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from gn_det.about import __version__
from gn_det.cli.flags import Parser
from gn_det.errors import UserError
from gn_det.terminal import guarded
from gn_det.text import as_line, did_you_mean, shown

#: Commands in the order of the help; each is a module here.
COMMANDS = {
    "quickstart": "train on generated shapes and show the result",
    "check": "find problems in a dataset before training",
    "dataset": "convert YOLO, VOC, LabelMe, CVAT or PNG masks to COCO json and back",
    "train": "fine-tune, or train from scratch",
    "eval": "evaluate a checkpoint: COCO box and mask AP",
    "predict": "detect objects in images and draw them",
    "compare": "run a suite of experiments and report them side by side",
    "classify": "train a classifier of images or videos with the paper's recipe and any norm",
    "weights": "show what a weights file contains and what it would load",
    "export": "write a detector as ONNX or for torch without gn_det",
    "convert": "convert weights to another layout, bit for bit",
    "push": "push a trained model to the Hugging Face Hub",
    "configs": "list the shipped configs",
    "doctor": "check the installation and show how to fix it",
}

#: Earlier names of commands, which still work.
_RENAMED = {"pretrain": "classify"}

_LESS_MEMORY = "use fewer or smaller images, or a machine with more memory"


def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Run a command; returns the exit status.

    0 done, 2 a user's mistake, 130 or 143 interrupted; 141 or 2 if the work is done but the output cannot be printed.
    """
    with guarded(for_good=argv is None) as screen:
        try:
            return screen.status(_run(list(sys.argv[1:] if argv is None else argv), prog))
        except SystemExit as end:  # of argparse, or by SIGTERM
            raise SystemExit(screen.status(end.code) if isinstance(end.code, int) else end.code) from None


def _run(argv: Sequence[str], prog: str | None) -> int:
    if argv and argv[0] == "help":  # gn-det help [COMMAND]
        argv = [*argv[1:2], "--help"]
    if argv and argv[0] in _RENAMED:
        print(f"gn-det: {argv[0]} is now called {_RENAMED[argv[0]]}; the old name still works", file=sys.stderr)
        argv = [_RENAMED[argv[0]], *argv[1:]]
    if not argv or argv[0] in ("-h", "--help"):
        print(f"gn-det {__version__}: fine-tune Mask R-CNN with Group Normalization\n\nusage: gn-det COMMAND ...\n")
        print("commands (gn-det help COMMAND shows its flags):")
        print("\n".join(f"  {name:12s}{what}" for name, what in COMMANDS.items()))
        return 0 if argv else 2
    name = argv[0]
    if name == "--version":
        print(f"gn_det {__version__}")
        return 0
    if name not in COMMANDS:
        hint = did_you_mean(name, COMMANDS) or f"; commands are {', '.join(COMMANDS)}"
        print(f"gn-det: error: unknown command {shown(name)}{hint}", file=sys.stderr)
        return 2
    command, args = parse(name, argv[1:], prog)
    if getattr(args, "verbose", False):
        os.environ["GN_DET_VERBOSE"] = "1"  # also for the processes that a run starts
    try:
        with _ended_by_sigterm():
            return int(command.run(args))
    except UserError as e:
        # An interrupted run is not an error; its exit code is 130 for Ctrl-C, 143 for SIGTERM.
        interrupted = hasattr(e, "exit_code")
        print(f"gn-det: {'' if interrupted else 'error: '}{as_line(e)}", file=sys.stderr)
        return int(getattr(e, "exit_code", 2))
    except MemoryError as e:
        print(f"gn-det: error: out of memory ({as_line(e) or 'allocation failed'}); {_LESS_MEMORY}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("gn-det: interrupted", file=sys.stderr)
        return 130


def parse(name: str, words: Sequence[str], prog: str | None = None) -> tuple[Any, argparse.Namespace]:
    """Return the module of a command and its parsed flags."""
    command: Any = import_module(f"gn_det.cli.{name}")
    parser = Parser(prog=prog or f"gn-det {name}", description=command.__doc__)
    command.add_flags(parser)
    return command, parser.parse(words)


@contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM unwind like Ctrl-C, so that no temporary files remain; training handles it in its own way."""
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
