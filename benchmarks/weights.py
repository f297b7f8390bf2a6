"""Loading R-50-FPN GN weights into the model: time and memory against the file itself.

    python benchmarks/weights.py              # four containers, 7 repeats
    python benchmarks/weights.py --repeats 3
    python benchmarks/weights.py --against ../other   # this checkout against another one, nothing is written

*Time*: ``load_weights`` (read, recognize, check every tensor, copy) against reading the same file's tensors into memory
with its own library (torch.load, pickle.load, safetensors); the two take turns in one process, the file is in the page
cache. *Memory*: the peak of a process of its own, from before the model is built to after it is loaded, so the model
itself counts once; mapped pages of the file count too. Random weights. Writes benchmarks/results/weights.json.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import importlib.metadata
import json
import os
import pickle
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

TARGETS = {"time": 1.5, "memory": 2.2}
RESULTS = Path(__file__).parent / "results" / "weights.json"
FILES = {
    "ours .pth": "ours.pth",
    "ours .safetensors": "ours.safetensors",
    "Detectron2 zoo .pkl": "zoo.pkl",
    "Caffe2 detector .pkl": "caffe2.pkl",
}


def make_files(folder: Path) -> None:
    """The same random R-50-FPN GN detector in four containers."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from gn_det.checkpoint.convert import convert
    from tests.checkpoint import layouts

    shapes = layouts.real_shapes("gn_fpn.yaml")
    blobs = layouts.arrays(layouts.caffe2_detector(), shapes)
    arrays = {ours: blobs[theirs] for theirs, ours in layouts.caffe2_detector()}
    layouts.background_first(blobs, "bbox_pred_", "mask_fcn_logits_", ("w", "b"))
    # Python 2 wrote the real ones: array contents are byte strings. Protocol 4 is the nearest that Python 3 writes.
    cfg = "PIXEL_MEANS:\n- - - 103.53\n    - 116.28\n    - 123.675\n"
    (folder / FILES["Caffe2 detector .pkl"]).write_bytes(pickle.dumps({"blobs": blobs, "cfg": cfg}, 4))
    zoo = {"model": arrays, "__author__": "Detectron2 Model Zoo"}
    (folder / FILES["Detectron2 zoo .pkl"]).write_bytes(pickle.dumps(zoo, 4))
    for name in ("ours .pth", "ours .safetensors"):
        convert(folder / FILES["Detectron2 zoo .pkl"], folder / FILES[name])


def plain_reader(path: Path) -> Callable[[], Any]:
    """Read all tensors of a file into memory with the library that made it."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load

        return lambda: load(path.read_bytes())
    if path.suffix == ".pkl":

        def read() -> Any:
            with open(path, "rb") as file:
                return pickle.load(file)

        return read
    import torch

    return lambda: torch.load(path, weights_only=True)


def build() -> tuple[Any, Any]:
    from gn_det.config import load_config
    from gn_det.modeling.build import build_model

    cfg = load_config("gn_fpn.yaml", ["MODEL.ROI_HEADS.NUM_CLASSES", "80", "MODEL.DEVICE", "cpu"])
    return build_model(cfg), cfg


def child_time(path: Path, repeats: int) -> dict[str, list[float]]:
    """Seconds of both, in turns."""
    from gn_det.checkpoint.weights import load_weights

    model, cfg = build()
    plain = plain_reader(path)
    seconds: dict[str, list[float]] = {"plain": [], "gn_det": []}
    for number in range(repeats + 1):
        for name, call in (("plain", plain), ("gn_det", lambda: load_weights(model, path, cfg, require_all=True))):
            gc.collect()
            start = time.perf_counter()
            result = call()
            elapsed = time.perf_counter() - start
            del result
            if number:  # the first of each warms caches and imports
                seconds[name].append(elapsed)
    return seconds


def child_against(other: Path, path: Path, repeats: int) -> dict[str, list[tuple[float, float]]]:
    """(wall, CPU) seconds of ``load_weights`` of two checkouts, in turns in one process."""
    calls, paths = {}, list(sys.path)
    for name, folder in (("other", other.resolve()), ("this", Path(__file__).resolve().parents[1])):
        for module in [m for m in sys.modules if m.split(".")[0] == "gn_det"]:
            del sys.modules[module]
        sys.path[:] = [str(folder), *paths]
        import gn_det.checkpoint.weights

        assert Path(gn_det.__file__).is_relative_to(folder), gn_det.__file__
        model, cfg = build()
        calls[name] = partial(gn_det.checkpoint.weights.load_weights, model, path, cfg, require_all=True)
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in calls}
    for number in range(repeats + 1):
        for name in sorted(calls, reverse=bool(number % 2)):
            gc.collect()
            wall, cpu = time.perf_counter(), time.process_time()
            calls[name]()
            if number:
                seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return seconds


def compare(other: Path, repeats: int) -> None:
    """Print the ratios of this checkout to another one."""
    with tempfile.TemporaryDirectory() as name:
        make_files(Path(name))
        for title, file in FILES.items():
            found = run_child(str(other), Path(name) / file, repeats)
            for index, what in enumerate(("wall", "CPU")):
                this, before = ([times[index] for times in found[who]] for who in ("this", "other"))
                ratios = [a / b for a, b in zip(this, before)]
                print(
                    f"{title:22s} {what:4s} {statistics.median(this):.3f} s against {statistics.median(before):.3f} s, "
                    f"median ratio {statistics.median(ratios):.3f} (each {min(ratios):.2f} to {max(ratios):.2f})"
                )


def child_memory(path: Path) -> dict[str, int]:
    """Peak growth in bytes, from before the model to after loading."""
    import gn_det.checkpoint.weights
    import gn_det.modeling.build

    plain_reader(path)  # imports what it needs; those are not the weights' memory
    before = _resident()
    model, cfg = build()
    built = _peak()
    gn_det.checkpoint.weights.load_weights(model, path, cfg, require_all=True)
    return {"peak": _peak() - before, "model": built - before}


def _peak() -> int:
    """VmHWM: getrusage's maximum is inherited from the parent, which made the files."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def run_child(what: str, path: Path, repeats: int) -> Any:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, "--child", what, str(path), "--repeats", str(repeats)]
    result = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return json.loads(result.stdout.splitlines()[-1])


