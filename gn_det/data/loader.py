"""Loaders: endless training batches and one pass over a test set.

Batch k of training, augmentation included, depends on (seed, k) and the files alone: not on the number of workers, not
on where the run was resumed. An image that cannot be decoded is replaced by the next one of its aspect group, logged
once, and counted against ``DATALOADER.MAX_BAD``.
"""

from __future__ import annotations

import errno
import itertools
import logging
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import DataLoader, Dataset, get_worker_info

from gn_det.data.board import Board
from gn_det.data.coco import CocoDataset, refuse_if_too_many
from gn_det.data.image import one_colour
from gn_det.data.mapper import TestMapper, TrainMapper
from gn_det.data.orphans import end_with_parent
from gn_det.data.records import Record
from gn_det.data.samplers import (
    Draw,
    augmentation_state,
    batch_stream,
    inference_shard,
    repeat_factors,
    repeat_stream,
    shuffled_stream,
    subset_stream,
)
from gn_det.data.trainable import check_trainable
from gn_det.data.transport import pack_samples, shared_memory_fits, shared_memory_free, unpack_samples
from gn_det.errors import ConfigError, DataError
from gn_det.structures import Sample
from gn_det.text import one_line

logger = logging.getLogger(__name__)

#: Seconds to wait for one batch. Storage that takes longer than this hangs.
TIMEOUT = 600

#: What a worker returns: samples (possibly packed for transport) and the images it could not use, as (file, why).
_Loaded = tuple[Any, list[tuple[str, str]]]


class TrainLoader:
    """Iterable over endless batches ``list[Sample]``; made by :func:`build_train_loader`.

    Attributes:
        num_images: images that are drawn from, after FILTER_EMPTY_ANNOTATIONS.
        num_empty: images without objects, and whether they were ``kept`` or left out.
        skipped: file name to reason of images that turned out to be unreadable so far.
    """

    def __init__(
        self, data: _TrainData, batches: Callable[[], Iterable[list[Draw]]], workers: int, *, empty: int, kept: bool
    ) -> None:
        self.num_images = len(data.where)
        self.num_empty, self.kept = empty, kept
        self.skipped: dict[str, str] = {}
        self._data, self._batches, self._workers = data, batches, workers
        self._told_of_one_colour = False

    def __iter__(self) -> Iterator[list[Sample]]:
        for samples, failures in _run(self._data, self._batches(), self._workers):
            _note_failures(failures, self.skipped, self._data.max_bad, self._data.known_bad)
            loaded = unpack_samples(samples)
            if not loaded:
                why = next(iter(self.skipped.values()))
                raise DataError(
                    f"none of the {self.num_images} training images can be read (such as {why}): replace them"
                )
            if not self._told_of_one_colour and not self._data.mapper.crop:  # a crop of sky is no mistake
                self._told_of_one_colour = _warn_of_one_colour(loaded)
            yield loaded

    def summary(self) -> str:
        """How many images are drawn from, for the log."""
        fate = "kept" if self.kept else "left out"
        key = "DATALOADER.FILTER_EMPTY_ANNOTATIONS"
        return f"training draws from {self.num_images} images; {self.num_empty} images without objects {fate} ({key})"


