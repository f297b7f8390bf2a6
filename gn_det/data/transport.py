"""How samples travel from worker processes: one shared tensor a batch, masks as bits.

Every shared tensor costs the main process a file descriptor and the system shared memory. Default limits (1024 open
files, 64 MB of /dev/shm in containers) are reached with ordinary batches, and the result is a crash without a useful
word. So all images of a batch share one buffer, and where shared memory is scarce the buffer goes through the pipe.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gn_det.structures import InstanceMask, Masks, Sample, Targets

_SHM = "/dev/shm"
#: Batches that a worker prepares ahead (torch's default), plus the one in use.
_IN_FLIGHT = 3


@dataclass
class PackedSamples:
    """One batch: ``pixels`` holds all images end to end; ``shapes`` and ``rest`` have one entry a sample."""

    pixels: Tensor | np.ndarray
    shapes: list[tuple[int, ...]]
    rest: list[dict[str, Any]]
    targets: list[tuple[Any, ...] | None]


def shared_memory_free() -> int | None:
    """Bytes free in /dev/shm; None where the system has no such limit."""
    try:
        return shutil.disk_usage(_SHM).free
    except OSError:
        return None


def shared_memory_fits(workers: int, bytes_per_batch: int) -> bool:
    """Whether /dev/shm has room for all batches in flight; True where the system has no such limit."""
    free = shared_memory_free()
    return free is None or workers * _IN_FLIGHT * bytes_per_batch < 0.8 * free


def pack_samples(samples: list[Sample], shared_memory: bool = True) -> PackedSamples:
    """Gather samples for the way to another process."""
    flat = [s["image"].flatten() for s in samples]
    pixels: Tensor | np.ndarray = torch.cat(flat) if flat else torch.zeros(0, dtype=torch.uint8)
    if not shared_memory:
        pixels = pixels.numpy()  # type: ignore[union-attr]
    rest = [{k: v for k, v in s.items() if k not in ("image", "targets")} for s in samples]
    targets = [_pack_targets(s["targets"]) if "targets" in s else None for s in samples]
    return PackedSamples(pixels, [tuple(s["image"].shape) for s in samples], rest, targets)


def unpack_samples(packed: PackedSamples | list[Sample]) -> list[Sample]:
    """Undo :func:`pack_samples`; lists of samples pass unchanged."""
    if isinstance(packed, list):
        return packed
    pixels = torch.as_tensor(packed.pixels)
    images = pixels.split([int(np.prod(shape)) for shape in packed.shapes]) if packed.shapes else ()
    samples = []
    for image, shape, rest, targets in zip(images, packed.shapes, packed.rest, packed.targets):
        sample = Sample(image=image.view(shape), **rest)  # type: ignore[typeddict-item]
        if targets is not None:
            sample["targets"] = _unpack_targets(targets)
        samples.append(sample)
    return samples


def _pack_targets(targets: Targets) -> tuple[Any, ...]:
    masks = None if targets.masks is None else [_pack_mask(m) for m in targets.masks.masks]
    return targets.image_size, targets.boxes.numpy(), targets.classes.numpy(), masks


def _unpack_targets(packed: tuple[Any, ...]) -> Targets:
    size, boxes, classes, masks = packed
    unpacked = None if masks is None else Masks([_unpack_mask(m) for m in masks])
    return Targets(size, torch.from_numpy(boxes), torch.from_numpy(classes), unpacked)


def _pack_mask(mask: InstanceMask) -> Any:
    return mask if isinstance(mask, list) else (mask.shape, np.packbits(mask))


def _unpack_mask(packed: Any) -> InstanceMask:
    if isinstance(packed, list):
        return packed
    (height, width), bits = packed
    return np.unpackbits(bits, count=height * width).reshape(height, width).view(bool)
