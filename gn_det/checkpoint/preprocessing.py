"""The input that weights expect, and how to rewrite the stem convolution for another convention."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gn_det.text import one_line

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Preprocessing:
    """What weights expect of input and network; None if unknown."""

    format: str | None = None  # channel order, "BGR" or "RGB"
    pixel_mean: tuple[float, ...] | None = None  # per channel in that order, in 0-255 units
    pixel_std: tuple[float, ...] | None = None  # likewise
    stride_in_1x1: bool | None = None  # whether a bottleneck strides in its first 1x1 convolution (else in the 3x3)


#: Field -> config key.
KEYS = {
    "format": "INPUT.FORMAT",
    "pixel_mean": "MODEL.PIXEL_MEAN",
    "pixel_std": "MODEL.PIXEL_STD",
    "stride_in_1x1": "MODEL.RESNETS.STRIDE_IN_1X1",
}
_CHANNELS = 16  # of an image, at most
#: Input of Caffe's models: BGR, 0-255, mean subtracted.
CAFFE = Preprocessing("BGR", (103.530, 116.280, 123.675), (1.0, 1.0, 1.0), stride_in_1x1=False)
#: Input of torchvision's and timm's ImageNet models, in 0-255 units: mean (0.485, 0.456, 0.406) of 1 in RGB, and std.
TORCH = Preprocessing("RGB", (123.675, 116.280, 103.530), (58.395, 57.120, 57.375), stride_in_1x1=False)
#: Choices for a file that does not store it, as in ``MODEL.WEIGHTS r50_gn.pth?preprocessing=torch``.
PREPROCESSINGS = {"caffe": CAFFE, "torch": TORCH}
#: Names of the stem convolution with FPN, with C4, and of a bare backbone.
STEM = ("backbone.bottom_up.stem.conv1.weight", "backbone.stem.conv1.weight", "stem.conv1.weight")


def show(value: Any) -> str:
    """Format a value for a config override; numbers as ``[103.53,116.28,123.675]``."""
    if isinstance(value, (tuple, list)):
        return "[" + ",".join(f"{v:.8g}" for v in value) + "]"
    return one_line(value) or "''"


def close(ours: Sequence[float], theirs: Sequence[float]) -> bool:
    """Return whether two means or stds are equal up to the rounding of published constants."""
    return len(ours) == len(theirs) and all(abs(a - b) <= 0.01 for a, b in zip(ours, theirs))


def fold(state: MutableMapping[str, torch.Tensor], needs: Preprocessing, target: Preprocessing) -> Preprocessing:
    """Rewrite the stem convolution in ``state`` (a new tensor replaces it) for ``target``'s channel order and std.

    The source computes ``conv(W, (x - mean) / std)``, the configured model ``conv(W', (x - PIXEL_MEAN) / PIXEL_STD)``.
    Both pad with zeros *after* normalizing, so with the same mean per channel ``W'[:, c] = W[:, c] * PIXEL_STD[c] /
    std[c]`` gives the same numbers everywhere. With another mean there is no such W', because the difference is a
    constant inside the image and zero in the padding. So the mean is not folded, and the caller compares it.

    Returns:
        The new expectations: ``target``'s order and std, and the weights' mean in that order; ``needs`` if nothing can
        be folded.
    """
    name = next((n for n in STEM if n in state), None)
    std, mean = needs.pixel_std, needs.pixel_mean
    if name is None or not {needs.format, target.format} <= {"BGR", "RGB"} or std is None or target.pixel_std is None:
        return needs
    weight = state[name]
    good = all(len(s) == 3 and min(s) > 0 for s in (std, target.pixel_std))
    if weight.dim() != 4 or weight.shape[1] != 3 or not good or not weight.is_floating_point():
        return needs
    if needs.format != target.format:
        weight, std = weight.flip(1), std[::-1]
        mean = None if mean is None else mean[::-1]
    if std != target.pixel_std:
        exact = weight.double()
        scale = exact.new_tensor([ours / theirs for ours, theirs in zip(target.pixel_std, std)])
        weight = (exact * scale.view(1, 3, 1, 1)).to(weight.dtype)  # one rounding
    state[name] = weight
    return Preprocessing(target.format, mean, target.pixel_std, needs.stride_in_1x1)


def read_preprocessing(values: Mapping[str, Any]) -> Preprocessing:
    """Return a preprocessing from values by name of the field, which may come from a file; None for invalid ones."""
    order, stride = values.get("format"), values.get("stride_in_1x1")
    return Preprocessing(
        one_line(order, 20) if isinstance(order, str) else None,  # it is printed
        _numbers(values.get("pixel_mean")),
        _numbers(values.get("pixel_std")),
        stride if isinstance(stride, bool) else None,
    )


def _numbers(value: Any) -> tuple[float, ...] | None:
    good = isinstance(value, (list, tuple)) and len(value) <= _CHANNELS and all(type(v) in (int, float) for v in value)
    return tuple(float(v) for v in value) if good else None
