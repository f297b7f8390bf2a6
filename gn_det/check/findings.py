"""Everything that is wrong with a dataset, written down: what ``gn-det check`` reports the reader's problems to."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

from gn_det.data.problems import KINDS, NOWHERE, FileProblem, Kind, Problems, Where, in_words

#: Findings of one kind that are kept with place and words; beyond, they are counted.
KEPT = 1000


class Finding(NamedTuple):
    """One problem in one place; ``text`` may be empty where the kind says it all."""

    kind: str
    where: Where
    text: str

    def __str__(self) -> str:
        return in_words(self.where, self.text) if self.text else str(self.where)


class Findings(Problems):
    """Collects instead of refusing.

    Attributes:
        counts: how many of each kind.
        found: the first :data:`KEPT` of each kind.
        dropped_images: id of an image that training drops to the kind of problem.
        dropped_annotations: the same for annotations (new ids, where they were given).
        mended: id of an annotation to the kinds of repair it needs.
    """

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.counts: Counter[str] = Counter()
        self.found: dict[str, list[Finding]] = {}
        self.dropped_images: dict[Any, str] = {}
        self.dropped_annotations: dict[Any, str] = {}
        self.mended: dict[Any, frozenset[str]] = {}
        self._kind_sets: dict[frozenset[str], frozenset[str]] = {}

    def add(self, kind: str, text: str = "", where: Where = NOWHERE, count: int = 1) -> None:
        """Write one finding down (``count`` of them in one place)."""
        if kind not in KINDS:
            raise KeyError(f"unknown kind of problem {kind!r}")
        self.counts[kind] += count
        kept = self.found.setdefault(kind, [])
        if len(kept) < KEPT:
            kept.append(Finding(kind, where, text))

    def forget(self, *kinds: str) -> None:
        """Take back findings that have one cause, which is written down."""
        for kind in kinds:
            self.counts.pop(kind, None)
            self.found.pop(kind, None)

    def add_file_problem(self, problem: FileProblem) -> None:
        """What ended the reading."""
        self.add(problem.kind, problem.text)

    def refuse(self, kind: str, text: str, where: Where = NOWHERE) -> None:
        self.add(kind, text, where)
        if kind == "image-id-repeated":
            self.dropped_images[where.image] = kind

    def drop(self, kind: str, text: str, where: Where = NOWHERE) -> None:
        self.add(kind, text, where)
        # Annotations without a known image are left out by their position, see CocoFile.left_out.
        if where.image is not None:
            if where.annotation is None:
                self.dropped_images.setdefault(where.image, kind)
            else:
                self.dropped_annotations.setdefault(where.annotation, kind)

    def repair(self, kind: str, what: str, where: Where, count: int = 1) -> None:
        self.add(kind, "", where, count)
        if where.annotation is not None and not kind.startswith("annotation-"):
            kinds = self.mended.get(where.annotation, frozenset()) | {kind}
            # One set for all annotations with the same repairs: a whole COCO may lack iscrowd.
            self.mended[where.annotation] = self._kind_sets.setdefault(kinds, kinds)

    def of(self, severity: str) -> list[tuple[str, Kind, int]]:
        """(name, kind, count) of the kinds found, in the order of ``KINDS``."""
        return [(n, k, self.counts[n]) for n, k in KINDS.items() if k.severity == severity and self.counts[n]]

    def total(self, severity: str) -> int:
        """How many findings of that severity."""
        return sum(count for _, _, count in self.of(severity))
