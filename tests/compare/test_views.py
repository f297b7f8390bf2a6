"""Tables and sentences: means, differences with their noise, published numbers, and what cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gn_det.compare.outcomes import as_json, collect, common_place
from gn_det.compare.runner import Runner, Store
from gn_det.compare.views import findings, run_view, signed, view, views
from tests.compare.cases import BN, GN, Fake, plan_of, pretrain_row, results


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
    sentence = findings(found)["gn"].sentences
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
    assert "What was expected has +3.5 (30.0 to 33.5, our note 12): the same" in findings(found)["gn"].sentences[1]
    assert as_json(found, {}, "today")["rows"][1]["expected"] == {"source": "our note 12", "box_ap": 33.5}
    other = {**gn, "expected": {"box_ap": 33.5, "source": "another"}}
    found = results(tmp_path / "two", [bn, other], 3, Fake(values={"bn": 30.0, "gn": 32.0}))
    assert findings(found)["gn"].sentences[1].startswith("The paper has")
    assert view(found, found.plan.suite.tables[0]).reference == "our note 12; another"


def test_a_result_that_contradicts_the_paper_says_so(tmp_path: Path) -> None:
    found = results(tmp_path, [BN, GN], 3, Fake(values={"bn": 32.0, "gn": 30.0}))
    assert findings(found)["gn"].sentences[1].endswith("this result contradicts the paper.")
    assert findings(found)["gn"].contradicts
    one = results(tmp_path / "one", [BN, GN], 1, Fake(values={"bn": 32.0, "gn": 30.0}))
    text = " ".join(findings(one)["gn"].sentences)
    assert "one seed each: the noise is unknown" in text and "cannot be distinguished from noise" in text
    assert "contradicts the paper" not in text


def test_a_loss_that_the_paper_has_too_points_the_same_way(tmp_path: Path) -> None:
    """The rows the other way round: less on both sides."""
    rows = [{**GN, "baseline": None}, {**BN, "baseline": "gn"}]
    found = results(tmp_path, rows, 3, Fake(values={"bn": 30.0, "gn": 32.0}))
    assert "−1.7" in findings(found)["bn"].sentences[1] and findings(found)["bn"].sentences[1].endswith(
        "the same direction here."
    )


def test_a_row_of_one_seed_is_told_with_its_assumption(tmp_path: Path) -> None:
    rows = [{**BN, "seeds": 3}, {**GN, "seeds": 1}]
    found = results(tmp_path, rows, None, Fake(values={"bn": 30.0, "gn": 36.0}))
    assert (
        "over 1 and 3 seeds, assuming both rows vary equally: larger than the noise, better"
        in findings(found)["gn"].sentences[0]
    )
    shown = view(found, found.plan.suite.tables[0])
    assert any("a row with one seed is assumed to vary like the other" in note for note in shown.notes)
    assert shown.body[1][2].strong


def test_difference_within_the_noise_may_still_exclude_what_was_expected(tmp_path: Path) -> None:
    """BN at 30.1 with a deviation of 0.3 against 30.3: an expected loss of 9 is excluded, a gain of 0.5 is not."""
    source = {"source": "our note"}
    for gained, told in ((-9.0, "excludes a difference of that size."), (0.5, "nor contradicted here.")):
        rows = [
            {**BN, "seeds": 3, "expected": {"box_ap": 30.0, **source}},
            {**GN, "seeds": 1, "expected": {"box_ap": 30.0 + gained, **source}},
        ]
        found = results(tmp_path / told[:3], rows, None, Fake(values={"bn": 30.0, "gn": 30.0}))
        sentence = findings(found)["gn"].sentences[1]
        assert "neither confirmed" in sentence and sentence.endswith(told)


def test_minutes_of_a_killed_start_are_not_made_up(tmp_path: Path) -> None:
    found = results(tmp_path, [BN], 1, Fake())
    record = found.rows[0].records[1]
    record.sessions = [{"seconds": 60.0}]
    assert run_view(found).body[0][-1].text == "1.0"
    record.sessions = [{}, {"seconds": 60.0}]
    assert run_view(found).body[0][-1].text == "> 1.0"


def test_difference_of_an_error_is_better_when_lower(tmp_path: Path) -> None:
    rows = [pretrain_row("b"), pretrain_row("g", norm="LN", baseline="b")]
    found = results(tmp_path, rows, 3, Fake(values={"b": 30.0, "g": 20.0}))
    assert (
        "−10.0 points of top-1 error" in findings(found)["g"].sentences[0]
        and "better" in findings(found)["g"].sentences[0]
    )


def test_cost_is_blank_for_another_machine_or_day(tmp_path: Path) -> None:
    rows = [pretrain_row(name, seeds=[seed]) for seed, name in enumerate("abcd")]
    plan = plan_of(rows)
    store = Store(tmp_path)
    Runner(plan, store, Fake()).run()

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
    Runner(part, Store(tmp_path), Fake(on={"gn, seed 1": no})).run()
    found = collect(plan, Store(tmp_path))
    assert common_place(found.rows) is not None
    shown = view(found, plan.suite.tables[0])
    assert [row[1].text for row in shown.body][1:] == ["failed", "not run"]
    assert "gn: failed: seed 1: ValueError: no" in shown.notes
    assert findings(found)["gn"].sentences == ["gn: no difference available (gn: failed)."]


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


def test_grid_of_a_cost_says_where_it_was_measured_and_has_no_second_table(tmp_path: Path) -> None:
    """The number of each run as it is, without a deviation over seeds."""
    rows = [pretrain_row("BN_8", labels={"norm": "BN", "batch": "8"})]
    grid = {"rows": "norm", "columns": "batch", "value": "memory_mb"}
    found = results(tmp_path, rows, 2, tables=[{"rows": ["*"], "grid": grid}])
    (shown,) = views(found, found.plan.suite.tables[0])
    assert [cell.text for cell in shown.body[0]] == ["BN", "100"]
    assert shown.notes[0] == "peak memory (MB)." and shown.notes[1].startswith("Cost: measured on ")
    assert "deviation" not in "".join(shown.notes)


def test_signs() -> None:
    assert signed(-0.04) == "0.0" and signed(1.25) == "+1.2" and signed(-3) == "−3.0"


def test_nothing_learned_on_both_sides_is_no_result(tmp_path: Path) -> None:
    """AP shown as 0.0 in all runs of a row and its baseline; as soon as one run has more, it is a difference again."""
    found = results(tmp_path, [BN, GN], 3)
    for result in found.rows:
        for record in result.done:
            record.metrics = {"box_ap": 0.04, "mask_ap": 0.0}
    finding = findings(found)["gn"]
    assert finding.sentences == ["gn against bn: neither learned (box AP 0.0 on both sides)."]
    assert [cell.text for cell in view(found, found.plan.suite.tables[0]).body[1]].count("neither learned") == 2
    found.of(["bn"])[0].done[0].metrics = {"box_ap": 0.1}
    assert "neither" not in findings(found)["gn"].text
