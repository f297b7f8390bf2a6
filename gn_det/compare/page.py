"""The report as one HTML page that needs nothing else: no script, no network; drawings and pictures are inside."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence

import gn_det
from gn_det.compare.curves import charts_of
from gn_det.compare.findings import many_told
from gn_det.compare.html_parts import document, escape, figure, jpeg_uri
from gn_det.compare.results import Results, RowResult
from gn_det.compare.tables import REFERENCE, RUN_HEAD, Cell, View, full_view, run_rows, views

_STYLE = """
:root{--ink:#1d2430;--soft:#5c6675;--line:#e2e6ec;--ground:#f5f6f8;--card:#fff;--refer:#f6f1e4;--refer-ink:#5f4a16;
--good:#176b3a;--bad:#b3261e;--mark:#eef4ff;color-scheme:light dark}
@media (prefers-color-scheme:dark){:root{--ink:#e6e9ef;--soft:#9aa4b3;--line:#323a46;--ground:#12151a;--card:#1a1f27;
--refer:#2a2518;--refer-ink:#dcc58a;--good:#5fd08f;--bad:#ff8a80;--mark:#1c2a44}}
*{box-sizing:border-box}
body{font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue","DejaVu Sans",sans-serif;
color:var(--ink);background:var(--ground);margin:0}
main{max-width:1240px;margin:0 auto;padding:32px 24px 60px}
h1{font-size:30px;line-height:1.2;margin:0 0 6px;letter-spacing:-.01em}
h2{font-size:21px;margin:44px 0 12px;letter-spacing:-.005em}
h3{font-size:15px;margin:0 0 8px;color:var(--soft);font-weight:600}
.under{color:var(--soft);margin:0 0 18px}.lead{max-width:78ch;margin:14px 0}
section{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:18px 22px;margin:14px 0}
.state{display:flex;flex-wrap:wrap;gap:8px 26px;padding:12px 22px}.state b{font-size:20px;margin-right:6px}
.findings{padding:6px 22px}.findings p{margin:0;padding:12px 0;border-top:1px solid var(--line);max-width:92ch}
.findings p:first-child{border-top:0}.against{color:var(--bad);font-weight:600}
.wide{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:14px;font-variant-numeric:tabular-nums}
th{font-weight:600;text-align:right;vertical-align:bottom;padding:6px 9px;border-bottom:2px solid var(--line);
color:var(--soft);font-size:13px;line-height:1.3}
td{text-align:right;padding:7px 9px;border-bottom:1px solid var(--line);white-space:nowrap}
tr:last-child td{border-bottom:0}th.label,td.label{text-align:left;color:var(--ink)}
th.reference,td.reference{background:var(--refer);color:var(--refer-ink)}
th.group{text-align:center;border-bottom:1px solid var(--line);font-size:12px;letter-spacing:.03em}
td.difference{color:var(--soft)}td.strong{font-weight:700;color:var(--ink);background:var(--mark)}td.faint{color:var(--soft)}
.notes{font-size:13.5px;color:var(--soft);margin:12px 0 0;padding-left:18px}.notes li{margin:3px 0}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,500px),1fr));gap:18px 30px}
@media (max-width:560px){.charts{grid-template-columns:1fr}main{padding:20px 12px}section{padding:14px}}
.chart svg{width:100%;height:auto;display:block;font-size:12.5px}.chart text{fill:var(--soft)}
.chart .name{fill:var(--ink)}
.rule{stroke:var(--line)}.axis{stroke:var(--soft)}.line{fill:none;stroke-width:2.2;stroke-linejoin:round}
.faint{fill:none}polyline.faint{stroke-width:1;opacity:.32}.bar{stroke-width:1.4;opacity:.6}
.legend{display:flex;flex-wrap:wrap;gap:3px 16px;font-size:13px;margin:6px 0 0 44px}
.legend span{display:inline-flex;align-items:center;gap:6px}
.chart .key{width:22px;height:8px;stroke-width:2.6;flex:none}
.pictures{display:grid;grid-template-columns:120px repeat(var(--n),minmax(120px,1fr));gap:10px;align-items:center}
.pictures .who{font-weight:600;font-size:14px}figure{margin:0}figure img{width:100%;border-radius:6px;display:block}
figcaption{display:none}
details{border-top:1px solid var(--line);padding:9px 0}details:first-of-type{border-top:0}
summary{cursor:pointer;font-weight:600}
pre{font:12.5px/1.5 ui-monospace,SFMono-Regular,Menlo,"DejaVu Sans Mono",monospace;overflow-x:auto;margin:8px 0;
padding:12px;background:var(--ground);border-radius:6px}code{font:13px ui-monospace,Menlo,"DejaVu Sans Mono",monospace}
footer{color:var(--soft);font-size:13px;margin-top:40px}
"""

#: Findings, or rows of a minor table, beyond which they are folded.
_MANY = 8

Samples = Sequence[tuple[str, Sequence[bytes]]]


def as_html(results: Results, findings: Mapping[str, Sequence[str]], samples: Samples, date: str) -> str:
    """The page.

    Args:
        results: of the whole suite.
        findings: row id -> sentences.
        samples: (title, JPEG files) of the truth and of the rows that are shown, on the same images.
        date: of the report.
    """
    suite = results.plan.suite
    body = [f"<h1>{escape(suite.title)}</h1>", f'<p class="under">{escape(date)} · suite {escape(suite.name)}</p>']
    body += [f'<p class="lead">{escape(" ".join(suite.note.split()))}</p>'] if suite.note else []
    body += [_state(results), *_findings(findings)]
    for table in suite.tables:
        for shown in views(results, table):
            body += _table(shown)
        charts = charts_of(results, table)
        if charts:
            drawn = "".join(f"<div><h3>{escape(title)}</h3>{html}</div>" for title, html in charts)
            body.append(f'<section class="charts">{drawn}</section>')
    body += _samples(samples)
    for table in suite.tables:
        full = full_view(results, table)
        body += _table(full) if full is not None else []
    body += [*_configs(results), *_runs(results), f"<footer>gn_det {gn_det.__version__}, {escape(date)}</footer>"]
    return document(suite.title, _STYLE, body)


def _state(results: Results) -> str:
    states = [r.status for r in results.rows]
    parts = {"rows done": states.count("done"), "failed": states.count("failed"), "left out": states.count("left out")}
    parts["not finished"] = len(states) - sum(parts.values())
    shown = {name: n for name, n in parts.items() if n or name == "rows done"}
    seeds = sorted({len(r.wanted) for r in results.rows if r.wanted})
    words = [f"<span><b>{n}</b>{name}</span>" for name, n in shown.items()]
    if seeds:
        words.append(f"<span><b>{' or '.join(map(str, seeds))}</b>seed{'s' if seeds != [1] else ''} a row</span>")
    return f'<section class="state">{"".join(words)}</section>'


def _findings(findings: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """One paragraph a row; of many, those within the noise are folded away."""
    if not findings:
        return
    quiet = [f for f in findings.values() if len(findings) > _MANY and not _speaks(f)]
    yield '<h2>Findings</h2><section class="findings">'
    yield from (_paragraph(f) for f in findings.values() if f not in quiet)
    if quiet:
        yield f"<details><summary>{len(quiet)} more that are not larger than the noise, or of one seed</summary>"
        yield from (_paragraph(f) for f in quiet)
        yield "</details>"
    if len(findings) > _MANY:
        yield f'<p class="under">{many_told(len(findings))}</p>'
    yield "</section>"


def _speaks(sentences: Sequence[str]) -> bool:
    return ": larger than the noise" in sentences[0] or _contradicts(sentences[-1])


def _contradicts(sentence: str) -> bool:
    return "this result contradicts" in sentence


def _paragraph(sentences: Sequence[str]) -> str:
    marked = [f'<span class="against">{escape(s)}</span>' if _contradicts(s) else escape(s) for s in sentences]
    return f"<p>{' '.join(marked)}</p>"


def _table(shown: View) -> Iterator[str]:
    if shown.minor and len(shown.body) > _MANY:
        yield f"<section><details><summary>{escape(shown.title)}</summary>"
        yield from _cells(shown)
        yield "</details></section>"
        return
    yield f"<h2>{escape(shown.title)}</h2><section>"
    yield from _cells(shown)
    yield "</section>"


def _cells(shown: View) -> Iterator[str]:
    yield '<div class="wide"><table>'
    published = sum(kind == REFERENCE for kind, _ in shown.head)
    if published:
        measured = len(shown.head) - published
        yield (
            f'<tr><th class="group" colspan="{measured}">measured here</th>'
            f'<th class="group reference" colspan="{published}">reference, not measured here</th></tr>'
        )
    yield "<tr>" + "".join(f'<th class="{kind}">{escape(text)}</th>' for kind, text in shown.head) + "</tr>"
    for row in shown.body:
        cells = (
            f'<td class="{_classes(kind, cell)}">{escape(cell.text)}</td>' for (kind, _), cell in zip(shown.head, row)
        )
        yield f"<tr>{''.join(cells)}</tr>"
    yield "</table></div>"
    notes = list(shown.notes)
    if shown.reference:
        notes.append(f"Reference: {shown.reference}. Where data, model or schedule differ, compare directions.")
    if notes:
        yield '<ul class="notes">' + "".join(f"<li>{escape(note)}</li>" for note in notes) + "</ul>"


def _classes(kind: str, cell: Cell) -> str:
    return " ".join([kind, *(["strong"] if cell.strong else []), *(["faint"] if cell.faint else [])])


def _samples(samples: Samples) -> Iterator[str]:
    if not samples:
        return
    count = max(len(pictures) for _, pictures in samples)
    yield f'<h2>On the same validation images</h2><section><div class="pictures" style="--n:{count}">'
    for title, pictures in samples:
        yield f'<div class="who">{escape(title)}</div>'
        yield "".join(figure(jpeg_uri(data), f"{title}, image {n + 1}") for n, data in enumerate(pictures))
    yield "</div></section>"


def _configs(results: Results) -> Iterator[str]:
    """The resolved config of each row, and in how it differs from its baseline's."""
    done = [r for r in results.rows if r.done and r.done[0].config]
    if not done:
        return
    yield "<h2>Resolved settings</h2><section>"
    for result in done:
        text = result.done[0].config
        yield f"<details><summary>{escape(result.row.title)} <code>{escape(result.row.id)}</code></summary>"
        changed = _changed(results, result)
        if changed:
            yield f"<p>Differs from {escape(results.row(str(result.row.baseline)).row.title)} in:</p>{_pre(changed)}"
        yield f"{_pre(text)}</details>"
    yield "</section>"


