"""The log of a run: standard output, and ``log.txt`` in OUTPUT_DIR."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from gn_det.errors import TrainingError
from gn_det.files import open_append
from gn_det.text import as_line, one_line, printable

LOG_FILE = "log.txt"

#: Longest one-line message in characters; longer ones are cut.
_LONGEST = 10_000


def on_screen(text: str) -> dict[str, str]:
    """Return the ``extra=`` of a record that the screen shows as ``text``, except with ``--verbose``."""
    return {"on_screen": text}


#: ``extra=FILE_ONLY`` keeps a record off the screen.
FILE_ONLY = on_screen("")


def open_log(path: str | os.PathLike[str]) -> TextIO:
    """Open a regular file for appending text, or raise TrainingError."""
    try:
        return open_append(*os.path.split(path))
    except OSError as error:
        reason = one_line(error.strerror or error)
        raise TrainingError(f"{os.fspath(path)}: cannot append to this file ({reason}); move it away") from None


class _Handler(logging.StreamHandler):  # type: ignore[type-arg]
    """Drops lines that cannot be written, because the disk is full or a pipe is closed."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class _Console(_Handler):
    """Writes above a tqdm progress bar, and prefers the short form of a record."""

    verbose = False

    def emit(self, record: logging.LogRecord) -> None:
        short = getattr(record, "on_screen", None)
        if short == "":
            return
        if short is not None and not self.verbose:
            record = logging.makeLogRecord({**vars(record), "msg": short, "args": None})
        tqdm = sys.modules.get("tqdm")
        if tqdm is None or not sys.stderr.isatty():
            self.stream = sys.stdout  # looked up each time, because it may be redirected
            super().emit(record)
        else:
            tqdm.tqdm.write(self.format(record), file=sys.stdout)


class _File(_Handler):
    """log.txt; on a full disk, closing it raises no error, but the writers of metrics and checkpoints do."""

    def close(self) -> None:
        with suppress(OSError):
            self.stream.close()
        super().close()


class _Printable(logging.Formatter):
    """Marks warnings and errors, and escapes control characters.

    A message without a line break in its format stays on one line, whatever its values contain.
    """

    def format(self, record: logging.LogRecord) -> str:
        message = record.getMessage()
        safe = printable(message) if "\n" in str(record.msg) else as_line(message, _LONGEST)
        if record.levelno >= logging.WARNING:
            safe = f"{record.levelname}: {safe}"
        return printable(super().format(logging.makeLogRecord({**vars(record), "msg": safe, "args": None})))


@contextmanager
def run_log(folder: str | os.PathLike[str] | None, *, rank: int = 0) -> Iterator[None]:
    """Within the context, show gn_det's log on standard output and append it to ``folder/log.txt``.

    Args:
        folder: OUTPUT_DIR; None, for a dry run, writes no file, and shows long forms and no times.
        rank: processes other than 0 show only warnings and write no file.
    """
    package = logging.getLogger("gn_det")
    old_level, old_propagate = package.level, package.propagate
    handlers: list[logging.Handler] = []
    layout = "%(message)s" if folder is None else "[%(asctime)s] %(message)s"
    if not package.handlers:
        console = _Console(sys.stdout)
        console.setLevel(logging.INFO if rank == 0 else logging.WARNING)
        console.setFormatter(_Printable(layout, "%H:%M:%S"))
        # set to 1 by --verbose for all processes of a run, so that the screen shows the full log
        console.verbose = folder is None or os.environ.get("GN_DET_VERBOSE", "0") not in ("", "0")
        handlers.append(console)
        # libraries add handlers to the root logger; keep only pytest's
        package.propagate = "pytest" in sys.modules
    if folder is not None and rank == 0:
        file = _File(open_log(os.path.join(folder, LOG_FILE)))
        file.setFormatter(_Printable(layout, "%m/%d %H:%M:%S"))
        handlers.append(file)
    for handler in handlers:
        package.addHandler(handler)
    package.setLevel(logging.INFO)
    try:
        yield
    finally:
        for handler in handlers:
            package.removeHandler(handler)
            handler.close()
        package.setLevel(old_level)
        package.propagate = old_propagate
