"""A real suite, tiny: backbones pre-trained, detection started from them, killed, resumed, reported."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from gn_det.cli import main

SMALL = {
    "MODEL.DEVICE": "cpu",
    "MODEL.RPN.PRE_NMS_TOPK_TRAIN": 50,
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": 20,
    "MODEL.RPN.PRE_NMS_TOPK_TEST": 20,
    "MODEL.RPN.POST_NMS_TOPK_TEST": 10,
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": 8,
    "INPUT.MIN_SIZE_TRAIN": [64],
    "INPUT.MAX_SIZE_TRAIN": 96,
    "INPUT.MIN_SIZE_TEST": 64,
    "INPUT.MAX_SIZE_TEST": 96,
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.IMS_PER_BATCH": 1,
    "SOLVER.MAX_ITER": 6,
    "SOLVER.CHECKPOINT_PERIOD": 2,
    "TEST.EVAL_PERIOD": 0,
}


@pytest.fixture()
def suite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from gn_det.data.shapes import make_shapes

    monkeypatch.chdir(tmp_path)
    data = {}
    for split, key, count in (("train", "train", 8), ("val", "val", 3)):
        made = make_shapes(tmp_path / "shapes", split, count)
        data |= {f"{key}_json": made.json_file, f"{key}_images": made.image_root}
    bn = {"MODEL.RESNETS.NORM": "FrozenBN", "MODEL.BACKBONE.FREEZE_AT": 2}
    pre = {"kind": "pretrain", "arch": "resnet18", "data": "shapes", "images": 40, "image_size": 32, "epochs": 1}
    content = {
        "name": "tiny",
        "defaults": {"detect": {"config": "quickstart.yaml", "data": data}},
        "overrides": SMALL,
        "rows": [
            {"id": "pretrain/bn", "norm": "BN", "batch_size": 20, "device": "cpu", **pre},
            {"id": "bn", "weights": "pretrain/bn", "overrides": bn, "reference": "fpn_bn"},
            {"id": "gn", "weights": "", "baseline": "bn", "reference": "fpn_gn"},
        ],
        "samples": {"images": 2},
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def outcome(folder: Path) -> list[dict[str, Any]]:
    """What must be equal, to the last bit, for a run that was killed and one that was not."""
    rows = json.loads((folder / "results.json").read_text())["rows"]
    keep = ("id", "status", "metrics", "difference", "findings", "parameters")
    return [{**{k: row[k] for k in keep}, "curves": [r["curve"] for r in row["runs"]]} for row in rows]


def test_dry_run_tells_how_long_each_row_trains(
    suite: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """8 images one at a time: 6 iterations as the suite says, 3 epochs are 24; written for 16, shown as run here."""
    assert main(["compare", str(suite), "--engine", "embedded", "--dry-run"]) == 0
    assert "quickstart.yaml (6 iterations of 1 images, 0.75 epochs)" in capsys.readouterr().out
    before = sorted(tmp_path.rglob("*"))
    made = tmp_path / "shapes"
    data = [
        word
        for split in ("train", "val")
        for word in (f"--{split}-json", f"{made}/{split}/instances.json", f"--{split}-images", f"{made}/{split}/images")
    ]
    words = [
        "--configs",
        "gn_fpn.yaml",
        "gn_c4.yaml",
        "--epochs",
        "3",
        "MODEL.WEIGHTS",
        "",
        "SOLVER.IMS_PER_BATCH",
        "1",
    ]
    words += ["MODEL.BACKBONE.FREEZE_AT", "0"]
    assert main(["compare", *data, "--engine", "embedded", "--dry-run", *words]) == 0
    out = capsys.readouterr().out
    assert "gn_fpn.yaml (24 iterations of 1 images, 3 epochs)" in out and "gn_c4.yaml (24 iterations" in out
    assert sorted(tmp_path.rglob("*")) == before


def test_cross_validation_on_own_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each of two folds is trained without its images and evaluated on them; a second start runs nothing."""
    from gn_det.data.shapes import make_shapes

    monkeypatch.chdir(tmp_path)
    keys = [word for key, value in SMALL.items() for word in (key, str(value))]
    made = make_shapes(tmp_path / "shapes", "train", 20)
    words = ["compare", "--train-json", made.json_file, "--train-images", made.image_root, "--folds", "2"]
    words += ["--engine", "embedded", "--output", "folds", "--configs", "quickstart.yaml", *keys]
    assert main([*words, "SOLVER.MAX_ITER", "2"]) == 0
    out = capsys.readouterr().out
    assert "[1/2] quickstart, fold 1 of 2: starting" in out and "[2/2] quickstart, fold 2 of 2: box AP" in out
    runs = sorted((tmp_path / "folds" / "runs" / "quickstart").iterdir())
    held = [{i["id"] for i in json.loads((run / "split" / "val.json").read_text())["images"]} for run in runs]
    assert len(held) == 2 and not held[0] & held[1] and len(held[0] | held[1]) == 20
    report = (tmp_path / "folds" / "report.md").read_text()
    assert "Cross-validation in 2 folds" in report and "| fold 1 | fold 2 | mean |" in report
    assert "standard deviation over folds" in report and "seeds" not in report
    (row,) = json.loads((tmp_path / "folds" / "results.json").read_text())["rows"]
    assert row["metrics"]["box_ap"]["n"] == 2 and row["interval"]["box_ap"]["half"] is not None
    assert main([*words, "SOLVER.MAX_ITER", "2"]) == 0
    assert capsys.readouterr().out.count("already done") == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_a_real_suite_killed_and_resumed(suite: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from gn_det.engine import hooks

    words = ["compare", str(suite), "--engine", "embedded", "--output"]
    assert main([*words, "whole"]) == 0
    child = os.fork()
    if child == 0:  # dies in the middle of the second detection row, behind its checkpoint of iteration 2
        save, saved = hooks.save_checkpoint, 0

        def dies(path: Path, payload: Any) -> None:
            nonlocal saved
            saved += "runs/gn/" in str(path)
            if saved == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            save(path, payload)

        hooks.save_checkpoint = dies  # type: ignore[assignment]
        try:
            main([*words, "cut"])
        finally:
            os._exit(1)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1])
    assert not Path("cut/results.json").exists()
    capfd.readouterr()
    assert main([*words, "cut"]) == 0
    said = capfd.readouterr().out
    assert "bn, seed 1: already done" in said and "gn, seed 1: resuming" in said and "iteration 1 done, 4 to go" in said

    whole, cut = outcome(Path("whole")), outcome(Path("cut"))
    # the weights file of a pre-training holds its date; what was learned from it is equal
    assert cut == whole
    bn, gn = whole[1], whole[2]
    assert bn["status"] == gn["status"] == "done" and set(bn["metrics"]) >= {"box_ap", "mask_ap"}
    assert gn["parameters"] > 3e6 and gn["difference"]["box_ap"]["half"] is None
    runs = {r["id"]: r["runs"][0] for r in json.loads(Path("whole/results.json").read_text())["rows"]}
    assert all(v > 0 for v in runs["gn"]["cost"].values()) and runs["gn"]["version"] == runs["bn"]["version"]
    html = Path("whole/report.html").read_text()
    assert html.count("data:image/jpeg;base64,") == 6 and "MODEL:" in html  # truth, bn, gn: two images each
    assert sorted(p.name for p in Path("whole").iterdir() if not p.name.startswith(".")) == [
        "report.html", "report.md", "results.json", "runs", "samples",
    ]  # fmt: skip
    capfd.readouterr()
    assert main([*words, "whole", "--report-only"]) == 0
    assert outcome(Path("whole")) == whole
