"""The page needs nothing but itself, shows text as text, and leaves out what cannot be compared."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from gn_det.compare.charts import number, ticks
from gn_det.compare.curves import _seconds, _smooth, mean_curve
from gn_det.compare.findings import findings, signed
from gn_det.compare.measure import detection_metrics
from gn_det.compare.page import as_html
from gn_det.compare.report import write_report
from gn_det.compare.results import Results, as_json, collect, common_place, place_of_run
from gn_det.compare.runner import Runner
from gn_det.compare.store import Store, finite
from gn_det.compare.tables import run_rows, view, views
from tests.compare.cases import Fake, plan_of, pretrain_row

EVIL = "<script>alert('x')</script> & \"GN\" | *bold*"
BN = {"id": "bn", "config": "quickstart.yaml", "reference": "fpn_bn"}
GN = {**BN, "id": "gn", "baseline": "bn", "reference": "fpn_gn", "overrides": {"SOLVER.GAMMA": 0.2}}


def results(root: Path, rows: list[dict[str, Any]], seeds: int = 1, fake: Fake | None = None, **keys: Any) -> Results:
    plan = plan_of(rows, seeds, **keys)
    Runner(plan, Store(root), fake or Fake(), say=lambda line: None).run()
    return collect(plan, Store(root))


class Page(HTMLParser):
    """Tags, their attributes, and the text of a page; unbalanced tags are an error."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_page_is_self_contained_and_escapes_names(tmp_path: Path) -> None:
    rows = [
        {**BN, "title": EVIL, "note": EVIL},
        {**GN, "labels": {"norm": EVIL}},
        pretrain_row("pre", title=EVIL),
    ]
    found = results(tmp_path, rows, 2, title=EVIL, note=EVIL)
    picture = b"\xff\xd8 not really"
    text = as_html(found, findings(found), [(EVIL, [picture, picture])], "today")
    page = Page(text)
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.tags}
    loaded = [v for _, attrs in page.tags for k, v in attrs.items() if k in ("src", "href", "srcset", "data")]
    assert len(loaded) == 2 and all(str(v).startswith("data:image/jpeg;base64,") for v in loaded)
    assert "url(" not in text and "@import" not in text and not re.search(r"https?://", text)
    assert sum(EVIL in word for word in page.words) >= 6
    assert {"prefers-color-scheme:dark"} <= set(re.findall(r"prefers-color-scheme:\w+", text))
    assert sum(tag == "polyline" for tag, _ in page.tags) >= 8
    write_report(found, Store(tmp_path), "today")
    markdown = (tmp_path / "report.md").read_text()
    assert "<script>" not in markdown and "\\<script\\>" in markdown
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    assert all(len(re.findall(r"(?<!\\)\|", line)) > 3 for line in lines)


def test_names_leave_no_attribute_and_no_line_of_their_own(tmp_path: Path) -> None:
    """Quotes, control characters, line breaks and half a surrogate pair, in everything that a suite names."""
    evil = "\" ' onload=alert(1) ><img src=x onerror=alert(2)>\x1b[31m\x9b\u202e\n| forged | row |\udcff"
    rows = [{**BN, "title": evil, "note": evil}, {**GN, "title": evil, "labels": {evil: evil}}]
    found = results(tmp_path, rows, 2, title=evil, note=evil)
    write_report(found, Store(tmp_path), "today")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert "img" not in {tag for tag, _ in page.tags}
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    for text in ("".join(page.words), markdown):
        assert not set(text) & set("\x1b\x9b\u202e") and "\n| forged" not in text and "\\udcff" in text
    assert evil in json.loads((tmp_path / "results.json").read_text(encoding="utf-8")).values()


def test_tables_hold_means_differences_and_published_numbers(tmp_path: Path) -> None:
    found = results(tmp_path, [BN, GN], 3, Fake(values={"bn": 30.0, "gn": 32.0}))
    shown, cost = views(found, found.plan.suite.tables[0])
    head = [text for _, text in shown.head]
    gn = dict(zip(head, shown.body[1]))
    assert gn["box AP"].text == "32.1 ± 0.3" and gn["Δ box AP"].text == "+2.0 ± 0.0" and gn["Δ box AP"].strong
    assert gn["box AP (paper)"].text == "40.3" and [k for k, _ in shown.head][-2:] == ["reference", "reference"]
    assert (
        "published" not in str(cost.head) and dict(zip([t for _, t in cost.head], cost.body[0]))["s / iteration"].text
    )
    sentence = findings(found)["gn"]
    assert "larger than the noise, better" in sentence[0] and "+1.7" in sentence[1] and "same direction" in sentence[1]


