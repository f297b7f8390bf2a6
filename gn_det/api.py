"""Python API: train, evaluate, load a trained model, and detect objects on images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from gn_det.checkpoint.meta import config_of_checkpoint
from gn_det.config import load_config
from gn_det.config.check import check_config
from gn_det.config.load import Overrides, merge_overrides
from gn_det.engine import choice, run
from gn_det.engine.loop import Hook
from gn_det.engine.predictor import Predictor, load_predictor, select, wanted_classes
from gn_det.errors import ConfigError
from gn_det.result import ImageLike, Images, Result, checked_images, checked_threshold

if TYPE_CHECKING:
    import torch
    from fvcore.common.config import CfgNode
    from torch import nn


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
            One :class:`Result`, or a list of them in the order of ``images``.

        Raises:
            DataError: an image is missing, damaged or not of the expected form, or the list is empty.
            ConfigError: the threshold is out of range, or a class name is unknown.
        """
        checked_threshold(threshold)
        wanted = wanted_classes(classes, self.class_names)
        results = [self._predict_one(image, threshold, wanted) for image in checked_images(images)]
        return results if isinstance(images, (list, tuple)) else results[0]

    def _predict_one(self, image: Path | np.ndarray, threshold: float, wanted: set[int] | None) -> Result:
        found = select(self._predictor.detect(image), threshold, wanted)
        return Result(
            boxes=found.boxes.float().numpy(),
            scores=found.scores.float().numpy(),
            classes=found.classes.numpy(),
            masks=None if found.masks is None else found.masks.numpy(),
            image_size=found.image_size,
            class_names=self.class_names,
            category_ids=self.category_ids,
            _source=image,
            _read=self._predictor.read,
        )


def train(
    config: CfgNode | str | os.PathLike[str],
    overrides: Overrides = (),
    *,
    engine: str = "auto",
    resume: bool = False,
    overwrite: bool = False,
    hooks: Sequence[Hook] = (),
    num_gpus: int = 1,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
) -> dict[str, float]:
    """Train and evaluate, as ``gn-det train`` does; everything is written to ``OUTPUT_DIR``.

    A script that calls this with several GPUs or data workers needs ``if __name__ == "__main__":``.

    Args:
        config: a path, the name of a shipped config, or what :func:`load_config` returned; it is not changed.
        overrides: values of keys, such as ``{"SOLVER.EPOCHS": 12, "OUTPUT_DIR": "output/a"}``.
        engine: ``"auto"`` (Detectron2 where it is installed), ``"embedded"`` or ``"detectron2"``.
        resume: continue from the newest checkpoint in OUTPUT_DIR; start where there is none.
        overwrite: replace an earlier run in OUTPUT_DIR.
        hooks: your own :class:`gn_det.engine.loop.Hook` objects.
        num_gpus: processes on this machine, one per GPU.
        num_machines: machines that take part; each makes this call with its own ``machine_rank``.
        machine_rank: 0-based number of this machine.
        dist_url: ``tcp://host:port`` of machine 0; ``"auto"`` on one machine.

    Returns:
        Metrics of the last evaluation in percent, such as ``{"bbox/AP": 40.3, "segm/AP": 35.7}``; empty without a
        test set.

    Raises:
        UserError: the config, data, weights or folder cannot be used, or the run was interrupted.
    """
    chosen = choice.choose(engine)
    cfg = _resolved(config, overrides, chosen.name)
    return run.train(
        cfg,
        choice.load(chosen),
        resume=resume,
        overwrite=overwrite,
        hooks=hooks,
        num_gpus=num_gpus,
        num_machines=num_machines,
        machine_rank=machine_rank,
        dist_url=dist_url,
    )


def evaluate(
    config: CfgNode | str | os.PathLike[str] | None = None,
    overrides: Overrides = (),
    *,
    weights: str | os.PathLike[str] | None = None,
    engine: str = "auto",
    num_gpus: int = 1,
) -> dict[str, float]:
    """Evaluate weights on the test sets of a config, as ``gn-det eval`` does.

    Args:
        config: as for :func:`train`; None takes the config stored in ``weights``.
        overrides: values of keys, such as ``{"DATASETS.VAL_JSON": "b.json", "DATASETS.VAL_IMAGES": "imgs"}``.
        weights: takes the place of ``MODEL.WEIGHTS``.
        engine: as for :func:`train`.
        num_gpus: processes on this machine, one per GPU.

    Returns:
        COCO metrics in percent, such as ``{"bbox/AP": 40.3, "segm/AP": 35.7}``.

    Raises:
        UserError: no weights or no test set is given, or they cannot be used.
    """
    if config is None and weights is None:
        raise ConfigError("evaluate needs weights, a config, or both")
    chosen = choice.choose(engine)
    cfg = _resolved(config_of_checkpoint(weights) if config is None and weights else config, overrides, chosen.name)
    if weights is not None:
        merge_overrides(cfg, {"MODEL.WEIGHTS": os.fspath(weights)})
    return run.evaluate(cfg, choice.load(chosen), num_gpus=num_gpus)


def _resolved(config: Any, overrides: Overrides, engine: str) -> CfgNode:
    """An own copy of ``config`` with ``overrides``, checked for ``engine``."""
    cfg = load_config(config, check=False) if isinstance(config, (str, os.PathLike)) else config.clone()
    cfg.defrost()
    merge_overrides(cfg, overrides, "overrides")
    check_config(cfg, engine)
    return cfg


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
