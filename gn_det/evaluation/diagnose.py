"""Why an AP is 0 or undefined, in plain sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gn_det.evaluation.ground_truth import GroundTruth


def explain(
    metrics: Mapping[str, Mapping[str, float]],
    gt: GroundTruth,
    results: Sequence[Mapping[str, Any]],
    category_ids: Sequence[int],
) -> list[str]:
    """Sentences, most likely cause first; empty when every number is defined and above zero."""
    return []
