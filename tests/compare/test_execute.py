"""What a run is measured by."""

from __future__ import annotations

import math

from gn_det.compare.execute import detection_metrics


def test_no_object_of_a_size_is_no_number() -> None:
    """COCO's -1 and nan both say so."""
    flat = {"set/bbox/AP": 40.0, "set/bbox/APs": -1.0, "set/bbox/APl": math.nan, "other/bbox/AP": 1.0}
    assert detection_metrics(flat) == {"box_ap": 40.0, "box_ap_s": None, "box_ap_l": None}
