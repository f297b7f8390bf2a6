"""Augmentation beyond geometry: color jitter, copy-paste, and the user's own transforms.

Every random number comes from an explicit random state per sample, so samples do not depend on the number of workers
or on where a run was resumed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from gn_det.errors import ConfigError
from gn_det.structures import InstanceMask, Masks, Sample, Targets, crop_mask

#: ``image, target = transform(image, target)`` as in torchvision.transforms.v2; ``target`` has boxes, labels and masks.
OwnTransform = Callable[..., Any]


def jitter_color(
    pixels: np.ndarray, strengths: Sequence[float], rng: np.random.RandomState, *, bgr: bool
) -> np.ndarray:
    """Change brightness, contrast, saturation and hue of (H, W, C) uint8 pixels.

    Args:
        strengths: strength s of each, in this order, as for :class:`torchvision.transforms.v2.ColorJitter`: a factor
            within [1 - s, 1 + s]; for hue, a shift within [-s, s] of the color circle.
        bgr: whether the channels are in BGR order.
    """
    from torchvision.transforms.v2 import functional

    order = slice(None, None, -1) if bgr and pixels.shape[2] == 3 else slice(None)
    image = torch.from_numpy(np.ascontiguousarray(pixels[:, :, order].transpose(2, 0, 1)))
    names = ("brightness", "contrast", "saturation", "hue")
    for name, strength in zip(names, strengths):
        if strength > 0:
            amount = rng.uniform(-strength, strength) + (name != "hue")
            image = getattr(functional, f"adjust_{name}")(image, max(amount, 0.0) if name != "hue" else amount)
    return np.ascontiguousarray(image.numpy().transpose(1, 2, 0)[:, :, order])


# ------------------------------------------------------------ copy-paste


def copy_paste(sample: Sample, other: Sample, rng: np.random.RandomState) -> Sample:
    """Paste a random half of the objects of ``other`` over ``sample`` (Ghiasi et al. 2021, without blending).

    Covered objects lose the hidden pixels and get a tight box around the rest. Fully hidden ones are dropped. Images of
    different sizes are overlaid at a random offset.
    """
    chosen = rng.rand(len(other["targets"])) < 0.5
    image, targets = sample["image"], sample["targets"]
    height, width = targets.image_size
    room = [ours - theirs for ours, theirs in zip(targets.image_size, other["targets"].image_size)]
    offset = [int(rng.randint(min(0, free), max(0, free) + 1)) for free in room]
    assert targets.masks is not None and other["targets"].masks is not None
    theirs = other["targets"].masks[chosen].bitmaps(*other["targets"].image_size)
    pasted = [_moved(bitmap, offset, (height, width)) for bitmap in theirs]
    visible = [bool(bitmap.any()) for bitmap in pasted]
    if not any(visible):
        return sample
    pasted = [bitmap for bitmap, seen in zip(pasted, visible) if seen]
    over = np.logical_or.reduce(pasted)
    source = _moved(other["image"].numpy().transpose(1, 2, 0), offset, (height, width))
    mixed = torch.where(torch.from_numpy(over), torch.from_numpy(source.transpose(2, 0, 1).copy()), image)

    masks, boxes = list(targets.masks.masks), targets.boxes.numpy().copy()
    keep = np.ones(len(boxes), dtype=bool)
    for i, bitmap in enumerate(targets.masks.bitmaps(height, width)):
        if (bitmap & over).any():
            masks[i] = left = bitmap & ~over
            keep[i], boxes[i] = left.any(), tight_box(left)
    kept = Masks(masks)[keep].masks
    new_boxes = np.array([tight_box(bitmap) for bitmap in pasted], dtype=np.float32)
    all_boxes = torch.from_numpy(np.concatenate([boxes[keep], new_boxes]))
    classes = torch.cat([targets.classes[torch.from_numpy(keep)], other["targets"].classes[chosen][visible]])
    mixed_targets = Targets((height, width), all_boxes, classes, Masks([*kept, *pasted]))
    return Sample({**sample, "image": mixed, "targets": mixed_targets})


def _moved(array: np.ndarray, offset: Sequence[int], shape: tuple[int, int]) -> np.ndarray:
    """Return zeros of ``shape`` with ``array`` placed at ``offset`` (rows, columns) and clipped."""
    out = np.zeros((*shape, *array.shape[2:]), dtype=array.dtype)
    ours, theirs = [], []
    for shift, size, length in zip(offset, shape, array.shape):
        start, end = max(shift, 0), min(shift + length, size)
        ours.append(slice(start, end))
        theirs.append(slice(start - shift, end - shift))
    out[tuple(ours)] = array[tuple(theirs)]
    return out


def tight_box(mask: InstanceMask) -> np.ndarray:
    """Return the tight XYXY float32 box of a mask, with zero area if the mask is empty."""
    if isinstance(mask, list):
        if not mask:
            return np.zeros(4, dtype=np.float32)
        points = np.concatenate(mask).reshape(-1, 2).astype(np.float32)
        return np.concatenate([points.min(axis=0), np.maximum(points.max(axis=0), 0)])
    top, left, bitmap = crop_mask(mask)
    return np.array([left, top, left + bitmap.shape[1], top + bitmap.shape[0]], dtype=np.float32)


# ------------------------------------------------------------ user transforms


def apply_own(sample: Sample, transform: OwnTransform, rng: np.random.RandomState, *, bgr: bool) -> Sample:
    """Apply a torchvision.transforms.v2 transform to a sample.

    It receives an RGB ``Image`` and ``{"boxes", "labels"}``, plus ``"masks"`` when masks are trained. Empty boxes and
    masks are dropped afterwards.

    Raises:
        ConfigError: the transform fails or returns something else.
    """
    from torchvision import tv_tensors

    targets = sample["targets"]
    flip = bgr and len(sample["image"]) == 3
    image = sample["image"].flip(0) if flip else sample["image"]
    target: dict[str, Any] = {
        "boxes": tv_tensors.BoundingBoxes(targets.boxes, format="XYXY", canvas_size=targets.image_size),
        "labels": targets.classes,
    }
    if targets.masks is not None:
        bitmaps = list(targets.masks.bitmaps(*targets.image_size))
        stacked = np.stack(bitmaps) if bitmaps else np.zeros((0, *targets.image_size), dtype=bool)
        target["masks"] = tv_tensors.Mask(torch.from_numpy(stacked))
    with _seeded(rng):
        try:
            out, moved = transform(tv_tensors.Image(image), target)
            pixels = torch.as_tensor(out)
            boxes, classes = torch.as_tensor(moved["boxes"]).float(), torch.as_tensor(moved["labels"])
            bitmaps = [m.numpy() != 0 for m in moved["masks"]] if targets.masks is not None else []
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise _unusable(f"failed ({type(error).__name__}: {error})") from error
    if pixels.dtype != torch.uint8 or pixels.dim() != 3 or len(pixels) != len(image):
        raise _unusable(f"returned a {pixels.dtype} image of shape {tuple(pixels.shape)}; keep uint8 (C, H, W)")
    if boxes.shape != (len(classes), 4) or (targets.masks is not None and len(bitmaps) != len(classes)):
        raise _unusable(f"returned {len(classes)} labels for {len(boxes)} boxes and {len(bitmaps)} masks")
    shape = int(pixels.shape[1]), int(pixels.shape[2])
    if any(bitmap.shape != shape for bitmap in bitmaps):
        raise _unusable(f"returned masks that differ in size from its image ({shape[1]} x {shape[0]})")
    boxes = torch.minimum(boxes.clamp(min=0), torch.tensor([shape[1], shape[0]] * 2))
    keep = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    masks = None
    if targets.masks is not None:
        keep &= Masks(bitmaps).nonempty()
        masks = Masks(bitmaps)[keep]
    pixels = (pixels.flip(0) if flip else pixels).contiguous()
    return Sample({**sample, "image": pixels, "targets": Targets(shape, boxes[keep], classes[keep], masks)})


def _unusable(what: str) -> ConfigError:
    return ConfigError(f"augment: your transform {what}; see Augmentation in docs/data.md")


@contextmanager
def _seeded(rng: np.random.RandomState) -> Iterator[None]:
    """Seed torch, NumPy and random from ``rng``, and restore their states."""
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()
    seed = int(rng.randint(2**31))
    try:
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would start CUDA in a worker
        np.random.seed(seed)
        random.seed(seed)
        yield
    finally:
        torch.set_rng_state(torch_state)
        np.random.set_state(numpy_state)
        random.setstate(python_state)
