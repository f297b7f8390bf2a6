"""Convert weights of any known source to another layout: new names and container, bit-identical tensors.

The ``gn_det`` block holds what a reader must know: class names, preprocessing, norm, and the source with its sha256.
Only ``fold_stem=True`` changes numbers: it rewrites the stem convolution for the target's usual preprocessing.
"""

from __future__ import annotations

import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from gn_det.about import __version__
from gn_det.checkpoint.formats import torchvision
from gn_det.checkpoint.formats.common import State, Weights
from gn_det.checkpoint.io import save_checkpoint, write_safetensors
from gn_det.checkpoint.open_weights import open_weights
from gn_det.checkpoint.preprocessing import CAFFE, STEM, TORCH, Preprocessing, close, fold, show
from gn_det.checkpoint.weights_uri import local_path, sha256_of, split_options
from gn_det.errors import WeightsError
from gn_det.files import StrPath
from gn_det.text import one_line, some

#: Layouts that can be written, and their usual preprocessing.
LAYOUTS = {"detectron2": CAFFE, "safetensors": CAFFE, "torchvision": TORCH, "timm": TORCH}
_BOTTOM_UP = re.compile(r"(?:backbone\.(?:bottom_up\.)?|roi_heads\.(?=res5\.))?((?:stem|res[2-5])\..+)$")
_CLASSIFIER = re.compile(r"(?:stem\.)?(?:fc|pred|fc1000)[._]\w+$")  # ignored on load, kept here


@dataclass(frozen=True)
class Converted:
    """Result of a conversion: path, kind of source, number of tensors."""

    path: Path
    kind: str
    tensors: int
    left_out: tuple[str, ...]  # names that the target cannot hold (heads, momentum, anchors)
    preprocessing: Preprocessing | None  # that the written weights expect; None = unknown


def convert(source: StrPath, target: StrPath, to: str = "", *, fold_stem: bool = False) -> Converted:
    """Convert a weights file.

    Args:
        source: path or URI of any readable weights.
        target: the new file, replaced atomically; ``.safetensors`` or a torch file (``.pth``, ``.pt``, ``.bin``).
        to: one of :data:`LAYOUTS`; "" for Detectron2's names, in the container given by the suffix of ``target``.
        fold_stem: rewrite the stem convolution for the target's usual preprocessing.

    Raises:
        WeightsError: the source is unreadable, or the target layout cannot hold it.
        WriteError: the target cannot be written.
    """
    target = Path(target)
    if to not in ("", *LAYOUTS):
        raise WeightsError(f"--to {to}: one of {', '.join(LAYOUTS)}")
    suffixes = [".safetensors"] if to == "safetensors" else [".pth", ".pt", ".bin", ".safetensors"]
    if target.suffix.lower() not in suffixes:
        raise WeightsError(f"{one_line(str(target), 400)}: name the new file {' or '.join(suffixes)}")
    weights, path, name = open_weights(source, must_know=fold_stem), local_path(source), os.fspath(source)
    if os.path.exists(target) and os.path.samefile(path, target):
        raise WeightsError(f"{target}: would overwrite its source; give another name")
    if fold_stem:
        _fold(name, weights, LAYOUTS[to or "detectron2"])
    state = {**weights.state, **weights.aside}
    left_out = [name for name in weights.ignored if not (weights.aside and _CLASSIFIER.match(name))]
    layered = to in ("torchvision", "timm")
    if layered:
        state, heads = _as_layers(name, weights, state)
        left_out += heads
    block = _block(name, path, weights, whole=not layered and not fold_stem)
    own = {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in state.items()}
    if target.suffix.lower() == ".safetensors":
        write_safetensors(target, own, block)
    elif layered:
        save_checkpoint(target, {"state_dict": own, "gn_det": block})
    else:
        # Detectron2 matches bare names only with this flag.
        extra = {"matching_heuristics": True} if STEM[-1] in own and not weights.architecture.style else {}
        save_checkpoint(target, {"model": own, "__author__": f"gn_det {__version__}", **extra, "gn_det": block})
    return Converted(target, weights.kind, len(state), tuple(left_out), weights.preprocessing)


def _fold(source: str, weights: Weights, usual: Preprocessing) -> None:
    needs = weights.preprocessing
    if needs is None:
        raise WeightsError(f"{source}: does not store its preprocessing, so nothing can be folded")
    if weights.ws.get("RESNETS"):
        raise WeightsError(f"{source}: its stem has standardized weights, which take up no std; convert without --fold")
    weights.state = dict(weights.state)
    now = fold(weights.state, needs, usual)
    if now.format != usual.format or now.pixel_std != usual.pixel_std:
        raise WeightsError(f"{source}: has no stem convolution of three channels to fold a preprocessing into")
    mean, wanted = now.pixel_mean or (), usual.pixel_mean or ()
    if not close(mean, wanted):
        remedy = "a mean cannot be folded exactly: convert without --fold and set MODEL.PIXEL_MEAN"
        raise WeightsError(f"{source}: its mean {show(mean)} is not {show(wanted)}, and {remedy}")
    weights.preprocessing = now
    weights.foldable = True  # a reader may fold it back


def _as_layers(source: str, weights: Weights, state: State) -> tuple[State, list[str]]:
    """Return the bottom-up network with torchvision's and timm's names, and the names that do not fit there."""
    others = {
        "has its stride in the 1x1 convolutions": weights.preprocessing and weights.preprocessing.stride_in_1x1,
        "is a pre-activation ResNet": weights.architecture.variant not in ("", "v1"),
        "has standardized weights": weights.ws.get("RESNETS"),
    }
    for what, present in others.items():
        if present:
            raise WeightsError(f"{source}: {what}, which no ResNet of torchvision has; use --to detectron2")
    names = {name: torchvision.name_back(match[1]) for name in state if (match := _BOTTOM_UP.match(name))}
    layers: State = {theirs: state[name] for name, theirs in names.items() if theirs is not None}
    rest = [name for name in state if names.get(name) is None]
    if "conv1.weight" not in layers or not any(name.startswith("layer4.") for name in layers):
        raise WeightsError(f"{source}: {weights.kind} has no ResNet of stem and res2 to res5 (it has {some(state, 3)})")
    if weights.norm == "affine BN":
        for name in [n for n in layers if re.search(r"(?:bn\d|downsample\.1)\.weight$", n)]:
            base = name.removesuffix("weight")
            layers[base + "running_mean"] = torch.zeros_like(layers[name])
            layers[base + "running_var"] = torch.ones_like(layers[name])
    return layers, rest


def _block(source: str, path: Path, weights: Weights, whole: bool) -> dict[str, Any]:
    """Return the ``gn_det`` block; ``whole``: the file is still described by the config of our own checkpoint."""
    before = weights.meta or {}
    uri, _ = split_options(source)
    # Store only the name of a local file, because its folder is private.
    step = {"source": uri if "://" in uri else path.name, "sha256": sha256_of(path), "kind": weights.kind}
    return {
        **before,
        "version": __version__,
        "class_names": list(weights.class_names),
        "config": before.get("config", "") if whole else "",
        "weights": {
            "norm": weights.norm or ("GN" if weights.groups else ""),
            "groups": weights.groups,
            "ws": weights.ws,
            "preprocessing": None if weights.preprocessing is None else asdict(weights.preprocessing),
            "foldable": weights.foldable,
            "asks": weights.asks,
        },
        "provenance": [*before.get("provenance", ()), step],
    }
