"""The log of a run: standard output, and ``log.txt`` in OUTPUT_DIR."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TextIO

from gn_det.errors import TrainingError
from gn_det.files import open_append
from gn_det.text import as_line, one_line, printable

if TYPE_CHECKING:
    _StreamHandler = logging.StreamHandler[TextIO]
else:
    _StreamHandler = logging.StreamHandler

LOG_FILE = "log.txt"

#: Characters of a message of one line; what is longer is cut.
_LONGEST = 10_000

#: ``extra=FILE_ONLY`` keeps a record off the screen.
FILE_ONLY = {"file_only": True}


class _Console(_StreamHandler):
    """Writes around a tqdm line, if one is there."""

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "file_only", False):
            return
        tqdm = sys.modules.get("tqdm")
        if tqdm is None or not sys.stderr.isatty():
            self.stream = sys.stdout  # looked up now: it may have been redirected
            super().emit(record)
        else:
            tqdm.tqdm.write(self.format(record), file=sys.stdout)

    def handleError(self, record: logging.LogRecord) -> None:
        """What nobody can read any more (a closed pipe) does not stop a run; log.txt has it."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class _File(_StreamHandler):
    """On a full disk, drop log lines; the writers of metrics and checkpoints raise the error."""

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

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
def run_log(folder: str | os.PathLike[str] | None, *, rank: int = 0, times: bool = True) -> Iterator[None]:
    """Show gn_det's log on standard output, and append it to ``folder/log.txt``, as long as the context lasts.

    Args:
        folder: OUTPUT_DIR; None writes no file.
        rank: processes other than 0 show warnings only and write no file.
        times: begin lines with date and time.
    """
    package = logging.getLogger("gn_det")
    old_level, old_propagate = package.level, package.propagate
    handlers: list[logging.Handler] = []
    formatter = _Printable("[%(asctime)s] %(message)s" if times else "%(message)s", "%m/%d %H:%M:%S")
    if not package.handlers:
        console = _Console(sys.stdout)
        console.setLevel(logging.INFO if rank == 0 else logging.WARNING)
        handlers.append(console)
        # libraries install handlers on the root logger behind our back; pytest's are wanted
        package.propagate = "pytest" in sys.modules
    if folder is not None and rank == 0:
        try:
            handlers.append(_File(open_append(folder, LOG_FILE)))
        except OSError as error:
            path = os.path.join(folder, LOG_FILE)
            raise TrainingError(
                f"{path}: cannot be appended to ({one_line(error.strerror or error)}); move it away"
            ) from None
    for handler in handlers:
        handler.setFormatter(formatter)
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
