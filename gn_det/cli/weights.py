"""``gn-det weights`` and ``convert``: what weights are, where they would load, and the same in another layout."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from gn_det.checkpoint.arch import Architecture, architecture_of
from gn_det.checkpoint.catalog import local_path, sha256_of, split_options
from gn_det.checkpoint.convert import convert
from gn_det.checkpoint.fit import NORM_NAMES
from gn_det.checkpoint.report import PARTS, format_report, part_of, shorten
from gn_det.checkpoint.source import Preprocessing, Weights, show
from gn_det.checkpoint.sources import open_weights
from gn_det.checkpoint.weights import plan_weights
from gn_det.terminal import say
from gn_det.text import one_line

_WHERE = {"": "a backbone: backbone.bottom_up with FPN, backbone and roi_heads.res5 without", "FPN": "an FPN detector"}


def describe(path_or_uri: str, config: str | None = None, overrides: Sequence[str] = ()) -> None:
    """Print what a file holds; with a config, also what would load where (``?allow_partial=True`` as on loading).

    Raises:
        WeightsError: unreadable, or (with a config) not fitting; the message names the keys to set.
    """
    weights = open_weights(path_or_uri, must_know=False)
    path = local_path(path_or_uri)
    shapes = {name: tuple(value.shape) for name, value in weights.state.items()}
    found = architecture_of(shapes)
    norm = weights.norm or found.norm
    kind = ", ".join(
        filter(
            None,
            (weights.kind, found.resnet if found.blocks else "", NORM_NAMES.get(norm, norm) if found.blocks else ""),
        )
    )
    rows = [
        ("file", f"{os.path.getsize(path) / 1e6:.1f} MB, sha256 {sha256_of(path)}"),
        ("holds", one_line(kind)),
        ("tensors", _tensors(weights)),
        ("parts", _parts(weights)),
        ("classes", _classes(weights)),
        ("goes into", _WHERE.get(found.style, "a C4 detector") if found.blocks else "nothing we know"),
        ("preprocessing", preprocessing_sentence(weights)),
        ("config keys", _keys(weights, found)),
        ("not used", shorten(weights.ignored) if weights.ignored else ""),
        ("provenance", _provenance(weights)),
    ]
    say(path_or_uri)
    for name, value in rows:
        if value:
            say(f"  {name:14s}{value}")
    if config is not None:
        print(_fits(path_or_uri, config, overrides))


def run_convert(source: str, target: str, to: str, fold: bool) -> None:
    """Convert, and say what was written."""
    done = convert(source, target, to, fold_stem=fold)
    say(f"{done.path}: {done.tensors} tensors of {source} ({one_line(done.kind)})")
    if done.left_out:
        say(f"  left out: {shorten(done.left_out)}")
    if done.preprocessing is not None:
        say(f"  expects {_expects(done.preprocessing)}")


def _fits(path_or_uri: str, config: str, overrides: Sequence[str]) -> str:
    from gn_det.config import load_config
    from gn_det.modeling.build import build_model

    source, options = split_options(path_or_uri)
    weights = open_weights(path_or_uri)
    cfg = load_config(config, list(overrides))
    if cfg.MODEL.ROI_HEADS.NUM_CLASSES < 1:
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = _num_classes(weights) or 1
    with torch.device("meta"):  # names and shapes, no memory
        model = build_model(cfg)
    report, _ = plan_weights(model, source, weights, cfg, options.allow_partial)
    return f"with {one_line(config, 400)}:\n{format_report(report)}"


def _tensors(weights: Weights) -> str:
    values = sum(value.numel() for value in weights.state.values())
    dtypes = Counter(str(value.dtype).removeprefix("torch.") for value in weights.state.values())
    return f"{len(weights.state)}, {values / 1e6:.1f} M numbers, {', '.join(sorted(dtypes))}"


def _parts(weights: Weights) -> str:
    counts = Counter(part_of(name) for name in weights.state)
    return ", ".join(f"{part} {counts[part]}" for part in PARTS if counts[part])


def _num_classes(weights: Weights) -> int:
    scores = weights.state.get("roi_heads.box_predictor.cls_score.weight")
    return scores.shape[0] - 1 if scores is not None and scores.dim() else len(weights.class_names)


def _classes(weights: Weights) -> str:
    number = _num_classes(weights)
    names = f": {one_line(shorten(weights.class_names, 5), 400)}" if weights.class_names else ""
    return f"{number}{names}" if number else ""


def _expects(needs: Preprocessing) -> str:
    mean, std = (show(values) if values else "not told" for values in (needs.pixel_mean, needs.pixel_std))
    stride = {True: "; stride in the 1x1", False: "; stride in the 3x3", None: ""}[needs.stride_in_1x1]
    return f"{needs.format or 'channel order not told'}, mean {mean}, std {std} (of 0-255){stride}"


def preprocessing_sentence(weights: Weights) -> str:
    """What the weights expect, and what loading makes of it."""
    if weights.preprocessing is None:
        ask = "; put ?preprocessing=caffe or ?preprocessing=torch behind the name" if weights.asks else ""
        return f"the file does not tell{ask}"
    folded = "; order and std are folded into the stem on load" if weights.foldable else ""
    return _expects(weights.preprocessing) + folded


def _keys(weights: Weights, found: Architecture) -> str:
    keys = [f"MODEL.RESNETS.DEPTH {found.depth}"] if found.depth else []
    norm = {"affine BN": "FrozenBN", "BN": "FrozenBN", "affine": "GN"}.get(weights.norm or found.norm)
    if found.blocks:
        keys.append(f"MODEL.RESNETS.NORM {norm or weights.norm or found.norm}")
    if weights.groups:
        keys += [f"MODEL.GN.NUM_GROUPS {weights.groups[0]}"]
        keys += [f"MODEL.GN.CHANNELS_PER_GROUP {weights.groups[1]}"] if weights.groups[1] else []
    needs = weights.preprocessing
    if needs is None:
        return " ".join(keys)
    if needs.stride_in_1x1 is not None:
        keys.append(f"MODEL.RESNETS.STRIDE_IN_1X1 {needs.stride_in_1x1}")
    mean = needs.pixel_mean
    if weights.foldable:
        mean = mean[::-1] if mean and needs.format == "RGB" else mean
    else:
        keys += [f"INPUT.FORMAT {needs.format}"] if needs.format else []
        keys += [f"MODEL.PIXEL_STD {show(needs.pixel_std)}"] if needs.pixel_std else []
    keys += [f"MODEL.PIXEL_MEAN {show(mean)}"] if mean else []
    return " ".join(keys)


def _provenance(weights: Weights) -> str:
    steps = (weights.meta or {}).get("provenance")
    if not isinstance(steps, (list, tuple)):
        return ""
    said = [
        _trained(step)
        if step.get("trained") is True
        else f"{one_line(step.get('source', ''), 80)} (sha256 {one_line(step.get('sha256', ''), 64)[:12]})"
        for step in steps
        if isinstance(step, dict)
    ]
    return " -> ".join(said)


def _trained(step: dict[str, Any]) -> str:
    """What ``gn-det pretrain`` wrote: which classifier, of which epoch, how good."""
    error = step.get("top1_error", step.get("val_error"))
    told = f", top-1 error {error:.2f} %" if isinstance(error, float) else ""
    return f"{one_line(step.get('kind', ''), 80)} (epoch {one_line(step.get('epoch', '?'), 12)}{told})"
