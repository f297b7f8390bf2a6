"""kill -9 of the real command line on a real model, --resume, and the run that was left alone."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

from tests.faults.soak_case import Case, Failure, differences, finish, outcome, start, train_words

#: Checkpoints every 3 iterations, so that many kills hit one; averages of the weights take part.
KEYS = [
    "SOLVER.MAX_ITER", "46", "SOLVER.CHECKPOINT_PERIOD", "3", "SOLVER.CHECKPOINT_KEEP", "2", "TEST.EVAL_PERIOD", "10",
    "SOLVER.EMA.ENABLED", "True", "SOLVER.EMA.DECAY", "0.9", "TEST.BEST_METRIC", "bbox/AP",
    "INPUT.CROP.ENABLED", "True",
]  # fmt: skip


def kills(case: Case) -> None:
    """One process with 0 and 2 workers in turn."""
    _survive(case, case.count(24, 2), ["0", "2"], [], seed=21)


def ranks(case: Case) -> None:
    """Two processes with one image each; the parent, or one of the two, is killed."""
    _survive(case, case.count(6), ["0", "1"], ["--num-gpus=2"], seed=22)


def _survive(case: Case, wanted: int, workers: list[str], flags: list[str], seed: int) -> None:
    rng = random.Random(seed)
    whole, cut, log = case.folder / "whole", case.folder / "cut", case.output / f"{case.name}.log"
    log.write_bytes(b"")

    def words(folder: Path, number: int, *more: str) -> list[str]:
        keys = [*KEYS, "DATALOADER.NUM_WORKERS", workers[number % len(workers)]]
        return train_words(case.folder / "shapes", folder, *flags, *more, *keys)

    code, length = finish(words(whole, 0), log)
    case.require(code == 0, f"the undisturbed run failed with exit code {code}; see {log}")
    where: Counter[str] = Counter()
    runs, longest = 1, 0.0
    while sum(where.values()) < wanted:
        number = sum(where.values())
        process = start(words(cut, number, "--resume"), log)
        begun = time.perf_counter()
        place = _kill(process, cut, rng, number, length)
        longest = max(longest, time.perf_counter() - begun)
        if not place:  # it came to its end first
            case.require(process.returncode == 0, f"a resumed run failed by itself ({process.returncode}); see {log}")
            _compare(case, whole, cut)
            for file in cut.glob("*.*"):
                file.unlink()
            (cut / "last_checkpoint").unlink()
            runs += 1
            continue
        where[place] += 1
    code, _ = finish(words(cut, 1, "--resume"), log)
    case.require(code == 0, f"the last --resume failed with exit code {code}; see {log}")
    lines = _compare(case, whole, cut)
    case.say("kill -9 survived", f"{sum(where.values())} of {wanted}")
    for place, count in sorted(where.items()):
        case.say(f"  while {place}", count)
    case.say("runs that came to their end and were compared", runs)
    case.say("weights, average, optimizer, schedule, random streams", "equal to the last bit")
    case.say("metrics.json", f"equal, {lines} lines")


def _kill(process: subprocess.Popen[bytes], folder: Path, rng: random.Random, number: int, length: float) -> str:
    """What the run was doing when it was killed; "" where it ended before. Even numbers aim at a file being written."""
    aim = number % 2 == 0
    skip = rng.randrange(12)
    at = time.perf_counter() + (300 if aim else rng.uniform(0.1, length))
    delay = rng.uniform(0, 0.03)
    seen = ""
    while time.perf_counter() < at:
        if process.poll() is not None:
            return ""
        if aim:
            now = _being_written(folder)
            skip -= bool(now and now != seen)
            seen = now
            if skip < 0:
                time.sleep(delay)
                break
            time.sleep(0.0005)
        else:
            time.sleep(0.005)
    else:
        if aim:
            raise Failure("no checkpoint was written within five minutes")
    victim = process.pid
    children = _children(process.pid)
    if number % 3 == 1 and children:  # one of the ranks or loading processes, not the parent
        victim = rng.choice(children)
    began = _log_size(folder)
    if process.poll() is not None:
        return ""
    try:
        os.kill(victim, signal.SIGKILL)
    except ProcessLookupError:
        return ""
    if victim != process.pid:
        return _ended_by_child(process)
    process.wait()
    _wait_for_children(children)
    if _being_written(folder):
        return "a checkpoint was half written"
    return "it trained or evaluated" if began else "it started"


def _ended_by_child(process: subprocess.Popen[bytes]) -> str:
    """The whole command must end by itself, with an error, soon after one of its processes was killed."""
    try:
        code = process.wait(timeout=60)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        raise Failure("a killed child process did not end the run within a minute") from None
    return "" if code == 0 else "only one of its child processes was killed"


def _children(parent: int) -> list[int]:
    try:
        text = Path(f"/proc/{parent}/task/{parent}/children").read_text()
    except OSError:
        return []
    return [int(word) for word in text.split() if _works(word)]


def _works(pid: str) -> bool:
    """Whether it is a loading process or a rank; libraries start others for a moment."""
    try:
        name, line = (Path(f"/proc/{pid}/{what}").read_bytes() for what in ("comm", "cmdline"))
    except OSError:
        return False
    return name.startswith(b"pt_data") or b"spawn_main" in line


def _wait_for_children(children: list[int]) -> None:
    """They end with their parent; until then they may still hold files."""
    end = time.perf_counter() + 30
    while any(_alive(child) for child in children):
        if time.perf_counter() > end:
            for child in filter(_alive, children):
                os.kill(child, signal.SIGKILL)
            raise Failure("processes outlived their killed parent by 30 s")
        time.sleep(0.05)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _being_written(folder: Path) -> str:
    return next((entry.name for entry in _entries(folder) if ".pth.tmp-" in entry.name), "")


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        return list(os.scandir(folder))
    except OSError:
        return []


def _log_size(folder: Path) -> int:
    return sum("model_" in entry.name for entry in _entries(folder))


def _compare(case: Case, whole: Path, cut: Path) -> int:
    a, b = outcome(whole), outcome(cut)
    found = differences(a, b)
    if found:
        for name, folder in (("whole", whole), ("cut", cut)):
            shutil.copytree(folder, case.output / f"{case.name}-{name}", dirs_exist_ok=True)
        case.require(False, f"the killed and resumed run differs from the run left alone: {'; '.join(found[:6])}")
    return len(a["metrics"])
