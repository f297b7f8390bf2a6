"""Where classification images come from: a folder in ImageNet's layout, CIFAR-10, scikit-learn's digits, shapes.

Images, order and augmentation of an epoch depend on (seed, epoch) alone, not on the number of workers or interruptions.

Augmentation of a folder is that of fb.resnet.torch, which the paper uses: a crop of 8 to 100 % of the area with an
aspect ratio between 3/4 and 4/3 (Szegedy et al. 2015), brightness, contrast and saturation by up to 0.4, PCA lighting
of 0.1 (Krizhevsky et al. 2012), and a flip. Validation takes the center crop of 224 from a shorter side of 256.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from gn_det.checkpoint.preprocessing import CAFFE
from gn_det.classification.settings import CROP, NUM_SHAPES, SHIFT, VGG, Settings
from gn_det.data.image import ImageError, ImageReader
from gn_det.data.inputs import IMAGE_SUFFIXES
from gn_det.data.shapes_draw import CLASSES, draw_single
from gn_det.data.workers import WorkerData, load_batches
from gn_det.engine import dist
from gn_det.errors import ConfigError, DataError
from gn_det.text import count, one_line

logger = logging.getLogger(__name__)

#: Images (N, C, H, W), uint8 or float32 on the 0-255 scale, and class indices (N,) int64.
Batch = tuple[Tensor, Tensor]
#: Images (N, C, H, W) uint8, and class indices (N,).
Arrays = tuple[np.ndarray, np.ndarray]
#: Name of an image or video, usually its file, and class index.
Entry = tuple[str, int]

#: Of the generated set itself: the run's seed changes what is done with the images, not the images.
_SET_SEED = 20180322
# Eigenvectors (columns) and eigenvalues of ImageNet's RGB colors in [0, 1], published with AlexNet.
_VECTORS = ((-0.5675, 0.7192, 0.4009), (-0.5808, -0.0045, -0.8140), (-0.5836, -0.6948, 0.4203))
_VALUES = (0.2175, 0.0188, 0.0045)
_COLOR, _LIGHTING = 0.4, 0.1
#: Bytes of the images of "shift" that are kept in memory.
_MOST_BYTES = 8 << 30


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
    """Images in memory; in training shifted by up to ``shift`` pixels (edges repeated) and flipped, unless it is 0."""

    def __init__(
        self, class_names: Sequence[str], train: Arrays, val: Arrays, input: Input, *, shift: int = 0, seed: int = 0
    ) -> None:
        self.class_names = tuple(class_names)
        self.input = input
        self.train_images, self.val_images = len(train[1]), len(val[1])
        pad = ((0, 0), (0, 0), (shift, shift), (shift, shift))
        self._train = torch.from_numpy(np.pad(train[0], pad, mode="edge")), torch.from_numpy(train[1].astype(np.int64))
        self._val = torch.from_numpy(val[0]), torch.from_numpy(val[1].astype(np.int64))
        self._shift, self._seed = shift, seed

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
                crops.append(crop.flip(-1) if self._shift and flips[k] else crop)
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


#: A classification set with a training and a validation part.
Source = ArraySource | FileSource


def open_images(settings: Settings) -> Source:
    """Open the set of images that ``settings.data`` names.

    Raises:
        ConfigError: it has fewer training images than ``settings.images``, or needs scikit-learn.
        DataError: it cannot be used.
    """
    builtin: dict[str, Callable[[Settings], Source]]
    builtin = {"digits": load_digits, "shapes": load_shapes, "cifar10": load_cifar10}
    folder = load_small_images if settings.augment == SHIFT else FolderSource
    return builtin.get(settings.source, folder)(settings)


def _check_enough(settings: Settings, there: int) -> None:
    if there < (settings.images or 0):
        raise ConfigError(f"classify images is {settings.images}, but {settings.data} has {there} training images")


# ------------------------------------------------------------ a folder


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
    """Return class names and at most ``settings.images`` entries of both parts; see :func:`scan_parts`."""
    names, train, val = scan_parts(Path(settings.data).expanduser())
    _check_enough(settings, len(train))  # before any image is read
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
    return ArraySource(names, train, val, bgr_input(settings), shift=shift, seed=settings.seed)


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
        self._transform = v2.Compose([*parts, v2.PILToTensor()])

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
        with torch.random.fork_rng(devices=[]):
            if self._epoch is not None:
                torch.manual_seed(int(np.random.SeedSequence([self._seed, self._epoch, number]).generate_state(1)[0]))
            bgr: Tensor = self._transform(image).flip(0)
            return lighting(bgr) if self._lighting else bgr


def lighting(pixels: Tensor) -> Tensor:
    """Add one random color along the principal axes of ImageNet's colors to a BGR image; float32, unclipped."""
    alpha = _LIGHTING * torch.randn(3)
    rgb = torch.tensor(_VECTORS) @ (alpha * torch.tensor(_VALUES)) * 255
    return pixels.float() + rgb.flip(0).view(3, 1, 1)


# ------------------------------------------------------------ built-in sets


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
    _check_enough(settings, len(train[1]))
    return ArraySource(classes, train, val, _CIFAR, shift=4, seed=settings.seed)


def load_shapes(settings: Settings) -> ArraySource:
    """One object of the ``shapes`` set on its kind of background, BGR; a fifth as many images for validation.

    Every image is a function of (part, number, side).
    """
    count, side = settings.images or NUM_SHAPES, settings.side
    train, val = draw_set("train", count, side), draw_set("val", max(count // 5, len(CLASSES)), side)
    return ArraySource(CLASSES, train, val, bgr_input(settings), shift=side // 8, seed=settings.seed)


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
