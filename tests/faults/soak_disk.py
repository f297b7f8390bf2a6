"""A disk that is full at the n-th write, a real small file system, read-only output, images that vanish."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from tests.faults.soak_case import Case, differences, finish, in_fork, outcome, start, train_words

KEYS = [
    "SOLVER.MAX_ITER",
    "24",
    "SOLVER.CHECKPOINT_PERIOD",
    "3",
    "SOLVER.CHECKPOINT_KEEP",
    "3",
    "TEST.EVAL_PERIOD",
    "8",
]


def disk(case: Case) -> None:
    _nth_write(case)
    _small_file_system(case)
    _vanishing_image(case)


# ------------------------------------------------------------ the n-th write


class _Quota:
    """Counts what is written through it, and has no space from one write on."""

    def __init__(self, allowed: int) -> None:
        self.allowed, self.done = allowed, 0

    def spend(self) -> None:
        self.done += 1
        if self.done > self.allowed:
            raise OSError(errno.ENOSPC, "No space left on device")


class _File:
    """A file under a quota; everything else is the file's own."""

    def __init__(self, file: Any, quota: _Quota) -> None:
        self._file, self._quota = file, quota

    def write(self, data: Any) -> int:
        self._quota.spend()
        return self._file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *args: Any) -> None:
        self._file.close()


def _run(folder: Path, allowed: int, resume: bool) -> dict[str, Any]:
    """A whole run of the stand-in model, with room for so many writes; how it ended."""
    from gn_det import files
    from gn_det.engine import loggers
    from gn_det.errors import UserError
    from tests.engine.cases import run

    quota = _Quota(allowed)

    def limited(path: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        file = open(path, mode, *args, **kwargs)  # noqa: SIM115
        return _File(file, quota) if set(mode) & set("wa") else file

    appended = loggers.open_log
    files.open = limited  # type: ignore[attr-defined]
    loggers.open_log = lambda path: _File(appended(path), quota)  # type: ignore[assignment,misc,return-value]
    pairs = [k if i % 2 == 0 else int(k) for i, k in enumerate(KEYS)] + ["TEST.BEST_METRIC", "bbox/AP"]
    told = ""
    try:
        run(folder, pairs, max_iter=24, evaluate=_evaluate, resume=resume)
    except UserError as error:
        told = str(error)
    return {"told": told, "writes": quota.done, "left": [f.name for f in folder.glob(".*")]}


def _evaluate(model: Any, on_progress: Any) -> dict[str, float]:
    return {"bbox/AP": float(sum(p.detach().sum() for p in model.parameters()))}


def _nth_write(case: Case) -> None:
    import gn_det.engine.detector_loop  # noqa: F401
    import tests.engine.cases  # noqa: F401  # once, for all forks

    whole = case.folder / "whole"
    writes = in_fork(partial(_run, whole, 10**9, False))["writes"]
    expected = outcome(whole)
    wanted = min(case.count(160, 6), writes)
    chosen = sorted({round(i * (writes - 1) / max(wanted - 1, 1)) for i in range(wanted)})
    where: Counter[str] = Counter()
    for allowed in chosen:
        folder = case.folder / "full"
        shutil.rmtree(folder, ignore_errors=True)
        found = in_fork(partial(_run, folder, allowed, False))
        case.require(isinstance(found, dict), f"disk full at write {allowed + 1}: {found}")
        told = found["told"]
        case.require(
            "No space left" in told and "--resume" in told and "\n" not in told,
            f"disk full at write {allowed + 1} is told as {told!r}",
        )
        case.require(not found["left"], f"disk full at write {allowed + 1} leaves {found['left']}")
        where["metrics.json" if "metrics" in told else "model_best" if "model_best" in told else "a checkpoint"] += 1
        begun = any(folder.glob("model_*.pth"))
        if not begun:  # nothing to go on from: the command line would move the files of the old run aside
            shutil.rmtree(folder)
        again = in_fork(partial(_run, folder, 10**9, begun))
        case.require(isinstance(again, dict) and not again["told"], f"resumed after write {allowed + 1}: {again}")
        differ = differences(expected, outcome(folder))
        case.require(not differ, f"disk full at write {allowed + 1}, resumed: {differ[:3]}")
    case.say(f"disk full at the n-th of {writes} writes, n tried", len(chosen))
    for what, count in sorted(where.items()):
        case.say(f"  while writing {what}", count)
    case.say("  told in one line, nothing left behind, resumed to the bit", len(chosen))


# ------------------------------------------------------------ a real file system


def _small_file_system(case: Case) -> None:
    """64 MiB, where the second checkpoint beside model_best.pth does not fit; then read-only; then enough."""
    place = case.folder / "tmpfs"
    place.mkdir()
    log = case.output / "disk.log"
    log.write_bytes(b"")
    mount = ["mount", "-t", "tmpfs", "-o", "size=56m", "tmpfs", str(place)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        case.say("small tmpfs, read-only output", "not run: mounting is not allowed here")
        return
    try:
        words = train_words(case.folder / "shapes", place / "run", *KEYS)
        case.require(finish(train_words(case.folder / "shapes", case.folder / "roomy", *KEYS), log)[0] == 0, "the run")
        before = log.stat().st_size
        code, _ = finish(words, log)
        told = log.read_bytes()[before:].decode().strip().splitlines()[-1]
        case.require(code == 2 and "No space left on device" in told and "--resume" in told, f"{code}: {told}")
        case.say("real tmpfs of 56 MiB fills up", "exit code 2, one line")
        _remount(place, "ro")
        before = log.stat().st_size
        code, _ = finish([*words[:1], "--resume", *words[1:]], log)
        told = log.read_bytes()[before:].decode().strip().splitlines()
        case.require(code == 2 and len(told) == 1 and "Read-only file system" in told[0], f"{code}: {told[-1:]}")
        case.say("read-only OUTPUT_DIR", "exit code 2, one line")
        _remount(place, "rw,size=400m")
        code, _ = finish([*words[:1], "--resume", *words[1:]], log)
        differ = differences(outcome(case.folder / "roomy"), outcome(place / "run"))
        case.require(code == 0 and not differ, f"resumed on the larger disk: {code}, {differ[:3]}")
        case.say("resumed with space again", "equal to the last bit")
    finally:
        subprocess.run(["umount", "-l", str(place)], check=False)


def _remount(place: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(place)], check=True, capture_output=True)


# ------------------------------------------------------------ images that vanish


def _vanishing_image(case: Case) -> None:
    log = case.output / "vanished.log"
    for allowed, expected in (("3", 0), ("0", 2)):
        shapes = case.folder / f"shapes{allowed}"
        output = case.folder / f"run{allowed}"
        words = train_words(
            shapes, output, *KEYS, "SOLVER.MAX_ITER", "60", "DATALOADER.NUM_WORKERS", "2", "DATALOADER.MAX_BAD", allowed
        )
        log.write_bytes(b"")
        process = start(words, log)
        end = time.monotonic() + 120
        while not list(output.glob("model_00*.pth")) and process.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        for name in ("000003.jpg", "000007.jpg"):
            os.unlink(shapes / "train" / "images" / name)
        code = process.wait(timeout=300)
        text = log.read_text()
        case.require(code == expected and "Traceback" not in text, f"images removed, MAX_BAD {allowed}: code {code}")
        case.require("image not found" in text and "00000" in text, f"images removed, MAX_BAD {allowed}: not named")
        what = "named, others take their place" if code == 0 else "named, the run ends in one line"
        case.say(f"2 images removed while training, MAX_BAD {allowed}", what)
