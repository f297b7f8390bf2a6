"""Recognise a weights file by its content and translate it: one row of :data:`FORMATS` per outside world.

To add a source: a module with its name table and ``translate``, and one row here. A row whose ``translate`` is None is
a format that we know but do not read; ``advice`` then says what to do.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from gn_det.checkpoint.catalog import local_path, published_file, published_preprocessing, split_options
from gn_det.checkpoint.formats import caffe2, layered, mmdet
from gn_det.checkpoint.io import check_tensors, read_any
from gn_det.checkpoint.meta import read_meta
from gn_det.checkpoint.source import Preprocessing, State, Weights
from gn_det.config.reader import parse_yaml
from gn_det.errors import ConfigError, WeightsError
from gn_det.files import StrPath
from gn_det.text import one_line

NORM_KEYS = ("MODEL.RESNETS.NORM", "MODEL.FPN.NORM", "MODEL.ROI_BOX_HEAD.NORM", "MODEL.ROI_MASK_HEAD.NORM")

_CHANNELS = 16  # of an image, at most


@dataclass(frozen=True)
class Format:
    """One outside world: how its tensor names look, and how they become ours."""

    name: str
    recognises: Callable[[Collection[str]], bool]
    translate: Callable[[State, Mapping[str, Any]], Weights] | None
    advice: str = ""


def read_weights(path: StrPath) -> Weights:
    """Read any known weights file; nothing in it is executed.

    Raises:
        WeightsError: unreadable, unsafe, of an unknown layout, or of a known layout that is not read yet.
    """
    payload = read_any(path)
    meta = read_meta(payload, path)
    state = _tensors(path, _state_of(path, payload))
    layout = next(f for f in FORMATS if f.recognises(state))
    if layout.translate is None:
        raise WeightsError(f"{path}: holds weights of {layout.name}; {layout.advice}")
    try:
        weights = layout.translate(state, payload)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    if meta is not None:
        steps = meta.get("provenance")
        step = steps[-1] if isinstance(steps, list) and steps and isinstance(steps[-1], Mapping) else {}
        before = step.get("kind")
        weights.kind = one_line(f"gn_det {meta['version']}", 40)
        if isinstance(before, str) and not meta["config"]:
            done = "trained" if step.get("trained") is True else "converted"  # by `gn-det pretrain`, or `convert`
            weights.kind = f"{one_line(before.split(', converted by')[0], 60)}, {done} by {weights.kind}"
        weights.meta = meta
        weights.config = _parse_config(path, meta["config"])
        weights.class_names = meta["class_names"]
        if weights.config is not None:
            _tell_from_config(weights)
        else:
            tell_from_block(weights, meta)
    elif payload.get("__author__") and weights.kind == _DETECTRON2:
        weights.kind = f"{_DETECTRON2}, by {one_line(payload['__author__'], 60)!r}"
    return weights


def open_weights(path_or_uri: StrPath, *, must_know: bool = True) -> Weights:
    """Fetch and read a weights file, and find out what preprocessing it expects.

    Args:
        path_or_uri: local path or URI, with ``?preprocessing=caffe`` or ``?preprocessing=torch`` behind it for a file
            that does not tell.
        must_know: refuse a file whose preprocessing nothing tells.

    Raises:
        WeightsError: see :func:`read_weights` and :func:`gn_det.checkpoint.catalog.local_path`; or a file whose
            preprocessing nothing tells.
    """
    uri, options = split_options(os.fspath(path_or_uri))
    path = local_path(uri)
    weights = read_weights(path)
    if options.preprocessing is not None:
        weights.preprocessing, weights.foldable = options.preprocessing, True
    elif weights.preprocessing is None or weights.asks:
        known = published_preprocessing(uri) or (published_file(path) if weights.asks else None)
        if known is not None:
            weights.preprocessing, weights.foldable = known, True
    if must_know and weights.asks and weights.preprocessing is None:
        raise WeightsError(
            f"{uri}: {weights.kind} that does not tell how its images were normalised: put ?preprocessing=caffe (BGR, "
            "0-255, as open-mmlab://detectron/resnet50_gn) or ?preprocessing=torch (RGB, ImageNet mean and std, as "
            "open-mmlab://contrib/resnet50_gn) behind its name"
        )
    return weights


def _state_of(path: StrPath, payload: Mapping[str, Any]) -> Mapping[Any, Any]:
    """The dict of tensors inside the wrappings in use: Detectron2/ours, Detectron, Lightning/mmdetection, none."""
    for key in ("model", "blobs", "state_dict"):
        if isinstance(payload.get(key), Mapping) and payload[key]:
            return payload[key]
    if not payload or not any(isinstance(v, (torch.Tensor, np.ndarray)) for v in payload.values()):
        keys = ", ".join(one_line(k, 30) for k in list(payload)[:5]) or "nothing"
        raise WeightsError(f"{path}: holds no weights (its entries: {keys}); give a file with a 'model' state dict")
    return payload


def _tensors(path: StrPath, state: Mapping[Any, Any]) -> State:
    """Tensors by name, without the prefixes of DistributedDataParallel and torch.compile."""
    tensors: State = {}
    for name, value in state.items():
        if isinstance(value, np.ndarray):
            value = _from_numpy(value)
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            if isinstance(name, str) and caffe2.is_ignored(name):
                continue
            raise WeightsError(f"{path}: entry {one_line(name, 60)!r} is a {type(value).__name__}, not a tensor")
        tensors[name] = value
    check_tensors(path, tensors)
    for prefix in ("module.", "_orig_mod."):
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name[len(prefix) :]: value for name, value in tensors.items()}
    return tensors


def _from_numpy(array: np.ndarray) -> torch.Tensor:
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "not writable": the tensor is only copied from
        return torch.from_numpy(array if array.flags.c_contiguous else array.copy())


# -------------------------------------------------------------------------------------------------- Detectron2 and ours

_DETECTRON2 = "Detectron2 checkpoint"
# Old constants, BN counters and the ImageNet classifier: in files, but no weights of a detector.
_D2_IGNORED = re.compile(
    r"(?:.*\.)?(?:pixel_mean|pixel_std)$|.*cell_anchors|(?:stem\.)?(?:fc|linear)\.(?:weight|bias)$"
)


def _is_detectron2(names: Collection[str]) -> bool:
    return any(re.match(r"(?:backbone\.(?:bottom_up\.)?)?(?:stem\.conv1|res[2-5]\.\d+)\.", name) for name in names)


def _from_detectron2(state: State, payload: Mapping[str, Any]) -> Weights:
    mean, std = state.get("pixel_mean"), state.get("pixel_std")
    preprocessing = None
    if mean is not None and std is not None and mean.numel() == std.numel() == 3:
        preprocessing = Preprocessing(
            pixel_mean=tuple(float(v) for v in mean.flatten()), pixel_std=tuple(float(v) for v in std.flatten())
        )
    ignored = tuple(name for name in state if _D2_IGNORED.match(name))
    kept = {name: value for name, value in state.items() if name not in set(ignored)}
    aside = {n: state[n] for n in ignored if n.startswith("stem.fc.")}
    return Weights(kept, _DETECTRON2, ignored=ignored, preprocessing=preprocessing, aside=aside)


def _matches(pattern: str) -> Callable[[Collection[str]], bool]:
    compiled = re.compile(pattern)
    return lambda names: any(compiled.match(name) for name in names)


# First row that recognises the names wins; the last takes everything, so that the error can name the tensors.
FORMATS: tuple[Format, ...] = (
    Format("a Caffe2 / Detectron detector", caffe2.looks_like_detector, caffe2.translate_detector),
    Format("a Caffe2 / Detectron ImageNet backbone", caffe2.looks_like_backbone, caffe2.translate_backbone),
    Format("an mmdetection detector", mmdet.looks_like_detector, mmdet.translate),
    Format("a torchvision, timm or mmdetection ResNet", layered.looks_like_backbone, layered.translate),
    Format(
        "a torchvision or mmdetection model of another architecture",
        _matches(r"(?:\w+\.)*layer[1-4]\.\d+\.conv1\."),
        None,
        "of those, plain ResNets (a state dict with conv1, layer1 ... layer4) and mmdetection's FPN detectors are read",
    ),
    Format("Detectron2", _is_detectron2, _from_detectron2),
    Format("an unknown model", lambda names: True, lambda state, _: Weights(state, "state dict of another model")),
)


# ------------------------------------------------------------------------------------- what our own checkpoints tell us


def _parse_config(path: StrPath, text: str) -> dict[str, Any] | None:
    try:
        config = parse_yaml(text, f"{one_line(str(path), 400)}: the config it stores")
    except ConfigError as error:
        raise WeightsError(str(error)) from None
    return config if isinstance(config, dict) else None


def lookup(config: Any, dotted: str) -> Any:
    """``config["A"]["B"]`` for "A.B", or None where the path ends early."""
    for key in dotted.split("."):
        if not isinstance(config, Mapping) or key not in config:
            return None
        config = config[key]
    return config


def _tell_from_config(weights: Weights) -> None:
    config = weights.config
    norm = lookup(config, "MODEL.RESNETS.NORM")
    if norm in ("GN", "LN", "IN"):
        weights.norm = norm
    has_gn = any(lookup(config, key) == "GN" for key in NORM_KEYS)
    groups, per_group = lookup(config, "MODEL.GN.NUM_GROUPS"), lookup(config, "MODEL.GN.CHANNELS_PER_GROUP") or 0
    if has_gn and type(groups) is int and type(per_group) is int:
        weights.groups = (groups, per_group)
    layout, stride = lookup(config, "INPUT.FORMAT"), lookup(config, "MODEL.RESNETS.STRIDE_IN_1X1")
    weights.preprocessing = Preprocessing(
        format=_order(layout),
        pixel_mean=_numbers(lookup(config, "MODEL.PIXEL_MEAN")),
        pixel_std=_numbers(lookup(config, "MODEL.PIXEL_STD")),
        stride_in_1x1=stride if isinstance(stride, bool) else None,
    )


def tell_from_block(weights: Weights, block: Mapping[str, Any]) -> None:
    """What ``gn-det convert`` wrote down of a source that has no config of ours."""
    about = block.get("weights")
    if not isinstance(about, Mapping):
        return
    norm, groups, needs = about.get("norm"), about.get("groups"), about.get("preprocessing")
    weights.norm = norm if norm in ("GN", "LN", "IN", "BN", "affine BN") else weights.norm
    if isinstance(groups, (list, tuple)) and len(groups) == 2 and all(type(g) is int for g in groups):
        weights.groups = (groups[0], groups[1])
    if isinstance(needs, Mapping):
        order, stride = needs.get("format"), needs.get("stride_in_1x1")
        weights.preprocessing = Preprocessing(
            format=_order(order),
            pixel_mean=_numbers(needs.get("pixel_mean")),
            pixel_std=_numbers(needs.get("pixel_std")),
            stride_in_1x1=stride if isinstance(stride, bool) else None,
        )
    weights.foldable = about.get("foldable") is True
    weights.asks = about.get("asks") is True


def _order(value: Any) -> str | None:
    """A channel order such as BGR or L; it is printed."""
    return one_line(value, 20) if isinstance(value, str) else None


def _numbers(value: Any) -> tuple[float, ...] | None:
    good = isinstance(value, (list, tuple)) and len(value) <= _CHANNELS and all(type(v) in (int, float) for v in value)
    return tuple(float(v) for v in value) if good else None
