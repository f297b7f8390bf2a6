"""Scalars that a training forward leaves behind, without waiting for the device."""

from __future__ import annotations

import math
from collections import deque

from torch import Tensor

#: Values kept per name between two :meth:`Metrics.pop`.
_KEEP = 256


class Metrics:
    """Named scalars, averaged over the forwards since the last :meth:`pop`.

    Args:
        parent: keep the scalars there, with names that begin with ``scope``.
        scope: such as "stage0/".
    """

    def __init__(self, parent: Metrics | None = None, scope: str = "") -> None:
        self._values: dict[str, deque[Tensor | float]] = {} if parent is None else parent._values
        self._scope = scope

    def put(self, name: str, value: Tensor | float) -> None:
        """Store one value; nan means that it is not defined this time (no foreground ...)."""
        if isinstance(value, Tensor):
            value = value.detach()
        self._values.setdefault(self._scope + name, deque(maxlen=_KEEP)).append(value)

    def pop(self) -> dict[str, float]:
        """Means of the defined values, and forget them."""
        means = {}
        for name, values in self._values.items():
            defined = [v for v in map(float, values) if not math.isnan(v)]
            if defined:
                means[name] = sum(defined) / len(defined)
        self._values.clear()
        return means
