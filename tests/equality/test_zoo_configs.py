"""Detectron2's own YAML files run unchanged on both engines: loaded by their zoo names, shown, trained, evaluated."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2.config", reason="reads an installed Detectron2's files")

from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

from gn_det.cli import main
from gn_det.config import load_config
from gn_det.data.shapes import make_shapes
from gn_det.modeling import build_model

pytestmark = pytest.mark.detectron2

_MASK = "COCO-InstanceSegmentation/mask_rcnn_R_50_"
MISC = [
    f"Misc/{name}_gn.yaml" for name in ("mask_rcnn_R_50_FPN_3x", *(f"scratch_mask_rcnn_R_50_FPN_{n}x" for n in (3, 9)))
]
ZOO = [*MISC, *(f"{_MASK}{kind}_{schedule}x.yaml" for kind in ("C4", "FPN", "DC5") for schedule in (1, 3))]

#: Typed on the command line: everything small but the structure, from random weights.
SMALL = {
    "MODEL.WEIGHTS": "",
    "MODEL.BACKBONE.FREEZE_AT": "0",
    "MODEL.DEVICE": "cpu",
    "MODEL.PIXEL_STD": "[57.375, 57.12, 58.395]",
    "MODEL.RESNETS.STEM_OUT_CHANNELS": "32",
    "MODEL.RESNETS.RES2_OUT_CHANNELS": "64",
    "MODEL.RESNETS.WIDTH_PER_GROUP": "32",
    "MODEL.FPN.OUT_CHANNELS": "32",
    "MODEL.ROI_BOX_HEAD.CONV_DIM": "32",
    "MODEL.ROI_BOX_HEAD.FC_DIM": "32",
    "MODEL.ROI_MASK_HEAD.CONV_DIM": "32",
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": "8",
    "MODEL.RPN.PRE_NMS_TOPK_TEST": "50",
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": "20",
    "MODEL.RPN.POST_NMS_TOPK_TEST": "10",
    "INPUT.MIN_SIZE_TRAIN": "(64,)",
    "INPUT.MIN_SIZE_TEST": "64",
    "INPUT.MASK_FORMAT": "bitmask",
    "DATALOADER.NUM_WORKERS": "0",
    "SOLVER.IMS_PER_BATCH": "2",
    "SOLVER.BASE_LR": "0.0001",
    "SOLVER.STEPS": "()",
    "SOLVER.MAX_ITER": "2",
    "TEST.EVAL_PERIOD": "0",
}
SMALL_WORDS = [word for pair in SMALL.items() for word in pair]


@pytest.fixture(scope="module")
def coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A datasets folder in COCO's layout with its 80 categories: 4 training images, 2 to evaluate."""
    root = tmp_path_factory.mktemp("datasets")
    things = [{"id": c["id"], "name": c["name"]} for c in COCO_CATEGORIES if c["isthing"]]
    (root / "coco" / "annotations").mkdir(parents=True)
    for split, count in (("train", 4), ("val", 2)):
        source = make_shapes(root / "made", split, count)
        content = json.loads(Path(source.json_file).read_text())
        known = {c["id"]: things[i]["id"] for i, c in enumerate(content["categories"])}
        for annotation in content["annotations"]:
            annotation["category_id"] = known[annotation["category_id"]]
        content["categories"] = things
        (root / "coco" / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
        shutil.copytree(source.image_root, root / "coco" / f"{split}2017")
    return root


@pytest.mark.parametrize("name", ZOO)
def test_loads_and_builds_at_full_size(name: str) -> None:
    cfg = load_config(name, ["MODEL.ROI_HEADS.NUM_CLASSES", "80"])
    with torch.device("meta"):
        model = build_model(cfg)
    assert any(isinstance(m, torch.nn.GroupNorm) for m in model.modules()) == ("_gn" in name)


@pytest.mark.parametrize("engine", ["embedded", "detectron2"])
@pytest.mark.parametrize("name", ZOO)
def test_dry_run_trains_and_evaluates(
    name: str, engine: str, coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("DETECTRON2_DATASETS", str(coco))
    command = ["train", "--engine", engine, "--config", name, "--output", str(tmp_path / "run")]
    assert main([*command, "--dry-run", *SMALL_WORDS]) == 0, capsys.readouterr().err
    assert not (tmp_path / "run" / "model_final.pth").exists()
    assert main([*command, *SMALL_WORDS]) == 0, capsys.readouterr().err
    payload = torch.load(tmp_path / "run" / "model_final.pth", weights_only=True)
    assert payload["iteration"] == 1
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.json").read_text().splitlines()]
    assert {"bbox/AP", "segm/AP", "total_loss"} <= {key for line in lines for key in line}
