"""Clocks that jump, 0 and 8 loading processes, and memory over two thousand iterations."""

from __future__ import annotations

import io
import os
import random
import statistics
import time
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

from tests.faults.soak_case import Case, differences, finish, in_fork, outcome, start, train_words

KEYS = [
    "SOLVER.MAX_ITER",
    "24",
    "SOLVER.CHECKPOINT_PERIOD",
    "5",
    "SOLVER.CHECKPOINT_KEEP",
    "2",
    "TEST.EVAL_PERIOD",
    "8",
]


def _main(words: list[str], jumps: bool = False, cores: int = 0) -> int:
    """The command in this process, under a clock that jumps by up to years at every look, or with more cores."""
    from gn_det.cli import main

    rng, real = random.Random(4), time.time
    if jumps:
        time.time = lambda: max(0.0, real() + rng.choice((-1, 1)) * 10 ** rng.uniform(0, 8.5))
    if cores:
        os.sched_getaffinity = lambda pid: set(range(cores))  # type: ignore[assignment,attr-defined]
    with redirect_stdout(io.StringIO()):
        return main(words)


def clock(case: Case) -> None:
    """Time goes back and forth: the same bits, no time left below 0, and --max-hours does not notice."""
    log = case.output / "clock.log"
    log.write_bytes(b"")
    shapes = case.folder / "shapes"
    steady, jumping, short = (case.folder / name for name in ("steady", "jumping", "short"))
    code, _ = finish(train_words(shapes, steady, *KEYS), log)
    case.require(code == 0, f"the run: exit code {code}")
    words = train_words(shapes, jumping, "--max-hours=1", *KEYS)
    found = in_fork(partial(_main, words, jumps=True))
    case.require(found == 0, f"under a jumping clock: {found}")
    differ = [d for d in differences(outcome(steady), outcome(jumping)) if "MAX_HOURS" not in d]
    case.require(not differ, f"under a jumping clock: {differ[:3]}")
    text = (jumping / "log.txt").read_text()
    case.require("eta: -" not in text and "SOLVER.MAX_HOURS (--max-hours) end" not in text, "negative times in the log")
    case.say("wall clock jumping by up to 10 years at every look", "the same bits, --max-hours 1 not used up")
    hours = 1.5 / 3600
    resumes, codes = 0, set()
    while not (short / "model_final.pth").exists() and resumes < 30:
        codes.add(finish(train_words(shapes, short, f"--max-hours={hours}", "--resume", *KEYS), log)[0])
        resumes += 1
        _ends_evaluated(case, short)
    case.require(codes == {0} and resumes > 1, f"--max-hours: exit codes {codes} in {resumes} runs")
    a, b = (outcome(f) for f in (steady, short))
    differ = differences(a["final"]["model"], b["final"]["model"])
    case.require(not differ, f"--max-hours and --resume: {differ[:3]}")
    case.say(
        f"--max-hours of 1.5 s again and again, then --resume: {resumes} runs", "each ends evaluated; the same weights"
    )


def _ends_evaluated(case: Case, folder: Path) -> None:
    from gn_det.checkpoint.io import read_checkpoint

    last = read_checkpoint(folder / (folder / "last_checkpoint").read_text())
    case.require(
        last["gn_det"]["evaluated_at"] == last["iteration"], "--max-hours left a checkpoint without evaluation"
    )


def workers(case: Case) -> None:
    """0, 2 and 8 loading processes: the same weights and metrics."""
    shapes = case.folder / "shapes"
    found: dict[int, Any] = {}
    for count in (0, 2, 8):
        words = train_words(shapes, case.folder / str(count), *KEYS, "DATALOADER.NUM_WORKERS", str(count))
        code = in_fork(partial(_main, words, cores=8))
        case.require(code == 0, f"{count} workers: {code}")
        found[count] = outcome(case.folder / str(count))
    for count in (2, 8):
        differ = differences(found[0], found[count])
        case.require(not differ, f"0 and {count} workers: {differ[:3]}")
    case.say("0, 2 and 8 loading processes", "equal to the last bit")


def memory(case: Case) -> None:
    """Resident memory of the training process over 2000 iterations, evaluations and checkpoints included."""
    iterations = case.count(2000, 100)
    often = str(iterations // 8)  # the first evaluation is before the first look that counts, whatever the size
    log = case.output / "memory.log"
    log.write_bytes(b"")
    keys = ["SOLVER.MAX_ITER", str(iterations), "SOLVER.IMS_PER_BATCH", "1", "SOLVER.CHECKPOINT_PERIOD", often,
            "TEST.EVAL_PERIOD", often, "DATALOADER.NUM_WORKERS", "1", "INPUT.MIN_SIZE_TRAIN", "(48,)",
            "SOLVER.EMA.ENABLED", "True", "SOLVER.BASE_LR", "0.005"]  # fmt: skip
    folder = case.folder / "run"
    process = start(train_words(case.folder / "shapes", folder, *keys), log)
    sizes: list[float] = []
    page = os.sysconf("SC_PAGE_SIZE")
    while process.poll() is None:
        time.sleep(0.25)
        try:
            resident = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1]) * page / 2**20
        except (OSError, IndexError):
            continue
        if (folder / "metrics.json").is_file() and resident:
            sizes.append(resident)
    case.require(process.returncode == 0, f"the run ended with {process.returncode}; see {log}")
    case.require(len(sizes) >= 40, f"only {len(sizes)} looks at the memory")
    early = statistics.median(sizes[len(sizes) // 5 : len(sizes) * 3 // 10])
    late = statistics.median(sizes[len(sizes) * 9 // 10 :])
    case.say("iterations", iterations)
    case.say("resident memory after a quarter and at the end", f"{early:.0f} and {late:.0f} MiB")
    case.say("growth", f"{late - early:+.1f} MiB")
    case.require(late - early < 40, "memory grows")
