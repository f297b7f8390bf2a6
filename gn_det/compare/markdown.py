"""The report as Markdown: tables, findings, and where every number comes from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from gn_det.compare.findings import many_told
from gn_det.compare.results import Results
from gn_det.compare.tables import RUN_HEAD, Cell, View, full_view, run_rows, views
from gn_det.text import one_line


def as_markdown(results: Results, findings: Mapping[str, Sequence[str]], date: str) -> str:
    """The page; ends with a newline."""
    suite = results.plan.suite
    name = one_line(suite.name).replace("`", "'")
    parts = [f"# {_inline(suite.title)}", f"{date}; suite `{name}`."]
    parts += [_inline(suite.note)] if suite.note else []
    lines = [f"- {_inline(sentence)}" for sentences in findings.values() for sentence in [" ".join(sentences)]]
    if lines:
        parts += ["## Findings", "\n".join(lines)]
        parts += [many_told(len(lines))] if len(lines) > 8 else []
    for table in suite.tables:
        for shown in views(results, table):
            parts += _table(shown)
    for table in suite.tables:
        full = full_view(results, table)
        parts += _table(full) if full is not None else []
    parts += ["## Runs", _runs(results)]
    return "\n\n".join(parts) + "\n"


def _table(shown: View) -> list[str]:
    rule = [":--" if kind == "label" else "--:" for kind, _ in shown.head]
    rows = [[_inline(text) for _, text in shown.head], rule, *([_cell(c) for c in row] for row in shown.body)]
    text = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    notes = list(shown.notes)
    if shown.reference:
        notes.append(f"Reference columns were not measured here: {shown.reference}.")
    return [f"## {_inline(shown.title)}", text] + (["\n".join(f"- {_inline(note)}" for note in notes)] if notes else [])


def _cell(cell: Cell) -> str:
    return f"**{_inline(cell.text)}**" if cell.strong else _inline(cell.text)


def _runs(results: Results) -> str:
    rule = [":--"] * (len(RUN_HEAD) - 1) + ["--:"]
    rows = [RUN_HEAD, rule, *([_inline(word) for word in words] for words in run_rows(results))]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    remarks = [f"- {_inline(r.row.title)}: {_inline(remark)}" for r in results.rows for remark in r.remarks]
    return "\n".join(lines) + ("\n\n" + "\n".join(remarks) if remarks else "")


def _inline(text: str) -> str:
    """One line, with what Markdown would take for its own escaped."""
    text = one_line(text, None)
    for sign in ("\\", "|", "*", "_", "<", ">", "[", "]", "`"):
        text = text.replace(sign, f"\\{sign}")
    return text
