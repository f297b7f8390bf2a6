"""Assign ground truth to boxes by IoU, and sample a training batch of them.

The random draws (one ``torch.randperm`` over the positives, then one over the negatives, per image) are those of
Detectron2: the same seed picks the same samples.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gn_det.errors import ConfigError

#: Label of a box that takes no part in training.
IGNORE = -1


class Matcher:
    """Labels boxes by the IoU with their best ground truth.

    Args:
        thresholds: increasing IoU thresholds, all positive.
        labels: one more label than thresholds, each -1 (ignore), 0 (negative) or 1 (positive): ``labels[i]`` goes
            to boxes with ``thresholds[i - 1] <= IoU < thresholds[i]``.
        allow_low_quality_matches: also make the boxes positive that overlap some ground truth best, ties included.
    """

    def __init__(
        self, thresholds: Sequence[float], labels: Sequence[int], *, allow_low_quality_matches: bool = False
    ) -> None:
        thresholds = list(thresholds)
        if not thresholds or thresholds[0] <= 0 or thresholds != sorted(thresholds):
            raise ConfigError(f"IOU_THRESHOLDS {thresholds}: must be positive and increasing")
        if len(labels) != len(thresholds) + 1 or any(label not in (-1, 0, 1) for label in labels):
            raise ConfigError(
                f"IOU_LABELS {list(labels)}: must be {len(thresholds) + 1} values of -1, 0, 1 "
                f"for IOU_THRESHOLDS {thresholds}"
            )
        self.bounds = [-float("inf"), *thresholds, float("inf")]
        self.labels = list(labels)
        self.allow_low_quality_matches = allow_low_quality_matches

    def __call__(self, iou: Tensor) -> tuple[Tensor, Tensor]:
        """Match each of N boxes.

        Args:
            iou: (M, N) of M ground truths and N boxes; M may be 0.

        Returns:
            (N,) int64 index of the best ground truth (0 where M is 0) and (N,) int8 labels.
        """
        if iou.numel() == 0:
            n = iou.shape[1]
            return iou.new_zeros(n, dtype=torch.int64), iou.new_full((n,), self.labels[0], dtype=torch.int8)
        best, matches = iou.max(dim=0)
        labels = torch.ones_like(matches, dtype=torch.int8)
        for label, low, high in zip(self.labels, self.bounds[:-1], self.bounds[1:]):
            labels.masked_fill_((best >= low) & (best < high), label)
        if self.allow_low_quality_matches:
            # A ground truth that no box overlaps has 0 as its best IoU, and every box that misses it ties for it.
            labels.masked_fill_((iou == iou.max(dim=1, keepdim=True).values).any(dim=0), 1)
        return matches, labels


def sample_labels(
    labels: Tensor, num_samples: int, positive_fraction: float, negative_label: int
) -> tuple[Tensor, Tensor]:
    """Draw a training batch: positives up to their quota, the rest negatives.

    Args:
        labels: (N,) with -1 for ignore, ``negative_label`` for negatives, anything else for positives.
        num_samples: wanted number; fewer when there are not enough.
        positive_fraction: quota of positives.
        negative_label: see above.

    Returns:
        Indices of positives and of negatives, int64, in drawn order.
    """
    positive = ((labels != IGNORE) & (labels != negative_label)).nonzero().squeeze(1)
    negative = (labels == negative_label).nonzero().squeeze(1)
    num_positive = min(positive.numel(), int(num_samples * positive_fraction))
    num_negative = min(negative.numel(), num_samples - num_positive)
    picked_positive = torch.randperm(positive.numel(), device=labels.device)[:num_positive]
    picked_negative = torch.randperm(negative.numel(), device=labels.device)[:num_negative]
    return positive[picked_positive], negative[picked_negative]
