"""Draw training images as the model sees them: augmented, with their transformed ground truth."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from gn_det.data.coco import CocoDataset
from gn_det.data.loader import build_train_loader
from gn_det.structures import Detections, Sample
from gn_det.visualize.draw import draw_detections, draw_grid

_IMAGES = 12


def draw_augmented(cfg: Any, dataset: CocoDataset) -> np.ndarray:
    """Draw the first images of a run with this config and seed (0 if SEED is negative) as one RGB image."""
    loader = build_train_loader(cfg, [dataset], images_per_rank=1, seed=max(int(cfg.SEED), 0), num_workers=0)
    samples = [batch[0] for batch, _ in zip(loader, range(_IMAGES))]
    bgr = cfg.INPUT.FORMAT == "BGR"
    return draw_grid([_drawn(s, dataset, bgr) for s in samples], [str(s["image_id"]) for s in samples], columns=4)


def _drawn(sample: Sample, dataset: CocoDataset, bgr: bool) -> np.ndarray:
    pixels = sample["image"].numpy().transpose(1, 2, 0)
    rgb = np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else pixels[:, :, ::-1] if bgr else pixels
    targets = sample["targets"]
    masks = None
    if targets.masks is not None:
        bitmaps = targets.masks.bitmaps(*targets.image_size)
        masks = torch.from_numpy(np.stack(bitmaps)) if bitmaps else None
    shown = Detections(targets.image_size, targets.boxes, torch.ones(len(targets)), targets.classes, masks)
    return draw_detections(np.ascontiguousarray(rgb), shown, dataset.class_names, show_scores=False)
