"""Report of a check over all sets, as text and as JSON."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gn_det.about import __version__
from gn_det.check.audit import VISIBLE, Findings, Survey, Training
from gn_det.check.sizes import EDGES, LABELS, SizeTable, as_overrides, propose, size_table
from gn_det.data.coco import CocoDataset, check_masks, check_num_classes, check_objects, check_same_classes
from gn_det.data.problems import NOWHERE, Where
from gn_det.data.sets import model_category_ids
from gn_det.errors import DataError
from gn_det.text import as_line, count, one_line, shown

#: Share of objects below half the smallest anchor from which the report mentions it.
_MANY_SMALL = 0.25
#: Places to quote for each kind, by severity; ``--json`` lists more.
_QUOTED = {"error": 3, "warning": 3, "note": 1}
#: Classes to list, width of their names and of the longest bar; ``--html`` and ``--json`` list all classes.
_CLASSES, _NAME, _BAR = 20, 60, 30

#: (class name, objects per set, images per set) of each class.
ClassTable = list[tuple[str, list[int], list[int]]]


@dataclass
class Report:
    """All sets of one check."""

    surveys: list[Survey]  # training sets first
    across: Findings  # problems between sets, or between sets and config
    config: str = ""  # name of the config
    sizes: SizeTable | None = None  # object sizes of the training sets, None if none could be read
    proposals: dict[str, Any] = field(default_factory=dict)  # config keys that fit the objects better than the config's
    changes: list[str] | None = None  # changes made by ``--fix``, one per line; None without it
    not_fixed: list[str] = field(default_factory=list)  # errors that the cleaned copy still has

    def total(self, severity: str) -> int:
        """Return the number of findings of a severity in all sets."""
        return sum(f.total(severity) for f in (*(s.findings for s in self.surveys), self.across))

    @property
    def exit_code(self) -> int:
        """0 if clean (notes do not count), 1 if there are only warnings, 2 if there are errors."""
        return 2 if self.total("error") else 1 if self.total("warning") else 0

    def verdict(self) -> str:
        """Return the result in one line."""
        parts = [count(n, word) for word in ("error", "warning", "note") if (n := self.total(word))]
        meaning = (
            "clean",
            "training would use this dataset; see the warnings",
            "training would refuse this dataset or drop entries",
        )
        found = ", ".join(parts) or "no problem found"
        return f"{found}: {meaning[self.exit_code]} (exit code {self.exit_code})"


def look_across(surveys: list[Survey], training: Training, cfg: Any, config: str) -> Report:
    """Compare the sets with each other and with the config, using training's functions."""
    report = Report(surveys, Findings("all sets"), config)
    train, val = ([s for s in surveys if s.split == split] for split in ("train", "val"))
    _find_overlap(report.across, train, val)
    datasets = [s.dataset for s in train if s.dataset is not None]
    if datasets:
        _compare_with_training(report.across, datasets, [s.dataset for s in val if s.dataset is not None], cfg)
        report.sizes = size_table(datasets, training, cfg)
        report.proposals = propose(datasets, training, cfg)
        if report.sizes.small > _MANY_SMALL:
            report.across.add("small-for-anchors", NOWHERE, report.sizes.small, min(report.sizes.anchors))
    return report


def _compare_with_training(
    across: Findings, train: Sequence[CocoDataset], val: Sequence[CocoDataset], cfg: Any
) -> None:
    @contextmanager
    def reported(kind: str) -> Iterator[None]:
        try:
            yield
        except DataError as error:
            across.add(kind, NOWHERE, str(error))

    with reported("classes-differ"):
        check_same_classes(train)
    with reported("no-objects"):
        check_objects(train)
    for dataset in train:
        with reported("num-classes"):
            check_num_classes(int(cfg.MODEL.ROI_HEADS.NUM_CLASSES), dataset)
        if cfg.MODEL.MASK_ON and len(dataset.object_images):
            with reported("no-masks"):
                check_masks(dataset, max_bad=2**62)
    names, ids = train[0].class_names, train[0].category_ids
    for other in val:
        with reported("classes-differ"):
            own = model_category_ids(other, names)
            if any(o != i for name, o, i in zip(names, own, ids) if name in other.class_names):
                across.add("class-ids-differ", NOWHERE, other.json_file)
            for name in (n for n in names if n not in other.class_names):
                across.add("classes-lacking", NOWHERE, other.json_file, shown(name))


