"""Reading a json of COCO's size, checking it, mapping images and resuming: gn_det against Detectron2.

    python benchmarks/data.py                       # 118,000 images and 860,391 annotations: 540 MB, about ten minutes
    python benchmarks/data.py --resize              # images a second of the mapper alone: resize to 800 pixels and flip
    python benchmarks/data.py --jitter              # the same with large-scale jitter at 1024 pixels
    python benchmarks/data.py --images 2000 --annotations 14000 --repeats 1 --no-write

The json is generated in a temporary folder and removed. Readers take turns, each in a process of its own, so that each
has its own peak of memory (given beyond that of the imports); mappers take turns in one process. Times are CPU seconds.
Without Detectron2 its columns are left out. Writes benchmarks/results/data.json.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

RESULTS = Path(__file__).parent / "results" / "data.json"
#: gn_det's share of Detectron2's CPU time and memory, at most; images a second against Detectron2's, at least.
TARGETS = {"time": 1 / 3, "memory": 1 / 3, "mapper": 1.5}


def write_json(path: Path, images: int, annotations: int, seed: int = 0) -> None:
    """A json with COCO's keys, its share of crowds, and polygons of 8 to 49 points."""
    rng = np.random.default_rng(seed)
    ids = [i for i in range(1, 91) if i % 9]
    sizes = [(640, 480) if rng.random() < 0.7 else (427, 640) for _ in range(images)]
    entries = [
        {"license": 3, "file_name": f"{i:012d}.jpg", "coco_url": f"http://images.example.org/train2017/{i:012d}.jpg",
         "height": h, "width": w, "date_captured": "2013-11-14 11:18:45", "id": i}
        for i, (w, h) in enumerate(sizes, 1)
    ]  # fmt: skip
    with path.open("w") as file:
        file.write(f'{{"images": {json.dumps(entries)}, "annotations": [')
        for number, image in enumerate(rng.integers(0, images, annotations).tolist(), 1):
            width, height = sizes[image]
            w, h = np.clip(np.exp(rng.normal(4.0, 1.0, 2)), 6, [width - 1, height - 1])
            angle = np.linspace(0, 2 * np.pi, int(rng.integers(8, 50)), endpoint=False)
            radius = 0.5 * (0.8 + 0.2 * np.cos(3 * angle + 1))
            x = rng.random() * (width - w) + w * (0.5 + radius * np.cos(angle))
            y = rng.random() * (height - h) + h * (0.5 + radius * np.sin(angle))
            crowd = int(number % 86 == 0)
            segmentation: Any = [np.stack([x, y], 1).round(2).reshape(-1).tolist()]
            if crowd:
                segmentation = {"counts": [20] * 59 + [width * height - 59 * 20], "size": [height, width]}
            box = [x.min(), y.min(), np.ptp(x), np.ptp(y)]
            entry = {
                "segmentation": segmentation,
                "area": round(0.6 * box[2] * box[3], 4),
                "iscrowd": crowd,
                "image_id": image + 1,
                "bbox": [round(float(v), 2) for v in box],
                "category_id": ids[int(rng.integers(len(ids)))],
                "id": number,
            }
            file.write((", " if number > 1 else "") + json.dumps(entry))
        file.write(f'], "categories": {json.dumps([{"id": i, "name": f"class {i}"} for i in ids])}}}')


# ------------------------------------------------------------ in a process of its own


def read_detectron2(path: str) -> None:
    from detectron2.data.common import DatasetFromList
    from detectron2.data.datasets.coco import load_coco_json

    DatasetFromList(load_coco_json(path, "/none"), copy=False, serialize=True)


def read_ours(path: str) -> None:
    from gn_det.data.catalog import DatasetSource
    from gn_det.data.coco import load_coco

    with patch("gn_det.data.coco.look_at_images", return_value=set()):  # there are none
        load_coco(DatasetSource("big", path, "/none"), max_bad=0)


def check_ours(path: str) -> None:
    """What gn-det check does, but for the headers of the images."""
    from gn_det.check import audit
    from gn_det.data.catalog import DatasetSource

    with patch("gn_det.check.audit.look_at_images", return_value=set()):
        audit.survey(DatasetSource("big", path, "/none"), "train", audit.Training((800,), 1333, True))


def parse_json(path: str) -> None:
    with open(path, encoding="utf-8") as file:
        json.load(file)


READERS: dict[str, Callable[[str], None]] = {
    "json.load alone": parse_json,
    "Detectron2": read_detectron2,
    "gn_det": read_ours,
    "gn-det check": check_ours,
}


def child(name: str, path: str) -> None:
    """Import first, then measure."""
    import gn_det.check.audit  # noqa: F401

    if name == "Detectron2":
        import detectron2.data  # noqa: F401
    before, start = peak(), time.process_time()
    READERS[name](path)
    seconds = time.process_time() - start
    print(json.dumps({"seconds": seconds, "mib": peak() - before, "imports_mib": before}))


def peak() -> float:
    """MiB that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def in_child(name: str, path: Path) -> dict[str, float]:
    words = [sys.executable, "-W", "ignore", __file__, "--child", name, str(path)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    print(f"  {name:16s} {result['seconds']:6.1f} s {result['mib']:6.0f} MiB beyond imports", flush=True)
    return result


# ------------------------------------------------------------ mappers and the sampler


def map_images(folder: Path, rounds: int, *, jitter: bool = False) -> dict[str, Any]:
    """Images a second at 800 pixels, polygons and flips, or with large-scale jitter at 1024; the samples are equal."""
    import torch
    from detectron2.config import get_cfg as get_d2_cfg
    from detectron2.data import DatasetMapper
    from detectron2.data import transforms as T
    from detectron2.data.datasets.coco import load_coco_json

    from gn_det.config import get_cfg
    from gn_det.data.catalog import DatasetSource
    from gn_det.data.coco import load_coco
    from gn_det.data.mapper import TrainMapper

    write_json(folder / "small.json", 24, 24 * 7, seed=1)
    rng = np.random.default_rng(0)
    for image in json.loads((folder / "small.json").read_text())["images"]:
        coarse = rng.integers(0, 256, (image["height"] // 8, image["width"] // 8, 3), dtype=np.uint8)
        full = Image.fromarray(coarse).resize((image["width"], image["height"]), Image.Resampling.BICUBIC)
        full.save(folder / image["file_name"], quality=92)
    ours = load_coco(DatasetSource("small", str(folder / "small.json"), str(folder)), max_bad=0)
    theirs = load_coco_json(str(folder / "small.json"), str(folder))
    mappers = []
    for cfg in (get_cfg(), get_d2_cfg()):
        cfg.INPUT.MIN_SIZE_TRAIN, cfg.MODEL.MASK_ON = (800,), True
        mappers.append(cfg)
    more: dict[str, Any] = {}
    if jitter:
        mappers[0].INPUT.LSJ.ENABLED, side = True, 1024
        scale = T.ResizeScale(0.1, 2.0, side, side)
        more = {"augmentations": [scale, T.FixedSizeCrop((side, side), seg_pad_value=0), T.RandomFlip()]}
        more["recompute_boxes"] = True
    our_mapper, their_mapper = TrainMapper(mappers[0]), DatasetMapper(mappers[1], is_train=True, **more)
    seconds: dict[str, list[float]] = {"gn_det": [], "Detectron2": []}
    ratios = []
    for number in range(rounds):
        for index in range(len(ours)):
            start = time.process_time()
            a = our_mapper(ours.records[index], np.random.RandomState(number))
            middle = time.process_time()
            np.random.seed(number)
            b = their_mapper(theirs[index])
            seconds["gn_det"].append(middle - start)
            seconds["Detectron2"].append(time.process_time() - middle)
            assert torch.equal(a["image"], b["image"]) and torch.equal(
                a["targets"].boxes, b["instances"].gt_boxes.tensor
            )
        sums = [sum(values[-len(ours) :]) for values in (seconds["Detectron2"], seconds["gn_det"])]
        ratios.append(sums[0] / sums[1])
    rates = {name: 1 / statistics.fmean(values) for name, values in seconds.items()}
    spread = [round(v, 3) for v in (min(ratios), max(ratios))]
    return {"images_per_second": rates, "ratio": statistics.median(ratios), "ratio_range": spread}


def resume_seconds(images: int) -> float:
    """CPU seconds to the first batch of 16 at iteration 1,000,000."""
    from gn_det.data.samplers import batch_stream, shuffled_epochs

    sizes = np.random.default_rng(0).integers(300, 700, (images, 2))
    start = time.process_time()
    next(batch_stream(shuffled_epochs(images, 0), 16, sizes=sizes, start=1_000_000))
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=118_000)
    parser.add_argument("--annotations", type=int, default=860_391)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--no-write", action="store_true", help="print only")
    parser.add_argument("--resize", action="store_true", help="only the mapper at 800 pixels; writes data_resize.json")
    parser.add_argument("--jitter", action="store_true", help="only large-scale jitter; writes data_jitter.json")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(*args.child)
        return
    if args.jitter or args.resize:
        name = "jitter" if args.jitter else "resize"
        with tempfile.TemporaryDirectory(prefix="gn_det-") as place:
            mapper = map_images(Path(place), 2 * args.repeats, jitter=args.jitter)
        print(f"{name}: {mapper['ratio']:.2f} {mapper['ratio_range']} times Detectron2's images a second", mapper)
        if not args.no_write:
            row = {"date": datetime.date.today().isoformat(), "python": platform.python_version(), "mapper": mapper}
            RESULTS.with_name(f"data_{name}.json").write_text(json.dumps(row, indent=1) + "\n")
        return
    has_detectron2 = importlib.util.find_spec("detectron2") is not None
    names = [name for name in READERS if has_detectron2 or name != "Detectron2"]
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory(prefix="gn_det-") as place:
        path = Path(place) / "instances.json"
        write_json(path, args.images, args.annotations)
        size = path.stat().st_size
        print(f"{args.images} images, {args.annotations} annotations, {size / 1e6:.0f} MB")
        for _ in range(args.repeats):
            for name in names:
                found[name].append(in_child(name, path))
        compared = map_images(Path(place), 2 * args.repeats) if has_detectron2 else None
    readers = {
        name: {key: round(statistics.median(r[key] for r in runs), 2) for key in ("seconds", "mib", "imports_mib")}
        for name, runs in found.items()
    }
    verdicts: dict[str, Any] = {}
    if compared is not None:
        for key, part in (("time", "seconds"), ("memory", "mib")):
            ratios = [a[part] / b[part] for a, b in zip(found["gn_det"], found["Detectron2"])]
            verdicts[key] = (statistics.median(ratios), [min(ratios), max(ratios)])
            print(f"{key}: {verdicts[key][0]:.3f} of Detectron2's (target {TARGETS[key]:.2f})")
        print(f"mapper: {compared['ratio']:.2f} times Detectron2's images a second (target {TARGETS['mapper']})")
    resume = resume_seconds(args.images)
    print(f"resume at iteration 1,000,000: {resume:.1f} s to the first batch's indices")
    if args.no_write:
        return
    out: dict[str, Any] = {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "images": args.images,
        "annotations": args.annotations,
        "bytes": size,
        "repeats": args.repeats,
        "readers": readers,
        "ratios": {key: {"median": round(m, 3), "range": [round(v, 3) for v in r]} for key, (m, r) in verdicts.items()},
        "mapper": compared,
        "resume_seconds": round(resume, 2),
    }
    RESULTS.write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
