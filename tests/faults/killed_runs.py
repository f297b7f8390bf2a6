"""A small run that is killed with SIGKILL again and again and resumed, beside the same run left alone.

Run as a program: ``killed_runs.py FOLDER ENGINE WORKERS KILLS SEED``, where WORKERS such as 0,2 go round among the
attempts; prints one JSON object. Everything is imported
once and each attempt is a fork, which costs milliseconds.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

ITERATIONS = 46


def train(folder: Path, *args: Any, resume: bool) -> None:
    """A run that has the folder to itself; workers of the one that was just killed may live still, and hold nothing."""
    from gn_det.engine import output

    output.PATIENCE = 0.0
    folder.mkdir(parents=True, exist_ok=True)
    with output.alone_in(folder):
        train_alone(folder, *args, resume=resume)


def train_alone(folder: Path, engine: Any, data: Any, workers: int, *, resume: bool) -> None:
    """The stand-in detector on real batches of shapes; evaluations, checkpoints and metrics as in any run."""
    import torch

    from gn_det.checkpoint.last import remove_leftovers
    from gn_det.data.loader import build_train_loader
    from gn_det.engine.detector_loop import fit
    from gn_det.engine.state import ModelMeta, find_resume, seed_everything
    from tests.engine.cases import Tiny, tiny_cfg

    class SeesAll(Tiny):
        """Images of any size, and boxes: so that the data stream's every bit takes part."""

        def forward(self, samples: list[Any]) -> Any:
            images = [torch.nn.functional.adaptive_avg_pool2d(s["image"].float(), 6) for s in samples]
            return super().forward([{"image": image} for image in images])

    cfg = tiny_cfg(folder, ["TEST.EVAL_PERIOD", 10, "SOLVER.CHECKPOINT_PERIOD", 3, "SOLVER.CHECKPOINT_KEEP", 3])
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.TEST.BEST_METRIC = ITERATIONS, (30,), "bbox/AP"
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.MODEL.MASK_ON = (20, 30), True
    cfg.INPUT.CROP.ENABLED = True
    remove_leftovers(folder)
    point = find_resume(folder) if resume else None
    seed_everything(random.randrange(10**6) if point else 7)  # on resume, whatever happened before must not matter

    def evaluate(model: Any, on_progress: Any) -> dict[str, float]:
        torch.rand(3)
        return {"bbox/AP": sum(float(p.detach().sum()) for p in model.parameters())}

    def make_loader(start: int, seed: int) -> Any:
        return build_train_loader(cfg, [data], images_per_rank=4, seed=seed, start_batch=start, num_workers=workers)

    meta = ModelMeta(cfg, ("thing",), (1,))
    fit(
        engine, cfg, model=SeesAll(), make_loader=make_loader, meta=meta, seed=5, evaluate=evaluate, resume=point,
    )  # fmt: skip


def die_at(event: int) -> None:
    """SIGKILL at the ``event``-th thing that this process does to files: each write, sync, rename and deletion."""
    from gn_det import files
    from gn_det.checkpoint import last
    from gn_det.engine import hooks, loggers

    done = 0

    def deadly(function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            nonlocal done
            done += 1
            if done == event:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapped

    files._ErrorKeeper.write = deadly(files._ErrorKeeper.write)  # type: ignore[method-assign]
    files.os.fsync, files.os.replace = deadly(os.fsync), deadly(os.replace)  # type: ignore[attr-defined]
    last.prune = hooks.prune = deadly(last.prune)  # type: ignore[attr-defined]
    loggers.JsonLogger.flush = deadly(loggers.JsonLogger.flush)  # type: ignore[method-assign]


def die_and_train(event: int, *args: Any) -> None:
    die_at(event)
    train(*args, resume=True)


def attempt(call: Callable[[], None], seconds: float | None = None) -> bool:
    """``call`` in a fork, killed after ``seconds`` if it is not done by then; whether it came to its end."""
    process = os.fork()
    if process == 0:
        code = 1
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            call()
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(process, signal.SIGKILL)
    status = os.waitpid(process, 0)[1]
    if not os.WIFSIGNALED(status) and os.WEXITSTATUS(status):
        sys.exit("a run failed by itself")
    return not os.WIFSIGNALED(status)


def outcome(folder: Path) -> dict[str, Any]:
    """All that must be equal, and the names of folders, too."""
    from tests.faults.soak_case import outcome as values

    return {**values(folder), "files": sorted(f.name for f in folder.iterdir() if "tfevents" not in f.name)}


def main(folder: Path, name: str, workers: list[int], kills: int, seed: int) -> None:
    sys.path.insert(0, str(Path(__file__).parents[2]))
    import torch
    import torch.utils.tensorboard

    import tests.engine.cases  # noqa: F401
    from gn_det.data.coco import load_coco
    from gn_det.data.shapes import make_shapes
    from gn_det.engine import choice as engines

    torch.set_num_threads(1)
    engine = engines.load(engines.Choice(name, ""))
    import gn_det.engine.detector_loop  # noqa: F401

    data = load_coco(make_shapes(folder / "shapes", "train", 14), max_bad=0)
    whole, cut = folder / "whole", folder / "cut"
    started = time.perf_counter()
    assert attempt(partial(train, whole, engine, data, workers[0], resume=False))
    length = time.perf_counter() - started
    rng, survived = random.Random(seed), 0
    while survived < kills:
        now = workers[survived % len(workers)]
        event = rng.randrange(1, 60)
        if survived % 2:
            ended = attempt(partial(die_and_train, event, cut, engine, data, now))
        else:
            ended = attempt(partial(train, cut, engine, data, now, resume=True), rng.uniform(0, length))
        if ended:
            for file in cut.iterdir():
                file.unlink()  # the run came to its end: start over
        survived += not ended
    assert attempt(partial(train, cut, engine, data, workers[-1], resume=True))
    a, b = outcome(whole), outcome(cut)
    report = {"kills": survived, "seconds": time.perf_counter() - started, "lines": len(a["metrics"])}
    report["differ"] = [key for key in a if a[key] != b[key]]
    report["metrics"] = [a["metrics"], b["metrics"]] if "metrics" in report["differ"] else []
    report["files"] = [a["files"], b["files"]]
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], [int(n) for n in sys.argv[3].split(",")], int(sys.argv[4]), int(sys.argv[5]))