def _find_overlap(across: Findings, train: Sequence[Survey], val: Sequence[Survey]) -> None:
    """Compare files, then contents; images that were not decoded are read only if their lengths are equal."""
    if not train or not val:
        return
    by_file: dict[tuple[int, int], dict[str, Any]] = {}
    by_length: dict[int, list[tuple[Survey, dict[str, Any]]]] = defaultdict(list)
    for survey, image, status in _files(val):
        by_file[status.st_dev, status.st_ino] = image
        by_length[status.st_size].append((survey, image))
    for survey, image, status in _files(train):
        where = Where(image["id"], image["file_name"])
        if (same := by_file.get((status.st_dev, status.st_ino))) is not None:
            across.add("overlap-file", where, same["id"])
            continue
        for other_survey, other in by_length[status.st_size]:
            if survey.digest(image) and survey.digest(image) == other_survey.digest(other):
                across.add("overlap-content", where, other["id"], other["file_name"])
                break


def _files(surveys: Sequence[Survey]) -> Iterator[tuple[Survey, dict[str, Any], os.stat_result]]:
    for survey in surveys:
        for image in survey.images:
            try:
                yield survey, image, os.stat(survey.path(image))
            except (OSError, ValueError):
                continue


def class_table(surveys: Sequence[Survey]) -> ClassTable:
    """Return the rows, sorted by frequency in the first set."""
    rows: dict[str, tuple[list[int], list[int]]] = {}
    for position, dataset in enumerate(s.dataset for s in surveys):
        if dataset is None:
            continue
        pairs = np.unique(np.stack([dataset.object_images, dataset.object_classes]), axis=1)
        images = np.bincount(pairs[1], minlength=dataset.num_classes)
        for name, *counts in zip(dataset.class_names, dataset.class_counts.tolist(), images.tolist()):
            row = rows.setdefault(name, ([0] * len(surveys), [0] * len(surveys)))
            for column, number in zip(row, counts):
                column[position] += number
    return sorted(((n, *row) for n, row in rows.items()), key=lambda row: [-c for c in row[1]])


def facts(survey: Survey) -> str:
    """Describe a set in one line."""
    dataset = survey.dataset
    if dataset is None:
        return "could not be read"
    objects, crowds = len(dataset.object_images), dataset.crowds
    empty = int((dataset.object_counts == 0).sum())
    parts = [count(len(survey.images), "usable image") + (f" ({empty} without objects)" if empty else "")]
    parts += [f"{count(objects, 'object')} of {count(dataset.num_classes, 'class', 'classes')}"]
    if crowds:
        parts.append(f"{count(crowds, 'crowd region')} ({crowds / (objects + crowds):.1%})")
    return ", ".join(parts)


# ------------------------------------------------------------ as text


def as_text(report: Report) -> str:
    """Return the full report as text."""
    sections: list[list[str]] = []
    for survey in report.surveys:
        how = "every image decoded" if survey.decoded else "image headers read; --images decodes every image"
        title = [f"{survey.split}  {survey.source.json_file}", f"  {facts(survey)}; {how}"]
        sections.append([*title, *_finding_lines(survey.findings)])
    if report.across.counts:
        sections.append(["all datasets and the config", *_finding_lines(report.across)])
    if classes := class_table(report.surveys):
        sections.append([*_class_lines(classes, [s.split for s in report.surveys])])
    if report.sizes is not None:
        sections.append([*_size_lines(report.sizes)])
    if keys := as_overrides(report.proposals):
        sections.append(["  keys that fit these objects better than the config", *(f"    {key}" for key in keys)])
    sections.append([report.verdict()])
    return "\n\n".join("\n".join(as_line(line).rstrip() for line in section) for section in sections)


def _finding_lines(findings: Findings) -> Iterator[str]:
    heading = ""
    for name, kind, number in findings.kinds():
        if kind.severity != heading:
            heading = kind.severity
            yield f"  {heading.upper()}S"
        yield f"  {number:>8}  {kind.title}  [{name}]"
        quoted = findings.found[name][: _QUOTED[kind.severity]]
        yield from (f"            {finding}" for finding in quoted)
        if number > len(quoted):
            yield f"            ... and {number - len(quoted)} more"
        if kind.fix:
            yield f"            --fix: {kind.fix}"
    if not findings.counts:
        yield "  no problem found"


