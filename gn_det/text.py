"""Make text from outside safe to print: no control characters, bounded length, bounded work."""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable


class _Repr(reprlib.Repr):
    """``repr`` whose cost does not depend on the value: nested and shared containers can have exponential text."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 3
        self.maxtuple = self.maxlist = self.maxdict = self.maxset = self.maxfrozenset = self.maxdeque = 6
        self.maxstring = self.maxother = 200

    def repr_int(self, x: int, level: int) -> str:
        # str() of a long integer is quadratic, and refused by Python above 4,300 digits.
        return repr(x) if x.bit_length() <= 256 else f"an integer of {x.bit_length()} bits"


_REPR = _Repr()


def printable(text: str, keep: str = "\n\t") -> str:
    """Return ``text`` with every character that could control a terminal written as an escape.

    Line breaks and tabs stay, unless ``keep`` says otherwise. Control characters, direction marks and undecodable bytes
    (surrogates) become ``\\x1b``, ``\\u202e``, ``\\udcff``.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode("ascii") for c in text)


def one_line(value: object, limit: int | None = 120) -> str:
    """Return ``value`` as one printable line of at most about ``limit`` characters, for messages and tables.

    Args:
        value: text, an exception, or any plain value; containers are abbreviated, so deeply nested or shared ones
            cost nothing.
        limit: longer text is cut and its full length appended, as in ``abc… (5000 characters)``; None never cuts.
    """
    if isinstance(value, BaseException):
        # str(KeyError(x)) is repr(x), whatever x is
        plain = all(isinstance(argument, (str, int, float, type(None))) for argument in value.args)
        words = (str(value) if plain else ", ".join(map(_REPR.repr, value.args[:3]))) or type(value).__name__
    else:
        words = value if isinstance(value, str) else _REPR.repr(value)
    if limit is None:
        return printable(" ".join(words.split()))
    # A prefix is enough to fill the line; the rest is only counted.
    line = printable(" ".join(words[: 4 * limit].split()))
    if len(line) <= limit and len(words) <= 4 * limit:
        return line
    return f"{line[:limit]}… ({len(words)} characters)"


def as_line(text: object, limit: int = 2000) -> str:
    """Return ``text`` on one printable line; longer text is cut, with its full length appended."""
    words = str(text)
    line = printable(words[:limit], keep="\t")
    return line if len(words) <= limit else f"{line}… ({len(words)} characters)"


def shown(value: object, limit: int = 60) -> str:
    """Return ``value`` as it would be typed (text in quotes), on one printable line; see :func:`one_line`."""
    if not isinstance(value, str) or len(value) <= 4 * limit:
        return one_line(value if not isinstance(value, str) else repr(value), limit)
    return f"{one_line(repr(value[:limit]), None)[:limit]}… ({len(value)} characters)"


def nearest(name: str, names: Iterable[str], n: int = 3, cutoff: float = 0.6) -> list[str]:
    """Return up to ``n`` of ``names`` that are spelled most like ``name``, for "did you mean"; none for a long text."""
    return difflib.get_close_matches(name, list(names), n, cutoff) if len(name) <= 200 else []


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the known name nearest to ``word``, or "" where none is near."""
    near = nearest(word, known, n=1)
    return f"; did you mean {shown(near[0])}?" if near else ""


def some(values: Iterable[object], limit: int = 5) -> str:
    """Return the first values, comma-separated on one printable line, and how many more there are."""
    every = list(values)
    more = f" and {len(every) - limit} more" if len(every) > limit else ""
    return ", ".join(one_line(value, 60) for value in every[:limit]) + more


def count(number: int, noun: str, plural: str = "") -> str:
    """Return ``"1 image"`` or ``"2 images"``; ``plural`` is ``noun`` with an s unless given."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"
