"""What is done is skipped, what was interrupted goes on, what fails does not stop the others."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from gn_det.cli import main
from gn_det.compare import execute, outcomes, runner
from gn_det.compare.execute import Outcome
from gn_det.compare.outcomes import as_json, collect
from gn_det.compare.plan import Job
from gn_det.compare.runner import DONE, Record, Runner, Store, choose, package_commit, run_key, write_json
from gn_det.compare.suite import own_suite
from gn_det.compare.views import findings, views
from gn_det.engine.hooks import Interrupted
from gn_det.errors import TrainingError
from tests.compare.cases import Fake, plan_of, pretrain_row

ROWS = [
    pretrain_row("pre", norm="GN", groups=4),
    {"id": "bn", "config": "quickstart.yaml", "reference": "fpn_bn"},
    {"id": "gn", "config": "quickstart.yaml", "weights": "pre", "baseline": "bn", "reference": "fpn_gn"},
]


def run(root: Path, fake: Fake, *, rows: list[dict[str, Any]] = ROWS, seeds: int = 2, **keys: Any) -> dict[str, str]:
    return Runner(plan_of(rows, seeds), Store(root), fake, **keys).run()


def results(root: Path, rows: list[dict[str, Any]] = ROWS, seeds: int = 2) -> dict[str, Any]:
    """results.json without what a clock or a machine says."""
    found = collect(plan_of(rows, seeds), Store(root))
    sentences = {identity: finding.sentences for identity, finding in findings(found).items()}
    content: dict[str, Any] = json.loads(json.dumps(as_json(found, sentences, "today")))
    for row in content["rows"]:
        del row["cost"]
        for one in row["runs"]:
            del one["sessions"], one["cost"]
    return content


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_fork(call: Callable[[], Any]) -> int:
    """Wait status of a child that makes the call and ends."""
    child = os.fork()
    if child == 0:
        try:
            call()
        finally:
            os._exit(0)
    return os.waitpid(child, 0)[1]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_a_killed_suite_goes_on_to_the_same_results(tmp_path: Path) -> None:
    """SIGKILL in the third run, then in the sixth; the rest is run once, and nothing is run twice but the killed."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    fake = Fake()
    assert run(whole, fake) == {}
    assert fake.calls == [f"{row}, seed {seed}" for seed in (1, 2) for row in ("pre", "bn", "gn")]
    for name in ("gn, seed 1", "gn, seed 2"):
        status = in_fork(lambda name=name: run(cut, Fake(on={name: killed})))  # type: ignore[misc]
        assert os.WIFSIGNALED(status)
    statuses = {r["id"]: r["status"] for r in results(cut)["rows"]}
    assert statuses == {"pre": "done", "bn": "done", "gn": "1 of 2 seeds"}
    after = Fake()
    assert run(cut, after) == {}
    assert after.calls == ["gn, seed 2"]
    assert results(cut) == results(whole)


def test_done_rows_are_skipped_and_more_seeds_add_runs(tmp_path: Path) -> None:
    run(tmp_path, Fake(), seeds=1)
    again, more = Fake(), Fake()
    assert run(tmp_path, again, seeds=1) == {} and again.calls == []
    run(tmp_path, more, seeds=2)
    assert more.calls == ["pre, seed 2", "bn, seed 2", "gn, seed 2"]
    changed = Fake()
    rows = [ROWS[0], {**ROWS[1], "overrides": {"SOLVER.BASE_LR": 0.01}}, ROWS[2]]
    run(tmp_path, changed, rows=rows, seeds=1)
    assert changed.calls == ["bn, seed 1"]


def test_other_code_runs_again_unless_told_not_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tmp_path, Fake(), seeds=1)
    version = 77

    def set_version(number: int) -> None:
        for module in (runner, outcomes):
            monkeypatch.setattr(module, "RESULTS_VERSION", number)

    set_version(version)
    kept, anew = Fake(), Fake()
    run(tmp_path, kept, seeds=1, any_version=True)
    remarks = {r["id"]: r["remarks"] for r in results(tmp_path, seeds=1)["rows"]}
    run(tmp_path, anew, seeds=1)
    assert kept.calls == [] and len(anew.calls) == 3
    assert all("not 77" in text for texts in remarks.values() for text in texts) and all(remarks.values())
    assert not any(r["remarks"] for r in results(tmp_path, seeds=1)["rows"])
    assert len(list(tmp_path.glob("runs/bn/seed-1-*"))) == 2  # what was measured stays
    set_version(78)
    run(tmp_path, Fake(on={"bn, seed 1": fail(TrainingError("no"))}), seeds=1)
    assert {r["id"]: r["status"] for r in results(tmp_path, seeds=1)["rows"]}["bn"] == "failed"


