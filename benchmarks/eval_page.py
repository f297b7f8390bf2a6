"""What ``gn-det eval --html`` adds to an evaluation: CPU time and memory, on a generated COCO-like result set.

    python benchmarks/eval_page.py      # 5000 images, 80 classes, about 7 objects and up to 100 detections each
    python benchmarks/eval_page.py --images 200 --no-write

Scoring and page run on results that another process generated, packed as inference packs them; then inference of
gn_fpn.yaml on a few 640x480 images (random weights). One thread; times are CPU seconds. Memory is the peak of the
process during scoring and page, with libraries, dataset and results, without a model. Writes
benchmarks/results/eval_page.json.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import itertools
import json
import multiprocessing
import operator
import os
import pickle
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from benchmarks.coco_eval import generate, peak, reset_peak
from gn_det.config import load_config
from gn_det.data.sets import load_first_test_set
from gn_det.engine.evaluator import EvalReport
from gn_det.evaluation.coco_eval import evaluate_coco
from gn_det.evaluation.ground_truth import load_ground_truth
from gn_det.evaluation.results import CocoResults, ImageResults
from gn_det.modeling import build_model

RESULTS = Path(__file__).parent / "results" / "eval_page.json"
#: Largest share of an evaluation's time, and peak memory in MiB.
TARGETS = {"share": 0.2, "peak_mib": 1024.0}


def seconds_of_inference(cfg: Any, images: int = 5) -> float:
    """Median CPU seconds for one 640x480 image at the config's test size."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 80
    model = build_model(cfg).eval()
    height = cfg.INPUT.MIN_SIZE_TEST
    sample: Any = {"image": torch.randint(0, 256, (3, height, height * 4 // 3), dtype=torch.uint8)}
    times = []
    for _ in range(images):
        start = time.process_time()
        model([sample])
        times.append(time.process_time() - start)
    return statistics.median(times[1:])


def resident_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("VmRSS"))) / 1024


def write_images(folder: Path, data: dict[str, Any]) -> None:
    """One picture for each size, linked under all names."""
    made: dict[tuple[int, int], Path] = {}
    for image in data["images"]:
        size, path = (image["width"], image["height"]), folder / image["file_name"]
        if size in made:
            os.link(made[size], path)
        else:
            noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(noise).save(path)
            made[size] = path


def make_set(folder: Path, images: int, classes: int) -> None:
    """Write val.json, the images, and results.pickle."""
    data, entries = generate(images, classes)
    write_images(folder, data)
    (folder / "val.json").write_text(json.dumps(data), encoding="utf-8")
    packed = CocoResults()
    for image_id, group in itertools.groupby(entries, operator.itemgetter("image_id")):
        found = list(group)
        boxes, scores = np.array([r["bbox"] for r in found], np.float32), np.array([r["score"] for r in found])
        categories, masks = [r["category_id"] for r in found], [r["segmentation"] for r in found]
        packed.append(ImageResults.pack(image_id, categories, boxes, scores, masks))
    (folder / "results.pickle").write_bytes(pickle.dumps(packed))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--no-write", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = multiprocessing.get_context("spawn").Process(target=make_set, args=(folder, args.images, args.classes))
        made.start()
        made.join()
        libraries = resident_mib()
        results: CocoResults = pickle.loads((folder / "results.pickle").read_bytes())
        cfg = load_config("gn_fpn.yaml", {"MODEL.WEIGHTS": ""})
        cfg.DATASETS.VAL_JSON, cfg.DATASETS.VAL_IMAGES = str(folder / "val.json"), name
        reset_peak()
        start = time.process_time()
        dataset = load_first_test_set(cfg)
        truth = load_ground_truth(dataset)
        names, ids = dataset.class_names, dataset.category_ids
        evaluate_coco(truth, results, names, ids, iou_types=("bbox", "segm"))
        scoring = time.process_time() - start
        before, scoring_peak = resident_mib(), peak()
        objects = len(truth.annotations)
        print(f"{args.images} images, {objects} objects, {len(results)} detections", flush=True)
        reset_peak()
        start = time.process_time()
        EvalReport(folder / "eval.html").write(cfg, dataset, truth, results, names, ids, ["bbox", "segm"])
        page = time.process_time() - start
        highest, size = peak(), (folder / "eval.html").stat().st_size
    inference = seconds_of_inference(cfg)  # last: what a model takes is not the page's
    whole = inference * args.images + scoring
    share = page / whole
    report = {
        "what": "eval --html: CPU seconds of inference (of all images, from a few), scoring and page; peak memory",
        "images": args.images,
        "objects": objects,
        "detections": len(results),
        "inference_seconds_per_image": inference,
        "scoring_seconds": scoring,
        "page_seconds": page,
        "share": share,
        "share_without_inference": page / scoring,
        "break_even_inference_ms": max(1000 * (page / TARGETS["share"] - scoring) / args.images, 0.0),
        "libraries_mib": libraries,
        "scoring_peak_mib": scoring_peak,
        "mib_before_page": before,
        "peak_mib": highest,
        "page_mib": highest - before,
        "html_mib": size / 2**20,
        "targets": TARGETS,
        "met": share <= TARGETS["share"] and max(scoring_peak, highest) <= TARGETS["peak_mib"],
        "date": datetime.date.today().isoformat(),
        "device": f"{platform.machine()}, one thread",
        "versions": {p: importlib.metadata.version(p) for p in ("torch", "numpy", "pycocotools")},
    }
    if not args.no_write:
        RESULTS.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(
        f"inference {1000 * inference:.0f} ms an image, scoring {scoring:.1f} s, page {page:.1f} s: {share:.2%} of the "
        f"evaluation; 20% or less where inference takes {report['break_even_inference_ms']:.1f} ms an image or more\n"
        f"peak {scoring_peak:.0f} MiB in scoring and {highest:.0f} in the page, {libraries:.0f} of them "
        f"libraries; page of {size / 2**20:.1f} MiB; "
        f"{'targets met' if report['met'] else 'targets MISSED'}"
    )
    return 0 if report["met"] else 1


if __name__ == "__main__":
    sys.exit(main())
