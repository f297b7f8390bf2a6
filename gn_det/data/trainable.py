"""Whether sets can be learnt from, decided before a model is built; training and ``gn-det check`` ask the same."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from gn_det.data.coco import CHECK_HINT, CocoDataset, check_same_classes, refuse_if_too_many
from gn_det.errors import DataError


def check_trainable(cfg: Any, datasets: Sequence[CocoDataset]) -> np.ndarray:
    """Whether the sets can be learnt from as ``cfg`` says, before a model is built or a file written.

    Returns:
        (N,) bool, for the images of all sets one after the other: has objects.

    Raises:
        DataError: no image with objects, different classes, or no masks where MODEL.MASK_ON needs them.
    """
    check_same_classes(datasets)
    for dataset in datasets if cfg.MODEL.MASK_ON else ():
        check_masks(dataset, int(cfg.DATALOADER.MAX_BAD))
    return check_objects(datasets)


def check_objects(datasets: Sequence[CocoDataset]) -> np.ndarray:
    """(N,) bool, whether each image of all sets has objects; refuses sets without any."""
    has_objects = np.concatenate([d.object_counts > 0 for d in datasets] or [np.zeros(0, dtype=bool)])
    if not has_objects.any():
        names = ", ".join(d.json_file for d in datasets) or "DATASETS.TRAIN"
        dropped = [entry for d in datasets for entry in d.bad]
        why = f"; {len(dropped)} bad entries were dropped, such as {dropped[0]} ({CHECK_HINT})" if dropped else ""
        crowds = sum(d.crowds for d in datasets)
        if crowds:
            raise DataError(
                f"{names}: all {crowds} objects are crowds (iscrowd 1), which are never trained on: set iscrowd 0 for "
                f"single objects, with an RLE mask, too{why}"
            )
        raise DataError(f"{names}: no image has an object to learn from: check the annotations{why}")
    return has_objects


def check_masks(dataset: CocoDataset, max_bad: int) -> None:
    """Objects without a mask count as bad where masks are trained; a few are left out, many refused."""
    if dataset.without_mask == 0:
        return
    if dataset.without_mask == int(dataset.object_counts.sum()):
        raise DataError(
            f"{dataset.json_file}: none of its {dataset.without_mask} objects has a segmentation: add masks, or train "
            f"boxes only with MODEL.MASK_ON False"
        )
    refuse_if_too_many(
        [*dataset.maskless, *dataset.bad],
        max_bad,
        f"{dataset.json_file} with MODEL.MASK_ON True",
        total=dataset.without_mask + len(dataset.bad),
    )
