"""GroupNorm + add + ReLU alone: the fused kernels against torch's modules and against frozen BN.

Every norm layer of a Mask R-CNN R-50-FPN with 4conv1fc head at 800x1344, in each dtype and layout, forward and
backward: time (median, p20, p80), GB/s, percent of a copy measured in the same run, the same for frozen BN and
nn.GroupNorm (eager, compiled, under autocast), launches, saved and peak bytes, error in units in the last
place of fp64, bit identity over 10 runs, and kernels compiled over 50 random sizes. Ends with the targets, each met or
MISSED.

    python benchmarks/group_norm.py                      # needs a GPU; writes benchmarks/results/group_norm_<gpu>.json
    python benchmarks/group_norm.py --dtypes bfloat16 --layouts channels_last
    python benchmarks/group_norm.py --quick              # tiny, any machine: checks that it runs, times mean nothing

On a machine without a GPU "fused" is what a CPU runs (native.cpp, or the formulas in plain torch), and no target is
judged.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gn_det.kernels import launch, ops
from gn_det.norm import FrozenBatchNorm2d

assert ops
RESULTS = Path(__file__).parent / "results"
EPS, GROUPS = 1e-5, 32
LAYOUTS = {"nchw": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
#: maps from here on must reach the bandwidth targets
LARGE_BYTES = 8e6


@dataclass(frozen=True)
class Layer:
    """``count`` norm layers of one shape; ``residual`` is added after the norm, ``relu`` comes last."""

    name: str
    count: int
    shape: tuple[int, int, int, int]
    residual: bool
    relu: bool

    @property
    def elements(self) -> int:
        n, c, h, w = self.shape
        return n * c * h * w


def layers(height: int = 800, width: int = 1344, box: int = 512, mask: int = 128) -> list[Layer]:
    """The 69 norms of R-50-FPN (stride in the 3x3) with 4 box and 4 mask convolutions, for one image."""
    found = [Layer("stem", 1, (1, 64, height // 2, width // 2), False, True)]
    for k, blocks in zip(range(2, 6), (3, 4, 6, 3)):
        h, w, inner = height >> k, width >> k, 64 << (k - 2)
        first = (h, w) if k == 2 else (2 * h, 2 * w)
        found += [
            Layer(f"res{k} conv1 first", 1, (1, inner, *first), False, True),
            Layer(f"res{k} inner", 2 * blocks - 1, (1, inner, h, w), False, True),
            Layer(f"res{k} conv3", blocks, (1, 4 * inner, h, w), True, True),
            Layer(f"res{k} shortcut", 1, (1, 4 * inner, h, w), False, False),
            Layer(f"fpn lateral{k}", 1, (1, 256, h, w), k < 5, False),
            Layer(f"fpn output{k}", 1, (1, 256, h, w), False, False),
        ]
    found.append(Layer("box head", 4, (box, 256, 7, 7), False, True))
    found.append(Layer("mask head", 4, (mask, 256, 14, 14), False, True))
    return found


def passes(layer: Layer, small: bool) -> tuple[int, int]:
    """Reads and writes of the whole tensor that the fused kernels need, forward and backward."""
    if small:  # x is read once
        return 2 + layer.residual, 3 + (2 if layer.residual and layer.relu else 0)
    return 3 + layer.residual, 7 if layer.residual and layer.relu else 5


Way = Callable[[Tensor, Tensor | None, bool], Tensor]


def _tail(y: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
    if residual is not None:
        y = y + residual
    return F.relu_(y) if relu else y


def make_ways(channels: int, device: str, dtype: torch.dtype, compiled: bool) -> dict[str, Way]:
    """What is compared; gamma and beta are fp32 where autocast would leave them so."""
    gn = nn.GroupNorm(GROUPS, channels, EPS).to(device)
    low = nn.GroupNorm(GROUPS, channels, EPS).to(device, dtype)
    frozen = FrozenBatchNorm2d(channels).to(device, dtype)
    kind = torch.device(device).type

    def fused(x: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
        y: Tensor = torch.ops.gn_det.group_norm_act(x, gn.weight, gn.bias, residual, GROUPS, EPS, relu)[0]
        return y

    def under_autocast(x: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
        with torch.autocast(kind, dtype=torch.bfloat16 if dtype == torch.float32 else dtype):
            return _tail(gn(x), residual, relu)

    ways: dict[str, Way] = {
        "fused": fused,
        "frozen BN": lambda x, r, relu: _tail(frozen(x), r, relu),
        "nn.GroupNorm": lambda x, r, relu: _tail(low(x), r, relu),
    }
    if dtype != torch.float32:
        ways["nn.GroupNorm autocast"] = under_autocast
    if compiled:
        ways["frozen BN compiled"] = torch.compile(ways["frozen BN"])
        ways["nn.GroupNorm compiled"] = torch.compile(ways["nn.GroupNorm"])
    return ways


class Clock:
    """Microseconds of a function: CUDA events, with the L2 cache swept before each run unless ``warm``."""

    def __init__(self, device: str, repeats: int, warm: bool = False) -> None:
        self.cuda = device.startswith("cuda")
        self.repeats = repeats
        self.sweep = torch.empty(256 << 20, dtype=torch.int8, device=device) if self.cuda and not warm else None

    def once(self, function: Callable[[], Any], before: Callable[[], Any] | None = None) -> float:
        if before is not None:
            before()
        if not self.cuda:
            start = time.perf_counter()
            function()
            return (time.perf_counter() - start) * 1e6
        if self.sweep is not None:
            self.sweep.zero_()
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        function()
        last.record()
        torch.cuda.synchronize()
        return float(first.elapsed_time(last)) * 1e3

    def compare(
        self, functions: dict[str, tuple[Callable[[], Any], Callable[[], Any] | None]]
    ) -> dict[str, list[float]]:
        """[median, p20, p80] of each; they take turns, so that they share what disturbs the machine."""
        times: dict[str, list[float]] = {name: [] for name in functions}
        for k in range(-3, self.repeats):
            for name, (function, before) in functions.items():
                spent = self.once(function, before)
                if k >= 0:
                    times[name].append(spent)
        return {name: quantiles(t) for name, t in times.items()}


def quantiles(values: list[float]) -> list[float]:
    """Median, p20, p80."""
    ordered = sorted(values)
    return [statistics.median(ordered), ordered[len(ordered) // 5], ordered[-1 - len(ordered) // 5]]


def saved_bytes(function: Callable[[], Tensor]) -> int:
    """Bytes of distinct storages that a graph keeps."""
    kept: dict[int, Tensor] = {}

    def pack(t: Tensor) -> Tensor:
        kept.setdefault(t.untyped_storage().data_ptr(), t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        function()
    return sum(t.untyped_storage().nbytes() for t in kept.values())


def count_launches(function: Callable[[], Any]) -> int:
    """Kernels that a GPU runs."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as record:
        function()
        torch.cuda.synchronize()
    return sum(e.device_type.name == "CUDA" and "mem" not in e.name.lower() for e in record.events())


def error_in_ulp(y: Tensor, exact: Tensor) -> float:
    """Largest error, in units in the last place of the largest exact value."""
    top = float(exact.abs().max())
    unit = torch.finfo(y.dtype).eps * 2.0 ** (torch.tensor(top).log2().floor().item() if top > 0 else 0)
    return float((y.double() - exact).abs().max()) / unit


def variants() -> dict[str, int]:
    """Compiled versions of each kernel in this process."""
    from gn_det.kernels import triton_kernels

    found = {}
    for name in dir(triton_kernels):
        kernel = getattr(triton_kernels, name)
        caches = getattr(kernel, "device_caches", None)
        if name.endswith("_kernel") and caches is not None:
            per_device = [entry[0] if isinstance(entry, tuple) else entry for entry in caches.values()]
            found[name] = sum(len(cache) for cache in per_device)
    return found


def measure(layer: Layer, dtype: torch.dtype, layout: str, args: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """One row of the result file."""
    torch.manual_seed(0)

    def draw() -> Tensor:
        return torch.randn(layer.shape, device=args.device).to(dtype).contiguous(memory_format=LAYOUTS[layout])

    x, dy = draw().requires_grad_(), draw()
    residual = draw().requires_grad_() if layer.residual else None
    ways = make_ways(layer.shape[1], args.device, dtype, args.compiled)
    n, c, h, w = layer.shape
    small = launch.plan(n, c, h * w, GROUPS, layout == "channels_last").small
    size = layer.elements * x.element_size()
    target = torch.empty_like(x)
    copy = clock.compare({"copy": (lambda: target.copy_(x.detach()), None)})["copy"][0]
    row: dict[str, Any] = asdict(layer) | {"dtype": str(dtype)[6:], "layout": layout, "mbytes": size / 1e6}
    row |= {"copy_gb_s": 2 * size / copy / 1e3, "one_launch": small}
    graph: dict[str, Tensor] = {}

    def forward(name: str) -> Tensor:
        x.grad = None
        graph[name] = ways[name](x, residual, layer.relu)
        return graph[name]

    def backward(name: str) -> None:
        graph[name].backward(dy.to(graph[name].dtype))

    row["forward_us"] = clock.compare({n: (lambda n=n: forward(n), None) for n in ways})
    row["backward_us"] = clock.compare({n: (lambda n=n: backward(n), lambda n=n: forward(n)) for n in ways})
    for direction, count in zip(("forward", "backward"), passes(layer, small)):
        speed = count * size / row[f"{direction}_us"]["fused"][0] / 1e3
        row[f"{direction}_passes"] = count
        row[f"{direction}_gb_s"], row[f"{direction}_of_copy"] = speed, speed / row["copy_gb_s"]
    row["saved_bytes"] = {n: saved_bytes(lambda n=n: forward(n)) for n in ways}
    row |= correctness(layer, x, residual, dy, lambda: forward("fused"))
    if clock.cuda:
        row["launches"] = {
            n: [count_launches(lambda n=n: forward(n)), count_launches(lambda n=n: backward(n))] for n in ways
        }
        row["peak_bytes"] = {n: peak(lambda n=n: (forward(n), backward(n))) for n in ways}
    return row


def peak(function: Callable[[], Any]) -> int:
    """Peak bytes above what was allocated before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def correctness(
    layer: Layer, x: Tensor, residual: Tensor | None, dy: Tensor, forward: Callable[[], Tensor]
) -> dict[str, Any]:
    """Error against fp64, on the first sample, and whether 10 runs give the same bits."""
    exact_x = x.detach()[:1].double().requires_grad_()
    exact = _tail(
        F.group_norm(exact_x, GROUPS, eps=EPS), None if residual is None else residual[:1].double(), layer.relu
    )
    (exact_dx,) = torch.autograd.grad(exact, exact_x, dy[:1].double())
    runs = []
    for _ in range(10):
        y = forward()
        runs.append((y.detach(), torch.autograd.grad(y, x, dy)[0]))
    same = all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0]))
    errors = [error_in_ulp(runs[0][0][:1], exact.detach()), error_in_ulp(runs[0][1][:1], exact_dx)]
    return {"same_bits_10_runs": same, "error_ulp": {"y": errors[0], "dx": errors[1]}}


def random_sizes(device: str, count: int = 50) -> dict[str, int]:
    """Kernels compiled over ``count`` random image sizes, one dtype, layer and layout."""
    before = variants()
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        h, w = torch.randint(3, 260, (2,), generator=generator).tolist()
        x = torch.randn(1, 256, h, w, device=device, dtype=torch.bfloat16, requires_grad=True)
        gamma = torch.ones(256, device=device)
        torch.ops.gn_det.group_norm_act(x, gamma, gamma, None, GROUPS, EPS, True)[0].sum().backward()
    return {name: number - before.get(name, 0) for name, number in variants().items()}


def totals(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Microseconds of all layers, forward and backward, by way."""
    names = set.intersection(*(set(r["forward_us"]) for r in rows))
    return {n: sum(r["count"] * (r["forward_us"][n][0] + r["backward_us"][n][0]) for r in rows) for n in sorted(names)}


def judge(rows: list[dict[str, Any]], compiled: dict[str, int]) -> Iterator[tuple[str, bool]]:
    """The targets of bf16, each as (text, met)."""
    for layout in sorted({r["layout"] for r in rows}):
        own = [r for r in rows if r["dtype"] == "bfloat16" and r["layout"] == layout]
        if not own:
            continue
        large = [r for r in own if r["mbytes"] >= LARGE_BYTES / 1e6 and not r["one_launch"]]
        for direction, wanted in (("forward", 0.85), ("backward", 0.75)):
            for r in large:
                got = r[f"{direction}_of_copy"]
                yield f"{layout} {r['name']} {direction}: {got:.0%} of the copy, target {wanted:.0%}", got >= wanted
        for r in (r for r in own if r["name"].endswith("head")):
            ours, theirs = (r["forward_us"][n][0] + r["backward_us"][n][0] for n in ("fused", "nn.GroupNorm"))
            yield f"{layout} {r['name']}: {ours:.0f} us, nn.GroupNorm + ReLU {theirs:.0f} us", ours <= theirs
        sums = totals(own)
        ratio = sums["fused"] / sums["frozen BN"]
        yield f"{layout} all 69 norms: {ratio:.2f} of eager frozen BN, target <= 1.0", ratio <= 1.0
        ratio = sums["nn.GroupNorm autocast"] / sums["fused"]
        yield f"{layout} all 69 norms: {ratio:.2f}x faster than nn.GroupNorm under autocast, target >= 3", ratio >= 3
    same = all(r["same_bits_10_runs"] for r in rows)
    yield f"bit-identical over 10 runs: {same}", same
    worst = max(max(r["error_ulp"].values()) for r in rows if r["dtype"] == "bfloat16") if rows else 0.0
    yield f"largest error in bf16: {worst:.2f} ulp of the largest value, target <= 1", worst <= 1
    for name, number in compiled.items():
        yield f"{name}: {number} variants over 50 random sizes, target <= 2", number <= 2


def environment(device: str) -> dict[str, Any]:
    """Where and with what."""
    with contextlib.suppress(ImportError):
        import triton

        return _environment(device) | {"triton": triton.__version__}
    return _environment(device)


def _environment(device: str) -> dict[str, Any]:
    cuda = device.startswith("cuda")
    return {
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "device": torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if cuda else None,
        "fused": "Triton kernels" if cuda or launch.interpreted() else "native.cpp or plain torch",
    }


def write(result: dict[str, Any], args: argparse.Namespace, name: str) -> None:
    """``result`` as json to ``--output``; without it, a whole run on a GPU goes to RESULTS, its name in ``name``."""
    output: Path | None = args.output
    if output is None and args.device.startswith("cuda") and not args.quick:
        output = RESULTS / f"{name.format(result['environment']['device'].replace(' ', '_'))}.json"
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"written to {output}")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtypes", default="bfloat16,float16,float32")
    parser.add_argument("--layouts", default="nchw,channels_last")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--warm", action="store_true", help="leave the L2 cache as it is between runs")
    parser.add_argument("--no-compiled", dest="compiled", action="store_false", help="leave torch.compile out")
    parser.add_argument("--quick", action="store_true", help="a few tiny maps, 2 runs: checks that it runs")
    parser.add_argument("--output", type=Path, help="json file; default benchmarks/results/group_norm_<gpu>.json")
    args = parser.parse_args(argv)
    if args.quick:
        args.repeats, args.compiled = 2, False
    return args


