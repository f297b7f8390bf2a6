"""What became of every tensor: the load report, per part of the model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from gn_det.text import as_line, one_line

Shape = tuple[int, ...]

PARTS = (
    "stem",
    "res2",
    "res3",
    "res4",
    "res5",
    "fpn",
    "rpn",
    "box head",
    "mask head",
    "res5 head",
    "other",
)
BOTTOM_UP = ("stem", "res2", "res3", "res4", "res5")

_PART_OF = (
    (re.compile(r"(?:backbone\.(?:bottom_up\.)?)?stem\."), "stem"),
    (re.compile(r"roi_heads\.res5\."), "res5 head"),
    (re.compile(r"(?:backbone\.(?:bottom_up\.)?)?res([2-5])\."), "res"),
    (re.compile(r"backbone\.(?:fpn_|top_block)"), "fpn"),
    (re.compile(r"proposal_generator\."), "rpn"),
    (re.compile(r"roi_heads\.(?:box_head|box_predictor)\."), "box head"),
    (re.compile(r"roi_heads\.mask_head\."), "mask head"),
)


def part_of(name: str) -> str:
    """The part (one of :data:`PARTS`) that a state-dict name belongs to."""
    for pattern, part in _PART_OF:
        match = pattern.match(name)
        if match:
            return part + match.group(1) if part == "res" else part
    return "other"


@dataclass
class PartReport:
    """Names of one part's tensors by what became of them."""

    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    shape_differs: list[tuple[str, Shape, Shape]] = field(default_factory=list)  # name, in the file, in the model
    reinitialised: list[tuple[str, Shape, Shape]] = field(default_factory=list)  # the same; expected: classes differ

    @property
    def clean(self) -> bool:
        return not (self.missing or self.unexpected or self.shape_differs)


@dataclass
class LoadReport:
    """Result of :func:`gn_det.checkpoint.weights.load_weights`.

    Attributes:
        source: the path or URI as given.
        kind: what the file was recognised as, such as "Caffe2 ImageNet backbone, ResNet-50, GN".
        parts: one entry per part that the model or the file has.
        ignored: names in the file that no detector uses (ImageNet classifier, momentum, anchors ...).
        notes: sentences worth showing the user.
        meta: the ``gn_det`` block of the file, or None.
    """

    source: str
    kind: str
    parts: dict[str, PartReport]
    ignored: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    meta: dict[str, Any] | None = None

    def _names(self, what: str) -> list[str]:
        return [
            entry if isinstance(entry, str) else entry[0] for p in self.parts.values() for entry in getattr(p, what)
        ]

    @property
    def loaded(self) -> list[str]:
        return self._names("loaded")

    @property
    def missing(self) -> list[str]:
        return self._names("missing")

    @property
    def unexpected(self) -> list[str]:
        return self._names("unexpected")

    @property
    def shape_differs(self) -> list[str]:
        return self._names("shape_differs")

    @property
    def reinitialised(self) -> list[str]:
        return self._names("reinitialised")


def format_report(report: LoadReport) -> str:
    """The report as a table of one line per part, with what is not simply loaded spelled out."""
    head = f"Weights: {as_line(report.source)} ({one_line(report.kind)})"
    rows: list[tuple[str, ...]] = [("part", "loaded", "missing", "unexpected", "shape", "note")]
    for part in PARTS:
        p = report.parts.get(part)
        if p is None:
            continue
        total = len(p.loaded) + len(p.missing) + len(p.shape_differs) + len(p.reinitialised)
        counts = (len(p.missing), len(p.unexpected), len(p.shape_differs))
        rows.append((part, f"{len(p.loaded)}/{total}", *(str(c or "-") for c in counts), _note(p)))
    widths = [max(len(row[i]) for row in rows) for i in range(5)]
    lines = [
        "  " + "  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in range(1, 5)), row[5]]).rstrip()
        for row in rows
    ]
    if report.ignored:
        lines.append(f"  not used by a detector: {shorten(report.ignored)}")
    lines += [f"  note: {as_line(note)}" for note in report.notes]
    return "\n".join([head, *lines])


def _note(p: PartReport) -> str:
    notes = []
    if p.missing and not (p.loaded or p.shape_differs or p.reinitialised):
        notes.append("not in the file: initialised")
    elif p.missing:
        notes.append(f"initialised: {shorten(p.missing)}")
    if p.reinitialised:
        names = shorten(n.removeprefix("roi_heads.") for n, _, _ in p.reinitialised)
        notes.append(f"re-initialised, expected (classes differ): {names}")
    if p.shape_differs:
        notes.append(
            "not loaded: "
            + "; ".join(f"{one_line(n)} {a} in the file, {b} in the model" for n, a, b in p.shape_differs[:2])
        )
    if p.unexpected:
        notes.append(f"only in the file: {shorten(p.unexpected)}")
    return "; ".join(notes)


def shorten(names: Iterable[str], limit: int = 3) -> str:
    """``conv1.{weight,bias}, conv2.weight and 5 more``: tensors of one module together, the rest counted."""
    leaves: dict[str, list[str]] = {}
    for name in map(one_line, names):
        module, dot, leaf = name.rpartition(".")
        leaves.setdefault(module + dot or name, []).append(leaf if dot else "")
    shown = [
        module + (found[0] if len(found) == 1 else "{" + ",".join(found) + "}")
        for module, found in list(leaves.items())[:limit]
    ]
    rest = sum(len(found) for found in list(leaves.values())[limit:])
    return ", ".join(shown) + (f" and {rest} more" if rest else "")
