"""A trained model as a function from images to detections, and the selection of detections."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gn_det.data.image import ImageReader
from gn_det.errors import ConfigError, WeightsError
from gn_det.result import THRESHOLD, lowest_score, wanted_classes
from gn_det.structures import AnyDetections, ArrayDetections, MaskCrop, Sample, crop_mask, to_numpy

if TYPE_CHECKING:
    from fvcore.common.config import CfgNode
    from torch import nn

    from gn_det.config.load import Overrides
    from gn_det.engine.engines import Engine


@dataclass(frozen=True)
class Predictor:
    """A model and the names of its classes.

    Attributes:
        sample: path of an image, or an (H, W, 3) uint8 array in RGB order (OpenCV frames are BGR: pass
            ``frame[:, :, ::-1]``) -> what the model takes; raises DataError for an unreadable image.
    """

    sample: Callable[[Path | np.ndarray], Any]
    infer: Callable[[Any], AnyDetections]  # one sample -> its detections at the (upright) original size
    class_names: Sequence[str]
    category_ids: Sequence[int]  # of the json, for each class index
    reader: ImageReader = field(default_factory=lambda: ImageReader("RGB"))  # of the pixels for drawing
    module: nn.Module | None = None  # in evaluation mode
    config: CfgNode | None = None
    thresholds: Sequence[float] = ()  # of each class, as stored in the checkpoint; () if there are none
    gray: bool = False  # the model takes images of one channel

    def detect(self, image: Path | np.ndarray) -> AnyDetections:
        """Return the detections of one image; see ``sample`` and ``infer``."""
        return self.infer(self.sample(image))

    def load(self, path: Path) -> tuple[Any, np.ndarray]:
        """Return the model's input and the RGB pixels, decoding the file only once if possible."""
        pixels = self.reader.read(path)
        # For some modes, Pillow's conversion to gray differs from that via RGB.
        return self.sample(path if self.gray else pixels), pixels


def load_predictor(
    weights: str | os.PathLike[str],
    *,
    config: str | None = None,
    overrides: Overrides = (),
    device: str = "auto",
    engine: Engine | None = None,
    report: Callable[[str], None] | None = None,
) -> Predictor:
    """Build and load the model of a checkpoint; ``engine`` None prefers the embedded one.

    Args:
        report: receives what "auto" means on this machine; None logs it.

    Raises:
        WeightsError: unreadable file, no stored config and none given, or incomplete weights.
        ConfigError: unusable config or device.
    """
    import torch

    from gn_det.checkpoint.io import read_any
    from gn_det.checkpoint.meta import read_meta
    from gn_det.checkpoint.weights import load_weights
    from gn_det.checkpoint.weights_uri import local_path
    from gn_det.config import load_config, parse_config
    from gn_det.config.load import merge_overrides
    from gn_det.data.mapper import InferenceMapper
    from gn_det.engine.dist import resolve_device
    from gn_det.engine.heap import keep_freed_memory
    from gn_det.engine.precision import inference_autocast, lay_out_for_inference, settle

    meta = read_meta(read_any(local_path(weights)), weights) or {}
    if config is not None:
        cfg = load_config(config)
    elif meta.get("config"):
        cfg = parse_config(meta["config"], os.fspath(weights))
    else:
        text = "no config is stored in this file; give the one it was trained with (--config)"
        if _of_classifier(meta):
            text = (
                "these are weights of a classifier (gn-det classify), not of a detector; train a detector with them as "
                "MODEL.WEIGHTS, and give its checkpoint"
            )
        raise WeightsError(f"{os.fspath(weights)}: {text}")
    merge_overrides(cfg, overrides)
    names, ids = _classes_of(meta, cfg)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(names)
    target = resolve_device(device, "device")
    engine = engine or _engine_for(cfg, os.fspath(weights))
    model = engine.build_model(cfg).eval()
    load_weights(model, weights, cfg, require_all=True)
    cfg = settle(cfg, target) if report is None else settle(cfg, target, report=report)
    lay_out_for_inference(model.to(target), cfg, target)
    keep_freed_memory(target)
    detector = engine.detector(model, cfg)

    @torch.inference_mode()
    def infer(sample: Sample) -> AnyDetections:
        with inference_autocast(cfg, target):
            return detector([sample])[0]

    reader, thresholds = ImageReader.of(cfg, "RGB"), _thresholds(meta, len(names))
    gray = cfg.INPUT.FORMAT == "L"
    return Predictor(InferenceMapper(cfg), infer, names, ids, reader, model, cfg, thresholds, gray)


def _of_classifier(meta: dict[str, Any]) -> bool:
    """Return whether ``gn-det classify`` wrote the file."""
    steps = meta.get("provenance")
    return isinstance(steps, (list, tuple)) and any(isinstance(s, dict) and s.get("trained") is True for s in steps)


