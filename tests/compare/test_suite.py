"""What cannot be run is refused before anything runs: one line that names row and key, exit status 2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from gn_det.cli import main
from gn_det.compare.suite import Row, load_suite, parse_suite, row_ids
from gn_det.errors import ConfigError
from gn_det.values import InvalidValue
from tests.compare.cases import plan_of, pretrain_row

ROW = {"id": "a", "config": "quickstart.yaml"}

BAD: dict[str, tuple[Any, list[str]]] = {
    "no rows": ({"title": "x"}, ["rows is missing", "a list of 1 to 500 rows"]),
    "unknown suite key": ({"rows": [ROW], "row": 1}, ["unknown key row", "rows"]),
    "unknown row key": ({"rows": [{**ROW, "sedes": 3}]}, ["row 'a'", "unknown key sedes", "seeds"]),
    "unknown kind": ({"rows": [{**ROW, "kind": "train"}]}, ["row 'a'", "kind", "'detect', 'pretrain'"]),
    "bad id": ({"rows": [{"id": "../a", "config": "x"}]}, ["row '../a'", "id is"]),
    "two of one id": ({"rows": [ROW, ROW]}, ["row 'a'", "duplicate id"]),
    "no config": ({"rows": [{"id": "a"}]}, ["row 'a'", "config is missing"]),
    "unknown config": ({"rows": [{**ROW, "config": "gn_fnp.yaml"}]}, ["row 'a'", "gn_fnp.yaml", "gn_fpn.yaml"]),
    "unknown config key": ({"rows": [{**ROW, "overrides": {"SOLVER.LR": 1}}]}, ["row 'a'", "overrides", "SOLVER.LR"]),
    "wrong value": ({"rows": [{**ROW, "overrides": {"SOLVER.BASE_LR": "x"}}]}, ["row 'a'", "SOLVER.BASE_LR"]),
    "key of all rows": ({"rows": [ROW], "overrides": {"SOLVR.X": 1}}, ["row 'a'", "overrides of the suite", "SOLVR.X"]),
    "no such weights": ({"rows": [{**ROW, "weights": "nowhere.pth"}]}, ["row 'a'", "weights", "nowhere.pth"]),
    "unknown catalog name": ({"rows": [{**ROW, "weights": "catalog://R-50"}]}, ["row 'a'", "catalog://R-50"]),
    "weights of a detection": (
        {"rows": [ROW, {**ROW, "id": "b", "weights": "a"}]},
        ["row 'b'", "weights", "detection row"],
    ),
    "missing baseline": ({"rows": [{**ROW, "baseline": "bn"}]}, ["row 'a'", "baseline", "no row 'bn'"]),
    "baseline of another kind": (
        {"rows": [pretrain_row("p"), {**ROW, "baseline": "p"}]},
        ["row 'a'", "baseline", "no row 'p' of kind detect"],
    ),
    "no validation set": ({"rows": [{**ROW, "overrides": {"DATASETS.TEST": "()"}}]}, ["row 'a'", "validation"]),
    "data without validation": (
        {"rows": [{**ROW, "data": {"train_json": "a.json", "train_images": "b"}}]},
        ["row 'a'", "val_json", "validation"],
    ),
    "data that is not there": (
        {"rows": [{**ROW, "data": {f"{s}_{k}": "no/x" for s in ("train", "val") for k in ("json", "images")}}]},
        ["row 'a'", "no/x does not exist"],
    ),
    "frozen at random": ({"rows": [{**ROW, "overrides": {"MODEL.BACKBONE.FREEZE_AT": 2}}]}, ["row 'a'", "FREEZE_AT"]),
    "no such reference": ({"rows": [{**ROW, "reference": "fpn"}]}, ["row 'a'", "reference", "'fpn'"]),
    "expected without source": ({"rows": [{**ROW, "expected": {"box_ap": 40.3}}]}, ["row 'a'", "expected", "source"]),
    "expected of no column": (
        {"rows": [{**ROW, "expected": {"ap": 40.3, "source": "x"}}]},
        ["row 'a'", "expected", "unknown key ap", "box_ap"],
    ),
    "expected is no number": (
        {"rows": [{**ROW, "expected": {"box_ap": "40.3 AP", "source": "x"}}]},
        ["row 'a'", "expected", "box_ap", "40.3 AP"],
    ),
    "nothing expected": (
        {"rows": [{**ROW, "expected": {"source": "x"}}]},
        ["row 'a'", "expected", "a number for"],
    ),
    "seeds": ({"rows": [{**ROW, "seeds": 0}]}, ["row 'a'", "seeds is 0"]),
    "a seed twice": ({"rows": [{**ROW, "seeds": [1, 1]}]}, ["row 'a'", "seeds is [1, 1]", "distinct"]),
    "groups that do not divide": (
        {"rows": [pretrain_row("p", norm="GN", groups=7)]},
        ["row 'p'", "7"],
    ),
    "unknown setting": ({"rows": [pretrain_row("p", batchsize=7)]}, ["row 'p'", "unknown key batchsize", "batch_size"]),
    "bad setting": ({"rows": [pretrain_row("p", batch_size=0)]}, ["row 'p'", "batch_size"]),
    "no such folder": ({"rows": [pretrain_row("p", data="im/", image_size=32)]}, ["row 'p'", "data", "im"]),
    "table of no row": ({"rows": [ROW], "tables": [{"rows": ["c"]}]}, ["table 1", "rows", "'c'"]),
    "unknown column": ({"rows": [ROW], "tables": [{"rows": ["a"], "columns": ["ap"]}]}, ["columns", "'ap'", "box_ap"]),
    "grid without label": (
        {"rows": [ROW], "tables": [{"rows": ["a"], "grid": {"rows": "n", "columns": "b", "value": "box_ap"}}]},
        ["table 1", "grid", "'a' has no label 'n'"],
    ),
    "each": ({"rows": [{**ROW, "each": {"x": 1}}]}, ["row 1", "each", "x is 1; it must be a list"]),
    "rows beyond number": (
        {"rows": [{**ROW, "id": f"r{i}"} for i in range(501)]},
        ["a list of 1 to 500 rows"],
    ),
    "each beyond number": ({"rows": [{**ROW, "each": {c: [*range(100)] for c in "abcdef"}}]}, ["each makes more than"]),
    "each beyond size": (
        {"rows": [{**ROW, "note": "{x}" * 9999, "each": {"x": ["y" * 9999]}}]},
        ["each writes more than 2000000"],
    ),
    "each of each": (
        {"rows": [{**ROW, "note": "x {a}", "each": {n: [f"{{{m}}}" * 99] for n, m in zip("abcdefgh", "bcdefghi")}}]},
        ["each writes more than"],
    ),
    "a list in a text": (
        {"rows": [{**ROW, "title": "x {x}", "each": {"x": [[1]]}}]},
        ["each: x inside a text must be text"],
    ),
    "seeds beyond number": ({"rows": [{**ROW, "seeds": 10**9}]}, ["row 'a'", "seeds is 1000000000", "at most 1000"]),
    "a seed beyond number": ({"rows": [{**ROW, "seeds": [2**63]}]}, ["row 'a'", "seeds is [9223372036854775808]"]),
    "true as a seed": ({"rows": [{**ROW, "seeds": [True]}]}, ["row 'a'", "seeds is [True]"]),
    "runs beyond number": (
        {"rows": [{**ROW, "id": f"r{i}", "seeds": 500} for i in range(5)]},
        ["make 2500 runs; at most 2000"],
    ),
    "suite name is a path": ({"name": "../../x", "rows": [ROW]}, ["name is '../../x'; it must be"]),
    "suite name is two": ({"name": "a/b", "rows": [ROW]}, ["name is 'a/b'; it must be"]),
    "suite name is a list": ({"name": ["a"], "rows": [ROW]}, ["name is ['a']; it must be"]),
    "absolute id": ({"rows": [{**ROW, "id": "/etc/x"}]}, ["row '/etc/x'", "id is"]),
    "id leads up": ({"rows": [{**ROW, "id": "a/../../x"}]}, ["row 'a/../../x'", "id is"]),
    "long id": ({"rows": [{**ROW, "id": "a" * 5000}]}, ["(5000 characters)", "id is"]),
    "id is a section": ({"rows": [{**ROW, "id": {"a": 1}}]}, ["row {'a': 1}", "id is"]),
    "title is a list": ({"rows": [ROW], "title": ["x"]}, ["title is ['x']; it must be text"]),
    "long title": (
        {"rows": [ROW], "title": "x" * 5000},
        ["(5000 characters); it must be", "at most 1000 characters"],
    ),
    "config is a list": ({"rows": [{**ROW, "config": ["a"]}]}, ["row 'a'", "config is ['a']; it must be text"]),
    "override is a section": (
        {"rows": [{**ROW, "overrides": {"OUTPUT_DIR": {"a": 1}}}]},
        ["OUTPUT_DIR is {'a': 1}; it must be a value"],
    ),
    "no output": (
        {"rows": [{**ROW, "overrides": {"OUTPUT_DIR": ""}}]},
        ["row 'a'", "OUTPUT_DIR is ''", "the path of a folder"],
    ),
    "layers beyond number": (
        {"rows": [{**ROW, "overrides": {"MODEL.ROI_MASK_HEAD.NUM_CONV": 100000}}]},
        ["row 'a'", "NUM_CONV is 100000; it must be an integer from 0 to 64"],
    ),
    "sample images": ({"rows": [ROW], "samples": {"images": 10**9}}, ["samples: images is 1000000000"]),
    "tables beyond number": (
        {"rows": [ROW], "tables": [{"rows": ["a"]}] * 101},
        ["a list of 1 to 100 tables"],
    ),
    "columns beyond number": (
        {"rows": [ROW], "tables": [{"rows": ["a"], "columns": ["box_ap"] * 1001}]},
        ["table 1: columns is", "a list of 0 to 100 items"],
    ),
    "pattern that no regular expression survives": (
        {"rows": [{**ROW, "id": "a" * 100}], "tables": [{"rows": ["*a" * 90 + "*b"]}]},
        ["table 1", "no row '*a*a"],
    ),
    "images beyond number": (
        {"rows": [pretrain_row("p", data="shapes", images=10**9)]},
        ["row 'p'", "images is 1000000000"],
    ),
    "norm is a list": ({"rows": [pretrain_row("p", norm=["GN"])]}, ["row 'p'", "norm is ['GN']"]),
    "steps are text": ({"rows": [pretrain_row("p", steps="0.5")]}, ["row 'p'", "steps is '0.5'"]),
}


def test_shared_lists_and_long_texts_are_no_bomb(tmp_path: Path) -> None:
    """Aliases are counted where they are used, before anything is multiplied."""
    (tmp_path / "s.yaml").write_text("a: &a [" + "1," * 999 + "]\nrows: [" + "*a," * 99 + "]\n")
    with pytest.raises(ConfigError, match=r"suite .*s\.yaml line 2, column \d+: more than 50000 values"):
        load_suite(tmp_path / "s.yaml")


@pytest.mark.parametrize(
    ("pattern", "found"),
    [("a", ["a"]), ("*", ["a", "ab", "b/a"]), ("a*", ["a", "ab"]), ("*a", ["a", "b/a"]), ("*/*", ["b/a"]), ("a*a", [])],
)
def test_patterns(pattern: str, found: list[str]) -> None:
    rows = [Row(id=name) for name in ("a", "ab", "b/a")]
    if found:
        assert list(row_ids([pattern], rows, "x")) == found
    else:
        with pytest.raises(InvalidValue, match=r"no row 'a\*a'; the rows are a, ab, b/a$"):
            row_ids([pattern], rows, "x")


@pytest.mark.parametrize("name", BAD)
def test_bad_suites(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    content, words = BAD[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(content))
    assert main(["compare", "s.yaml", "--engine", "embedded"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("gn-det: error: ") and err.count("\n") == 1, err
    assert all(word in err for word in words), err
    assert [f.name for f in tmp_path.iterdir()] == ["s.yaml"]  # nothing was run or written


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name a suite"),
        (["nowhere.yaml"], "small.yaml"),
        (["small", "--configs", "gn_fpn.yaml"], "not both"),
        (["small", "--rows", "nobody"], "no row 'nobody'"),
        (["small", "--seeds", "0"], "--seeds is 0"),
        (["small", "--train-json", "a.json"], "--configs"),
        (["small", "SOLVER.BASE_LRR", "1"], "SOLVER.BASE_LRR"),
        (["--configs", "quickstart.yaml", "--train-json", "a.json", "--train-images", "i"], "val_json"),
        (["small", "--folds", "3"], "--folds, --train-json and the like need --configs"),
        (["--configs", "quickstart.yaml", "--folds", "3"], "--folds divides the images of --train-json"),
        (["--configs", "quickstart.yaml", "--folds", "1"], "--folds is 1; it must be from 2 to 100"),
        (
            ["--configs", "gn_fpn.yaml", "--folds", "2", "--seeds", "2", "--train-json", "a", "--train-images", "i"],
            "a fold is trained once",
        ),
    ],
)
def test_bad_words(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["compare", *words, "--engine", "embedded"]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and list(tmp_path.iterdir()) == []


def test_optional_rows_are_left_out_only_where_something_is_absent() -> None:
    plan = plan_of([ROW, {**ROW, "id": "b", "weights": "R-50-LN.pth", "optional": True}])
    assert plan.problems == () and [j.row.id for j in plan.jobs] == ["a"] and "R-50-LN.pth" in plan.left_out["b"]
    wrong = plan_of([{**ROW, "optional": True, "overrides": {"SOLVER.BASE_LR": -1}}])
    assert len(wrong.problems) == 1 and wrong.left_out == {}


def test_each_writes_a_row_for_every_combination() -> None:
    row = pretrain_row("{norm}_{batch}", norm="{norm}", batch_size="{batch}", lr="{lr}", labels={"n": "{norm}"})
    row["each"] = {"norm": ["BN", "GN"], "b": [{"batch": 4, "lr": 0.1}, {"batch": 8, "lr": 0.2}]}
    suite = parse_suite({"rows": [row]}, "s.yaml")
    assert [r.id for r in suite.rows] == ["BN_4", "BN_8", "GN_4", "GN_8"]
    assert suite.rows[3].settings["batch_size"] == 8 and suite.rows[3].settings["lr"] == 0.2
    assert suite.rows[2].labels == {"n": "GN"}


def test_defaults_are_of_a_kind_and_rows_win() -> None:
    content = {
        "defaults": {
            "seeds": 2,
            "detect": {"config": "quickstart.yaml", "overrides": {"SEED": 1, "SOLVER.GAMMA": 0.5}},
        },
        "rows": [{"id": "a", "overrides": {"SOLVER.GAMMA": 0.2}}, {"id": "b", "seeds": [7]}, pretrain_row("p")],
    }
    rows = {r.id: r for r in parse_suite(content, "s.yaml").rows}
    assert rows["a"].overrides == {"SEED": 1, "SOLVER.GAMMA": 0.2} and rows["a"].seeds == (1, 2)
    assert rows["b"].seeds == (7,) and rows["p"].settings["norm"] == "BN"
    with pytest.raises(ConfigError, match="mixes"):
        parse_suite({**content, "tables": [{"rows": ["a", "p"]}]}, "s.yaml")
