"""Samplers: which images form batch k, as a pure function of (seed, position).

The index stream is infinite and known in advance, so a resumed run skips to its position without reading data, and the
number of workers has no effect. With the same seed it is Detectron2's stream.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

#: (dataset index, position in the stream); the position seeds the augmentation of this draw.
Draw = tuple[int, int]


def shuffled_epochs(size: int, seed: int) -> Iterator[np.ndarray]:
    """Yield ``shuffle(range(size))``, ``shuffle(range(size))``, ... forever."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randperm(size, generator=generator).numpy()


def subset_epochs(size: int, ratio: float, seed: int) -> Iterator[np.ndarray]:
    """Yield shuffles of one random subset forever; the subset depends on the seed, too."""
    generator = torch.Generator().manual_seed(seed)
    part = torch.randperm(size, generator=generator)[: max(1, int(size * ratio))].numpy()
    return (part[epoch] for epoch in shuffled_epochs(len(part), seed))


def repeat_epochs(repeat_factors: Tensor, seed: int) -> Iterator[np.ndarray]:
    """Yield epochs forever in which index i occurs ``repeat_factors[i]`` times on average.

    Fractions are rounded randomly in every epoch, so epochs differ slightly in length.
    """
    generator = torch.Generator().manual_seed(seed)
    whole = torch.trunc(repeat_factors)
    fraction = repeat_factors - whole
    while True:
        times = whole + (torch.rand(len(fraction), generator=generator) < fraction).float()
        indices = torch.repeat_interleave(torch.arange(len(times)), times.to(torch.int64))
        yield indices[torch.randperm(len(indices), generator=generator)].numpy()


def repeat_factors(
    images: np.ndarray, classes: np.ndarray, num_images: int, threshold: float, *, square_root: bool = True
) -> Tensor:
    """Compute how often an epoch should show each image, by its rarest class (LVIS paper, appendix B.2).

    Args:
        images, classes: (M,) image and class of every object.
        num_images: N.
        threshold: classes in fewer than this fraction of the images are repeated.
        square_root: repeat by the root of threshold / frequency instead of the ratio itself.

    Returns:
        (N,) float32, at least 1.
    """
    images, classes = np.unique(np.stack([images, classes]), axis=1)
    images_with = np.bincount(classes).clip(min=1)
    ratio = threshold / (images_with / num_images)
    factors = np.ones(num_images)
    np.maximum.at(factors, images, (np.sqrt(ratio) if square_root else ratio)[classes])
    return torch.tensor(factors, dtype=torch.float32)


def batch_stream(
    epochs: Iterator[np.ndarray],
    batch_size: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    sizes: np.ndarray | None = None,
    start: int = 0,
) -> Iterator[list[Draw]]:
    """Cut one rank's share of ``epochs`` into batches.

    Args:
        epochs: infinite dataset indices, the same on every rank.
        batch_size: images per batch on this rank.
        rank, world_size: this rank takes positions rank, rank + world_size, ...
        sizes: (N, 2) width and height; if given, wide (w > h) and other images never share a batch, and a batch is
            complete when either group is full.
        start: number of batches to skip; whole epochs are skipped without drawing them.
    """
    waiting: tuple[list[Draw], list[Draw]] = ([], [])
    position = 0
    for indices in _long_pieces(epochs):
        first = (rank - position) % world_size
        places = np.arange(position + first, position + len(indices), world_size)
        position, indices = position + len(indices), indices[first::world_size]
        wide = np.zeros(len(indices), bool) if sizes is None else (sizes[:, 0] > sizes[:, 1])[indices]
        counts = [len(group) + int(n) for group, n in zip(waiting, np.bincount(wide, minlength=2))]
        complete = sum(n // batch_size for n in counts)
        if complete <= start:
            start -= complete
            for group, n, mine in zip(waiting, counts, (~wide, wide)):
                last = zip(indices[mine][-batch_size:].tolist(), places[mine][-batch_size:].tolist())
                group[:] = [*group, *last][-(n % batch_size) :] if n % batch_size else []
            continue
        for index, place, k in zip(indices.tolist(), places.tolist(), wide.tolist()):
            group = waiting[k]
            group.append((index, place))
            if len(group) == batch_size:
                if start == 0:
                    yield group[:]
                start = max(start - 1, 0)
                group.clear()


def _long_pieces(epochs: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Regroup the indices of short epochs into pieces of a few thousand."""
    pieces: list[np.ndarray] = []
    for epoch in epochs:
        pieces.append(epoch)
        if len(pieces) * max(len(epoch), 1) >= 4096:
            yield np.concatenate(pieces)
            pieces.clear()


def inference_shard(size: int, rank: int = 0, world_size: int = 1) -> range:
    """Return this rank's contiguous part of ``range(size)``; every index belongs to exactly one rank."""
    share, left = divmod(size, world_size)
    begin = rank * share + min(rank, left)
    return range(begin, begin + share + (1 if rank < left else 0))


def augmentation_state(seed: int, position: int) -> np.random.RandomState:
    """Return the random state that augments the image drawn at ``position``."""
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed, position])))
