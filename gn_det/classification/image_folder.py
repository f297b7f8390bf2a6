"""A folder in ImageNet's layout: ``train/<class>/*`` and ``val/<class>/*``, read by worker processes.

Augmentation is that of fb.resnet.torch, which the paper uses: a crop of 8 to 100 % of the area with an aspect ratio
between 3/4 and 4/3 (Szegedy et al. 2015), brightness, contrast and saturation by up to 0.4, PCA lighting of 0.1
(Krizhevsky et al. 2012), and a flip. Validation takes the center crop of 224 from a shorter side of 256.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from gn_det.classification.image_sources import Arrays, ArraySource, Batch, Input, bgr_input, enough, subset
from gn_det.classification.settings import CROP, SHIFT, Settings
from gn_det.data.image import ImageError, ImageReader
from gn_det.data.inputs import IMAGE_SUFFIXES
from gn_det.data.workers import WorkerData, load_batches
from gn_det.errors import DataError
from gn_det.text import count

# Eigenvectors (columns) and eigenvalues of ImageNet's RGB colors in [0, 1], published with AlexNet.
_VECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
_VALUES = (0.2175, 0.0188, 0.0045)
_COLOR, _LIGHTING = 0.4, 0.1

#: Bytes of the images of "shift" that are kept in memory.
_MOST_BYTES = 8 << 30

#: Name of an image or video, usually its file, and class index.
Entry = tuple[str, int]


def scan_parts(
    root: Path, suffixes: Collection[str] = IMAGE_SUFFIXES, what: str = "images"
) -> tuple[list[str], list[Entry], list[Entry]]:
    """Return class names, and (file, class index) of each file of ``train/`` and ``val/`` that ends as ``suffixes``.

    Raises:
        DataError: no such folder, too few or different classes, or a class without such files, called ``what``.
    """
    parts: list[tuple[list[str], list[Entry]]] = []
    for folder in (root / "train", root / "val"):
        if not folder.is_dir():
            raise DataError(
                f"{folder}: no such folder; data must hold train/<class>/* and val/<class>/* (or be digits or shapes)"
            )
        names = sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))
        if len(names) < 2:
            raise DataError(f"{folder}: holds {count(len(names), 'class folder')}; classification needs at least 2")
        entries: list[Entry] = []
        for index, name in enumerate(names):
            files = sorted(e.path for e in os.scandir(folder / name) if Path(e.name).suffix.lower() in suffixes)
            if not files:
                raise DataError(f"{folder / name}: class folder without {what}; fill or remove it (in train and val)")
            entries += [(file, index) for file in files]
        parts.append((names, entries))
    (names, train), (val_names, val) = parts
    if only := sorted(set(names) ^ set(val_names)):
        where = "train" if only[0] in names else "val"
        raise DataError(
            f"{root}: class {only[0]!r} is only in {where}/ ({count(len(only), 'such class', 'such classes')}); "
            "make both the same"
        )
    return names, train, val


def scan_both(settings: Settings) -> tuple[list[str], list[Entry], list[Entry]]:
    """Return class names and at most ``settings.images`` entries of both parts; ConfigError if train has fewer."""
    names, train, val = scan_parts(Path(settings.data).expanduser())
    enough(settings, len(train))
    train, val = ([part[k] for k in subset([label for _, label in part], settings.images)] for part in (train, val))
    return names, train, val


def load_small_images(settings: Settings) -> ArraySource:
    """Load all images of a folder, resized to ``settings.side`` and cropped; raise DataError if they do not fit."""
    names, *parts = scan_both(settings)
    side, shift = settings.side, settings.side // 8
    size = sum(map(len, parts)) * 3 * (side + 2 * shift) ** 2
    if size > _MOST_BYTES:
        raise DataError(
            f"{settings.data}: augment {SHIFT} takes {size / 2**30:.1f} GiB of memory in each process; lower "
            f"images or image_size, or use augment {CROP}"
        )

    def read(entries: list[Entry]) -> Arrays:
        found = _Images(entries, settings, None)[range(len(entries))]
        if isinstance(found, ImageError):
            raise found
        return found[0].numpy(), found[1].numpy()

    train, val = map(read, parts)
    return ArraySource(names, train, val, bgr_input(settings), shift=shift, flip=True, seed=settings.seed)


class FileSource:
    """A source whose images or clips are read by worker processes; subclasses say how, in ``_load``.

    Args:
        train, val: (name, class index) of every image or video.
    """

    def __init__(
        self, class_names: Sequence[str], train: list[Entry], val: list[Entry], input: Input, settings: Settings
    ) -> None:
        self.class_names, self.input = tuple(class_names), input
        self.train_images, self.val_images = len(train), len(val)
        self._train, self._val, self._settings = train, val, settings

    def train_batches(self, epoch: int, batches: Sequence[np.ndarray]) -> Iterator[Batch]:
        """Augmented training images; ``batches`` holds the image numbers of each batch."""
        return self._load(self._train, [batch.tolist() for batch in batches], epoch)

    def val_batches(self, numbers: Sequence[int], size: int) -> Iterator[Batch]:
        """Validation images, ``size`` at a time; the last batch may be smaller."""
        return self._load(self._val, [list(numbers[k : k + size]) for k in range(0, len(numbers), size)], None)

    def _load(self, entries: list[Entry], batches: list[list[int]], epoch: int | None) -> Iterator[Batch]:
        """Augmented batches of a training epoch; without an epoch those of validation."""
        raise NotImplementedError


class FolderSource(FileSource):
    """The images of a folder; see :func:`scan_both` for the errors."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(*scan_both(settings), bgr_input(settings), settings)

    def _load(self, entries: list[Entry], batches: list[list[int]], epoch: int | None) -> Iterator[Batch]:
        data = _Images(entries, self._settings, epoch)
        for batch in load_batches(data, batches, min(self._settings.workers, len(batches))):
            if isinstance(batch, ImageError):
                raise batch
            yield batch


