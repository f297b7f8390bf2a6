"""Every row of every shipped suite resolves and builds, without data, weights or network."""

from __future__ import annotations

from pathlib import Path

import pytest

from gn_det.cli.compare import resolve_suite, shipped_suites
from gn_det.compare.plan import make_plan
from gn_det.compare.references import load_references, published_difference
from gn_det.compare.suite import load_suite
from gn_det.engine.embedded import EmbeddedEngine

ROWS = {
    "batch_size.yaml": 12,
    "digits.yaml": 29,
    "groups.yaml": 12,
    "paper_coco.yaml": 19,
    "paper_imagenet.yaml": 25,
    "small.yaml": 11,
}


def test_all_suites_are_listed() -> None:
    assert shipped_suites() == sorted(ROWS)


@pytest.mark.parametrize("name", ROWS)
def test_every_row_builds(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that may be missing is data and weights; models are built on the meta device while planning."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    suite = load_suite(resolve_suite(f"experiments/{name}"))
    assert len(suite.rows) == ROWS[name]
    plan = make_plan(suite, EmbeddedEngine(), num_gpus=1)
    wrong = [str(p) for p in plan.problems if not p.absent]
    assert wrong == []
    assert {job.row.id for job in plan.jobs} | set(plan.left_out) == {row.id for row in suite.rows}
    assert list(tmp_path.iterdir()) == []


def test_small_needs_no_files_and_orders_pretraining_first() -> None:
    plan = make_plan(load_suite(resolve_suite("small")), EmbeddedEngine(), seeds=2)
    assert plan.problems == ()
    kinds = [(job.seed, job.row.kind) for job in plan.jobs]
    assert kinds == [(1, "pretrain")] * 3 + [(1, "detect")] * 8 + [(2, "pretrain")] * 3 + [(2, "detect")] * 8
    gn = next(job for job in plan.jobs if job.row.id == "gn" and job.seed == 2)
    assert gn.needs == ("pretrain/gn", 2)
    written = make_plan(load_suite(resolve_suite("small")), EmbeddedEngine()).jobs
    assert [(j.row.id, j.seed) for j in written[11:]] == [("bn", 2), ("gn", 2), ("bn", 3), ("gn", 3)]
    assert {j.needs for j in written[11:]} == {("pretrain/bn", 1), ("pretrain/gn", 1)}


def test_rows_of_small_differ_in_norms_heads_and_weights_alone() -> None:
    """Both sides of the comparison have the same data, batch, learning rate and schedule."""
    plan = make_plan(load_suite(resolve_suite("small")), EmbeddedEngine())
    allowed = ("MODEL.WEIGHTS", "NORM", "FREEZE_AT")
    rows = [job.cfg for job in plan.jobs if job.cfg is not None and job.seed == 1]
    assert len(rows) == 8

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


def test_published_differences_stay_within_one_source_and_model() -> None:
    rows, sources = load_references()
    assert {r.source for r in rows.values()} == set(sources)
    assert published_difference(rows["fpn_gn"], rows["fpn_bn"], "box_ap") == pytest.approx(1.7)
    # BN* trained longer does not gain: Detectron's 3x against its 2x
    assert published_difference(rows["detectron_bn_3x"], rows["detectron_bn_2x"], "box_ap") == pytest.approx(0.3)
    assert published_difference(rows["detectron_bn_3x"], rows["detectron_bn_2x"], "mask_ap") == pytest.approx(-0.2)
    assert published_difference(rows["c4_bn_tuned"], rows["c4_bn"], "box_ap") == -6.0
    assert published_difference(rows["d2_fpn_gn_3x"], rows["fpn_bn"], "box_ap") is None
    assert published_difference(rows["c4_ln"], rows["fpn_gn"], "box_ap") is None
    assert published_difference(rows["fpn_gn"], rows["fpn_bn"], "top1_error") is None
