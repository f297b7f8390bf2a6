"""Draw training images as the model sees them: augmented, with their transformed ground truth."""

from __future__ import annotations

from typing import Any

import numpy as np

from gn_det.data.coco import CocoDataset
from gn_det.data.loader import build_train_loader
from gn_det.visualize.draw import draw_grid, draw_sample

_IMAGES = 12


def draw_augmented(cfg: Any, dataset: CocoDataset) -> np.ndarray:
    """Draw the first images of a run with this config and seed (0 if SEED is negative) as one RGB image."""
    loader = build_train_loader(cfg, [dataset], images_per_rank=1, seed=max(int(cfg.SEED), 0), num_workers=0)
    samples = [batch[0] for batch, _ in zip(loader, range(_IMAGES))]
    bgr = cfg.INPUT.FORMAT == "BGR"
    drawn = [draw_sample(s, dataset.class_names, bgr=bgr) for s in samples]
    return draw_grid(drawn, [str(s["image_id"]) for s in samples], columns=4)
