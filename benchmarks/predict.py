"""``gn-det predict`` on a folder against one image after the other: images a second, and where the CPU time goes.

    python benchmarks/predict.py --weights output/model_best.pth --images photos/ --repeats 5
    python benchmarks/predict.py --weights output/model_best.pth --video clip.mp4 --threads 1

"sequential" is what predict did before its stages overlapped, in fp32: decode for the model, detect, decode again, draw
with the masks of the whole image, encode, write PNGs at level 3. Both take turns in one process and must find the same,
unless ``--amp`` makes the pipeline compute in bf16. Writes benchmarks/results/predict.json.

With ``--video`` the two sides are ``gn-det predict`` on a clip, with its drawings and json lines, and the model alone
on the same frames, which were decoded and resized before. Writes benchmarks/results/predict_video.json.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from gn_det.compiler import cpu_features
from gn_det.data.inputs import collect_images
from gn_det.data.video_frames import VideoFrames, import_cv2
from gn_det.engine.precision import BF16_FEATURES
from gn_det.evaluation.results import detections_to_coco
from gn_det.files import atomic_write, json_bytes
from gn_det.prediction.images import entries_of, predict
from gn_det.prediction.predictor import Predictor, Selection, crops_of, load_predictor
from gn_det.prediction.video import predict_videos
from gn_det.visualize.draw import draw_detections

_AMP = ("TEST.AMP", "True", "MODEL.CHANNELS_LAST", "True")
_FP32 = ("TEST.AMP", "False", "MODEL.CHANNELS_LAST", "False")
RESULTS = Path(__file__).parent / "results" / "predict.json"


@contextmanager
def timed(spent: dict[str, float], stage: str) -> Iterator[None]:
    """Add CPU seconds of this process."""
    start = time.process_time()
    yield
    spent[stage] += time.process_time() - start


def sequential(predictor: Predictor, paths: list[Path], folder: Path, spent: dict[str, float]) -> list[dict[str, Any]]:
    """One image after the other."""
    results: list[dict[str, Any]] = []
    keep = Selection()
    for number, path in enumerate(paths, 1):
        with timed(spent, "load"):
            sample = predictor.sample(path)
        with timed(spent, "model"):
            found = keep(predictor.infer(sample))
        with timed(spent, "load"):
            pixels = predictor.reader.read(path)
        with timed(spent, "draw"):
            drawn = draw_detections(pixels, found, predictor.class_names)
        with timed(spent, "encode"):
            results += detections_to_coco(number, found, predictor.category_ids)
        with timed(spent, "write"):
            file = io.BytesIO()
            Image.fromarray(drawn).save(file, "PNG", compress_level=3)
            atomic_write(folder / f"{number}.png", file.getvalue())
    return results


def video_stages(predictor: Predictor, clip: str, frames: int) -> dict[str, float]:
    """CPU seconds a frame of each stage in one thread; ``predict`` runs all but model and select beside the model."""
    spent: dict[str, float] = defaultdict(float)
    keep, cv2, film = Selection.of(predictor), import_cv2(), None
    with VideoFrames(clip) as video, tempfile.TemporaryDirectory() as folder:
        source = iter(video)
        for number in range(frames + 1):
            stages = spent if number else defaultdict(float)  # the first frame warms up
            with timed(stages, "read"):
                frame = next(source)
                sample = predictor.sample(frame.pixels)
            with timed(stages, "model"):
                found = predictor.infer(sample)
            with timed(stages, "select"):
                kept = keep(found)
                crops, kept.masks = crops_of(kept), None
            with timed(stages, "draw"):
                drawn = draw_detections(frame.pixels, kept, predictor.class_names, labels="fit", crops=crops)
            if film is None:
                code, size = cv2.VideoWriter.fourcc(*"mp4v"), (drawn.shape[1], drawn.shape[0])
                film = cv2.VideoWriter(f"{folder}/film.mp4", code, video.fps, size)
            with timed(stages, "write"):
                film.write(drawn[:, :, ::-1].copy())
                entries_of(kept, crops, predictor)
        source.close()
        film.release()
    return {stage: seconds / frames for stage, seconds in spent.items()}


def measure_video(weights: str, predictor: Predictor, clip: str, frames: int, repeats: int) -> dict[str, Any]:
    """Frames a second and CPU time of a clip against those of the model alone, taking turns."""
    with VideoFrames(clip) as video:
        samples = [predictor.sample(frame.pixels) for frame in islice(video, frames)]
    walls: list[tuple[float, float]] = []
    cpus: list[tuple[float, float]] = []

    def alone(_: str) -> None:
        for sample in samples:
            predictor.infer(sample)

    def whole(folder: str) -> None:
        options: Any = {"predictor": predictor, "max_frames": frames, "report": lambda line: None}
        predict_videos(weights, [clip], folder, **options)

    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(repeats + 1):
            wall, cpu = [], []
            for side in (alone, whole):
                start, cpu_start = time.perf_counter(), time.process_time()
                side(folder)
                wall.append(time.perf_counter() - start)
                cpu.append(time.process_time() - cpu_start)
            if repeat:
                walls.append((wall[0], wall[1]))
                cpus.append((cpu[0], cpu[1]))
    ratios = [model / video for model, video in walls]
    return {
        "clip": Path(clip).name,
        "frames": len(samples),
        "model_fps": len(samples) / statistics.median(model for model, _ in walls),
        "video_fps": len(samples) / statistics.median(video for _, video in walls),
        "video_fps / model_fps": {"median": statistics.median(ratios), "all": ratios},
        "cpu_seconds_per_frame": video_stages(predictor, clip, len(samples)),
        "cpu_video / cpu_model": statistics.median(video / model for model, video in cpus),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--weights", required=True)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--images")
    what.add_argument("--video", action="append", metavar="CLIP", help="may be given more than once")
    parser.add_argument("--frames", type=int, default=40, help="of a clip")
    parser.add_argument("--limit", type=int, default=20, help="images taken")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--amp", action="store_true", help="the pipeline computes in bf16; results then differ")
    parser.add_argument("--threads", type=int, default=0, help="torch threads; 0 keeps torch's choice")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.video:
        predictor = load_predictor(args.weights, overrides=_AMP if args.amp else (), device="cpu")
        clips = [measure_video(args.weights, predictor, clip, args.frames, args.repeats) for clip in args.video]
        save({"bf16": args.amp, "clips": clips}, args.output or RESULTS.with_name("predict_video.json"))
        return
    paths = collect_images([args.images])[0][: args.limit]
    predictor = load_predictor(args.weights, overrides=_FP32, device="cpu")
    fast = load_predictor(args.weights, overrides=_AMP, device="cpu") if args.amp else predictor
    ratios, cpu_ratios, spent = [], [], defaultdict[str, float](float)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        sequential(predictor, paths[:2], folder, defaultdict(float))
        predict(args.weights, paths[:2], folder / "out", predictor=fast, report=lambda line: None)
        for _ in range(args.repeats):
            wall, cpu = time.perf_counter(), time.process_time()
            before = sequential(predictor, paths, folder, spent)
            middle, cpu_middle = time.perf_counter(), time.process_time()
            found = predict(args.weights, paths, folder / "out", predictor=fast, report=lambda line: None)
            end, cpu_end = time.perf_counter(), time.process_time()
            ratios.append((middle - wall) / (end - middle))
            cpu_ratios.append((cpu_middle - cpu) / (cpu_end - cpu_middle))
            keys = ("image_id", "category_id", "bbox", "score", "segmentation")
            same = [{k: a[k] for k in keys if k in a} for a in found["annotations"]] == before
            if not same and not args.amp:
                raise SystemExit("the pipeline finds something else than single images")
    stages = {stage: seconds / len(paths) / args.repeats for stage, seconds in spent.items()}
    result = {
        "bf16": args.amp,
        "images": len(paths),
        "objects": len(found["annotations"]),
        "speedup_wall": {"median": statistics.median(ratios), "all": ratios},
        "speedup_cpu": {"median": statistics.median(cpu_ratios), "all": cpu_ratios},
        "cpu_seconds_per_image_sequential": stages,
    }
    save(result, args.output or RESULTS)


def save(result: dict[str, Any], path: Path) -> None:
    """Print and write a result with where it was measured."""
    result |= {
        "load_average": os.getloadavg()[0],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "bf16_features": [f for f in BF16_FEATURES if f in cpu_features()],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    atomic_write(path, json_bytes(result, indent=1))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
