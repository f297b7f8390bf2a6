"""Checks of plain values from outside: config keys, suite files, settings and checkpoints share them.

A check is called with a value and the place it comes from, and raises :class:`InvalidValue`. Its ``expected`` completes
the sentence "it must be ...", in messages and in generated documentation.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from gn_det.text import nearest, shown

#: ``check(value, where)`` raises :class:`InvalidValue` if the value cannot be used.
Check = Callable[[Any, str], None]


class InvalidValue(ValueError):
    """A value that cannot be used.

    Attributes:
        where: key or path of the value, such as ``SOLVER.STEPS[0]``.
        problem: what is wrong with it; follows ``where`` in a sentence.
        remedy: what to do about it, if that does not depend on the reader of the value.
    """

    def __init__(self, where: str, problem: str, remedy: str = "") -> None:
        super().__init__(f"{where} {problem}")
        self.where, self.problem, self.remedy = where, problem, remedy


@dataclass(frozen=True)
class Value:
    """Check of a value: ``holds`` decides, ``inside`` then checks the parts of a container."""

    expected: str
    holds: Callable[[Any], bool]
    inside: Check | None = None

    def __call__(self, value: Any, where: str) -> None:
        if not self.holds(value):
            raise InvalidValue(where or "the content", f"is {shown(value)}; it must be {self.expected}")
        if self.inside is not None:
            self.inside(value, where)


def is_number(value: Any) -> bool:
    """Whether a value is an int or a float; True and False are neither."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def integer(low: int, high: int) -> Value:
    """An integer within bounds, which are included."""
    return Value(
        f"an integer from {low} to {high}",
        lambda v: isinstance(v, int) and not isinstance(v, bool) and low <= v <= high,
    )


def number(
    low: float = -sys.float_info.max, high: float = sys.float_info.max, *, above: bool = False, below: bool = False
) -> Value:
    """A finite number within bounds; ``above`` excludes ``low``, ``below`` excludes ``high``."""
    lower = "" if low == -sys.float_info.max else f" above {low}" if above else f" from {low}"
    upper = "" if high == sys.float_info.max else f" to below {high}" if below else f" up to {high}"
    return Value(
        f"a{'' if lower else ' finite'} number{lower}{upper}",
        lambda v: is_number(v) and (low < v if above else low <= v) and (v < high if below else v <= high),
    )


FINITE = number()
POSITIVE = number(0, above=True)
#: Any number, nan and infinity included, that fits into a float.
NUMBER = Value("a number", lambda v: is_number(v) and (isinstance(v, float) or abs(v) <= sys.float_info.max))
FLAG = Value("True or False", lambda v: isinstance(v, bool))
ANYTHING = Value("any value", lambda v: True)


def text(most: int, *, least: int = 0, printable: bool = False) -> Value:
    """Text of bounded length; ``printable`` excludes control characters."""
    return Value(
        f"text of {f'{least} to' if least else 'at most'} {most} characters"
        + (" without control characters" if printable else ""),
        lambda v: isinstance(v, str) and least <= len(v) <= most and (not printable or v.isprintable()),
    )


def one_of(*choices: Any) -> Value:
    """Check for one of a few values; the error suggests the nearest one."""

    def check(value: Any, where: str) -> None:
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            near = nearest(value, [c for c in choices if isinstance(c, str)], 1) if isinstance(value, str) else []
            hint = f", did you mean {near[0]!r}?" if near else ""
            raise InvalidValue(where, f"is {shown(value)}{hint}; it must be {expected}")

    expected = f"one of {', '.join(map(repr, choices))}" if len(choices) > 1 else repr(choices[0])
    return Value(expected, lambda v: True, check)


def optional(check: Check) -> Value:
    """None, or what ``check`` accepts."""

    expected = f"None or {_expected(check)}"
    if isinstance(check, Value) and check.inside is None:
        holds = check.holds
        return Value(expected, lambda v: v is None or holds(v))

    def inside(value: Any, where: str) -> None:
        if value is not None:
            check(value, where)

    return Value(expected, lambda v: True, inside)


def every(*checks: Check) -> Value:
    """What all of the checks accept; they run in order."""

    def inside(value: Any, where: str) -> None:
        for check in checks:
            check(value, where)

    return Value(" and ".join(map(_expected, checks)), lambda v: True, inside)


def items(check: Check, least: int, most: int) -> Value:
    """A list or tuple of like items."""

    def inside(value: Any, where: str) -> None:
        for index, item in enumerate(value):
            check(item, f"{where}[{index}]")

    length = str(most) if least == most else f"{least} to {most}"
    each = f", each {check.expected}" if isinstance(check, Value) else ""
    return Value(
        f"a list of {length} items{each}", lambda v: isinstance(v, (list, tuple)) and least <= len(v) <= most, inside
    )


def row(*checks: Check) -> Value:
    """Check for a list or tuple of fixed length, with one check per item."""

    def inside(value: Any, where: str) -> None:
        for index, (check, item) in enumerate(zip(checks, value)):
            check(item, f"{where}[{index}]")

    return Value(
        f"a list of {len(checks)} items", lambda v: isinstance(v, (list, tuple)) and len(v) == len(checks), inside
    )


def table(keys: Check, values: Check, most: int) -> Value:
    """A dict of like items."""

    def inside(value: Any, where: str) -> None:
        for key, item in value.items():
            keys(key, f"a key of {where}")
            values(item, f"{where}[{shown(key)}]")

    return Value(f"a dict of at most {most} entries", lambda v: isinstance(v, Mapping) and len(v) <= most, inside)


def record(required: Mapping[str, Check], **more: Check) -> Value:
    """A dict with the entries ``required``, and perhaps those of ``more``; others are ignored.

    Its place may be "", which names the entries alone.
    """

    def inside(value: Any, where: str) -> None:
        for name, check in (*required.items(), *more.items()):
            place = f"{where}.{name}" if where else name
            if name in value:
                check(value[name], place)
            elif name in required:
                raise InvalidValue(place, "is missing")

    return Value("a dict", lambda v: isinstance(v, Mapping), inside)


def _expected(check: Check) -> str:
    return check.expected if isinstance(check, Value) else "a valid value"
