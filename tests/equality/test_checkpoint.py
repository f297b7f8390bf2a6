"""Checkpoints cross over between the engines: same names, same numbers, without renaming."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2.config", reason="compares with an installed Detectron2")

from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import get_cfg as detectron2_cfg
from detectron2.modeling import build_model as build_detectron2

from gn_det.checkpoint.convert import convert
from gn_det.checkpoint.io import save_checkpoint
from gn_det.checkpoint.meta import build_meta
from gn_det.checkpoint.weights import load_weights
from gn_det.config import get_cfg
from gn_det.modeling.build import build_model
from tests.checkpoint import layouts
from tests.checkpoint.skeleton import caffe2_blobs

pytestmark = pytest.mark.detectron2

# Half width: names and depth are R-50's, 32 groups still divide, files stay small.
COMMON = {
    "MODEL.META_ARCHITECTURE": "GeneralizedRCNN",
    "MODEL.DEVICE": "cpu",
    "MODEL.MASK_ON": True,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 32,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 32,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
    "MODEL.ROI_HEADS.NUM_CLASSES": 5,
}
STYLES = {
    "FPN": {
        "MODEL.BACKBONE.NAME": "build_resnet_fpn_backbone",
        "MODEL.RESNETS.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
        "MODEL.FPN.IN_FEATURES": ["res2", "res3", "res4", "res5"],
        "MODEL.FPN.OUT_CHANNELS": 32,
        "MODEL.FPN.NORM": "GN",
        "MODEL.ANCHOR_GENERATOR.SIZES": [[32], [64], [128], [256], [512]],
        "MODEL.RPN.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
        "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
        "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3", "p4", "p5"],
        "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
        "MODEL.ROI_BOX_HEAD.NUM_CONV": 4,
        "MODEL.ROI_BOX_HEAD.CONV_DIM": 32,
        "MODEL.ROI_BOX_HEAD.NUM_FC": 1,
        "MODEL.ROI_BOX_HEAD.FC_DIM": 64,
        "MODEL.ROI_BOX_HEAD.NORM": "GN",
        "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": 7,
        "MODEL.ROI_MASK_HEAD.NAME": "MaskRCNNConvUpsampleHead",
        "MODEL.ROI_MASK_HEAD.NUM_CONV": 4,
        "MODEL.ROI_MASK_HEAD.CONV_DIM": 32,
        "MODEL.ROI_MASK_HEAD.NORM": "GN",
    },
    "C4": {
        "MODEL.BACKBONE.NAME": "build_resnet_backbone",
        "MODEL.ROI_HEADS.NAME": "Res5ROIHeads",
        "MODEL.ROI_MASK_HEAD.CONV_DIM": 32,
    },
}
NORMS = {"gn": "GN", "affine": "FrozenBN", "stats": "FrozenBN"}


def engines(style: str, norm: str, stride_in_1x1: bool = False):
    """(their model, our model, our cfg), random and different from each other."""
    keys = [
        x
        for item in {
            **COMMON,
            **STYLES[style],
            "MODEL.RESNETS.NORM": norm,
            "MODEL.RESNETS.STRIDE_IN_1X1": stride_in_1x1,
        }.items()
        for x in item
    ]
    theirs, ours = detectron2_cfg(), get_cfg()
    theirs.merge_from_list(keys)
    ours.merge_from_list(keys)
    torch.manual_seed(1)
    reference = build_detectron2(theirs)
    torch.manual_seed(2)
    return reference, build_model(ours), ours


def randomize(model: torch.nn.Module) -> None:
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.uniform_(0.1, 1.0)


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


@pytest.mark.parametrize("style", sorted(STYLES))
@pytest.mark.parametrize("norm", ["GN", "BN", "FrozenBN"])
def test_ours_into_detectron2(tmp_path: Path, norm: str, style: str) -> None:
    theirs, ours, cfg = engines(style, norm)
    randomize(ours)
    meta = build_meta(cfg, list("abcde"), range(5), iteration=9)
    save_checkpoint(tmp_path / "m.pth", {"model": ours.state_dict(), "iteration": 9, "gn_det": meta})
    checkpointer = DetectionCheckpointer(theirs)
    found = []
    checkpointer._log_incompatible_keys = found.append
    rest = checkpointer.load(str(tmp_path / "m.pth"))
    assert same(theirs, ours)
    assert found and not (found[0].missing_keys or found[0].unexpected_keys or found[0].incorrect_shapes)
    assert rest["iteration"] == 9


@pytest.mark.parametrize("style", sorted(STYLES))
@pytest.mark.parametrize("norm", ["GN", "BN", "FrozenBN"])
def test_detectron2s_into_ours(tmp_path: Path, norm: str, style: str) -> None:
    theirs, ours, cfg = engines(style, norm)
    randomize(theirs)
    DetectionCheckpointer(theirs, str(tmp_path)).save("model_final", iteration=9)
    report = load_weights(ours, tmp_path / "model_final.pth", cfg, require_all=True)
    assert same(theirs, ours) and not report.unexpected
    # The zoo's form: numpy arrays in a pickle.
    arrays = {k: v.numpy() for k, v in theirs.state_dict().items()}
    zoo = tmp_path / "model_final_abc.pkl"
    zoo.write_bytes(pickle.dumps({"model": arrays, "__author__": "Detectron2 Model Zoo"}))
    randomize(ours)
    load_weights(ours, zoo, cfg, require_all=True)
    assert same(theirs, ours)


@pytest.mark.parametrize("style", sorted(STYLES))
@pytest.mark.parametrize("kind", sorted(NORMS))
def test_caffe2_backbones_become_the_same_numbers(tmp_path: Path, kind: str, style: str) -> None:
    theirs, ours, cfg = engines(style, NORMS[kind], stride_in_1x1=kind != "gn")
    ours.load_state_dict(theirs.state_dict())
    bare = {}
    for name, value in ours.state_dict().items():
        for prefix in ("backbone.bottom_up.", "backbone.", "roi_heads."):
            if name.startswith((prefix + "stem", prefix + "res")):
                bare[name[len(prefix) :]] = tuple(value.shape)
    path = tmp_path / "R-50.pkl"
    path.write_bytes(pickle.dumps(caffe2_blobs(50, kind, bare), 2))
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    DetectionCheckpointer(theirs).load(str(path))
    report = load_weights(ours, path, cfg)
    assert same(theirs, ours)
    changed = {k for k, v in ours.state_dict().items() if not torch.equal(v, before[k])}
    # Folded BN leaves the mean at the 0 it already has.
    assert changed == {n for n in report.loaded if kind != "affine" or not n.endswith("running_mean")}
    assert len(report.loaded) == {"gn": 159, "affine": 265, "stats": 265}[kind]


def test_converted_files_load_in_detectron2_without_renaming(tmp_path: Path) -> None:
    """A torchvision ResNet through gn-det convert --fold: Detectron2 finds the same numbers as we do."""
    theirs, ours, cfg = engines("FPN", "GN")
    ours.load_state_dict(theirs.state_dict())
    shapes = {k: tuple(v.shape) for k, v in ours.state_dict().items()}
    arrays = layouts.arrays(layouts.layered_backbone(), shapes, "backbone.bottom_up.")
    torch.save({name: torch.from_numpy(value) for name, value in arrays.items()}, tmp_path / "tv.pth")
    convert(tmp_path / "tv.pth", tmp_path / "d2.pth", fold_stem=True)
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    DetectionCheckpointer(theirs).load(str(tmp_path / "d2.pth"))
    load_weights(ours, tmp_path / "tv.pth", cfg)
    assert same(theirs, ours)
    assert sum(not torch.equal(v, before[k]) for k, v in ours.state_dict().items()) == 159


def test_caffe2_detectors_become_the_same_numbers(tmp_path: Path) -> None:
    """projects/GN's model_final.pkl: names, class order, momentum (Detectron2 does not check the mean)."""
    theirs, ours, cfg = engines("FPN", "GN")
    ours.load_state_dict(theirs.state_dict())
    shapes = {k: tuple(v.shape) for k, v in ours.state_dict().items()}
    blobs = layouts.arrays(layouts.caffe2_detector(), shapes)
    layouts.background_first(blobs, "bbox_pred_", "mask_fcn_logits_", ("w", "b"))
    blobs |= {f"{name}_momentum": value for name, value in blobs.items()}
    path = layouts.write_pickle(tmp_path / "model_final.pkl", {"blobs": blobs, "cfg": "NUM_GPUS: 8\n"})
    before = {k: v.clone() for k, v in ours.state_dict().items()}
    DetectionCheckpointer(theirs).load(str(path))
    cfg.MODEL.PIXEL_MEAN = [102.9801, 115.9465, 122.7717]
    load_weights(ours, path, cfg, require_all=True)
    assert same(theirs, ours)
    assert all(not torch.equal(v, before[k]) for k, v in ours.state_dict().items())
