"""Streams are known in advance: equal epochs, no dependence on when or where they are read."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from gn_det.data.samplers import (
    augmentation_state,
    batch_stream,
    inference_shard,
    repeat_epochs,
    repeat_factors,
    shuffled_epochs,
    subset_epochs,
)


def _take(epochs: Iterator[np.ndarray], count: int) -> list:
    return list(itertools.islice(itertools.chain.from_iterable(epochs), count))


def _factors(classes: list[list[int]], threshold: float, **more: bool) -> torch.Tensor:
    images = np.repeat(np.arange(len(classes)), [len(c) for c in classes])
    return repeat_factors(images, np.array([c for image in classes for c in image]), len(classes), threshold, **more)


def test_every_epoch_is_a_permutation() -> None:
    stream = _take(shuffled_epochs(7, 3), 70)
    epochs = [stream[i : i + 7] for i in range(0, 70, 7)]
    assert all(sorted(e) == list(range(7)) for e in epochs)
    assert len({tuple(e) for e in epochs}) == 10
    assert stream == _take(shuffled_epochs(7, 3), 70) != _take(shuffled_epochs(7, 4), 70)


def test_groups_never_mix_and_nothing_is_lost() -> None:
    sizes = np.array([[2, 1], [1, 2], [1, 1], [3, 1], [1, 4]])
    batches = list(itertools.islice(batch_stream(shuffled_epochs(5, 0), 2, sizes=sizes), 50))
    for batch in batches:
        assert len({bool(sizes[i][0] > sizes[i][1]) for i, _ in batch}) == 1
    positions = sorted(p for batch in batches for _, p in batch)
    assert len(set(positions)) == 100 and positions[-1] <= 102  # at most one image a group is waiting


def test_repeat_factors_follow_the_paper() -> None:
    """f(c) = 0.75 and 0.25, t = 0.5: r = max(1, sqrt(t / f))."""
    factors = _factors([[0], [0, 0], [0, 1], []], 0.5)
    assert factors.tolist() == pytest.approx([1, 1, 2**0.5, 1])
    assert _factors([[0], [0], [0, 1], []], 0.5, square_root=False)[2] == 2


def test_repeated_images_occur_in_proportion() -> None:
    stream = _take(repeat_epochs(torch.tensor([1.0, 2.5, 1.0]), 0), 9000)
    assert np.bincount(stream) / 2000 == pytest.approx([1, 2.5, 1], rel=0.05)


def test_subset() -> None:
    assert len(set(_take(subset_epochs(100, 0.1, 3), 500))) == 10


def test_shards_cover_once() -> None:
    for total, world in itertools.product(range(0, 9), range(1, 5)):
        assert [i for r in range(world) for i in inference_shard(total, r, world)] == list(range(total))


def test_augmentation_depends_on_seed_and_position() -> None:
    draws = {(s, p): augmentation_state(s, p).randint(2**31) for s in range(3) for p in range(200)}
    assert len(set(draws.values())) == len(draws)
    assert augmentation_state(1, 7).randint(2**31) == draws[1, 7]


def test_a_class_counts_once_an_image() -> None:
    """f(0) = 1/4, not 2/4: the two objects are in one image."""
    assert _factors([[0, 0], [1], [1], []], 0.5).tolist() == pytest.approx([2**0.5, 1, 1, 1])


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(("size", "batch", "world"), [(5, 2, 1), (700, 16, 3), (9001, 3, 4)])
def test_starting_later_is_skipping(grouped: bool, size: int, batch: int, world: int) -> None:
    """Batch ``start`` and what follows is what islice gives; every start around the ends of epochs and pieces."""
    sizes = np.random.default_rng(0).integers(1, 4, (size, 2)) if grouped else None
    for rank in range(world):

        def batches(start: int, rank: int = rank) -> Iterator[list]:
            return batch_stream(shuffled_epochs(size, 3), batch, rank=rank, world_size=world, sizes=sizes, start=start)

        whole = list(itertools.islice(batches(0), 9502))
        for start in (1, 2, 299, 1000, 2047, 2048, 2049, 4095, 4096, 4097, 9498):
            assert list(itertools.islice(batches(start), 3)) == whole[start : start + 3]


def test_a_million_batches_are_skipped_by_epochs() -> None:
    """Far fewer steps than draws: the epochs that are left out are counted, not walked through."""
    taken = 0

    def counted() -> Iterator[np.ndarray]:
        nonlocal taken
        for epoch in shuffled_epochs(100_000, 0):
            taken += 1
            yield epoch

    next(batch_stream(counted(), 16, sizes=np.ones((100_000, 2)), start=1_000_000))
    assert taken == 161  # 16 million draws and one batch
