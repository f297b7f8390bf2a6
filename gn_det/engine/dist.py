"""Ranks, small collectives, and starting processes with torchrun or directly."""

from __future__ import annotations

import logging
import os
import pickle
import platform
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from multiprocessing.connection import wait as wait_for
from pathlib import Path
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.elastic.utils.distributed import get_free_port

from gn_det.compiler import cpu_info
from gn_det.errors import ConfigError, TrainingError, UserError
from gn_det.parent_watch import end_with_parent
from gn_det.terminal import guard
from gn_det.text import count, shown

logger = logging.getLogger(__name__)
T = TypeVar("T")

TIMEOUT = timedelta(minutes=30)
_GRACE_SECONDS = 15.0


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def gather_rows(row: Tensor) -> list[list[float]]:
    """Gather every rank's vector (n,) on every rank, in rank order, with one device synchronization."""
    if world_size() == 1:
        return [row.tolist()]
    rows = [torch.empty_like(row) for _ in range(world_size())]
    dist.all_gather(rows, row)
    return torch.stack(rows).tolist()


_objects: Any = None


def _object_group() -> Any:
    """Return a gloo group, because Python objects go through host memory whatever the gradients use."""
    global _objects
    if _objects is None:
        _objects = dist.new_group(backend="gloo", timeout=TIMEOUT)
    return _objects


def gather_objects(value: Any) -> list[Any]:
    """Gather every rank's picklable object on rank 0, in rank order; return an empty list elsewhere."""
    if world_size() == 1:
        return [value]
    out: list[Any] | None = [None] * world_size() if rank() == 0 else None
    dist.gather_object(value, out, dst=0, group=_object_group())
    return out or []


def broadcast(value: Any) -> Any:
    """Return rank 0's object on every rank."""
    if world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0, group=_object_group())
    return box[0]


def on_first_rank(call: Callable[[], T]) -> T:
    """Return the value of ``call()`` on rank 0, or raise its UserError, on every rank."""
    outcome: T | UserError | None = None
    if rank() == 0:
        try:
            outcome = call()
        except UserError as error:
            outcome = error
    outcome = broadcast(outcome)
    if isinstance(outcome, UserError):
        raise outcome
    return cast(T, outcome)


def resolve_device(name: str, key: str = "MODEL.DEVICE") -> str:
    """Return "cpu", "cuda" or "cuda:N" for the user's setting ``key``; raise ConfigError if unknown or missing."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cpu":
        return name
    named = re.fullmatch(r"cuda(?::([0-9]{1,4}))?", name)
    if named is None:
        raise ConfigError(f"{key} is {shown(name)}; use auto, cpu, cuda or cuda:N")
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(named[1] or 0) >= found:
        there = count(found, "GPU") if found else "no GPU"
        raise ConfigError(f"{key} is '{name}' but torch finds {there}; set {key} to cpu or auto")
    return name


def local_device(name: str) -> str:
    """Return :func:`resolve_device` with the index of this process's GPU."""
    device = resolve_device(name)
    return f"cuda:{os.environ['LOCAL_RANK']}" if device == "cuda" and world_size() > 1 else device


def device_name(device: str) -> str:
    """Return the name of the GPU or the CPU."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    return cpu_info("model name") or platform.processor() or platform.machine() or "CPU"


def under_torchrun() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ and "LOCAL_RANK" in os.environ


def planned_world_size(count: int) -> int:
    """Return the number of processes of a run: ``count``, or torchrun's number if it started this process."""
    return int(os.environ["WORLD_SIZE"]) if under_torchrun() else count


def start_group(device: str) -> None:
    """Join the process group that the environment describes; do nothing for a single process."""
    if os.environ.get("WORLD_SIZE", "1") == "1" or dist.is_initialized():
        return
    if device.startswith("cuda"):
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=TIMEOUT)


def stop_group() -> None:
    """Leave the process group, if there is one.

    torch 2.6 destroys a group while holding the GIL and waiting for gloo's threads, which sometimes wait for the GIL. A
    backend that is dropped after its group releases the lock first.
    """
    global _objects
    if not dist.is_initialized():
        return
    groups = [g for g in (dist.group.WORLD, _objects) if g is not None and dist.get_backend(g) == "gloo"]
    backends = [g._get_backend(torch.device("cpu")) for g in groups]
    groups, _objects = [], None
    dist.destroy_process_group()
    del backends


def launch(
    function: Callable[..., T],
    args: tuple[Any, ...],
    *,
    device: str,
    num_gpus: int = 1,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
) -> T:
    """Call ``function(*args)`` in ``num_gpus * num_machines`` processes and return rank 0's result.

    Under torchrun the processes already exist, and its counts apply. On a CPU, ``num_gpus`` counts processes.

    Raises:
        ConfigError: counts, rank or URL are invalid on this machine.
        UserError: raised by one of the processes.
    """
    if under_torchrun():
        # torchrun's store keeps the addresses of a finished group, so a process that runs several things in turn keeps
        # one group for all of them.
        outer = dist.is_initialized()
        start_group(device)
        try:
            return function(*args)
        finally:
            if not outer:
                stop_group()
    _check_counts(device, num_gpus, num_machines, machine_rank)
    if num_gpus * num_machines == 1:
        return function(*args)
    if num_machines == 1 and dist_url == "auto":
        address, port = "127.0.0.1", get_free_port()  # type: ignore[no-untyped-call]
    else:
        address, port = _address(dist_url)
    common = {
        "WORLD_SIZE": num_gpus * num_machines,
        "LOCAL_WORLD_SIZE": num_gpus,
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
    }
    with tempfile.TemporaryDirectory(prefix="gn_det-") as folder:
        box = Path(folder)
        ranks = [{**common, "RANK": machine_rank * num_gpus + i, "LOCAL_RANK": i} for i in range(num_gpus)]
        _raise_first_error(box, _spawn([(rank, device, box, function, args) for rank in ranks]))
        result = box / "result-0"
        return cast(T, pickle.loads(result.read_bytes()) if result.is_file() else None)


