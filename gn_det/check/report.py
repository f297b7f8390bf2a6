"""Report of a check over all sets, as text and as JSON."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gn_det.about import __version__
from gn_det.check.audit import VISIBLE, Findings, Survey, Training
from gn_det.check.decode import digest_of
from gn_det.check.proposals import as_overrides, propose
from gn_det.check.sizes import SizeTable, size_table
from gn_det.data.coco import check_masks, check_num_classes, check_objects, check_same_classes
from gn_det.data.problems import KINDS, NOWHERE, Where
from gn_det.data.sets import model_category_ids
from gn_det.errors import DataError
from gn_det.text import as_line, count, one_line, shown

#: Exit codes of ``gn-det check``.
CLEAN, WARNINGS, ERRORS = 0, 1, 2
#: Places to quote for each kind, by severity; ``--json`` lists more.
_QUOTED = {"error": 3, "warning": 3, "note": 1}
#: Classes to list, width of their names and of the longest bar; ``--html`` and ``--json`` list all classes.
_CLASSES, _NAME, _BAR = 20, 60, 30


@dataclass
class Report:
    """All sets of one check."""

    surveys: list[Survey]  # training sets first
    across: Findings  # problems between sets, or between sets and config
    training: Training  # the config values used
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
        if self.total("error"):
            return ERRORS
        return WARNINGS if self.total("warning") else CLEAN

    def verdict(self) -> str:
        """Return the result in one line."""
        parts = [count(n, word) for word in ("error", "warning", "note") if (n := self.total(word))]
        meaning = {
            CLEAN: "clean",
            WARNINGS: "training would use this dataset; see the warnings",
            ERRORS: "training would refuse this dataset or drop entries",
        }
        found = ", ".join(parts) or "no problem found"
        return f"{found}: {meaning[self.exit_code]} (exit code {self.exit_code})"


def look_across(surveys: Sequence[Survey], training: Training, cfg: Any, config: str) -> Report:
    """Compare the sets with each other and with the config, using training's functions."""
    report = Report(list(surveys), Findings("all sets"), training, config)
    train, val = ([s for s in surveys if s.split == split] for split in ("train", "val"))
    _compare_with_training(report, train, val, cfg)
    _find_overlap(report.across, train, val)
    datasets = [s.dataset for s in train if s.dataset is not None]
    if datasets:
        report.sizes = size_table(datasets, training, cfg)
        report.proposals = propose(datasets, training, cfg)
        if report.sizes.many_small:
            report.across.add("small-for-anchors", NOWHERE, report.sizes.small, min(report.sizes.anchors))
    return report


def _compare_with_training(report: Report, train: list[Survey], val: list[Survey], cfg: Any) -> None:
    add = report.across.add

    @contextmanager
    def reported(kind: str) -> Iterator[None]:
        try:
            yield
        except DataError as error:
            add(kind, NOWHERE, str(error))

    datasets = [s.dataset for s in train if s.dataset is not None]
    if not datasets:
        return
    with reported("classes-differ"):
        check_same_classes(datasets)
    with reported("no-objects"):
        check_objects(datasets)
    for dataset in datasets:
        with reported("num-classes"):
            check_num_classes(int(cfg.MODEL.ROI_HEADS.NUM_CLASSES), dataset)
        if cfg.MODEL.MASK_ON and len(dataset.object_images):
            with reported("no-masks"):
                check_masks(dataset, max_bad=2**62)
    names, ids = datasets[0].class_names, datasets[0].category_ids
    for other in (s.dataset for s in val if s.dataset is not None):
        with reported("classes-differ"):
            own = model_category_ids(other, names)
            if any(o != i for name, o, i in zip(names, own, ids) if name in other.class_names):
                add("class-ids-differ", NOWHERE, other.json_file)
            for name in (n for n in names if n not in other.class_names):
                add("classes-lacking", NOWHERE, other.json_file, shown(name))


