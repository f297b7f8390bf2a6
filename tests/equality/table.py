"""The table at the end of ``make test-detectron2``: config families x checks, with the differences that were measured.

Tests record through the ``measured`` fixture; the records travel in pytest's reports, so they arrive from the worker
processes of xdist too. Needs no Detectron2.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

#: Golden case -> config family.
FAMILIES = {
    "gn_fpn": "FPN GN",
    "bn_fpn": "FPN BN*",
    "gn_c4": "C4 GN",
    "bn_c4": "C4 BN*",
    "gn_fpn_2fc": "2fc",
    "bn_fpn_4conv1fc": "4conv1fc",
    "gn_scratch": "scratch",
    "cascade": "Cascade GN",
}

#: Golden case -> the shipped config of its family, at full size.
SHIPPED = {
    "gn_fpn": "gn_fpn_long.yaml",
    "bn_fpn": "bn_fpn_r101.yaml",
    "gn_c4": "gn_c4.yaml",
    "bn_c4": "bn_c4.yaml",
    "gn_fpn_2fc": "bn_fpn.yaml",
    "bn_fpn_4conv1fc": "bn_fpn_4conv1fc.yaml",
    "gn_scratch": "gn_fpn_scratch_9x.yaml",
    "cascade": "gn_cascade_scratch_9x.yaml",
}

#: check -> (column title, what a test allows, in words).
CHECKS = {
    "inference": ("inference", "proposals, boxes, scores, classes, masks: 0"),
    "bf16": (
        "bf16 losses",
        "under bf16 autocast: 3e-2 (cascade: 0.2) relative, 0 with RoIs rounded as Detectron2 does",
    ),
    "bf16_inference": (
        "bf16 inf.",
        "under bf16 autocast, share of detections without a partner: 0.2; 0 difference in boxes, scores, classes and "
        "masks with RoIs, scores and masks rounded as Detectron2 rounds them",
    ),
    "losses": ("losses", "five losses: 1e-6 relative"),
    "gradients": ("gradients", "every gradient: 1e-5 of its norm"),
    "groups": ("groups", "optimizer groups in order, lr, decay: 0"),
    "lr": ("lr", "lr at every iteration: 0"),
    "mapper": ("mapper", "training samples: 0"),
    "curve": ("30 losses", "30 iterations of training, every loss: 1e-4"),
    "weights": ("weights", "the weights after them: 1e-3 of the way each tensor went"),
    "ap": ("AP", "AP of one checkpoint on both engines, each way: 0"),
}

PROPERTY = "gn_det_equality"


def collect(reports: Iterable[Any]) -> dict[tuple[str, str, str], float]:
    """(family, check, side) -> the largest recorded difference; a test that failed makes it infinite."""
    cells: dict[tuple[str, str, str], float] = {}
    for report in reports:
        for name, value in getattr(report, "user_properties", ()):
            if name == PROPERTY:
                family, check, side, off = value
                off = float("inf") if report.failed else float(off)
                cells[family, check, side] = max(off, cells.get((family, check, side), 0.0))
    return cells


def _cell(cells: dict[tuple[str, str, str], float], family: str, check: str) -> str:
    def text(side: str) -> str:
        off = cells.get((family, check, side))
        return "-" if off is None else "0" if off == 0 else "FAIL" if off == float("inf") else f"{off:.0e}"

    return f"{text('own')} / {text('registered')}"


def format_table(cells: dict[tuple[str, str, str], float]) -> str:
    """Rows are families, columns checks; a cell is "own / registered", "-" where nothing was run."""
    rows = [["family", *(title for title, _ in CHECKS.values())]]
    rows += [[family, *(_cell(cells, family, check) for check in CHECKS)] for family in FAMILIES.values()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    lines += [
        "",
        "Largest difference of the embedded engine to Detectron2's own modules / to gn_det's registered ones.",
    ]
    lines += [f"  {title}: {allowed}" for title, allowed in CHECKS.values()]
    return "\n".join(lines)
