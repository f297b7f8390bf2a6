"""Ways to compute GroupNorm + residual + ReLU, and RoIAlign, on a CPU in channels_last, against each other.

Each cell is the CPU time of a forward and backward pass relative to torch's own operations; the ways take turns, and
the median of the rounds counts. The maps are those of R-50-FPN at 480x640.

    python benchmarks/cpu_kernels.py --threads 1
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.ops import roi_align

from gn_det.kernels import dispatch, native, ops

assert ops  # registers the operators
RESULTS = Path(__file__).parent / "results"
#: shape, residual, ReLU
MAPS: tuple[tuple[tuple[int, int, int, int], bool, bool], ...] = (
    ((2, 64, 240, 320), False, True),
    ((2, 64, 120, 160), False, True),
    ((2, 256, 120, 160), True, True),
    ((2, 256, 120, 160), False, False),
    ((2, 1024, 30, 40), True, True),
    ((512, 256, 7, 7), False, True),
    ((128, 256, 14, 14), False, True),
)
GROUPS, EPS = 32, 1e-5


def plain(x: Tensor, w: Tensor, b: Tensor, res: Tensor | None, relu: bool) -> Tensor:
    """What runs without kernels."""
    return dispatch.plain(x, GROUPS, w, b, EPS, res, relu)


class Composition(torch.autograd.Function):
    """ATen's operators in place; the backward pass keeps x and y."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor, res: Tensor | None, relu: bool) -> Tensor:
        n, c, h, width = x.shape
        y, mean, rstd = torch.native_group_norm(x, w, b, n, c, h * width, GROUPS, EPS)
        if res is not None:
            y += res
        if relu:
            y.relu_()
        ctx.save_for_backward(x, w, mean, rstd, y if relu else None)
        ctx.has_residual = res is not None
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, w, mean, rstd, y = ctx.saved_tensors
        g = grads[0] if y is None else torch.ops.aten.threshold_backward(grads[0], y, 0)
        n, c, h, width = x.shape
        dx, dw, db = torch.ops.aten.native_group_norm_backward(
            g, x, mean, rstd, w, n, c, h * width, GROUPS, [True, True, True]
        )
        return dx, dw, db, g if ctx.has_residual else None, None


def composition(x: Tensor, w: Tensor, b: Tensor, res: Tensor | None, relu: bool) -> Tensor:
    y: Tensor = Composition.apply(x, w, b, res, relu)
    return y


def fused(x: Tensor, w: Tensor, b: Tensor, res: Tensor | None, relu: bool) -> Tensor:
    """native.cpp."""
    y: Tensor = torch.ops.gn_det.group_norm_act(x, w, b, res, GROUPS, EPS, relu)[0]
    return y


def inductor() -> Callable[..., Tensor]:
    """torch.compile of the plain function alone."""

    def whole(x: Tensor, w: Tensor, b: Tensor, res: Tensor | None, relu: bool) -> Tensor:
        y = F.group_norm(x, GROUPS, w, b, EPS)
        y = y if res is None else y + res
        return y.relu() if relu else y

    return torch.compile(whole, dynamic=False)


def take_turns(ways: dict[str, Callable[[], None]], rounds: int) -> dict[str, float]:
    """Median CPU seconds of each."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, run in ways.items():
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    return {name: float(np.median(values[1:])) for name, values in seconds.items()}


def norm_row(shape: tuple[int, int, int, int], res: bool, relu: bool, dtype: torch.dtype, args: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    maps = [torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last) for _ in range(3)]
    x, residual = (m.requires_grad_() for m in maps[:2])
    w, b = torch.rand(shape[1], requires_grad=True), torch.rand(shape[1], requires_grad=True)
    inputs = [x, w, b, *([residual] if res else [])]

    def step(way: Callable[..., Tensor]) -> Callable[[], None]:
        def run() -> None:
            torch.autograd.grad(way(x, w, b, residual if res else None, relu), inputs, maps[2])

        return run

    ways = {"plain": step(plain), "composition": step(composition), "native": step(fused)}
    if args.inductor:
        ways["inductor"] = step(inductor())
    return take_turns(ways, args.rounds)


def roi_row(count: int, size: int, dtype: torch.dtype, args: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    x = torch.randn(2, 256, 120, 160).to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    corner = torch.rand(count, 2) * torch.tensor([540.0, 380.0])
    rois = torch.cat([torch.arange(count)[:, None] % 2, corner, corner + torch.rand(count, 2) * 100], dim=1)

    def torchvision() -> None:
        y = roi_align(x.float(), rois, (size, size), 0.25, 0, True)
        torch.autograd.grad(y, x, torch.ones_like(y))

    def ours() -> None:
        y = native.roi_align(x, rois, size, 0.25, 0, True)
        torch.autograd.grad(y, x, torch.ones_like(y))

    return take_turns({"plain": torchvision, "native": ours}, args.rounds)


def main(argv: list[str] | None = None) -> int:
    """Print a table and write it; 2 without a compiler."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--inductor", action="store_true", help="also torch.compile, which takes a minute")
    parser.add_argument("--quick", action="store_true", help="two rounds on small maps: checks that it runs")
    parser.add_argument("--output", default="", help="json file; default benchmarks/results/cpu_kernels.json")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    if not native.available():
        print("no C++ compiler: there is nothing to compare")
        return 2
    maps, rois = MAPS, [(1024, 7), (256, 14)]
    if args.quick:
        maps, rois, args.rounds = (((2, 64, 6, 8), True, True),), [(8, 7)], 2
    rows: list[dict[str, Any]] = []
    for dtype in (torch.bfloat16, torch.float32):
        name = str(dtype).removeprefix("torch.")
        for shape, res, relu in maps:
            what = f"GN {'x'.join(map(str, shape))}{' + residual' * res}{' + ReLU' * relu}"
            rows.append({"what": what, "dtype": name, "seconds": norm_row(shape, res, relu, dtype, args)})
        for count, size in rois:
            what = f"RoIAlign, {count} RoIs of {size}x{size}"
            rows.append({"what": what, "dtype": name, "seconds": roi_row(count, size, dtype, args)})
    for row in rows:
        seconds = row["seconds"]
        ratios = ", ".join(f"{k} {v / seconds['plain']:.2f}" for k, v in seconds.items() if k != "plain")
        print(f"{row['dtype']:8s} {row['what']}: plain {1e3 * seconds['plain']:.1f} ms; ratios: {ratios}")
    from engine import environment

    output = Path(args.output or RESULTS / "cpu_kernels.json")
    output.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=1) + "\n")
    print(f"written to {output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
