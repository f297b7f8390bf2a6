"""Every source in its real layout: all names mapped, loaded strictly, and the same numbers come out."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gn_det.checkpoint import open_weights
from gn_det.checkpoint.formats import caffe2, mmdet, torchvision
from gn_det.checkpoint.formats.common import classes_last
from gn_det.checkpoint.weights import format_report, load_weights
from gn_det.checkpoint.weights_uri import OPEN_MMLAB
from gn_det.config import load_config
from gn_det.errors import WeightsError
from gn_det.modeling.build import build_model
from tests.checkpoint import layouts
from tests.checkpoint.layouts import background_first, real_shapes, write_pickle
from tests.checkpoint.numpy_forward import box_head, fpn, resnet

CAFFE_MEAN = (103.530, 116.280, 123.675)
DETECTRON_MEAN = (102.9801, 115.9465, 122.7717)
# Half width: names, depth and 32 groups are R-50's, files and forwards stay small.
HALF = [
    *("MODEL.RESNETS.STEM_OUT_CHANNELS", "32", "MODEL.RESNETS.WIDTH_PER_GROUP", "32", "MODEL.DEVICE", "cpu"),
    *("MODEL.RESNETS.RES2_OUT_CHANNELS", "64", "MODEL.FPN.OUT_CHANNELS", "32", "MODEL.ROI_BOX_HEAD.CONV_DIM", "32"),
    *("MODEL.ROI_BOX_HEAD.FC_DIM", "48", "MODEL.ROI_MASK_HEAD.CONV_DIM", "32", "MODEL.ROI_HEADS.NUM_CLASSES", "5"),
]


def config(*keys: str, name: str = "gn_fpn.yaml") -> Any:
    return load_config(name, [*HALF, *keys])


def mean_keys(mean: tuple[float, ...]) -> tuple[str, str]:
    return "MODEL.PIXEL_MEAN", str(list(mean))


@cache
def half_shapes() -> layouts.Shapes:
    return real_shapes("gn_fpn.yaml", *HALF)


def model_of(cfg: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_model(cfg).eval()


def image(seed: int = 3, size: tuple[int, int] = (64, 96)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (3, *size)).astype(np.float32)


def normalized(model: Any, pixels: np.ndarray) -> torch.Tensor:
    """As the model does before its backbone; batch of one."""
    return ((torch.from_numpy(pixels) - model.pixel_mean) / model.pixel_std)[None]


def close(a: torch.Tensor, b: Any, tolerance: float = 1e-4) -> None:
    """fp32, by the largest difference relative to the largest value."""
    b = torch.as_tensor(b)
    assert a.shape == b.shape
    assert float((a - b).abs().max()) <= tolerance * float(b.abs().max())


# ------------------------------------------------------------------------------------------------- the tables of names


@pytest.mark.parametrize(("depth", "shipped"), [(50, "gn_fpn.yaml"), (101, "gn_fpn_r101.yaml")])
@pytest.mark.parametrize("source", ["caffe2", "mmdet 1", "mmdet 2"])
def test_every_name_of_the_gn_detectors(source: str, depth: int, shipped: str) -> None:
    """One to one onto the real model of the shipped config."""

    def caffe2_name(blob: str) -> str | None:
        inner = caffe2.map_name(blob)
        return f"backbone.bottom_up.{inner}" if inner else caffe2.map_head_name(blob)

    pairs = layouts.caffe2_detector(depth) if source == "caffe2" else layouts.mmdet_detector(depth, int(source[-1]))
    map_name: Callable[[str], str | None] = caffe2_name if source == "caffe2" else mmdet.map_name
    assert [map_name(theirs) for theirs, _ in pairs] == [ours for _, ours in pairs]
    names = list(real_shapes(shipped))
    assert len(names) == len(pairs) == {50: 223, 101: 376}[depth]
    assert sorted(names) == sorted(ours for _, ours in pairs)


@pytest.mark.parametrize("depth", [50, 101])
@pytest.mark.parametrize(("norm", "running"), [("bn", False), ("bn", True), ("gn", False)])
def test_every_name_of_layered_resnets(norm: str, running: bool, depth: int) -> None:
    pairs = layouts.layered_backbone(depth, norm, running)
    assert [torchvision.map_name(theirs) for theirs, _ in pairs] == [ours for _, ours in pairs]
    if norm == "bn":
        assert [torchvision.name_back(ours) for _, ours in pairs] == [theirs for theirs, _ in pairs]


@pytest.mark.parametrize("depth", [50, 101])
@pytest.mark.parametrize(("norm", "tensors"), [("gn", 3), ("affine", 3), ("stats", 5)])
def test_every_name_of_the_caffe2_backbones(norm: str, tensors: int, depth: int) -> None:
    pairs = layouts.caffe2_backbone(depth, norm)
    theirs = [name for name, _ in pairs]
    assert [caffe2.map_name(name) for name in theirs] == [ours for _, ours in pairs]
    assert len(pairs) == {50: 53, 101: 104}[depth] * tensors  # a convolution and its norm
    assert caffe2.recognizes(theirs) and not caffe2.is_detector(theirs)
    assert not any(map(caffe2.is_ignored, theirs))
    assert caffe2.map_name("res3_1_branch2a_bn_rm") == "res3.1.conv1.norm.running_mean"
    assert caffe2.map_name("res3_1_branch2a_bn_riv") == "res3.1.conv1.norm.running_var"


@pytest.mark.parametrize(
    ("table", "name"),
    [
        *((caffe2.map_name, name) for name in ("res3_1_branch2a_gn_gamma", "res6_0_branch2a_w", "xconv1_w")),
        (caffe2.map_name, "conv1_w_momentum"),
        (caffe2.map_head_name, "fpn_6_w"),
        (caffe2.map_head_name, "kps_score_w"),
        (caffe2.map_head_name, "_[mask]_res5_0_branch2a_w"),
        (caffe2.map_head_name, "head_conv1_bn_s"),
        (torchvision.map_name, "conv1.0.weight"),
        (torchvision.map_name, "layer5.0.conv1.weight"),
        (torchvision.map_name, "layer1.0.se.fc1.weight"),
        (torchvision.map_name, "layer1.0.conv1.bias"),
        (mmdet.map_name, "roi_head.bbox_head.0.fc_cls.weight"),
        (mmdet.map_name, "neck.fpn_convs.4.conv.weight"),
        (mmdet.map_name, "backbone.layer1.0.context_block.conv_mask.weight"),
        (torchvision.name_back, "backbone.fpn_lateral2.weight"),
    ],
)
def test_what_no_row_knows(table: Callable[[str], str | None], name: str) -> None:
    assert table(name) is None


# ------------------------------------------------------------------------------------------ Caffe2: loaded, and forward


def caffe2_names(layer: str) -> tuple[str, str, str]:
    if layer == "stem":
        return caffe2_triple("conv1")
    stage, block, branch = layer.split(".")
    return caffe2_triple(f"res{stage}_{block}_branch{ {'s': 1}.get(branch, f'2{branch}') }")


def caffe2_triple(base: str) -> tuple[str, str, str]:
    return f"{base}_w", f"{base}_gn_s", f"{base}_gn_b"


def caffe2_detector_blobs() -> dict[str, np.ndarray]:
    blobs = layouts.arrays(layouts.caffe2_detector(), half_shapes())
    background_first(blobs, "bbox_pred_", "mask_fcn_logits_", ("w", "b"))
    return blobs


def test_caffe2_backbone_against_numpy(tmp_path: Path) -> None:
    """The whole R-50-GN (half width) on BGR 0-255 minus the mean, computed from the blobs alone."""
    blobs = layouts.arrays(layouts.caffe2_backbone(), half_shapes(), "backbone.bottom_up.")
    blobs |= {"pred_w": np.ones((10, 512), np.float32), "pred_b": np.ones(10, np.float32)}
    path = write_pickle(tmp_path / "x", blobs)
    cfg = config()
    model: Any = model_of(cfg)
    report = load_weights(model, path, cfg)
    assert len(report.loaded) == 159 and report.ignored == ("pred_w", "pred_b") and not report.unexpected
    pixels = image()
    expected = resnet(blobs, pixels - np.array(CAFFE_MEAN, np.float32)[:, None, None], caffe2_names, (3, 4, 6, 3))
    with torch.inference_mode():
        found = model.backbone.bottom_up(normalized(model, pixels))
    for name, feature in expected.items():
        close(found[name][0], feature)


def test_caffe2_detector_against_numpy(tmp_path: Path) -> None:
    blobs = caffe2_detector_blobs()
    momentum = {f"{name}_momentum": value for name, value in blobs.items()}
    content = {"blobs": blobs | momentum | {"lr": np.float32(0.1)}, "cfg": "MODEL:\n  NUM_CLASSES: 6\n"}
    path = write_pickle(tmp_path / "model_final.pkl", content)
    cfg = config(*mean_keys(DETECTRON_MEAN))
    model: Any = model_of(cfg)
    report = load_weights(model, path, cfg, require_all=True)
    assert len(report.loaded) == 223 and not report.unexpected
    assert set(report.ignored) == set(momentum)
    assert "Caffe2 / Detectron detector, ResNet-50, GN" in report.kind and "by up to a pixel" in format_report(report)
    pixels = image()
    x = pixels - np.array(DETECTRON_MEAN, np.float32)[:, None, None]
    features = resnet(blobs, x, caffe2_names, (3, 4, 6, 3))
    last = {"5": "res5_2_sum", "4": "res4_5_sum_lateral", "3": "res3_3_sum_lateral", "2": "res2_2_sum_lateral"}
    expected = fpn(
        blobs,
        features,
        lambda s: caffe2_triple(f"fpn_inner_{last[s]}"),
        lambda s: caffe2_triple(f"fpn_{last[s].removesuffix('_lateral')}"),
    )
    roi = np.random.default_rng(4).standard_normal((32, 7, 7)).astype(np.float32)
    hidden = box_head(blobs, roi, lambda i: caffe2_triple(f"head_conv{i}"), ("fc6_w", "fc6_b"))
    with torch.inference_mode():
        found = model.backbone(normalized(model, pixels))
        ours = model.roi_heads.box_head(torch.from_numpy(roi)[None])
        scores, deltas = model.roi_heads.box_predictor(ours)
    for name, feature in expected.items():
        close(found[name][0], feature)
    close(ours[0], hidden)
    # Background first in the file, last in ours; its boxes (rows of 7) are gone.
    their_scores = blobs["cls_score_w"] @ hidden + blobs["cls_score_b"]
    close(scores[0], np.roll(their_scores, -1))
    close(deltas[0], (blobs["bbox_pred_w"] @ hidden + blobs["bbox_pred_b"])[4:])
    predictor = model.roi_heads.mask_head.predictor
    assert np.array_equal(predictor.weight.detach().numpy(), blobs["mask_fcn_logits_w"][1:])
    assert np.array_equal(model.roi_heads.mask_head.deconv.bias.detach().numpy(), blobs["conv5_mask_b"])


NUMPY_YAML = """MODEL:
  NUM_CLASSES: 6
