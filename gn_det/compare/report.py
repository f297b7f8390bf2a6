"""Write the report of a comparison: results.json, report.md, report.html."""

from __future__ import annotations

from gn_det.compare.findings import findings
from gn_det.compare.markdown import as_markdown
from gn_det.compare.page import as_html
from gn_det.compare.results import Results, as_json
from gn_det.compare.samples import draw_samples
from gn_det.compare.store import Store, write_json
from gn_det.files import atomic_write
from gn_det.terminal import say


def write_report(results: Results, store: Store, date: str) -> None:
    """All three files into the folder of the store, each atomically.

    Args:
        results: of the whole suite.
        store: where its runs lie.
        date: of today, as text.

    Raises:
        WriteError: the folder cannot be written.
    """
    sentences = findings(results)
    write_json(store.root / "results.json", as_json(results, sentences, date))
    atomic_write(store.root / "report.md", as_markdown(results, sentences, date))
    html = as_html(results, sentences, draw_samples(results, store), date)
    atomic_write(store.root / "report.html", html)
    say(f"Report: {store.root / 'report.html'}, report.md, results.json")
