"""The command line: ``gn-det COMMAND ...``, one module of this package a command.

A command's module has ``add_flags(parser)`` and ``run(args)``, which returns the exit status; the first line of its
docstring is its help. The modules import what is heavy inside ``run``, so ``--help`` answers at once. A
:class:`~gn_det.errors.UserError` ends as one line on stderr and exit status 2.
"""

from __future__ import annotations

import argparse
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
    "train": "fine-tune, train from scratch or evaluate",
    "eval": "COCO AP of a checkpoint",
    "predict": "detect objects in images and draw them",
    "check": "find what is wrong with a dataset before training does",
    "pretrain": "train a backbone with any norm by the paper's recipe",
    "compare": "run a suite of rows and report them side by side",
    "quickstart": "train on generated shapes and show the result",
    "weights": "show what a weights file is and where it would load",
    "convert": "write weights in another layout, bit for bit",
    "configs": "list the shipped configs",
    "doctor": "show what is installed, what works, and how to fix what does not",
}

_LESS_MEMORY = "give the machine more memory, or give this command smaller or fewer images"


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
        print(f"gn-det {__version__}: fine-tune Mask R-CNN with Group Normalization\n\nusage: gn-det COMMAND ...\n")
        print("commands (gn-det COMMAND --help shows the flags):")
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
    try:
        with _ended_by_sigterm():
            return int(command.run(args))
    except UserError as e:
        # An interrupted run is no error, and says so to the shell: 130 for Ctrl-C, 143 for SIGTERM.
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
    """Let SIGTERM unwind like Ctrl-C, so that no temporary file is left; training has its own way to stop."""
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