def test_what_a_suite_expects_stands_beside_it_with_its_source(tmp_path: Path) -> None:
    """Before the published numbers of the same rows, and compared within one source only."""
    ours = {"source": "our note 12"}
    bn = {**BN, "expected": {"box_ap": 30.0, "mask_ap": 28.5, **ours}}
    gn = {**GN, "expected": {"box_ap": 33.5, **ours}}
    found = results(tmp_path, [bn, gn], 3, Fake(values={"bn": 30.0, "gn": 32.0}))
    shown = view(found, found.plan.suite.tables[0])
    lines = [dict(zip([text for _, text in shown.head], line)) for line in shown.body]
    assert [line["box AP (expected)"].text for line in lines] == ["30.0", "33.5"]
    assert [line["mask AP (expected)"].text for line in lines] == ["28.5", ""]
    assert not any("paper" in text for _, text in shown.head) and shown.reference == "our note 12"
    assert "What was expected has +3.5 (30.0 to 33.5, our note 12): the same" in findings(found)["gn"][1]
    assert as_json(found, {}, "today")["rows"][1]["expected"] == {"source": "our note 12", "box_ap": 33.5}
    other = {**gn, "expected": {"box_ap": 33.5, "source": "another"}}
    found = results(tmp_path / "two", [bn, other], 3, Fake(values={"bn": 30.0, "gn": 32.0}))
    assert findings(found)["gn"][1].startswith("The paper has")
    assert view(found, found.plan.suite.tables[0]).reference == "our note 12; another"


def test_a_result_that_contradicts_the_paper_says_so(tmp_path: Path) -> None:
    found = results(tmp_path, [BN, GN], 3, Fake(values={"bn": 32.0, "gn": 30.0}))
    assert findings(found)["gn"][1].endswith("this result contradicts the paper.")
    assert '<span class="against">' in as_html(found, findings(found), [], "today")
    one = results(tmp_path / "one", [BN, GN], 1, Fake(values={"bn": 32.0, "gn": 30.0}))
    text = " ".join(findings(one)["gn"])
    assert "one seed each: the noise is not known" in text and "cannot be told from noise" in text
    assert "contradicts the paper" not in text


def test_a_loss_that_the_paper_has_too_points_the_same_way(tmp_path: Path) -> None:
    """The rows the other way round: less on both sides."""
    rows = [{**GN, "baseline": None}, {**BN, "baseline": "gn"}]
    found = results(tmp_path, rows, 3, Fake(values={"bn": 30.0, "gn": 32.0}))
    assert "−1.7" in findings(found)["bn"][1] and findings(found)["bn"][1].endswith("the same direction here.")


def test_no_object_of_a_size_is_no_number() -> None:
    """COCO's -1 and nan both say so."""
    flat = {"set/bbox/AP": 40.0, "set/bbox/APs": -1.0, "set/bbox/APl": math.nan, "other/bbox/AP": 1.0}
    assert detection_metrics(flat) == {"box_ap": 40.0, "box_ap_s": None, "box_ap_l": None}


def test_a_row_of_one_seed_is_told_with_its_assumption(tmp_path: Path) -> None:
    rows = [{**BN, "seeds": 3}, {**GN, "seeds": 1}]
    found = results(tmp_path, rows, None, Fake(values={"bn": 30.0, "gn": 36.0}))
    assert "over 1 and 3 seeds, if both rows spread alike: larger than the noise, better" in findings(found)["gn"][0]
    shown = view(found, found.plan.suite.tables[0])
    assert any("a row of one seed is taken to spread as the other" in note for note in shown.notes)
    assert shown.body[1][2].strong


def test_minutes_of_a_killed_start_are_not_made_up(tmp_path: Path) -> None:
    found = results(tmp_path, [BN], 1, Fake())
    record = found.rows[0].records[1]
    record.sessions = [{"seconds": 60.0}]
    assert run_rows(found)[0][-1] == "1.0"
    record.sessions = [{}, {"seconds": 60.0}]
    assert run_rows(found)[0][-1] == "> 1.0"


def test_difference_of_an_error_is_better_when_lower(tmp_path: Path) -> None:
    rows = [pretrain_row("b"), pretrain_row("g", norm="LN", baseline="b")]
    found = results(tmp_path, rows, 3, Fake(values={"b": 30.0, "g": 20.0}))
    assert "−10.0 points of top-1 error" in findings(found)["g"][0] and "better" in findings(found)["g"][0]


def test_cost_is_blank_for_another_machine_or_day(tmp_path: Path) -> None:
    rows = [pretrain_row(name, seeds=[seed]) for seed, name in enumerate("abcd")]
    plan = plan_of(rows)
    store = Store(tmp_path)
    Runner(plan, store, Fake(), say=lambda line: None).run()

    def change(name: str, **session: Any) -> None:
        path = next(tmp_path.glob(f"runs/{name}/*/run.json"))
        content = json.loads(path.read_text())
        content["sessions"] = [{**content["sessions"][0], **session}]
        path.write_text(json.dumps(content))

    def shown() -> list[str]:
        found = collect(plan, store)
        cost = views(found, plan.suite.tables[0])[1]
        column = [text for _, text in cost.head].index("s / iteration")
        self_notes.append(" ".join(cost.notes))
        return [row[column].text for row in cost.body]

    self_notes: list[str] = []
    assert shown() == ["0.500"] * 4 and "No cost for" not in self_notes[-1]
    change("b", day="2001-01-01")
    change("c", host="elsewhere")
    assert shown() == ["0.500", "–", "–", "0.500"]
    assert "No cost for b, c: not measured on the same machine and day" in self_notes[-1]
    path = next(tmp_path.glob("runs/d/*/run.json"))
    content = json.loads(path.read_text())
    content["sessions"].append({**content["sessions"][0], "day": "2001-01-02"})
    path.write_text(json.dumps(content))
    assert shown() == ["0.500", "–", "–", "–"]  # begun on one day, ended on another


