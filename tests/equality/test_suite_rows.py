"""Identity: the detection rows of small.yaml are the same models on both engines, whatever their norms.

Their pyramid ends at res4, which Detectron2's own FPN cannot run: gn_det's is taken there for every norm.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2.modeling", reason="compares with an installed Detectron2")

from gn_det.compare.plan import Plan, make_plan
from gn_det.compare.suite import DETECT, find_suite, load_suite, shipped_suites
from gn_det.detectron2.engine import Detectron2Engine
from gn_det.engine.engines import Engine
from tests.equality.test_model import assert_same_detections, assert_same_training
from tests.golden.model_cases import BATCHES, NUM_CLASSES

pytestmark = pytest.mark.detectron2

SMALL = load_suite(find_suite("small"))


@pytest.fixture(scope="module")
def plan() -> Plan:
    return make_plan(SMALL, Engine())


@pytest.mark.parametrize("row", [row.id for row in SMALL.rows if row.kind == DETECT])
def test_a_row_of_small_gives_the_same_numbers(row: str, plan: Plan) -> None:
    cfg = next(job.cfg for job in plan.jobs if job.row.id == row).clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = NUM_CLASSES
    pair = []
    for engine in (Engine(), Detectron2Engine()):
        torch.manual_seed(4)
        pair.append(engine.build_model(cfg.clone()))
    ours, theirs = (model.state_dict() for model in pair)
    assert list(ours) == list(theirs) and all(torch.equal(ours[k], theirs[k]) for k in ours)
    scenes = BATCHES["two_sizes"]()
    assert_same_training(tuple(pair), scenes)
    assert_same_detections(tuple(pair), scenes)


@pytest.mark.parametrize("name", shipped_suites())
def test_every_row_of_every_suite_builds(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on the embedded engine (tests/compare/test_suites.py): only data and weights may be missing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path))
    suite = load_suite(find_suite(name))
    plan = make_plan(suite, Detectron2Engine())
    assert [str(p) for p in plan.problems if not p.absent] == []
    assert {job.row.id for job in plan.jobs} | set(plan.left_out) == {row.id for row in suite.rows}
