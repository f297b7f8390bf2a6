"""Anchors: one set of cell anchors per feature level, repeated at every cell.

Cell anchors are centered on 0, not rounded, sizes outer and aspect ratios (height / width) inner. Strides are those
the backbone declares, not image size / grid size: the two differ on odd image sizes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gn_det.errors import ConfigError


def cell_anchors(sizes: Sequence[float], aspect_ratios: Sequence[float]) -> Tensor:
    """(len(sizes) * len(aspect_ratios), 4) float32 anchors around (0, 0); a size is the square root of an area."""
    anchors = []
    for size in sizes:
        for ratio in aspect_ratios:
            width = math.sqrt(size**2.0 / ratio)
            height = ratio * width
            anchors.append([-width / 2.0, -height / 2.0, width / 2.0, height / 2.0])
    return torch.tensor(anchors, dtype=torch.float32)


def _per_level(values: Sequence[Any], num_levels: int, key: str) -> list[Sequence[float]]:
    if len(values) and not isinstance(values[0], Sequence):
        return [values] * num_levels
    if len(values) == 1:
        return [values[0]] * num_levels
    if len(values) != num_levels:
        raise ConfigError(
            f"MODEL.ANCHOR_GENERATOR.{key} has {len(values)} entries but MODEL.RPN.IN_FEATURES {num_levels}"
        )
    return list(values)


class AnchorGenerator(nn.Module):
    """Anchors of all levels.

    Args:
        sizes: per level (or one list for all levels) the anchor sizes in pixels.
        aspect_ratios: per level (or one list for all levels) height / width.
        strides: of the levels, pixels per cell.
        offset: of the first cell's center from the image corner, in strides, within [0, 1).

    Raises:
        ConfigError: list lengths that fit neither rule, or levels with different numbers of anchors per cell.
    """

    def __init__(
        self,
        *,
        sizes: Sequence[Sequence[float]] | Sequence[float],
        aspect_ratios: Sequence[Sequence[float]] | Sequence[float],
        strides: Sequence[int],
        offset: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0.0 <= offset < 1.0:
            raise ConfigError(f"MODEL.ANCHOR_GENERATOR.OFFSET {offset}: must be at least 0 and below 1")
        self.strides = tuple(strides)
        self.offset = offset
        num_levels = len(self.strides)
        level_sizes = _per_level(sizes, num_levels, "SIZES")
        level_ratios = _per_level(aspect_ratios, num_levels, "ASPECT_RATIOS")
        counts = set()
        for k in range(num_levels):
            cell = cell_anchors(level_sizes[k], level_ratios[k])
            self.register_buffer(f"cell{k}", cell, persistent=False)
            counts.add(len(cell))
        if len(counts) != 1:
            raise ConfigError("MODEL.ANCHOR_GENERATOR: every level needs the same number of sizes times aspect ratios")
        #: anchors per cell
        self.num_anchors = counts.pop()

    def forward(self, grid_sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Per level (rows * columns * anchors per cell, 4) float32, in the order row, column, anchor."""
        anchors = []
        for k, ((rows, columns), stride) in enumerate(zip(grid_sizes, self.strides)):
            cell = getattr(self, f"cell{k}")
            start = self.offset * stride
            xs = torch.arange(start, columns * stride, step=stride, dtype=torch.float32, device=cell.device)
            ys = torch.arange(start, rows * stride, step=stride, dtype=torch.float32, device=cell.device)
            y, x = torch.meshgrid(ys, xs, indexing="ij")
            shifts = torch.stack((x, y, x, y), dim=-1).view(-1, 1, 4)
            anchors.append((shifts + cell).view(-1, 4))
        return anchors
