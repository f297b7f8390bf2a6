"""Where classification images come from: a folder in ImageNet's layout, scikit-learn's digits, generated shapes.

Images, order and augmentation of an epoch depend on (seed, epoch) alone, not on the number of workers or interruptions.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from gn_det.checkpoint.preprocessing import CAFFE
from gn_det.classification.settings import NUM_SHAPES, VGG, Settings
from gn_det.data.shapes_draw import CLASSES, draw_single
from gn_det.engine import dist
from gn_det.errors import ConfigError, DataError
from gn_det.text import one_line

logger = logging.getLogger(__name__)

#: Images (N, C, H, W), uint8 or float32 on the 0-255 scale, and class indices (N,) int64.
Batch = tuple[Tensor, Tensor]
#: Images (N, C, H, W) uint8, and class indices (N,).
Arrays = tuple[np.ndarray, np.ndarray]

#: Of the generated set itself: the run's seed changes what is done with the images, not the images.
_SET_SEED = 20180322


@dataclass(frozen=True)
class Input:
    """The network's input: channel order ("BGR", or "L" for gray images), mean and std on the 0-255 scale."""

    order: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


#: Input of the detection configs.
BGR = Input("BGR", CAFFE.pixel_mean or (), CAFFE.pixel_std or ())


def bgr_input(settings: Settings) -> Input:
    """Input of color images: that of the detection configs, with ImageNet's std where no norm makes up for scale 1."""
    scaled = settings.arch == VGG or settings.norm in ("WN", "none")
    return Input("BGR", BGR.mean, (57.375, 57.12, 58.395)) if scaled else BGR


def epoch_batches(settings: Settings, epoch: int, images: int, rank: int, processes: int) -> list[np.ndarray]:
    """Return the image numbers of each batch of this process, whole batches only; raise DataError if there is none."""
    size = settings.batch_size * processes
    if images < size:
        raise DataError(
            f"{settings.data}: {images} training images do not fill one batch of {settings.batch_size} × {processes} "
            "processes; lower batch_size or add images"
        )
    order = np.random.default_rng([settings.seed, epoch]).permutation(images)
    return [order[k : k + size][rank::processes] for k in range(0, images - size + 1, size)]


