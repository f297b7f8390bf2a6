"""Detectron2's families of models train with gn_det's GN: the table of docs/detectron2.md.

Each is asked for 16 groups. Training two iterations gives finite losses and a gradient for every gamma and beta that
trains; none of them decays; and norms that do not have 16 groups are those of the modules that the table names.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("detectron2.config", reason="needs an installed Detectron2")

from detectron2.config import CfgNode, LazyConfig, instantiate
from detectron2.modeling import build_model
from detectron2.solver import build_optimizer, get_default_optimizer_params
from detectron2.structures import Keypoints
from detectron2.utils.events import EventStorage

from gn_det.detectron2 import use_gn_heads
from gn_det.errors import ConfigError
from gn_det.modeling.census import norms_off_rule
from gn_det.norm import GroupNorm, GroupRule, NormFactory
from tests.detectron2.cases import plugin_cfg
from tests.golden.d2_side import to_detectron2
from tests.golden.model_cases import BATCHES, configure

pytestmark = pytest.mark.detectron2

SOURCE = Path(os.environ.get("DETECTRON2_SOURCE", "/nowhere"))
RULE = GroupRule(num_groups=16)
needs_source = pytest.mark.skipif(not SOURCE.is_dir(), reason="set DETECTRON2_SOURCE to a checkout of Detectron2")


@pytest.fixture
def project(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Makes a folder of Detectron2's projects importable."""
    yield lambda name: monkeypatch.syspath_prepend(str(SOURCE / "projects" / name))


def narrow(case: str, *pairs: Any, prepare: Callable[[CfgNode], None] = lambda cfg: None) -> CfgNode:
    """A small model of a golden case with GN of 16 groups everywhere, and further keys."""
    cfg = plugin_cfg()
    prepare(cfg)
    configure(cfg, case, INPUT__MASK_FORMAT="bitmask", MODEL__BACKBONE__FREEZE_AT=0, MODEL__GN__NUM_GROUPS=16)
    cfg.merge_from_list(list(pairs))
    return cfg


def inputs() -> list[dict[str, Any]]:
    """Two images with boxes, bitmaps, keypoints and a semantic segmentation."""
    found = [to_detectron2(scene) for scene in BATCHES["bitmaps"]()]
    for one in found:
        boxes = one["instances"].gt_boxes.tensor
        points = torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, torch.full((len(boxes), 1), 2.0)], dim=1)
        one["instances"].gt_keypoints = Keypoints(points[:, None].expand(-1, 17, -1).contiguous())
        one["sem_seg"] = torch.randint(0, 54, one["image"].shape[-2:])
    return found


def check(model: nn.Module, parameters: Any, *foreign: str, layer_norm: str = "-") -> None:
    """Train two iterations.

    Args:
        foreign: prefixes of the modules whose norms Detectron2 builds with 32 groups.
        layer_norm: prefix of the modules with Detectron2's LayerNorm.
    """
    optimizer = torch.optim.SGD(parameters, lr=1e-4)
    with EventStorage():
        for _ in range(2):
            losses = model.train()(inputs())
            assert losses and all(torch.isfinite(loss) for loss in losses.values())
            optimizer.zero_grad()
            sum(losses.values()).backward()
            optimizer.step()
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    norms = {name: m for name, m in model.named_modules() if isinstance(m, nn.GroupNorm)}
    assert norms
    for name, norm in norms.items():
        for parameter in norm.parameters():
            assert parameter.grad is not None and decay[id(parameter)] == 0, name
        assert norm.num_groups == (32 if name.startswith(foreign) else 16), name
    found = [name for names in norms_off_rule(model, RULE).values() for name in names]
    off = [name for name in found if not name.startswith(layer_norm)]
    assert sorted(off) == sorted(name for name in norms if name.startswith(foreign))
    assert foreign or all(isinstance(norm, GroupNorm) for norm in norms.values())


def trained(cfg: CfgNode, *foreign: str) -> None:
    model = build_model(cfg)
    check(model, build_optimizer(cfg, model).param_groups, *foreign)


_RETINA = (
    *("MODEL.META_ARCHITECTURE", "RetinaNet", "MODEL.BACKBONE.NAME", "build_retinanet_resnet_fpn_backbone"),
    *("MODEL.RESNETS.OUT_FEATURES", ["res3", "res4", "res5"], "MODEL.FPN.IN_FEATURES", ["res3", "res4", "res5"]),
    *("MODEL.RETINANET.NUM_CLASSES", 24, "MODEL.RETINANET.NORM", "GN"),
)
_CASCADE = ("MODEL.ROI_HEADS.NAME", "CascadeROIHeads", "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG", True)


@pytest.mark.parametrize(
    ("case", "keys", "foreign"),
    [
        ("gn_fpn", (), ()),
        ("gn_c4", (), ()),
        ("gn_fpn", _CASCADE, ()),
        ("gn_fpn", _RETINA, ("head.",)),
        ("gn_fpn", ("MODEL.META_ARCHITECTURE", "PanopticFPN"), ("sem_seg_head.",)),
        ("gn_fpn", ("MODEL.KEYPOINT_ON", True, "MODEL.MASK_ON", False), ()),
    ],
    ids=["Mask R-CNN FPN", "Mask R-CNN C4", "Cascade", "RetinaNet", "Panoptic FPN", "Keypoint R-CNN"],
)
def test_by_yaml_keys(case: str, keys: tuple[Any, ...], foreign: tuple[str, ...]) -> None:
    trained(narrow(case, *keys, "MODEL.SEM_SEG_HEAD.NORM", "GN"), *foreign)


