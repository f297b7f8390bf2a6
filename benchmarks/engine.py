"""gn_det against Detectron2's own modules: same config, weights and images, interleaved in one process on the CPU.

What is measured is the embedded engine, or with ``--ours registered`` Detectron2's own model class on the modules that
gn_det registers (the YAML read after ``add_gn_config``, against the same YAML without it), or with ``--ours ws`` the
embedded engine with Weight Standardization in every part, against itself without. Prints the ratio of times (gn_det /
Detectron2; below 1 gn_det is faster) for inference and for a training step, with its spread over pairs, and the peak
memory of each in a process of its own.

    python benchmarks/engine.py --config gn_fpn.yaml --repeats 15 --image-size 480x640
    python benchmarks/engine.py --threads 1 --amp --channels-last      # ours in bf16, Detectron2 in fp32
    python benchmarks/engine.py --ours registered --config gn_fpn.yaml --repeats 15 --image-size 480x640
    python benchmarks/engine.py --config gn_cascade_scratch_9x.yaml
    python benchmarks/engine.py --ours ws    # GN + WS against GN; without Detectron2
    python benchmarks/engine.py --quick
    python benchmarks/engine.py --predict    # Model.predict against the model alone; without Detectron2
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gn_det.compiler import cpu_features
from gn_det.config.schema import WS_SECTIONS
from gn_det.engine.heap import keep_freed_memory
from gn_det.engine.precision import BF16_FEATURES, lay_out_for_inference

#: Largest ratios, by (bf16, channels_last); those of bf16 are for CPUs with AMX.
TARGETS = {
    (False, False): {"inference": 1.0, "training step": 1.0},
    (False, True): {"inference": 1.0, "training step": 0.93},
    (True, True): {"inference": 0.28, "training step": 0.33},
}
#: What is measured, and the beginning of its result files' names: the first two against "detectron2", "ws" against
#: "embedded".
OURS = {"embedded": "engine", "registered": "plugin", "ws": "ws"}
#: Largest ratios with Weight Standardization; it is folded into the weights for inference.
WS_TARGETS = {"inference": 1.0, "training step": 1.05}
RESULTS = Path(__file__).parent / "results"


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", default="gn_fpn.yaml", help="shipped name or path")
    parser.add_argument(
        "--ours", choices=OURS, default="embedded", help="the embedded engine, the plugin's modules, or WS"
    )
    parser.add_argument("--repeats", type=int, default=15, help="pairs measured, after one that is not")
    parser.add_argument("--image-size", default="480x640", help="HEIGHTxWIDTH of the network input")
    parser.add_argument("--batch", type=int, default=2, help="images per training step; inference takes 1")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 keeps torch's choice")
    parser.add_argument("--predict", action="store_true", help="Model.predict on an array, against the model alone")
    parser.add_argument("--amp", action="store_true", help="ours under bf16 autocast; Detectron2 stays in fp32")
    parser.add_argument("--channels-last", action="store_true", help="ours in channels_last; Detectron2 in NCHW")
    parser.add_argument("--quick", action="store_true", help="small images, few RoIs, 3 pairs: checks that it runs")
    parser.add_argument("--only-inference", action="store_true", help="no training step and no memory")
    parser.add_argument("--only-training", action="store_true", help="no inference and no memory")
    where = "benchmarks/results/{engine,plugin,ws}_<config>_<size>[_bf16][_last][_inference|_training].json"
    parser.add_argument("--output", default="", help=f"json file; default {where}")
    parser.add_argument("overrides", nargs="*", help="KEY VALUE pairs, such as MODEL.RPN.POST_NMS_TOPK_TEST 200")
    parser.add_argument("--memory-of", choices=(*OURS, "detectron2"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.quick:
        args.repeats, args.image_size, args.batch = 3, "160x224", 1
        args.overrides += ["MODEL.RPN.POST_NMS_TOPK_TEST", "50", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "32"]
    return args


def load_cfg(config: str, overrides: list[str]) -> Any:
    """The embedded engine's cfg on the CPU, without weights."""
    from gn_det.config import load_config

    cfg = load_config(config, ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", *overrides])
    if cfg.MODEL.ROI_HEADS.NUM_CLASSES == 0:
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = 80
    return cfg


def detectron2_cfg(cfg: Any, *, registered: bool = False) -> Any:
    """Detectron2's cfg with every value of ours that it knows; with the plugin's keys, gn_det's modules are built."""
    from detectron2.config import get_cfg

    theirs = get_cfg()
    if registered:
        from gn_det.detectron2 import add_gn_config

        add_gn_config(theirs)

    def copy(source: Mapping[str, Any], target: Any) -> None:
        for key, value in source.items():
            if isinstance(value, Mapping):
                if key in target:
                    copy(value, target[key])
            elif key in target:
                target[key] = value

    copy(cfg, theirs)
    return theirs


def build(engine: str, cfg: Any) -> torch.nn.Module:
    """A model with the same weights in both engines (same seed, same order of construction)."""
    torch.manual_seed(0)
    if engine == "embedded":
        from gn_det.modeling import build_model

        model: torch.nn.Module = build_model(cfg)
    else:
        from detectron2.modeling import build_model as build_detectron2

        model = build_detectron2(detectron2_cfg(cfg, registered=engine == "registered"))
        ours = {type(m).__name__ for m in model.modules() if type(m).__module__.startswith("gn_det.")}
        if bool(ours) != (engine == "registered"):
            raise SystemExit(f"{engine}: modules of gn_det in the model are {sorted(ours)}; name a config with GN")
    # Fresh scores are all alike; spread them, so that NMS and the mask head have their usual work.
    with torch.no_grad():
        predictor = model.roi_heads.box_predictor
        for stage in predictor if isinstance(predictor, torch.nn.ModuleList) else [predictor]:
            stage.cls_score.weight *= 30
            stage.bbox_pred.weight *= 30
    return model


def make_batch(
    engine: str, size: tuple[int, int], batch: int, num_classes: int, objects: int = 8
) -> list[dict[str, Any]]:
    """Random images with ``objects`` polygons each, in the engine's own types."""
    rng = np.random.RandomState(0)
    height, width = size
    samples = []
    for _ in range(batch):
        image = torch.from_numpy(rng.randint(0, 256, (3, height, width)).astype(np.uint8))
        corner = rng.uniform(0, 0.6, (objects, 2)) * [width, height]
        far = corner + rng.uniform(0.08, 0.4, (objects, 2)) * [width, height]
        boxes = torch.from_numpy(np.concatenate([corner, far], axis=1).astype(np.float32))
        classes = torch.from_numpy(rng.randint(0, num_classes, objects)).long()
        polygons = [
            [np.array([x0, y0, x1, y0, x1, y1, (x0 + x1) / 2, y1])] for x0, y0, x1, y1 in boxes.double().tolist()
        ]
        sample: dict[str, Any] = {"image": image, "height": height, "width": width}
        if engine == "embedded":
            from gn_det.structures import Masks, Targets

            sample["targets"] = Targets(size, boxes, classes, Masks(polygons))
        else:
            from detectron2.structures import Boxes, Instances, PolygonMasks

            instances = Instances(size)
            instances.gt_boxes, instances.gt_classes = Boxes(boxes), classes
            instances.gt_masks = PolygonMasks(polygons)
            sample["instances"] = instances
        samples.append(sample)
    return samples


def make_steps(
    engine: str,
    cfg: Any,
    size: tuple[int, int],
    batch: int,
    *,
    amp: bool = False,
    last: bool = False,
    objects: int = 8,
) -> dict[str, Callable[[], Any]]:
    """Functions that run one inference and one training step (forward, backward, SGD)."""
    model = build(engine, cfg)
    if last:
        model = model.to(memory_format=torch.channels_last)
    frozen = model
    if engine == "embedded" and (amp or any(cfg.MODEL.WS.values())):  # as gn-det predict and eval have it
        settings = cfg.clone()
        settings.defrost()
        settings.TEST.AMP = amp
        frozen = lay_out_for_inference(build(engine, cfg).eval(), settings, "cpu")
    samples = make_batch(engine, size, batch, cfg.MODEL.ROI_HEADS.NUM_CLASSES, objects)
    # The learning rate is 0: the weights stay equal in both engines, however many steps are measured.
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.0, momentum=0.9)

    def infer() -> Any:
        frozen.eval()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=amp):
            return frozen(samples[:1])

    def train() -> dict[str, float]:
        model.train()
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp, cache_enabled=engine != "embedded"):
            if engine == "embedded":
                losses = model(samples)
            else:
                from detectron2.utils.events import EventStorage

                with EventStorage():
                    losses = model(samples)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        if engine == "embedded":
            model.pop_metrics()
        return {name: float(v.detach()) for name, v in losses.items()}

    return {"inference": infer, "training step": train}


def set_heap(kept: bool) -> None:
    """Memory as ``gn-det train`` and ``predict`` keep it, or as glibc comes to keep large pieces by itself, at most."""
    if kept:
        keep_freed_memory("cpu")
    elif hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(-3, 32 << 20), libc.mallopt(-1, 64 << 20)


def measure_pairs(
    first: Callable[[], Any], second: Callable[[], Any], repeats: int, *, kept: tuple[bool, bool] = (True, False)
) -> np.ndarray:
    """(2, 2, repeats) seconds: engine, clock (wall, this process's CPU), pair; run in alternating order.

    ``kept`` is what :func:`set_heap` gets before each.
    """
    seconds = np.zeros((2, 2, repeats))
    for k in range(-1, repeats):  # the pair -1 warms up
        for which in (0, 1) if k % 2 else (1, 0):
            set_heap(kept[which])
            wall, cpu = time.perf_counter(), time.process_time()
            (first, second)[which]()
            if k >= 0:
                seconds[which, :, k] = time.perf_counter() - wall, time.process_time() - cpu
    return seconds


def summarize(seconds: np.ndarray, ours: str, theirs: str = "detectron2") -> dict[str, float]:
    """Medians in seconds, and quantiles of the pairwise ratios; CPU time hardly feels other work on the machine."""
    row = {f"{engine}_s": float(np.median(seconds[i, 0])) for i, engine in enumerate((ours, theirs))}
    for clock, name in enumerate(("ratio", "cpu_ratio")):
        pairs = seconds[0, clock] / seconds[1, clock]
        row[name], row[f"{name}_p20"], row[f"{name}_p80"] = np.quantile(pairs, [0.5, 0.2, 0.8]).tolist()
    return {key: round(value, 4) for key, value in row.items()}