def _pre(text: str) -> str:
    return "<pre>" + "\n".join(escape(line) for line in text.splitlines()) + "</pre>"


#: Lines that differ in every run and say nothing.
_OWN = ("OUTPUT_DIR:", '"output":', "SEED:", "WEIGHTS:")


def _changed(results: Results, result: RowResult) -> str:
    base = results.row(result.row.baseline) if result.row.baseline else None
    if base is None or not base.done or not base.done[0].config:
        return ""
    before, after = base.done[0].config.splitlines(), result.done[0].config.splitlines()
    lines = [x for x in difflib.unified_diff(before, after, lineterm="", n=0) if x[:2] not in ("--", "++", "gn_det.")]
    return "\n".join(line for line in lines if not line[1:].strip().startswith(_OWN))


def _runs(results: Results) -> Iterator[str]:
    """Where every number comes from."""
    head = "".join(f'<th class="label">{name}</th>' for name in RUN_HEAD)
    yield f'<h2>Runs</h2><section><div class="wide"><table><tr>{head}</tr>'
    for words in run_rows(results):
        yield "<tr>" + "".join(f'<td class="label">{escape(word)}</td>' for word in words) + "</tr>"
    yield "</table></div>"
    remarks = [f"{r.row.title}: {remark}" for r in results.rows for remark in r.remarks]
    if remarks:
        yield '<ul class="notes">' + "".join(f"<li>{escape(remark)}</li>" for remark in remarks) + "</ul>"
    yield "</section>"
