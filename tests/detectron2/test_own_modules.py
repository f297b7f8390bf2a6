"""Modules of the user's own beside gn_det's: subclasses of registry entries, backbones, and a word on their norms."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("detectron2.config", reason="needs an installed Detectron2")

from detectron2 import model_zoo
from detectron2.config import CfgNode
from detectron2.engine import DefaultPredictor
from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, Backbone, GeneralizedRCNN, build_model
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.roi_heads import ROI_BOX_HEAD_REGISTRY, ROI_HEADS_REGISTRY, ROI_MASK_HEAD_REGISTRY

from gn_det.checkpoint.io import save_checkpoint
from gn_det.checkpoint.meta import build_meta
from gn_det.detectron2 import GNFPN, Trainer
from gn_det.detectron2.backbone import GNResNet
from gn_det.detectron2.config import check_for_trainer
from gn_det.detectron2.gn_heads import GNFastRCNNConvFCHead, GNMaskRCNNConvUpsampleHead
from gn_det.detectron2.routing import ROUTES
from gn_det.errors import ConfigError
from gn_det.norm import GroupRule, NormFactory
from tests.detectron2.cases import TINY, gn_modules, own_data, plugin_cfg

pytestmark = pytest.mark.detectron2

CLASSES = [(registry, name) for registry, name, *_ in ROUTES if "build_" not in name]
CLASSES += [(META_ARCH_REGISTRY, name) for name, _ in META_ARCH_REGISTRY]


@pytest.fixture
def registered() -> Iterator[list[tuple[Any, str]]]:
    """Entries to take out again."""
    names: list[tuple[Any, str]] = []
    yield names
    for registry, name in names:
        del registry._obj_map[name]


def on_meta(cfg: CfgNode) -> nn.Module:
    cfg.MODEL.DEVICE = "meta"
    with torch.device("meta"):
        return build_model(cfg)


@pytest.mark.parametrize(("registry", "name"), CLASSES, ids=[name for _, name in CLASSES])
def test_entries_are_classes(registry: Any, name: str) -> None:
    """Each has its name, derives from Detectron2's class, and can be derived from."""
    entry = registry.get(name)
    assert isinstance(entry, type) and issubclass(entry, entry.gn_det_stock) and entry.__name__ == name

    class Mine(entry):  # type: ignore[valid-type,misc]
        def __init__(self) -> None:
            nn.Module.__init__(self)

    assert type(Mine()) is Mine and isinstance(Mine(), entry.gn_det_stock)


@pytest.mark.parametrize(
    ("registry", "name", "key", "config"),
    [
        (ROI_MASK_HEAD_REGISTRY, "MaskRCNNConvUpsampleHead", "MODEL.ROI_MASK_HEAD.NAME", "gn_fpn.yaml"),
        (ROI_BOX_HEAD_REGISTRY, "FastRCNNConvFCHead", "MODEL.ROI_BOX_HEAD.NAME", "gn_fpn.yaml"),
        (ROI_HEADS_REGISTRY, "Res5ROIHeads", "MODEL.ROI_HEADS.NAME", "gn_c4.yaml"),
        (META_ARCH_REGISTRY, "GeneralizedRCNN", "MODEL.META_ARCHITECTURE", "gn_fpn.yaml"),
    ],
)
def test_a_subclass_of_an_entry_in_a_model(
    registry: Any, name: str, key: str, config: str, registered: list[tuple[Any, str]]
) -> None:
    """Built by ``configurable`` from the config: Detectron2's module with the user's additions."""

    class Mine(registry.get(name)):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.mine = True

    Mine.__name__ = f"MineOf{name}"
    registry.register(Mine)
    registered.append((registry, Mine.__name__))
    model = on_meta(plugin_cfg(config, key, Mine.__name__, "MODEL.ROI_HEADS.NUM_CLASSES", 3))
    (found,) = [m for m in model.modules() if isinstance(m, Mine)]
    assert found.mine and isinstance(found, registry.get(name).gn_det_stock)


class Toy(Backbone):
    """Two strided convolutions, group norms of 4 groups."""

    def __init__(self, norm: str = "") -> None:
        super().__init__()
        self.a = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.GroupNorm(4, 8), nn.ReLU())
        self.b = nn.Sequential(nn.Conv2d(8, 64, 2, stride=2), get_norm(norm, 64) if norm else nn.Identity())

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        a = self.a(x)
        return {"fine": a, "coarse": self.b(a)}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return {"fine": ShapeSpec(channels=8, stride=4), "coarse": ShapeSpec(channels=64, stride=8)}


