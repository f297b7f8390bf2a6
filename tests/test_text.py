"""Text from outside: nothing in it reaches a terminal raw, and its length and cost are bounded."""

from __future__ import annotations

from typing import Any

import pytest

from gn_det.text import as_line, one_line, printable, shown


@pytest.mark.parametrize(
    ("raw", "safe"),
    [
        ("plain 圆形 é", "plain 圆形 é"),
        ("a\x1b[31mred", "a\\x1b[31mred"),
        ("bell\a back\b", "bell\\x07 back\\x08"),
        ("right-to-left \u202e", "right-to-left \\u202e"),
        ("undecodable \udcff", "undecodable \\udcff"),
        ("two\nlines\there", "two\nlines\there"),
    ],
)
def test_no_control_character_stays(raw: str, safe: str) -> None:
    assert printable(raw) == safe


def test_one_line_joins_lines_and_counts_what_it_cuts() -> None:
    assert one_line(" a\n b\r\n\tc ") == "a b c"
    assert one_line("x" * 5000, 10) == "xxxxxxxxxx… (5000 characters)"
    assert one_line("x" * 5000, None) == "x" * 5000
    assert shown("it's\n") == '"it\'s\\n"'
    assert one_line("a" + " " * 50 + "b", 20) == "a b"
    assert one_line("a" + " " * 50 + "b", 10) == "a… (52 characters)"
    assert as_line("a\tb\nc", 5) == "a\tb\\nc" and as_line("abcde", 5) == "abcde"
    assert as_line("abcdef", 5) == "abcde… (6 characters)"


def nested(levels: int) -> Any:
    value: Any = ()
    for _ in range(levels):
        value = (value, value)
    return value


def test_cost_does_not_grow_with_the_value() -> None:
    """60 levels of shared pairs have 2^60 leaves: their repr never ends."""
    for value in (nested(60), KeyError(nested(60)), {1: nested(60)}):
        assert len(one_line(value)) < 200
    assert one_line(10**100_000) == "an integer of 332193 bits"
    assert one_line(KeyError("name")) == "'name'"
    assert one_line(ValueError()) == "ValueError"
