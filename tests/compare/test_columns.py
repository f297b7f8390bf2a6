"""Published numbers are compared within one source and one kind of model."""

from __future__ import annotations

import pytest

from gn_det.compare.columns import SOURCES, load_references, published_difference


def test_published_differences_stay_within_one_source_and_model() -> None:
    rows, sources = load_references()
    assert {r.source for r in rows.values()} == set(sources) <= set(SOURCES)
    assert published_difference(rows["fpn_gn"], rows["fpn_bn"], "box_ap") == pytest.approx(1.7)
    # BN* trained longer does not gain: Detectron's 3x against its 2x
    assert published_difference(rows["detectron_bn_3x"], rows["detectron_bn_2x"], "box_ap") == pytest.approx(0.3)
    assert published_difference(rows["detectron_bn_3x"], rows["detectron_bn_2x"], "mask_ap") == pytest.approx(-0.2)
    assert published_difference(rows["c4_bn_tuned"], rows["c4_bn"], "box_ap") == -6.0
    assert published_difference(rows["d2_fpn_gn_3x"], rows["fpn_bn"], "box_ap") is None
    assert published_difference(rows["c4_ln"], rows["fpn_gn"], "box_ap") is None
    assert published_difference(rows["fpn_gn"], rows["fpn_bn"], "top1_error") is None