class TestLoader:
    """Iterable over the batches of one pass ``list[Sample]``; made by :func:`build_test_loader`."""

    __test__ = False  # not a test case, whatever its name

    def __init__(self, data: _TestData, batches: list[list[int]], workers: int) -> None:
        self.skipped: dict[str, str] = {}
        self.num_images = sum(map(len, batches))
        self._data, self._batches, self._workers = data, batches, workers

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[list[Sample]]:
        for samples, failures in _run(self._data, self._batches, self._workers):
            _note_failures(failures, self.skipped, self._data.max_bad, self._data.known_bad)
            loaded = unpack_samples(samples)
            if loaded:
                yield loaded


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
) -> TrainLoader:
    """Endless training batches of ``images_per_rank`` samples, from batch ``start_batch`` on.

    Args:
        cfg: INPUT, DATALOADER and MODEL.MASK_ON are read.
        datasets: from :func:`gn_det.data.coco.load_coco`; more than one are concatenated.
        seed: non-negative; the same on every rank.
        num_workers: processes; default DATALOADER.NUM_WORKERS, at most the cores that this process may use.

    Raises:
        DataError: no image with objects, different classes, or no masks where MODEL.MASK_ON needs them.
    """
    if seed < 0:
        raise ValueError(f"the loader needs a non-negative seed, got {seed}: draw one and store it with the checkpoint")
    has_objects = check_trainable(cfg, datasets)
    for dataset in datasets if cfg.MODEL.MASK_ON else ():
        for line in dataset.maskless:
            logger.info("%s: left out %s", dataset.name, line)
    where = np.array([(d, i) for d, data in enumerate(datasets) for i in range(len(data))], np.int64).reshape(-1, 2)
    keep = has_objects if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS else np.ones_like(has_objects)
    sizes = np.concatenate([d.sizes for d in datasets])[keep]
    data = _TrainData(datasets, where[keep], sizes, TrainMapper(cfg), seed, int(cfg.DATALOADER.MAX_BAD))
    workers = _workers(cfg, num_workers)
    image_bytes = 3 * max(data.mapper.sizes) * data.mapper.max_size
    data.shared_memory = shared_memory_fits(workers, images_per_rank * image_bytes)
    grouping = sizes if cfg.DATALOADER.ASPECT_RATIO_GROUPING else None

    def batches() -> Iterator[list[Draw]]:
        stream = _index_stream(cfg, data, seed)
        all_batches = batch_stream(stream, images_per_rank, rank=rank, world_size=world_size, sizes=grouping)
        return itertools.islice(all_batches, start_batch, None)

    empty = int((~has_objects).sum())
    return TrainLoader(data, batches, workers, empty=empty, kept=not cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS)


def build_test_loader(
    cfg: Any,
    dataset: CocoDataset,
    rank: int = 0,
    world_size: int = 1,
    *,
    batch_size: int = 1,
    num_workers: int | None = None,
) -> TestLoader:
    """All images of ``dataset`` once (this rank's contiguous share), in order, without ground truth."""
    shard = inference_shard(len(dataset), rank, world_size)
    batches = [list(shard[i : i + batch_size]) for i in range(0, len(shard), batch_size)]
    data = _TestData(dataset, TestMapper(cfg), int(cfg.DATALOADER.MAX_BAD))
    workers = _workers(cfg, num_workers)
    data.shared_memory = shared_memory_fits(workers, batch_size * 3 * max(data.mapper.size, 800) * data.mapper.max_size)
    return TestLoader(data, batches, workers)


#: Of the loader that was started last; torch reports a dead worker wherever the main process happens to be.
_board: Board | None = None


class _TrainData(Dataset[_Loaded]):
    """Maps the draws of one batch to samples, in a worker process or in the main one."""

    def __init__(
        self,
        datasets: Sequence[CocoDataset],
        where: np.ndarray,
        sizes: np.ndarray,
        mapper: TrainMapper,
        seed: int,
        max_bad: int,
    ) -> None:
        self.records = [d.records for d in datasets]
        self.known_bad = [entry for d in datasets for entry in d.bad]
        self.where, self.wide = where, sizes[:, 0] > sizes[:, 1]
        self.mapper, self.seed, self.max_bad = mapper, seed, max_bad
        self.shared_memory = True
        self.board: Board | None = None
        self._unreadable: dict[int, tuple[str, str]] = {}

    def name_of(self, index: int) -> str:
        return str(self.record(index)["file_name"])

    def record(self, index: int) -> Record:
        dataset, i = self.where[index]
        return self.records[dataset][i]

    def __getitem__(self, batch: list[Draw]) -> _Loaded:
        samples: list[Sample] = []
        failures: list[tuple[str, str]] = []
        for index, position in batch:
            sample = self._readable(index, position, failures)
            if sample is not None:
                samples.append(sample)
        _note(self.board, -1)
        return _packed(samples, self.shared_memory), failures

    def _readable(self, index: int, position: int, failures: list[tuple[str, str]]) -> Sample | None:
        """The sample of ``index``, or of the next readable image, if possible of the same aspect group.

        Gives up after more failures than MAX_BAD allows, since the main process refuses to go on then anyway.
        """
        for candidate in self._candidates(index):
            if candidate not in self._unreadable:
                _note(self.board, candidate)
                record = self.record(candidate)
                try:
                    return self.mapper(record, augmentation_state(self.seed, position))
                except DataError as error:
                    self._unreadable[candidate] = (record["file_name"], str(error))
            failures.append(self._unreadable[candidate])
        return None

    def _candidates(self, index: int) -> Iterator[int]:
        """``index`` and the images after it, those of its aspect group first; one more than may be bad."""
        same_group = np.flatnonzero(self.wide == self.wide[index])
        same_group = np.roll(same_group, -int(np.searchsorted(same_group, index)))
        order = np.concatenate([same_group, np.flatnonzero(self.wide != self.wide[index])])
        yield from order[: self.max_bad + 1].tolist()


