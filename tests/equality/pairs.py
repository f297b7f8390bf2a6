"""The embedded engine's model and Detectron2's of one case, with the same calibrated weights. Imports Detectron2."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from gn_det.config import get_cfg
from gn_det.modeling import MaskRCNN, build_model
from tests.golden.d2_side import SIDES
from tests.golden.model_cases import calibration_batch, configure, fill_weights, measure_calibration

Pair = tuple[MaskRCNN, nn.Module]

#: Calibrated weights of the unchanged cases: measuring them takes longer than a test.
_weights: dict[str, dict[str, Tensor]] = {}


def make_pair(case: str, side: str = "own", **changes: Any) -> Pair:
    """Both engines with the same calibrated weights, loaded strictly in both directions."""
    ours, theirs = build_model(configure(get_cfg(), case, **changes)), SIDES[side](case, **changes)
    if changes or case not in _weights:
        fill_weights(ours)
        measure_calibration(ours, calibration_batch())
        if not changes:
            _weights[case] = {k: v.clone() for k, v in ours.state_dict().items()}
    else:
        ours.load_state_dict(_weights[case])
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs
