"""How cost grows: CPU time and peak memory of load, check, step, predict and evaluation against the size of the work.

Every measurement is a process of its own, which prints the CPU time of the work and how far its peak memory rose. One
size is varied at a time; the slope is that of a straight line through the points. Times are of one thread.

    python benchmarks/growth.py                # writes benchmarks/results/growth.json
    python benchmarks/growth.py --only load,check
    python benchmarks/growth.py --quick        # tiny: checks that it runs
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

RESULTS = Path(__file__).parent / "results" / "growth.json"
#: part -> size -> values; the other sizes stay at BASE.
BASE = {"images": 500, "objects": 8, "classes": 20, "side": 320, "workers": 0, "processes": 1}
VARIED: dict[str, dict[str, tuple[int, ...]]] = {
    "load": {"images": (1000, 4000, 16000), "objects": (4, 16, 64), "classes": (10, 100, 1000)},
    "check": {"images": (1000, 4000, 16000), "objects": (4, 16, 64)},
    "step": {"objects": (2, 8, 32), "classes": (10, 100, 1000), "side": (160, 320, 640)},
    "predict": {"side": (160, 320, 640), "classes": (10, 100, 1000)},
    "evaluation": {"images": (100, 200, 400), "objects": (4, 8, 16), "classes": (10, 40, 160)},
    "run": {"workers": (0, 1, 2), "processes": (1, 2)},
}
QUICK = {"images": (20, 40), "objects": (2, 4), "classes": (2, 4), "side": (64, 96), "workers": (0, 1)}
_MODEL = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", ""]


def dataset(folder: Path, size: dict[str, int], *, files: bool = False) -> dict[str, Any]:
    """COCO content with polygons of 24 points in images of 640x480; with ``files``, each has a file (one, linked)."""
    from coco_eval import blob, random_box

    rng = np.random.default_rng(0)
    shapes = [(box, blob(rng, box)) for box in (random_box(rng, 480, 640) for _ in range(200))]
    content: dict[str, Any] = {
        "images": [{"id": i, "file_name": f"{i}.png", "height": 480, "width": 640} for i in range(size["images"])],
        "categories": [{"id": k + 1, "name": f"class {k}"} for k in range(size["classes"])],
        "annotations": [],
    }
    for number in range(size["images"] * size["objects"]):
        box, polygon = shapes[int(rng.integers(len(shapes)))]
        row: dict[str, Any] = {"id": number + 1, "image_id": number // size["objects"]}
        row |= {
            "category_id": number % size["classes"] + 1,
            "bbox": box.tolist(),
            "area": float(box[2] * box[3] / 2),
            "segmentation": [polygon],
            "iscrowd": 0,
        }
        content["annotations"].append(row)
    if files:
        from PIL import Image

        Image.fromarray(rng.integers(0, 256, (480, 640, 3), dtype=np.uint8)).save(folder / "0.png")
        for i in range(1, size["images"]):
            os.link(folder / "0.png", folder / f"{i}.png")
    (folder / "data.json").write_text(json.dumps(content))
    return content


def data_keys(folder: Path) -> list[str]:
    paths = {"JSON": folder / "data.json", "IMAGES": folder}
    return [w for split in ("TRAIN", "VAL") for k, v in paths.items() for w in (f"DATASETS.{split}_{k}", str(v))]


def prepare_load(folder: Path, size: dict[str, int]) -> Callable[[], Any]:
    from gn_det.config import load_config
    from gn_det.data.sets import load_run_data

    dataset(folder, size, files=True)
    cfg = load_config("quickstart.yaml", [*_MODEL, *data_keys(folder), "DATASETS.TEST", "()"])
    cfg.DATASETS.VAL_JSON = cfg.DATASETS.VAL_IMAGES = ""
    return lambda: load_run_data(cfg)


def prepare_check(folder: Path, size: dict[str, int]) -> Callable[[], Any]:
    from gn_det.cli import main as command

    dataset(folder, size, files=True)
    return lambda: command(["check", "--train-json", str(folder / "data.json"), "--train-images", str(folder)])


def prepare_step(folder: Path, size: dict[str, int]) -> Callable[[], Any]:
    from engine import load_cfg, make_steps

    cfg = load_cfg("quickstart.yaml", ["MODEL.ROI_HEADS.NUM_CLASSES", str(size["classes"])])
    side = (size["side"], size["side"])
    step = make_steps("embedded", cfg, side, 2, objects=size["objects"])["training step"]
    step()
    return step


def prepare_predict(folder: Path, size: dict[str, int]) -> Callable[[], Any]:
    from engine import load_cfg, make_steps

    cfg = load_cfg("quickstart.yaml", ["MODEL.ROI_HEADS.NUM_CLASSES", str(size["classes"])])
    infer = make_steps("embedded", cfg, (size["side"], size["side"]), 1)["inference"]
    infer()
    return infer


def prepare_evaluation(folder: Path, size: dict[str, int]) -> Callable[[], Any]:
    from pycocotools import mask as coco_mask

    from gn_det.evaluation.coco_eval import evaluate_coco

    content = dataset(folder, size)
    rng = np.random.default_rng(1)
    results = []
    for row in content["annotations"]:
        rle = coco_mask.frPyObjects(row["segmentation"], 480, 640)[0]
        rle["counts"] = rle["counts"].decode()
        box = (np.array(row["bbox"]) + rng.normal(0, 4, 4)).clip(1).tolist()
        results.append({k: row[k] for k in ("image_id", "category_id")} | {"bbox": box, "segmentation": rle})
        results[-1]["score"] = float(rng.random())
    names = [c["name"] for c in content["categories"]]
    return lambda: evaluate_coco(content, results, names, [c["id"] for c in content["categories"]])


def prepare_run(folder: Path, size: dict[str, int]) -> Callable[[], Any]:
    """Eight iterations of training with its workers and processes."""
    dataset(folder, size | {"images": min(size["images"], 64)}, files=True)
    keys = [*_MODEL, *data_keys(folder), "SOLVER.MAX_ITER", "8", "TEST.EVAL_PERIOD", "0", "SOLVER.IMS_PER_BATCH", "4"]
    keys += ["DATALOADER.NUM_WORKERS", str(size["workers"]), "DATASETS.VAL_JSON", "", "DATASETS.VAL_IMAGES", ""]
    command = [sys.executable, "-m", "gn_det", "train", "--engine", "embedded", "--config", "quickstart.yaml"]
    command += ["--output", str(folder / "out"), "--num-gpus", str(size["processes"]), "DATASETS.TEST", "()", *keys]
    return lambda: subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def family_mb() -> float:
    """Memory of this process's descendants; shared pages are divided among those that share them."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
    family, total = {os.getpid()}, 0.0
    for pid in sorted(parents):
        if parents[pid] in family:
            family.add(pid)
            with contextlib.suppress(OSError, IndexError):
                text = Path(f"/proc/{pid}/smaps_rollup").read_text()
                total += int(text.split("\nPss:")[1].split()[0]) / 1024
    return total