class _TestData(Dataset[_Loaded]):
    """Maps the indices of one batch to samples without ground truth."""

    def __init__(self, dataset: CocoDataset, mapper: TestMapper, max_bad: int) -> None:
        self.records, self.known_bad = dataset.records, dataset.bad
        self.mapper, self.max_bad = mapper, max_bad
        self.shared_memory = True
        self.board: Board | None = None

    def name_of(self, index: int) -> str:
        return str(self.records[index]["file_name"])

    def __getitem__(self, batch: list[int]) -> _Loaded:
        samples, failures = [], []
        for index in batch:
            record = self.records[index]
            _note(self.board, index)
            try:
                samples.append(self.mapper(record))
            except DataError as error:
                failures.append((record["file_name"], str(error)))
        _note(self.board, -1)
        return _packed(samples, self.shared_memory), failures


def _index_stream(cfg: Any, data: _TrainData, seed: int) -> Iterator[int]:
    name = cfg.DATALOADER.SAMPLER_TRAIN
    size = len(data.where)
    if name == "TrainingSampler":
        return shuffled_stream(size, seed)
    if name == "RepeatFactorTrainingSampler":
        classes = [[a["category_id"] for a in data.record(i)["annotations"]] for i in range(size)]
        root = cfg.DATALOADER.REPEAT_SQRT
        return repeat_stream(repeat_factors(classes, cfg.DATALOADER.REPEAT_THRESHOLD, square_root=root), seed)
    if name == "RandomSubsetTrainingSampler":
        return subset_stream(size, float(cfg.DATALOADER.get("RANDOM_SUBSET_RATIO", 1.0)), seed)
    raise ConfigError(
        f"DATALOADER.SAMPLER_TRAIN {name!r} is not implemented: use TrainingSampler, RepeatFactorTrainingSampler or "
        f"RandomSubsetTrainingSampler"
    )


def _workers(cfg: Any, num_workers: int | None) -> int:
    wanted = int(cfg.DATALOADER.NUM_WORKERS) if num_workers is None else num_workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(wanted, cores)) if num_workers is None else max(0, wanted)


def _note(board: Board | None, index: int) -> None:
    if board is not None:
        board.note(index)


def _packed(samples: list[Sample], shared_memory: bool) -> Any:
    return samples if get_worker_info() is None else pack_samples(samples, shared_memory)


def _note_failures(
    failures: list[tuple[str, str]], skipped: dict[str, str], max_bad: int, known_bad: Sequence[str]
) -> None:
    for name, why in failures:
        if name not in skipped:
            skipped[name] = why
            logger.warning("skipped: %s", why)
    if failures:
        refuse_if_too_many([*skipped.values(), *known_bad], max_bad, "reading images")


def _warn_of_one_colour(samples: Sequence[Sample]) -> bool:
    """Warn of the first picture in which nothing can be seen; whether there was one."""
    for sample in samples:
        if one_colour(sample["image"].numpy().transpose(1, 2, 0)):
            logger.warning(
                "%s: every pixel has the same colour, nothing can be learnt from it; gn-det check --images lists all "
                "pictures of this kind (training names the first only)",
                one_line(sample["file_name"], 300),
            )
            return True
    return False