def build_toy_fpn(cfg: CfgNode, input_shape: ShapeSpec) -> Backbone:
    """A builder as users write it."""
    names = ["fine", "coarse"]
    block = LastLevelMaxPool()
    block.in_feature = "p3"
    return GNFPN(Toy("GN"), in_features=names, out_channels=32, norm=cfg.MODEL.FPN.NORM, top_block=block)


def toy_cfg(*more: Any) -> CfgNode:
    cfg = plugin_cfg("quickstart.yaml")
    cfg.merge_from_list(TINY)
    levels = ["p2", "p3", "p4"]
    keys = ["MODEL.BACKBONE.NAME", "build_toy_fpn", "MODEL.RPN.IN_FEATURES", levels, "MODEL.ROI_HEADS.IN_FEATURES"]
    cfg.merge_from_list([*keys, levels[:2], "MODEL.ANCHOR_GENERATOR.SIZES", [[8], [16], [32]], *more])
    return cfg


def test_fpn_and_heads_with_gn_on_any_backbone(
    tmp_path: Path, registered: list[tuple[Any, str]], caplog: pytest.LogCaptureFixture
) -> None:
    """A toy trunk trains one iteration; its norms, which do not follow MODEL.GN, are named with their number."""
    BACKBONE_REGISTRY.register(build_toy_fpn)
    registered.append((BACKBONE_REGISTRY, "build_toy_fpn"))
    data = own_data(tmp_path)
    sets = ["DATASETS.TRAIN", (f"{data[1]}@{data[3]}",), "DATASETS.TEST", (), "OUTPUT_DIR", str(tmp_path / "out")]
    with caplog.at_level("WARNING", logger="gn_det"):
        trainer = Trainer(toy_cfg(*sets, "SOLVER.MAX_ITER", 1))
    assert gn_modules(trainer.model) == {"GNFPN", "GNFastRCNNConvFCHead", "GNMaskRCNNConvUpsampleHead"}
    texts = [r.message for r in caplog.records if "do not follow" in r.message]
    assert texts == [
        "norm layers that do not follow MODEL.GN (32 groups, eps 1e-05): backbone.bottom_up.a.1 have 4 groups; they "
        "are not gn_det's."
    ]
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert (tmp_path / "out" / "model_final.pth").is_file()
    with pytest.raises(ConfigError, match=r"\['res5'\]: Toy makes fine, coarse"):
        GNFPN(Toy(), in_features=["res5"], out_channels=32)


def test_norms_that_ignore_the_groups_are_named(
    registered: list[tuple[Any, str]], caplog: pytest.LogCaptureFixture
) -> None:
    """Detectron2's get_norm has 32 groups whatever MODEL.GN says: in a user's backbone, and in its own heads."""
    BACKBONE_REGISTRY.register(build_toy_fpn)
    registered.append((BACKBONE_REGISTRY, "build_toy_fpn"))
    with caplog.at_level("WARNING", logger="gn_det"):
        on_meta(toy_cfg("MODEL.GN.NUM_GROUPS", 8))
    told = (
        "backbone.fpn_lateral2.norm, backbone.fpn_output2.norm, backbone.fpn_lateral3.norm, backbone.fpn_output3.norm"
    )
    assert f"norm layers that do not follow MODEL.GN (8 groups, eps 1e-05): {told} and 1 more have 32" in caplog.text
    assert "norm layers that do not follow MODEL.GN (8 groups, eps 1e-05): backbone.bottom_up.a.1 have 4" in caplog.text
    caplog.clear()
    retina = ["MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone"]
    retina += ["MODEL.RPN.IN_FEATURES", ["p3"], "MODEL.RETINANET.NORM", "GN", "MODEL.GN.NUM_GROUPS", 16]
    levels = ["MODEL.ANCHOR_GENERATOR.SIZES", [[32]], "MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"]]
    with caplog.at_level("WARNING", logger="gn_det"):
        on_meta(plugin_cfg("gn_fpn.yaml", *retina, *levels))
    assert "norm layers that do not follow MODEL.GN (16 groups, eps 1e-05): head.cls_subnet.1" in caplog.text
    caplog.clear()
    with caplog.at_level("WARNING", logger="gn_det"):
        on_meta(plugin_cfg("gn_fpn.yaml", *retina, *levels, "MODEL.RETINANET.NORM", "LN", "MODEL.GN.NUM_GROUPS", 32))
        on_meta(plugin_cfg("gn_fpn.yaml", "MODEL.GN.NUM_GROUPS", 16))
    assert caplog.text.count("do not follow") == 1 and "have LN over channels alone" in caplog.text


