"""Fold a source's channel order and std into the stem convolution, so that one config serves every backbone.

The source computes ``conv(W, (x - mean) / std)`` on pixels in its channel order, the configured model
``conv(W', (x - PIXEL_MEAN) / PIXEL_STD)`` in the order of INPUT.FORMAT. Both pad with zeros *after* normalising, so
with the same mean per channel, ``W'[:, c] = W[:, c] * PIXEL_STD[c] / std[c]`` gives the same numbers everywhere. With
another mean there is no such W': the difference is a constant inside the image and none in the padding. The mean
therefore stays in MODEL.PIXEL_MEAN, and a mean that differs is refused.
"""

from __future__ import annotations

from typing import Any

import torch

from gn_det.checkpoint.source import Preprocessing, State

STEM = ("backbone.bottom_up.stem.conv1.weight", "backbone.stem.conv1.weight", "stem.conv1.weight")
_ORDERS = ("BGR", "RGB")


def fold(state: State, needs: Preprocessing, target: Preprocessing) -> Preprocessing:
    """Rewrite the stem convolution in ``state`` (a new tensor, in place of the old) for ``target``'s order and std.

    Args:
        state: by Detectron2's names; the stem's weight is (out, 3, kernel, kernel).
        needs: what the weights expect; a part that is None is not changed.
        target: what they shall expect; format, std of three positive numbers.

    Returns:
        What the weights expect now: ``target``'s order and std, and their own mean in that order. The caller compares
        the mean. ``needs`` unchanged where nothing can be folded.
    """
    name = next((n for n in STEM if n in state), None)
    order, std, mean = needs.format, needs.pixel_std, needs.pixel_mean
    if name is None or order not in _ORDERS or target.format not in _ORDERS or std is None or target.pixel_std is None:
        return needs
    weight = state[name]
    good = all(len(t) == 3 for t in (std, target.pixel_std)) and all(v > 0 for v in (*std, *target.pixel_std))
    if weight.dim() != 4 or weight.shape[1] != 3 or not good or not weight.is_floating_point():
        return needs
    if order != target.format:
        weight, std = weight.flip(1), std[::-1]
        mean = None if mean is None else mean[::-1]
    if std != target.pixel_std:
        scale = torch.tensor(target.pixel_std, dtype=torch.float64) / torch.tensor(std, dtype=torch.float64)
        weight = (weight.double() * scale.view(1, 3, 1, 1)).to(weight.dtype)  # one rounding
    state[name] = weight
    return Preprocessing(target.format, mean, target.pixel_std, needs.stride_in_1x1)


def target_of(cfg: Any) -> Preprocessing:
    """What a configuration feeds the model (``cfg`` has INPUT.FORMAT, MODEL.PIXEL_MEAN and PIXEL_STD)."""
    return Preprocessing(
        str(cfg.INPUT.FORMAT),
        tuple(float(v) for v in cfg.MODEL.PIXEL_MEAN),
        tuple(float(v) for v in cfg.MODEL.PIXEL_STD),
    )