def _run(data: _TrainData | _TestData, batches: Iterable[Any], workers: int) -> Iterator[_Loaded]:
    """Drive the workers; a worker's death or hang becomes one line that says where, and what to do."""
    global _board
    outer = _board
    failure = script_in_worker()
    if workers and failure is not None:
        raise failure
    free = shared_memory_free()
    if workers and free is not None and free < _PAGE * (8 + 3 * workers):
        raise DataError(f"there is no shared memory to start {workers} data loading processes: {_more_memory()}")
    _board = data.board = Board(workers, data.name_of) if workers else None
    loader = DataLoader(
        data,
        sampler=batches,
        batch_size=None,
        num_workers=workers,
        collate_fn=_unchanged,
        timeout=TIMEOUT if workers else 0,
        worker_init_fn=_start_worker,
    )
    try:
        yield from loader
    except RuntimeError as error:
        failure = worker_failure(error)
        if failure is None:
            raise
        raise failure from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.ENOMEM) or not workers:
            raise
        raise DataError(f"the data loading processes cannot be started ({error.strerror}): {_more_memory()}") from error
    finally:
        _board = outer


def worker_failure(error: RuntimeError) -> DataError | None:
    """The death or hang of a worker process as one line; None for any other error.

    torch reports a dead worker from a signal handler, so the error can come up anywhere in the main process, such as
    in the middle of a training step; whoever runs the steps should ask here.
    """
    text = str(error)
    if _SHARING.search(text):
        return DataError(f"a batch cannot be handed over by shared memory: {_more_memory()}")
    if not text.startswith("DataLoader"):
        return None
    if "timed out" in text:
        where = f" ({_board.describe()})" if _board is not None and _board.describe() else ""
        return DataError(
            f"no batch arrived within {TIMEOUT} s: the image storage hangs or the workers are stuck{where}; check the "
            f"disk, or set DATALOADER.NUM_WORKERS 0 to see where"
        )
    if "killed" in text or "exited unexpectedly" in text:
        pid = re.search(r"pid(?:\(s\))? (\d+)", text)
        if pid and _board is not None and not _board.knows(int(pid.group(1))) and _imports_script():
            return DataError(_unguarded())
        where = _board.describe(int(pid.group(1))) if _board is not None and pid else ""
        where = f" ({where})" if where else ""
        return DataError(
            f"a data loading process was killed{where}, most likely for lack of memory or of shared memory (/dev/shm): "
            f"{_more_memory()}"
        )
    return None


#: Shared memory of one semaphore; torch makes 8, and 3 for each worker.
_PAGE = 4096
#: What torch says when a tensor cannot be put into shared memory.
_SHARING = re.compile(r"unable to (?:write to file|open shared memory object|allocate shared memory|resize file|mmap)")


def _more_memory() -> str:
    """What to do where memory between processes is scarce, with what is left of it."""
    free = shared_memory_free()
    left = "" if free is None else f" ({free >> 10} kB of /dev/shm are free; Docker's option is --shm-size)"
    return f"lower DATALOADER.NUM_WORKERS (0 needs none), or give the machine or container more{left}"


def script_in_worker() -> DataError | None:
    """What to say where this very process is a worker that is still importing the script."""
    return DataError(_unguarded()) if getattr(multiprocessing.current_process(), "_inheriting", False) else None


def _imports_script() -> bool:
    """Whether starting a worker runs the user's script: all start methods but fork import it."""
    return multiprocessing.get_start_method() != "fork" and bool(getattr(sys.modules["__main__"], "__file__", None))


def _unguarded() -> str:
    main = sys.modules.get("__mp_main__") or sys.modules["__main__"]
    script = getattr(main, "__file__", None) or "the script"
    return (
        f"{script}: a data loading process imports this script and would start the run again: put what starts it under "
        "if __name__ == '__main__': (or set DATALOADER.NUM_WORKERS 0)"
    )


def _unchanged(loaded: _Loaded) -> _Loaded:
    return loaded


def _start_worker(worker: int) -> None:
    info = get_worker_info()
    if info is not None and info.dataset.board is not None:
        info.dataset.board.note(-1)  # it has started
    # Ctrl-C reaches the whole process group; the main process alone answers it and ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # So may SIGTERM (timeout, batch systems): a worker that died of it would keep the main process from saving. Only
    # the first one is passed over, so that a worker can still be ended; and none that the main process itself sends,
    # which waits for the worker's end.
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_answer_sigterm, args=(os.getppid(),), name="gn_det-sigterm", daemon=True).start()
    else:
        signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))
    end_with_parent()  # last: its thread inherits what is blocked, or SIGTERM would find a thread that dies of it


def _answer_sigterm(parent: int) -> None:
    for _ in range(2):
        if signal.sigwaitinfo({signal.SIGTERM}).si_pid == parent:
            break
    os._exit(0)