def test_failed_and_missing_rows_are_shown_as_such(tmp_path: Path) -> None:
    def no() -> None:
        raise ValueError("no")

    plan = plan_of([BN, GN, {**BN, "id": "late"}])
    jobs = tuple(job for job in plan.jobs if job.row.id != "late")
    part = type(plan)(plan.suite, plan.engine, jobs)
    Runner(part, Store(tmp_path), Fake(on={"gn, seed 1": no}), say=lambda line: None).run()
    found = collect(plan, Store(tmp_path))
    assert common_place(found.rows) is not None
    shown = view(found, plan.suite.tables[0])
    assert [row[1].text for row in shown.body][1:] == ["failed", "not run"]
    assert "gn: failed: seed 1: ValueError: no" in shown.notes
    assert findings(found)["gn"] == ["gn: no difference can be told, because gn is failed."]


def test_grid_places_rows_by_their_labels(tmp_path: Path) -> None:
    row = pretrain_row("{n}_{b}", norm="{n}", batch_size="{b}", labels={"norm": "{n}", "batch": "{b}"})
    row |= {"each": {"n": ["BN", "LN"], "b": [8, 4]}, "reference": "imagenet_BN_b{b}"}
    grid = {"rows": "norm", "columns": "batch", "value": "top1_error"}
    values = {"BN_8": 1.0, "BN_4": 2.0, "LN_8": 3.0, "LN_4": 4.0}
    found = results(tmp_path, [row], 1, Fake(values=values), tables=[{"rows": ["*"], "grid": grid}])
    shown = view(found, found.plan.suite.tables[0])
    assert [text for _, text in shown.head] == ["norm \\ batch", "8", "4", "8 (paper)", "4 (paper)"]
    assert [[c.text for c in line[:3]] for line in shown.body] == [["BN", "1.4", "2.4"], ["LN", "3.4", "4.4"]]
    assert shown.body[0][3].text == "24.8"
    assert Page(as_html(found, findings(found), [], "today")).tags


def test_small_parts() -> None:
    assert ticks(0, 1, 5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0]) and ticks(3, 47, 5) == [10, 20, 30, 40]
    assert number(180000) == "180k" and number(0.25) == "0.25" and number(40.0) == "40"
    assert signed(-0.04) == "0.0" and signed(1.25) == "+1.2" and signed(-3) == "−3.0"
    assert finite({"a": [float("nan"), 1.0, (float("inf"),)]}) == {"a": [None, 1.0, [None]]}
    assert mean_curve([[(1, 1), (2, 3)], [(1, 3), (3, 7)]]) == [(1, 2.0), (2, 4.0)]


def test_a_mean_curve_ends_where_the_first_run_ends() -> None:
    """Where one run has no value there is no mean; between points the line is straight."""
    long, short = [(0, 0.0), (2, 4.0), (4, 8.0), (6, 12.0)], [(1, 10.0), (5, 14.0)]
    assert mean_curve([long, short]) == [(2, 7.5), (4, 10.5)]
    assert mean_curve([short, long]) == [(1, 6.0), (5, 12.0)]


def test_losses_alone_are_smoothed() -> None:
    """AP is shown as it was measured."""
    points = [(float(k), float(k == 5)) for k in range(10)]
    assert _smooth(points, "box_ap") == points
    assert [y for _, y in _smooth(points, "loss")] == pytest.approx([0, 0, 0, 0.2, 0.2, 0.2, 0.2, 0.2, 0, 0])


def test_cost_is_the_median_of_the_seeds_and_curves_count_minutes(tmp_path: Path) -> None:
    found = results(tmp_path, [BN], 3)
    row = found.rows[0]
    for record, cost in zip(row.done, (0.6, 9.0, 1.2)):
        record.cost = {"s_per_iter": cost}
    assert row.cost("s_per_iter", common_place(found.rows)) == 1.2
    assert _seconds(found.rows) == [pytest.approx(1.2 / 60)]


def test_a_run_that_went_on_on_another_day_has_no_place(tmp_path: Path) -> None:
    (record,) = results(tmp_path, [BN]).rows[0].done
    session = {"host": "a", "device": "b", "day": "2001-01-01"}
    record.sessions = [session, dict(session)]
    assert place_of_run(record) == ("a", "b", "2001-01-01")
    for other in ({"day": "2001-01-02"}, {"host": "c"}, {"device": "d"}):
        record.sessions = [session, session | other]
        assert place_of_run(record) is None