@needs_source
def test_pointrend(project: Callable[[str], None]) -> None:
    project("PointRend")
    from point_rend import add_pointrend_config

    keys = ["MODEL.ROI_MASK_HEAD.NAME", "PointRendMaskHead", "MODEL.ROI_MASK_HEAD.POOLER_TYPE", ""]
    keys += ["MODEL.ROI_MASK_HEAD.FC_DIM", 64, "MODEL.ROI_MASK_HEAD.OUTPUT_SIDE_RESOLUTION", 7]
    keys += ["MODEL.ROI_MASK_HEAD.IN_FEATURES", ["p2"], "MODEL.ROI_MASK_HEAD.POINT_HEAD_ON", True]
    keys += ["MODEL.ROI_MASK_HEAD.NUM_FC", 2, "MODEL.POINT_HEAD.IN_FEATURES", ["p2"], "MODEL.POINT_HEAD.FC_DIM", 32]
    trained(narrow("gn_fpn", *keys, "MODEL.POINT_HEAD.NUM_CLASSES", 24, prepare=add_pointrend_config))


@needs_source
def test_tridentnet(project: Callable[[str], None]) -> None:
    project("TridentNet")
    from tridentnet import add_tridentnet_config

    keys = ["MODEL.BACKBONE.NAME", "build_trident_resnet_backbone", "MODEL.ROI_HEADS.NAME", "TridentRes5ROIHeads"]
    keys += ["MODEL.PROPOSAL_GENERATOR.NAME", "TridentRPN", "MODEL.TRIDENT.TEST_BRANCH_IDX", 1]
    trained(narrow("gn_c4", *keys, prepare=add_tridentnet_config), "backbone.", "roi_heads.res5.")


@needs_source
def test_trunk_of_densepose(project: Callable[[str], None]) -> None:
    """Its box branch trains on the plugin's trunk; annotations of surfaces are beyond this test."""
    project("DensePose")
    pytest.importorskip("densepose", reason="needs Detectron2's project DensePose")
    from densepose import add_densepose_config

    keys = ["MODEL.ROI_HEADS.NAME", "DensePoseROIHeads", "MODEL.DENSEPOSE_ON", False, "MODEL.MASK_ON", False]
    trained(narrow("gn_fpn", *keys, prepare=add_densepose_config))


@needs_source
def test_new_baselines_by_lazyconfig() -> None:
    """Detectron2's large-scale jitter with GN instead of SyncBN: its modules take gn_det's norm as a callable."""
    model = LazyConfig.load(str(SOURCE / "configs/new_baselines/mask_rcnn_R_50_FPN_100ep_LSJ.py")).model
    norm = NormFactory("GN", RULE)
    bottom_up = model.backbone.bottom_up
    bottom_up.stem.norm = bottom_up.stages.norm = model.backbone.norm = norm
    model.roi_heads.box_head.conv_norm = model.roi_heads.mask_head.conv_norm = norm
    built = instantiate(model)
    decayed = get_default_optimizer_params(built, base_lr=1e-4, weight_decay_norm=0.0)
    check(built, [{"weight_decay": 1e-4, **group} for group in decayed])


@needs_source
@pytest.mark.parametrize("name", ["mask_rcnn_vitdet_b_100ep", "cascade_mask_rcnn_vitdet_b_100ep"])
def test_heads_of_vitdet_by_lazyconfig(name: str, tmp_path: Path) -> None:
    """ViTDet on a small ViT with its own AdamW: GN in the 4conv1fc box heads and the mask head, its LN elsewhere.

    With 32 groups the state dict has the names and shapes of Detectron2's own GN heads.
    """
    file = str(SOURCE / f"projects/ViTDet/configs/COCO/{name}.py")
    cfg, theirs = (LazyConfig.load(file) for _ in range(2))
    use_gn_heads(cfg.model, RULE)
    LazyConfig.save(cfg, str(tmp_path / "config.yaml"))  # as lazyconfig_train_net.py does
    cfg.model = LazyConfig.load(str(tmp_path / "config.yaml")).model
    for model in (cfg.model, theirs.model):
        net = {"img_size": 128, "embed_dim": 64, "depth": 2, "num_heads": 2, "window_size": 4}
        model.backbone.net.update(net | {"window_block_indexes": [0]})
        model.backbone.square_pad = 128
        model.roi_heads.num_classes, model.roi_heads.batch_size_per_image = 24, 16
    heads = theirs.model.roi_heads
    for head in (*heads.get("box_heads", [heads.get("box_head")]), heads.mask_head):
        head.conv_norm = "GN"
    built = instantiate(cfg.model)
    built.load_state_dict(instantiate(theirs.model).state_dict(), strict=True)
    norms = [n for n, m in built.named_modules() if isinstance(m, nn.GroupNorm)]
    stages = 3 if "cascade" in name else 1
    assert len(norms) == 4 * stages + 4 and all(
        n.startswith(("roi_heads.box_head", "roi_heads.mask_head")) for n in norms
    )
    cfg.optimizer.params.model = built
    groups = instantiate(cfg.optimizer).param_groups
    parameters = [{"params": g["params"], "weight_decay": g["weight_decay"]} for g in groups]
    check(built, parameters, layer_norm="backbone.simfp_")


@needs_source
def test_gn_heads_need_a_head_with_norms() -> None:
    models = SOURCE / "configs/common/models"
    for name in ("mask_rcnn_fpn.py", "retinanet.py"):
        with pytest.raises(ConfigError, match=r"roi_heads: GN is for StandardROIHeads .* set its conv_dims"):
            use_gn_heads(LazyConfig.load(str(models / name)).model)
