"""Run a model over a loader and collect COCO results."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from gn_det.evaluation.results import CocoResults, ImageResults
from gn_det.structures import Detections, Sample


@dataclass(frozen=True)
class InferenceProgress:
    """Progress of an evaluation."""

    images: int  # images done on this rank
    total: int | None  # images of this rank, None if unknown
    seconds_per_image: float  # running average without the first batch, which warms up
    eta_seconds: float | None  # estimated seconds left, None if ``total`` is


def run_inference(
    model: Callable[[list[Sample]], list[Detections]],
    loader: Iterable[list[Sample]],
    category_ids: Sequence[int],
    *,
    on_progress: Callable[[InferenceProgress], None] | None = None,
    total: int | None = None,
) -> CocoResults:
    """Return the COCO results of every image of ``loader``; repeated images count once.

    Args:
        model: a module (switched to eval mode meanwhile), or any callable from samples to detections at original size.
        loader: yields lists of samples with ``image_id``.
        category_ids: json category id of each contiguous class index.
        on_progress: called after every batch.
        total: number of images, if known.
    """
    results = CocoResults()
    done = 0
    timed_from, timed_images = time.perf_counter(), 0
    was_training = isinstance(model, nn.Module) and model.training
    if isinstance(model, nn.Module):
        model.eval()
    try:
        with torch.inference_mode():
            for number, batch in enumerate(loader):
                for sample, det in zip(batch, model(batch), strict=True):
                    results.append(ImageResults.of(sample["image_id"], det, category_ids))
                done += len(batch)
                now = time.perf_counter()
                pace = (now - timed_from) / max(done - timed_images, 1)
                if number == 0:
                    timed_from, timed_images = now, done
                if on_progress is not None:
                    left = None if total is None else max(total - done, 0) * pace
                    on_progress(InferenceProgress(done, total, pace, left))
    finally:
        if was_training and isinstance(model, nn.Module):
            model.train()
    return results
