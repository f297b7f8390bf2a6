"""The same YAML means the same in Detectron2 with the plugin as in the embedded engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("detectron2.config", reason="needs an installed Detectron2")

from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_model

from gn_det.config import get_cfg as embedded_cfg
from gn_det.config import load_config
from gn_det.config.defaults import flatten, set_value
from gn_det.data.shapes import make_shapes
from gn_det.detectron2 import add_gn_config, prepare_config
from gn_det.detectron2.config import check_for_trainer
from gn_det.detectron2.gn_heads import GNFastRCNNConvFCHead
from gn_det.errors import ConfigError, DataError
from gn_det.modeling import build_model as build_embedded
from tests.detectron2.cases import gn_modules, plugin_cfg, without_plugin
from tests.test_configs import EMBEDDED

pytestmark = pytest.mark.detectron2
ALL = {"GNResNet", "GNFPN", "GNFastRCNNConvFCHead", "GNMaskRCNNConvUpsampleHead"}


def test_both_engines_know_the_same_keys() -> None:
    """Only two defaults differ after add_gn_config: the device is already resolved, workers do not count here."""
    ours, theirs = embedded_cfg(), plugin_cfg()
    ours.MODEL.DEVICE = "cpu"
    assert {k: list_of(v) for k, v in flatten(ours)} == {k: list_of(v) for k, v in flatten(theirs)}


def list_of(value: Any) -> Any:
    return [list_of(v) for v in value] if isinstance(value, (list, tuple)) else value


def on_meta(cfg: CfgNode) -> torch.nn.Module:
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return build_model(cfg)


@pytest.mark.parametrize("name", EMBEDDED)
def test_every_shipped_config_builds_the_same_model(name: str) -> None:
    """Plugin, embedded engine and Detectron2's own modules: names, order, shapes, what is frozen."""
    embedded = load_config(name)
    cfg = plugin_cfg(name, *(() if embedded.DATASETS.TRAIN else ("MODEL.ROI_HEADS.NUM_CLASSES", 3)))
    prepare_config(cfg)
    embedded.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.ROI_HEADS.NUM_CLASSES
    with torch.device("meta"):
        expected = describe(build_embedded(embedded))
    model = on_meta(cfg)
    assert describe(model) == expected
    assert describe(on_meta(without_plugin(cfg))) == expected
    gn = {"GNResNet", "GNRes5ROIHeads"} if name in ("gn_c4.yaml", "ln_c4.yaml") else ALL
    if name == "gn_fpn_gn_head.yaml":
        gn = ALL - {"GNMaskRCNNConvUpsampleHead"}
    elif name.startswith(("bn_", "syncbn_")):
        gn = {"GNFastRCNNConvFCHead"} if "gn_head" in name else set()
    assert gn_modules(model) == gn


def test_retinanet_config() -> None:
    """GN in every part: gn_det's in backbone and FPN, Detectron2's in the head."""
    model = on_meta(plugin_cfg("gn_retinanet.yaml"))
    assert {"GNFPN", "GNResNet"} <= gn_modules(model)
    norms = [n for n, m in model.named_modules() if isinstance(m, torch.nn.GroupNorm)]
    assert len(norms) == 53 + 6 + 8  # FPN on res3 to res5, two branches of four convolutions in the head


def describe(model: torch.nn.Module) -> list[tuple[Any, ...]]:
    parameters = [(n, tuple(p.shape), p.requires_grad) for n, p in model.named_parameters()]
    return parameters + [(n, tuple(t.shape)) for n, t in model.state_dict().items()]


def test_a_config_without_the_keys_gets_detectron2s_own_modules() -> None:
    cfg = get_cfg()
    cfg.MODEL.RESNETS.NORM = "GN"
    cfg.MODEL.RESNETS.STRIDE_IN_1X1 = False
    model = on_meta(cfg)
    assert gn_modules(model) == set() and cfg.MODEL.ROI_HEADS.NUM_CLASSES == 80