def _check_counts(device: str, num_gpus: int, num_machines: int, machine_rank: int) -> None:
    if num_gpus < 1 or num_machines < 1:
        raise ConfigError(f"--num-gpus {num_gpus} --num-machines {num_machines}: both must be at least 1")
    if not 0 <= machine_rank < num_machines:
        raise ConfigError(f"--machine-rank {machine_rank} must be between 0 and {num_machines - 1}")
    if device.startswith("cuda") and num_gpus > torch.cuda.device_count():
        found = count(torch.cuda.device_count(), "GPU")
        raise ConfigError(f"--num-gpus {num_gpus}: torch finds {found} on this machine")
    if ":" in device and num_gpus > 1:
        raise ConfigError(f"MODEL.DEVICE {device} names one GPU; use MODEL.DEVICE cuda with --num-gpus {num_gpus}")


def _address(dist_url: str) -> tuple[str, int]:
    with suppress(ValueError):  # of a port that is no number or too large
        url = urlsplit(dist_url)
        if url.hostname:
            return url.hostname, url.port or 29500
    given = "several machines need" if dist_url == "auto" else f"{shown(dist_url)} is not"
    raise ConfigError(f"--dist-url: {given} tcp://ADDRESS_OF_MACHINE_0:PORT, equal on all machines")


def in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _spawn(calls: list[tuple[Any, ...]]) -> dict[int, int]:
    """Call :func:`_worker` in a process each; return the exit codes of those that failed on their own."""
    context = mp.get_context("spawn")
    # Otherwise a process whose peer stopped prints C++ frames around the line that matters.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    workers = [context.Process(target=_worker, args=call) for call in calls]
    for worker in workers:
        worker.start()

    def forward(number: int, _frame: Any) -> None:
        """Forward signals to the workers, except Ctrl-C, which reaches them directly."""
        for worker in workers:
            if worker.pid and worker.is_alive() and number != signal.SIGINT:
                os.kill(worker.pid, number)

    old = {s: signal.signal(s, forward) for s in (signal.SIGINT, signal.SIGTERM)} if in_main_thread() else {}
    try:
        end = float("inf")  # after one failure, the others get time to notice
        while time.monotonic() < end and any(w.exitcode is None for w in workers):
            wait_for([w.sentinel for w in workers if w.exitcode is None], timeout=0.2)
            if end == float("inf") and any(w.exitcode for w in workers):
                end = time.monotonic() + _GRACE_SECONDS
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
        failed = {i: w.exitcode for i, w in enumerate(workers) if w.exitcode}
        for worker in workers:
            worker.kill()
    return failed


def _raise_first_error(box: Path, failed: dict[int, int]) -> None:
    """Raise the error that caused the others: a UserError, or a RuntimeError with the first stack trace."""
    files = sorted(box.glob("error-*"), key=lambda f: f.stat().st_mtime_ns)
    errors = {int(f.name.removeprefix("error-")): pickle.loads(f.read_bytes()) for f in files}
    for error in errors.values():
        if isinstance(error, UserError):
            raise error
    for index, code in failed.items():
        if code < 0:
            name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
            raise TrainingError(
                f"training process {index} was killed by {name}, probably because memory ran out: lower "
                "SOLVER.IMS_PER_BATCH, DATALOADER.NUM_WORKERS or INPUT.MAX_SIZE_TRAIN, then continue with --resume"
            )
    reports = [f"{index} failed first:\n{error}" for index, error in errors.items()]
    reports += [f"{index} exited with code {code} and no error message" for index, code in failed.items()]
    if reports:
        raise RuntimeError(f"training process {reports[0]}")


def _worker(rank: dict[str, Any], device: str, box: Path, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    end_with_parent()
    guard()
    os.environ.update({name: str(value) for name, value in rank.items()})
    index = rank["LOCAL_RANK"]
    if device == "cpu":
        torch.set_num_threads(max(torch.get_num_threads() // rank["LOCAL_WORLD_SIZE"], 1))
    try:
        start_group(device)
        result = function(*args)
        if index == 0:
            (box / "result-0").write_bytes(pickle.dumps(result))
        stop_group()
    except BaseException as error:
        content = error if isinstance(error, UserError) else traceback.format_exc()
        (box / f"error-{index}").write_bytes(pickle.dumps(content))
        sys.stdout.flush()
        os._exit(1)  # no clean shutdown: peers may be waiting in a collective