def measure(repeats: int) -> dict[str, Any]:
    rows = {}
    with tempfile.TemporaryDirectory() as name:
        make_files(Path(name))
        for title, file in FILES.items():
            path = Path(name) / file
            seconds = run_child("time", path, repeats)
            memory = run_child("memory", path, repeats)
            size = path.stat().st_size
            ratios = [ours / plain for ours, plain in zip(seconds["gn_det"], seconds["plain"])]
            rows[title] = {
                "file_bytes": size,
                "seconds": seconds,
                "time_ratio": statistics.median(seconds["gn_det"]) / statistics.median(seconds["plain"]),
                "time_ratio_each": ratios,
                "peak_bytes": memory["peak"],
                "model_bytes": memory["model"],
                "memory_ratio": memory["peak"] / size,
            }
            row = rows[title]
            print(
                f"{title:22s} {size / 1e6:.0f} MB: {statistics.median(seconds['gn_det']):.3f} s against "
                f"{statistics.median(seconds['plain']):.3f} s, {row['time_ratio']:.2f}x (each {min(ratios):.2f} to "
                f"{max(ratios):.2f}); peak {memory['peak'] / 1e6:.0f} MB, {row['memory_ratio']:.2f}x the file"
            )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--against", type=Path, metavar="FOLDER", help="another checkout, to be measured beside this one"
    )
    parser.add_argument("--child", nargs=2, metavar=("WHAT", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        what, path = args.child[0], Path(args.child[1])
        if what in ("time", "memory"):
            print(json.dumps(child_time(path, args.repeats) if what == "time" else child_memory(path)))
        else:
            print(json.dumps(child_against(Path(what), path, args.repeats)))
        return 0
    if args.against:
        compare(args.against.resolve(), args.repeats)
        return 0
    rows = measure(args.repeats)
    met = {
        "time": all(row["time_ratio"] <= TARGETS["time"] for row in rows.values()),
        "memory": all(row["memory_ratio"] <= TARGETS["memory"] for row in rows.values()),
    }
    report = {
        "what": "load_weights of an R-50-FPN GN detector, against reading the file's tensors with its own library",
        "date": datetime.date.today().isoformat(),
        "device": f"{platform.machine()}, {os.cpu_count()} cores (shared with other work), 1 thread",
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in ("torch", "safetensors", "numpy")},
        "repeats": args.repeats,
        "targets": TARGETS,
        "met": met,
        "files": rows,
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(report, indent=2) + "\n")
    print(f"targets {TARGETS}: {met}; written to {RESULTS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
