"""Data loading processes: starting them, passing samples, and reporting hangs and crashes.

Every shared tensor costs the main process a file descriptor and the system shared memory. Ordinary batches reach the
default limits (1024 open files, 64 MB of /dev/shm in containers) and crash without a useful message. So all images of a
batch share one buffer, masks are packed as bits, and if shared memory is scarce the buffer is sent through the pipe.
"""

from __future__ import annotations

import errno
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.sharedctypes import RawArray
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from gn_det.errors import DataError
from gn_det.parent_watch import end_with_parent
from gn_det.structures import InstanceMask, Masks, Sample, Targets

#: Seconds to wait for one batch before the storage counts as hanging.
TIMEOUT = 600

#: Batches that a worker prefetches (torch's default), plus the one in use.
_IN_FLIGHT = 3
#: Shared memory of one semaphore; torch makes 8, and 3 for each worker.
_PAGE = 4096
#: torch's message when a tensor cannot be put into shared memory.
_SHARING = re.compile(r"unable to (?:write to file|open shared memory object|allocate shared memory|resize file|mmap)")


class WorkerData(Dataset[Any]):
    """Dataset for :func:`load_batches`: maps the indices of a batch to a worker's result.

    It knows which image each worker is reading, for the message if one hangs or dies.
    """

    _pids: Any = ()  # process id of each worker, and the index of the image that it reads, shared with the workers
    _reading: Any = ()

    def name_of(self, index: int) -> str:
        """File name of an image."""
        raise NotImplementedError

    def note(self, index: int) -> None:
        """Record in a worker that it starts to read image ``index``; -1 for none."""
        info = get_worker_info()
        if info is not None:
            self._pids[info.id], self._reading[info.id] = os.getpid(), index

    def watch(self, workers: int) -> None:
        """Prepare for a new set of ``workers`` processes."""
        self._pids, self._reading = RawArray("q", workers), RawArray("q", [-1] * workers)

    def has_started(self, pid: int) -> bool:
        """Return whether the worker with this process id has begun its work."""
        return pid in list(self._pids)

    def describe(self, pid: int | None) -> str:
        """Return ``worker 1 at a.jpg, ...`` for the worker with that process id or all reading ones; "" for none."""
        return ", ".join(
            f"worker {worker} at {self.name_of(index)}"
            for worker, index in enumerate(self._reading)
            if index >= 0 and pid in (None, self._pids[worker])
        )


#: Data of the newest loader with workers: torch reports a dead one wherever the main process happens to be.
_watched: WorkerData | None = None


def cores() -> int:
    """Return the number of CPU cores available to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load_batches(data: WorkerData, batches: Iterable[Any], workers: int) -> Iterator[Any]:
    """Yield ``data[batch]`` of every batch, computed by ``workers`` processes (0: in this process).

    Raises:
        DataError: a worker died or hangs; one line with the place and the remedy.
    """
    global _watched
    if workers:
        failure, free = script_in_worker(), shared_memory_free()
        if failure is None and free is not None and free < _PAGE * (8 + 3 * workers):
            failure = DataError(f"no shared memory to start {workers} data loading processes: {_more_memory()}")
        if failure is not None:
            raise failure
        data.watch(workers)
    outer, _watched = _watched, data if workers else None
    loader = DataLoader(
        data,
        sampler=batches,
        batch_size=None,
        num_workers=workers,
        collate_fn=_unchanged,
        # Lets a model on a GPU copy images asynchronously.
        pin_memory=torch.cuda.is_initialized(),  # type: ignore[no-untyped-call]
        timeout=TIMEOUT if workers else 0,
        worker_init_fn=partial(_start_worker, data),
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
        raise DataError(f"cannot start the data loading processes ({error.strerror}): {_more_memory()}") from error
    finally:
        _watched = outer


def worker_failure(error: RuntimeError) -> DataError | None:
    """Return a one-line error for a dead or hanging worker; None for any other error.

    torch reports a dead worker from a signal handler, so the error can surface anywhere in the main process, such as in
    the middle of a training step. Callers that run steps should check their errors here.
    """
    text = str(error)
    if _SHARING.search(text):
        return DataError(f"cannot pass a batch through shared memory: {_more_memory()}")
    if not text.startswith("DataLoader"):
        return None
    found = re.search(r"pid(?:\(s\))? (\d+)", text)
    pid = int(found[1]) if found else None
    reading = _watched.describe(pid) if _watched is not None else ""
    where = f" ({reading})" if reading else ""
    if "timed out" in text:
        return DataError(
            f"no batch arrived within {TIMEOUT} s: the image storage hangs or the workers are stuck{where}; check the "
            f"disk, or set DATALOADER.NUM_WORKERS 0 to see where"
        )
    if "killed" in text or "exited unexpectedly" in text:
        if pid is not None and _watched is not None and not _watched.has_started(pid) and _imports_script():
            return DataError(_unguarded())
        return DataError(
            f"a data loading process was killed{where if pid else ''}, probably because memory or shared memory "
            f"(/dev/shm) ran out: {_more_memory()}"
        )
    return None


def shared_memory_free() -> int | None:
    """Return the free bytes in /dev/shm; None if the system has no such limit."""
    try:
        return shutil.disk_usage("/dev/shm").free
    except OSError:
        return None


def shared_memory_fits(workers: int, bytes_per_batch: int) -> bool:
    """Return whether /dev/shm has room for all batches in flight; True if the system has no such limit."""
    free = shared_memory_free()
    return free is None or workers * _IN_FLIGHT * bytes_per_batch < 0.8 * free


def _more_memory() -> str:
    """Return the remedy for scarce shared memory, with the amount left."""
    free = shared_memory_free()
    left = "" if free is None else f" ({free >> 10} kB of /dev/shm are free; with Docker, use --shm-size)"
    return f"lower DATALOADER.NUM_WORKERS (0 needs none), or give the machine or container more{left}"


def script_in_worker() -> DataError | None:
    """Return the error to raise if this process is a worker that is still importing the user's script."""
    return DataError(_unguarded()) if getattr(multiprocessing.current_process(), "_inheriting", False) else None


