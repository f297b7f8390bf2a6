"""TEST.AUG: boxes, scores, classes and masks of both engines equal GeneralizedRCNNWithTTA's to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("detectron2.modeling", reason="compares with an installed Detectron2")

from detectron2.modeling import GeneralizedRCNNWithTTA

from gn_det.config import get_cfg
from gn_det.detectron2.conversion import detector
from gn_det.engine.engines import Engine
from gn_det.structures import Sample
from tests.equality.pairs import make_pair
from tests.golden.d2_side import to_detectron2
from tests.golden.model_cases import BATCHES, configure, flatten

pytestmark = pytest.mark.detectron2


@pytest.mark.parametrize(("case", "flip"), [("gn_fpn", True), ("gn_c4", True), ("gn_fpn", False)])
def test_equal_to_detectron2(case: str, flip: bool) -> None:
    """Five sizes: the last batch of three is not full, and a size above MAX_SIZE is cut."""
    ours, theirs = (model.eval() for model in make_pair(case))
    cfg = configure(get_cfg(), case)
    cfg.TEST.AUG.ENABLED, cfg.TEST.AUG.FLIP = True, flip
    cfg.TEST.AUG.MIN_SIZES, cfg.TEST.AUG.MAX_SIZE = (48, 64, 80, 96, 200), 170
    scenes = BATCHES["two_sizes"]()
    samples: list[Sample] = flatten(scenes)
    with torch.no_grad():
        want: list[Any] = [
            x["instances"] for x in GeneralizedRCNNWithTTA(cfg, theirs)(list(map(to_detectron2, scenes)))
        ]
        embedded = Engine().detector(ours, cfg)(samples)
        plugin = detector(theirs, cfg)(samples)
        plain = ours(samples)
    for one, other, wanted, single in zip(embedded, plugin, want, plain):
        assert len(one) > 0 and not torch.equal(one.boxes[:1], single.boxes[:1])
        for d in (one, other):
            assert d.image_size == wanted.image_size
            assert torch.equal(d.boxes, wanted.pred_boxes.tensor)
            assert torch.equal(d.scores, wanted.scores)
            assert torch.equal(d.classes, wanted.pred_classes)
            assert torch.equal(d.masks, wanted.pred_masks.bool())
