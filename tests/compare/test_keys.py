"""The key of a run: another one when anything changes that its result depends on, and only then."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gn_det.compare.runner import choose, run_key
from gn_det.compare.store import DONE, Record
from gn_det.compare.version import code_version, meaning
from tests.compare.cases import plan_of, pretrain_row

DETECT = {"id": "row", "config": "quickstart.yaml"}


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
    row["overrides"] = {"OUTPUT_DIR": "elsewhere", "DATALOADER.NUM_WORKERS": 7}
    assert key(row) == key({**DETECT}) == key({**DETECT, "id": "renamed"})


@pytest.mark.parametrize(
    "change", [{"norm": "LN"}, {"batch_size": 8}, {"epochs": 3}, {"lr": 0.2}, {"seeds": [4]}, {"arch": "resnet14"}]
)
def test_what_decides_a_pretraining(change: dict[str, Any]) -> None:
    assert key(pretrain_row("row", **change)) != key(pretrain_row("row"))
    assert key(pretrain_row("row", workers=2, title="t")) == key(pretrain_row("row"))


def test_version_is_that_of_the_code_that_counts(tmp_path: Path) -> None:
    package = tmp_path / "gn_det"
    for name in ("norm.py", "run/fit.py", "training/fit.py", "detectron2/loop.py", "compare/page.py", "cli.py"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text("x = 1\n")

    def version(trainer: str = "embedded") -> str:
        code_version.cache_clear()
        return code_version(trainer, package)

    first, other = version(), version("detectron2")
    for name in ("compare/page.py", "cli.py", "detectron2/loop.py"):
        (package / name).write_text("x = 2\n")
    (package / "norm.py").write_text('"""A docstring."""\n\n# a comment\nx = (\n    1\n)\n')
    assert version() == first
    assert version("detectron2") != other
    for name in ("norm.py", "run/fit.py", "training/fit.py"):
        (package / name).write_text("x = 3\n")
        assert version() != first, name
        first = version()
    code_version.cache_clear()


def test_meaning_keeps_code_and_drops_words() -> None:
    assert meaning('def f():\n    """Doc."""\n    return 1  # one\n') == meaning("def f():\n\n    return (1)\n")
    assert meaning("x = 'doc'") != meaning("x = 'dog'")


def test_which_record_counts() -> None:
    def record(settings: str, version: str, status: str = DONE) -> Record:
        return Record("row", 1, run_key(settings, version), settings, version, status)

    old, new = record("s", "1"), record("s", "2", "failed")
    assert choose([old], "s", "2", any_version=False) is None
    assert choose([old], "s", "2", any_version=True) is old
    assert choose([old, new], "s", "2", any_version=False) is new
    assert choose([old, new], "s", "2", any_version=True) is old
    assert choose([old], "t", "1", any_version=True) is None