def _imports_script() -> bool:
    """Return whether starting a worker imports the user's script, as every start method but fork does."""
    return multiprocessing.get_start_method() != "fork" and bool(getattr(sys.modules["__main__"], "__file__", None))


def _unguarded() -> str:
    main = sys.modules.get("__mp_main__") or sys.modules["__main__"]
    script = getattr(main, "__file__", None) or "the script"
    return (
        f"{script}: data loading processes import this script and would start the run again: put the code that starts "
        "it under if __name__ == '__main__': (or set DATALOADER.NUM_WORKERS 0)"
    )


def _unchanged(loaded: Any) -> Any:
    return loaded


def _start_worker(data: WorkerData, worker: int) -> None:
    data.note(-1)  # it has started
    # Ctrl-C reaches the whole process group; only the main process handles it and ends its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # So may SIGTERM (timeout, batch systems): if it killed a worker, the main process could not save. Only the first
    # one is ignored, so that a worker can still be ended, and none sent by the main process, which waits for the exit.
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_answer_sigterm, args=(os.getppid(),), name="gn_det-sigterm", daemon=True).start()
    else:
        signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))
    end_with_parent()  # last: its thread must inherit the blocked signals, or SIGTERM would kill it


def _answer_sigterm(parent: int) -> None:
    for _ in range(2):
        if signal.sigwaitinfo({signal.SIGTERM}).si_pid == parent:
            break
    os._exit(0)


@dataclass
class PackedSamples:
    """One batch: all images end to end in ``pixels``; each of ``samples`` has the shape of its image instead."""

    pixels: Tensor | np.ndarray
    samples: list[dict[str, Any]]

    def pin_memory(self) -> PackedSamples:
        """Return the batch with page-locked pixels; called by torch's loader."""
        return replace(self, pixels=torch.as_tensor(self.pixels).pin_memory())


def pack_samples(samples: list[Sample], shared_memory: bool = True) -> PackedSamples:
    """Pack samples for transfer to another process."""
    flat = [s["image"].flatten() for s in samples]
    pixels = torch.cat(flat) if flat else torch.zeros(0, dtype=torch.uint8)
    packed: list[dict[str, Any]] = [{**s, "image": tuple(s["image"].shape)} for s in samples]
    for sample in packed:
        if "targets" in sample:
            sample["targets"] = _pack_targets(sample["targets"])
    return PackedSamples(pixels if shared_memory else pixels.numpy(), packed)


def unpack_samples(packed: PackedSamples | list[Sample]) -> list[Sample]:
    """Undo :func:`pack_samples`; return a list of samples unchanged."""
    if isinstance(packed, list):
        return packed
    images = torch.split(torch.as_tensor(packed.pixels), [math.prod(s["image"]) for s in packed.samples])
    samples: list[Any] = [{**s, "image": image.view(s["image"])} for s, image in zip(packed.samples, images)]
    for sample in samples:
        if "targets" in sample:
            size, boxes, classes, masks = sample["targets"]
            unpacked = None if masks is None else Masks([_unpack_mask(m) for m in masks])
            sample["targets"] = Targets(size, torch.from_numpy(boxes), torch.from_numpy(classes), unpacked)
    return samples


def _pack_targets(targets: Targets) -> tuple[Any, ...]:
    masks: Any = None
    if targets.masks is not None:
        masks = [mask if isinstance(mask, list) else (mask.shape, np.packbits(mask)) for mask in targets.masks.masks]
    return targets.image_size, targets.boxes.numpy(), targets.classes.numpy(), masks


def _unpack_mask(packed: Any) -> InstanceMask:
    if isinstance(packed, list):
        return packed
    (height, width), bits = packed
    return np.unpackbits(bits, count=height * width).reshape(height, width).view(bool)
