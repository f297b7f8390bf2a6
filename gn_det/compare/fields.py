"""Values of a suite file: of the right kind, or an error that names place and key."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from gn_det.errors import ConfigError


class SuiteError(ConfigError):
    """A suite that cannot be run as it is written; the message names row and key."""


def mapping(value: Any, where: str) -> dict[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise SuiteError(f"{where} must hold keys and values, got {value!r}")
    return {str(k): v for k, v in value.items()}


def texts(value: Any, where: str) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, (str, int, float)) for item in value):
        raise SuiteError(f"{where} must be a name or a list of names, got {value!r}")
    return tuple(str(item) for item in value)


def whole(value: Any, where: str, *, least: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise SuiteError(f"{where} is {value!r}; give a whole number of at least {least}")
    return value


def flag(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise SuiteError(f"{where} is {value!r}; give true or false")
    return value


def known(content: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in content:
        if key not in known:
            raise SuiteError(f"{where}: unknown key {key}{near(str(key), known)}; it takes {', '.join(known)}")


def one_of(value: str, known: Iterable[str], where: str) -> None:
    names = list(known)
    if value not in names:
        raise SuiteError(f"{where}: '{value}' is not known{near(value, names)}; it takes {', '.join(names)}")


def near(value: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(value, list(known), n=1)
    return f", did you mean '{found[0]}'?" if found else ""