PIXEL_MEANS: !!python/object/apply:numpy.core.multiarray._reconstruct
  args:
  - !!python/name:numpy.ndarray ''
  - !!python/tuple
    - 0
  - b
  state: !!python/tuple
  - 1
  - !!python/tuple
    - 1
    - 1
    - 3
  - !!python/object/apply:numpy.dtype
    args:
    - f8
    - 0
    - 1
  - false
  - !!binary |
    {contents}
RNG_SEED: 3
"""


@pytest.mark.parametrize("form", ["absent", "list", "array"])
def test_the_mean_of_a_caffe2_detector(tmp_path: Path, form: str) -> None:
    """In the file's own words where it has them: Detectron's mean is not the one of the ImageNet backbones."""
    import base64

    other = (100.5, 110.25, 120.125)
    text = {
        "absent": "NUM_GPUS: 8\n",
        "list": f"NUM_GPUS: 8\nPIXEL_MEANS:\n- - - {other[0]}\n    - {other[1]}\n    - {other[2]}\nRNG_SEED: 3\n",
        "array": NUMPY_YAML.format(contents=base64.b64encode(np.array(other).tobytes()).decode()),
    }[form]
    path = write_pickle(tmp_path / "m.pkl", {"blobs": caffe2_detector_blobs(), "cfg": text})
    mean = DETECTRON_MEAN if form == "absent" else other
    with pytest.raises(WeightsError) as caught:
        load_weights(model_of(config()), path, config())
    assert f"need: MODEL.PIXEL_MEAN [{','.join(f'{v:.8g}' for v in mean)}]" in str(caught.value)
    cfg = config(*mean_keys(mean))
    load_weights(model_of(cfg), path, cfg)


def test_a_hostile_cfg_runs_nothing(tmp_path: Path) -> None:
    ran = tmp_path / "ran"
    text = f"PIXEL_MEANS: !!python/object/apply:os.system ['touch {ran}']\n"
    path = write_pickle(tmp_path / "m.pkl", {"blobs": caffe2_detector_blobs(), "cfg": text})
    cfg = config(*mean_keys(DETECTRON_MEAN))
    load_weights(model_of(cfg), path, cfg)
    assert not ran.exists()


def test_caffe2_detectors_that_are_not_read(tmp_path: Path) -> None:
    cfg = config(*mean_keys(DETECTRON_MEAN))
    agnostic = caffe2_detector_blobs()
    agnostic["bbox_pred_w"] = agnostic["bbox_pred_w"][:8]
    path = write_pickle(tmp_path / "a.pkl", {"blobs": agnostic})
    with pytest.raises(WeightsError, match=r"bbox_pred\.weight: has 8 rows, 24 would belong to the 6 classes"):
        load_weights(model_of(cfg), path, cfg)


def test_caffe2_c4_anchors_and_heads(tmp_path: Path) -> None:
    """C4: res5 belongs to the heads, and the RPN counts (ratio, size) where we count (size, ratio)."""
    keys = ["MODEL.RESNETS.NORM", "GN", "MODEL.BACKBONE.FREEZE_AT", "0", "MODEL.RESNETS.STRIDE_IN_1X1", "False"]
    cfg = config(*keys, *mean_keys(DETECTRON_MEAN), name="gn_c4.yaml")
    shapes = real_shapes("gn_c4.yaml", *HALF, *keys)
    head = {"conv_rpn": "conv", "rpn_cls_logits": "objectness_logits", "rpn_bbox_pred": "anchor_deltas"}
    pairs = [
        (f"{a}_{x}", f"proposal_generator.rpn_head.{b}.{y}")
        for a, b in head.items()
        for x, y in zip("wb", ("weight", "bias"))
    ]
    pairs += [(t, ("roi_heads." if o.startswith("res5") else "backbone.") + o) for t, o in layouts.caffe2_backbone()]
    rest = {"cls_score": "box_predictor.cls_score", "bbox_pred": "box_predictor.bbox_pred"}
    rest |= {"conv5_mask": "mask_head.deconv", "mask_fcn_logits": "mask_head.predictor"}
    pairs += [(f"{a}_{x}", f"roi_heads.{b}.{y}") for a, b in rest.items() for x, y in zip("wb", ("weight", "bias"))]
    assert sorted(shapes) == sorted(o for _, o in pairs)
    blobs = layouts.arrays(pairs, shapes)
    background_first(blobs, "bbox_pred_", "mask_fcn_logits_", ("w", "b"))
    model: Any = model_of(cfg)
    load_weights(model, write_pickle(tmp_path / "c4.pkl", {"blobs": blobs}), cfg, require_all=True)
    sizes, ratios = cfg.MODEL.ANCHOR_GENERATOR.SIZES[0], cfg.MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS[0]
    theirs = [(size, ratio) for ratio in ratios for size in sizes]
    ours = [(size, ratio) for size in sizes for ratio in ratios]
    head_of = model.proposal_generator.rpn_head.requires_grad_(False)
    for k, anchor in enumerate(ours):
        j = theirs.index(anchor)
        assert float(head_of.objectness_logits.bias[k]) == float(blobs["rpn_cls_logits_b"][j])
        for d in range(4):
            assert float(head_of.anchor_deltas.weight[4 * k + d, 3, 0, 0]) == float(
                blobs["rpn_bbox_pred_w"][4 * j + d, 3, 0, 0]
            )


# ------------------------------------------------------------------------------------------------------- mmdetection


def mmdet_names(layer: str) -> tuple[str, str, str]:
    if layer == "stem":
        return "backbone.conv1.weight", "backbone.gn1.weight", "backbone.gn1.bias"
    stage, block, branch = layer.split(".")
    base = f"backbone.layer{int(stage) - 1}.{block}."
    if branch == "s":
        return base + "downsample.0.weight", base + "downsample.1.weight", base + "downsample.1.bias"
    i = "abc".index(branch) + 1
    return f"{base}conv{i}.weight", f"{base}gn{i}.weight", f"{base}gn{i}.bias"


def mmdet_triple(base: str) -> tuple[str, str, str]:
    return f"{base}.conv.weight", f"{base}.gn.weight", f"{base}.gn.bias"


CAFFE_TEXT = """model = dict(backbone=dict(style='pytorch'))
img_norm_cfg = dict(
    mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], to_rgb=False)
