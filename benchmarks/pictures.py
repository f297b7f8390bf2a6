"""Draw README's two pictures from result files: the norms alone, and the whole training step.

    python benchmarks/pictures.py benchmarks/results/group_norm_<gpu>.json benchmarks/results/train_step_<gpu>.json
    # writes docs/group_norm.png and docs/train_step.png, with device, versions and date below each

A file made with --quick or without a GPU is refused unless --try is given: its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

DOCS = Path(__file__).resolve().parents[1] / "docs"
#: way in group_norm.py, side in train_step.py -> (what a reader calls it, color)
WAYS = {
    "fused": ("gn_det, fused", "#1f77dc"),
    "frozen BN": ("frozen BN", "#9a9a9a"),
    "nn.GroupNorm": ("nn.GroupNorm", "#ff7f0e"),
    "nn.GroupNorm autocast": ("nn.GroupNorm under autocast", "#c2410c"),
}
SIDES = {
    "bn*": ("BN*", "#9a9a9a"),
    "gn": ("GN", "#1f77dc"),
    "gn recompute": ("GN, RECOMPUTE", "#7db4f0"),
    "gn torch": ("nn.GroupNorm", "#ff7f0e"),
}


def read(path: str, kind: str, attempt: bool) -> dict[str, Any]:
    """A result file of the benchmark ``kind``; ends with a sentence if it is none, or not worth drawing."""
    try:
        result: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
        key = {"group_norm": "forward_us", "train_step": "train_s"}[kind]
        usable = bool(result["rows"]) and all(key in row for row in result["rows"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        sys.exit(f"{path}: cannot be read as a result of benchmarks/{kind}.py ({error})")
    if not usable:
        sys.exit(f"{path}: is not a result of benchmarks/{kind}.py")
    if (result["quick"] or not result["environment"]["cuda"]) and not attempt:
        sys.exit(
            f"{path}: was made with --quick or without a GPU; its times are no result (--try draws it all the same)"
        )
    return result


def finish(figure: Figure, result: dict[str, Any], path: Path) -> None:
    """Say where and when it was measured, and write the picture."""
    of = result["environment"]
    versions = f"torch {of['torch']}, CUDA {of['cuda']}, Triton {of.get('triton', '-')}"
    where = f"{of['device']}, {versions}, {of['date']}"
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=len(labels), frameon=False, fontsize=8, title=where,
                  title_fontsize=8, alignment="left")  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    print(f"written to {path}")


def bars(axes: Any, groups: Sequence[str], series: dict[str, tuple[str, str, Sequence[float | None]]]) -> None:
    """Grouped horizontal bars, one color a series, first group on top; ``series`` holds (label, color, values)."""
    height = 0.8 / len(series)
    for k, (label, color, values) in enumerate(series.values()):
        places = [i + (k - (len(series) - 1) / 2) * height for i in range(len(groups))]
        axes.barh(places, [v or 0.0 for v in values], height, label=label, color=color)
    axes.set_yticks(range(len(groups)), groups, fontsize=8)
    axes.set_ylim(len(groups) - 0.4, -0.6)
    axes.grid(axis="x", color="#e6e6e6")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def draw_norms(result: dict[str, Any], path: Path) -> None:
    """Forward and backward of every layer, in bf16 where there is some, as a multiple of frozen BN's time."""
    rows = result["rows"]
    dtype = "bfloat16" if any(r["dtype"] == "bfloat16" for r in rows) else rows[0]["dtype"]
    layout = next(r["layout"] for r in rows if r["dtype"] == dtype)
    rows = [r for r in rows if r["dtype"] == dtype and r["layout"] == layout]
    figure = Figure(figsize=(11, 1.2 + 0.42 * len(rows)), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    groups = [f"{r['count']} x {r['name']} {'x'.join(map(str, r['shape']))}" for r in rows]
    for axes, which in zip(figure.subplots(1, 2, sharey=True), ("forward", "backward")):
        known = [w for w in WAYS if all(w in r[f"{which}_us"] for r in rows)]
        times = {w: [r[f"{which}_us"][w][0] / r[f"{which}_us"]["frozen BN"][0] for r in rows] for w in known}
        bars(axes, groups, {w: (*WAYS[w], times[w]) for w in known})
        axes.axvline(1, color="#333333", linewidth=0.8)
        axes.set_title(f"{which}, time / eager frozen BN", loc="left", fontsize=10)
    figure.suptitle(f"Norm (+ add) + ReLU of Mask R-CNN R-50-FPN, {dtype}, {layout}", fontweight="bold")
    finish(figure, result, path)


def draw_steps(result: dict[str, Any], path: Path) -> None:
    """Seconds of a training step and of inference, and peak memory, per model, dtype and batch."""
    rows = result["rows"]
    figure = Figure(figsize=(12, 1.3 + 0.75 * len(rows)), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    groups = [f"{r['model'].upper()} {r['dtype']} batch {r['batch']}" for r in rows]
    columns = {
        "training step, s": lambda r, s: r["train_s"][s][0],
        "peak memory, GB": lambda r, s: r["peak_gb"][s],
        "inference, s a batch": lambda r, s: r["inference_s"][s][0],
    }
    for axes, (title, value) in zip(figure.subplots(1, 3, sharey=True), columns.items()):
        bars(axes, groups, {s: (*SIDES[s], [value(r, s) for r in rows]) for s in SIDES})
        axes.set_title(title, loc="left", fontsize=10)
    figure.suptitle("Mask R-CNN at 800x1333, the same heads on all sides", fontweight="bold")
    finish(figure, result, path)


def main(argv: Sequence[str] | None = None) -> int:
    """Read both files, write both pictures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("group_norm", help="result of benchmarks/group_norm.py")
    parser.add_argument("train_step", help="result of benchmarks/train_step.py")
    parser.add_argument("--output", type=Path, default=DOCS, help="folder; default docs")
    parser.add_argument("--try", dest="attempt", action="store_true", help="draw whatever the files hold")
    args = parser.parse_args(argv)
    norms, steps = (
        read(p, k, args.attempt) for p, k in ((args.group_norm, "group_norm"), (args.train_step, "train_step"))
    )
    draw_norms(norms, args.output / "group_norm.png")
    draw_steps(steps, args.output / "train_step.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
