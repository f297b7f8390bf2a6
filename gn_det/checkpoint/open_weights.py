"""Recognize a weights file by its content and translate it: one row of :data:`FORMATS` per project."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import torch

from gn_det.checkpoint.formats import caffe2, mmdet, timm_v2, torchvision
from gn_det.checkpoint.formats.common import State, Weights
from gn_det.checkpoint.io import check_tensors, read_any
from gn_det.checkpoint.meta import read_meta
from gn_det.checkpoint.preprocessing import KEYS, Preprocessing, read_preprocessing
from gn_det.checkpoint.weights_uri import local_path, published, split_options
from gn_det.config.defaults import get_value
from gn_det.config.reader import parse_yaml
from gn_det.config.schema import WEIGHT_STANDARDIZATIONS, WS_SECTIONS
from gn_det.errors import ConfigError, WeightsError
from gn_det.files import StrPath
from gn_det.text import one_line

NORM_KEYS = ("MODEL.RESNETS.NORM", "MODEL.FPN.NORM", "MODEL.ROI_BOX_HEAD.NORM", "MODEL.ROI_MASK_HEAD.NORM")


# For each project: a test of tensor names, and a translator of tensors and file. The first row that recognizes the
# names wins.
FORMATS: tuple[tuple[Callable[[Collection[str]], bool], Callable[[State, Mapping[str, Any]], Weights]], ...] = (
    (caffe2.recognizes, caffe2.translate),
    (mmdet.recognizes, mmdet.translate),
    (torchvision.recognizes, torchvision.translate),
    (timm_v2.recognizes, timm_v2.translate),
)
_OTHER_LAYERED = re.compile(r"(?:\w+\.)*layer[1-4]\.\d+\.conv1\.")
_KNOWN = re.compile(r"(?:backbone\.(?:bottom_up\.)?)?(?:stem\.conv1|res[2-5]\.\d+)\.")
# Old constants and the ImageNet classifier: present in files, but not weights of a detector.
_IGNORED = re.compile(r"(?:.*\.)?(?:pixel_mean|pixel_std)$|.*cell_anchors|(?:stem\.)?(?:fc|linear)\.(?:weight|bias)$")


def _without_renaming(state: State, payload: Mapping[str, Any]) -> Weights:
    """Return a detector or bare backbone of Detectron2 or ours, with the preprocessing if its constants are stored.

    Any other state dict is returned too, so that the error can name its tensors.

    Raises:
        WeightsError: another model of torchvision or mmdetection; Detectron2 has some of its names for other layers.
    """
    if any(map(_OTHER_LAYERED.match, state)):
        raise WeightsError(
            "holds weights of a torchvision or mmdetection model of an unsupported architecture; give a plain ResNet "
            "(a state dict with conv1, layer1 ... layer4) or one of mmdetection's FPN detectors"
        )
    if not any(map(_KNOWN.match, state)):
        return Weights(state, "state dict of another model")
    mean, std = state.get("pixel_mean"), state.get("pixel_std")
    needs = None
    if mean is not None and std is not None and mean.numel() == std.numel() == 3:
        needs = Preprocessing(pixel_mean=tuple(map(float, mean.flatten())), pixel_std=tuple(map(float, std.flatten())))
    author = payload.get("__author__")
    kind = f"Detectron2 checkpoint, by {one_line(author, 60)!r}" if author else "Detectron2 checkpoint"
    ignored = tuple(filter(_IGNORED.match, state))
    kept = {name: value for name, value in state.items() if not _IGNORED.match(name)}
    aside = {name: state[name] for name in ignored if name.startswith("stem.fc.")}
    return Weights(kept, kind, ignored=ignored, preprocessing=needs, aside=aside)


def open_weights(path_or_uri: StrPath, *, must_know: bool = True) -> Weights:
    """Fetch and read a weights file, and determine the preprocessing it expects.

    Args:
        path_or_uri: local path or URI. Append ``?preprocessing=caffe`` or ``?preprocessing=torch`` for a file that does
            not store its preprocessing.
        must_know: refuse a file whose preprocessing is unknown.

    Raises:
        WeightsError: see :func:`read_weights` and :func:`gn_det.checkpoint.weights_uri.local_path`.
    """
    uri, options = split_options(os.fspath(path_or_uri))
    path = local_path(uri)
    weights = read_weights(path)
    needs, ws = (None, None) if weights.preprocessing and weights.ws else published(uri, path)
    if known := options.preprocessing or (None if weights.preprocessing else needs):
        weights.preprocessing, weights.foldable = known, True
    if not weights.ws and ws is not None:
        weights.ws = {"RESNETS": ws}
    if weights.ws.get("RESNETS"):  # the stem is standardized, so that a std cannot be folded into it
        weights.foldable = False
    if must_know and weights.asks:
        raise WeightsError(
            f"{uri}: {weights.kind} that does not store how images were normalized: append ?preprocessing=caffe (BGR, "
            "0-255) or ?preprocessing=torch (RGB, ImageNet mean and std) to its name"
        )
    return weights


def read_weights(path: StrPath) -> Weights:
    """Read any known weights file; nothing in it is executed.

    Raises:
        WeightsError: the file is unreadable or unsafe, or its layout is unknown or not supported yet.
    """
    payload = read_any(path)
    meta = read_meta(payload, path)
    state = _tensors(path, _state_of(path, payload))
    translate = next((translate for recognizes, translate in FORMATS if recognizes(state)), _without_renaming)
    try:
        weights = translate(state, payload)
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from None
    if meta is not None:
        weights.kind, weights.meta, weights.class_names = _kind(meta), meta, meta["class_names"]
        try:
            config = parse_yaml(meta["config"], f"{one_line(str(path), 400)}: the config it stores")
        except ConfigError as error:
            raise WeightsError(str(error)) from None
        about = meta.get("weights")  # written by `gn-det convert`
        if isinstance(config, dict):
            weights.config, about = config, _facts_of_config(config)
        if isinstance(about, Mapping):
            _take(weights, about)
    return weights


def _state_of(path: StrPath, payload: Mapping[str, Any]) -> Mapping[Any, Any]:
    """Unwrap the dict of tensors of Detectron2/ours, Detectron, Lightning/mmdetection, or a bare state dict."""
    for key in ("model", "blobs", "state_dict"):
        inner = payload.get(key)
        if isinstance(inner, Mapping) and inner:
            return inner
    if not any(isinstance(v, (torch.Tensor, np.ndarray)) for v in payload.values()):
        keys = ", ".join(one_line(k, 30) for k in list(payload)[:5]) or "nothing"
        raise WeightsError(f"{path}: holds no weights (its entries: {keys}); give a file with a 'model' state dict")
    return payload


def _tensors(path: StrPath, state: Mapping[Any, Any]) -> State:
    """Return tensors by name, without the prefixes of DistributedDataParallel and torch.compile."""
    tensors: State = {}
    for name, value in state.items():
        if isinstance(value, np.ndarray):
            value = _from_numpy(value)
        if isinstance(name, str) and (isinstance(value, torch.Tensor) or not caffe2.is_ignored(name)):
            tensors[name] = value
        elif not isinstance(name, str):
            raise WeightsError(f"{path}: entry {one_line(name, 60)!r} has no name")
    check_tensors(path, tensors)
    for prefix in ("module.", "_orig_mod."):
        if tensors and all(name.startswith(prefix) for name in tensors):
            tensors = {name[len(prefix) :]: value for name, value in tensors.items()}
    return tensors


def _from_numpy(array: np.ndarray) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "not writable": the tensor is only read
        return torch.from_numpy(np.asarray(array, array.dtype.newbyteorder("="), order="C"))


# ------------------------------------------------------------ metadata of our own files


def _kind(meta: Mapping[str, Any]) -> str:
    """Describe one of our files: a training checkpoint, or the result of `gn-det classify` or `gn-det convert`."""
    ours = one_line(f"gn_det {meta['version']}", 40)
    step = meta["provenance"][-1] if meta["provenance"] else {}
    before = step.get("kind")
    if meta["config"] or not isinstance(before, str):
        return ours
    done = "trained" if step.get("trained") is True else "converted"
    return f"{one_line(before.split(', converted by')[0], 60)}, {done} by {ours}"


def _facts_of_config(config: Mapping[str, Any]) -> dict[str, Any]:
    norm = get_value(config, "MODEL.RESNETS.NORM")
    groups = [get_value(config, "MODEL.GN.NUM_GROUPS"), get_value(config, "MODEL.GN.CHANNELS_PER_GROUP") or 0]
    return {
        "norm": norm if norm in ("GN", "LN", "IN") else "",
        "ws": {part: get_value(config, f"MODEL.WS.{part}") or "" for part in WS_SECTIONS},
        "groups": groups if any(get_value(config, key) == "GN" for key in NORM_KEYS) else None,
        "preprocessing": {name: get_value(config, key) for name, key in KEYS.items()},
    }


def _take(weights: Weights, about: Mapping[str, Any]) -> None:
    """Take what is valid in the facts of a config or of a file of `gn-det convert`."""
    norm, groups, needs, ws = (about.get(name) for name in ("norm", "groups", "preprocessing", "ws"))
    if isinstance(ws, Mapping):
        weights.ws = {part: ws[part] for part in WS_SECTIONS if ws.get(part) in ("", *WEIGHT_STANDARDIZATIONS)}
    weights.norm = norm if norm in ("GN", "LN", "IN", "BN", "affine BN") else weights.norm
    if isinstance(groups, (list, tuple)) and len(groups) == 2 and all(type(g) is int for g in groups):
        weights.groups = (groups[0], groups[1])
    if isinstance(needs, Mapping):
        weights.preprocessing = read_preprocessing(needs)
    weights.foldable = about.get("foldable") is True
