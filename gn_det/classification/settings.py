"""What a pre-training run is told, and the paper's rules that follow from it. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from gn_det.errors import ConfigError
from gn_det.text import one_line, shown

#: ResNets for images of ImageNet's size: their backbones are those of the detection configs.
DEPTHS = {"resnet18": 18, "resnet34": 34, "resnet50": 50, "resnet101": 101}
#: He et al.'s ResNets for CIFAR, of 6n + 2 layers: a 3x3 stem and three stages of n basic blocks.
SMALL = {"resnet8": 1, "resnet14": 2, "resnet20": 3}
NORMS = ("BN", "LN", "IN", "GN")
AMP = ("off", "bf16", "fp16")
#: Data sets that need no files.
BUILTIN = ("digits", "shapes")
#: Side of the images a network sees, where ``image_size`` leaves it open.
IMAGE_SIZES = {"digits": 8, "shapes": 32, "": 224}
#: Generated training images of "shapes", where ``images`` leaves it open.
NUM_SHAPES = 3000
#: The batch that the paper's learning rate of 0.1 belongs to: 8 GPUs with 32 images each.
REFERENCE_BATCH = 256
REFERENCE_LR = 0.1
DEFAULT_GROUPS = 32


@dataclass(frozen=True)
class Settings:
    """A pre-training run; the defaults are the paper's recipe (section 4.1).

    Attributes:
        arch: one of :data:`DEPTHS` (detection backbones) or :data:`SMALL` (for tiny images).
        norm: "BN", "LN", "IN" or "GN", in every layer.
        data: folder with ``train/<class>/*`` and ``val/<class>/*``, or "digits" (scikit-learn's handwritten digits) or
            "shapes" (generated, see :mod:`gn_det.classification.generated`).
        output: folder for weights, checkpoint, metrics and summary.
        groups, channels_per_group: division of GN's channels (Table 3); at most one of them, 32 groups without.
        batch_size: images of one process in an iteration.
        epochs: passes over the training images; a fraction is allowed.
        lr: learning rate; None: 0.1 for 256 images in an iteration over all processes, and linear in that number.
        momentum: Nesterov's, as in fb.resnet.torch.
        weight_decay: of all weights, gamma and beta included.
        steps: parts of the training after which the learning rate is multiplied by ``gamma``: epochs 30, 60 and 90.
        gamma: see ``steps``.
        seed: of initial weights, order and augmentation.
        workers: processes that read images from a folder.
        amp: "off", "bf16" or "fp16" autocast.
        device: "auto", "cpu", "cuda" or "cuda:N".
        image_size: side of the square that the network sees; None: 224, for digits 8, for shapes 32.
        images: generated training images of "shapes"; None: 3000.
        color: brightness, contrast, saturation and lighting augmentation of fb.resnet.torch, on images from a folder.
        stride_in_1x1: stride in the first 1x1 of a bottleneck instead of its 3x3; what ``bn_*`` configs expect, whose
            published R-50 does it so. ResNet-18 and 34 have no such choice.
    """

    arch: str
    norm: str
    data: str
    output: str
    groups: int | None = None
    channels_per_group: int | None = None
    batch_size: int = 32
    epochs: float = 100
    lr: float | None = None
    momentum: float = 0.9
    weight_decay: float = 1e-4
    steps: tuple[float, ...] = (0.3, 0.6, 0.9)
    gamma: float = 0.1
    seed: int = 1
    workers: int = 4
    amp: str = "off"
    device: str = "auto"
    image_size: int | None = None
    images: int | None = None
    color: bool = True
    stride_in_1x1: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", _steps(self.steps))
        _one_of("arch", self.arch, (*DEPTHS, *SMALL))
        _one_of("norm", self.norm, NORMS)
        _one_of("amp", self.amp, AMP)
        for name in ("data", "output", "device"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value or len(value) > 4096 or not _CONTROL.isdisjoint(value):
                raise ConfigError(f"pretrain {name} is {shown(value)}; give a text such as {_EXAMPLES[name]!r}")
        for name, (least, most) in _WHOLE.items():
            value = getattr(self, name)
            if not (value is None and name in _OPTIONAL):
                _whole(name, value, least, most)
        for name, (low, high, above) in _NUMBERS.items():
            value = getattr(self, name)
            if not (value is None and name in _OPTIONAL):
                _number(name, value, low, high, above)
        for name in ("color", "stride_in_1x1"):
            if not isinstance(getattr(self, name), bool):
                raise ConfigError(f"pretrain {name} is {shown(getattr(self, name))}; use True or False")
        self._check_together()

    def _check_together(self) -> None:
        if self.groups is not None and self.channels_per_group is not None:
            raise ConfigError(
                f"pretrain groups is {self.groups} and channels_per_group {self.channels_per_group}; give one of them"
            )
        given = "groups" if self.groups is not None else "channels_per_group"
        if self.norm != "GN" and getattr(self, given) is not None:
            raise ConfigError(
                f"pretrain {given} is {getattr(self, given)}, but norm {self.norm} has none; leave it out"
            )
        if self.norm == "BN" and self.batch_size == 1:
            raise ConfigError("pretrain batch_size is 1, but BN needs at least 2 images to take statistics of")
        if self.arch in SMALL and self.data not in BUILTIN and self.image_size is None:
            raise ConfigError(
                f"pretrain image_size is not given: {self.arch} on a folder of images needs it, such as 32"
            )
        if self.images is not None and self.data != "shapes":
            raise ConfigError(
                f"pretrain images is {self.images}, but data is {shown(self.data)}; it is for shapes alone"
            )
        if self.data == "digits" and self.arch not in SMALL:
            raise ConfigError(
                f"pretrain arch is {self.arch}, but digits are of 8x8 pixels; use one of {', '.join(SMALL)}"
            )
        if self.stride_in_1x1 and DEPTHS.get(self.arch, 0) < 50:
            raise ConfigError(f"pretrain stride_in_1x1 is True, but {self.arch} has no bottlenecks; leave it out")

    @property
    def side(self) -> int:
        """Side in pixels of the images that the network sees."""
        return self.image_size or IMAGE_SIZES[self.data if self.data in BUILTIN else ""]

    @property
    def group_rule(self) -> tuple[int, int]:
        """(groups, channels per group) as MODEL.GN.NUM_GROUPS and CHANNELS_PER_GROUP have them."""
        return self.groups or DEFAULT_GROUPS, self.channels_per_group or 0

    def to_dict(self) -> dict[str, Any]:
        """Plain values by field, fit for JSON."""
        return {**asdict(self), "steps": list(self.steps)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Settings:
        """Inverse of :meth:`to_dict`.

        Raises:
            ConfigError: an unknown or a missing field.
        """
        known = [f.name for f in fields(cls)]
        for name in values:
            if name not in known:
                raise ConfigError(f"pretrain {one_line(name)}: no such setting; they are {', '.join(known)}")
        for name in ("arch", "norm", "data", "output"):
            if name not in values:
                raise ConfigError(f"pretrain {name} is missing")
        return cls(**values)


#: Whole numbers and their ends.
_WHOLE = {
    "groups": (1, 8192),
    "channels_per_group": (1, 8192),
    "image_size": (8, 4096),
    "images": (10, 1_000_000),
    "batch_size": (1, 65_536),
    "seed": (0, 2**63 - 1),
    "workers": (0, 1024),
}
#: Numbers, their ends, and whether the lower end itself is too low.
_NUMBERS = {
    "epochs": (0.0, 1e6, True),
    "lr": (0.0, 1000.0, True),
    "gamma": (0.0, 1.0, True),
    "momentum": (0.0, 1.0, False),
    "weight_decay": (0.0, 1000.0, False),
}
#: Those that may be None.
_OPTIONAL = ("groups", "channels_per_group", "image_size", "images", "lr")
_CONTROL = frozenset(map(chr, [*range(32), *range(127, 160)]))
_EXAMPLES = {"data": "imagenet/", "output": "output/pretrain", "device": "auto"}


def base_lr(settings: Settings, processes: int) -> float:
    """The learning rate to begin with: as given, or linear in the images of an iteration (Goyal et al. 2017)."""
    if settings.lr is not None:
        return settings.lr
    return REFERENCE_LR * settings.batch_size * processes / REFERENCE_BATCH


def lr_at(settings: Settings, lr: float, iteration: int, total: int) -> float:
    """Learning rate of the 0-based ``iteration`` of ``total``, from ``lr`` on."""
    return lr * settings.gamma ** sum(iteration >= round(step * total) for step in settings.steps)


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str) or value not in allowed:
        raise ConfigError(f"pretrain {name} is {shown(value)}; use one of {', '.join(allowed)}")


def _whole(name: str, value: Any, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ConfigError(f"pretrain {name} is {shown(value)}; use a whole number of {least} to {most}")


def _number(name: str, value: Any, low: float, high: float, above: bool) -> None:
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
    if not good or (above and value == low):
        least = f"above {low:g}" if above else f"from {low:g}"
        raise ConfigError(f"pretrain {name} is {shown(value)}; use a number {least} up to {high:g}")


def _steps(values: Any) -> tuple[float, ...]:
    try:
        steps = tuple(float(v) for v in values) if isinstance(values, (list, tuple)) else (math.nan,)
    except (TypeError, ValueError, OverflowError):
        steps = (math.nan,)
    if any(not 0 < s < 1 for s in steps) or list(steps) != sorted(set(steps)) or len(steps) > 1000:
        raise ConfigError(f"pretrain steps is {shown(values)}; use rising parts of the training between 0 and 1")
    return steps
