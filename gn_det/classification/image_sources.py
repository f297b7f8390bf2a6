"""Where classification images come from: a folder in ImageNet's layout, scikit-learn's digits, generated shapes.

What an epoch shows, in which order and how augmented is a function of (seed, epoch) alone, not of the number of
workers or of where a run was interrupted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from gn_det.classification.settings import Settings
from gn_det.errors import ConfigError, DataError

#: Images (N, C, H, W), uint8 or float32 on the 0-255 scale, and class indices (N,) int64.
Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Input:
    """What the network's input is: channels, and what is subtracted and divided by, on the 0-255 scale.

    Attributes:
        order: "BGR" for colour images (what the detection configs feed), "L" for gray ones.
    """

    order: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


class Source(Protocol):
    """A classification set of two parts."""

    class_names: tuple[str, ...]
    train_images: int
    val_images: int
    input: Input

    def train_batches(self, epoch: int, batches: Sequence[np.ndarray]) -> Iterator[Batch]:
        """Augmented training images; ``batches`` holds the image numbers of each batch."""
        ...

    def val_batches(self, numbers: Sequence[int], size: int) -> Iterator[Batch]:
        """Validation images as they are, ``size`` at a time."""
        ...


def open_source(settings: Settings) -> Source:
    """The set that ``settings.data`` names, checked.

    Raises:
        DataError: a folder that is missing, empty, or whose two parts have different classes.
    """
    if settings.data == "digits":
        return load_digits(settings)
    if settings.data == "shapes":
        from gn_det.classification.generated import load_shapes

        return load_shapes(settings)
    from gn_det.classification.folder import FolderSource

    return FolderSource(settings)


def epoch_batches(settings: Settings, epoch: int, images: int, rank: int, processes: int) -> list[np.ndarray]:
    """Image numbers of every batch that this process sees in ``epoch``; an incomplete last batch is left out.

    Raises:
        DataError: the set is smaller than one batch of all processes.
    """
    size = settings.batch_size * processes
    if images < size:
        raise DataError(
            f"{settings.data}: {images} training images do not fill one batch of {settings.batch_size} on {processes} "
            "process(es); lower batch_size or add images"
        )
    order = np.random.default_rng([settings.seed, epoch]).permutation(images)
    return [order[k : k + size][rank::processes] for k in range(0, images - size + 1, size)]


class ArraySource:
    """Images in memory. Augmentation: shift by up to ``shift`` pixels (edges repeated), and flip if asked for.

    Args:
        train, val: (images (N, C, H, W) uint8, class indices (N,)).
        seed: of the augmentation.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        train: tuple[np.ndarray, np.ndarray],
        val: tuple[np.ndarray, np.ndarray],
        input: Input,
        *,
        shift: int,
        flip: bool,
        seed: int,
    ) -> None:
        self.class_names = tuple(class_names)
        self.input = input
        self.train_images, self.val_images = len(train[1]), len(val[1])
        pad = ((0, 0), (0, 0), (shift, shift), (shift, shift))
        self._train = torch.from_numpy(np.pad(train[0], pad, mode="edge")), torch.from_numpy(train[1].astype(np.int64))
        self._val = torch.from_numpy(val[0]), torch.from_numpy(val[1].astype(np.int64))
        self._shift, self._flip, self._seed = shift, flip, seed

    def train_batches(self, epoch: int, batches: Sequence[np.ndarray]) -> Iterator[Batch]:
        rng = np.random.default_rng([self._seed, epoch, 1])
        corners = rng.integers(0, 2 * self._shift + 1, (self.train_images, 2)).tolist()
        flips = (rng.random(self.train_images) < 0.5).tolist()
        images, labels = self._train
        side = self._val[0].shape[-1]
        for batch in batches:
            numbers = batch.tolist()
            crops = []
            for k in numbers:
                y, x = corners[k]
                crop = images[k, :, y : y + side, x : x + side]
                crops.append(crop.flip(-1) if self._flip and flips[k] else crop)
            yield torch.stack(crops), labels[batch]

    def val_batches(self, numbers: Sequence[int], size: int) -> Iterator[Batch]:
        images, labels = self._val
        for k in range(0, len(numbers), size):
            chosen = torch.as_tensor(numbers[k : k + size])
            yield images[chosen], labels[chosen]


def load_digits(settings: Settings) -> ArraySource:
    """scikit-learn's 1797 handwritten digits: real images of 8x8 pixels, enlarged to ``settings.side``.

    Every other image of a class is for validation, whatever the seed. They are not augmented: 8 pixels have none to
    spare.

    Raises:
        ConfigError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError:
        raise ConfigError(
            "pretrain data digits needs scikit-learn, which brings the images: pip install scikit-learn"
        ) from None
    raw = datasets.load_digits()
    small = torch.from_numpy(raw.images.astype(np.float32)).unsqueeze(1) * (255 / 16)
    large = torch.nn.functional.interpolate(small, size=settings.side, mode="bilinear", align_corners=False)
    images = large.round().clamp(0, 255).to(torch.uint8).numpy()
    labels = raw.target.astype(np.int64)
    within = np.zeros(len(labels), dtype=np.int64)  # 0, 1, 2, ... in each class
    for c in range(10):
        within[labels == c] = np.arange((labels == c).sum())
    train, val = within % 2 == 0, within % 2 == 1
    mean, std = float(images[train].mean()), float(images[train].std())
    return ArraySource(
        [str(c) for c in range(10)],
        (images[train], labels[train]),
        (images[val], labels[val]),
        Input("L", (mean,), (std,)),
        shift=0,
        flip=False,
        seed=settings.seed,
    )
