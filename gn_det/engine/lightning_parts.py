"""What Lightning's two faces, the trainer of detectors and the Fabric of classifiers, are told alike."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from gn_det.engine import dist


def process_layout(device: str) -> tuple[str, Any, int]:
    """(accelerator, devices, nodes) for the processes that run already; ``device`` as "cpu", "cuda" or "cuda:N"."""
    kind, _, index = device.partition(":")
    accelerator = "gpu" if kind == "cuda" else "cpu"
    if dist.world_size() == 1:
        return accelerator, [int(index)] if index else 1, 1
    local = int(os.environ.get("LOCAL_WORLD_SIZE", dist.world_size()))
    return accelerator, local, dist.world_size() // local


def backend(accelerator: str) -> str:
    """How gradients travel."""
    return "nccl" if accelerator == "gpu" else "gloo"


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Lightning's banners, tips and warnings about choices that are ours, silenced."""
    loggers = [logging.getLogger(name) for name in ("lightning", "lightning.pytorch", "lightning.fabric")]
    levels = [one.level for one in loggers]
    for one in loggers:
        one.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"lightning.*")
            warnings.filterwarnings("ignore", message=r".*lr_scheduler\.step\(\).*")
            yield
    finally:
        for one, level in zip(loggers, levels):
            one.setLevel(level)
