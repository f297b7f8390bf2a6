"""Standard output and standard error of the command line, safe against what is printed and where it goes.

Whatever is printed while :func:`guarded` lasts reaches the terminal without control characters, in the encoding of the
terminal, and output that nobody can read any more (a closed pipe, a full disk) does not stop the command.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO, cast

from gn_det.text import as_line, printable

#: Exit status of a command whose reader has gone, as the shell gives it for SIGPIPE.
CLOSED_PIPE = 141


class Screen:
    """A text stream that escapes what a terminal would obey and survives its reader.

    Attributes:
        error: what happened to the first output that was lost, None where all was written.
    """

    def __init__(self, stream: TextIO | None, keep: str = "\n\t") -> None:
        """``stream`` is None where the descriptor was closed before Python started; ``keep`` as in ``printable``."""
        self._closed = stream is None
        self._stream = open(os.devnull, "w", encoding="utf-8") if stream is None else stream  # noqa: SIM115
        self._keep = keep
        self.error: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        if self._closed and text and self.error is None:
            self.error = OSError(errno.EBADF, os.strerror(errno.EBADF))
        if self.error is None:
            try:
                self._stream.write(self._encodable(printable(text, self._keep)))
            except OSError as error:
                self._lose(error)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        if self.error is None:
            try:
                self._stream.flush()
            except OSError as error:
                self._lose(error)

    def _encodable(self, text: str) -> str:
        """The text with escapes for the characters that the encoding of the stream lacks."""
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        return (
            text
            if encoding.lower() in ("utf-8", "utf8")
            else text.encode(encoding, "backslashreplace").decode(encoding)
        )

    def _lose(self, error: OSError) -> None:
        """Remember the error; what is buffered goes nowhere, so that closing the stream cannot fail again."""
        self.error = error
        with suppress(OSError):  # a stream without a descriptor
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)

    def status(self, code: int) -> int:
        """Exit status of a command that ended with ``code``: not 0 where output was lost."""
        self.flush()
        if code or self.error is None:
            return code
        if self.error.errno == errno.EPIPE:
            return CLOSED_PIPE
        print(f"gn-det: error: standard output cannot be written ({self.error.strerror})", file=sys.stderr)
        return 2


def guard() -> Screen:
    """Put a :class:`Screen` in the place of ``sys.stdout`` and ``sys.stderr``; returns that of standard output."""
    # A progress bar goes back to the start of its line; only a terminal sees one.
    returns = sys.stderr is not None and sys.stderr.isatty()
    screen = Screen(sys.stdout)
    sys.stdout = cast(TextIO, screen)
    sys.stderr = cast(TextIO, Screen(sys.stderr, "\n\t\r" if returns else "\n\t"))
    return screen


@contextmanager
def guarded(*, for_good: bool = False) -> Iterator[Screen]:
    """:func:`guard` as long as the context lasts.

    Args:
        for_good: the process is ours, so the streams stay guarded for a stack trace and for Python's last flush.
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
    """Point closed standard descriptors nowhere: the next file opened would get their numbers, and library output."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            with suppress(OSError):
                os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def say(line: object) -> None:
    """Print one line at once, whatever ``line`` holds."""
    print(as_line(line), flush=True)
