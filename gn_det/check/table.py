"""The report of a check on the terminal."""

from __future__ import annotations

from collections.abc import Iterator

from gn_det.check.audit import VISIBLE, Survey
from gn_det.check.findings import Findings
from gn_det.check.report import Report, class_table
from gn_det.check.sizes import SizeTable
from gn_det.text import as_line, one_line

#: Places that are quoted for each kind, by severity; ``--json`` lists more.
_QUOTED = {"error": 3, "warning": 3, "note": 1}
#: Classes that are listed; ``--html`` and ``--json`` list all.
_CLASSES = 20
_BAR = 30
#: Characters of a class name.
_NAME = 60


def as_text(report: Report) -> str:
    """The whole report, for a person."""
    lines: list[str] = []
    for survey in report.surveys:
        lines += [*_set_lines(survey), *_finding_lines(survey.findings), ""]
    if report.across.counts:
        lines += ["all sets and the config together", *_finding_lines(report.across), ""]
    if any(s.dataset is not None for s in report.surveys):
        lines += [*_class_lines(report), ""]
    if report.sizes is not None:
        lines += [*_size_lines(report.sizes), ""]
    lines.append(report.verdict())
    return "\n".join(as_line(line).rstrip() for line in lines)


def facts(survey: Survey) -> str:
    """What a set holds, in a line."""
    dataset = survey.dataset
    if dataset is None:
        return "nothing of it could be read"
    objects, crowds = int(dataset.object_counts.sum()), dataset.crowds
    empty = int((dataset.object_counts == 0).sum())
    share = crowds / max(objects + crowds, 1)
    return (
        f"{len(survey.images)} usable images ({empty} without objects), {objects} objects of {dataset.num_classes} "
        f"classes, {crowds} crowd regions ({share:.1%})"
    )


def _set_lines(survey: Survey) -> list[str]:
    how = "every image decoded" if survey.decoded else "image headers read; --images decodes every image"
    return [f"{survey.split}  {survey.source.json_file}", f"  {facts(survey)}; {how}"]


def _finding_lines(findings: Findings) -> Iterator[str]:
    for severity in ("error", "warning", "note"):
        kinds = findings.of(severity)
        if not kinds:
            continue
        yield f"  {severity.upper()}S" if severity != "note" else "  NOTES"
        for name, kind, count in kinds:
            yield f"  {count:>8}  {kind.title}  [{name}]"
            quoted = findings.found[name][: _QUOTED[severity]]
            yield from (f"            {finding}" for finding in quoted)
            if count > len(quoted):
                yield f"            ... and {count - len(quoted)} more"
            if kind.fix:
                yield f"            --fix: {kind.fix}"
    if not findings.counts:
        yield "  no problem found"


def _class_lines(report: Report) -> Iterator[str]:
    rows = [(one_line(name, _NAME), objects, images) for name, objects, images in class_table(report.surveys)]
    most = max((max(objects) for _, objects, _ in rows), default=0)
    width = max((len(name) for name, _, _ in rows[:_CLASSES]), default=5)
    heads = "".join(f"{s.split:>10}" for s in report.surveys)
    yield f"  {'class':{width}}{heads}   objects"
    for name, objects, _ in rows[:_CLASSES]:
        numbers = "".join(f"{n:>10}" for n in objects)
        yield f"  {name:{width}}{numbers}   {_bar(objects[0], most)}"
    if len(rows) > _CLASSES:
        yield f"  ... and {len(rows) - _CLASSES} classes more"


def _size_lines(sizes: SizeTable) -> Iterator[str]:
    yield f"  object size at training ({sizes.rule})"
    most = max(sizes.counts)
    low = (0, *sizes.edges)
    for i, (label, count) in enumerate(zip(sizes.labels(), sizes.counts)):
        high = sizes.edges[i] if i < len(sizes.edges) else float("inf")
        anchors = [f"{a:g}" for a in sizes.anchors if low[i] <= a < high]
        mark = f"  anchor {', '.join(anchors)}" if anchors else ""
        yield f"  {label:>9}{count:>9}  {_bar(count, most):{_BAR}}{mark}"
    yield (
        f"  centred on their best anchor, {sizes.fit[0]:.0%} of the objects reach IoU 0.7 and {sizes.fit[1]:.0%} "
        f"IoU 0.5; an object vanishes below {VISIBLE:g} pixel a side at the smallest INPUT.MIN_SIZE_TRAIN"
    )


def _bar(count: int, most: int) -> str:
    return "#" * max(round(_BAR * count / most), 1) if count else ""
