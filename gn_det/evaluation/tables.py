"""Results as text: the tables and the copy-paste lines that Detectron2 prints."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from gn_det.text import one_line

#: The metrics of one task, in Detectron2's order.
METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")

_PREFIX = "AP-"


def format_results(results: Mapping[str, Mapping[str, float]]) -> str:
    """Summary table and per-category table of each task, then the copy-paste lines."""
    blocks = []
    for task, metrics in results.items():
        blocks.append(f"Evaluation results for {task}:\n{metric_table(metrics)}")
        per_category = {k[len(_PREFIX) :]: v for k, v in metrics.items() if k.startswith(_PREFIX)}
        if per_category:
            blocks.append(f"Per-category {task} AP:\n{category_table(per_category)}")
    return "\n".join([*blocks, *copypaste_lines(results)])


def metric_table(metrics: Mapping[str, float]) -> str:
    """One-row pipe table of the overall metrics, percent with three decimals."""
    from tabulate import tabulate

    shown = {k: v for k, v in metrics.items() if not k.startswith(_PREFIX)}
    return tabulate(
        [list(shown.values())],
        headers=list(shown),
        tablefmt="pipe",
        floatfmt=".3f",
        stralign="center",
        numalign="center",
    )


def category_table(per_category: Mapping[str, float]) -> str:
    """Pipe table of category and AP, up to three pairs a row."""
    from tabulate import tabulate

    columns = min(6, 2 * len(per_category))
    flat = list(itertools.chain.from_iterable((one_line(name), ap) for name, ap in per_category.items()))
    rows = itertools.zip_longest(*[flat[i::columns] for i in range(columns)])
    headers = ["category", "AP"] * (columns // 2)
    return tabulate(rows, headers=headers, tablefmt="pipe", floatfmt=".3f", numalign="left")


def copypaste_lines(results: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Three ``copypaste:`` lines a task: its name, the metric names, the values with four decimals."""
    lines = []
    for task, metrics in results.items():
        shown = [(k, v) for k, v in metrics.items() if "-" not in k]
        lines.append(f"copypaste: Task: {task}")
        lines.append("copypaste: " + ",".join(k for k, _ in shown))
        lines.append("copypaste: " + ",".join(f"{v:.4f}" for _, v in shown))
    return lines
