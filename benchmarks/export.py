"""An exported detector against its original: CPU time an image, start to the first detection, size, fp16 and int8.

Torch in fp32 and each exported file take turns on the same images in one process, each with one thread; a ratio is the
median of the ratios of CPU time of these turns, with the 10th and 90th percentile. The start is that of a fresh process
from nothing to one detection. Int8 is onnxruntime's dynamic quantization of the fully connected layers, or of
convolutions too. With a COCO json, AP of every file.

    python benchmarks/export.py --weights model_best.pth --images val/ --json val.json
    python benchmarks/export.py --config gn_fpn.yaml --images photos/ --image-size 800x1344 --number 2 --formats fp32
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from engine import build, load_cfg
from group_norm import environment

from gn_det.checkpoint.meta import build_meta
from gn_det.data.inputs import collect_images
from gn_det.deploy import Detector
from gn_det.deploy.export import Exported, Options, export
from gn_det.deploy.parity import compare

RESULTS = Path(__file__).parent / "results" / "export.json"
_TORCH = "import gn_det, sys; gn_det.load_model(sys.argv[1], device='cpu').predict(sys.argv[2])"
_ONNX = "from gn_det.deploy import Detector; import sys; Detector(sys.argv[1], threads=1).predict(sys.argv[2])"
#: Kinds of nodes that are quantized.
_INT8 = {"int8 fc": ["MatMul", "Gemm"], "int8 fc and conv": ["MatMul", "Gemm", "Conv"]}
FORMATS = ("fp32", "opset 21", "fp16", *_INT8)


def fresh(config: str, path: Path) -> Path:
    """Random weights of a shipped config, with scores spread so that there are detections."""
    cfg = load_cfg(config, [])
    names = [f"class {i}" for i in range(cfg.MODEL.ROI_HEADS.NUM_CLASSES)]
    torch.save(
        {"model": build("embedded", cfg).state_dict(), "gn_det": build_meta(cfg, names, list(range(len(names))))}, path
    )
    return path


def resized(images: Sequence[Path], size: str, folder: Path) -> list[Path]:
    """Copies of the images of ``size``, HEIGHTxWIDTH."""
    height, width = map(int, size.split("x"))
    copies = [folder / f"{number}.png" for number in range(len(images))]
    for image, copy in zip(images, copies):
        Image.open(image).convert("RGB").resize((width, height)).save(copy)
    return copies


def turns(exported: Exported, images: Sequence[Path], blocks: int) -> list[tuple[float, float]]:
    """CPU seconds of torch and of the file on each image, without the first round."""
    torch.set_num_threads(1)
    detector = Detector(exported.path, threads=1)
    sides = (exported.predictor.detect, detector.predict)
    measured = []
    for block in range(blocks + 1):
        for path in images:
            seconds = []
            for side in sides:
                start = time.process_time()
                side(path)
                seconds.append(time.process_time() - start)
            if block:
                measured.append((seconds[0], seconds[1]))
    return measured


def start(program: str, file: Path, image: Path, rounds: int) -> float:
    """Median CPU seconds of a fresh process."""
    seconds = []
    for _ in range(rounds):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-c", program, file, image], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return statistics.median(seconds)


def make(name: str, weights: Path, whole: Exported, folder: Path) -> Exported:
    """The file of a format."""
    path = folder / f"{name}.onnx"
    if name == "fp32":
        return whole
    if name in ("opset 21", "fp16"):
        return export(weights, path, Options(fp16=True) if name == "fp16" else Options(opset=21))
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(whole.path, path, op_types_to_quantize=_INT8[name], weight_type=QuantType.QUInt8)
    return replace(whole, path=path)


def measure(exported: Exported, images: list[Path], args: argparse.Namespace) -> dict[str, Any]:
    """Size, time and, with a json, AP of one file."""
    module = exported.predictor.module
    assert module is not None
    tensors = sum(t.numel() * t.element_size() for t in module.state_dict().values())
    pairs = turns(exported, images[: args.number], args.blocks)
    ratios = [theirs / ours for ours, theirs in pairs]
    result: dict[str, Any] = {
        "bytes": exported.path.stat().st_size,
        "bytes / bytes of the tensors": exported.path.stat().st_size / tensors,
        "CPU seconds an image, torch fp32": statistics.median(ours for ours, _ in pairs),
        "CPU seconds an image": statistics.median(theirs for _, theirs in pairs),
        "CPU time / torch fp32": dict(zip(("p10", "median", "p90"), np.percentile(ratios, (10, 50, 90)).tolist())),
        "turns": len(pairs),
    }
    if args.json:
        parity = compare(exported, [args.images], ground_truth=args.json)
        result["largest differences"] = {"boxes, pixels": parity.boxes, "scores": parity.scores}
        result["AP, torch fp32 and this file"] = {task: ap[:2] for task, ap in parity.ap.items()}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--weights", type=Path)
    what.add_argument("--config", help="a shipped config, with random weights")
    parser.add_argument("--images", required=True)
    parser.add_argument("--image-size", metavar="HxW", help="resize the images that are timed")
    parser.add_argument("--json", help="COCO json of the images: AP")
    parser.add_argument("--number", type=int, default=6, help="images that are timed")
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--name", help="of the entry in the results (default: the config, or the weights' file)")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    images, _ = collect_images([args.images])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        weights = args.weights or fresh(args.config, folder / "model.pth")
        timed = resized(images[: args.number], args.image_size, folder) if args.image_size else images
        whole = export(weights, folder / "fp32.onnx")
        result: dict[str, Any] = {
            "environment": environment("cpu") | {"onnxruntime": onnxruntime.__version__},
            "image size": args.image_size or "of the files",
        }
        begin = [start(*side, timed[0], args.blocks) for side in ((_TORCH, weights), (_ONNX, whole.path))]
        result["CPU seconds of a fresh process to its first detections"] = {
            **dict(zip(("torch", "onnxruntime"), begin)),
            "ratio": begin[1] / begin[0],
        }
        for name in args.formats.split(","):
            result[name] = measure(make(name, weights, whole, folder), timed, args)
            print(json.dumps({name: result[name]}, indent=1), flush=True)
    results = json.loads(args.output.read_text(encoding="utf-8")) if args.output.is_file() else {}
    results[args.name or args.config or args.weights.name] = result
    args.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
