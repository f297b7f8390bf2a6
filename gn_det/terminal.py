"""Standard output and standard error of the command line, safe against what is printed and where it goes.

Whatever is printed inside :func:`guarded` reaches the terminal without control characters, in its encoding and in lines
that fit its width. Output that nobody can read any more (a closed pipe, a full disk) does not stop the command.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from gn_det.text import as_line, printable

#: Terminals with fewer columns break lines themselves.
_LEAST_COLUMNS = 40

#: Exit status of a command whose reader has gone, as the shell gives it for SIGPIPE.
CLOSED_PIPE = 141


class Screen:
    """Text stream that escapes what a terminal would obey and survives the loss of its reader.

    Attributes:
        error: what happened to the first output that was lost, None where all was written.
    """

    def __init__(self, stream: TextIO | None, keep: str = "\n\t") -> None:
        """``stream`` is None where the descriptor was closed before Python started; ``keep`` as in ``printable``."""
        self._closed = stream is None
        self._stream = stream or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        self._keep = keep
        self.error: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        if self._closed and text and self.error is None:
            self.error = OSError(errno.EBADF, os.strerror(errno.EBADF))
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        line = printable(text, self._keep).encode(encoding, "backslashreplace").decode(encoding)
        if len(text) > _LEAST_COLUMNS and "\r" not in text and self._stream.isatty():
            line = wrapped(line, shutil.get_terminal_size().columns)
        self._try(lambda: self._stream.write(line))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, call: Callable[[], object]) -> None:
        """Make a call on the stream; after an error nothing reaches it, so that closing it cannot fail again."""
        if self.error is not None:
            return
        try:
            call()
        except OSError as error:
            self.error = error
            with suppress(OSError):  # a stream without a descriptor
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)

    def status(self, code: int) -> int:
        """Return the exit status of a command that ended with ``code``: not 0 where output was lost."""
        self.flush()
        if code or self.error is None:
            return code
        if self.error.errno == errno.EPIPE:
            return CLOSED_PIPE
        print(f"gn-det: error: standard output cannot be written ({self.error.strerror})", file=sys.stderr)
        return 2


def wrapped(text: str, columns: int) -> str:
    """Break lines longer than a terminal between words; paths and other long words stay whole."""
    lines = text.split("\n")
    for number, line in enumerate(lines):
        if len(line) > columns >= _LEAST_COLUMNS and not line.startswith("|"):
            indent = " " * (len(line) - len(line.lstrip()) + 2)
            lines[number] = textwrap.fill(
                line, columns, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
            )
    return "\n".join(lines)


def guard() -> Screen:
    """Replace ``sys.stdout`` and ``sys.stderr`` by a :class:`Screen` each; return that of standard output."""
    # A progress bar returns to the start of its line; only a terminal sees one.
    returns = sys.stderr is not None and sys.stderr.isatty()
    screen = Screen(sys.stdout)
    sys.stdout = cast(TextIO, screen)
    sys.stderr = cast(TextIO, Screen(sys.stderr, "\n\t\r" if returns else "\n\t"))
    return screen


@contextmanager
def guarded(*, for_good: bool = False) -> Iterator[Screen]:
    """:func:`guard` while the context lasts.

    The streams stay guarded ``for_good``, also for a stack trace and Python's last flush, where the process is ours.
    """
    if for_good:
        _open_missing_descriptors()
    before = sys.stdout, sys.stderr
    try:
        yield guard()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        if not for_good:
            sys.stdout, sys.stderr = before


def _open_missing_descriptors() -> None:
    """Open the null device on closed standard descriptors, whose numbers the next opened file would get."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            with suppress(OSError):
                os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def say(line: object) -> None:
    """Print one line at once, whatever ``line`` holds."""
    print(as_line(line), flush=True)
