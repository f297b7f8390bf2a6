"""Loading: every name of the published backbones, what is re-initialized, what is refused and with which keys."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from gn_det.about import __version__
from gn_det.checkpoint.convert import convert
from gn_det.checkpoint.formats import caffe2
from gn_det.checkpoint.io import save_checkpoint
from gn_det.checkpoint.meta import build_meta
from gn_det.checkpoint.weights import format_report, load_weights
from gn_det.errors import WeightsError
from tests.checkpoint.layouts import write_pickle
from tests.checkpoint.skeleton import backbone_shapes, caffe2_blobs, config, detector_shapes, module, random_state

NORM = {"gn": "GN", "affine": "FrozenBN", "stats": "BN"}


def refused(*args: object, **keywords: object) -> str:
    """The message, in one line; the model must be untouched."""
    before = {k: v.clone() for k, v in args[0].state_dict().items()}  # type: ignore[attr-defined]
    with pytest.raises(WeightsError) as caught:
        load_weights(*args, **keywords)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in args[0].state_dict().items())  # type: ignore[attr-defined]
    return str(caught.value)


def saved(path: Path, shapes: dict, seed: int = 0, **more: object) -> Path:
    save_checkpoint(path, {"model": random_state(shapes, seed), **more})
    return path


# ------------------------------------------------------------------------------------------------ backbones, FPN and C4


@pytest.mark.parametrize("style", ["FPN", "C4"])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("norm", ["gn", "affine", "stats"])
def test_caffe2_backbone(tmp_path: Path, norm: str, wrapped: bool, style: str) -> None:
    cfg = config(NORM[norm], MODEL__RESNETS__STRIDE_IN_1X1=norm != "gn")
    blobs = caffe2_blobs(50, norm, backbone_shapes(50, NORM[norm]))
    path = write_pickle(tmp_path / "R-50.pkl", {"blobs": blobs} if wrapped else blobs)
    model = module(detector_shapes(50, NORM[norm], style))
    report = load_weights(model, path, cfg)
    state = model.state_dict()
    for blob, value in blobs.items():
        name = caffe2.map_name(blob)
        if name:
            prefix = {"FPN": "backbone.bottom_up."}.get(style, "roi_heads." if name.startswith("res5") else "backbone.")
            assert torch.equal(state[prefix + name], torch.from_numpy(value))
    if norm == "affine":
        means = [v for n, v in state.items() if n.endswith("running_mean") and "bottom_up" in n]
        variances = [v for n, v in state.items() if n.endswith("running_var") and "bottom_up" in n]
        # What Detectron2 leaves in a FrozenBN of a folded source.
        assert all(bool((v == 0).all()) for v in means) and all(bool((v == 1).all()) for v in variances)
    heads = [n for n in state if n.startswith(("backbone.fpn", "proposal", "roi_heads.")) and "roi_heads.res5" not in n]
    assert sorted(report.missing) == sorted(heads)
    assert not report.unexpected and not report.shape_differs and not report.reinitialized
    assert "fc1000_w" in report.ignored or "pred_w" in report.ignored
    assert "ResNet-50" in report.kind
    text = format_report(report)
    assert text.count("not in the file") == (4 if style == "FPN" else 3)


def test_report_reads_well(tmp_path: Path) -> None:
    path = write_pickle(tmp_path / "R-50-GN.pkl", caffe2_blobs(50, "gn", backbone_shapes()))
    report = load_weights(module(detector_shapes()), str(path), config())
    lines = format_report(report).splitlines()
    assert lines[0] == f"Weights: {path} (Caffe2 ImageNet backbone, ResNet-50, GN)"
    assert [line.split()[:2] for line in lines[1:6]] == [
        ["stem", "3/3"],
        ["res2", "30/30"],
        ["res3", "39/39"],
        ["res4", "57/57"],
        ["res5", "30/30"],
    ]
    assert all(len(line) < 140 for line in lines)
    assert lines[-1] == "  not used by a detector: pred_w, pred_b"


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
@pytest.mark.parametrize("plain", [False, True])
def test_torch_files_with_and_without_wrapping(tmp_path: Path, prefix: str, plain: bool) -> None:
    shapes = detector_shapes()
    state = random_state(shapes)
    content = {prefix + n: v for n, v in state.items()}
    torch.save(content if plain else {"model": content, "iteration": 3}, tmp_path / "m.pth")
    model = module(shapes)
    report = load_weights(model, tmp_path / "m.pth", config(), require_all=True)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert sorted(report.loaded) == sorted(state) and not report.missing


def test_detectron2_zoo_pickle(tmp_path: Path) -> None:
    shapes = detector_shapes(norm="BN")
    state = random_state(shapes)
    arrays = {n: v.numpy() for n, v in state.items()} | {
        "pixel_mean": np.array([103.53, 116.28, 123.675], np.float32).reshape(3, 1, 1),
        "pixel_std": np.ones((3, 1, 1), np.float32),
        "proposal_generator.anchor_generator.cell_anchors.0": np.ones((3, 4)),
    }
    path = write_pickle(tmp_path / "model_final.pkl", {"model": arrays, "__author__": "Detectron2 Model Zoo"}, 4)
    model = module(shapes)
    report = load_weights(model, path, config("BN"), require_all=True)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert len(report.ignored) == 3 and "Detectron2 Model Zoo" in report.kind
    message = refused(model, path, config("BN", MODEL__PIXEL_STD=[58.0, 57.0, 57.0]))
    assert "MODEL.PIXEL_STD [1,1,1]" in message


def test_backbone_under_detectron2s_names_with_heuristics(tmp_path: Path) -> None:
    """ImageNet backbones reconverted for Detectron2: bare names, classifier in the stem."""
    state = random_state(backbone_shapes(50, "FrozenBN"))
    arrays = {n: v.numpy() for n, v in state.items()} | {"stem.fc.weight": np.ones((2, 2), np.float32)}
    path = write_pickle(tmp_path / "b.pkl", {"model": arrays, "__author__": "x", "matching_heuristics": True})
    model = module(detector_shapes(50, "FrozenBN", "C4"))
    report = load_weights(model, path, config("FrozenBN"))
    loaded = model.state_dict()
    assert torch.equal(loaded["roi_heads.res5.0.conv1.weight"], state["res5.0.conv1.weight"])
    assert len(report.loaded) == len(state) and report.ignored == ("stem.fc.weight",)


def test_batch_norm_counters_come_and_go(tmp_path: Path) -> None:
    frozen, counting = detector_shapes(norm="FrozenBN", head=""), detector_shapes(norm="BN", head="")
    report = load_weights(module(frozen), saved(tmp_path / "bn.pth", counting), config("FrozenBN"), require_all=True)
    assert all(name.endswith("num_batches_tracked") for name in report.ignored) and len(report.ignored) == 53
    load_weights(module(counting), saved(tmp_path / "f.pth", frozen), config("SyncBN"), require_all=True)


# ------------------------------------------------------------------------------------------------------ classes, heads


def test_other_classes_reinitialize_the_predictors_alone(tmp_path: Path) -> None:
    path = saved(tmp_path / "coco.pth", detector_shapes(classes=8))
    model = module(detector_shapes(classes=2))
    report = load_weights(model, path, config(classes=2))
    expected = [
        f"roi_heads.{layer}.{kind}"
        for layer in ("box_predictor.cls_score", "box_predictor.bbox_pred", "mask_head.predictor")
        for kind in ("weight", "bias")
    ]
    assert list(report.reinitialized) == expected and not report.missing and not report.shape_differs
    untouched = [n for n, v in model.state_dict().items() if bool((v == -1).all())]
    assert untouched == expected
    assert format_report(report).count("re-initialized, expected (classes differ)") == 2
    message = refused(module(detector_shapes(classes=2)), path, config(classes=2), require_all=True)
    assert "trained with 8 classes" in message and "MODEL.ROI_HEADS.NUM_CLASSES is 2" in message


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (("cat", "dog"), ("cow", "cat", "dog")),  # added
        (("cat", "dog", "cow"), ("cow", "dog")),  # removed and reordered
        (("cat", "dog"), ("dog", "cat")),  # reordered alone
        (("cat", "dog"), ("cat", "hen")),  # as many, one of them new
    ],
)
def test_rows_of_classes_are_kept_by_name(tmp_path: Path, old: tuple[str, ...], new: tuple[str, ...]) -> None:
    """Every predictor's rows of a class that both know, and the background's; rows of new classes stay as built."""
    shapes = detector_shapes(classes=len(old))
    meta = build_meta(config(classes=len(old)), old, range(1, len(old) + 1))
    path = saved(tmp_path / "own.pth", shapes, gn_det=meta)
    theirs = random_state(shapes, 0)
    model = module(detector_shapes(classes=len(new)))
    cfg = config(classes=len(new), MODEL__CLASS_NAMES=new)
    report = load_weights(model, path, cfg)
    state = model.state_dict()
    for layer, width in (("box_predictor.cls_score", 1), ("box_predictor.bbox_pred", 4), ("mask_head.predictor", 1)):
        for kind in ("weight", "bias"):
            ours, before = (s[f"roi_heads.{layer}.{kind}"] for s in (state, theirs))
            for k, name in enumerate(new):
                rows = ours[k * width : (k + 1) * width]
                if name in old:
                    at = old.index(name) * width
                    assert torch.equal(rows, torch.as_tensor(before[at : at + width]))
                else:
                    assert bool((rows == -1).all())
            if "cls_score" in layer:
                assert torch.equal(ours[-1], torch.as_tensor(before[-1]))
    assert not report.reinitialized and not report.missing
    text = format_report(report)
    assert f"kept by name: {', '.join(n for n in new if n in old)}" in text
    for what, names in (("new and initialized", set(new) - set(old)), ("only in the file", set(old) - set(new))):
        assert (f"{what}: {', '.join(names)}" in text) == bool(names)


def test_rows_are_not_rearranged_where_they_are_needed_as_they_are(tmp_path: Path) -> None:
    """Evaluation takes the file's classes as they are, and classes without a common name are another task."""
    shapes = detector_shapes(classes=2)
    path = saved(tmp_path / "own.pth", shapes, gn_det=build_meta(config(classes=2), ("cat", "dog"), (1, 2)))
    model = module(shapes)
    load_weights(model, path, config(classes=2, MODEL__CLASS_NAMES=("dog", "cat")), require_all=True)
    name = "roi_heads.box_predictor.cls_score.weight"
    assert torch.equal(model.state_dict()[name], torch.as_tensor(random_state(shapes, 0)[name]))
    report = load_weights(
        module(detector_shapes(classes=3)), path, config(classes=3, MODEL__CLASS_NAMES=("a", "b", "c"))
    )
    assert report.reinitialized
    message = refused(module(detector_shapes(classes=3)), path, config(classes=3), require_all=True)
    assert "trained with 2 classes" in message


