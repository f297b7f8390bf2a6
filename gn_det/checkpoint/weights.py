"""Load published or own weights into a model, and report what happened to every tensor.

Loading is all or nothing: architecture, norm, preprocessing, names, shapes and finite values are checked before
anything is copied.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from gn_det.checkpoint.compatibility import check_architecture, check_keys, check_norm
from gn_det.checkpoint.formats.common import BOTTOM_UP, PARTS, State, Weights, architecture_of, part_of
from gn_det.checkpoint.open_weights import open_weights
from gn_det.checkpoint.preprocessing import KEYS, fold, read_preprocessing, show
from gn_det.checkpoint.weights_uri import split_options
from gn_det.config.defaults import get_value
from gn_det.errors import WeightsError
from gn_det.files import StrPath
from gn_det.text import as_line, one_line, some

Shape = tuple[int, ...]

# Layers whose first dimension depends on the number of classes.
_PREDICTORS = re.compile(
    r"roi_heads\.(?:box_predictor\.(?:\d+\.)?(?:cls_score|bbox_pred)|mask_head\.predictor)\.(?:weight|bias)$"
)
_BARE = re.compile(r"(?:stem|res[2-5])\.")
_BARE_PREFIXES = ("backbone.bottom_up.", "backbone.", "roi_heads.")  # FPN, C4, C4's res5
# Keys that determine the shapes of a part, for messages.
_KEYS = {
    "stem": "MODEL.RESNETS.STEM_OUT_CHANNELS",
    "res": "MODEL.RESNETS.{DEPTH,NUM_GROUPS,WIDTH_PER_GROUP,RES2_OUT_CHANNELS}",
    "fpn": "MODEL.FPN.{NORM,OUT_CHANNELS,IN_FEATURES}",
    "rpn": "MODEL.ANCHOR_GENERATOR.{SIZES,ASPECT_RATIOS} and MODEL.RPN.CONV_DIMS",
    "box head": "MODEL.ROI_BOX_HEAD.{NORM,NUM_CONV,CONV_DIM,NUM_FC,FC_DIM,POOLER_RESOLUTION}",
    "mask head": "MODEL.ROI_MASK_HEAD.{NORM,NUM_CONV,CONV_DIM}",
    "other": "MODEL.META_ARCHITECTURE and MODEL.BACKBONE.NAME",
}


@dataclass
class Outcome:
    """Names of tensors by outcome, with the shapes in the file and the model if they differ."""

    loaded: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # only in the model
    unexpected: list[str] = field(default_factory=list)  # only in the file
    shape_differs: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)
    #: predictors whose shape differs because the number of classes does
    reinitialized: dict[str, tuple[Shape, Shape]] = field(default_factory=dict)


@dataclass
class LoadReport(Outcome):
    """Result of :func:`gn_det.checkpoint.weights.load_weights`."""

    source: str = ""
    kind: str = ""  # detected kind of file, such as "Caffe2 ImageNet backbone, ResNet-50, GN"
    ignored: tuple[str, ...] = ()  # names not used by any detector (ImageNet classifier, momentum, anchors ...)
    notes: tuple[str, ...] = ()  # sentences worth showing the user

    def by_part(self) -> dict[str, Outcome]:
        """Return the parts of :data:`PARTS` that the model or the file has, in that order."""
        parts: dict[str, Outcome] = {}
        for what in ("loaded", "missing", "unexpected"):
            for name in getattr(self, what):
                getattr(parts.setdefault(part_of(name), Outcome()), what).append(name)
        for what in ("shape_differs", "reinitialized"):
            for name, shapes in getattr(self, what).items():
                getattr(parts.setdefault(part_of(name), Outcome()), what)[name] = shapes
        return {part: parts[part] for part in PARTS if part in parts}


def load_weights(model: nn.Module, path_or_uri: StrPath, cfg: Any, *, require_all: bool = False) -> LoadReport:
    """Load weights into ``model``; on an error, the model is unchanged.

    Args:
        model: its state dict has Detectron2's names (``backbone.``, ``proposal_generator.``, ``roi_heads.``).
        path_or_uri: local path or URI (see :mod:`gn_det.checkpoint.weights_uri`), optionally with
            ``?preprocessing=...`` appended, or ``?allow_partial=True`` to load matching tensors and report the others
            instead of refusing a part that matches only partly.
        cfg: the resolved configuration the model was built from.
        require_all: also refuse missing or re-initialized heads, for evaluation and prediction, where untrained layers
            produce noise.

    Raises:
        WeightsError: the file is unreadable or unsafe; architecture, norm or preprocessing differ from the config (the
            message names the keys to set); the backbone has an unmatched tensor, or a head matches only partly.
    """
    source, options = split_options(os.fspath(path_or_uri))
    weights = open_weights(path_or_uri)
    report, good = plan_weights(model, source, weights, cfg, options.allow_partial, require_all)
    model.load_state_dict(good, strict=False)
    return report


def plan_weights(
    model: nn.Module, source: str, weights: Weights, cfg: Any, allow_partial: bool = False, require_all: bool = False
) -> tuple[LoadReport, State]:
    """Do all of :func:`load_weights` except the copy; ``model`` may be on the meta device.

    Returns:
        The report, and the tensors to copy by name in the model.
    """
    parameters = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    in_model = {name: tuple(value.shape) for name, value in parameters.items()}
    found = weights.architecture
    if all(part_of(name) == "other" for name in weights.state):
        raise WeightsError(
            f"{source}: {weights.kind} does not match the configured architecture: it has {some(weights.state, 3)}; "
            f"the configured model has {some(in_model, 3)} (MODEL.WEIGHTS)"
        )
    check_architecture(source, found, architecture_of(in_model), allow_partial)
    notes = check_norm(source, weights, cfg, allow_partial)
    folded = _fold(weights, cfg)
    check_keys(source, weights, cfg, allow_partial=allow_partial, norms=not notes)

    placed = _place(weights, in_model, skip_norms=bool(notes))
    by_name = _rows_by_name(weights, cfg, placed, parameters, as_stored=require_all)
    kind = ", ".join(filter(None, (weights.kind, found.resnet, weights.norm))) if found.depth else weights.kind
    report = LoadReport(source=source, kind=kind)
    whole = bool(found.style)
    _sort(report, placed, in_model, whole, weights.ignored)
    report.notes = (*notes, *folded, *weights.notes, *by_name)
    if not allow_partial:
        _refuse_partial(report, whole)
    if require_all:
        _refuse_untrained(report, cfg, weights)
    _refuse_frozen(report, model)
    good = {name: placed[name] for name in report.loaded}
    for name, value in good.items():
        # The fast sum may overflow, so check again.
        if value.is_floating_point() and not torch.isfinite(value.sum()) and not torch.isfinite(value).all():
            raise WeightsError(f"{source}: {name} holds NaN or infinity; take an earlier checkpoint")
    return report, good


def _fold(weights: Weights, cfg: Any) -> list[str]:
    """Fold the source's channel order and std into the stem if allowed; return what was done."""
    needs = weights.preprocessing
    if not weights.foldable or needs is None:
        return []
    target = read_preprocessing({name: get_value(cfg, key) for name, key in KEYS.items()})
    weights.state = dict(weights.state)
    weights.preprocessing = fold(weights.state, needs, target)
    done = []
    if needs.format != weights.preprocessing.format:
        done.append(f"channel order {needs.format}")
    if needs.pixel_std and sorted(needs.pixel_std) != sorted(weights.preprocessing.pixel_std or ()):
        done.append(f"std {show(needs.pixel_std)}")
    return [f"{' and '.join(done)} of the source folded into the stem convolution"] if done else []