def _class_lines(classes: ClassTable, splits: Sequence[str]) -> Iterator[str]:
    most = max(max(objects) for _, objects, _ in classes)
    names = [one_line(name, _NAME) for name, _, _ in classes[:_CLASSES]]
    width = max(len(name) for name in names)
    yield f"  {'class':{width}}{''.join(f'{split:>10}' for split in splits)}   objects"
    for name, (_, objects, _) in zip(names, classes):
        yield f"  {name:{width}}{''.join(f'{n:>10}' for n in objects)}   {_bar(objects[0], most)}"
    if len(classes) > _CLASSES:
        yield f"  ... and {len(classes) - _CLASSES} classes more"


def _size_lines(sizes: SizeTable) -> Iterator[str]:
    yield f"  object size at training ({sizes.rule})"
    for label, number, low, high in zip(LABELS, sizes.counts, (0, *EDGES), (*EDGES, math.inf)):
        anchors = ", ".join(f"{a:g}" for a in sizes.anchors if low <= a < high)
        mark = f"  anchor {anchors}" if anchors else ""
        yield f"  {label:>9}{number:>9}  {_bar(number, max(sizes.counts)):{_BAR}}{mark}"
    yield (
        f"  {sizes.fit[0]:.0%} of the objects reach IoU 0.7 with their best anchor, {sizes.fit[1]:.0%} reach IoU 0.5; "
        f"objects below {VISIBLE:g} pixel per side at the smallest INPUT.MIN_SIZE_TRAIN are lost"
    )


def _bar(count: int, most: int) -> str:
    return "#" * max(round(_BAR * count / most), 1) if count else ""


# ------------------------------------------------------------ as JSON


def as_json(report: Report) -> dict[str, Any]:
    """Return the full report as plain values."""
    result: dict[str, Any] = {
        "gn_det": __version__,
        "config": report.config,
        "exit_code": report.exit_code,
        "verdict": report.verdict(),
        "totals": {s + "s": report.total(s) for s in ("error", "warning", "note")},
        "sets": [_set_as_json(s) for s in report.surveys],
        "together": _findings_as_json(report.across),
        "classes": [{"name": n, "objects": o, "images": i} for n, o, i in class_table(report.surveys)],
    }
    sizes = report.sizes
    if sizes is not None:
        result["sizes"] = {
            "rule": sizes.rule,
            "edges": EDGES,
            "counts": sizes.counts,
            "anchors": sizes.anchors,
            "fit_iou_0.7": sizes.fit[0],
            "fit_iou_0.5": sizes.fit[1],
            "below_half_of_smallest_anchor": sizes.small,
        }
    result["proposals"] = report.proposals
    if report.changes is not None:
        result |= {"changes": report.changes, "not_fixed": report.not_fixed}
    return result


def _set_as_json(survey: Survey) -> dict[str, Any]:
    found: dict[str, Any] = {
        "split": survey.split,
        "json": survey.source.json_file,
        "images_folder": survey.source.image_root,
        "decoded": survey.decoded,
        "problems": _findings_as_json(survey.findings),
    }
    dataset = survey.dataset
    if dataset is not None:
        found |= {
            "images": len(survey.images),
            "images_without_objects": int((dataset.object_counts == 0).sum()),
            "objects": len(dataset.object_images),
            "crowds": dataset.crowds,
            "objects_without_mask": dataset.without_mask,
            "classes": list(dataset.class_names),
            "category_ids": list(dataset.category_ids),
        }
    return found


def _findings_as_json(findings: Findings) -> list[dict[str, Any]]:
    return [
        {
            "kind": name,
            "severity": kind.severity,
            "title": kind.title,
            "count": number,
            "fix": kind.fix,
            "listed": [
                {
                    "image_id": f.where.image,
                    "file_name": f.where.file,
                    "annotation_id": f.where.annotation,
                    "text": f.text,
                }
                for f in findings.found[name]
            ],
        }
        for name, kind, number in findings.kinds()
    ]