class ArraySource:
    """Images in memory, shifted by up to ``shift`` pixels (edges repeated) and perhaps flipped in training."""

    def __init__(
        self,
        class_names: Sequence[str],
        train: Arrays,
        val: Arrays,
        input: Input,
        *,
        shift: int = 0,
        flip: bool = False,
        seed: int = 0,
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
            crops = []
            for k in batch.tolist():
                y, x = corners[k]
                crop = images[k, :, y : y + side, x : x + side]
                crops.append(crop.flip(-1) if self._flip and flips[k] else crop)
            yield torch.stack(crops), labels[batch]

    def val_batches(self, numbers: Sequence[int], size: int) -> Iterator[Batch]:
        images, labels = self._val
        for chosen in torch.split(torch.as_tensor(numbers), size):
            yield images[chosen], labels[chosen]


def subset(labels: Sequence[int] | np.ndarray, most: int | None) -> np.ndarray:
    """Numbers of at most ``most`` images, rising, with the same share of every class; without a limit all.

    The choice is one of chance, but the same in every run.
    """
    classes = np.asarray(labels)
    order = np.random.default_rng(_SET_SEED).permutation(len(classes))
    place = np.empty(len(classes))  # of an image in its class, from 0 to 1
    for index in np.unique(classes):
        mine = order[classes[order] == index]
        place[mine] = (np.arange(len(mine)) + 0.5) / len(mine)
    return np.sort(np.argsort(place, kind="stable")[:most])


def enough(settings: Settings, there: int) -> None:
    """Refuse ``images`` above the images that are there; raises ConfigError."""
    if (settings.images or 0) > there:
        raise ConfigError(f"classify images is {settings.images}, but {settings.data} has {there} training images")


def load_digits(settings: Settings) -> ArraySource:
    """Enlarge scikit-learn's 1797 handwritten digits of 8x8 pixels to ``settings.side``, without augmentation.

    Every other image of a class is for validation, whatever the seed. Raises ConfigError without scikit-learn.
    """
    try:
        from sklearn import datasets
    except ImportError:
        raise ConfigError(
            "classify data digits needs scikit-learn, which brings the images: pip install scikit-learn"
        ) from None
    raw = datasets.load_digits()
    small = torch.from_numpy(raw.images.astype(np.float32)).unsqueeze(1) * (255 / 16)
    large = torch.nn.functional.interpolate(small, size=settings.side, mode="bilinear", align_corners=False)
    images, labels = large.round().clamp(0, 255).to(torch.uint8).numpy(), raw.target
    val = np.zeros(len(labels), dtype=bool)
    for digit in range(10):
        val[np.flatnonzero(labels == digit)[1::2]] = True
    train = images[~val]
    given = Input("L", (float(train.mean()),), (float(train.std()),))
    return ArraySource([str(c) for c in range(10)], (train, labels[~val]), (images[val], labels[val]), given)


#: Mean and standard deviation of CIFAR-10's training images, BGR, on the 0-255 scale.
_CIFAR = Input("BGR", (113.87, 122.95, 125.31), (66.70, 62.09, 62.99))


def load_cifar10(settings: Settings) -> ArraySource:
    """Load CIFAR-10 from "cifar10:FOLDER" (by default DETECTRON2_DATASETS), downloaded if absent, or raise DataError.

    Augmentation: shifts by up to 4 pixels, and flips.
    """
    from torchvision.datasets import CIFAR10

    root = Path(settings.data.partition(":")[2] or os.environ.get("DETECTRON2_DATASETS", "datasets")).expanduser()

    def part(train: bool) -> Arrays:
        found = CIFAR10(root, train=train)
        chosen = subset(found.targets, settings.images)
        pixels = found.data[chosen, :, :, ::-1].transpose(0, 3, 1, 2)
        return np.ascontiguousarray(pixels), np.asarray(found.targets)[chosen]

    try:
        classes = dist.on_first_rank(lambda: CIFAR10(root, download=True).classes)  # one process downloads
        train, val = part(True), part(False)
    except (OSError, RuntimeError, EOFError, KeyError) as error:  # no network, a broken archive, other checksums
        reason = one_line(error, 200)
        raise DataError(
            f"classify data {settings.data}: CIFAR-10 is not in {root} and cannot be downloaded ({reason}); give the "
            f"folder that holds it as cifar10:FOLDER, or ./cifar10 for a folder of your own images"
        ) from None
    enough(settings, len(train[1]))
    return ArraySource(classes, train, val, _CIFAR, shift=4, flip=True, seed=settings.seed)


def load_shapes(settings: Settings) -> ArraySource:
    """One object of the ``shapes`` set on its kind of background, BGR; a fifth as many images for validation.

    Every image is a function of (part, number, side).
    """
    count, side = settings.images or NUM_SHAPES, settings.side
    train, val = draw_set("train", count, side), draw_set("val", max(count // 5, len(CLASSES)), side)
    return ArraySource(CLASSES, train, val, bgr_input(settings), shift=side // 8, flip=True, seed=settings.seed)


@functools.lru_cache(maxsize=4)
def draw_set(part: str, count: int, side: int) -> Arrays:
    """(count, 3, side, side) uint8 BGR and class indices; the classes take turns."""
    logger.info("Drawing %d %s images of %d px.", count, part, side)
    labels = np.arange(count) % len(CLASSES)
    images = np.empty((count, 3, side, side), dtype=np.uint8)
    for k in range(count):
        rng = np.random.default_rng([_SET_SEED, 0 if part == "train" else 1, side, k])
        images[k] = draw_single(rng, int(labels[k]), side)[:, :, ::-1].transpose(2, 0, 1)
    return images, labels
