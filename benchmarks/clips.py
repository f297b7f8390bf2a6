"""I3D on a CPU: a step's time per FLOP against torchvision's r3d_18, memory by length, and the wait for data.

    python benchmarks/clips.py --repeats 5

All networks take turns in one process, one thread; FLOPs are those of a step by torch's counter. Writes
benchmarks/results/clips.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from gn_det.classification import Settings, pretrain
from gn_det.classification.network import build_classifier
from gn_det.engine.loop import Loop
from gn_det.files import atomic_write, json_bytes

RESULTS = Path(__file__).parent / "results" / "clips.json"
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last_3d": torch.channels_last_3d}


def network(name: str) -> nn.Module:
    """``r3d_18``, or such as ``i3d_r50 GN``, with 400 classes."""
    torch.manual_seed(0)
    if name == "r3d_18":
        return torchvision.models.video.r3d_18(num_classes=400)
    arch, norm = name.split()
    return build_classifier(Settings(arch=arch, norm=norm, data="motions", output="-"), 400)


def step(model: nn.Module, clip: Tensor) -> None:
    """Forward and backward."""
    model.zero_grad()
    model(clip).square().mean().backward()


def speed(side: int, batch: int, repeats: int) -> list[dict[str, Any]]:
    """CPU and wall seconds per GFLOP of every network, and their ratios to r3d_18 in its faster layout."""
    cases = []
    for name in ("r3d_18", "i3d_r18 GN", "i3d_r18 BN", "i3d_r50 GN", "i3d_r50 BN"):
        for layout, form in LAYOUTS.items():
            model = network(name).to(memory_format=form)
            frames = 16 if name == "r3d_18" else 32  # what each is made for
            clip = torch.randn(batch, 3, frames, side, side).to(memory_format=form)
            with FlopCounterMode(display=False) as counter:
                step(model, clip)
            cases.append((name, layout, model, clip, counter.get_total_flops() / 1e9))
    rounds: list[list[tuple[float, float]]] = []
    for _ in range(repeats):
        taken = []
        for _, _, model, clip, flops in cases:
            cpu, wall = time.process_time(), time.perf_counter()
            step(model, clip)
            taken.append(((time.process_time() - cpu) / flops, (time.perf_counter() - wall) / flops))
        rounds.append(taken)
    base = min(range(len(LAYOUTS)), key=lambda i: statistics.median(taken[i][0] for taken in rounds))
    found = []
    for i, (name, layout, _, _, flops) in enumerate(cases):
        ratios = [[taken[i][k] / taken[base][k] for taken in rounds] for k in (0, 1)]
        found.append(
            {
                "network": name,
                "layout": layout,
                "gflop": round(flops, 1),
                "gflop_per_cpu_second": 1 / statistics.median(taken[i][0] for taken in rounds),
                "cpu_per_flop_to_r3d_18": {"median": statistics.median(ratios[0]), "all": ratios[0]},
                "wall_per_flop_to_r3d_18": {"median": statistics.median(ratios[1]), "all": ratios[1]},
            }
        )
        print({k: v["median"] if isinstance(v, dict) else v for k, v in found[-1].items()}, flush=True)
    return found


def memory(norm: str, side: int) -> dict[str, float]:
    """Peak of a step's tensors in MiB, gradients included and parameters not, for one clip of 32 and of 64 frames.

    Counted from the allocator: the memory of the process also has what earlier steps freed, which later ones use.
    """
    model, found = network(f"i3d_r50 {norm}"), {}
    for frames in (32, 64):
        with tempfile.TemporaryDirectory() as folder:
            trace = Path(folder) / "trace.json"
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
                step(model, torch.randn(1, 3, frames, side, side))
            profiler.export_chrome_trace(str(trace))
            events = json.loads(trace.read_text())["traceEvents"]
        memory = [e["args"] for e in sorted(events, key=lambda e: e.get("ts", 0)) if e["name"] == "[memory]"]
        before = memory[0]["Total Allocated"] - memory[0]["Bytes"]
        found[str(frames)] = (max(event["Total Allocated"] for event in memory) - before) / 2**20
        model.zero_grad()
    return found | {"ratio": found["64"] / found["32"]}


def waiting(workers: int) -> dict[str, float]:
    """Share of the training on motions that waits for data, after the workers' start."""
    waits: list[tuple[float, float]] = []
    original = Loop.step

    def timed(self: Loop) -> None:
        start = time.perf_counter()
        original(self)
        waits.append((self.data_time, time.perf_counter() - start))

    Loop.step = timed  # type: ignore[method-assign]
    try:
        with tempfile.TemporaryDirectory() as folder:
            settings = Settings(
                arch="i3d_r18", norm="GN", data="motions", output=folder, images=320, frames=8, frame_stride=4,
                batch_size=8, epochs=1, workers=workers, test_clips=1, test_crops=1, device="cpu",
            )  # fmt: skip
            pretrain(settings)
    finally:
        Loop.step = original  # type: ignore[method-assign]
    rest = waits[2:]
    return {"workers": workers, "waiting": sum(w for w, _ in rest) / sum(s for _, s in rest), "steps": len(rest)}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--side", type=int, default=112)
    parser.add_argument("--batch", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = {
        "waiting": waiting(2),
        "memory_mib": {norm: memory(norm, args.side) for norm in ("GN", "BN")},
        "speed": speed(args.side, args.batch, args.repeats),
        "side": args.side,
        "batch": args.batch,
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg()[0],
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    print(json.dumps({k: found[k] for k in ("waiting", "memory_mib")}))
    atomic_write(RESULTS, json_bytes(found, indent=1) + b"\n")


if __name__ == "__main__":
    main()
