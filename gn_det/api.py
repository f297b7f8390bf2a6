"""Python API: load a trained model and detect objects on images; train and evaluate are the engine's."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gn_det.engine.run import evaluate, train
from gn_det.prediction.predictor import Predictor, Selection, load_predictor
from gn_det.result import ImageModel, Result, checked_path

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["Model", "evaluate", "load_model", "train"]


class Model(ImageModel):
    """A trained detector, ready to predict; made by :func:`load_model`.

    Attributes:
        config: the resolved configuration (a CfgNode).
        module: the ``torch.nn.Module``, in evaluation mode.
    """

    def __init__(self, predictor: Predictor) -> None:
        assert predictor.module is not None
        self._predictor, self._thresholds = predictor, predictor.thresholds
        self.class_names = tuple(predictor.class_names)
        self.category_ids = tuple(predictor.category_ids)
        self.config = predictor.config
        self.module: nn.Module = predictor.module

    @property
    def device(self) -> torch.device:
        """Device that the model runs on."""
        return next(self.module.parameters()).device

    def _predict_one(
        self, image: Path | np.ndarray, lowest: float | Sequence[float], wanted: set[int] | None
    ) -> Result:
        found = Selection(lowest, wanted)(self._predictor.detect(image))
        return Result(
            **vars(found),
            class_names=self.class_names,
            category_ids=self.category_ids,
            _source=image,
            _read=self._predictor.reader.read,
        )


def load_model(
    weights: str | os.PathLike[str], *, config: str | os.PathLike[str] | None = None, device: str = "auto"
) -> Model:
    """Load a trained detector.

    Args:
        weights: a checkpoint written by gn_det, which stores its config and class names; or any other weights that
            ``MODEL.WEIGHTS`` accepts, together with ``config``.
        config: path or shipped name of a config; None takes the one stored in the checkpoint.
        device: ``"auto"`` (the GPU if there is one), ``"cpu"``, ``"cuda"`` or ``"cuda:N"``.

    Raises:
        WeightsError: the file is missing, unreadable, stores no config and none is given, or does not fill the model.
        ConfigError: the config or the device cannot be used, or an argument is not a path.
    """
    weights = checked_path(weights, "weights", "output/model_best.pth")
    config = None if config is None else checked_path(config, "config", "gn_fpn.yaml")
    return Model(load_predictor(weights, config=config, device=device))
