"""Python API: load a trained model and detect objects on images; train and evaluate are the engine's."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, overload

import numpy as np

from gn_det.engine.run import evaluate, train
from gn_det.prediction.predictor import Predictor, Selection, load_predictor
from gn_det.result import ImageLike, Images, Result, checked_images, checked_threshold, wanted_classes

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["Model", "evaluate", "load_model", "train"]


class Model:
    """A trained detector, ready to predict; made by :func:`load_model`.

    Attributes:
        class_names: name of each class index.
        category_ids: category id of each class index, as in the training json.
        config: the resolved configuration (a CfgNode).
        module: the ``torch.nn.Module``, in evaluation mode.
    """

    def __init__(self, predictor: Predictor) -> None:
        assert predictor.module is not None
        self._predictor = predictor
        self.class_names = tuple(predictor.class_names)
        self.category_ids = tuple(predictor.category_ids)
        self.config = predictor.config
        self.module: nn.Module = predictor.module

    @property
    def device(self) -> torch.device:
        """Device that the model runs on."""
        return next(self.module.parameters()).device

    @overload
    def predict(self, images: ImageLike, *, threshold: float = ..., classes: Sequence[str] | None = ...) -> Result: ...

    @overload
    def predict(
        self, images: Images, *, threshold: float = ..., classes: Sequence[str] | None = ...
    ) -> list[Result]: ...

    def predict(
        self,
        images: ImageLike | Images,
        *,
        threshold: float = 0.5,
        classes: Sequence[str] | None = None,
    ) -> Result | list[Result]:
        """Detect objects on one image, or on each image of a list.

        Args:
            images: a path, a PIL image or an (H, W, 3) uint8 array in RGB order (OpenCV frames are BGR: pass
                ``frame[:, :, ::-1]``); or a list or tuple of these. EXIF orientation is applied.
            threshold: keep detections with at least this score, in [0, 1].
            classes: keep these class names only; None keeps all.

        Returns:
            One ``Result`` for one image, or a list of them in the order of ``images``.

        Raises:
            DataError: an image is missing, damaged or not of the expected form, or the list is empty.
            ConfigError: the threshold is out of range, or a class name is unknown.
        """
        checked_threshold(threshold)
        wanted = wanted_classes(classes, self.class_names)
        results = [self._predict_one(image, threshold, wanted) for image in checked_images(images)]
        return results if isinstance(images, (list, tuple)) else results[0]

    def _predict_one(self, image: Path | np.ndarray, threshold: float, wanted: set[int] | None) -> Result:
        found = Selection(threshold, wanted)(self._predictor.detect(image))
        return Result(
            boxes=found.boxes,
            scores=found.scores,
            classes=found.classes,
            masks=found.masks,
            image_size=found.image_size,
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
        ConfigError: the config or the device cannot be used.
    """
    return Model(load_predictor(weights, config=None if config is None else os.fspath(config), device=device))
