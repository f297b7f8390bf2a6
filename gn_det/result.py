"""What a prediction takes and gives; nothing here needs torch."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, overload

import numpy as np
from PIL import Image, ImageOps

from gn_det.errors import ConfigError, DataError
from gn_det.text import count, nearest, shown, some

#: What ``predict`` takes as one image.
ImageLike = str | os.PathLike[str] | Image.Image | np.ndarray
Images = list[Any] | tuple[Any, ...]

#: Default score threshold if neither the user nor the checkpoint gives one.
THRESHOLD = 0.5

_EXPECTED = "give a path, a PIL image, or an (H, W, 3) uint8 array in RGB order"


@dataclass(frozen=True, eq=False, repr=False)  # arrays have no single truth value
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
    _source: Path | np.ndarray
    _read: Callable[[Path], np.ndarray]

    def __repr__(self) -> str:
        found = some(f"{number} {name}" for name, number in Counter(self.names).most_common())
        return f"<Result: {count(len(self), 'object')}{found and f' ({found})'}, image_size={self.image_size}>"

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
    _thresholds: Sequence[float]  # stored threshold of each class; empty if there are none

    @overload
    def predict(
        self, images: ImageLike, *, threshold: float | None = ..., classes: Sequence[str] | None = ...
    ) -> Result: ...

    @overload
    def predict(
        self, images: Images, *, threshold: float | None = ..., classes: Sequence[str] | None = ...
    ) -> list[Result]: ...

    def predict(
        self, images: ImageLike | Images, *, threshold: float | None = None, classes: Sequence[str] | None = None
    ) -> Result | list[Result]:
        """Detect objects on one image, or on each image of a list.

        Args:
            images: a path, a PIL image or an (H, W, 3) uint8 array in RGB order (OpenCV frames are BGR: pass
                ``frame[:, :, ::-1]``); or a list or tuple of these. EXIF orientation is applied.
            threshold: keep detections with at least this score, in [0, 1]; None: the threshold of each class that
                ``gn-det eval --save-thresholds`` stored, or 0.5.
            classes: keep these class names only; None keeps all.

        Returns:
            One ``Result`` for one image, or a list of them in the order of ``images``.

        Raises:
            DataError: an image is missing, damaged or not of the expected form, or the list is empty.
            ConfigError: the threshold is out of range, or a class name is unknown.
        """
        lowest = lowest_score(threshold, self._thresholds)
        wanted = wanted_classes(classes, self.class_names)
        results = [self._predict_one(image, lowest, wanted) for image in checked_images(images)]
        return results if isinstance(images, (list, tuple)) else results[0]

    def _predict_one(
        self, image: Path | np.ndarray, lowest: float | Sequence[float], wanted: set[int] | None
    ) -> Result:
        raise NotImplementedError


def lowest_score(threshold: Any, stored: Sequence[float]) -> float | Sequence[float]:
    """Return ``threshold``, else the ``stored`` ones of each class, else 0.5.

    Raises:
        ConfigError: ``threshold`` is not a number from 0 to 1, NumPy's included.
    """
    if threshold is None:
        return stored or THRESHOLD
    known = isinstance(threshold, (int, float, np.integer, np.floating)) and not isinstance(threshold, bool)
    if not known or not 0 <= threshold <= 1:
        raise ConfigError(f"threshold {shown(threshold)}: give a number from 0 to 1")
    return float(threshold)


def checked_path(given: Any, name: str, example: str) -> str:
    """Return the argument ``name`` as text, or raise ConfigError if it is not a path."""
    if not isinstance(given, (str, os.PathLike)):
        raise ConfigError(f"{name} is {shown(given)}; give a path, such as {example}")
    return str(os.fspath(given))


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
            near = [names[lower[other]] for other in nearest(name.lower(), lower, 1)]
            hint = f"did you mean {shown(near[0])}?" if near else f"the model knows {some(names, 10)}"
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