"""
TORCH_TEXT = """style='pytorch'
data_preprocessor=dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True)
"""


WS_TEXT = TORCH_TEXT + "conv_cfg = dict(type='ConvWS')\n"


def standardized(blobs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """mmcv's ConvWS on every convolution that a GN follows."""
    made = dict(blobs)
    for name, weight in blobs.items():
        norm = name.replace("conv.weight", "gn.weight") if name.endswith(".conv.weight") else ""
        if match := re.fullmatch(r"(backbone\..*)(?:conv(\d)|downsample\.0)\.weight", name):
            norm = f"{match[1]}gn{match[2]}.weight" if match[2] else f"{match[1]}downsample.1.weight"
        if norm in blobs:
            rows = weight.astype(np.float64).reshape(len(weight), -1)
            rows = (rows - rows.mean(1, keepdims=True)) / (rows.std(1, ddof=1, keepdims=True) + 1e-5)
            made[name] = rows.reshape(weight.shape)
    return made


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("text", [CAFFE_TEXT, TORCH_TEXT, WS_TEXT], ids=["caffe", "torch", "ws"])
def test_mmdetection_detector_against_numpy(tmp_path: Path, text: str, version: int) -> None:
    blobs = layouts.arrays(layouts.mmdet_detector(version=version), half_shapes())
    roi_head = "" if version == 1 else "roi_head."
    if version == 1:
        background_first(blobs, "bbox_head.fc_reg.", "mask_head.conv_logits.", ("weight", "bias"))
    state = {name: torch.from_numpy(value) for name, value in blobs.items()}
    meta = {"config": text, "CLASSES": ("a", "b", "c", "d", "e"), "mmdet_version": f"{version}.0.0", "epoch": 24}
    torch.save({"state_dict": state, "meta": meta}, tmp_path / "m.pth")
    cfg = config()
    if text == WS_TEXT:
        needs = [f"MODEL.WS.{part}" for part in ("RESNETS", "FPN", "ROI_BOX_HEAD", "ROI_MASK_HEAD")]
        told = f"need: INPUT.FORMAT RGB MODEL.PIXEL_MEAN .* {' '.join(f'{key} jhu' for key in needs)}$"
        with pytest.raises(WeightsError, match=told):
            load_weights(model_of(cfg), tmp_path / "m.pth", cfg)
        keys = [word for key in needs for word in (key, "jhu")]
        keys += ["INPUT.FORMAT", "RGB", "MODEL.PIXEL_MEAN", "[123.675, 116.28, 103.53]"]
        cfg = config(*keys, "MODEL.PIXEL_STD", "[58.395, 57.12, 57.375]")
        blobs = {name: v.astype(np.float64) for name, v in standardized(blobs).items()}  # rounding is amplified
    model: Any = model_of(cfg)
    report = load_weights(model, tmp_path / "m.pth", cfg, require_all=True)
    assert len(report.loaded) == 223 and not report.unexpected and not report.missing
    bgr = image()
    if text != CAFFE_TEXT:
        folded = "channel order RGB and std [58.395,57.12,57.375] of the source folded" in format_report(report)
        assert folded == (text == TORCH_TEXT)
        mean, std = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])
        x = ((bgr[::-1] - mean[:, None, None]) / std[:, None, None]).astype(np.float32)
    else:
        x = bgr - np.array(CAFFE_MEAN, np.float32)[:, None, None]
    roi = np.random.default_rng(4).standard_normal((32, 7, 7)).astype(np.float32)
    if text == WS_TEXT:
        model, bgr, x, roi = model.double(), bgr[::-1].astype(np.float64), x.astype(np.float64), roi.astype(np.float64)
    expected = fpn(
        blobs,
        resnet(blobs, x, mmdet_names, (3, 4, 6, 3)),
        lambda s: mmdet_triple(f"neck.lateral_convs.{int(s) - 2}"),
        lambda s: mmdet_triple(f"neck.fpn_convs.{int(s) - 2}"),
    )
    fc = f"{roi_head}bbox_head.shared_fcs.0."
    hidden = box_head(
        blobs,
        roi,
        lambda i: mmdet_triple(f"{roi_head}bbox_head.shared_convs.{int(i) - 1}"),
        (fc + "weight", fc + "bias"),
    )
    with torch.inference_mode():
        found = model.backbone(normalized(model, bgr.copy()))
        ours = model.roi_heads.box_head(torch.from_numpy(roi)[None])
        scores, deltas = model.roi_heads.box_predictor(ours)
    for name, feature in expected.items():
        close(found[name][0], feature)
    close(ours[0], hidden)
    base = f"{roi_head}bbox_head."
    their_scores = blobs[base + "fc_cls.weight"] @ hidden + blobs[base + "fc_cls.bias"]
    their_deltas = blobs[base + "fc_reg.weight"] @ hidden + blobs[base + "fc_reg.bias"]
    close(scores[0], np.roll(their_scores, -1) if version == 1 else their_scores)
    close(deltas[0], their_deltas[4:] if version == 1 else their_deltas)
    masks = blobs[roi_head + "mask_head.conv_logits.weight"]
    assert np.array_equal(
        model.roi_heads.mask_head.predictor.weight.detach().numpy(), masks[1:] if version == 1 else masks
    )