def test_evaluation_refuses_a_mere_backbone(tmp_path: Path) -> None:
    path = write_pickle(tmp_path / "x.pkl", caffe2_blobs(50, "gn", backbone_shapes()))
    message = refused(module(detector_shapes()), path, config(), require_all=True)
    assert "no weights for fpn" in message and "trained detector" in message


def test_mask_head_only_on_one_side(tmp_path: Path) -> None:
    """Fine-tuning boxes from a mask model, or masks from a box model, is meant."""
    with_masks = detector_shapes()
    boxes = {n: s for n, s in with_masks.items() if "mask_head" not in n}
    report = load_weights(module(boxes), saved(tmp_path / "m.pth", with_masks), config(), require_all=True)
    assert set(report.unexpected) == set(with_masks) - set(boxes)
    assert "only in the file" in format_report(report)
    report = load_weights(module(with_masks), saved(tmp_path / "b.pth", boxes), config())
    assert set(report.missing) == set(with_masks) - set(boxes)


def test_foreign_heads_do_no_harm_but_backbone_strays_do(tmp_path: Path) -> None:
    shapes = detector_shapes()
    extra = {"sem_seg_head.predictor.weight": (2, 2, 1, 1)}
    report = load_weights(module(shapes), saved(tmp_path / "p.pth", shapes | extra), config(), require_all=True)
    assert report.unexpected == list(extra)
    stray = {"backbone.bottom_up.res2.0.conv9.weight": (2, 2)}
    message = refused(module(shapes), saved(tmp_path / "s.pth", shapes | stray), config())
    assert "res2: only in the file: backbone.bottom_up.res2.0.conv9.weight" in message
    message = refused(module(shapes), saved(tmp_path / "t.pth", shapes | {"backbone.x": (1,)}), config())
    assert "backbone.x" in message


