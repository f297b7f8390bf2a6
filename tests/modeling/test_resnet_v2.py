"""Pre-activation backbones in a detector: training, freezing, folding, census, what is refused."""

from __future__ import annotations

import pytest
import torch

from gn_det.config import load_config
from gn_det.deploy.graph import GraphDetector
from gn_det.errors import ConfigError
from gn_det.modeling import build_model
from gn_det.modeling.census import norm_census
from gn_det.modeling.layers import fold_weights
from tests.golden.model_cases import BATCHES, flatten
from tests.test_configs import SMALL

KEYS = {"bit": ["MODEL.RESNETS.VARIANT", "bit", "MODEL.WS.RESNETS", "bit"], "v2d": ["MODEL.RESNETS.VARIANT", "v2d"]}


@pytest.mark.parametrize("variant", KEYS)
def test_trains_and_detects(variant: str) -> None:
    """Every parameter that is not frozen gets a gradient; folded weights give the same detections."""
    torch.manual_seed(0)
    keys = [*SMALL, *KEYS[variant], "MODEL.RESNETS.STEM_OUT_CHANNELS", "64"]
    model = build_model(load_config("gn_fpn.yaml", keys))
    samples = flatten(BATCHES["two_sizes"]())
    for sample in samples:
        sample["targets"].classes %= 4
    losses = model(samples)
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        frozen = name.startswith(("backbone.bottom_up.stem.", "backbone.bottom_up.res2."))
        assert (parameter.grad is None) == frozen == (not parameter.requires_grad), name
    kinds = {row.stage: row.norm for row in norm_census(model)}
    ws = "+WS" if variant == "bit" else ""
    assert kinds["res2"] == kinds["res5"] == f"GN{ws}" and kinds["stem"] == ("none" if ws else "GN")
    model.eval()
    model.roi_heads.box_predictor.score_thresh = 0.0
    before = model.detect_raw(samples)[1]
    graph = GraphDetector(model, "BGR")
    fold_weights(model)
    for a, b in zip(before, model.detect_raw(samples)[1]):
        assert torch.equal(a.boxes, b.boxes) and torch.equal(a.scores, b.scores) and len(a)
    assert not any(getattr(m, "ws", "") for m in graph.modules())


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        (["MODEL.RESNETS.DEPTH", "34", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64"], "DEPTH 50, 101 or 152"),
        (["MODEL.RESNETS.NUM_GROUPS", "32"], "NUM_GROUPS 1"),
        (["MODEL.RESNETS.STRIDE_IN_1X1", "True"], "STRIDE_IN_1X1 False"),
        (["MODEL.RESNETS.RES5_DILATION", "2"], "RES5_DILATION 1"),
        (["MODEL.RESNETS.NORM", ""], "NORM a norm, such as GN"),
    ],
)
def test_what_they_do_not_have(keys: list[str], named: str) -> None:
    with pytest.raises(ConfigError, match=rf"MODEL\.RESNETS\.VARIANT bit needs MODEL\.RESNETS\.{named}$"):
        load_config("gn_fpn.yaml", ["MODEL.RESNETS.VARIANT", "bit", *keys])
    with pytest.raises(ConfigError, match=r"VARIANT v2d needs MODEL\.BACKBONE\.NAME an FPN backbone$"):
        load_config("gn_c4.yaml", ["MODEL.RESNETS.VARIANT", "v2d"])