@pytest.mark.parametrize(
    "text",
    ["", "mean=[1,2,3], std=[1,1,1]", CAFFE_TEXT + TORCH_TEXT, "mean=[1,2], std=[1,1,1] to_rgb=True"],
)
def test_a_config_that_does_not_tell_one_preprocessing(text: str) -> None:
    assert mmdet.preprocessing_of(text) is None


@pytest.mark.parametrize("config", [None, 3, TORCH_TEXT + " " * (1 << 20)])
def test_a_config_that_is_not_read(config: Any) -> None:
    weights = mmdet.translate({}, {"meta": {"config": config}})
    assert weights.preprocessing is None and weights.asks and weights.ws == {}


def test_mmdetection_backbones_ask(tmp_path: Path) -> None:
    """open-mmlab's GN backbones come in both conventions and look the same: never guessed."""
    blobs = layouts.arrays(layouts.layered_backbone(norm="gn"), half_shapes(), "backbone.bottom_up.")
    path = tmp_path / "resnet50_gn-9186a21c.pth"
    torch.save({name: torch.from_numpy(v) for name, v in blobs.items()}, path)
    cfg = config()
    with pytest.raises(WeightsError, match=r"\?preprocessing=caffe .* or \?preprocessing=torch"):
        load_weights(model_of(cfg), path, cfg)
    with pytest.raises(WeightsError, match="preprocessing must be caffe or torch"):
        load_weights(model_of(cfg), f"{path}?preprocessing=rgb", cfg)
    stem = "backbone.bottom_up.stem.conv1.weight"
    caffe, from_torch = model_of(cfg), model_of(cfg)
    load_weights(caffe, f"{path}?preprocessing=caffe", cfg)
    assert np.array_equal(caffe.state_dict()[stem].numpy(), blobs["conv1.weight"])
    load_weights(from_torch, f"{path}?preprocessing=torch", cfg)
    std = torch.tensor([57.375, 57.12, 58.395]).view(1, 3, 1, 1)
    close(from_torch.state_dict()[stem] * std, blobs["conv1.weight"][:, ::-1].copy(), 1e-6)


