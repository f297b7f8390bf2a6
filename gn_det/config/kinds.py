"""Kinds of config keys and of their values, from which :mod:`gn_det.config.schema` declares each key."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from gn_det.values import FINITE, FLAG, Check, Value, every, integer, is_number, items, number, one_of, row


@dataclass(frozen=True)
class Key:
    """Declaration of one key."""

    name: str  # dotted, such as SOLVER.BASE_LR
    default: Any  # also decides the type of values read from text
    check: Value  # requirements of all engines on a value
    doc: str  # one or two sentences
    known: tuple[Any, ...] | None = None  # the only values that the engines implement; None: all that check accepts
    embedded: tuple[Any, ...] | None = None  # the only ones of the embedded engine, if Detectron2 implements more
    detectron2: tuple[Any, ...] | None = None  # the only ones of --engine detectron2, if embedded is given
    ours: bool = False  # whether Detectron2 lacks this key
    rescaled: bool = False  # whether scaling to another batch changes the value, unless set on the command line

    def implemented(self, engine: str) -> tuple[Any, ...] | None:
        """Return the only values that ``engine`` implements; None for all that pass ``check``."""
        return self.known or (self.embedded if engine == "embedded" else self.detectron2)


# ------------------------------------------------------------ kinds of values

#: Longest path, and longest part of it, in bytes.
_MAX_PATH, _MAX_PART = 2048, 255


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 4096 and not re.search(r"[\x00-\x1f\x7f-\x9f]", value)


def _is_path(value: Any) -> bool:
    if not _is_text(value) or "://" in value:
        return _is_text(value)
    sizes = [len(part.encode("utf-8", "surrogatepass")) for part in re.split("[/@]", value)]
    return sum(sizes) <= _MAX_PATH and max(sizes) <= _MAX_PART


def rising(check: Check, least: int, most: int) -> Value:
    return every(items(check, least, most), Value("in increasing order", lambda v: all(a < b for a, b in pairwise(v))))


def bit_depth_span(bit_depth: str) -> tuple[float, float] | None:
    """Return LOW and HIGH of an ``INPUT.BIT_DEPTH`` "LOW,HIGH"; None for other text."""
    try:
        low, high = (float(part) for part in bit_depth.strip("()[] ").split(","))
    except ValueError:
        return None
    return (low, high) if -math.inf < low < high < math.inf else None


TEXT = Value("text of at most 4096 characters without control characters", _is_text)
NAME = Value("a name without control characters", lambda v: _is_text(v) and v != "")
PATH = Value(f"a path of at most {_MAX_PATH} bytes, each part of at most {_MAX_PART}", _is_path)
FOLDER = Value(f"the path of a folder, each part of at most {_MAX_PART} bytes", lambda v: _is_path(v) and v.strip())
NAME_OR_NUMBER = Value("a name or a number", lambda v: NAME.holds(v) or (is_number(v) and abs(v) <= 10**6))
NAMES = items(NAME, 0, 50_000)
SETS = items(Value(PATH.expected, lambda v: _is_path(v) and v != ""), 0, 1000)
FEATURES = every(items(NAME, 1, 1000), Value("free of duplicates", lambda v: len(set(v)) == len(v)))
BIT_DEPTH = Value(
    '"", "full", "percentiles" or "LOW,HIGH" with LOW below HIGH, such as "0,4095"',
    lambda v: isinstance(v, str) and (v in ("", "full", "percentiles") or bit_depth_span(v) is not None),
)
# The upper limits are far beyond any real run; they keep a typo from taking hours or all memory.
FRACTION, WEIGHT, RATE = number(0, 1), number(0, 10**6), number(0, 1000)
SWITCH = one_of(False, True, "auto")
FOLD = every(
    items(integer(0, 100), 2, 2),
    Value("(0, 0), or (k, K) with k from 1 to K and K at least 2", lambda v: v[0] <= v[1] and (v[0] > 0) == (v[1] > 1)),
)
IOUS, LABELS = rising(number(0, 1, above=True), 1, 1000), items(integer(-1, 1), 1, 1000)
FOUR = items(number(0, 10**6, above=True), 4, 4)
CHANNELS, LAYERS, CLASSES, PROPOSALS = integer(1, 8192), integer(0, 64), integer(0, 100_000), integer(1, 1_000_000)
PIXELS, SIZE, ITERATIONS, PERIOD = integer(1, 32_768), integer(0, 32_768), integer(1, 10**9), integer(0, 10**9)
BATCH, RESOLUTION, SAMPLING = integer(1, 65_536), integer(1, 256), integer(0, 64)
CONV_DIM = Value("-1 or a number of channels from 1 to 8192", lambda v: type(v) is int and -1 <= v <= 8192 and v != 0)
EXPECTED = items(row(TEXT, TEXT, FINITE, FINITE), 0, 1000)

#: Norms that both engines build, and those that only Detectron2 has.
NORMS = ("", "GN", "LN", "IN", "BN", "SyncBN", "FrozenBN")
THEIR_NORMS = ("nnSyncBN", "naiveSyncBN", "naiveSyncBN_N")


def unused(section: str, doc: str, **defaults: Any) -> list[Key]:
    """Declare keys of Detectron2 that neither engine implements; only their defaults are accepted."""
    dot = f"{section}." if section else ""
    return [Key(f"{dot}{name}", value, _like(value), doc, known=(value,)) for name, value in defaults.items()]


def _like(default: Any) -> Value:
    """Return a check for values of the type of ``default``."""
    if isinstance(default, (list, tuple)):
        return items(_like(default[0]) if default else NAME_OR_NUMBER, 0, 1000)
    kinds = {bool: FLAG, int: integer(-(10**6), 10**6), float: number(-(10**6), 10**6), str: TEXT}
    return kinds[type(default)]


def theirs(name: str, default: Any, check: Value, doc: str) -> Key:
    """Declare a key that only Detectron2 implements; the embedded engine accepts only the default."""
    return Key(name, default, check, doc, embedded=(default,))


def ours(name: str, default: Any, check: Value, doc: str, detectron2: tuple[Any, ...] | None = None) -> Key:
    """Declare a key that Detectron2 lacks."""
    return Key(name, default, check, doc, detectron2=detectron2, ours=True)


def norm(name: str, default: str, doc: str) -> Key:
    return Key(name, default, TEXT, doc, embedded=NORMS, detectron2=(*NORMS, *THEIR_NORMS))


def box_loss(name: str) -> Key:
    losses = ("smooth_l1", "giou", "diou", "ciou")
    return Key(name, "smooth_l1", TEXT, "Loss of the box regression.", known=losses)


def pooler(name: str) -> Key:
    types = ("ROIAlignV2", "ROIAlign", "ROIPool")
    doc = "RoI pooling; ROIAlign is the older variant, shifted by half a pixel."
    return Key(name, "ROIAlignV2", TEXT, doc, known=types)
