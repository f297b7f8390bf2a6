"""Settings of a pre-training run, and the paper's rules that follow from them. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from gn_det.errors import ConfigError
from gn_det.text import did_you_mean, one_line, shown
from gn_det.values import FLAG, Check, InvalidValue, Value, integer, is_number, number, one_of, optional, text

#: ResNets for images of ImageNet's size: their backbones are those of the detection configs.
DEPTHS = {"resnet18": 18, "resnet34": 34, "resnet50": 50, "resnet101": 101}
#: He et al.'s ResNets for CIFAR, of 6n + 2 layers: a 3x3 stem and three stages of n basic blocks.
SMALL = {"resnet8": 1, "resnet14": 2, "resnet20": 3}
#: Data sets that need no files.
BUILTIN = ("digits", "shapes")
#: Side of the images that a network sees, where ``image_size`` leaves it open.
IMAGE_SIZES = {"digits": 8, "shapes": 32}
#: Generated training images of "shapes", where ``images`` leaves it open.
NUM_SHAPES = 3000
#: The batch that the paper's learning rate of 0.1 belongs to: 8 GPUs with 32 images each.
REFERENCE_BATCH = 256
REFERENCE_LR = 0.1

_TEXT = text(4096, least=1, printable=True)
_RISING = Value(
    "a rising list of fractions of the training, each above 0 and below 1",
    lambda v: (
        isinstance(v, (list, tuple))
        and len(v) <= 1000
        and all(is_number(s) and 0 < s < 1 for s in v)
        and list(v) == sorted(set(v))
    ),
)


def _setting(check: Check, *default: Any) -> Any:
    return field(metadata={"check": check}, **({"default": default[0]} if default else {}))


@dataclass(frozen=True)
class Settings:
    """A pre-training run; the defaults are the paper's recipe (section 4.1).

    Attributes:
        arch: one of :data:`DEPTHS` (detection backbones) or :data:`SMALL` (for tiny images).
        norm: "BN", "LN", "IN" or "GN", in every layer.
        data: folder with ``train/<class>/*`` and ``val/<class>/*``, or "digits" (scikit-learn's handwritten digits) or
            "shapes" (generated, see :func:`gn_det.classification.image_sources.load_shapes`).
        output: folder for weights, checkpoint, metrics and summary.
        groups, channels_per_group: division of GN's channels (Table 3); at most one of them, 32 groups without.
        batch_size: images of one process in an iteration.
        epochs: passes over the training images; a fraction is allowed.
        lr: learning rate; None: 0.1 for 256 images in an iteration over all processes, and linear in that number.
        momentum: Nesterov's, as in fb.resnet.torch.
        weight_decay: of all weights, gamma and beta included.
        steps: fractions of the training after which ``gamma`` multiplies the learning rate: epochs 30, 60 and 90.
        gamma: see ``steps``.
        seed: of initial weights, order and augmentation.
        workers: processes that read images from a folder.
        amp: "off", "bf16" or "fp16" autocast, or "auto": bf16 on a CPU that computes in it, else "off".
        channels_last: keep weights and activations in this layout; "auto": where amp "auto" takes bf16.
        device: "auto", "cpu", "cuda" or "cuda:N".
        image_size: side of the square that the network sees; None: 224, for digits 8, for shapes 32.
        images: generated training images of "shapes"; None: 3000.
        color: brightness, contrast, saturation and lighting augmentation of fb.resnet.torch, on images from a folder.
        stride_in_1x1: stride in the first 1x1 of a bottleneck instead of its 3x3, as ``bn_*`` configs expect (so does
            the published R-50). ResNet-18 and 34 have no such choice.

    Raises:
        ConfigError: a value, or two together, cannot be used; names the setting.
    """

    arch: str = _setting(one_of(*DEPTHS, *SMALL))
    norm: str = _setting(one_of("BN", "LN", "IN", "GN"))
    data: str = _setting(_TEXT)
    output: str = _setting(_TEXT)
    groups: int | None = _setting(optional(integer(1, 8192)), None)
    channels_per_group: int | None = _setting(optional(integer(1, 8192)), None)
    batch_size: int = _setting(integer(1, 65_536), 32)
    epochs: float = _setting(number(0, 1e6, above=True), 100)
    lr: float | None = _setting(optional(number(0, 1000, above=True)), None)
    momentum: float = _setting(number(0, 1), 0.9)
    weight_decay: float = _setting(number(0, 1000), 1e-4)
    steps: tuple[float, ...] = _setting(_RISING, (0.3, 0.6, 0.9))
    gamma: float = _setting(number(0, 1, above=True), 0.1)
    seed: int = _setting(integer(0, 2**63 - 1), 1)
    workers: int = _setting(integer(0, 1024), 4)
    amp: str = _setting(one_of("off", "bf16", "fp16", "auto"), "off")
    channels_last: bool | str = _setting(one_of(False, True, "auto"), False)
    device: str = _setting(_TEXT, "auto")
    image_size: int | None = _setting(optional(integer(8, 4096)), None)
    images: int | None = _setting(optional(integer(10, 1_000_000)), None)
    color: bool = _setting(FLAG, True)
    stride_in_1x1: bool = _setting(FLAG, False)

    def __post_init__(self) -> None:
        for each in fields(self):
            try:
                each.metadata["check"](getattr(self, each.name), f"pretrain {each.name}")
            except InvalidValue as error:
                raise ConfigError(str(error)) from None
        object.__setattr__(self, "steps", tuple(float(s) for s in self.steps))
        for name, wrong, why in self._contradictions():
            if wrong:
                raise ConfigError(f"pretrain {name} is {shown(getattr(self, name))}, but {why}")

    def _contradictions(self) -> list[tuple[str, bool, str]]:
        """(setting, whether it contradicts others, why)."""
        given = "groups" if self.groups is not None else "channels_per_group"
        has_groups = getattr(self, given) is not None
        both = self.groups is not None and self.channels_per_group is not None
        small, folder = self.arch in SMALL, self.data not in BUILTIN
        return [
            ("groups", both, f"channels_per_group is {self.channels_per_group}; give one of them"),
            (given, self.norm != "GN" and has_groups, f"norm {self.norm} has none; leave it out"),
            ("batch_size", self.norm == "BN" and self.batch_size == 1, "BN needs at least 2 images for its statistics"),
            ("image_size", small and folder and not self.image_size, f"{self.arch} on a folder needs it, such as 32"),
            ("images", self.images is not None and self.data != "shapes", "only data shapes is generated"),
            ("arch", self.data == "digits" and not small, f"digits have 8x8 pixels; use one of {', '.join(SMALL)}"),
            (
                "stride_in_1x1",
                self.stride_in_1x1 and DEPTHS.get(self.arch, 0) < 50,
                f"{self.arch} has no bottlenecks; leave it out",
            ),
        ]

    @property
    def side(self) -> int:
        """Side in pixels of the images that the network sees."""
        return self.image_size or IMAGE_SIZES.get(self.data, 224)

    @property
    def group_rule(self) -> tuple[int, int]:
        """(groups, channels per group) as MODEL.GN.NUM_GROUPS and CHANNELS_PER_GROUP have them."""
        return self.groups or 32, self.channels_per_group or 0

    def settled(self, device: str, old: Mapping[str, Any]) -> Settings:
        """Without "auto": as the earlier run with the settings ``old`` chose, else as the CPU's features say."""
        from gn_det.engine.precision import chosen_by_auto

        taken, _ = chosen_by_auto(device)
        choices = {"amp": "bf16" if taken else "off", "channels_last": taken}
        unsettled = {name: choice for name, choice in choices.items() if getattr(self, name) == "auto"}
        return replace(self, **{name: old.get(name, choice) for name, choice in unsettled.items()})

    def to_dict(self) -> dict[str, Any]:
        """Plain values by field, fit for JSON."""
        return {**asdict(self), "steps": list(self.steps)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Settings:
        """Inverse of :meth:`to_dict`.

        Raises:
            ConfigError: an unknown or a missing field, or see :class:`Settings`.
        """
        known = [f.name for f in fields(cls)]
        for name in values:
            if name not in known:
                hint = did_you_mean(name, known)
                raise ConfigError(f"pretrain {one_line(name)}: no such setting{hint}; they are {', '.join(known)}")
        for name in ("arch", "norm", "data", "output"):
            if name not in values:
                raise ConfigError(f"pretrain {name} is missing")
        return cls(**values)


def base_lr(settings: Settings, processes: int) -> float:
    """The learning rate to begin with: as given, or linear in the images of an iteration (Goyal et al. 2017)."""
    if settings.lr is not None:
        return settings.lr
    return REFERENCE_LR * settings.batch_size * processes / REFERENCE_BATCH


def lr_factor(settings: Settings, iteration: int, total: int) -> float:
    """What multiplies the learning rate in the 0-based ``iteration`` of ``total``."""
    return float(settings.gamma ** sum(iteration >= round(step * total) for step in settings.steps))