def test_an_architecture_of_the_users_own(registered: list[tuple[Any, str]], caplog: pytest.LogCaptureFixture) -> None:
    """Registered after the import and derived from Detectron2's class: classes are settled and norms are named."""

    class MyRCNN(GeneralizedRCNN):
        pass

    META_ARCH_REGISTRY.register(MyRCNN)
    BACKBONE_REGISTRY.register(build_toy_fpn)
    registered += [(META_ARCH_REGISTRY, "MyRCNN"), (BACKBONE_REGISTRY, "build_toy_fpn")]
    with caplog.at_level("WARNING", logger="gn_det"):
        model = on_meta(toy_cfg("MODEL.META_ARCHITECTURE", "MyRCNN", "MODEL.ROI_HEADS.NUM_CLASSES", 0))
    assert type(model) is MyRCNN and model.roi_heads.num_classes == 5
    assert caplog.text.count("do not follow MODEL.GN") == 1


def test_retinanet_takes_the_classes_of_the_data(tmp_path: Path) -> None:
    """Detectron2's 80 follows; another number than the data's is refused by name; a number that fits stays."""
    data = own_data(tmp_path)
    sets = ["DATASETS.TRAIN", (f"{data[1]}@{data[3]}",), "DATASETS.TEST", (), "OUTPUT_DIR", str(tmp_path / "out")]
    keys = ["MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone"]
    keys += ["MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"], "MODEL.RESNETS.OUT_FEATURES", ["res3", "res4", "res5"]]
    keys += ["MODEL.MASK_ON", False, "MODEL.ANCHOR_GENERATOR.SIZES", [[32]], "SOLVER.MAX_ITER", 1]

    def cfg_of(*more: Any) -> CfgNode:
        cfg = plugin_cfg("quickstart.yaml")
        cfg.merge_from_list([*TINY, *sets, *keys, *more])
        return cfg

    trainer = Trainer(cfg_of())
    assert trainer.model.num_classes == 5 and trainer.cfg.MODEL.RETINANET.NUM_CLASSES == 5
    trainer.resume_or_load(resume=False)
    trainer.train()
    assert build_model(cfg_of("MODEL.RETINANET.NUM_CLASSES", 5)).num_classes == 5
    with pytest.raises(ConfigError, match=r"MODEL.RETINANET.NUM_CLASSES is 7, but the training set has 5 classes"):
        Trainer(cfg_of("MODEL.RETINANET.NUM_CLASSES", 7))


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        (["MODEL.KEYPOINT_ON", True], "MODEL.KEYPOINT_ON True: gn_det's loader and evaluation are for boxes"),
        (
            ["MODEL.LOAD_PROPOSALS", True],
            "MODEL.LOAD_PROPOSALS True: gn_det's loader and evaluation are for boxes",
        ),
        (["MODEL.META_ARCHITECTURE", "PanopticFPN"], "MODEL.META_ARCHITECTURE PanopticFPN: gn_det's loader"),
        (["MODEL.META_ARCHITECTURE", "SemanticSegmentor"], "MODEL.META_ARCHITECTURE SemanticSegmentor"),
        (["MODEL.RESNETS.DEFORM_ON_PER_STAGE", [False, True, True, True]], "deformable convolutions need a GPU"),
        (["TEST.PRECISE_BN.ENABLED", True], "TEST.PRECISE_BN.ENABLED True is not implemented"),
        (
            ["DATALOADER.SAMPLER_TRAIN", "Mine"],
            "DATALOADER.SAMPLER_TRAIN 'Mine': gn_det's loader supports TrainingSampler",
        ),
    ],
)
def test_what_the_trainer_does_not_do_is_refused_by_name(keys: list[Any], text: str, tmp_path: Path) -> None:
    """Before data are read or a file is written."""
    with pytest.raises(ConfigError, match=text):
        Trainer(plugin_cfg("quickstart.yaml", *keys, "OUTPUT_DIR", str(tmp_path)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("key", ["MODEL.KEYPOINT_ON", "MODEL.LOAD_PROPOSALS"])
def test_own_data_need_own_loader_and_own_results(key: str) -> None:
    cfg = plugin_cfg("quickstart.yaml", key, True)
    check_for_trainer(cfg, own_loader=True, own_results=True)
    for own_loader, own_results in ((True, False), (False, True)):
        with pytest.raises(ConfigError, match=f"{key} True: .* override build_train_loader and build_evaluator"):
            check_for_trainer(cfg, own_loader=own_loader, own_results=own_results)


#: Detectron2's own YAML files for boxes and masks on COCO that gn_det.detectron2.Trainer does not take, and the key.
REFUSED = {
    "COCO-Detection/fast_rcnn_R_50_FPN_1x.yaml": "MODEL.LOAD_PROPOSALS",
    "COCO-Detection/rpn_R_50_C4_1x.yaml": "MODEL.META_ARCHITECTURE ProposalNetwork",
    "COCO-Detection/rpn_R_50_FPN_1x.yaml": "MODEL.META_ARCHITECTURE ProposalNetwork",
    "Misc/mask_rcnn_R_50_FPN_3x_syncbn.yaml": "TEST.PRECISE_BN.ENABLED",
    "Misc/panoptic_fpn_R_101_dconv_cascade_gn_3x.yaml": "MODEL.META_ARCHITECTURE PanopticFPN",
    "Misc/scratch_mask_rcnn_R_50_FPN_9x_syncbn.yaml": "TEST.PRECISE_BN.ENABLED",
    "Misc/semantic_R_50_FPN_1x.yaml": "MODEL.META_ARCHITECTURE SemanticSegmentor",
}
ZOO = Path(model_zoo.__file__).parent / "configs"
FOLDERS = ("COCO-Detection", "COCO-InstanceSegmentation", "Misc")


@pytest.mark.parametrize("name", [f"{f}/{p.name}" for f in FOLDERS for p in sorted((ZOO / f).glob("*.yaml"))])
def test_detectron2s_yaml_builds_or_is_refused_by_name(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """At full size, unchanged but for a GPU's device; all norms follow MODEL.GN."""
    cfg = plugin_cfg()
    cfg.merge_from_file(str(ZOO / name))
    cfg.MODEL.DEVICE = "cuda"
    if name in REFUSED:
        with pytest.raises(ConfigError, match=REFUSED[name]):
            check_for_trainer(cfg, own_loader=False, own_results=False)
        return
    check_for_trainer(cfg, own_loader=False, own_results=False)
    with caplog.at_level("WARNING", logger="gn_det"):
        on_meta(cfg)
    assert "do not follow" not in caplog.text


@pytest.mark.parametrize("ratio", [0.0, 1.5, "half", True, 0.5])
def test_random_subset_is_checked(ratio: Any, tmp_path: Path) -> None:
    """0.5 is a ratio that RandomSubsetTrainingSampler alone reads."""
    cfg = plugin_cfg("quickstart.yaml", "OUTPUT_DIR", str(tmp_path))
    cfg.DATALOADER.RANDOM_SUBSET_RATIO = ratio
    cfg.DATALOADER.SAMPLER_TRAIN = "TrainingSampler" if ratio == 0.5 else "RandomSubsetTrainingSampler"
    said = "it must be one of 1.0, 1 with DATALOADER.SAMPLER_TRAIN Tr" if ratio == 0.5 else "a number above 0 up to 1"
    with pytest.raises(ConfigError, match=f"RANDOM_SUBSET_RATIO .*{said}"):
        Trainer(cfg)


def test_predictor_tells_of_other_groups(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The checkpoint was trained with 8 groups; weights fit any number, so only its config can tell."""
    cfg = plugin_cfg("quickstart.yaml", *TINY, "MODEL.GN.NUM_GROUPS", 8)
    model = build_model(cfg)
    path = tmp_path / "model_final.pth"
    names = tuple("abcde")
    save_checkpoint(path, {"model": model.state_dict(), "gn_det": build_meta(cfg, names, range(5))})
    image = np.zeros((64, 64, 3), dtype=np.uint8)
    with caplog.at_level("WARNING", logger="gn_det"):
        cfg.MODEL.WEIGHTS = str(path)
        DefaultPredictor(cfg)(image)
        assert "other groups" not in caplog.text
        cfg.MODEL.GN.NUM_GROUPS = 32
        DefaultPredictor(cfg)(image)
    assert "was trained with other groups: set MODEL.GN.NUM_GROUPS 8 instead of 32" in caplog.text


def test_groups_is_still_a_keyword() -> None:
    """``norm="GN", groups=GroupRule(8)``, as it was written once, is ``norm=NormFactory("GN", GroupRule(8))``."""
    rule, shape = GroupRule(8), ShapeSpec(channels=32, height=7, width=7)
    bottom = GNResNet(depth=18, out_features=("res2", "res3"), res2_channels=64)
    layers = {"in_features": ("res2", "res3"), "out_channels": 32}
    box, mask = {"conv_dims": [32], "fc_dims": [16]}, {"num_classes": 2, "conv_dims": [32, 32]}
    for build, norm in (
        (partial(GNResNet, depth=18, out_features=("res2",), res2_channels=64), "norm"),
        (partial(GNFPN, bottom, **layers), "norm"),
        (partial(GNFastRCNNConvFCHead, shape, **box), "conv_norm"),
        (partial(GNMaskRCNNConvUpsampleHead, shape, **mask), "conv_norm"),
    ):
        with pytest.warns(DeprecationWarning, match="NormFactory"):
            old = build(**{norm: "GN", "groups": rule})
        assert str(old) == str(build(**{norm: NormFactory("GN", rule)})) and "GroupNorm(8, " in str(old)