# ------------------------------------------------------------------------------------------------------------ refusals


def test_one_unmatched_tensor_of_the_backbone(tmp_path: Path) -> None:
    shapes = backbone_shapes()
    blobs = caffe2_blobs(50, "gn", shapes)
    lost = blobs.pop("res4_3_branch2b_gn_s")
    blobs["res4_3_branch2b_gn_scale"] = lost
    path = write_pickle(tmp_path / "x.pkl", blobs)
    model = module(detector_shapes())
    message = refused(model, path, config())
    assert "res4: not in the file: backbone.bottom_up.res4.3.conv2.norm.weight" in message
    assert "res4_3_branch2b_gn_scale" in message and "MODEL.RESNETS" in message
    report = load_weights(model, f"{path}?allow_partial=True", config())
    assert report.unexpected == ["res4_3_branch2b_gn_scale"]
    state = model.state_dict()
    assert bool((state["backbone.bottom_up.res4.3.conv2.norm.weight"] == -1).all())
    assert torch.equal(state["backbone.bottom_up.stem.conv1.weight"], torch.from_numpy(blobs["conv1_w"]))


def test_shape_of_the_backbone(tmp_path: Path) -> None:
    shapes = detector_shapes()
    name = "backbone.bottom_up.stem.conv1.weight"
    path = saved(tmp_path / "gray.pth", shapes | {name: (4, 1, 7, 7)})
    model = module(shapes)
    message = refused(model, path, config())
    assert f"of other shape: {name} (4, 1, 7, 7) in the file, (4, 3, 7, 7) in the model" in message
    report = load_weights(model, f"{path}?allow_partial=True", config())
    assert list(report.shape_differs) == [name] and "of other shape" in format_report(report)


