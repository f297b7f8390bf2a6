"""The numbers a table can show."""

from __future__ import annotations

from dataclasses import dataclass

METRIC, COST, SIZE = "metric", "cost", "size"


@dataclass(frozen=True)
class Column:
    """A number of a run.

    Attributes:
        heading: in tables.
        decimals: shown.
        what: "metric" (differs by seed), "cost" (of the machine), "size" (of the model).
        lower_is_better: an error rather than a precision.
        factor: multiplies the stored value for showing.
    """

    heading: str
    decimals: int = 1
    what: str = METRIC
    lower_is_better: bool = False
    factor: float = 1.0


def _ap(task: str) -> dict[str, Column]:
    suffixes = {"": "", "50": "50", "75": "75", "_s": " S", "_m": " M", "_l": " L"}
    return {f"{task}_ap{key}": Column(f"{task} AP{text}") for key, text in suffixes.items()}


COLUMNS: dict[str, Column] = {
    **_ap("box"),
    **_ap("mask"),
    "top1_error": Column("top-1 error (%)", lower_is_better=True),
    "train_error": Column("training error (%)", lower_is_better=True),
    "parameters": Column("parameters (M)", 2, SIZE, factor=1e-6),
    "s_per_iter": Column("s / iteration", 3, COST, lower_is_better=True),
    "memory_mb": Column("peak memory (MB)", 0, COST, lower_is_better=True),
    "s_per_image": Column("inference, ms / image", 2, COST, lower_is_better=True, factor=1e3),
}

#: The number that decides, by kind of row.
DECIDING = {"detect": "box_ap", "pretrain": "top1_error"}

#: Columns where a table names none.
USUAL = {
    "detect": (
        "box_ap",
        "box_ap50",
        "box_ap75",
        "mask_ap",
        "mask_ap50",
        "mask_ap75",
    ),
    "pretrain": ("top1_error", "train_error"),
}

#: Of the second table, on what a row takes.
TAKES = ("parameters", "s_per_iter", "memory_mb", "s_per_image")

#: Everything an evaluation tells about a detection row.
ALL_AP = tuple(name for name in COLUMNS if name.startswith(("box_", "mask_")))