def main(argv: list[str] | None = None) -> int:
    """Measure, print, write json; 1 if a target that could be judged is missed."""
    args = parse(argv)
    cuda = args.device.startswith("cuda")
    wanted = layers(64, 96, 3, 2)[::9] if args.quick else layers()
    clock = Clock(args.device, args.repeats, args.warm)
    rows = []
    for dtype in args.dtypes.split(","):
        for layout in args.layouts.split(","):
            for layer in wanted:
                rows.append(row := measure(layer, DTYPES[dtype], layout, args, clock))
                times = ", ".join(
                    f"{n} {row['forward_us'][n][0]:.0f} + {row['backward_us'][n][0]:.0f}" for n in row["forward_us"]
                )
                print(f"{dtype} {layout} {layer.count} x {layer.name} {layer.shape}: {times} us", flush=True)
    result: dict[str, Any] = {"environment": environment(args.device), "quick": args.quick, "repeats": args.repeats}
    result |= {"warm_l2": args.warm, "rows": rows, "variants": random_sizes(args.device) if cuda else {}}
    missed = 0
    if cuda and not args.quick:
        for text, met in judge(rows, result["variants"]):
            missed += not met
            print(f"{'met   ' if met else 'MISSED'} {text}")
    else:
        print("no GPU or --quick: no target is judged")
    write(result, args, "group_norm_{}")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