def _place(weights: Weights, in_model: Mapping[str, Shape], skip_norms: bool) -> State:
    """Return tensors by their names in the model (or their own, if the model lacks them)."""
    placed: State = {}
    for name, value in weights.state.items():
        target = name
        if name not in in_model and _BARE.match(name):
            target = next((p + name for p in _BARE_PREFIXES if p + name in in_model), name)
        if skip_norms and ".norm." in target and part_of(target) in (*BOTTOM_UP, "res5 head"):
            continue
        placed[target] = value
    if weights.norm == "affine BN":
        # Only scale and shift: identity statistics, as in Detectron2 (variance 1, so off by BN's epsilon).
        for name, shape in in_model.items():
            module, _, leaf = name.rpartition(".")
            if leaf in ("running_mean", "running_var") and f"{module}.weight" in placed:
                placed.setdefault(name, torch.full(shape, float(leaf == "running_var")))
    return placed


def _sort(
    report: LoadReport, placed: State, in_model: Mapping[str, Shape], whole: bool, ignored: tuple[str, ...]
) -> None:
    """Record the outcome of every name in model and file; ``whole``: the file holds a detector."""
    for name, shape in in_model.items():
        value = placed.get(name)
        if value is None:
            if not name.endswith("num_batches_tracked"):
                report.missing.append(name)
        elif tuple(value.shape) == shape:
            report.loaded.append(name)
        elif _PREDICTORS.match(name) and value.dim() == len(shape) and value.shape[1:] == shape[1:]:
            report.reinitialized[name] = tuple(value.shape), shape
        else:
            report.shape_differs[name] = tuple(value.shape), shape
    model_parts = {part_of(name) for name in in_model}
    unused: list[str] = []
    for name in [name for name in placed if name not in in_model]:
        lacking = not whole and part_of(name) in BOTTOM_UP and part_of(name) not in model_parts
        (unused if lacking or name.endswith("num_batches_tracked") else report.unexpected).append(name)
    report.ignored = (*ignored, *unused)