def verdict(row: Mapping[str, float], target: float) -> str:
    """Against the target, and honest about noise; by CPU time, which hardly feels other work on the machine."""
    if row["cpu_ratio"] <= target:
        return "meets the target"
    return "within noise of the target" if row["cpu_ratio_p20"] <= target else "misses the target"


def peak_memory(engine: str, args: argparse.Namespace) -> float:
    """Peak resident MB of a fresh process that does one inference and two training steps."""
    command = [sys.executable, __file__, "--memory-of", engine, "--ours", args.ours, "--config", args.config]
    command += ["--image-size", args.image_size, "--batch", str(args.batch), "--threads", str(args.threads)]
    command += ["--amp"] * args.amp + ["--channels-last"] * args.channels_last + args.overrides
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout.strip().splitlines()[-1])


def own_peak_mb() -> float:
    """Peak resident MB of this process."""
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss of a child starts at the peak of its parent
        return int(status.read_text().split("VmHWM:")[1].split()[0]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024**2 if sys.platform == "darwin" else 1024)


def measure_predict(cfg: Any, size: tuple[int, int], repeats: int) -> dict[str, float]:
    """Model.predict on an array of ``size``, as a ratio to the model alone, which gets the resized image."""
    import gn_det
    from gn_det.checkpoint.io import save_checkpoint
    from gn_det.checkpoint.meta import build_meta

    names = [f"class {i}" for i in range(cfg.MODEL.ROI_HEADS.NUM_CLASSES)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.pth"
        meta = build_meta(cfg, names, list(range(len(names))))
        save_checkpoint(path, {"model": build("embedded", cfg).state_dict(), "gn_det": meta})
        model = gn_det.load_model(path, device="cpu")
    pixels = np.random.RandomState(0).randint(0, 256, (*size, 3)).astype(np.uint8)
    predictor = model._predictor
    sample = predictor.sample(pixels)
    print(
        f"{len(model.predict(pixels))} detections on {size[0]}x{size[1]}, network input {tuple(sample['image'].shape)}"
    )
    return summarize(
        measure_pairs(lambda: model.predict(pixels), lambda: predictor.infer(sample), repeats, kept=(True, True)),
        "predict",
        "model",
    )


def environment() -> dict[str, Any]:
    """Versions and machine."""
    import torchvision

    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [
            x.split(":", 1)[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in x
        ]
        cpu = names[0] if names else cpu
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "device": cpu,
        "cores": os.cpu_count(),
        "bf16": [f for f in BF16_FEATURES if f in cpu_features()],
        "threads": torch.get_num_threads(),
    }


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write json; 0 whether or not the target is met, 2 without Detectron2."""
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    height, width = (int(v) for v in args.image_size.lower().split("x"))
    if args.predict:
        row = measure_predict(load_cfg(args.config, args.overrides), (height, width), args.repeats)
        measured = {"config": Path(args.config).name, "image_size": [height, width], "environment": environment()}
        write({**measured, "repeats": args.repeats, "predict": row}, args, "predict")
        return 0
    theirs = "embedded" if args.ours == "ws" else "detectron2"
    if theirs == "detectron2":
        try:
            import detectron2.modeling
        except ImportError:
            print("Detectron2 is not installed: nothing to compare with (the embedded engine works without it)")
            return 2

    def steps_of(side: str) -> dict[str, Callable[[], Any]]:
        standardized = [word for part in WS_SECTIONS for word in (f"MODEL.WS.{part}", "jhu")] if side == "ws" else []
        how = {} if side == "detectron2" else {"amp": args.amp, "last": args.channels_last}
        cfg = load_cfg(args.config, [*args.overrides, *standardized])
        return make_steps("embedded" if side == "ws" else side, cfg, (height, width), args.batch, **how)

    if args.memory_of:
        set_heap(args.memory_of != "detectron2")
        steps = steps_of(args.memory_of)
        for name in ("inference", "training step", "training step"):
            steps[name]()
        print(own_peak_mb())
        return 0
    results: dict[str, Any] = {"config": Path(args.config).name, "ours": args.ours, "image_size": [height, width]}
    results |= {"batch": args.batch, "bf16": args.amp, "channels_last": args.channels_last}
    targets = TARGETS.get((args.amp, args.channels_last), TARGETS[False, False])
    targets = WS_TARGETS if args.ours == "ws" else targets
    results |= {"overrides": args.overrides, "repeats": args.repeats, "target": targets, "environment": environment()}
    if theirs == "detectron2":
        results["environment"]["detectron2"] = detectron2.__version__
    engines, kept = (args.ours, theirs), (True, theirs != "detectron2")
    both = [steps_of(side) for side in engines]
    left_out = {"inference": args.only_training, "training step": args.only_inference}
    for name in (name for name in both[0] if not left_out[name]):
        seconds = measure_pairs(both[0][name], both[1][name], args.repeats, kept=kept)
        results[name] = row = summarize(seconds, *engines)
        print(
            f"{name}: {args.ours} {row[args.ours + '_s']:.3f} s, {theirs} {row[theirs + '_s']:.3f} s; "
            f"ratio {row['ratio']:.3f} (p20 {row['ratio_p20']:.3f}, p80 {row['ratio_p80']:.3f}), "
            f"of CPU time {row['cpu_ratio']:.3f} (p20 {row['cpu_ratio_p20']:.3f}, p80 {row['cpu_ratio_p80']:.3f}); "
            f"{verdict(row, targets[name])} <= {targets[name]}",
            flush=True,
        )
    if not args.only_training:
        found = [steps["inference"]()[0] for steps in both]
        results["detections"] = [len(d["instances"]) if isinstance(d, dict) else len(d) for d in found]
        print(f"detections {results['detections']}")
    if not args.only_inference:
        results["losses_equal"] = both[0]["training step"]() == both[1]["training step"]()
        print(f"losses equal: {results['losses_equal']}")
    if not (args.only_inference or args.only_training):
        results["peak_memory_mb"] = {engine: round(peak_memory(engine, args)) for engine in engines}
        print(", ".join(f"peak memory of {e}: {mb} MB" for e, mb in results["peak_memory_mb"].items()))
    write(results, args, OURS[args.ours])
    return 0


def write(results: Mapping[str, Any], args: argparse.Namespace, name: str) -> None:
    """Write the result file, and print its path and the row of a single measurement."""
    stem = f"{name}_{Path(args.config).stem}_{args.image_size.lower()}" + "_bf16" * args.amp
    stem += "_last" * args.channels_last + "_inference" * args.only_inference + "_training" * args.only_training
    output = Path(args.output or RESULTS / f"{stem}.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=2) + "\n")
    print(*([json.dumps(results[name])] if name in results else []), f"written to {output}", sep="\n")


if __name__ == "__main__":
    sys.exit(main())