def measure_here(part: str, size: dict[str, int]) -> dict[str, float]:
    """Do the work of a part in this process."""
    import torch
    from engine import own_peak_mb

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):
        work = globals()[f"prepare_{part}"](Path(name), size)
        if part == "run":
            return _measure_family(work)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
        before, start = own_peak_mb(), time.process_time()
        work()
        return {"cpu_s": time.process_time() - start, "memory_mb": own_peak_mb() - before}


def _measure_family(work: Callable[[], Any]) -> dict[str, float]:
    import threading

    peak, done = [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(0.3):
            peak[0] = max(peak[0], family_mb())

    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    done.set()
    watcher.join()
    spent = os.times()
    return {"cpu_s": spent.children_user + spent.children_system, "memory_mb": peak[0]}


def series(only: list[str], quick: bool) -> Iterator[dict[str, Any]]:
    """One row for each part and size that is varied."""
    for part, sizes in VARIED.items():
        for varied, values in sizes.items():
            if only and part not in only:
                continue
            values = QUICK.get(varied, values) if quick else values
            points = []
            for value in values:
                size = BASE | ({"images": 8, "objects": 2, "side": 64} if quick else {}) | {varied: value}
                command = [sys.executable, __file__, "--part", part, "--size", json.dumps(size)]
                environment = os.environ | {"OMP_NUM_THREADS": "1"}
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
                points.append({"value": value, **json.loads(done.stdout.strip().splitlines()[-1])})
            x = np.array([p["value"] for p in points], dtype=float)
            slopes = {k: float(np.polyfit(x, [p[k] for p in points], 1)[0]) for k in ("cpu_s", "memory_mb")}
            yield {"part": part, "against": varied, "points": points, "slope": slopes}


def main(argv: list[str] | None = None) -> int:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", default="", help=f"parts: {', '.join(VARIED)}")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--part", choices=VARIED, help=argparse.SUPPRESS)
    parser.add_argument("--size", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.part:
        print(json.dumps(measure_here(args.part, json.loads(args.size))))
        return 0
    from engine import environment

    result: dict[str, Any] = {"environment": environment(), "quick": args.quick, "base": BASE, "rows": []}
    for row in series(list(filter(None, args.only.split(","))), args.quick):
        result["rows"].append(row)
        points = "; ".join(f"{p['value']}: {p['cpu_s']:.2f} s, {p['memory_mb']:.0f} MB" for p in row["points"])
        slope = row["slope"]
        print(
            f"{row['part']} against {row['against']}: {points}; slope {slope['cpu_s']:.3g} s, "
            f"{slope['memory_mb']:.3g} MB each",
            flush=True,
        )
        args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