def _rows_by_name(
    weights: Weights, cfg: Any, placed: State, ours: Mapping[str, torch.Tensor], as_stored: bool
) -> list[str]:
    """Reorder the predictors' rows in ``placed`` to the config's classes, by name; return what was kept.

    Rows of classes that the file lacks keep the model's values. Nothing is reordered if all or no class names match, or
    with ``as_stored``.
    """
    names, theirs = tuple(get_value(cfg, "MODEL.CLASS_NAMES") or ()), weights.class_names
    kept = [name for name in names if name in theirs]
    if not kept or names == theirs or as_stored:
        if names == theirs or len(names) != len(theirs) or not any(map(_PREDICTORS.match, placed)):
            return []
        return [f"as many classes as the file, but with other names ({some(theirs, 3)}): its predictors are kept"]
    here, there = [names.index(name) for name in kept], [theirs.index(name) for name in kept]
    changed = False
    for name in [name for name in placed if name in ours and _PREDICTORS.match(name)]:
        old, rows = placed[name], ours[name]
        per_class, background = 4 if "bbox_pred" in name else 1, int("cls_score" in name)
        lengths = [(per_class * len(classes) + background,) for classes in (theirs, names)]
        if [old.shape[:1], rows.shape[:1]] != lengths or old.shape[1:] != rows.shape[1:]:
            continue  # such as class-agnostic ones
        changed = True
        if rows.is_meta:
            continue
        placed[name] = rows = rows.detach().clone()
        if background:
            rows[-1] = old[-1]
            old, rows = old[:-1], rows[:-1]
        by_class = (-1, per_class, *rows.shape[1:])
        rows.view(by_class)[here] = old.to(rows.dtype).reshape(by_class)[there]
    if not changed:
        return []
    new, gone = [n for n in names if n not in theirs], [n for n in theirs if n not in names]
    parts = {"kept by name": kept, "new and initialized": new, "only in the file": gone}
    return [f"rows of the predictors {'; '.join(f'{what}: {some(n)}' for what, n in parts.items() if n)}"]


# ------------------------------------------------------------ refusals


