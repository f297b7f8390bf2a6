"""The RLE codec equals pycocotools' on valid strings, and never lets an invalid one through."""

from __future__ import annotations

import numpy as np
import pytest

from gn_det.data.annotations import Defect, check_segmentation, decode_counts


def test_rle_codec_equals_pycocotools() -> None:
    from pycocotools import mask as coco_mask

    rng = np.random.default_rng(0)
    for case in range(200):
        height, width = (int(v) for v in rng.integers(1, 90, 2))
        bitmap = np.asfortranarray(rng.random((height, width)) < rng.choice([0.001, 0.1, 0.5, 0.99]), dtype=np.uint8)
        if case % 5 == 0:  # long runs, numbers of several characters
            bitmap = np.asfortranarray(np.kron(bitmap, np.ones((40, 30), dtype=np.uint8)))
        counts = coco_mask.encode(bitmap)["counts"]
        runs = decode_counts(counts)
        flat = bitmap.T.reshape(-1)
        edges = np.flatnonzero(np.diff(np.concatenate([[0], flat])))
        assert runs.tolist() == np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()


def test_damaged_strings_are_caught() -> None:
    """Whatever passes the check decodes to exactly height x width pixels."""
    from pycocotools import mask as coco_mask

    rng = np.random.default_rng(1)
    bitmap = np.asfortranarray(rng.random((20, 30)) < 0.3, dtype=np.uint8)
    good = coco_mask.encode(bitmap)["counts"]
    passed = 0
    for _ in range(2000):
        damaged = bytearray(good)
        for _ in range(int(rng.integers(1, 4))):
            damaged[int(rng.integers(len(damaged)))] = int(rng.integers(1, 128))
        damaged = damaged[: int(rng.integers(1, len(damaged) + 1))]
        try:
            rle, _ = check_segmentation({"size": [20, 30], "counts": bytes(damaged)}, 20, 30)
        except Defect:
            continue
        passed += 1
        assert coco_mask.decode(rle).shape == (20, 30)
        assert decode_counts(rle["counts"]).sum() == 600
    assert passed < 200


@pytest.mark.parametrize("nothing", [None, [], {}])
def test_no_segmentation(nothing: object) -> None:
    assert check_segmentation(nothing, 9, 9) == (None, 0)
