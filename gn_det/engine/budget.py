"""``SOLVER.MAX_HOURS``: end in time, with a checkpoint that was evaluated."""

from __future__ import annotations

import time


class TimeBudget:
    """How much of the hours is left, by a clock that only goes forwards.

    Args:
        hours: from now on; 0 is no limit.

    Attributes:
        reserve: seconds kept back for what comes after the last iteration; the longest evaluation so far.
    """

    def __init__(self, hours: float) -> None:
        self.hours = hours
        self.reserve = 0.0
        self._start = time.monotonic()

    def note_evaluation(self, seconds: float) -> None:
        """An evaluation took that long."""
        self.reserve = max(self.reserve, seconds)

    def used_up(self) -> bool:
        """Whether it is time to evaluate, save and end."""
        return self.hours > 0 and time.monotonic() - self._start + self.reserve >= self.hours * 3600
