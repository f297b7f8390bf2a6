"""Values of a suite file: of the right kind, or an error that names place and key."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gn_det.errors import ConfigError
from gn_det.text import one_line, shown

#: Names in one list, and characters of a text and of a note.
MAX_NAMES, MAX_TEXT, MAX_NOTE = 1000, 1000, 20_000


class SuiteError(ConfigError):
    """A suite that cannot be run as it is written; the message names row and key."""


def mapping(value: Any, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise SuiteError(f"{where} must hold keys and values, got {shown(value)}")
    return {str(k): v for k, v in value.items()}


def is_text(value: Any) -> bool:
    """Whether a value can stand for a text: numbers need no quotes."""
    return isinstance(value, (str, int, float))


def text(value: Any, where: str, most: int = MAX_TEXT) -> str:
    """A text or number as text; "" for none."""
    if value is None:
        return ""
    if not is_text(value):
        raise SuiteError(f"{where} must be text, got {shown(value)}")
    if len(str(value)) > most:
        raise SuiteError(f"{where} must have at most {most} characters, got {shown(value)}")
    return str(value)


def texts(value: Any, where: str) -> tuple[str, ...]:
    items = [value] if isinstance(value, str) else value
    if not isinstance(items, (list, tuple)) or not all(is_text(item) for item in items):
        raise SuiteError(f"{where} must be a name or a list of names, got {shown(value)}")
    if len(items) > MAX_NAMES:
        raise SuiteError(f"{where} must be at most {MAX_NAMES} names, got {len(items)}")
    return tuple(text(item, where) for item in items)


def whole(value: Any, where: str, *, least: int, most: int = 1000) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        raise SuiteError(f"{where} is {shown(value)}; give a whole number of {least} to {most}")
    return value


def flag(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise SuiteError(f"{where} is {shown(value)}; give true or false")
    return value


def known(content: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in content:
        if key not in known:
            raise SuiteError(
                f"{where}: unknown key {one_line(key)}{near(str(key), known)}; it takes {', '.join(known)}"
            )


def one_of(value: str, known: Iterable[str], where: str) -> None:
    names = list(known)
    if value not in names:
        raise SuiteError(f"{where}: {shown(value)} is not known{near(value, names)}; it takes {', '.join(names)}")


def near(value: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(value, list(known), n=1) if len(value) <= 200 else []
    return f", did you mean '{found[0]}'?" if found else ""
