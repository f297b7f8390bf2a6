"""A whole training step: Mask R-CNN with GN against the same model with frozen BN (BN*), and our norms against torch's.

Both sides have the same convolutions, the 4conv1fc head included, and a norm at the same places; only the norms differ.
R-50-FPN and R-50-C4 at 800x1333, batches 1, 2 and 4, fp32 and bf16 autocast: seconds per iteration (median, p20, p80),
peak memory, images per second at inference, and the time of the norms alone on the step's own shapes. The sides take
turns in one process. Ends with the targets, each met or MISSED.

    python benchmarks/train_step.py                     # needs a GPU; writes benchmarks/results/train_step_<gpu>.json
    python benchmarks/train_step.py --models fpn --batches 2 --dtypes bfloat16 --channels-last
    python benchmarks/train_step.py --models fpn --batches 2 --dtypes bfloat16 --compile   # trunk and box head compiled
    python benchmarks/train_step.py --quick             # tiny, any machine: checks that it runs, times mean nothing
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from engine import load_cfg, make_batch
from group_norm import environment, quantiles, write

from gn_det.modeling import build_model
from gn_det.norm import FrozenBatchNorm2d

#: overrides of each side; "gn torch" is nn.GroupNorm's own kernels
SIDES: dict[str, list[str]] = {
    "bn*": [],
    "gn": ["MODEL.GN.FUSED", "on"],
    "gn recompute": ["MODEL.GN.FUSED", "on", "MODEL.GN.RECOMPUTE", "True"],
    "gn torch": ["MODEL.GN.FUSED", "off"],
}
CONFIGS = {"fpn": "gn_fpn.yaml", "c4": "gn_c4.yaml"}
#: where norms sit in both models; the box head of C4 is res5, it has no 4conv1fc
NORMS = ("MODEL.RESNETS.NORM", "MODEL.FPN.NORM", "MODEL.ROI_BOX_HEAD.NORM", "MODEL.ROI_MASK_HEAD.NORM")
QUICK = [
    "MODEL.RPN.POST_NMS_TOPK_TRAIN", "20", "MODEL.RPN.POST_NMS_TOPK_TEST", "10",
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "8",
]  # fmt: skip


def build(model: str, side: str, args: argparse.Namespace) -> tuple[nn.Module, Any]:
    """The model in training mode on the device, and its cfg."""
    norm = "FrozenBN" if side == "bn*" else "GN"
    overrides = [*SIDES[side], "MODEL.BACKBONE.FREEZE_AT", str(args.freeze_at), *(QUICK if args.quick else [])]
    for key in NORMS:
        overrides += [key, norm]
    if model == "fpn":
        overrides += ["MODEL.ROI_BOX_HEAD.NUM_CONV", "4", "MODEL.ROI_BOX_HEAD.NUM_FC", "1"]
    cfg = load_cfg("quickstart.yaml" if args.quick else CONFIGS[model], overrides)
    torch.manual_seed(0)
    made = build_model(cfg).to(args.device)
    if args.channels_last:
        made = made.to(memory_format=torch.channels_last)
    if args.compile:
        compile_parts(made)
    return made, cfg


def compile_parts(model: nn.Module, **options: Any) -> None:
    """Compile what is one graph whatever the images hold: the trunk (any image size), and the box head of an FPN."""
    model.backbone.compile(dynamic=True, fullgraph=True, **options)
    if hasattr(model.roi_heads, "box_head"):
        model.roi_heads.box_head.compile(dynamic=True, fullgraph=True, **options)


def sync(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


class Side:
    """One model with its steps."""

    def __init__(self, model: str, side: str, dtype: str, batch: int, args: argparse.Namespace) -> None:
        self.args, self.batch = args, batch
        self.net, cfg = build(model, side, args)
        size = (64, 96) if args.quick else (800, 1333)
        self.samples = make_batch("embedded", size, batch, cfg.MODEL.ROI_HEADS.NUM_CLASSES)
        for sample in self.samples:
            sample["image"] = sample["image"].to(args.device)
        parameters = [p for p in self.net.parameters() if p.requires_grad]
        # The learning rate is 0: weights stay what they are, however many steps are measured.
        self.optimizer = torch.optim.SGD(parameters, lr=0.0, momentum=0.9)
        self.low = dtype == "bfloat16"

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.args.device.split(":")[0], dtype=torch.bfloat16, enabled=self.low)

    def train(self) -> None:
        self.net.train()
        torch.manual_seed(1)
        with self.autocast():
            losses = self.net(self.samples)
        self.optimizer.zero_grad()
        torch.stack([v.float() for v in losses.values()]).sum().backward()
        self.optimizer.step()
        self.net.pop_metrics()

    def infer(self) -> None:
        self.net.eval()
        with torch.no_grad(), self.autocast():
            self.net(self.samples)

    def norm_step(self) -> Callable[[], None]:
        """Forward and backward of every norm layer alone, on the shapes, dtypes and layouts of one step.

        A fused layer has its add and ReLU in it, the others are the norm alone.
        """
        seen: list[tuple[nn.Module, tuple[Any, ...]]] = []

        def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            seen.append((module, tuple(i.detach() if isinstance(i, Tensor) else i for i in inputs)))

        norms = [m for m in self.net.modules() if isinstance(m, (nn.GroupNorm, FrozenBatchNorm2d))]
        hooks = [m.register_forward_pre_hook(note) for m in norms]
        self.train()
        for hook in hooks:
            hook.remove()

        def run() -> None:
            for module, (x, *rest) in seen:
                x = x.requires_grad_()
                with self.autocast():
                    y = module(x, *rest)
                y.backward(torch.ones_like(y))
                x.grad = None

        return run


def timed(function: Callable[[], Any], device: str) -> float:
    sync(device)
    start = time.perf_counter()
    function()
    sync(device)
    return time.perf_counter() - start


def alternate(functions: dict[str, Callable[[], Any]], repeats: int, device: str) -> dict[str, list[float]]:
    """[median, p20, p80] seconds of each, in turns, after two runs that are not counted (none if ``repeats`` is 1)."""
    times: dict[str, list[float]] = {name: [] for name in functions}
    for k in range(-2 if repeats > 1 else 0, repeats):
        for name, function in functions.items():
            spent = timed(function, device)
            if k >= 0:
                times[name].append(spent)
    return {name: quantiles(t) for name, t in times.items()}


def peak_gb(model: str, side: str, dtype: str, batch: int, args: argparse.Namespace) -> float | None:
    """Peak allocated memory of two steps of a model that is alone on the device."""
    if not args.device.startswith("cuda"):
        return None
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    alone = Side(model, side, dtype, batch, args)
    alone.train()
    alone.train()
    return torch.cuda.max_memory_allocated() / 1e9


def measure(model: str, dtype: str, batch: int, args: argparse.Namespace) -> dict[str, Any]:
    """One row of the result file."""
    row: dict[str, Any] = {"model": model, "dtype": dtype, "batch": batch}
    row["peak_gb"] = {name: peak_gb(model, name, dtype, batch, args) for name in SIDES}
    sides = {name: Side(model, name, dtype, batch, args) for name in SIDES}
    row["train_s"] = alternate({n: s.train for n, s in sides.items()}, args.repeats, args.device)
    inference = alternate({n: s.infer for n, s in sides.items()}, args.repeats, args.device)
    row["inference_s"] = inference
    row["images_per_s"] = {n: batch / t[0] for n, t in inference.items()}
    norms = alternate({n: s.norm_step() for n, s in sides.items()}, args.repeats, args.device)
    row["norms_s"] = norms
    row["norm_share"] = {n: t[0] / row["train_s"][n][0] for n, t in norms.items()}
    return row


def judge(row: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    """The targets, each as (text, met)."""
    what = f"{row['model']} {row['dtype']} batch {row['batch']}"
    train, memory = {n: t[0] for n, t in row["train_s"].items()}, row["peak_gb"]
    for side, most in (("gn", 1.35), ("gn recompute", 1.10)):
        ratio = memory[side] / memory["bn*"]
        yield f"{what}: {side} takes {ratio:.2f} of BN*'s memory, target <= {most}", ratio <= most
    ratio = train["gn"] / train["bn*"]
    yield f"{what}: a step with GN takes {ratio:.3f} of BN*'s time, target <= 1.03", ratio <= 1.03
    ratio = row["images_per_s"]["bn*"] / row["images_per_s"]["gn"]
    yield f"{what}: inference with GN takes {ratio:.3f} of BN*'s time, target <= 1.05", ratio <= 1.05
    if row["dtype"] == "bfloat16":
        ratio = train["gn torch"] / train["gn"]
        yield f"{what}: {ratio:.2f}x faster than with nn.GroupNorm, target >= 1.3", ratio >= 1.3


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", default="fpn,c4")
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--batches", default="1,2,4")
    parser.add_argument("--freeze-at", type=int, default=0, help="MODEL.BACKBONE.FREEZE_AT of both sides")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", action="store_true", help="torch.compile for trunk and box head, on all sides")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="tiny model and images, 1 run: checks that it runs")
    parser.add_argument("--output", type=Path, help="json file; default benchmarks/results/train_step_<gpu>.json")
    args = parser.parse_args(argv)
    if args.quick:
        args.models, args.batches, args.repeats = "fpn", "1", 1
    return args


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write json; 1 if a target that could be judged is missed."""
    args = parse(argv)
    cuda = args.device.startswith("cuda")
    rows, missed = [], 0
    for model in args.models.split(","):
        for dtype in args.dtypes.split(","):
            for batch in args.batches.split(","):
                rows.append(row := measure(model, dtype, int(batch), args))
                times = ", ".join(f"{n} {t[0]:.4f} s" for n, t in row["train_s"].items())
                print(f"{model} {dtype} batch {batch}: {times}", flush=True)
                if cuda and not args.quick:
                    for text, met in judge(row):
                        missed += not met
                        print(f"{'met   ' if met else 'MISSED'} {text}", flush=True)
    if not cuda or args.quick:
        print("no GPU or --quick: no target is judged")
    result = {"environment": environment(args.device), "quick": args.quick, "channels_last": args.channels_last}
    result |= {"compiled": args.compile, "freeze_at": args.freeze_at, "repeats": args.repeats, "rows": rows}
    write(result, args, "train_step_{}" + "_channels_last" * args.channels_last + "_compiled" * args.compile)
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
