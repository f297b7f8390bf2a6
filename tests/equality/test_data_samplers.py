"""With one seed, our streams of indices and batches are Detectron2's."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2.config", reason="compares with an installed Detectron2")

from gn_det.data.samplers import batch_stream, inference_shard, repeat_epochs, repeat_factors, shuffled_epochs

pytestmark = pytest.mark.detectron2


def _take(stream, count: int) -> list:
    return list(itertools.islice(stream, count))


def test_shuffled_epochs_are_those_of_training_sampler() -> None:
    from detectron2.data.samplers import TrainingSampler

    assert _take(itertools.chain.from_iterable(shuffled_epochs(13, 7)), 60) == _take(
        iter(TrainingSampler(13, seed=7)), 60
    )


def test_repeat_epochs_are_those_of_repeat_factor_sampler() -> None:
    from detectron2.data.samplers import RepeatFactorTrainingSampler as Sampler

    rng = np.random.default_rng(1)
    often = [0.5, 0.3, 0.1, 0.05, 0.03, 0.02]
    classes = [rng.choice(6, size=int(rng.integers(0, 4)), p=often).tolist() for _ in range(40)]
    records = [{"annotations": [{"category_id": c} for c in of_image]} for of_image in classes]
    for root in (True, False):
        want = Sampler.repeat_factors_from_category_frequency(records, 0.3, sqrt=root)
        images = np.repeat(np.arange(40), [len(c) for c in classes])
        got = repeat_factors(images, np.concatenate(classes).astype(int), 40, 0.3, square_root=root)
        assert torch.equal(got, want)
    assert _take(itertools.chain.from_iterable(repeat_epochs(got, 3)), 300) == _take(iter(Sampler(want, seed=3)), 300)


def test_batches_are_aspect_ratio_grouped_alike() -> None:
    from detectron2.data.common import AspectRatioGroupedDataset
    from detectron2.data.samplers import TrainingSampler

    rng = np.random.default_rng(2)
    sizes = rng.integers(20, 30, (17, 2))  # squares occur
    dicts = [{"width": int(w), "height": int(h), "i": i} for i, (w, h) in enumerate(sizes)]
    want = AspectRatioGroupedDataset((dicts[i] for i in iter(TrainingSampler(17, seed=5))), 3)
    got = batch_stream(shuffled_epochs(17, 5), 3, sizes=sizes)
    for ours, theirs in zip(_take(got, 40), _take(iter(want), 40)):
        assert [index for index, _ in ours] == [d["i"] for d in theirs]


def test_inference_shards_are_equal() -> None:
    from detectron2.data.samplers import InferenceSampler

    for total, world in itertools.product((1, 5, 8, 11), (1, 2, 3, 8)):
        for rank in range(world):
            assert inference_shard(total, rank, world) == InferenceSampler._get_local_indices(total, world, rank)
