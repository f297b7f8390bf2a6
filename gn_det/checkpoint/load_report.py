"""What became of every tensor of a weights file, per part of the model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gn_det.checkpoint.parameter_names import PARTS, part_of, shorten
from gn_det.text import as_line, one_line

Shape = tuple[int, ...]


@dataclass
class Outcome:
    """Names of tensors by what became of them, with the shapes in the file and in the model where they differ."""

    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # only in the model
    unexpected: list[str] = field(default_factory=list)  # only in the file
    shape_differs: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)
    #: predictors whose shape differs because the number of classes does
    reinitialised: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)


@dataclass
class LoadReport(Outcome):
    """Result of :func:`gn_det.checkpoint.weights.load_weights`."""

    source: str = ""
    kind: str = ""  # what the file was recognised as, such as "Caffe2 ImageNet backbone, ResNet-50, GN"
    ignored: tuple[str, ...] = ()  # names that no detector uses (ImageNet classifier, momentum, anchors ...)
    notes: tuple[str, ...] = ()  # sentences worth showing the user
    meta: dict[str, Any] | None = None  # the gn_det block of the file

    def by_part(self) -> dict[str, Outcome]:
        """Return the parts of :data:`PARTS` that the model or the file has, in that order."""
        parts: dict[str, Outcome] = {}
        for what in ("loaded", "missing", "unexpected"):
            for name in getattr(self, what):
                getattr(parts.setdefault(part_of(name), Outcome()), what).append(name)
        for what in ("shape_differs", "reinitialised"):
            for name, shapes in getattr(self, what).items():
                getattr(parts.setdefault(part_of(name), Outcome()), what)[name] = shapes
        return {part: parts[part] for part in PARTS if part in parts}


def format_report(report: LoadReport) -> str:
    """Return the report as a table of one line per part, with whatever is not simply loaded spelled out."""
    from tabulate import tabulate

    rows = []
    for name, part in report.by_part().items():
        total = len(part.loaded) + len(part.missing) + len(part.shape_differs) + len(part.reinitialised)
        counts = (len(part.missing), len(part.unexpected), len(part.shape_differs))
        rows.append((name, f"{len(part.loaded)}/{total}", *(str(c or "-") for c in counts), _note(part)))
    headers = ("part", "loaded", "missing", "unexpected", "shape", "note")
    align = ("left", *["right"] * 4, "left")
    table = tabulate(rows, headers, tablefmt="plain", disable_numparse=True, colalign=align if rows else None)
    lines = [f"Weights: {as_line(report.source)} ({one_line(report.kind)})"]
    lines += [f"  {line}".rstrip() for line in table.splitlines()]
    lines += [f"  not used by a detector: {shorten(report.ignored)}"] if report.ignored else []
    return "\n".join([*lines, *(f"  note: {as_line(note)}" for note in report.notes)])


def _note(part: Outcome) -> str:
    notes = []
    if part.missing:
        partly = part.loaded or part.shape_differs or part.reinitialised
        notes.append(f"initialised: {shorten(part.missing)}" if partly else "not in the file: initialised")
    if part.reinitialised:
        names = shorten(name.removeprefix("roi_heads.") for name in part.reinitialised)
        notes.append(f"re-initialised, expected (classes differ): {names}")
    if part.shape_differs:
        some = [f"{one_line(n)} {a} in the file, {b} in the model" for n, (a, b) in part.shape_differs.items()]
        notes.append(f"not loaded: {'; '.join(some[:2])}")
    if part.unexpected:
        notes.append(f"only in the file: {shorten(part.unexpected)}")
    return "; ".join(notes)
