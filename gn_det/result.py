"""What a prediction takes and gives; nothing here needs torch."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
from PIL import Image, ImageOps

from gn_det.errors import ConfigError, DataError
from gn_det.text import nearest, one_line, shown

#: What ``predict`` takes as one image.
ImageLike = str | os.PathLike[str] | Image.Image | np.ndarray
Images = list[Any] | tuple[Any, ...]

_EXPECTED = "give a path, a PIL image, or an (H, W, 3) uint8 array in RGB order"


@dataclass(frozen=True)
class Result:
    """Detections of one image, best first, as NumPy arrays. N is the number of detections.

    Attributes:
        boxes: (N, 4) float32, x0, y0, x1, y1 in pixels of the original (upright) image.
        scores: (N,) float32 in [0, 1].
        classes: (N,) int64, indices into ``class_names``.
        masks: (N, H, W) bool, or None where the model has no mask head.
        image_size: (H, W) of the original image, in pixels.
        class_names: name of each class index of the model.
        category_ids: category id of each class index, as in the training json.
    """

    boxes: np.ndarray
    scores: np.ndarray
    classes: np.ndarray
    masks: np.ndarray | None
    image_size: tuple[int, int]
    class_names: Sequence[str]
    category_ids: Sequence[int]
    _source: Path | np.ndarray = field(repr=False, compare=False)
    _read: Callable[[Path], np.ndarray] = field(repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.scores)

    @property
    def names(self) -> list[str]:
        """Class name of each detection."""
        return [self.class_names[index] for index in self.classes]

    def __getitem__(self, index: Any) -> Result:
        """Select detections by a bool mask of length N, a slice, or one or more integers."""
        chosen = np.atleast_1d(np.arange(len(self))[index])
        masks = None if self.masks is None else self.masks[chosen]
        return replace(
            self, boxes=self.boxes[chosen], scores=self.scores[chosen], classes=self.classes[chosen], masks=masks
        )

    def draw(self) -> Image.Image:
        """Draw masks, boxes and labels on a copy of the image; raise DataError if its file cannot be read any more."""
        from gn_det.visualize.draw import draw_detections

        pixels = self._source if isinstance(self._source, np.ndarray) else self._read(self._source)
        return Image.fromarray(draw_detections(pixels, self, self.class_names))

    def to_coco(self, image_id: int | str = 1) -> list[dict[str, Any]]:
        """Convert to COCO results: ``image_id``, ``category_id``, ``bbox`` (x, y, width, height), ``score``, and RLE
        ``segmentation`` where there are masks."""
        from gn_det.evaluation.results import detections_to_coco

        return detections_to_coco(image_id, self, self.category_ids)


class ImageModel:
    """What :class:`gn_det.Model` and :class:`gn_det.deploy.Detector` have in common: ``predict``.

    Attributes:
        class_names: name of each class index.
        category_ids: category id of each class index, as in the training json.
    """

    class_names: Sequence[str]
    category_ids: Sequence[int]

    @overload
    def predict(self, images: ImageLike, *, threshold: float = ..., classes: Sequence[str] | None = ...) -> Result: ...

    @overload
    def predict(
        self, images: Images, *, threshold: float = ..., classes: Sequence[str] | None = ...
    ) -> list[Result]: ...

    def predict(
        self, images: ImageLike | Images, *, threshold: float = 0.5, classes: Sequence[str] | None = None
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
        raise NotImplementedError


def checked_threshold(threshold: Any) -> float:
    """``threshold`` if it is a number from 0 to 1; anything else raises ConfigError."""
    if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 <= threshold <= 1:
        raise ConfigError(f"threshold {shown(threshold)}: give a number from 0 to 1")
    return threshold


def wanted_classes(classes: Sequence[str] | None, names: Sequence[str]) -> set[int] | None:
    """Return the indices of named classes, in any case; None for all. ConfigError for an unknown name or []."""
    if classes is None:
        return None
    if not classes:
        raise ConfigError("the list of classes is empty; name at least one, or leave it out for all")
    lower = {name.lower(): i for i, name in enumerate(names)}
    indices = set()
    for name in classes:
        index = names.index(name) if name in names else lower.get(name.lower())
        if index is None:
            near = nearest(name.lower(), lower, 1)
            known = ", ".join(one_line(n, 60) for n in names[:10])
            hint = f"did you mean {shown(names[lower[near[0]]])}?" if near else f"the model knows {known}"
            raise ConfigError(f"class {shown(name)} is not one of the model's {len(names)} classes; {hint}")
        indices.add(index)
    return indices


def checked_images(images: ImageLike | Images) -> list[Path | np.ndarray]:
    """Return one image or a list of them, each as a path or as pixels; raise DataError for anything else and for []."""
    if not isinstance(images, (list, tuple)):
        return [_checked(images, "image")]
    if not images:
        raise DataError(f"predict got an empty list; {_EXPECTED}, or a list of these")
    return [_checked(image, f"images[{number}]") for number, image in enumerate(images)]


def _checked(image: Any, where: str) -> Path | np.ndarray:
    """Return ``image`` as a path or as pixels, or raise DataError."""
    if isinstance(image, (str, os.PathLike)):
        return Path(image)
    if isinstance(image, Image.Image):
        if image.mode in ("I", "F") or image.mode.startswith("I;"):
            raise DataError(f"{where} is a PIL image of mode {image.mode}; convert it to 8 bits a channel first")
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise DataError(f"{where} is an array of {image.dtype} with shape {image.shape}; {_EXPECTED}")
        return image
    raise DataError(f"{where} is of type {type(image).__name__}; {_EXPECTED}")
