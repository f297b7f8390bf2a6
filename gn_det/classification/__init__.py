"""Classification pre-training by the paper's recipe: backbones with BN, LN, IN or GN for detection configs.

``Settings`` needs no torch; ``pretrain`` loads it on use.
"""

from __future__ import annotations

from typing import Any

from gn_det.classification.settings import Settings

__all__ = ["Settings", "pretrain"]


def pretrain(settings: Settings, *, resume: bool = False, overwrite: bool = False, num_gpus: int = 1) -> dict[str, Any]:
    """Train a classifier and write its weights; see :func:`gn_det.classification.pretraining.pretrain`."""
    from gn_det.classification import pretraining as command

    return command.pretrain(settings, resume=resume, overwrite=overwrite, num_gpus=num_gpus)
