"""From network resolution to the original image: boxes rescaled, empty ones dropped, masks pasted."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from gn_det.modeling import boxes as box_ops
from gn_det.structures import Detections

#: Bytes of sampling grid and samples that pasting may hold at once on an accelerator.
_PASTE_BYTES = 1 << 30


def resize_detections(detections: Detections, height: int, width: int, mask_threshold: float = 0.5) -> Detections:
    """Rescale detections to an image of (height, width) pixels.

    Args:
        detections: at network resolution; ``masks``, if any, are probabilities (N, S, S) within the boxes.
        height, width: wanted image size.
        mask_threshold: pixels at least this probable belong to the object.

    Returns:
        New detections, fewer where a box became empty; ``masks`` (N, height, width) bool.
    """
    rows, columns = detections.image_size
    boxes = detections.boxes.clone()
    boxes[:, 0::2] *= width / columns
    boxes[:, 1::2] *= height / rows
    boxes = box_ops.clip(boxes, (height, width))
    scores, classes, masks = detections.scores, detections.classes, detections.masks
    keep = box_ops.nonempty(boxes)
    if not keep.all():
        boxes, scores, classes = boxes[keep], scores[keep], classes[keep]
        masks = masks[keep] if masks is not None else None
    if masks is not None:
        masks = paste_masks(masks, boxes, height, width, mask_threshold)
    return Detections((height, width), boxes, scores, classes, masks)


def paste_masks(masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float = 0.5) -> Tensor:
    """Sample each mask at the image's pixel centers (bilinear) and threshold it.

    Args:
        masks: (N, S, S) float32 probabilities within the boxes.
        boxes: (N, 4) float32 within the image.
        height, width: of the image in pixels.
        threshold: see :func:`resize_detections`.

    Returns:
        (N, height, width) bool.
    """
    out = torch.zeros((len(masks), height, width), dtype=torch.bool, device=masks.device)
    if len(masks) == 0:
        return out
    if masks.device.type == "cpu":
        # One object at a time, and only the pixels around its box: everything else is False.
        lows = (boxes[:, :2].floor() - 1).clamp(min=0).int().tolist()
        highs = (boxes[:, 2:].ceil() + 1).int().tolist()
        for i, ((x0, y0), (x1, y1)) in enumerate(zip(lows, highs)):
            x1, y1 = min(x1, width), min(y1, height)
            sampled = _sample(masks[i : i + 1], boxes[i : i + 1], (y0, y1), (x0, x1))
            torch.ge(sampled[0], threshold, out=out[i, y0:y1, x0:x1])
        return out
    chunk = max(1, _PASTE_BYTES // (12 * height * width))
    for start in range(0, len(masks), chunk):
        part = slice(start, start + chunk)
        torch.ge(_sample(masks[part], boxes[part], (0, height), (0, width)), threshold, out=out[part])
    return out


def _sample(masks: Tensor, boxes: Tensor, rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
    """(N, rows, columns) mask values at the centers of the pixels in the given ranges; 0 outside the boxes."""
    x0, y0, x1, y1 = torch.split(boxes, 1, dim=1)
    y = torch.arange(*rows, dtype=torch.float32, device=masks.device) + 0.5
    x = torch.arange(*columns, dtype=torch.float32, device=masks.device) + 0.5
    y = (y - y0) / (y1 - y0) * 2 - 1
    x = (x - x0) / (x1 - x0) * 2 - 1
    n = len(masks)
    grid = torch.stack(
        (x[:, None, :].expand(n, y.shape[1], x.shape[1]), y[:, :, None].expand(n, y.shape[1], x.shape[1])), dim=3
    )
    return F.grid_sample(masks[:, None], grid, align_corners=False)[:, 0]
