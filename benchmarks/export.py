"""An exported detector against its original: CPU time an image, start to the first detection, size, and int8.

Torch in fp32 and onnxruntime take turns on the same images in one process, each with one thread; a figure is the median
of the ratios of CPU time. The start is that of a fresh process from nothing to one detection. Int8 is onnxruntime's
dynamic quantization of the fully connected layers, or of convolutions too, with its AP on a COCO json.

    python benchmarks/export.py --weights model_best.pth --images val/ --json val.json
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
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parent))
from group_norm import environment

from gn_det.data.inputs import collect_images
from gn_det.deploy import Detector
from gn_det.deploy.export import Exported, Options, export
from gn_det.deploy.parity import compare
from gn_det.prediction.predictor import load_predictor

_TORCH = "import gn_det, sys; gn_det.load_model(sys.argv[1], device='cpu').predict(sys.argv[2])"
_ONNX = "from gn_det.deploy import Detector; import sys; Detector(sys.argv[1], threads=1).predict(sys.argv[2])"


def opened(weights: str, path: Path) -> Exported:
    """A file that was exported before."""
    detector = Detector(path)
    outputs = ("boxes", "scores", "classes", "masks", "counts")
    return Exported(path, Options(), detector.metadata, load_predictor(weights, device="cpu"), outputs)


def turns(exported: Exported, images: list[Path], blocks: int) -> list[tuple[float, float]]:
    """CPU seconds of torch and of onnxruntime on each image, without the first round."""
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


def int8(exported: Exported, kinds: list[str], path: Path) -> Exported:
    """``exported`` with dynamically quantized nodes of some kinds."""
    from dataclasses import replace

    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantize_dynamic(exported.path, path, op_types_to_quantize=kinds, weight_type=QuantType.QUInt8)
    return replace(exported, path=path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--images", required=True)
    parser.add_argument(
        "--onnx", type=Path, help="the weights as gn-det export wrote them; without it they are exported"
    )
    parser.add_argument("--json", help="COCO json of the images: AP of int8")
    parser.add_argument("--number", type=int, default=6, help="images that are timed")
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "export.json")
    args = parser.parse_args()
    images, _ = collect_images([args.images])
    result: dict[str, Any] = {"environment": environment("cpu")}
    with tempfile.TemporaryDirectory() as folder:
        exported = opened(args.weights, args.onnx) if args.onnx else export(args.weights, Path(folder) / "model.onnx")
        module = exported.predictor.module
        assert module is not None
        tensors = sum(t.numel() * t.element_size() for t in module.state_dict().values())
        result["size / tensors"] = exported.path.stat().st_size / tensors
        measured = turns(exported, images[: args.number], args.blocks)
        for name, column in zip(("torch", "onnxruntime"), zip(*measured)):
            result[f"{name}, CPU seconds an image"] = statistics.median(column)
        result["onnxruntime / torch"] = statistics.median(b / a for a, b in measured)
        result["start, torch"] = start(_TORCH, Path(args.weights), images[0], args.blocks)
        result["start, onnxruntime"] = start(_ONNX, exported.path, images[0], args.blocks)
        result["start, onnxruntime / torch"] = result["start, onnxruntime"] / result["start, torch"]
        if args.json:
            for name, kinds in (("fc", ["MatMul", "Gemm"]), ("fc and conv", ["MatMul", "Gemm", "Conv"])):
                quantized = int8(exported, kinds, Path(folder) / "int8.onnx")
                parity = compare(quantized, [args.images], ground_truth=args.json)
                seconds = [b for _, b in turns(quantized, images[: args.number], 1)]
                result[f"int8 {name}"] = {
                    "AP (torch, int8)": {task: ap[:2] for task, ap in parity.ap.items()},
                    "bytes": quantized.path.stat().st_size,
                    "CPU seconds an image": statistics.median(seconds),
                }
    print(json.dumps(result, indent=1))
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
