"""Which images form batch k: pure functions of (seed, position).

A stream is infinite and known in advance, so a resumed run skips to its place without reading data, and the number of
worker processes changes nothing. With the same seed the streams are Detectron2's.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

#: (dataset index, position in the stream): the position seeds the augmentation of this very draw.
Draw = tuple[int, int]


def shuffled_stream(size: int, seed: int, *, shuffle: bool = True) -> Iterator[int]:
    """Infinite ``shuffle(range(size)) + shuffle(range(size)) + ...``."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from (torch.randperm(size, generator=generator) if shuffle else torch.arange(size)).tolist()


def subset_stream(size: int, ratio: float, seed: int) -> Iterator[int]:
    """Infinite shuffles of one random part of the set; the part is drawn from the seed, too."""
    generator = torch.Generator().manual_seed(seed)
    part = torch.randperm(size, generator=generator)[: max(1, int(size * ratio))]
    return (int(part[i]) for i in shuffled_stream(len(part), seed))


def repeat_stream(repeat_factors: Tensor, seed: int, *, shuffle: bool = True) -> Iterator[int]:
    """Infinite stream where index i occurs ``repeat_factors[i]`` times an epoch on average.

    Fractions are rounded at random in every epoch, so epochs differ a little in length.
    """
    generator = torch.Generator().manual_seed(seed)
    whole = torch.trunc(repeat_factors)
    fraction = repeat_factors - whole
    while True:
        times = whole + (torch.rand(len(fraction), generator=generator) < fraction).float()
        indices = torch.repeat_interleave(torch.arange(len(times)), times.to(torch.int64))
        if shuffle:
            indices = indices[torch.randperm(len(indices), generator=generator)]
        yield from indices.tolist()


def repeat_factors(classes_of: Sequence[Sequence[int]], threshold: float, *, square_root: bool = True) -> Tensor:
    """How often an epoch should show each image, by its rarest class (LVIS paper, appendix B.2).

    Args:
        classes_of: the classes in each image.
        threshold: classes in fewer than this fraction of the images are repeated.
        square_root: repeat by the root of threshold / frequency instead of the ratio itself.

    Returns:
        (N,) float32, at least 1.
    """
    images_with = Counter(c for classes in classes_of for c in set(classes))
    ratio = {c: threshold / (n / len(classes_of)) for c, n in images_with.items()}
    of_class = {c: max(1.0, math.sqrt(r) if square_root else r) for c, r in ratio.items()}
    factors = [max((of_class[c] for c in set(classes)), default=1.0) for classes in classes_of]
    return torch.tensor(factors, dtype=torch.float32)


def batch_stream(
    stream: Iterator[int], batch_size: int, *, rank: int = 0, world_size: int = 1, sizes: np.ndarray | None = None
) -> Iterator[list[Draw]]:
    """Cut one rank's share of ``stream`` into batches.

    Args:
        stream: infinite dataset indices, the same on every rank.
        batch_size: images a batch on this rank.
        rank, world_size: this rank takes positions rank, rank + world_size, ...
        sizes: (N, 2) width and height; where given, wide (w > h) and other images never share a batch, and a batch is
            complete when either group has filled up.
    """
    wide = None if sizes is None else (sizes[:, 0] > sizes[:, 1]).tolist()
    waiting: tuple[list[Draw], list[Draw]] = ([], [])
    for position, index in itertools.islice(enumerate(stream), rank, None, world_size):
        group = waiting[1 if wide is not None and wide[index] else 0]
        group.append((index, position))
        if len(group) == batch_size:
            batch = group[:]
            group.clear()
            yield batch


def inference_shard(size: int, rank: int = 0, world_size: int = 1) -> range:
    """This rank's contiguous part of ``range(size)``; every index falls to exactly one rank."""
    share, left = divmod(size, world_size)
    begin = rank * share + min(rank, left)
    return range(begin, begin + share + (1 if rank < left else 0))


def augmentation_state(seed: int, position: int) -> np.random.RandomState:
    """The random state that augments the image drawn at ``position``."""
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence([seed, position])))
