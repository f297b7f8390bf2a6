"""ResNet with GroupNorm, FPN and the box head in plain NumPy, reading tensors by the source's own names."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

Blobs = dict[str, np.ndarray]
Names = Callable[[str], tuple[str, str, str]]  # layer of the source -> its weight, gamma, beta


def conv(x: np.ndarray, weight: np.ndarray, stride: int, pad: int) -> np.ndarray:
    """(C, H, W) with (O, C, k, k) to (O, H', W'), as one matrix product over unfolded windows."""
    k = weight.shape[-1]
    x = np.pad(x, ((0, 0), (pad, pad), (pad, pad)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (k, k), axis=(1, 2))[:, ::stride, ::stride]
    c, h, w = windows.shape[:3]
    columns = windows.transpose(1, 2, 0, 3, 4).reshape(h * w, c * k * k)
    return (columns @ weight.reshape(len(weight), -1).T).T.reshape(-1, h, w)


def group_norm(x: np.ndarray, gamma: np.ndarray, beta: np.ndarray, groups: int = 32, eps: float = 1e-5) -> np.ndarray:
    grouped = x.reshape(groups, -1)
    mean, var = grouped.mean(1, keepdims=True), grouped.var(1, keepdims=True)
    normal = ((grouped - mean) / np.sqrt(var + eps)).reshape(x.shape)
    return normal * gamma[:, None, None] + beta[:, None, None]


def max_pool(x: np.ndarray) -> np.ndarray:
    x = np.pad(x, ((0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
    return np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))[:, ::2, ::2].max((-1, -2))


def resnet(blobs: Blobs, x: np.ndarray, names: Names, blocks: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Features res2 ... res5 of an image (3, H, W) that is already normalized; layers are "stem", "2.0.a", "2.0.s"."""

    def layer(x: np.ndarray, name: str, stride: int = 1, pad: int = 0) -> np.ndarray:
        weight, gamma, beta = names(name)
        return group_norm(conv(x, blobs[weight], stride, pad), blobs[gamma], blobs[beta])

    x = max_pool(np.maximum(layer(x, "stem", 2, 3), 0))
    features = {}
    for stage, count in zip((2, 3, 4, 5), blocks):
        for block in range(count):
            stride = 2 if block == 0 and stage > 2 else 1
            at = f"{stage}.{block}"
            inner = np.maximum(layer(x, f"{at}.a"), 0)
            inner = np.maximum(layer(inner, f"{at}.b", stride, 1), 0)  # the stride is in the 3x3
            shortcut = layer(x, f"{at}.s", stride) if block == 0 else x
            x = np.maximum(layer(inner, f"{at}.c") + shortcut, 0)
        features[f"res{stage}"] = x
    return features


def fpn(blobs: Blobs, features: dict[str, np.ndarray], lateral: Names, output: Names) -> dict[str, np.ndarray]:
    """p2 ... p5: 1x1 and 3x3 convolutions with GN, nearest upsampling, sum; layers are "2" ... "5"."""
    levels, top = {}, None
    for stage in "5432":
        weight, gamma, beta = lateral(stage)
        inner = group_norm(conv(features[f"res{stage}"], blobs[weight], 1, 0), blobs[gamma], blobs[beta])
        top = inner if top is None else inner + top.repeat(2, axis=1).repeat(2, axis=2)
        weight, gamma, beta = output(stage)
        levels[f"p{stage}"] = group_norm(conv(top, blobs[weight], 1, 1), blobs[gamma], blobs[beta])
    return levels


def box_head(blobs: Blobs, x: np.ndarray, names: Names, fc: tuple[str, str]) -> np.ndarray:
    """A pooled RoI (C, 7, 7) through four convolutions with GN and one fully connected layer."""
    for i in "1234":
        weight, gamma, beta = names(i)
        x = np.maximum(group_norm(conv(x, blobs[weight], 1, 1), blobs[gamma], blobs[beta]), 0)
    return np.maximum(blobs[fc[0]] @ x.reshape(-1) + blobs[fc[1]], 0)
