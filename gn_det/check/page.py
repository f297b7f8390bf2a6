"""The report of a check as one HTML page that needs nothing else: no script, no network, pictures inside."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from gn_det import __version__
from gn_det.check.audit import Survey
from gn_det.check.charts import class_chart, size_chart
from gn_det.check.findings import Findings
from gn_det.check.report import Report, class_table
from gn_det.check.samples import choose_samples, draw_problem, draw_sample
from gn_det.check.table import facts
from gn_det.visualize.html import as_data_uri, document, escape, figure

#: Places that are listed of each kind, and problems of a kind that are drawn.
_LISTED, _DRAWN = 50, 3
#: Findings of a kind that are tried until _DRAWN of them could be drawn.
_TRIED = 12
#: Classes in the chart.
_CLASSES = 2000

_STYLE = """
body{font:15px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif;color:#22262b;background:#f4f5f7;margin:0}
main{max-width:1080px;margin:0 auto;padding:24px}
h1{font-size:25px;margin:8px 0}h2{font-size:19px;margin:30px 0 8px}
section{background:#fff;border:1px solid #e1e4e8;border-radius:8px;padding:16px 20px;margin:14px 0}
.path{font-family:ui-monospace,monospace;font-size:13px;color:#555;word-break:break-all}
.verdict{padding:12px 18px;border-radius:8px;font-weight:600;color:#fff}
.v0{background:#2a8c3c}.v1{background:#a86a00}.v2{background:#c32232}
details{border-top:1px solid #eceef0;padding:8px 0}summary{cursor:pointer}
.tag{display:inline-block;min-width:62px;text-align:center;border-radius:4px;color:#fff;font-size:12px;
padding:1px 6px;margin-right:8px}
.error{background:#c32232}.warning{background:#a86a00}.note{background:#5a6675}
.count{font-weight:600}.fix{color:#2a6f3c;font-size:13px}.kind{color:#888;font-family:ui-monospace,monospace;font-size:12px}
ul{margin:8px 0;padding-left:22px;font-size:13.5px;word-break:break-word}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(300px,1fr));gap:14px;align-items:start}
figure{margin:0;max-width:480px}figure img{width:100%;border-radius:5px;display:block}
figcaption{font-size:12px;color:#555;word-break:break-all;padding-top:3px}
svg{width:100%;max-width:760px;font:12.5px system-ui,sans-serif;fill:#22262b}
.dim{fill:#6a737d}.anchor{fill:#b85a00;font-weight:600}
.key span{display:inline-block;width:11px;height:11px;border-radius:2px;margin:0 5px 0 14px}
footer{color:#777;font-size:12.5px;margin:24px 0}
"""


def as_html(report: Report) -> str:
    """The page; pictures are read and drawn on the way."""
    sets = ", ".join(s.split for s in report.surveys)
    parts = [
        f"<h1>gn-det check: {escape(sets)}</h1>",
        f'<div class="verdict v{report.exit_code}">{escape(report.verdict())}</div>',
    ]
    for survey in report.surveys:
        parts += _set_section(survey)
    if report.across.counts:
        parts += ["<h2>all sets and the config together</h2><section>", *_findings(report.across, None), "</section>"]
    parts += _histograms(report)
    for survey in report.surveys:
        parts += _samples(survey)
    if report.changes is not None:
        lines = _list(report.changes[:1000])
        parts.append(f"<h2>changes in the cleaned copy: {len(report.changes)}</h2><section>{lines}</section>")
    config = f", config {escape(report.config)}" if report.config else ""
    parts.append(f"<footer>gn_det {__version__}{config}</footer>")
    return document(f"gn-det check: {report.surveys[0].source.json_file}", _STYLE, parts)


def _list(lines: Sequence[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>" if lines else ""


def _set_section(survey: Survey) -> Iterator[str]:
    yield f"<h2>{escape(survey.split)}</h2><section>"
    yield f'<div class="path">{escape(survey.source.json_file)} · {escape(survey.source.image_root)}</div>'
    decoded = "every image was decoded" if survey.decoded else "image headers were read (--images decodes them)"
    yield f"<p>{escape(facts(survey))}; {decoded}.</p>"
    yield from _findings(survey.findings, survey)
    yield "</section>"


def _findings(findings: Findings, survey: Survey | None) -> Iterator[str]:
    if not findings.counts:
        yield "<p>No problem found.</p>"
    for severity in ("error", "warning", "note"):
        for name, kind, count in findings.of(severity):
            opened = " open" if severity == "error" else ""
            fix = f' <span class="fix">--fix: {escape(kind.fix)}</span>' if kind.fix else ""
            yield (
                f'<details{opened}><summary><span class="tag {severity}">{severity}</span>'
                f'<span class="count">{count}</span> {escape(kind.title)} <span class="kind">{name}</span>{fix}'
                "</summary>"
            )
            found = findings.found[name]
            lines = [str(f) for f in found[:_LISTED]]
            if count > len(lines):
                lines.append(f"... and {count - len(lines)} more (--json lists up to 1000 of a kind)")
            yield _list(lines)
            figures: list[str] = []
            for finding in found[:_TRIED] if survey is not None else ():
                drawn = draw_problem(survey, finding) if survey is not None and len(figures) < _DRAWN else None
                if drawn is not None:
                    figures.append(figure(as_data_uri(drawn), str(finding.where)))
            if figures:
                yield f'<div class="grid">{"".join(figures)}</div>'
            yield "</details>"


def _histograms(report: Report) -> Iterator[str]:
    readable = [s for s in report.surveys if s.dataset is not None]
    rows = class_table(readable)
    if rows:
        key = "".join(
            f'<span style="background:{color}"></span>{escape(s.split)}'
            for s, color in zip(readable, _key_colors(readable))
        )
        yield f'<h2>classes</h2><section><p class="key">share of the objects of each set, and how many: {key}</p>'
        yield class_chart(rows[:_CLASSES], [s.split for s in readable])
        more = len(rows) - _CLASSES
        yield f"<p>... and {more} classes more (--json lists all)</p></section>" if more > 0 else "</section>"
    if report.sizes is not None:
        sizes = report.sizes
        yield f"<h2>object sizes at training, against the anchors</h2><section><p>{escape(sizes.rule)}; ▲ anchors.</p>"
        yield size_chart(sizes)
        yield (
            f"<p>Centred on their best anchor, {sizes.fit[0]:.0%} of the objects reach IoU 0.7 and {sizes.fit[1]:.0%} "
            f"IoU 0.5.</p></section>"
        )


def _key_colors(surveys: Sequence[Survey]) -> list[str]:
    return [("#1f77dc", "#ff7f0e")[k % 2] for k in range(len(surveys))]


def _samples(survey: Survey) -> Iterator[str]:
    figures = []
    for index in choose_samples(survey):
        drawn = draw_sample(survey, index)
        if drawn is not None:
            image = survey.images[index]
            figures.append(figure(as_data_uri(drawn), f"image {image['id']}: {image['file_name']}"))
    if figures:
        yield f'<h2>samples of {escape(survey.split)}</h2><section><div class="grid">{"".join(figures)}</div></section>'