#: A classification set with a training and a validation part.
Source = ArraySource | FileSource


class _Images(WorkerData):
    """Images of one epoch (None: validation); what is drawn for one depends on (seed, epoch, number) alone."""

    def __init__(self, entries: list[Entry], settings: Settings, epoch: int | None) -> None:
        self._entries, self._seed, self._epoch = entries, settings.seed, epoch
        side = settings.side
        self._lighting = settings.color and epoch is not None
        if epoch is None:
            margin = 256 / 224 if settings.augment == CROP else 1
            parts = [v2.Resize(round(side * margin)), v2.CenterCrop(side)]
        else:
            parts = [v2.RandomResizedCrop(side, scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3)), v2.RandomHorizontalFlip()]
            if settings.color:
                parts.append(v2.ColorJitter(_COLOR, _COLOR, _COLOR))
        self._transform = v2.Compose(parts)

    def name_of(self, index: int) -> str:
        return self._entries[index][0]

    def __getitem__(self, numbers: Sequence[int]) -> Batch | ImageError:
        """A batch, or the error of an unreadable image: raised here it would reach the user as a worker's trace."""
        try:
            images = [self._load(number) for number in numbers]
        except ImageError as error:
            return error
        return torch.stack(images), torch.tensor([self._entries[number][1] for number in numbers])

    def _load(self, number: int) -> Tensor:
        """(3, side, side) BGR, uint8 or float32 on the 0-255 scale."""
        self.note(number)
        file = self.name_of(number)
        try:
            image = Image.fromarray(ImageReader("RGB").read(file))
        except ImageError as error:
            text = f"{error} (classify cannot leave it out: repair or remove the file)"
            if error.kind == "image-depth":
                text = f"{file}: image holds more than 8 bits: classify cannot scale it, convert it first"
            raise ImageError(text) from None
        if self._epoch is None:
            return _as_bgr(self._transform(image))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(np.random.SeedSequence([self._seed, self._epoch, number]).generate_state(1)[0]))
            pixels = _as_bgr(self._transform(image))
            return lighting(pixels) if self._lighting else pixels


def _as_bgr(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.asarray(image)[:, :, ::-1].transpose(2, 0, 1)))


def lighting(pixels: Tensor) -> Tensor:
    """Add one random color along the principal axes of ImageNet's colors to a BGR image; float32, unclipped."""
    alpha = _LIGHTING * torch.randn(3)
    rgb = torch.tensor(_VECTORS) @ (alpha * torch.tensor(_VALUES)) * 255
    return pixels.float() + rgb.flip(0).view(3, 1, 1)