@pytest.mark.parametrize("name", ["resnet50_gn_ws", "resnext50_32x4d_gn_ws", "resnext50_32x4d_gn"])
def test_open_mmlab_backbones_of_weight_standardization(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By their name in the catalog: preprocessing and formula, each refused with the keys to set; nothing is folded."""
    keys = ["MODEL.RESNETS.NUM_GROUPS", "32", "MODEL.RESNETS.WIDTH_PER_GROUP", "4"] if "resnext" in name else []
    file = OPEN_MMLAB[f"jhu/{name}"].rpartition("/")[2]
    shapes = real_shapes("gn_fpn.yaml", *HALF, *keys)
    blobs = layouts.arrays(layouts.layered_backbone(norm="gn"), shapes, "backbone.bottom_up.")
    state = {theirs: torch.from_numpy(v) for theirs, v in blobs.items()}
    torch.save(state, tmp_path / file)
    monkeypatch.setattr(open_weights, "local_path", lambda uri: tmp_path / file)
    uri = f"open-mmlab://jhu/{name}"
    plain = config(*keys)
    if name.endswith("_ws"):
        told = r"MODEL\.WS\.RESNETS is '', but .* need: INPUT\.FORMAT RGB MODEL\.PIXEL_MEAN .* MODEL\.WS\.RESNETS jhu$"
        with pytest.raises(WeightsError, match=told):
            load_weights(model_of(plain), uri, plain)
        keys += ["INPUT.FORMAT", "RGB", "MODEL.PIXEL_MEAN", "[123.675, 116.28, 103.53]"]
        plain = config(*keys, "MODEL.PIXEL_STD", "[58.395, 57.12, 57.375]", "MODEL.WS.RESNETS", "jhu")
    else:
        wrong = config(*keys, "MODEL.WS.RESNETS", "timm")
        with pytest.raises(WeightsError, match=r"MODEL\.WS\.RESNETS is timm, but .* need: MODEL\.WS\.RESNETS ''$"):
            load_weights(model_of(wrong), uri, wrong)
    model = model_of(plain)
    load_weights(model, uri, plain)
    stem = model.state_dict()["backbone.bottom_up.stem.conv1.weight"].numpy()
    assert np.array_equal(stem, blobs["conv1.weight"]) == name.endswith("_ws")  # else order and std are folded


def test_boxes_of_scores_without_rows() -> None:
    """A single number has no rows to cut, even where there are no classes."""
    state = {"roi_heads.box_predictor.cls_score.weight": torch.zeros(0, 4)}
    state["roi_heads.box_predictor.bbox_pred.weight"] = torch.tensor(1.0)
    with pytest.raises(WeightsError, match=r"bbox_pred.weight: has no rows"):
        classes_last(state)
