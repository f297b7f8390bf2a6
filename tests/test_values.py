"""Checks of plain values: what passes, what does not, and the sentence that says so."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from gn_det.values import (
    FINITE,
    FLAG,
    NUMBER,
    POSITIVE,
    Check,
    InvalidValue,
    every,
    integer,
    items,
    number,
    one_of,
    optional,
    record,
    row,
    table,
    text,
)

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("check", "good", "bad", "expected"),
    [
        (integer(-1, 3), [-1, 3], [-2, 4, 1.0, True, "1", None, 10**5000], "an integer from -1 to 3"),
        (number(0, 1), [0, 0.5, 1], [-0.1, 1.1, NAN, True, "0", 10**5000], "a number from 0 up to 1"),
        (number(0, 1, above=True), [0.1, 1], [0], "a number above 0 up to 1"),
        (number(0, 1, below=True), [0, 0.9], [1], "a number from 0 to below 1"),
        (POSITIVE, [1e-300, 5], [0, -1, INF], "a number above 0"),
        (FINITE, [-1e300, 2], [INF, -INF, NAN, 10**5000], "a finite number"),
        (NUMBER, [NAN, INF, 3], [10**5000, False, "nan"], "a number"),
        (FLAG, [True, False], [0, 1, None, "True"], "True or False"),
        (text(3), ["", "abc", "a\n"], ["abcd", 3, None], "text of at most 3 characters"),
        (text(3, least=1, printable=True), ["a"], ["", "a\n"], "text of 1 to 3 characters without control characters"),
        (one_of("a", "b", 1), ["a", 1], ["c", True, 1.0, []], "one of 'a', 'b', 1"),
        (optional(FLAG), [None, True], [0], "None or True or False"),
        (items(integer(0, 9), 1, 2), [[1], (1, 2)], [[], [1, 2, 3], 1, {1}], "a list of 1 to 2 items, each an integer"),
        (row(FLAG, FLAG), [[True, False]], [[True], True], "a list of 2 items"),
        (table(text(9), FLAG, 1), [{}, {"a": True}], [{"a": True, "b": True}, []], "a dict of at most 1 entries"),
        (record({"a": FLAG}, b=FLAG), [{"a": True}, {"a": True, "b": False, "c": 3}], [[], 5], "a dict"),
        (every(FINITE, POSITIVE), [1], [0], "a number above 0"),
    ],
)  # fmt: skip
def test_accepted_and_refused(check: Check, good: list[Any], bad: list[Any], expected: str) -> None:
    for value in good:
        check(value, "key")
    for value in bad:
        with pytest.raises(InvalidValue) as error:
            check(value, "key")
        assert error.value.where == "key" and expected in error.value.problem
        assert str(error.value) == f"key {error.value.problem}" and len(str(error.value)) < 200


@pytest.mark.parametrize(
    ("check", "value", "message"),
    [
        (items(FLAG, 0, 3), [True, 5], "key[1] is 5; it must be True or False"),
        (row(FLAG, NUMBER), [True, "x"], "key[1] is 'x'; it must be a number"),
        (table(text(3), FLAG, 9), {"long": True}, "a key of key is 'long'; it must be text of at most 3 characters"),
        (table(text(9), FLAG, 9), {"a": 2}, "key['a'] is 2; it must be True or False"),
        (optional(items(FLAG, 0, 1)), [3], "key[0] is 3; it must be True or False"),
        (record({"a": FLAG}), {}, "key.a is missing"),
        (record({}, a=FLAG), {"a": 2}, "key.a is 2; it must be True or False"),
        (one_of("bf16", "fp16"), "bf61", "key is 'bf61', did you mean 'bf16'?; it must be one of 'bf16', 'fp16'"),
        (one_of(2), 3, "key is 3; it must be 2"),
    ],
)
def test_the_message_names_the_place(check: Check, value: Any, message: str) -> None:
    with pytest.raises(InvalidValue) as error:
        check(value, "key")
    assert str(error.value) == message


def test_a_record_without_a_place_names_its_entries() -> None:
    with pytest.raises(InvalidValue, match=r"^a\.b is missing$"):
        record({"a": record({"b": FLAG})})({"a": {}}, "")


def test_long_lists_and_shared_nesting_cost_nothing() -> None:
    """Counted, not timed: of a list that is too long no item is looked at, and nothing is printed unbounded."""
    seen: list[Any] = []
    with pytest.raises(InvalidValue, match="must be a list of 0 to 10 items"):
        items(lambda value, where: seen.append(value), 0, 10)([0] * 3_000_000, "list")
    diamond: Any = 1
    for _ in range(100):
        diamond = [diamond, diamond]
    for check in (NUMBER, text(5), row(NUMBER), record({}), FLAG):
        with pytest.raises(InvalidValue) as error:
            check(diamond, "entry")
        assert not seen and len(str(error.value)) < 200


def test_values_need_no_torch() -> None:
    code = "import sys, gn_det.values; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
