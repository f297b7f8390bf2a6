"""What the parts of ``make soak`` share: figures, the command line as a user types it, and limits on hangs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any


class Failure(Exception):
    """Something is not as it should be; the message says what."""


@dataclass
class Case:
    """One part at work.

    Attributes:
        name: of the part.
        size: scales every count.
        folder: scratch space, deleted afterwards.
        output: for files that help to understand a failure.
        figures: (what, value) in the order they are to be shown.
    """

    name: str
    size: float
    folder: Path
    output: Path
    figures: list[tuple[str, str]] = field(default_factory=list)

    def count(self, full: int, least: int = 1) -> int:
        """``full`` scaled."""
        return max(round(full * self.size), least)

    def say(self, what: str, value: object) -> None:
        """One line of the table."""
        self.figures.append((what, str(value)))
        print(f"  {what:58s} {value}", flush=True)

    def require(self, holds: bool, what: str) -> None:
        if not holds:
            raise Failure(what)


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}

#: A real Mask R-CNN with GN, as small as it gets.
TINY = [
    "MODEL.DEVICE", "cpu", "MODEL.FPN.OUT_CHANNELS", "32", "MODEL.ROI_BOX_HEAD.CONV_DIM", "32",
    "MODEL.ROI_BOX_HEAD.FC_DIM", "32", "MODEL.ROI_MASK_HEAD.CONV_DIM", "32",
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "16",
    "MODEL.RPN.POST_NMS_TOPK_TRAIN", "30", "MODEL.RPN.PRE_NMS_TOPK_TRAIN", "50", "MODEL.RPN.POST_NMS_TOPK_TEST", "20",
    "MODEL.RPN.PRE_NMS_TOPK_TEST", "20", "TEST.DETECTIONS_PER_IMAGE", "5", "INPUT.MIN_SIZE_TRAIN", "(48, 64)",
    "INPUT.MAX_SIZE_TRAIN", "96", "INPUT.MIN_SIZE_TEST", "64", "INPUT.MAX_SIZE_TEST", "96", "SOLVER.IMS_PER_BATCH", "2",
    "SOLVER.WARMUP_ITERS", "3", "SEED", "5",
]  # fmt: skip


def train_words(shapes: Path, output: Path, *more: str, config: str = "quickstart.yaml") -> list[str]:
    """``train ...`` on small sets of shapes, which are made below ``shapes``."""
    from gn_det.data.shapes import make_shapes

    words = ["train", "--config", config, "--engine", "embedded", "--output", str(output)]
    for split, count in (("train", 14), ("val", 4)):
        source = make_shapes(shapes, split, count)
        words += [f"--{split}-json", source.json_file, f"--{split}-images", source.image_root]
    return [*words, *[m for m in more if m.startswith("--")], *TINY, *[m for m in more if not m.startswith("--")]]


def start(words: list[str], log: Path) -> subprocess.Popen[bytes]:
    """``gn-det words`` in a session of its own, so that all of its processes can be ended together."""
    with log.open("ab") as file:
        command = [sys.executable, "-m", "gn_det", *words]
        return subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True, env=ENVIRONMENT)


def finish(words: list[str], log: Path, seconds: float = 300) -> tuple[int, float]:
    """Exit code of ``gn-det words``, and how long it took; hangs are ended."""
    begun = time.perf_counter()
    process = start(words, log)
    try:
        code = process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise Failure(f"gn-det {' '.join(words[:1])} did not end within {seconds:.0f} s; see {log}") from None
    return code, time.perf_counter() - begun


MEASURED = ("time", "data_time", "eta_seconds")


def outcome(folder: Path) -> dict[str, Any]:
    """All that must be equal: every value of the last checkpoints, and metrics.json without its times."""
    import torch

    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return [str(value.dtype), value.flatten().tolist()]
        if isinstance(value, dict):
            return {str(k): plain(v) for k, v in value.items() if k not in ("data_time", "config")}
        if isinstance(value, float) and value != value:
            return "nan"  # equal to itself
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

    from gn_det.checkpoint.io import read_checkpoint

    lines = [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]
    return {
        "files": sorted(f.name for f in folder.iterdir() if f.is_file() and "tfevents" not in f.name),
        "final": plain(read_checkpoint(folder / "model_final.pth")),
        "best": plain(read_checkpoint(folder / "model_best.pth")),
        "metrics": [{k: v for k, v in line.items() if k not in MEASURED} for line in lines],
    }


def differences(a: Any, b: Any, where: str = "") -> list[str]:
    """Places in which two outcomes differ, and how."""
    if isinstance(a, dict) and isinstance(b, dict):
        return [d for key in sorted({*a, *b}, key=str) for d in differences(a.get(key), b.get(key), f"{where}/{key}")]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b) and len(a) < 200:
        return [d for i, (x, y) in enumerate(zip(a, b)) for d in differences(x, y, f"{where}/{i}")]
    return [] if a == b else [f"{where}: {str(a)[:60]} and {str(b)[:60]}"]


class Hang(BaseException):
    """Not an Exception, so that nothing on the way catches it."""


@contextmanager
def limit(seconds: float) -> Iterator[None]:
    """Raise :class:`Hang` in this thread where the block takes longer."""

    def ring(number: int, frame: object) -> None:
        raise Hang(f"more than {seconds:.0f} s")

    old = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)


def in_fork(call: Callable[[], Any], memory: int = 0) -> Any:
    """The value (plain json) that ``call`` returns in a process of its own; a string where that process dies.

    Args:
        memory: bytes of address space it may take beyond what it has; 0 is no limit.
    """
    readable, writable = os.pipe()
    process = os.fork()
    if process == 0:
        code = 1
        try:
            os.close(readable)
            if memory:
                import resource

                has = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
                resource.setrlimit(resource.RLIMIT_AS, (has + memory, has + memory))
            data = json.dumps(call()).encode()
            with os.fdopen(writable, "wb") as file:
                file.write(data)
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writable)
    with os.fdopen(readable, "rb") as file:
        data = file.read()
    status = os.waitpid(process, 0)[1]
    if os.WIFSIGNALED(status):
        return f"killed by signal {os.WTERMSIG(status)}"
    return json.loads(data) if data else f"ended with code {os.WEXITSTATUS(status)}"


def run_mutations(
    case: Case, what: str, wanted: int, piece: int, memory: int, of_piece: Callable[[int, int], dict[str, Any]]
) -> None:
    """Count the outcomes of ``wanted`` mutations, ``piece`` of them in a process of their own, and show them.

    Args:
        case: requires that no outcome is another one than those that are allowed.
        what: is mutated, for the table.
        memory: see :func:`in_fork`.
        of_piece: (first, count) to what :func:`watch_mutations` returns.
    """
    outcomes: Counter[str] = Counter()
    slowest, others = 0.0, []
    peaks: dict[str, float] = {}
    for start in range(0, wanted, piece):
        found = in_fork(partial(of_piece, start, min(piece, wanted - start)), memory=memory)
        if isinstance(found, str):
            found = {"outcomes": {f"OTHER: the process {found}": 1}, "slowest": 0.0, "others": [f"from {start} on"]}
        outcomes.update(found["outcomes"])
        slowest, others = max(slowest, found["slowest"]), others + found["others"]
        for name, value in found.get("peaks", {}).items():
            peaks[name] = max(peaks.get(name, 0.0), value)
    case.say(f"mutations of {what}", sum(outcomes.values()))
    for name, count in sorted(outcomes.items()):
        case.say(f"  {name}", count)
    case.say("slowest", f"{slowest:.2f} s")
    for name, value in peaks.items():
        case.say(name, f"{value:.2f}")
    case.require(not others, f"{len(others)} mutations: {others[:3]}")


def watch_mutations(numbers: range, seconds: float, one: Callable[[int], Callable[[], str]]) -> dict[str, Any]:
    """Outcomes by name of the mutations ``numbers``; what hangs or raises is an OTHER.

    Args:
        seconds: that one may take.
        one: makes a mutation, and returns what names its outcome; that call alone is timed.
    """
    outcomes: Counter[str] = Counter()
    slowest, others = 0.0, []
    for number in numbers:
        outcome_of = one(number)
        begun = time.perf_counter()
        try:
            with limit(seconds):
                name = outcome_of()
        except Hang:
            name = "OTHER: hang"
        except BaseException as error:
            name = f"OTHER: {type(error).__name__}: {str(error)[:80]}"
        slowest = max(slowest, time.perf_counter() - begun)
        outcomes[name] += 1
        if name.startswith("OTHER"):
            others.append(f"number {number}: {name}")
    return {"outcomes": dict(outcomes), "slowest": slowest, "others": others}
