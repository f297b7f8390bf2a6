"""Every shipped suite resolves and builds; the key of a run changes with what its result depends on, and only then."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gn_det.compare.plan import make_plan
from gn_det.compare.suite import find_suite, load_suite, shipped_suites
from gn_det.engine.engines import Engine
from gn_det.errors import ConfigError
from tests.compare.cases import plan_of, pretrain_row

DETECT = {"id": "row", "config": "quickstart.yaml"}
ROWS = {
    "beyond.yaml": 20,
    "beyond_small.yaml": 8,
    "batch_size.yaml": 12,
    "cifar10.yaml": 42,
    "digits.yaml": 29,
    "groups.yaml": 12,
    "motions.yaml": 6,
    "nuclei.yaml": 8,
    "nuclei_batch.yaml": 12,
    "paper_coco.yaml": 19,
    "paper_imagenet.yaml": 35,
    "paper_kinetics.yaml": 6,
    "small.yaml": 11,
}


def test_all_suites_are_listed() -> None:
    assert list(shipped_suites()) == sorted(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_every_row_builds(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that may be missing is data and weights; models are built on the meta device while planning."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    suite = load_suite(find_suite(f"experiments/{name}"))
    assert len(suite.rows) == ROWS[name]
    plan = make_plan(suite, Engine(), num_gpus=1)
    wrong = [str(p) for p in plan.problems if not p.absent]
    assert wrong == []
    assert {job.row.id for job in plan.jobs} | set(plan.left_out) == {row.id for row in suite.rows}
    assert list(tmp_path.iterdir()) == []


def test_small_needs_no_files_and_orders_pretraining_first() -> None:
    plan = make_plan(load_suite(find_suite("small")), Engine(), seeds=2)
    assert plan.problems == ()
    kinds = [(job.seed, job.row.kind) for job in plan.jobs]
    assert kinds == [(1, "pretrain")] * 3 + [(1, "detect")] * 8 + [(2, "pretrain")] * 3 + [(2, "detect")] * 8
    gn = next(job for job in plan.jobs if job.row.id == "gn" and job.seed == 2)
    assert gn.needs == ("pretrain/gn", 2)
    written = make_plan(load_suite(find_suite("small")), Engine()).jobs
    assert [(j.row.id, j.seed) for j in written[11:]] == [("bn", 2), ("gn", 2), ("bn", 3), ("gn", 3)]
    assert {j.needs for j in written[11:]} == {("pretrain/bn", 1), ("pretrain/gn", 1)}


@pytest.mark.parametrize("name", ["small", "nuclei"])
def test_rows_differ_in_norms_heads_and_weights_alone(name: str) -> None:
    """Both sides of the comparison have the same data, batch, learning rate and schedule."""
    plan = make_plan(load_suite(find_suite(name)), Engine())
    allowed = ("MODEL.WEIGHTS", "NORM", "FREEZE_AT")
    rows = [job.cfg for job in plan.jobs if job.cfg is not None and job.seed == 1]
    assert len(rows) == {"small": 8, "nuclei": 6}[name]

    def flat(node: object, prefix: str = "") -> dict[str, object]:
        assert isinstance(node, dict)
        out: dict[str, object] = {}
        for key, value in node.items():
            out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        return out

    first = flat(rows[0])
    for cfg in rows[1:]:
        differing = [k for k, v in flat(cfg).items() if v != first[k] and k != "SOLVER.NO_RESCALE"]
        assert all(k.endswith(allowed) for k in differing), differing


def key(row: dict[str, Any], weights: str = "", **suite: Any) -> str:
    return plan_of([row], **suite).jobs[0].settings_key(weights)


def test_what_decides_a_detection(tmp_path: Path) -> None:
    json_file = tmp_path / "a.json"
    json_file.write_text(json.dumps({"images": []}))
    own = {f"{s}_{k}": str(v) for s in ("train", "val") for k, v in (("json", json_file), ("images", tmp_path))}
    keys = {
        "plain": key(DETECT),
        "override": key({**DETECT, "overrides": {"SOLVER.BASE_LR": 0.01}}),
        "override of the suite": key(DETECT, overrides={"SOLVER.BASE_LR": 0.03}),
        "config": key({**DETECT, "config": "gn_fpn_scratch.yaml"}),
        "seed": key({**DETECT, "seeds": [2]}),
        "weights": key(DETECT, "0123"),
        "other weights": key(DETECT, "4567"),
        "data": key({**DETECT, "data": own}),
    }
    json_file.write_text(json.dumps({"images": [], "categories": []}))
    keys["contents of the data"] = key({**DETECT, "data": own})
    assert len(set(keys.values())) == len(keys), keys


def test_what_does_not_decide_a_detection() -> None:
    row = {**DETECT, "title": "other", "labels": {"a": "b"}, "note": "n", "reference": "fpn_gn"}
    row["overrides"] = {"OUTPUT_DIR": "elsewhere", "DATALOADER.NUM_WORKERS": 7, "LOGGERS": "('csv',)"}
    assert key(row) == key({**DETECT}) == key({**DETECT, "id": "renamed"})


@pytest.mark.parametrize(
    "change", [{"norm": "LN"}, {"batch_size": 8}, {"epochs": 3}, {"lr": 0.2}, {"seeds": [4]}, {"arch": "resnet14"}]
)
def test_what_decides_a_pretraining(change: dict[str, Any]) -> None:
    assert key(pretrain_row("row", **change)) != key(pretrain_row("row"))
    assert key(pretrain_row("row", workers=2, title="t")) == key(pretrain_row("row"))


def test_keys_are_those_of_runs_recorded_long_ago() -> None:
    """A config key that is new must not make every finished run count as another: see ``_LEFT_OUT``."""
    jobs = {job.name: job for job in make_plan(load_suite(find_suite("small")), Engine()).jobs}
    assert jobs["pretrain/gn, seed 1"].settings_key("x") == "0420a17ab5f4d766"
    assert jobs["gn, seed 3"].settings_key("x") == "3d8a0ac47a673712"


def test_kinetics_rows_have_the_numbers_of_table_8_and_wait_for_their_weights(tmp_path: Path) -> None:
    """Published top-1 and top-5 accuracies as errors; weights that are not there are missing, like data."""
    suite = load_suite(find_suite("paper_kinetics"))
    found = {row.id: row.references[0].values for row in suite.rows}
    assert found["BN_32_8"] == {"top1_error": 26.7, "top5_error": 9.3}
    assert found["GN_64_4"] == {"top1_error": 25.5, "top5_error": 8.3}
    row = dict(suite.rows[3].settings) | {"data": str(tmp_path), "weights": str(tmp_path / "none.pth")}
    plan = plan_of([{"id": "GN", "kind": "pretrain", **row}])
    assert [p.absent for p in plan.problems] == [True] and "no file" in str(plan.problems[0])


def test_config_keys_are_refused_where_no_detection_row_runs() -> None:
    """They would change nothing: a second pattern after --rows, without a comma, looks like one."""
    suite = load_suite(find_suite("small"))
    with pytest.raises(ConfigError, match=r"'pretrain/gn' sets a config key, but no detection row is run"):
        make_plan(suite, Engine(), overrides=["pretrain/gn", "pretrain/ln"], only=["pretrain/bn"])
