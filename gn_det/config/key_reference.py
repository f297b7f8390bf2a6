"""Markdown reference of all config keys, generated from the schema."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from gn_det.config.kinds import Key
from gn_det.config.schema import KEYS

_HEAD = """\
# Config keys

A config is a Detectron2 YAML file; on the command line, write `KEY VALUE` or `KEY=VALUE` after the flags. Keys marked
with * are gn_det's own. All others are Detectron2's, with its defaults (except `MODEL.DEVICE` and
`MODEL.ROI_HEADS.NUM_CLASSES`). A value that the chosen engine does not implement is refused, never ignored. This page
is the output of `gn-det configs --keys`.
"""


def key_reference() -> str:
    """Return all keys with default, accepted values and description, by section."""
    rows: dict[str, list[str]] = {}
    for key in KEYS.values():
        rows.setdefault(key.name.rpartition(".")[0], []).append(_row(key))
    head = "| key | default | values | |\n|---|---|---|---|\n"
    sections = (f"\n## {name or 'General'}\n\n{head}" + "\n".join(part) for name, part in rows.items())
    return _HEAD + "\n".join(sections) + "\n"


def _row(key: Key) -> str:
    name = key.name.rpartition(".")[2] + ("*" if key.ours else "")
    return f"| `{name}` | `{key.default!r}` | {_values(key)} | {key.doc} |"


def _values(key: Key) -> str:
    known, theirs = key.implemented("embedded"), key.implemented("detectron2")
    if known is None:
        return key.check.expected
    if known == (key.default,) and theirs in (known, None):
        return "only the default" if theirs else f"{key.check.expected}; only the default with the embedded engine"
    more = [value for value in theirs or () if value not in known]
    return _list(known) + (f"; with `--engine detectron2` also {_list(more)}" if more else "")


def _list(values: Iterable[Any]) -> str:
    return ", ".join(f"`{value!r}`" for value in values)
