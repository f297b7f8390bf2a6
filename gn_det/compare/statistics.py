"""What a few runs tell: mean and spread over seeds, and whether a difference is larger than the noise."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

#: Level of every interval.
LEVEL = 0.95


@dataclass(frozen=True)
class Spread:
    """Mean over seeds.

    Attributes:
        mean: arithmetic mean.
        std: sample standard deviation (divided by n - 1); None with one value.
        n: number of values.
    """

    mean: float
    std: float | None
    n: int


@dataclass(frozen=True)
class Difference:
    """A row minus its baseline.

    Attributes:
        value: difference of the means over the seeds that were compared.
        half: half the width of the 95 % interval; None where the noise is not known.
        n: seeds of the row and of the baseline that were compared (the number of pairs where paired).
        paired: seed by seed, so that what a seed does to both rows cancels.
        assumed: one side has one seed, and is taken to spread as the other does.
    """

    value: float
    half: float | None
    n: tuple[int, int]
    paired: bool
    assumed: bool = False

    @property
    def beyond_noise(self) -> bool | None:
        """Whether the interval leaves zero out; None where the noise is not known."""
        return None if self.half is None else abs(self.value) > self.half


def spread(values: Mapping[int, float]) -> Spread | None:
    """Of the values by seed; None without any."""
    if not values:
        return None
    numbers = list(values.values())
    return Spread(statistics.fmean(numbers), statistics.stdev(numbers) if len(numbers) > 1 else None, len(numbers))


def difference(row: Mapping[int, float], baseline: Mapping[int, float]) -> Difference | None:
    """Row minus baseline with a t-interval.

    Seeds that both have are compared pair by pair (n - 1 degrees of freedom). Where fewer than two are shared but both
    sides have two or more values, Welch's interval for unequal variances is taken. A side with one value is taken to
    spread as the other does: the interval for one more value of n, t(n - 1) std sqrt(1 + 1/n). With one value on both
    sides the noise is not known.

    Args:
        row, baseline: a metric by seed.

    Returns:
        None where a side has no value.
    """
    shared = sorted(row.keys() & baseline.keys())
    if len(shared) > 1 or (len(shared) == 1 and max(len(row), len(baseline)) == 1):
        pairs = [row[seed] - baseline[seed] for seed in shared]
        n = len(pairs)
        half = None
        if n > 1:
            half = t_quantile(0.5 + LEVEL / 2, n - 1) * statistics.stdev(pairs) / math.sqrt(n)
        return Difference(statistics.fmean(pairs), half, (n, n), True)
    a, b = spread(row), spread(baseline)
    if a is None or b is None:
        return None
    if (a.n == 1) != (b.n == 1):
        return Difference(a.mean - b.mean, _one_more(a if b.n == 1 else b), (a.n, b.n), False, assumed=True)
    return Difference(a.mean - b.mean, _welch(a, b), (a.n, b.n), False)


def _one_more(known: Spread) -> float:
    """Half width of the interval in which one more value lies, about the mean of ``known.n`` > 1 values."""
    assert known.std is not None
    return t_quantile(0.5 + LEVEL / 2, known.n - 1) * known.std * math.sqrt(1 + 1 / known.n)


def _welch(a: Spread, b: Spread) -> float | None:
    """Half width of Welch's interval for the difference of two means."""
    if a.std is None or b.std is None:
        return None
    va, vb = a.std**2 / a.n, b.std**2 / b.n
    if va + vb == 0:
        return 0.0
    freedom = (va + vb) ** 2 / (va**2 / (a.n - 1) + vb**2 / (b.n - 1))
    return t_quantile(0.5 + LEVEL / 2, freedom) * math.sqrt(va + vb)


def t_quantile(p: float, freedom: float) -> float:
    """The value below which a t-distributed number lies with probability ``p`` in (0, 1); ``freedom`` > 0 degrees."""
    from scipy.special import stdtrit  # on use: it takes a while to import

    return float(stdtrit(freedom, p))