def _find_overlap(across: Findings, train: Sequence[Survey], val: Sequence[Survey]) -> None:
    """Compare files, then contents; images that were not decoded are read only if their lengths are equal."""
    if not train or not val:
        return
    by_file: dict[tuple[int, int], dict[str, Any]] = {}
    by_length: dict[int, list[tuple[Survey, dict[str, Any]]]] = {}
    for survey, image, status in _files(val):
        by_file[status.st_dev, status.st_ino] = image
        by_length.setdefault(status.st_size, []).append((survey, image))

    def digest(survey: Survey, image: dict[str, Any]) -> bytes:
        number = image["id"]
        survey.digests[number] = survey.digests.get(number) or digest_of(survey.path(image))
        return survey.digests[number]

    for survey, image, status in _files(train):
        where = Where(image["id"], image["file_name"])
        if (status.st_dev, status.st_ino) in by_file:
            across.add("overlap-file", where, by_file[status.st_dev, status.st_ino]["id"])
            continue
        for other_survey, other in by_length.get(status.st_size, ()):
            if digest(survey, image) and digest(survey, image) == digest(other_survey, other):
                across.add("overlap-content", where, other["id"], other["file_name"])
                break


def _files(surveys: Sequence[Survey]) -> Iterator[tuple[Survey, dict[str, Any], os.stat_result]]:
    for survey in surveys:
        for image in survey.images:
            try:
                yield survey, image, os.stat(survey.path(image))
            except (OSError, ValueError):
                continue


def class_table(surveys: Sequence[Survey]) -> list[tuple[str, list[int], list[int]]]:
    """Return (class name, objects per set, images per set), sorted by frequency in the first set."""
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
        parts.append(f"{count(crowds, 'crowd region')} ({crowds / max(objects + crowds, 1):.1%})")
    return ", ".join(parts)


# ------------------------------------------------------------ as text


def as_text(report: Report) -> str:
    """Return the full report as text."""
    lines: list[str] = []
    for survey in report.surveys:
        how = "every image decoded" if survey.decoded else "image headers read; --images decodes every image"
        lines += [f"{survey.split}  {survey.source.json_file}", f"  {facts(survey)}; {how}"]
        lines += [*_finding_lines(survey.findings), ""]
    if report.across.counts:
        lines += ["all datasets and the config", *_finding_lines(report.across), ""]
    if any(s.dataset is not None for s in report.surveys):
        lines += [*_class_lines(report), ""]
    if report.sizes is not None:
        lines += [*_size_lines(report.sizes), ""]
    if report.proposals:
        lines += [
            "  keys that fit these objects better than the config",
            *(f"    {k}" for k in as_overrides(report.proposals)),
            "",
        ]
    lines.append(report.verdict())
    return "\n".join(as_line(line).rstrip() for line in lines)


def _finding_lines(findings: Findings) -> Iterator[str]:
    for severity in ("error", "warning", "note"):
        kinds = findings.of(severity)
        if kinds:
            yield f"  {severity.upper()}S"
        for name, kind, number in kinds:
            yield f"  {number:>8}  {kind.title}  [{name}]"
            quoted = findings.found[name][: _QUOTED[severity]]
            yield from (f"            {finding}" for finding in quoted)
            if number > len(quoted):
                yield f"            ... and {number - len(quoted)} more"
            if kind.fix:
                yield f"            --fix: {kind.fix}"
    if not findings.counts:
        yield "  no problem found"


def _class_lines(report: Report) -> Iterator[str]:
    rows = [(one_line(name, _NAME), objects) for name, objects, _ in class_table(report.surveys)]
    most = max((max(objects) for _, objects in rows), default=0)
    width = max((len(name) for name, _ in rows[:_CLASSES]), default=5)
    yield f"  {'class':{width}}{''.join(f'{s.split:>10}' for s in report.surveys)}   objects"
    for name, objects in rows[:_CLASSES]:
        yield f"  {name:{width}}{''.join(f'{n:>10}' for n in objects)}   {_bar(objects[0], most)}"
    if len(rows) > _CLASSES:
        yield f"  ... and {len(rows) - _CLASSES} classes more"


def _size_lines(sizes: SizeTable) -> Iterator[str]:
    yield f"  object size at training ({sizes.rule})"
    for i, (label, number) in enumerate(zip(sizes.labels(), sizes.counts)):
        low, high = (0, *sizes.edges)[i], (*sizes.edges, float("inf"))[i]
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
            "edges": list(sizes.edges),
            "counts": list(sizes.counts),
            "anchors": list(sizes.anchors),
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
            "severity": KINDS[name].severity,
            "title": KINDS[name].title,
            "count": findings.counts[name],
            "fix": KINDS[name].fix,
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
        for name in KINDS
        if findings.counts[name]
    ]