def test_head_that_fits_only_partly_names_its_keys(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pth", detector_shapes(head=""))
    message = refused(module(detector_shapes()), path, config())
    assert "MODEL.FPN.{NORM,OUT_CHANNELS,IN_FEATURES}" in message and "MODEL.ROI_BOX_HEAD.{NORM" in message


def cascade_shapes(stages: int, classes: int = 3) -> dict:
    """A detector with class-agnostic box heads in a row."""
    shapes = {}
    for name, shape in detector_shapes(classes=classes).items():
        shape = (4, *shape[1:]) if "bbox_pred" in name else shape
        found = re.match(r"(roi_heads\.(?:box_head|box_predictor))\.(.+)", name)
        shapes |= {f"{found[1]}.{k}.{found[2]}": shape for k in range(stages)} if found else {name: shape}
    return shapes


@pytest.mark.parametrize(
    ("theirs", "ours", "named"),
    [
        (3, 2, "holds 3 cascade stages, but the config describes 2 cascade stages: set MODEL.ROI_HEADS.NAME Cascade"),
        (
            3,
            0,
            "describes no cascade: set MODEL.ROI_HEADS.NAME CascadeROIHeads and MODEL.ROI_BOX_CASCADE_HEAD.IOUS of 3",
        ),
        (
            0,
            3,
            "holds no cascade, but the config describes 3 cascade stages: set MODEL.ROI_HEADS.NAME StandardROIHeads",
        ),
    ],
)
def test_stages_of_a_cascade(tmp_path: Path, theirs: int, ours: int, named: str) -> None:
    in_file, in_model = (cascade_shapes(n) if n else detector_shapes() for n in (theirs, ours))
    path = saved(tmp_path / "w.pth", in_file)
    assert named in refused(module(in_model), path, config())
    report = load_weights(module(in_model), f"{path}?allow_partial=True", config())
    assert any("fpn" in name for name in report.loaded) and not any("box_head.2" in name for name in report.loaded)


def test_other_classes_of_a_cascade(tmp_path: Path) -> None:
    """The scores of each stage begin anew, the class-agnostic boxes do not."""
    path = saved(tmp_path / "w.pth", cascade_shapes(3, classes=8))
    report = load_weights(module(cascade_shapes(3)), path, config())
    anew = [f"roi_heads.box_predictor.{k}.cls_score" for k in range(3)] + ["roi_heads.mask_head.predictor"]
    assert sorted(report.reinitialized) == sorted(f"{n}.{kind}" for n in anew for kind in ("weight", "bias"))
    message = refused(module(cascade_shapes(3)), path, config(), require_all=True)
    assert "trained with 8 classes" in message


@pytest.mark.parametrize(("file_depth", "model_depth"), [(101, 50), (50, 101), (34, 50), (50, 34)])
def test_depth(tmp_path: Path, file_depth: int, model_depth: int) -> None:
    path = saved(tmp_path / "w.pth", detector_shapes(file_depth))
    model, cfg = module(detector_shapes(model_depth)), config(depth=model_depth)
    for option in ("", "?allow_partial=True"):
        message = refused(model, f"{path}{option}", cfg)
        assert f"holds ResNet-{file_depth}" in message and f"config describes ResNet-{model_depth}" in message
        assert f"MODEL.RESNETS.DEPTH {file_depth}" in message


def test_style(tmp_path: Path) -> None:
    path = saved(tmp_path / "w.pth", detector_shapes(style="C4"))
    message = refused(module(detector_shapes()), path, config())
    assert "C4 detector" in message and "MODEL.BACKBONE.NAME build_resnet_backbone" in message


@pytest.mark.parametrize(
    ("in_file", "in_config", "named"),
    [
        ("FrozenBN", "GN", "these weights are BN, but the config says 'GN': set MODEL.RESNETS.NORM 'BN'"),
        ("GN", "FrozenBN", "these weights are GN, LN or IN, but the config says 'FrozenBN'"),
        ("GN", "", "these weights are GN, LN or IN, but the config says ''"),
        ("", "GN", "these weights are no norm, but the config says 'GN'"),
    ],
)
def test_norm(tmp_path: Path, in_file: str, in_config: str, named: str) -> None:
    path = saved(tmp_path / "w.pth", detector_shapes(norm=in_file))
    model = module(detector_shapes(norm=in_config))
    message = refused(model, path, config(in_config))
    assert named in message and "MODEL.RESNETS.NORM" in message
    report = load_weights(model, f"{path}?allow_partial=True", config(in_config))
    assert len(report.notes) == 1 and not any("bottom_up" in n and ".norm." in n for n in report.loaded)
    assert "backbone.bottom_up.stem.conv1.weight" in report.loaded


def test_folded_bn_suits_frozen_bn_alone(tmp_path: Path) -> None:
    path = write_pickle(tmp_path / "x.pkl", caffe2_blobs(50, "affine", backbone_shapes(50, "BN")))
    for norm in ("BN", "GN"):
        cfg = config(norm, MODEL__RESNETS__STRIDE_IN_1X1=True)
        message = refused(module(detector_shapes(norm=norm)), path, cfg)
        assert "BN folded into scale and shift" in message and "MODEL.RESNETS.NORM 'FrozenBN'" in message


def test_groups(tmp_path: Path) -> None:
    path = write_pickle(tmp_path / "x.pkl", caffe2_blobs(50, "gn", backbone_shapes()))
    for keys in ({"MODEL__GN__NUM_GROUPS": 16}, {"MODEL__GN__CHANNELS_PER_GROUP": 16}):
        message = refused(module(detector_shapes()), path, config(**keys))
        assert "need: MODEL.GN.NUM_GROUPS 32" in message or "need: MODEL.GN.CHANNELS_PER_GROUP 0" in message


@pytest.mark.parametrize(
    ("norm", "keys", "named"),
    [
        ("gn", {"INPUT__FORMAT": "RGB"}, "INPUT.FORMAT BGR"),
        ("gn", {"MODEL__PIXEL_STD": [57.375, 57.12, 58.395]}, "MODEL.PIXEL_STD [1,1,1]"),
        ("gn", {"MODEL__PIXEL_MEAN": [123.675, 116.28, 103.53]}, "MODEL.PIXEL_MEAN [103.53,116.28,123.675]"),
        ("gn", {"MODEL__RESNETS__STRIDE_IN_1X1": True}, "MODEL.RESNETS.STRIDE_IN_1X1 False"),
        ("affine", {}, "MODEL.RESNETS.STRIDE_IN_1X1 True"),
        ("stats", {"INPUT__FORMAT": "RGB"}, "need: INPUT.FORMAT BGR MODEL.RESNETS.STRIDE_IN_1X1 True"),
    ],
)
def test_preprocessing(tmp_path: Path, norm: str, keys: dict, named: str) -> None:
    path = write_pickle(tmp_path / "x.pkl", caffe2_blobs(50, norm, backbone_shapes(50, NORM[norm])))
    message = refused(module(detector_shapes(norm=NORM[norm])), path, config(NORM[norm], **keys))
    assert named in message


def test_torchvisions_backbone_of_detectron2_is_rgb(tmp_path: Path) -> None:
    """Detectron2's converted torchvision backbone looks like any other: its published place tells, and it is folded."""
    folder = tmp_path / "detectron2" / "ImageNetPretrained" / "torchvision"
    folder.mkdir(parents=True)
    state = random_state(backbone_shapes(50, "FrozenBN"))
    arrays = {n: v.numpy() for n, v in state.items()}
    path = write_pickle(
        folder / "R-50.pkl", {"model": arrays, "__author__": "torchvision", "matching_heuristics": True}
    )
    theirs = state["stem.conv1.weight"]
    model = module(detector_shapes(norm="FrozenBN"))
    load_weights(model, path, config("FrozenBN"))
    std = torch.tensor([57.375, 57.12, 58.395]).view(1, 3, 1, 1)
    folded = model.get_parameter("backbone.bottom_up.stem.conv1.weight")
    torch.testing.assert_close(folded * std, theirs.flip(1), rtol=1e-6, atol=0)
    # The convention it was converted for: nothing to fold, bit for bit.
    rgb = {"INPUT__FORMAT": "RGB", "MODEL__PIXEL_STD": [58.395, 57.12, 57.375]}
    cfg = config("FrozenBN", MODEL__PIXEL_MEAN=[123.675, 116.28, 103.53], **rgb)
    load_weights(model, path, cfg)
    assert torch.equal(model.get_parameter("backbone.bottom_up.stem.conv1.weight"), theirs)
    # Another mean cannot be folded: the padding would show.
    message = refused(model, path, config("FrozenBN", MODEL__PIXEL_MEAN=[102.9801, 115.9465, 122.7717]))
    assert "need: MODEL.PIXEL_MEAN [103.53,116.28,123.675]" in message
    assert "STRIDE_IN_1X1 False" in refused(model, path, config("FrozenBN", MODEL__RESNETS__STRIDE_IN_1X1=True))


def test_resnext_strides_in_the_3x3_and_leaves_std_open(tmp_path: Path) -> None:
    shapes = backbone_shapes(50, "BN", groups=2)
    path = write_pickle(tmp_path / "X-50.pkl", caffe2_blobs(50, "stats", shapes))
    model = module({f"backbone.bottom_up.{n}": s for n, s in shapes.items()})
    load_weights(model, path, config("FrozenBN", MODEL__PIXEL_STD=[57.375, 57.12, 58.395]))
    assert "STRIDE_IN_1X1 False" in refused(model, path, config("FrozenBN", MODEL__RESNETS__STRIDE_IN_1X1=True))


def test_own_checkpoints_bring_their_config(tmp_path: Path) -> None:
    shapes = detector_shapes(norm="LN")
    theirs = config("LN", INPUT__FORMAT="RGB")
    meta = build_meta(theirs, ["a", "b", "c"], [1, 2, 3])
    path = saved(tmp_path / "own.pth", shapes, gn_det=meta)
    model = module(shapes)
    report = load_weights(model, path, theirs, require_all=True)
    assert report.kind == f"gn_det {__version__}, ResNet-50, LN"
    assert "INPUT.FORMAT RGB" in refused(model, path, config("LN"))
    # LN and GN have the same tensors and compute different things.
    assert "these weights are LN" in refused(model, path, config("GN", INPUT__FORMAT="RGB"))
    heads = config("LN", INPUT__FORMAT="RGB", MODEL__FPN__NORM="IN")
    path_fpn = saved(tmp_path / "fpn.pth", shapes, gn_det=build_meta(heads, ["a", "b", "c"], [1, 2, 3]))
    message = refused(model, path_fpn, config("LN", INPUT__FORMAT="RGB", MODEL__FPN__NORM="GN"))
    assert "need: MODEL.FPN.NORM IN" in message
    renamed = config("LN", INPUT__FORMAT="RGB", MODEL__CLASS_NAMES=("x", "y", "z"))
    assert "other names (a, b, c)" in format_report(load_weights(model, path, renamed))


def test_a_stored_config_of_other_keys_and_types_tells_nothing(tmp_path: Path) -> None:
    shapes = detector_shapes()
    texts = ("MODEL: 3", "MODEL: {PIXEL_MEAN: [a, b], GN: {NUM_GROUPS: x}, FPN: {NORM: [1]}}", "x: 2001-99-99", "7")
    for number, text in enumerate(texts):
        path = saved(tmp_path / f"{number}.pth", shapes, gn_det={"config": text, "version": 3})
        load_weights(module(shapes), path, config(MODEL__FPN__NORM="GN"))


@pytest.mark.parametrize("text", ["[1", "a: {b"])
def test_a_stored_config_that_is_no_yaml_is_a_damaged_file(tmp_path: Path, text: str) -> None:
    path = saved(tmp_path / "x.pth", detector_shapes(), gn_det={"config": text, "version": 3})
    with pytest.raises(WeightsError, match=r"x\.pth: the config it stores line 1, column \d"):
        load_weights(module(detector_shapes()), path, config(MODEL__FPN__NORM="GN"))


def test_another_model_altogether(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "linear.pth")
    message = refused(module(detector_shapes()), tmp_path / "linear.pth", config())
    assert "it has weight, bias; the configured model has backbone." in message


def test_known_but_not_read(tmp_path: Path) -> None:
    """torchvision's detectors share names of the box head with Detectron2's, with the background first."""
    shapes = detector_shapes()
    heads = random_state({name: shape for name, shape in shapes.items() if "cls_score" in name})
    torch.save({"backbone.body.layer1.0.conv1.weight": torch.ones(1), **heads}, tmp_path / "x.pth")
    for options in ("", "?allow_partial=True"):
        message = refused(module(shapes), f"{tmp_path / 'x.pth'}{options}", config())
        assert "unsupported architecture" in message and "plain ResNet" in message
    with pytest.raises(WeightsError, match="unsupported architecture"):
        convert(tmp_path / "x.pth", tmp_path / "y.pth")
    assert not (tmp_path / "y.pth").exists()


def test_other_contents_are_refused_clearly(tmp_path: Path) -> None:
    model, cfg = module(detector_shapes()), config()
    assert "holds no weights (its entries: a)" in refused(model, write_pickle(tmp_path / "a.pkl", {"a": 1}), cfg)
    assert "holds no weights" in refused(model, write_pickle(tmp_path / "e.pkl", {}), cfg)
    path = write_pickle(tmp_path / "l.pkl", {"model": {"stem.conv1.weight": [1, 2]}})
    assert "is a list, not a tensor" in refused(model, path, cfg)
    (tmp_path / "x.safetensors").write_bytes((20).to_bytes(8, "little") + b'{"a": {}}           ')
    assert "is not a weights file or is damaged" in refused(model, tmp_path / "x.safetensors", cfg)


def test_content_counts_not_the_name(tmp_path: Path) -> None:
    shapes = detector_shapes()
    load_weights(module(shapes), saved(tmp_path / "x.pkl", shapes), config())
    torch.save({"model": random_state(shapes)}, tmp_path / "old.pkl", _use_new_zipfile_serialization=False)
    load_weights(module(shapes), tmp_path / "old.pkl", config())
    path = write_pickle(tmp_path / "x.pth", caffe2_blobs(50, "gn", backbone_shapes()))
    load_weights(module(shapes), path, config())


def test_frozen_layers_without_weights(tmp_path: Path) -> None:
    shapes = detector_shapes()
    name = "backbone.bottom_up.stem.conv1.weight"
    path = saved(tmp_path / "w.pth", {n: s for n, s in shapes.items() if n != name})
    model = module(shapes)
    model.get_parameter(name).requires_grad = False
    assert "MODEL.BACKBONE.FREEZE_AT 0" in refused(model, f"{path}?allow_partial=True", config())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_must_be_finite(tmp_path: Path, value: float) -> None:
    state = random_state(detector_shapes())
    state["roi_heads.box_head.fc1.weight"][1, 2] = value
    torch.save({"model": state}, tmp_path / "w.pth")
    message = refused(module(detector_shapes()), tmp_path / "w.pth", config())
    assert "roi_heads.box_head.fc1.weight holds NaN or infinity" in message


def test_half_precision_files(tmp_path: Path) -> None:
    state = {n: v.half() for n, v in random_state(detector_shapes()).items()}
    torch.save({"model": state}, tmp_path / "w.pth")
    model = module(detector_shapes())
    load_weights(model, tmp_path / "w.pth", config())
    assert all(v.dtype == torch.float32 and torch.equal(v, state[k].float()) for k, v in model.state_dict().items())
