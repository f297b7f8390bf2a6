"""Settings of a pre-training run, and the paper's rules that follow from them. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from typing import Any

from gn_det.errors import ConfigError
from gn_det.text import did_you_mean, one_line, shown
from gn_det.values import FLAG, Check, InvalidValue, Value, every, integer, items, number, one_of, optional, text

#: ResNets for images of ImageNet's size: their backbones are those of the detection configs.
DEPTHS = {"resnet18": 18, "resnet34": 34, "resnet50": 50, "resnet101": 101}
#: He et al.'s ResNets for CIFAR, of 6n + 2 layers: a 3x3 stem and three stages of n basic blocks.
SMALL = {f"resnet{6 * n + 2}": n for n in (1, 2, 3, 5, 7, 9, 18)}
VGG = "vgg16"
#: ResNets inflated for clips.
CLIPS = {"i3d_r18": 18, "i3d_r50": 50}
NORMS = ("BN", "SyncBN", "LN", "IN", "GN", "WN", "BR", "none")
#: Formulas of Weight Standardization, as in the config's schema, which needs too much for a command's help.
STANDARDIZATIONS = ("jhu", "bit", "timm")
#: Norms whose statistics are those of the batch.
_OF_BATCHES = ("BN", "SyncBN", "BR")
#: Data sets that need no folder; "cifar10:FOLDER" and "motions:FOLDER" name one.
BUILTIN = ("digits", "shapes", "cifar10", "motions")
#: Side of the images that a network sees, where ``image_size`` leaves it open.
IMAGE_SIZES = {"digits": 8, "shapes": 32, "cifar10": 32, "motions": 32}
#: Augmentation of images from a folder: fb.resnet.torch's, or that of He et al. for CIFAR.
CROP, SHIFT = "crop", "shift"
#: Generated training images of "shapes" and clips of "motions", where ``images`` leaves it open.
NUM_SHAPES = 3000
#: What settings are where they are left open. VGG's recipe has another rate, too, and a warm-up of 3 epochs.
_IMAGES: dict[str, Any] = {"batch_size": 32, "epochs": 100, "weight_decay": 1e-4, "steps": (0.3, 0.6, 0.9)}
_VGG = {**_IMAGES, "weight_decay": 5e-4, "steps": (0.3, 0.6, 0.8)}
#: Options that only clips have, and I3D's recipe (section 4.3, and Wang et al. 2018).
_OPTIONS: dict[str, Any] = {
    "frames": 32,
    "frame_stride": 2,
    "dropout": 0.5,
    "test_clips": 10,
    "test_crops": 3,
    "precise_bn": 200,
    "max_bad": 10,
}
OF_CLIPS = (*_OPTIONS, "iterations", "weights", "train_list", "val_list")
_CLIPS = {"batch_size": 8, "weight_decay": 1e-4, "steps": (0.375, 0.75), **_OPTIONS}
VGG_WARMUP_EPOCHS = 3
#: Batch Renormalization: limits, and the fractions of the training between which they grow from batch norm's.
_RENORM: dict[str, Any] = {"r_max": 1.5, "d_max": 0.5, "renorm_ramp": (0.04, 0.3)}

_TEXT = text(4096, least=1, printable=True)
_RISING = every(
    items(number(0, 1, above=True, below=True), 0, 1000),
    Value("rising fractions of the training", lambda v: list(v) == sorted(set(v))),
)
_RAMP = every(items(number(0, 1), 2, 2), Value("fractions of the training, none falling", lambda v: v[0] <= v[1]))


def _setting(check: Check, doc: str, default: Any = MISSING) -> Any:
    """A field that may also be None if that is its default."""
    return field(default=default, metadata={"check": optional(check) if default is None else check, "doc": doc})


# fmt: off
@dataclass(frozen=True)
class Settings:
    """A pre-training run; the defaults are the paper's recipe (section 4.1), and None takes that of the network.

    ``doc`` in the metadata of a field is what ``gn-det classify --help`` says of it.

    Raises:
        ConfigError: a value, or two together, cannot be used; names the setting.
    """

    arch: str = _setting(one_of(*DEPTHS, *SMALL, VGG, *CLIPS),
        "resnet18|34|50|101, vgg16; resnet8|14|20|32|44|56|110 (tiny images); i3d_r18|50 (videos)")
    norm: str = _setting(one_of(*NORMS), "BN, SyncBN, LN, IN, GN, WN (Weight Norm), BR (Batch Renorm) or none")
    data: str = _setting(_TEXT,
        "folder with train/CLASS/* and val/CLASS/*; or digits, shapes, cifar10[:DIR], motions[:DIR] (videos)")
    output: str = _setting(_TEXT, "default output/classify_ARCH_NORM")
    groups: int | None = _setting(integer(1, 8192), "number of GN groups (default 32)", None)
    channels_per_group: int | None = _setting(integer(1, 8192), "size of GN groups, instead of --groups", None)
    ws: str | None = _setting(one_of(*STANDARDIZATIONS),
        "Weight Standardization before each norm: jhu, bit or timm, as MODEL.WS.RESNETS", None)
    batch_size: int = _setting(integer(1, 65_536), "images per process (default 32; 8 clips)", None)
    epochs: float = _setting(number(0, 1e6, above=True),
        "default 100; the learning rate drops after 30, 60 and 90%", None)
    lr: float | None = _setting(number(0, 1000, above=True),
        "learning rate, not scaled (default 0.1 x batch / 256; vgg16 0.01; clips 0.01 x batch / 64)", None)
    momentum: float = _setting(number(0, 1), "Nesterov's, as in fb.resnet.torch", 0.9)
    #: None: 1e-4, VGG 5e-4
    weight_decay: float = _setting(number(0, 1000),
        "of all parameters, gamma and beta included; VGG: of weights alone; clips: of all but gamma and beta", None)
    #: None: epochs 30, 60 and 90 (VGG: 80) of 100; clips: 150,000 and 300,000 iterations of 400,000
    steps: tuple[float, ...] = _setting(_RISING, "fractions of the training after which the rate drops", None)
    gamma: float = _setting(number(0, 1, above=True), "factor of the learning rate at each step", 0.1)
    seed: int = _setting(integer(0, 2**63 - 1), "default 1", 1)
    workers: int = _setting(integer(0, 1024), "data loading processes (default 4)", 4)
    amp: str = _setting(one_of("off", "bf16", "fp16", "auto"),
        "autocast: bf16, fp16, off (default), or auto: bf16 where a CPU computes in it", "off")
    channels_last: bool | str = _setting(one_of(False, True, "auto"),
        "keep activations in this layout, faster on CPUs; auto: where --amp auto takes bf16", False)
    device: str = _setting(_TEXT, "auto, cpu, cuda or cuda:1", "auto")
    image_size: int | None = _setting(integer(8, 4096),
        "side of the crops (default 224; digits 8, other built-in sets 32)", None)
    #: A subset of a folder or of cifar10 is the same for every seed, with equal shares of the classes, and at most as
    #: many validation images.
    images: int | None = _setting(integer(10, 1_000_000),
        "number of training images (default: all; shapes, motions: 3000)", None)
    augment: str = _setting(one_of(CROP, SHIFT),
        "of a folder: crop (default), or shift: small images, as CIFAR's", CROP)
    color: bool = _setting(FLAG, "turn off color augmentation", True)
    stride_in_1x1: bool = _setting(FLAG,
        "stride in the first 1x1 of each bottleneck, as in the bn_* configs (default: in the 3x3, as in gn_*)", False)
    r_max: float | None = _setting(number(1, 1000), "limit of Batch Renorm's r (default 1.5)", None)
    d_max: float | None = _setting(number(0, 1000), "limit of Batch Renorm's d (default 0.5)", None)
    #: About Ioffe's; before the first, BR is BN.
    renorm_ramp: tuple[float, float] | None = _setting(_RAMP,
        "fractions of the training between which BR's limits grow to r_max and d_max (default 0.04 and 0.3)", None)
    record: str | None = _setting(_TEXT,
        "percentiles of its output before norm and ReLU over training, e.g. conv5_3", None)
    frames: int = _setting(integer(8, 4096), "frames of a clip (default 32)", None)
    frame_stride: int = _setting(integer(1, 1000), "take every N-th frame (default 2)", None)
    iterations: int | None = _setting(integer(1, 10**9), "of clips, instead of --epochs (default 400000)", None)
    dropout: float = _setting(number(0, 1, below=True), "before the linear layer (default 0.5)", None)
    weights: str | None = _setting(_TEXT, "2-D backbone to inflate, any that MODEL.WEIGHTS takes", None)
    test_clips: int = _setting(integer(1, 1000), "clips of a video in the final test (default 10)", None)
    test_crops: int = _setting(one_of(1, 3), "crops of each of them, 1 or 3 (default 3)", None)
    precise_bn: int = _setting(integer(0, 10**6), "batches for BN's statistics before it (default 200)", None)
    train_list: str | None = _setting(_TEXT, "videos of --data: Kinetics' csv or UCF101's list", None)
    val_list: str | None = _setting(_TEXT, "the same for validation", None)
    max_bad: int = _setting(integer(0, 10**9), "bad videos to skip before the run stops (default 10)", None)
    # fmt: on

    def __post_init__(self) -> None:
        for each in fields(self):
            try:
                each.metadata["check"](getattr(self, each.name), f"classify {each.name}")
            except InvalidValue as error:
                raise ConfigError(str(error)) from None
        for name, default in self._recipe().items():
            value = default if getattr(self, name) is None else getattr(self, name)
            value = tuple(map(float, value)) if isinstance(default, tuple) else value
            object.__setattr__(self, name, value)
        for name, wrong, why in self._contradictions():
            if wrong:
                raise ConfigError(f"classify {name} is {shown(getattr(self, name))}, but {why}")

    def _recipe(self) -> dict[str, Any]:
        """Values of the settings that were left open."""
        renorm = _RENORM if self.norm == "BR" else {}
        if not self.of_clips:
            return {**(_VGG if self.arch == VGG else _IMAGES), **renorm}
        length: dict[str, Any] = {"iterations": 400_000} if self.epochs is None else {}
        statistics = {} if self.norm in ("BN", "SyncBN") else {"precise_bn": 0}
        return {**_CLIPS, **length, **statistics}

    def _contradictions(self) -> list[tuple[str, bool, str]]:
        """(setting, whether it contradicts others, why)."""
        small, folder, ours = self.arch in SMALL, self.source not in BUILTIN, f"norm {self.norm}"
        clips = f"clips (arch {', '.join(CLIPS)})"
        only_of = [
            (_RENORM, self.norm == "BR", "it is of norm BR"),
            (OF_CLIPS, self.of_clips, f"it is of {clips}"),
            (("groups", "channels_per_group"), self.norm == "GN", f"{ours} has none"),
        ]
        foreign = [
            (name, not fits and getattr(self, name) is not None, f"{why}; leave it out")
            for names, fits, why in only_of
            for name in names
        ]
        least = 32 if self.arch == VGG else 16 if self.of_clips else 0
        whole = self.data == "digits" or (self.of_clips and folder)
        both = self.groups is not None and self.channels_per_group is not None
        lists = (self.train_list is None) != (self.val_list is None)
        others = (self.source == "motions") != self.of_clips and not folder
        alone = self.norm in _OF_BATCHES and self.batch_size == 1
        shifts = self.augment == SHIFT and (self.of_clips or not folder)
        ws = self.ws is not None and (self.of_clips or self.norm in ("WN", "BR", "none"))
        strides = self.stride_in_1x1 and DEPTHS.get(self.arch, 0) < 50
        return [
            *foreign,
            ("iterations", None not in (self.iterations, self.epochs), "epochs is given, too; give one of them"),
            ("ws", ws, "only images with norm BN, SyncBN, LN, IN or GN have it; leave it out"),
            ("norm", self.of_clips and self.norm in ("WN", "BR"), "clips have BN, SyncBN, LN, IN, GN or none"),
            ("data", others, f"arch is {self.arch}; {clips} take a folder of videos or motions"),
            ("precise_bn", bool(self.precise_bn) and self.norm not in ("BN", "SyncBN"), f"{ours} needs none"),
            ("train_list", lists, f"val_list is {shown(self.val_list)}; give both lists or none"),
            ("train_list", self.train_list is not None and not folder, "data is generated; leave it out"),
            ("groups", both, f"channels_per_group is {self.channels_per_group}; give one of them"),
            ("batch_size", alone, f"{self.norm} needs at least 2 images for its statistics"),
            ("image_size", small and folder and not self.image_size, f"{self.arch} on a folder needs it, such as 32"),
            ("images", whole and self.images is not None, f"{self.data} is always used whole"),
            ("augment", shifts, f"data {self.data} has its own; leave it out"),
            ("arch", self.data == "digits" and not small, f"digits have 8x8 pixels; use one of {', '.join(SMALL)}"),
            ("image_size", self.source == "cifar10" and self.side != 32, "cifar10 has images of 32 pixels"),
            ("image_size", self.side < least, f"{self.arch} needs at least {least}"),
            ("stride_in_1x1", strides, f"{self.arch} has no such choice; leave it out"),
        ]

    @property
    def of_clips(self) -> bool:
        """Whether the network sees clips of videos."""
        return self.arch in CLIPS

    @property
    def span(self) -> int:
        """Frames of a video from the start of a clip to its end."""
        return self.frames * self.frame_stride

    @property
    def side(self) -> int:
        """Side in pixels of the images that the network sees."""
        return self.image_size or IMAGE_SIZES.get(self.source, 224)

    @property
    def source(self) -> str:
        """``data`` without the folder of a built-in set."""
        name = self.data.partition(":")[0]
        return name if name in ("cifar10", "motions") else self.data

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
        """Plain values by field, fit for JSON; without the options that this run does not have."""
        options = ("ws", *_RENORM, *OF_CLIPS)
        values = {name: value for name, value in asdict(self).items() if value is not None or name not in options}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Settings:
        """Invert :meth:`to_dict`; raise ConfigError for an unknown, missing or wrong field."""
        known = [f.name for f in fields(cls)]
        for name in values:
            if name not in known:
                hint = did_you_mean(name, known)
                raise ConfigError(f"classify {one_line(name)}: no such setting{hint}; they are {', '.join(known)}")
        for name in ("arch", "norm", "data", "output"):
            if name not in values:
                raise ConfigError(f"classify {name} is missing")
        return cls(**values)


def reference(settings: Settings) -> tuple[float, int]:
    """The recipe's learning rate, and the images or clips of an iteration that it belongs to.

    Images: 8 GPUs with 32 each; clips: 8 GPUs with 8 each.
    """
    return (0.01, 64) if settings.of_clips else (0.01 if settings.arch == VGG else 0.1, 256)


def base_lr(settings: Settings, processes: int) -> float:
    """The learning rate to begin with: as given, or linear in the images of an iteration (Goyal et al. 2017)."""
    if settings.lr is not None:
        return settings.lr
    rate, batch = reference(settings)
    return rate * settings.batch_size * processes / batch


def lr_factor(settings: Settings, iteration: int, total: int, processes: int = 1) -> float:
    """What multiplies :func:`base_lr` in the 0-based ``iteration`` of ``total``."""
    factor = float(settings.gamma ** sum(iteration >= round(step * total) for step in settings.steps))
    warmup = VGG_WARMUP_EPOCHS / settings.epochs * total if settings.arch == VGG and settings.lr is None else 0
    if iteration < warmup:
        start = min(reference(settings)[0] / base_lr(settings, processes), 1.0)
        factor *= start + (1 - start) * iteration / warmup
    return factor


def renorm_limits(settings: Settings, iteration: int, total: int) -> tuple[float, float]:
    """r_max and d_max of Batch Renormalization in the 0-based ``iteration`` of ``total``."""
    assert settings.r_max is not None and settings.d_max is not None and settings.renorm_ramp is not None
    begin, end = (fraction * total for fraction in settings.renorm_ramp)
    grown = float(iteration >= end) if begin == end else min(max((iteration - begin) / (end - begin), 0.0), 1.0)
    return 1 + (settings.r_max - 1) * grown, settings.d_max * grown