@pytest.mark.parametrize(
    ("pairs", "groups"),
    [
        (("MODEL.GN.NUM_GROUPS", 16), {16}),
        (("MODEL.GN.CHANNELS_PER_GROUP", 16), {4, 8, 16, 32, 64, 128}),
        (("MODEL.RESNETS.NORM", "LN", "MODEL.FPN.NORM", "LN"), {1, 32}),
        (("MODEL.RESNETS.NORM", "IN", "MODEL.FPN.NORM", "IN"), {32, 64, 128, 256, 512, 1024, 2048}),
    ],
)
def test_groups_come_from_the_config(pairs: tuple[Any, ...], groups: set[int]) -> None:
    model = on_meta(plugin_cfg("gn_fpn.yaml", *pairs))
    assert {m.num_groups for m in model.modules() if isinstance(m, torch.nn.GroupNorm)} == groups
    assert not any(isinstance(m, torch.nn.LayerNorm) or type(m).__name__ == "LayerNorm" for m in model.modules())


def test_deformable_convolutions_stay_detectron2s(caplog: pytest.LogCaptureFixture) -> None:
    """Only Detectron2 has them: its GN where that is the same, its trunk with other norms, otherwise one line."""
    deform = ("MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, True, True, True])
    assert "GNResNet" not in gn_modules(on_meta(plugin_cfg("gn_fpn.yaml", *deform)))
    frozen = ("MODEL.RESNETS.NORM", "FrozenBN", "MODEL.GN.NUM_GROUPS", 16)
    model = on_meta(plugin_cfg("gn_fpn.yaml", *deform, *frozen))
    assert gn_modules(model) == ALL - {"GNResNet"} and "DeformConv" in str(model.backbone.bottom_up)
    assert {m.num_groups for m in model.modules() if isinstance(m, torch.nn.GroupNorm)} == {16}
    assert "do not follow MODEL.GN" not in caplog.text
    with pytest.raises(ConfigError, match="DEFORM_ON_PER_STAGE"):
        on_meta(plugin_cfg("gn_fpn.yaml", *deform, "MODEL.GN.NUM_GROUPS", 16))


def test_other_norms_of_detectron2_stay_its_own() -> None:
    model = on_meta(plugin_cfg("bn_fpn.yaml", "MODEL.RESNETS.NORM", "naiveSyncBN"))
    assert any(type(m).__name__ == "NaiveSyncBatchNorm" for m in model.modules())
    model = on_meta(plugin_cfg("bn_fpn.yaml", "MODEL.RESNETS.NORM", "naiveSyncBN", "MODEL.FPN.NORM", "LN"))
    assert "GNFPN" in gn_modules(model) and "GNResNet" not in gn_modules(model)
    with pytest.raises(ConfigError, match="unknown norm 'naive'"):
        on_meta(plugin_cfg("bn_fpn.yaml", "MODEL.RESNETS.NORM", "naive", "MODEL.FPN.NORM", "LN"))


def test_a_pyramid_without_res5_is_gn_dets_whatever_its_norms() -> None:
    """Detectron2's makes its extra level of p5."""
    stages, levels = ["res2", "res3", "res4"], ["p2", "p3", "p4", "p5"]
    keys = ["MODEL.RESNETS.OUT_FEATURES", stages, "MODEL.FPN.IN_FEATURES", stages, "MODEL.RPN.IN_FEATURES", levels]
    keys += ["MODEL.ROI_HEADS.IN_FEATURES", levels[:3], "MODEL.ANCHOR_GENERATOR.SIZES", [[32], [64], [128], [256]]]
    backbone = on_meta(plugin_cfg("bn_fpn.yaml", *keys)).backbone
    assert list(backbone.output_shape()) == levels and type(backbone).__name__ == "GNFPN"


def test_heads_of_one_mask_and_of_square_features() -> None:
    model = on_meta(plugin_cfg("gn_fpn.yaml", "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK", True))
    assert model.roi_heads.mask_head.predictor.out_channels == 1
    with pytest.raises(ConfigError, match="takes square RoI features, got 7x9"):
        GNFastRCNNConvFCHead(ShapeSpec(channels=8, height=7, width=9), conv_dims=[], fc_dims=[8])


def test_registered_names_can_be_written_out() -> None:
    names = {
        "MODEL.BACKBONE.NAME": "build_gn_resnet_fpn_backbone",
        "MODEL.ROI_BOX_HEAD.NAME": "GNFastRCNNConvFCHead",
        "MODEL.ROI_MASK_HEAD.NAME": "GNMaskRCNNConvUpsampleHead",
    }
    model = on_meta(plugin_cfg("bn_fpn.yaml", *[part for pair in names.items() for part in pair]))
    assert gn_modules(model) == ALL
    assert describe(model) == describe(on_meta(plugin_cfg("bn_fpn.yaml")))


def test_groups_that_do_not_divide_are_one_line_with_the_layer() -> None:
    with pytest.raises(ConfigError, match=r"MODEL.RESNETS.NORM GN: 7 groups do not divide a layer of 64 channels"):
        on_meta(plugin_cfg("gn_fpn.yaml", "MODEL.GN.NUM_GROUPS", 7))


def test_values_set_before_and_frozen_configs() -> None:
    cfg = get_cfg()
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    cfg.freeze()
    add_gn_config(cfg)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 3 and cfg.is_frozen()
    cfg.defrost()
    cfg.MODEL.GN.NUM_GROUPS = 8
    cfg.MODEL.DEVICE = "auto"
    cfg.freeze()
    add_gn_config(cfg)  # a second time
    prepare_config(cfg)
    assert cfg.MODEL.GN.NUM_GROUPS == 8 and cfg.is_frozen()
    assert ("cuda" if torch.cuda.is_available() else "cpu") == cfg.MODEL.DEVICE
    plain = get_cfg()
    prepare_config(plain)
    assert plain == get_cfg()


def test_a_stored_config_of_the_embedded_engine_merges(tmp_path: Path) -> None:
    """What a checkpoint or OUTPUT_DIR of the embedded engine holds, "auto" included."""
    from gn_det.config import dump_config

    stored = load_config("gn_fpn_long.yaml", ["MODEL.CLASS_NAMES", "('a', 'b', 'c')"])
    (tmp_path / "config.yaml").write_text(dump_config(stored))
    cfg = get_cfg()
    add_gn_config(cfg)
    cfg.merge_from_file(str(tmp_path / "config.yaml"))
    assert cfg.MODEL.DEVICE == "auto"
    prepare_config(cfg)
    assert cfg.MODEL.DEVICE != "auto" and cfg.MODEL.ROI_HEADS.NUM_CLASSES == 3


# ---------------------------------------------------------------- classes and datasets


def test_number_of_classes() -> None:
    for name, classes in (("gn_fpn.yaml", 80), ("quickstart.yaml", 5)):  # metadata: no file is read
        cfg = plugin_cfg(name)
        prepare_config(cfg)
        assert classes == cfg.MODEL.ROI_HEADS.NUM_CLASSES
    cfg = plugin_cfg("gn_fpn.yaml", "MODEL.ROI_HEADS.NUM_CLASSES", 7)
    prepare_config(cfg)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 7
    with pytest.raises(ConfigError, match=r"NUM_CLASSES is 0 and DATASETS.TRAIN is empty"):
        prepare_config(plugin_cfg())
    with pytest.raises(ConfigError, match="'nowhere' is not in Detectron2's catalog"):
        prepare_config(plugin_cfg("gn_fpn.yaml", "DATASETS.TRAIN", ("nowhere",)))


def test_a_set_that_the_user_registered() -> None:
    DatasetCatalog.register("plugin_test_own", lambda: [])
    try:
        cfg = plugin_cfg("gn_fpn.yaml", "DATASETS.TRAIN", ("plugin_test_own",))
        with pytest.raises(ConfigError, match="'plugin_test_own' has no thing_classes"):
            prepare_config(cfg)
        MetadataCatalog.get("plugin_test_own").thing_classes = ["x", "y"]
        prepare_config(cfg)
        assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 2
    finally:
        DatasetCatalog.remove("plugin_test_own")
        MetadataCatalog.remove("plugin_test_own")


def test_own_data_by_keys(tmp_path: Path) -> None:
    """TRAIN_JSON and VAL_JSON take the place of the names, with what Detectron2's evaluator needs."""
    train, val = (make_shapes(tmp_path, split, 3) for split in ("train", "val"))
    keys = ("TRAIN_JSON", train.json_file, "TRAIN_IMAGES", train.image_root, "VAL_JSON", val.json_file)
    pairs = [f"DATASETS.{v}" if i % 2 == 0 else v for i, v in enumerate(keys)]
    cfg = plugin_cfg("gn_fpn.yaml", *pairs, "DATASETS.VAL_IMAGES", val.image_root, "INPUT.MASK_FORMAT", "bitmask")
    prepare_config(cfg)
    assert cfg.MODEL.ROI_HEADS.NUM_CLASSES == 5
    assert (f"{val.json_file}@{val.image_root}",) == cfg.DATASETS.TEST
    records = DatasetCatalog.get(cfg.DATASETS.TRAIN[0])
    metadata = MetadataCatalog.get(cfg.DATASETS.TRAIN[0])
    content = json.loads(Path(train.json_file).read_text())
    assert [r["image_id"] for r in records] == [i["id"] for i in content["images"]]
    assert metadata.thing_classes == [c["name"] for c in content["categories"]]
    assert metadata.thing_dataset_id_to_contiguous_id == {1: 0, 2: 1, 4: 2, 7: 3, 8: 4}
    assert metadata.json_file == train.json_file and metadata.evaluator_type == "coco"


def test_records_are_those_of_detectron2s_reader(tmp_path: Path) -> None:
    from detectron2.data.datasets import load_coco_json

    source = make_shapes(tmp_path, "train", 5)
    name = f"{source.json_file}@{source.image_root}"
    cfg = plugin_cfg("gn_fpn.yaml", "DATASETS.TRAIN", (name,), "INPUT.MASK_FORMAT", "bitmask")
    prepare_config(cfg)
    for ours, theirs in zip(DatasetCatalog.get(name), load_coco_json(source.json_file, source.image_root), strict=True):
        assert {k: v for k, v in ours.items() if k != "annotations"} == {
            k: v for k, v in theirs.items() if k != "annotations"
        }
        for a, b in zip(ours["annotations"], theirs["annotations"], strict=True):
            for key in ("iscrowd", "bbox_mode", "bbox"):
                assert a[key] == b[key]
            assert as_text(a["segmentation"]) == as_text(b["segmentation"])


def as_text(segmentation: Any) -> Any:
    """RLE counts as text: Detectron2's reader has them as text or bytes, depending on the json."""
    if not isinstance(segmentation, dict):
        return segmentation
    counts = segmentation["counts"]
    return {**segmentation, "counts": counts.decode() if isinstance(counts, bytes) else counts}


def test_rle_that_the_mapper_would_refuse(tmp_path: Path) -> None:
    """Named before Detectron2's mapper meets it in a worker."""
    source = make_shapes(tmp_path, "train", 6)
    name = f"{source.json_file}@{source.image_root}"
    cfg = plugin_cfg("gn_fpn.yaml", "DATASETS.TRAIN", (name,), "MODEL.ROI_HEADS.NUM_CLASSES", 5)
    prepare_config(cfg)
    with pytest.raises(DataError, match=r"annotation \d+ has an RLE mask.* set INPUT.MASK_FORMAT bitmask"):
        DatasetCatalog.get(name)
    cfg.INPUT.MASK_FORMAT = "bitmask"
    prepare_config(cfg)
    assert len(DatasetCatalog.get(name)) == 6
    shapes = plugin_cfg("quickstart.yaml")
    prepare_config(shapes)
    assert shapes.INPUT.MASK_FORMAT == "bitmask"


def test_rle_of_crowds_and_bad_annotations_are_as_the_config_has_them(tmp_path: Path) -> None:
    """Detectron2 leaves crowds out before it looks at masks; DATALOADER.MAX_BAD says how many annotations may go."""
    source = make_shapes(tmp_path, "train", 6)
    content = json.loads(Path(source.json_file).read_text())
    for annotation in content["annotations"]:
        annotation["iscrowd"] = int(isinstance(annotation["segmentation"], dict))
    content["annotations"][0]["category_id"] = 99
    path = tmp_path / "own.json"
    path.write_text(json.dumps(content))
    name = f"{path}@{source.image_root}"
    cfg = plugin_cfg("gn_fpn.yaml", "DATASETS.TRAIN", (name,), "MODEL.ROI_HEADS.NUM_CLASSES", 5)
    cfg.DATALOADER.MAX_BAD = 0
    prepare_config(cfg)
    with pytest.raises(DataError, match="MAX_BAD"):
        DatasetCatalog.get(name)
    cfg.DATALOADER.MAX_BAD = 1
    prepare_config(cfg)
    annotations = [a for record in DatasetCatalog.get(name) for a in record["annotations"]]
    assert len(annotations) == len(content["annotations"]) - 1
    assert any(isinstance(a["segmentation"], dict) for a in annotations)


def test_keys_that_detectron2s_trainer_does_not_read_are_mentioned(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING", logger="gn_det"):
        prepare_config(plugin_cfg("quickstart.yaml", "TEST.PATIENCE", 7, "SOLVER.ACCUMULATE", 3))
        prepare_config(plugin_cfg("quickstart.yaml", "TEST.PATIENCE", 7))
    assert [r.message.split(":")[0] for r in caplog.records] == ["SOLVER.ACCUMULATE is 3", "TEST.PATIENCE is 7"]
    caplog.clear()
    batch = ["SOLVER.IMS_PER_BATCH", 3, "SOLVER.REFERENCE_BATCH", 16, "SOLVER.REFERENCE_WORLD_SIZE"]
    with caplog.at_level("WARNING", logger="gn_det"):
        prepare_config(plugin_cfg("quickstart.yaml", *batch, 8))  # Detectron2 scales by it
        assert not caplog.records
        prepare_config(plugin_cfg("quickstart.yaml", *batch, 0))
    assert [r.message.split(":")[0] for r in caplog.records] == ["SOLVER.REFERENCE_BATCH is 16"]


def zoo(name: str) -> str:
    import detectron2

    path = Path(detectron2.__file__).parent / "model_zoo" / "configs" / name
    if not path.is_file():
        pytest.skip("this installation of Detectron2 has no configs")
    return str(path)


@pytest.mark.parametrize(
    "name",
    [
        "Misc/mask_rcnn_R_50_FPN_3x_gn.yaml",
        "Misc/scratch_mask_rcnn_R_50_FPN_3x_gn.yaml",
        "Misc/scratch_mask_rcnn_R_50_FPN_9x_gn.yaml",
        "COCO-InstanceSegmentation/mask_rcnn_R_50_C4_1x.yaml",
        "COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml",
        "COCO-Detection/retinanet_R_50_FPN_1x.yaml",
    ],
)
def test_detectron2s_own_configs(name: str) -> None:
    cfg = plugin_cfg()
    cfg.merge_from_file(zoo(name))
    model = on_meta(cfg)
    assert describe(model) == describe(on_meta(without_plugin(cfg)))
    assert gn_modules(model) == (ALL if name.endswith("gn.yaml") else set())


# ---------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SOLVER.GAMMA", -3),
        ("SOLVER.WARMUP_FACTOR", -5.0),
        ("MODEL.RPN.SMOOTH_L1_BETA", -1),
        ("INPUT.CROP.SIZE", [7, 7]),
        ("SOLVER.CLIP_GRADIENTS.CLIP_VALUE", -1),
        ("MODEL.ROI_HEADS.IOU_LABELS", [0]),
        ("MODEL.GN.FUSED", "fast"),
    ],
)
def test_the_trainer_checks_what_python_set(name: str, value: Any) -> None:
    """By the schema, like the command line; keys and modules of the user's own pass."""
    cfg = plugin_cfg("quickstart.yaml", "MODEL.BACKBONE.NAME", "my_backbone", "SOLVER.LR_SCHEDULER_NAME", "Mine")
    cfg.MINE = CfgNode({"GAMMA": -3})
    check_for_trainer(cfg, own_loader=False, own_results=False)
    set_value(cfg, name, value)
    with pytest.raises(ConfigError, match=rf"^{name}\b"):
        check_for_trainer(cfg, own_loader=True, own_results=True)


@pytest.mark.parametrize("kind", ["ROIAlignV2", "ROIAlign"])  # ROIPool: tests/equality
def test_both_engines_pool_alike(kind: str) -> None:
    """The older variant has no shift by half a pixel; the embedded engine builds it as Detectron2 does."""
    keys = ["MODEL.ROI_BOX_HEAD.POOLER_TYPE", kind, "MODEL.ROI_MASK_HEAD.POOLER_TYPE", kind]
    cfg = plugin_cfg("gn_fpn.yaml", *keys)
    ours = build_embedded(load_config("gn_fpn", [*keys, "MODEL.ROI_HEADS.NUM_CLASSES", "80"])).roi_heads
    theirs = on_meta(cfg).roi_heads
    for name in ("box_pooler", "mask_pooler"):
        levels = getattr(theirs, name).level_poolers
        assert {level.aligned for level in levels} == {getattr(ours, name).aligned} == {kind == "ROIAlignV2"}
