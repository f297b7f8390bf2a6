"""What the command line says, and how it ends, for runs that cannot go well."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gn_det.cli import main
from tests.faults.soak_case import train_words


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shapes")


def words(shapes: Path, output: Path, *more: str) -> list[str]:
    return train_words(shapes, output, "SOLVER.MAX_ITER", "1", "DATALOADER.NUM_WORKERS", "0", *more)


def with_val(arguments: list[str], path: Path, **changes: Any) -> list[str]:
    """The same arguments with another json for validation; a change to None leaves the key out."""
    at = arguments.index("--val-json") + 1
    content = {**json.loads(Path(arguments[at]).read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    return [*arguments[:at], str(path), *arguments[at + 1 :]]


REFUSED = {
    "random layers frozen": (
        ["MODEL.BACKBONE.FREEZE_AT", "2"],
        "MODEL.BACKBONE.FREEZE_AT would freeze layers at random values, but MODEL.WEIGHTS is empty; give MODEL.WEIGHTS",
    ),
    "random part frozen": (
        ["MODEL.FREEZE", "backbone"],
        "MODEL.FREEZE (backbone) would freeze layers at random values, but MODEL.WEIGHTS is empty; give MODEL.WEIGHTS",
    ),
    "weight of an unknown class": (
        ["MODEL.ROI_BOX_HEAD.CLASS_WEIGHTS", "[['sell', 2.0]]"],
        "MODEL.ROI_BOX_HEAD.CLASS_WEIGHTS: there is no class 'sell'; the classes are ",
    ),
    "weight of nothing": (
        ["MODEL.ROI_BOX_HEAD.CLASS_WEIGHTS", "[['ring', 0]]"],
        "command line: MODEL.ROI_BOX_HEAD.CLASS_WEIGHTS[0][1] is 0; it must be a number above 0",
    ),
    "recomputed BN": (
        ["MODEL.BACKBONE.RECOMPUTE", "True", "MODEL.RESNETS.NORM", "BN"],
        "MODEL.BACKBONE.RECOMPUTE True would count each batch twice in the statistics of MODEL.RESNETS.NORM BN",
    ),
    "batch beyond any machine": (
        ["SOLVER.IMS_PER_BATCH", "100000000000"],
        "command line: SOLVER.IMS_PER_BATCH is 100000000000; it must be an integer from 1 to 65536",
    ),
    "negative hours": (
        ["SOLVER.MAX_HOURS", "-1"],
        "command line: SOLVER.MAX_HOURS is -1.0; it must be a number from 0 up to 100000",
    ),
    "decay of 1": (
        ["SOLVER.EMA.DECAY", "1.0"],
        "command line: SOLVER.EMA.DECAY is 1.0; it must be a number from 0 to below 1",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(shapes: Path, tmp_path: Path, case: str, capsys: pytest.CaptureFixture[str]) -> None:
    keys, told = REFUSED[case]
    assert main(words(shapes, tmp_path / "run", *keys)) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"gn-det: error: {told}") and err.count("\n") == 1


def test_half_gn_and_a_schedule_too_short_for_scratch(
    shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*words(shapes, tmp_path, "MODEL.FPN.NORM="), "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "Only part of the model has GN (fpn: none); the published GN models use it everywhere" in out
    assert "MODEL.WEIGHTS is empty and the run has 0.1 epochs; published runs from scratch have at least 36" in out


def test_validation_sets_that_hold_nothing(shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No images: refused. No annotations: told, no best model, exit code 0; refused where AP must end the run."""
    plain = words(shapes, tmp_path / "run")
    assert main(with_val(plain, tmp_path / "a.json", images=[], annotations=[])) == 2
    assert "a.json: 'images' is missing or empty: give a COCO instances json" in capsys.readouterr().err
    patient = [*with_val(plain, tmp_path / "b.json", annotations=[]), "TEST.PATIENCE", "3", "TEST.EVAL_PERIOD", "1"]
    assert main(patient) == 2
    err = capsys.readouterr().err
    assert "b.json: has no object, so it gives no AP and TEST.PATIENCE 3 would stop the run for no reason" in err
    assert main(with_val(plain, tmp_path / "c.json", annotations=None)) == 0
    out = capsys.readouterr().out
    assert "c has no objects: there is no AP, and no model_best.pth is written." in out
    assert "segm/AP is undefined; model_best.pth is not written" in out
    assert not (tmp_path / "run" / "model_best.pth").exists() and (tmp_path / "run" / "model_final.pth").exists()


def test_a_validation_set_of_one_image(shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = words(shapes, tmp_path / "run")
    content = json.loads(Path(plain[plain.index("--val-json") + 1]).read_text())
    first = content["images"][:1]
    own = [a for a in content["annotations"] if a["image_id"] == first[0]["id"]]
    assert main(with_val(plain, tmp_path / "one.json", images=first, annotations=own)) == 0
    out = capsys.readouterr().out
    assert "one has few images (1): expect a noisy AP." in out
    assert "one.json has a single image, so its AP is almost meaningless; hold out more images." in out