def test_other_weights_run_again(tmp_path: Path) -> None:
    """The contents count: a backbone that was trained anew makes another row of what starts from it."""
    run(tmp_path, Fake(), seeds=1)
    fake = Fake()
    rows = [{**ROWS[0], "epochs": 3}, *ROWS[1:]]
    run(tmp_path, fake, rows=rows, seeds=1)
    assert fake.calls == ["pre, seed 1"]  # the made-up weights are equal to the old ones, byte for byte
    next(iter(sorted(tmp_path.glob("runs/pre/seed-1-*/model_final.pth")))).unlink()
    again = Fake()
    run(tmp_path, again, rows=rows, seeds=1)
    run(tmp_path, again, seeds=1)
    assert again.calls == ["pre, seed 1"]  # deleted weights are made anew, by whichever of the two settings


class Retrained(Fake):
    """Its weights have other bytes."""

    def __call__(self, job: Job, folder: Path, weights: str) -> Outcome:
        outcome, made = super().__call__(job, folder, weights), folder / "model_final.pth"
        made.write_bytes(b"other " + made.read_bytes())
        return outcome


def test_initial_weights_of_other_contents_are_another_run(tmp_path: Path) -> None:
    """One path, two contents: two runs, each found again by its contents, by the runner and by the report."""
    weights = tmp_path / "w.pth"
    rows = [{"id": "own", "config": "quickstart.yaml", "overrides": {"MODEL.WEIGHTS": str(weights)}}]
    for contents, status, calls in ((b"a", "not run", 1), (b"b", "not run", 1), (b"a", "done", 0), (b"b", "done", 0)):
        weights.write_bytes(contents)
        assert results(tmp_path, rows, 1)["rows"][0]["status"] == status
        fake = Fake()
        run(tmp_path, fake, rows=rows, seeds=1)
        assert len(fake.calls) == calls, contents
    assert len(list(tmp_path.glob("runs/own/seed-1-*"))) == 2


def test_a_row_runs_again_when_the_row_before_it_made_other_weights(tmp_path: Path) -> None:
    run(tmp_path, Fake(), seeds=1)
    other, again = Retrained(), Fake()
    rows = [{**ROWS[0], "epochs": 3}, *ROWS[1:]]
    run(tmp_path, other, rows=rows, seeds=1)
    assert other.calls == ["pre, seed 1", "gn, seed 1"]
    run(tmp_path, again, rows=rows, seeds=1)
    run(tmp_path, again, seeds=1)
    assert again.calls == []


def fail(error: BaseException) -> Callable[[], None]:
    def raise_it() -> None:
        raise error

    return raise_it


def test_a_failing_row_is_marked_and_the_others_go_on(tmp_path: Path) -> None:
    fake = Fake(on={"bn, seed 1": fail(TrainingError("the loss is nan\nat 7")), "pre, seed 2": fail(ValueError("bug"))})
    assert run(tmp_path, fake) == {
        "bn, seed 1": "the loss is nan at 7",
        "pre, seed 2": "ValueError: bug",
        "gn, seed 2": "it starts from 'pre' (seed 2), which is failed",
    }
    assert "gn, seed 1" in fake.calls and "gn, seed 2" not in fake.calls
    rows = {r["id"]: r for r in results(tmp_path)["rows"]}
    assert rows["bn"]["status"] == "1 of 2 seeds" and rows["bn"]["reasons"] == ["seed 1: the loss is nan at 7"]
    trace = next(tmp_path.glob("runs/pre/seed-2-*/trace.txt")).read_text()
    assert "ValueError: bug" in trace
    shown = collect(plan_of(ROWS, 2), Store(tmp_path))
    notes = [note for part in views(shown, shown.plan.suite.tables[0]) for note in part.notes]
    assert "bn: failed: seed 1: the loss is nan at 7" in notes
    assert run(tmp_path, Fake()) == {}  # what failed is tried again


@pytest.mark.parametrize("error", [Interrupted("stopped by SIGTERM", 143), KeyboardInterrupt()])
def test_being_asked_to_stop_stops_the_suite(tmp_path: Path, error: BaseException) -> None:
    with pytest.raises(type(error)):
        run(tmp_path, Fake(on={"bn, seed 1": fail(error)}))
    records = [json.loads(p.read_text())["status"] for p in tmp_path.glob("runs/*/seed-1-*/run.json")]
    assert sorted(records) == ["done", "interrupted"]


