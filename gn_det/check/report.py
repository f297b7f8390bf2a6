"""What a check found, across all sets; how bad it is; and the same for machines."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gn_det import __version__
from gn_det.check.audit import Survey, Training
from gn_det.check.decode import digest_of
from gn_det.check.findings import Finding, Findings
from gn_det.check.sizes import SizeTable, size_table
from gn_det.data.coco import check_num_classes, check_same_classes
from gn_det.data.problems import KINDS, Where
from gn_det.data.trainable import check_masks, check_objects
from gn_det.errors import DataError
from gn_det.text import shown

#: Exit codes of ``gn-det check``.
CLEAN, WARNINGS, ERRORS = 0, 1, 2


@dataclass
class Report:
    """All sets of one check.

    Attributes:
        surveys: training sets first.
        across: what no single set has wrong, but all of them together (with the config).
        training: what was taken from the config.
        config: its name.
        sizes: object sizes of the training sets, None where none could be read.
        changes: lines of what ``--fix`` changed, None without it.
    """

    surveys: list[Survey]
    across: Findings
    training: Training
    config: str = ""
    sizes: SizeTable | None = None
    changes: list[str] | None = None
    not_fixed: list[str] = field(default_factory=list)

    def all_findings(self) -> list[tuple[str, Findings]]:
        """(heading, findings) of every set, and of all together."""
        return [(s.split, s.findings) for s in self.surveys] + [("together", self.across)]

    def total(self, severity: str) -> int:
        return sum(f.total(severity) for _, f in self.all_findings())

    @property
    def exit_code(self) -> int:
        if self.total("error"):
            return ERRORS
        return WARNINGS if self.total("warning") else CLEAN

    def verdict(self) -> str:
        """The result in one line."""
        parts = [
            f"{n} {word}{'' if n == 1 else 's'}" for word in ("error", "warning", "note") if (n := self.total(word))
        ]
        found = ", ".join(parts) or "no problem found"
        meaning = {
            CLEAN: "clean",
            WARNINGS: "training takes this set as it is; look at the warnings",
            ERRORS: "training refuses the set or drops entries of it",
        }
        return f"{found}: {meaning[self.exit_code]} (exit code {self.exit_code})"


def look_across(surveys: Sequence[Survey], training: Training, cfg: Any, config: str) -> Report:
    """Compare the sets with each other and with the config, by the functions that training calls."""
    report = Report(list(surveys), Findings("all sets"), training, config)
    train, val = ([s for s in surveys if s.split == split] for split in ("train", "val"))
    readable = [s for s in train if s.dataset is not None]
    _compare_with_training(report, readable, [s for s in val if s.dataset is not None], cfg)
    _find_overlap(report, train, val)
    if readable:
        report.sizes = size_table(readable, training, cfg)
        if report.sizes.many_small:
            text = (
                f"{report.sizes.small:.0%} of the objects are smaller than half the smallest anchor "
                f"({min(report.sizes.anchors):g} pixels): raise INPUT.MIN_SIZE_TRAIN, or add smaller anchors "
                f"(MODEL.ANCHOR_GENERATOR.SIZES)"
            )
            report.across.add("small-for-anchors", text)
    return report


def _compare_with_training(report: Report, train: list[Survey], val: list[Survey], cfg: Any) -> None:
    from gn_det.data.sets import model_category_ids

    datasets = [s.dataset for s in train if s.dataset is not None]
    if not datasets:
        return
    add = report.across.add
    try:
        check_same_classes(datasets)
    except DataError as error:
        add("classes-differ", str(error))
    try:
        check_objects(datasets)
    except DataError as error:
        add("no-objects", str(error))
    for dataset in datasets:
        try:
            check_num_classes(int(cfg.MODEL.ROI_HEADS.NUM_CLASSES), dataset)
        except DataError as error:
            add("num-classes", str(error))
        try:
            if cfg.MODEL.MASK_ON and dataset.object_counts.any():
                check_masks(dataset, max_bad=2**62)
        except DataError as error:
            add("no-masks", str(error))
    names, ids = datasets[0].class_names, datasets[0].category_ids
    for other in (s.dataset for s in val if s.dataset is not None):
        try:
            own = dict(zip(names, model_category_ids(other, names)))
            both = dict(zip(names, ids)).items()
            if any(own[name] != number for name, number in both if name in other.class_names):
                add("class-ids-differ", f"{other.json_file}: gn_det goes by the names; other tools go by the ids")
            for name in (n for n in names if n not in other.class_names):
                add("classes-lacking", f"{other.json_file} has no category {shown(name)}")
        except DataError as error:
            add("classes-differ", str(error))


def _find_overlap(report: Report, train: Sequence[Survey], val: Sequence[Survey]) -> None:
    """Files, then contents. Only pictures of equal length in bytes are read, unless they were decoded anyway."""
    if not train or not val:
        return
    by_file: dict[tuple[int, int], tuple[Survey, dict[str, Any]]] = {}
    by_length: dict[int, list[tuple[Survey, dict[str, Any]]]] = {}
    for survey, image, status in _files(val):
        by_file[(status.st_dev, status.st_ino)] = (survey, image)
        by_length.setdefault(status.st_size, []).append((survey, image))
    digests: dict[tuple[int, Any], bytes] = {}

    def digest(survey: Survey, image: dict[str, Any]) -> bytes:
        key = (id(survey), image["id"])
        if key not in digests:
            digests[key] = survey.digests.get(image["id"]) or digest_of(survey.path(image))
        return digests[key]

    advice = "AP on it would be too good; remove it from one of the two"
    for survey, image, status in _files(train):
        where = Where(image["id"], image["file_name"])
        same = by_file.get((status.st_dev, status.st_ino))
        if same is not None:
            report.across.add("overlap-file", f"image {same[1]['id']} of val is the same file: {advice}", where)
            continue
        for other in by_length.get(status.st_size, ()):
            if digest(survey, image) and digest(survey, image) == digest(*other):
                text = f"the same picture as image {other[1]['id']} ({other[1]['file_name']}) of val: {advice}"
                report.across.add("overlap-content", text, where)
                break


def _files(surveys: Iterable[Survey]) -> Iterable[tuple[Survey, dict[str, Any], os.stat_result]]:
    for survey in surveys:
        for image in survey.images:
            try:
                yield survey, image, os.stat(survey.path(image))
            except (OSError, ValueError):
                continue


def class_table(surveys: Sequence[Survey]) -> list[tuple[str, list[int], list[int]]]:
    """(class name, objects in each set, images in each set), most frequent in the first set first."""
    objects: dict[str, list[int]] = {}
    images: dict[str, list[int]] = {}
    for position, survey in enumerate(surveys):
        dataset = survey.dataset
        if dataset is None:
            continue
        classes = np.array(survey.objects.classes, dtype=np.int64)
        pairs = np.unique(np.array(survey.objects.images, dtype=np.int64) * max(dataset.num_classes, 1) + classes)
        in_images = np.bincount(pairs % max(dataset.num_classes, 1), minlength=dataset.num_classes)
        for index, name in enumerate(dataset.class_names):
            objects.setdefault(name, [0] * len(surveys))[position] += int(dataset.class_counts[index])
            images.setdefault(name, [0] * len(surveys))[position] += int(in_images[index])
    return sorted(((n, objects[n], images[n]) for n in objects), key=lambda row: [-c for c in row[1]])


def as_json(report: Report) -> dict[str, Any]:
    """The whole report as plain values."""
    classes = class_table(report.surveys)
    result: dict[str, Any] = {
        "gn_det": __version__,
        "config": report.config,
        "exit_code": report.exit_code,
        "verdict": report.verdict(),
        "totals": {s + "s": report.total(s) for s in ("error", "warning", "note")},
        "sets": [_set_as_json(s) for s in report.surveys],
        "together": _findings_as_json(report.across),
        "classes": [{"name": n, "objects": o, "images": i} for n, o, i in classes],
    }
    if report.sizes is not None:
        sizes = report.sizes
        result["sizes"] = {
            "rule": sizes.rule,
            "edges": list(sizes.edges),
            "counts": list(sizes.counts),
            "anchors": list(sizes.anchors),
            "fit_iou_0.7": sizes.fit[0],
            "fit_iou_0.5": sizes.fit[1],
            "below_half_of_smallest_anchor": sizes.small,
        }
    if report.changes is not None:
        result["changes"] = report.changes
        result["not_fixed"] = report.not_fixed
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
            "objects": int(dataset.object_counts.sum()),
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
            "listed": [_finding_as_json(f) for f in findings.found[name]],
        }
        for name in KINDS
        if findings.counts[name]
    ]


def _finding_as_json(finding: Finding) -> dict[str, Any]:
    where = finding.where
    return {"image_id": where.image, "file_name": where.file, "annotation_id": where.annotation, "text": finding.text}