def _engine_for(cfg: Any, source: str) -> Engine:
    """Return the embedded engine, or Detectron2 for a model that only it implements, or raise UserError."""
    from gn_det.config.check import check_config
    from gn_det.engine import choice

    name = "embedded"
    try:
        check_config(cfg)
    except ConfigError as error:
        with contextlib.suppress(ConfigError):  # implemented by neither engine, but the model may not depend on it
            check_config(cfg, "detectron2")
            name = "detectron2"
        if name == "detectron2" and not choice.is_installed():
            raise ConfigError(
                f"{source} needs Detectron2, which is not installed ({error}); see {choice.INSTALL_PAGE}"
            ) from None
    return choice.load(choice.Choice(name, ""))


def _classes_of(meta: dict[str, Any], cfg: Any) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return class names and ids from the checkpoint, else the config, else numbers."""
    names, ids = tuple(meta.get("class_names") or cfg.MODEL.CLASS_NAMES), tuple(meta.get("category_ids") or ())
    if not names:
        count = int(cfg.MODEL.ROI_HEADS.NUM_CLASSES)
        if count < 1:
            raise ConfigError("MODEL.ROI_HEADS.NUM_CLASSES is 0 and the checkpoint stores no classes; set it")
        names = tuple(f"class {i}" for i in range(count))
    return names, ids if len(ids) == len(names) else tuple(range(1, len(names) + 1))


def _thresholds(meta: dict[str, Any], count: int) -> tuple[float, ...]:
    """Return the score thresholds that a checkpoint stores; () if there are no usable ones."""
    given = meta.get("thresholds")
    if not isinstance(given, (list, tuple)) or len(given) != count:
        return ()
    return tuple(given) if all(isinstance(t, (int, float)) and 0 <= t <= 1 for t in given) else ()


@dataclass(frozen=True)
class Selection:
    """Selects detections, best first."""

    threshold: float | Sequence[float] = THRESHOLD  # lowest score, or one per class, in [0, 1]
    wanted: set[int] | None = None  # class indices; None keeps all
    agnostic_iou: float | None = None  # drops boxes that overlap a better one of any class by more

    @classmethod
    def of(
        cls,
        predictor: Predictor,
        threshold: float | None = None,
        classes: Sequence[str] | None = None,
        agnostic_nms: bool = False,
    ) -> Selection:
        """Check the user's selection, or raise ConfigError; without ``threshold``, the checkpoint's apply, or 0.5."""
        chosen = lowest_score(threshold, predictor.thresholds)
        iou = 0.5 if predictor.config is None else float(predictor.config.MODEL.ROI_HEADS.NMS_THRESH_TEST)
        return cls(chosen, wanted_classes(classes, predictor.class_names), iou if agnostic_nms else None)

    def __str__(self) -> str:
        if isinstance(self.threshold, (int, float)):
            return f"a score of {self.threshold:g} or more"
        return f"at least the checkpoint's threshold of its class ({min(self.threshold):g} to {max(self.threshold):g})"

    def __call__(self, det: AnyDetections) -> ArrayDetections:
        """Return the detections that are kept, best first, in host memory."""
        boxes, scores, classes = _floats(det.boxes), _floats(det.scores), to_numpy(det.classes)
        lowest = np.array(self.threshold, np.float32)
        keep = scores >= (lowest[classes] if lowest.ndim else lowest)
        if self.wanted is not None:
            keep &= np.isin(classes, sorted(self.wanted))
        index = np.flatnonzero(keep)
        index = index[np.argsort(-scores[index], kind="stable")]
        if self.agnostic_iou is not None:
            index = index[nms(boxes[index], self.agnostic_iou)]
        return ArrayDetections(det.image_size, boxes[index], scores[index], classes[index], _masks_at(det.masks, index))


def nms(boxes: np.ndarray, iou: float) -> np.ndarray:
    """Return the positions of the boxes (N, 4) that no better one overlaps by more than ``iou``; best first.

    Equal to ``torchvision.ops.nms`` on boxes in the order of their scores.
    """
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    left, kept = np.arange(len(boxes)), []
    while len(left):
        best, left = left[0], left[1:]
        kept.append(best)
        sides = np.minimum(boxes[best, 2:], boxes[left, 2:]) - np.maximum(boxes[best, :2], boxes[left, :2])
        inter = sides.clip(0).prod(axis=1)
        with np.errstate(invalid="ignore"):  # 0 / 0 of boxes without area is no overlap
            left = left[~((inter / (area[best] + area[left] - inter)).astype(np.float64) > iou)]
    return np.array(kept, dtype=np.int64)


def _floats(values: Any) -> np.ndarray:
    """A tensor of any precision, or an array, as float32 in host memory."""
    return np.asarray(to_numpy(values.float() if hasattr(values, "detach") else values), np.float32)


def _masks_at(masks: Any, index: np.ndarray) -> np.ndarray | None:
    if masks is None:
        return None
    # Usually the best ones come first, and no mask is copied.
    first = np.array_equal(index, np.arange(len(index)))
    return to_numpy(masks[: len(index)] if first else masks[index])


def crops_of(det: ArrayDetections) -> list[MaskCrop] | None:
    """Return the crop of each mask to its pixels; None without masks."""
    return None if det.masks is None else [crop_mask(mask) for mask in det.masks]
