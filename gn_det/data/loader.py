"""Loaders: endless training batches, and one pass over a test set.

Training batch k, augmentation included, depends only on (seed, k) and the files, not on the number of workers or on
where the run was resumed. An image that cannot be decoded is replaced by the next one of its aspect group, logged once,
and counted against ``DATALOADER.MAX_BAD``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import get_worker_info

from gn_det.data.augment import OwnTransform
from gn_det.data.coco import CocoDataset, check_trainable, refuse_if_too_many
from gn_det.data.image import one_color
from gn_det.data.mapper import InferenceMapper, TrainMapper
from gn_det.data.records import Record, RecordList
from gn_det.data.samplers import (
    Draw,
    augmentation_state,
    batch_stream,
    inference_shard,
    repeat_epochs,
    repeat_factors,
    shuffled_epochs,
    subset_epochs,
)
from gn_det.data.workers import WorkerData, cores, load_batches, pack_samples, shared_memory_fits, unpack_samples
from gn_det.errors import ConfigError, DataError, UserError
from gn_det.structures import Sample
from gn_det.text import count, one_line

logger = logging.getLogger(__name__)

#: An unusable image: file name and reason.
_Failure = tuple[str, str]


class _Images(WorkerData):
    """Concatenated images of several sets; maps a batch to its samples (packed in a worker) and failures."""

    def __init__(
        self, datasets: Sequence[CocoDataset], where: np.ndarray, max_bad: int, mapper: Callable[..., Sample]
    ) -> None:
        self.records: list[RecordList] = [d.records for d in datasets]
        self.known_bad = [entry for d in datasets for entry in d.bad]
        self.where = where  # (N, 2): set, and index into it
        self.max_bad, self.mapper = max_bad, mapper
        self.shared_memory = True
        self._unreadable: dict[int, _Failure] = {}

    def record(self, index: int) -> Record:
        dataset, i = map(int, self.where[index])
        return self.records[dataset][i]

    def name_of(self, index: int) -> str:
        return str(self.record(index)["file_name"])

    def __getitem__(self, batch: Sequence[Any]) -> tuple[Any, list[_Failure]]:
        failures: list[_Failure] = []
        try:
            samples = [s for entry in batch if (s := self.load(entry, failures)) is not None]
        except UserError as error:  # torch would pass it to the main process as a stack trace
            return error, []
        self.note(-1)
        return samples if get_worker_info() is None else pack_samples(samples, self.shared_memory), failures

    def load(self, entry: Any, failures: list[_Failure]) -> Sample | None:
        """Return the sample of one batch entry, or of its first readable candidate; None if there is none."""
        for candidate in self.candidates(entry):
            if candidate not in self._unreadable:
                self.note(candidate)
                record = self.record(candidate)
                try:
                    return self.map(record, entry)
                except DataError as error:
                    self._unreadable[candidate] = (record["file_name"], str(error))
            failures.append(self._unreadable[candidate])
        return None

    def candidates(self, entry: Any) -> Iterator[int]:
        """Yield the image of a batch entry, then those that may replace it."""
        yield entry

    def map(self, record: Record, entry: Any) -> Sample:
        """Map a record for a batch entry."""
        return self.mapper(record)


class _TrainImages(_Images):
    """Images for draws; an unreadable one is replaced, preferably by the next one of its aspect group."""

    def __init__(self, *args: Any, sizes: np.ndarray, seed: int) -> None:
        super().__init__(*args)
        self.seed, self.wide = seed, sizes[:, 0] > sizes[:, 1]

    def candidates(self, entry: Draw) -> Iterator[int]:
        """Yield the image, those after it in its aspect group, then others: one more than may be bad.

        With more failures than MAX_BAD allows, the main process stops anyway.
        """
        index = entry[0]
        yield index
        same, others = (np.flatnonzero(self.wide == wide) for wide in (self.wide[index], ~self.wide[index]))
        after = int(np.searchsorted(same, index))
        yield from np.concatenate([same[after + 1 :], same[:after], others])[: self.max_bad].tolist()

    def map(self, record: Record, entry: Draw) -> Sample:
        state = augmentation_state(self.seed, entry[1])
        return self.mapper(record, state, lambda rng: self.record(int(rng.randint(len(self.where)))))


class Loader:
    """Iterable over batches ``list[Sample]``; unreadable images of a test set are skipped.

    Attributes:
        num_images: number of images to draw from.
        skipped: unreadable images so far: file name to reason.
    """

    def __init__(self, data: _Images, batches: Callable[[], Iterable[Any]], workers: int, num_images: int) -> None:
        self.num_images = num_images
        self.skipped: dict[str, str] = {}
        self._data, self._batches, self._workers = data, batches, workers

    def __iter__(self) -> Iterator[list[Sample]]:
        return (samples for samples in self._loaded() if samples)

    def _loaded(self) -> Iterator[list[Sample]]:
        for packed, failures in load_batches(self._data, self._batches(), self._workers):
            if isinstance(packed, UserError):
                raise packed
            for name, why in failures:
                if name not in self.skipped:
                    self.skipped[name] = why
                    logger.warning("skipped: %s", why)
            if failures:
                bad = [*self.skipped.values(), *self._data.known_bad]
                refuse_if_too_many(bad, self._data.max_bad, "reading images")
            yield unpack_samples(packed)


class TrainLoader(Loader):
    """Endless batches, made by :func:`build_train_loader`.

    Attributes:
        summary: a log line with the number of images.
    """

    def __init__(self, *args: Any, summary: str, warn_of_one_color: bool) -> None:
        super().__init__(*args)
        self.summary, self._warn_of_one_color = summary, warn_of_one_color

    def __iter__(self) -> Iterator[list[Sample]]:
        for samples in self._loaded():
            if not samples:
                why = next(iter(self.skipped.values()))
                raise DataError(
                    f"none of the {self.num_images} training images can be read (such as {why}): replace them"
                )
            for sample in samples:
                if self._warn_of_one_color and one_color(sample["image"].numpy().transpose(1, 2, 0)):
                    self._warn_of_one_color = False
                    logger.warning(
                        "%s: every pixel has the same color, so there is nothing to learn; gn-det check --images lists "
                        "all such images (training names only the first)",
                        one_line(sample["file_name"], 300),
                    )
            yield samples


def build_train_loader(
    cfg: Any,
    datasets: Sequence[CocoDataset],
    *,
    images_per_rank: int,
    start_batch: int = 0,
    rank: int = 0,
    world_size: int = 1,
    seed: int,
    num_workers: int | None = None,
    augment: OwnTransform | None = None,
) -> TrainLoader:
    """Build a loader of endless training batches of ``images_per_rank`` samples, starting at batch ``start_batch``.

    Args:
        cfg: INPUT, DATALOADER and MODEL.MASK_ON are read.
        datasets: from :func:`gn_det.data.coco.load_coco`; several are concatenated.
        seed: non-negative; the same on every rank.
        num_workers: processes; default DATALOADER.NUM_WORKERS, capped at the cores available to this process.
        augment: see :class:`gn_det.data.mapper.TrainMapper`.

    Raises:
        DataError: no image with objects, different classes, or no masks where MODEL.MASK_ON needs them.
    """
    if seed < 0:
        raise ValueError(f"the loader needs a non-negative seed, got {seed}: draw one and store it with the checkpoint")
    has_objects = check_trainable(cfg, datasets)
    for dataset in datasets if cfg.MODEL.MASK_ON else ():
        for line in dataset.maskless:
            logger.info("%s: left out %s", dataset.name, line)
    kept = not cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS
    keep = np.ones_like(has_objects) if kept else has_objects
    where = np.array([(d, i) for d, data in enumerate(datasets) for i in range(len(data))], np.int64).reshape(-1, 2)
    sizes = np.concatenate([d.sizes for d in datasets])[keep]
    mapper = TrainMapper(cfg, augment)
    workers = _workers(cfg, num_workers)
    data = _TrainImages(datasets, where[keep], int(cfg.DATALOADER.MAX_BAD), mapper, sizes=sizes, seed=seed)
    data.shared_memory = shared_memory_fits(workers, images_per_rank * 3 * mapper.max_pixels)

    def batches() -> Iterator[list[Draw]]:
        grouping = sizes if cfg.DATALOADER.ASPECT_RATIO_GROUPING else None
        epochs = _epochs(cfg, datasets, keep, seed)
        return batch_stream(
            epochs, images_per_rank, rank=rank, world_size=world_size, sizes=grouping, start=start_batch
        )

    summary, empty = f"Training on {count(len(sizes), 'image')}", int((~has_objects).sum())
    if empty:
        fate = "included" if kept else "left out"
        summary += f"; {empty} without objects {fate} (DATALOADER.FILTER_EMPTY_ANNOTATIONS)"
    warn_of_one_color = not mapper.cuts  # a crop of plain sky is fine
    return TrainLoader(data, batches, workers, len(sizes), summary=summary, warn_of_one_color=warn_of_one_color)


def build_test_loader(
    cfg: Any, dataset: CocoDataset, rank: int = 0, world_size: int = 1, *, num_workers: int | None = None
) -> Loader:
    """Build a loader of all images of ``dataset`` once, one by one, without ground truth (this rank's share)."""
    shard = inference_shard(len(dataset), rank, world_size)
    mapper = InferenceMapper(cfg)
    workers = _workers(cfg, num_workers)
    where = np.stack([np.zeros(len(dataset), np.int64), np.arange(len(dataset))], axis=1)
    data = _Images([dataset], where, int(cfg.DATALOADER.MAX_BAD), mapper)
    data.shared_memory = shared_memory_fits(workers, 3 * max(mapper.size, 800) * mapper.max_size)
    return Loader(data, lambda: [[index] for index in shard], workers, len(shard))


def _epochs(cfg: Any, datasets: Sequence[CocoDataset], keep: np.ndarray, seed: int) -> Iterator[np.ndarray]:
    """Yield epochs of indices into the kept images of all sets."""
    name, size = cfg.DATALOADER.SAMPLER_TRAIN, int(keep.sum())
    if name == "TrainingSampler":
        return shuffled_epochs(size, seed)
    if name == "RepeatFactorTrainingSampler":
        starts = np.cumsum([0, *map(len, datasets)])
        images = np.concatenate([np.append(d.object_images, d.crowd_images) + s for d, s in zip(datasets, starts)])
        classes = np.concatenate([np.append(d.object_classes, d.crowd_classes) for d in datasets])
        images, classes = (np.cumsum(keep) - 1)[images[keep[images]]], classes[keep[images]]
        root = cfg.DATALOADER.REPEAT_SQRT
        factors = repeat_factors(images, classes, size, cfg.DATALOADER.REPEAT_THRESHOLD, square_root=root)
        return repeat_epochs(factors, seed)
    if name == "RandomSubsetTrainingSampler":
        return subset_epochs(size, float(cfg.DATALOADER.get("RANDOM_SUBSET_RATIO", 1.0)), seed)
    raise ConfigError(
        f"DATALOADER.SAMPLER_TRAIN {name!r} is not implemented: use TrainingSampler, RepeatFactorTrainingSampler or "
        f"RandomSubsetTrainingSampler"
    )


def _workers(cfg: Any, num_workers: int | None) -> int:
    return min(int(cfg.DATALOADER.NUM_WORKERS), cores()) if num_workers is None else num_workers