def test_exit_codes_and_reports_of_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = Fake(on={"bn, seed 1": fail(TrainingError("no luck"))})
    monkeypatch.setattr(execute, "execute", lambda *args, **options: fake(*args))
    monkeypatch.chdir(tmp_path)
    Path("s.yaml").write_text(yaml.safe_dump({"name": "s", "rows": ROWS, "samples": {"images": 0}}))
    words = ["compare", "s.yaml", "--engine", "embedded"]
    assert main([*words, "--dry-run"]) == 0
    assert "gn, seed 1" in capsys.readouterr().out and not Path("output").exists()
    assert main([*words, "--report-only"]) == 0 and fake.calls == []
    assert "not run" in Path("output/compare/s/report.md").read_text()
    assert main(words) == 1
    assert "failed: bn, seed 1: no luck" in capsys.readouterr().out
    assert sorted(p.name for p in Path("output/compare/s").iterdir() if p.suffix != ".lock") == [
        "report.html", "report.md", "results.json", "runs",
    ]  # fmt: skip
    fake.on = {}
    assert main([*words, "--rows", "bn", "SOLVER.BASE_LR=0.06"]) == 0  # the same value as in the config
    assert fake.calls == ["pre, seed 1", "bn, seed 1", "gn, seed 1", "bn, seed 1"]
    assert main(words) == 0


def test_rows_on_own_data() -> None:
    """The first config is the baseline of the others; one that comes twice has a number."""
    data = {"train_json": "a", "train_images": "b", "val_json": "c", "val_images": "d"}
    suite = own_suite(["bn_fpn_4conv1fc.yaml", "x/gn_fpn.yaml", "gn_fpn.yaml"], data)
    assert [r.id for r in suite.rows] == ["bn_fpn_4conv1fc", "gn_fpn", "gn_fpn_2"]
    assert [r.baseline for r in suite.rows] == [None, "bn_fpn_4conv1fc", "bn_fpn_4conv1fc"]
    assert all(r.data == data for r in suite.rows)


def test_which_record_counts() -> None:
    def record(settings: str, version: str, status: str = DONE) -> Record:
        return Record("row", 1, run_key(settings, version), settings, version, status)

    old, new = record("s", "1"), record("s", "2", "failed")
    assert choose([old], "2", any_version=False) is None
    assert choose([old], "2", any_version=True) is choose([old], "2", any_version=False, else_any=True) is old
    assert (
        choose([old, new], "2", any_version=False) is choose([old, new], "2", any_version=False, else_any=True) is new
    )
    assert choose([old, new], "2", any_version=True) is old


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"a": [float("nan"), 1.0, (float("inf"),)], "é\udcff": "NaN"})
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": [None, 1.0, [None]], "é\udcff": "NaN"}


def test_runs_of_the_time_of_hashes_are_taken_as_another_version(tmp_path: Path) -> None:
    """Their folders and fields are those of today; they count with any_version, and a report says what they are."""
    run(tmp_path, Fake(), seeds=1)
    for path in tmp_path.glob("runs/*/*/run.json"):
        record = json.loads(path.read_text()) | {"version": "0123456789ab"}
        record["key"] = run_key(record["settings_key"], record["version"])
        del record["software"]["commit"]
        folder = path.parent.rename(path.parent.with_name(f"seed-1-{record['key'][:8]}"))
        (folder / "run.json").write_text(json.dumps(record))
    rows = results(tmp_path, seeds=1)["rows"]
    assert [r["status"] for r in rows] == ["done"] * 3
    assert all(r["remarks"] == ["seed 1: run with gn_det results version 0123456789ab, not 2"] for r in rows)
    kept, anew = Fake(), Fake()
    run(tmp_path, kept, seeds=1, any_version=True)
    run(tmp_path, anew, seeds=1)
    assert kept.calls == [] and len(anew.calls) == 3


def test_the_commit_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    (tmp_path / "gn_det" / "compare").mkdir(parents=True)
    source = tmp_path / "gn_det" / "compare" / "runner.py"
    source.write_text("x = 1\n")
    (tmp_path / "README.md").write_text("\n")
    monkeypatch.setattr(runner, "__file__", str(source))

    def commit() -> str:
        package_commit.cache_clear()
        return package_commit()

    try:
        assert commit() == ""
        for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"]):
            subprocess.run([*git, *words], check=True)
        first = commit()
        (tmp_path / "README.md").write_text("no code\n")
        assert commit() == first
        assert re.fullmatch("[0-9a-f]{12}", first)
        source.write_text("x = 2\n")
        assert commit() == f"{first}+"
    finally:
        package_commit.cache_clear()