def _refuse_partial(report: LoadReport, whole: bool) -> None:
    """Require that a part matches completely or is absent from the file, and that the bottom-up network is present.

    ``whole``: the file holds a detector, not a bare backbone.
    """
    problems, keys = [], []
    for name, part in report.by_part().items():
        fits = not (part.missing or part.unexpected or part.shape_differs)
        shared = part.loaded or part.shape_differs or part.reinitialized or (part.missing and part.unexpected)
        if name == "other":
            # Heads of other tasks (keypoints, panoptic) are harmless; a stray backbone tensor is unexplained.
            absent = not part.missing and whole and not any(n.startswith("backbone.") for n in part.unexpected)
        else:
            absent = not shared and name not in BOTTOM_UP and name != "res5 head"
        if not fits and not absent:
            problems.append(f"{name}: {_describe(part)}")
            keys.append(_KEYS["res" if name.startswith("res") else name])
    if problems:
        more = f" (and {len(problems) - 3} more parts)" if len(problems) > 3 else ""
        raise WeightsError(
            f"{report.source} ({report.kind}) does not fit the configured model: {'; '.join(problems[:3])}{more}; "
            f"compare {', '.join(dict.fromkeys(keys[:3]))} with what the weights were trained with"
        )


def _refuse_untrained(report: LoadReport, cfg: Any, weights: Weights) -> None:
    if report.reinitialized:
        classes, wanted = weights.num_classes, get_value(cfg, "MODEL.ROI_HEADS.NUM_CLASSES")
        differ = f"was trained with {classes} classes, but MODEL.ROI_HEADS.NUM_CLASSES is {wanted}"
        raise WeightsError(f"{report.source}: {differ}: set it to {classes}, or train first")
    untrained = [f"{name} ({some(p.missing, 1)})" for name, p in report.by_part().items() if p.missing]
    if untrained:
        raise WeightsError(
            f"{report.source} ({report.kind}): has no weights for {', '.join(untrained)}: evaluate and predict with a "
            "trained detector, not with a backbone (MODEL.WEIGHTS)"
        )


def _refuse_frozen(report: LoadReport, model: nn.Module) -> None:
    """Refuse frozen layers that were not loaded, because they would stay random forever."""
    lost = {*report.missing, *report.shape_differs, *report.reinitialized}
    frozen = [name for name, p in model.named_parameters() if name in lost and not p.requires_grad]
    if frozen:
        raise WeightsError(
            f"{report.source}: has no weights for {some(frozen, 3)}, which are frozen and would stay random: set "
            "MODEL.BACKBONE.FREEZE_AT 0, and name no such part in MODEL.FREEZE"
        )


# ------------------------------------------------------------ the report


def format_report(report: LoadReport) -> str:
    """Format the report with one line per part and details of everything that was not simply loaded."""
    lines = [f"Weights: {as_line(report.source)} ({one_line(report.kind)})"]
    for name, part in report.by_part().items():
        total = len(part.loaded) + len(part.missing) + len(part.shape_differs) + len(part.reinitialized)
        lines.append(f"  {name:9}  {f'{len(part.loaded)}/{total}':>7} loaded  {_describe(part)}".rstrip())
    lines += [f"  not used by a detector: {some(report.ignored, 3)}"] if report.ignored else []
    return "\n".join([*lines, *(f"  note: {as_line(note)}" for note in report.notes)])


def _describe(part: Outcome) -> str:
    """Say what was not simply loaded."""
    found = []
    if part.missing:
        partly = part.loaded or part.shape_differs or part.reinitialized
        found.append(f"not in the file: {some(part.missing, 3)}" if partly else "not in the file")
    if part.reinitialized:
        found.append(f"re-initialized, expected (classes differ): {some(part.reinitialized, 3)}")
    if part.shape_differs:
        shapes = [f"{one_line(n)} {a} in the file, {b} in the model" for n, (a, b) in part.shape_differs.items()]
        found.append(f"of other shape: {'; '.join(shapes[:2])}")
    if part.unexpected:
        found.append(f"only in the file: {some(part.unexpected, 3)}")
    return "; ".join(found)
