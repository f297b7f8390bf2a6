"""gn_det's keys in a Detectron2 config, and values that are only known when a model is built."""

from __future__ import annotations

import functools
import logging
import os
import weakref
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.utils import comm

from gn_det.checkpoint.io import read_checkpoint
from gn_det.checkpoint.meta import read_meta
from gn_det.config import parse_config
from gn_det.config.check import check_values
from gn_det.config.defaults import add_gn_keys, as_lists, edited, flatten, get_value, set_value
from gn_det.config.schema import KEYS
from gn_det.detectron2.datasets import is_own, register_sets, take_mixed_masks
from gn_det.engine.schedule import scale_schedule
from gn_det.errors import ConfigError, DataError, UserError
from gn_det.modeling.build import group_rule, weight_standardization
from gn_det.modeling.census import norms_off_rule
from gn_det.text import some
from gn_det.values import InvalidValue, number, one_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from detectron2.config import CfgNode
    from torch import nn

logger = logging.getLogger(__name__)

#: Norm names that gn_det builds: Detectron2 has no "IN", a different "LN" and a fixed number of groups for GN.
GROUP_NORMS = ("GN", "LN", "IN")

#: Detectron2's default, which gn_det replaces by 0 (taken from the training set).
_THEIR_NUM_CLASSES = 80

#: Samplers of gn_det's loader.
_SAMPLERS = ("TrainingSampler", "RepeatFactorTrainingSampler", "RandomSubsetTrainingSampler")

#: Architectures of Detectron2 that need other ground truth, or do not output objects.
_NO_INSTANCES = ("PanopticFPN", "SemanticSegmentor", "ProposalNetwork")

#: Sections of architectures with their own number of classes.
OWN_CLASSES = {"RetinaNet": "RETINANET", "FCOS": "FCOS"}
_WITHOUT_ROI_HEADS = (*OWN_CLASSES, "ProposalNetwork", "SemanticSegmentor")


def add_gn_config(cfg: CfgNode) -> None:
    """Add gn_det's keys to ``cfg`` in place, so that it can merge gn_det's configs; call it before merging.

    A config with these keys builds gn_det's modules wherever a norm is GN, LN or IN (see :mod:`gn_det.detectron2`).
    Two of Detectron2's defaults change unless you set them before: ``MODEL.ROI_HEADS.NUM_CLASSES`` becomes 0, the
    number of classes of the training set; ``MODEL.DEVICE`` becomes ``"cpu"`` on a machine without a GPU.

    Args:
        cfg: from ``detectron2.config.get_cfg()``. A config that already has the keys is not changed.
    """
    if has_gn_keys(cfg):
        return
    with _thawed(cfg):
        add_gn_keys(cfg)
        if cfg.MODEL.ROI_HEADS.NUM_CLASSES == _THEIR_NUM_CLASSES:
            cfg.MODEL.ROI_HEADS.NUM_CLASSES = 0
        if cfg.MODEL.DEVICE == "cuda":
            cfg.MODEL.DEVICE = _device()


def scale_to_machine(cfg: CfgNode, num_gpus: int | None = None, *, written_for: int = 8) -> list[str]:
    """Scale batch, learning rate and iterations in place, from the GPUs they were written for to those of this run.

    The command line does this with gn_det's configs. In Python, as in Detectron2, a config is literal until this is
    called: on one GPU, ``gn_fpn.yaml`` (16 images on 8 GPUs) becomes a batch of 2, an eighth of the learning rate and
    eight times the iterations. A second call changes nothing.

    Args:
        cfg: a config after :func:`add_gn_config`.
        num_gpus: processes of the run, one GPU each; None for the current number.
        written_for: GPUs that the schedule was written for if SOLVER.REFERENCE_WORLD_SIZE is 0.

    Returns:
        One sentence for each change; they are also logged.

    Raises:
        ConfigError: the batch is not a multiple of ``written_for``, or too small for ``num_gpus``.
    """
    require_gn_keys(cfg)
    num_gpus = comm.get_world_size() if num_gpus is None else num_gpus
    if num_gpus < 1 or written_for < 1:
        raise ConfigError(f"scale_to_machine: num_gpus {num_gpus} and written_for {written_for} must be at least 1")
    world = cfg.SOLVER.REFERENCE_WORLD_SIZE or written_for
    # Epochs are counted by gn_det.detectron2.Trainer, which knows the images.
    scaled = edited(cfg, {"SOLVER.REFERENCE_WORLD_SIZE": world, "SOLVER.EPOCHS": 0.0})
    scaled, sentences = scale_schedule(scaled, num_gpus, images=0)
    with _thawed(cfg):
        for name, value in flatten(edited(scaled, {"SOLVER.EPOCHS": cfg.SOLVER.EPOCHS})):
            set_value(cfg, name, value)
    for sentence in sentences:
        logger.info(sentence)
    return sentences


def has_gn_keys(cfg: CfgNode) -> bool:
    """Return whether ``cfg`` has the keys of :func:`add_gn_config`."""
    return "GN" in cfg.MODEL


def require_gn_keys(cfg: CfgNode) -> None:
    """Raise ConfigError unless ``cfg`` has the keys of :func:`add_gn_config`."""
    if not has_gn_keys(cfg):
        raise ConfigError("the config lacks gn_det's keys: call gn_det.detectron2.add_gn_config(cfg) first")


def prepare_config(cfg: CfgNode) -> None:
    """Fill in values that depend on machine and datasets, in place; called whenever a model is built from a config.

    ``MODEL.DEVICE`` "auto" becomes a device. ``DATASETS.TRAIN_JSON`` / ``VAL_JSON`` and ``json@images`` names are
    registered in Detectron2's catalogs, and the former become ``DATASETS.TRAIN`` / ``TEST``.
    ``MODEL.ROI_HEADS.NUM_CLASSES`` 0 becomes the number of ``MODEL.CLASS_NAMES``, or else of the classes of the first
    training set; so does ``MODEL.RETINANET.NUM_CLASSES`` if a RetinaNet is built and it is Detectron2's 80. Training on
    the generated shapes uses bitmap masks. Call it yourself only to read these values, or to use the datasets, before a
    model is built.

    Raises:
        ConfigError: the number of classes is unknown.
        DataError: the training json cannot be used.
    """
    if not has_gn_keys(cfg):
        return
    with _thawed(cfg):
        if cfg.MODEL.DEVICE == "auto":
            cfg.MODEL.DEVICE = _device()
        register_sets(cfg)
        take_mixed_masks(cfg)
        if cfg.MODEL.ROI_HEADS.NUM_CLASSES == 0 and cfg.MODEL.META_ARCHITECTURE not in _WITHOUT_ROI_HEADS:
            cfg.MODEL.ROI_HEADS.NUM_CLASSES = _count_classes(cfg)
        _settle_own_classes(cfg)
    _mention_what_is_not_read(cfg)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _count_classes(cfg: CfgNode) -> int:
    if cfg.MODEL.CLASS_NAMES:
        return len(cfg.MODEL.CLASS_NAMES)
    classes, why = None, "DATASETS.TRAIN is empty"
    for name in cfg.DATASETS.TRAIN[:1]:
        if MetadataCatalog.get(name).get("thing_classes") is None and name in DatasetCatalog:
            DatasetCatalog.get(name)  # most sets learn their classes when they are read
        classes = MetadataCatalog.get(name).get("thing_classes")
        why = "has no thing_classes in its metadata" if name in DatasetCatalog else "is not in Detectron2's catalog"
        why = f"the training set {name!r} {why}"
    if not classes:
        raise ConfigError(f"MODEL.ROI_HEADS.NUM_CLASSES is 0 and {why}: set the number of classes, or register the set")
    logger.info("MODEL.ROI_HEADS.NUM_CLASSES: %d, the classes of %s.", len(classes), cfg.DATASETS.TRAIN[0])
    return len(classes)


_read = False


@contextmanager
def trainer_keys_are_read() -> Iterator[None]:
    """Context for building a model for gn_det's trainer, without warnings about unread keys."""
    global _read
    before, _read = _read, True
    try:
        yield
    finally:
        _read = before


def _mention_what_is_not_read(cfg: CfgNode) -> None:
    """Warn once about each key that Detectron2's trainer and loader do not read."""
    if _read:
        return
    unread = (
        *("MODEL.FREEZE", "MODEL.ROI_BOX_HEAD.CLASS_WEIGHTS", "SOLVER.OPTIMIZER", "SOLVER.BACKBONE_LR_FACTOR"),
        *("SOLVER.ACCUMULATE", "SOLVER.EPOCHS", "TEST.PATIENCE", "TEST.AMP", "MODEL.CHANNELS_LAST"),
        *("SOLVER.REFERENCE_BATCH", "INPUT.LSJ.ENABLED", "INPUT.ROTATION", "INPUT.COLOR_JITTER", "INPUT.COPY_PASTE"),
        "INPUT.BIT_DEPTH",
    )
    solver, sets = cfg.SOLVER, (*cfg.DATASETS.TRAIN, *cfg.DATASETS.TEST)
    read = {
        # Detectron2 scales by REFERENCE_WORLD_SIZE.
        "SOLVER.REFERENCE_BATCH": solver.REFERENCE_WORLD_SIZE or solver.REFERENCE_BATCH == solver.IMS_PER_BATCH,
        "INPUT.BIT_DEPTH": all(map(is_own, sets)),
    }
    for name in unread:
        value = get_value(cfg, name)
        if not read.get(name) and as_lists(value) != as_lists(KEYS[name].default):
            _warn_once(f"{name} is {value!r}: Detectron2's DefaultTrainer and loader do not read this key")


@functools.cache
def _warn_once(text: str) -> None:
    logger.warning("%s, gn_det.detectron2.Trainer does.", text)


#: Section of MODEL.WS -> names of the modules that follow it.
_PARTS: dict[str, tuple[str, ...]] = {
    "RESNETS": ("backbone.",),
    "FPN": ("backbone.fpn_",),
    "ROI_BOX_HEAD": ("roi_heads.box_head.",),
    "ROI_MASK_HEAD": ("roi_heads.mask_head.",),
}

#: Models that were checked.
_checked_norms: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def warn_of_norms(cfg: CfgNode, model: nn.Module) -> None:
    """Warn about norms that do not follow MODEL.GN, by name: modules of Detectron2 or of the user."""
    if model in _checked_norms:
        return
    _checked_norms.add(model)
    for section, names in _PARTS.items():
        ws = weight_standardization(cfg, section)
        if ws and not any(getattr(m, "ws", "") for n, m in model.named_modules() if n.startswith(names)):
            logger.warning(
                f"MODEL.WS.{section} {ws}: the convolutions of this model are not gn_det's and are not standardized."
            )
    rule = group_rule(cfg)
    wanted = f"groups of {rule.channels_per_group} channels" if rule.channels_per_group else f"{rule.num_groups} groups"
    for what, off in norms_off_rule(model, rule).items():
        logger.warning(
            f"norm layers that do not follow MODEL.GN ({wanted}, eps {rule.eps:g}): {some(off, 4)} have {what}; they "
            "are not gn_det's."
        )


def check_device(cfg: CfgNode, device: str) -> None:
    """Raise ConfigError for deformable convolutions on a CPU, which Detectron2 lacks."""
    if any(cfg.MODEL.RESNETS.DEFORM_ON_PER_STAGE) and device.startswith("cpu"):
        raise ConfigError(
            "MODEL.RESNETS.DEFORM_ON_PER_STAGE: Detectron2's deformable convolutions need a GPU, MODEL.DEVICE is cpu"
        )


def check_for_trainer(cfg: CfgNode, *, own_loader: bool, own_results: bool) -> None:
    """Raise ConfigError for what gn_det's loader and evaluation lack, unless the user overrides these."""
    check_values(cfg)
    model, sampler = cfg.MODEL, cfg.DATALOADER.SAMPLER_TRAIN
    check_device(cfg, _device() if model.DEVICE == "auto" else model.DEVICE)
    instead = "or train with Detectron2's DefaultTrainer"
    for key, given, remedy in (
        ("TEST.PRECISE_BN.ENABLED", cfg.TEST.PRECISE_BN.ENABLED, f"add hooks.PreciseBN in build_hooks, {instead}"),
        ("SOLVER.AUTO_BATCH", cfg.SOLVER.AUTO_BATCH, "set SOLVER.IMS_PER_BATCH and SOLVER.ACCUMULATE"),
    ):
        if given:
            raise ConfigError(f"{key} True is not implemented by gn_det.detectron2.Trainer: set it False and {remedy}")
    others = {
        "KEYPOINT_ON": model.KEYPOINT_ON,
        "LOAD_PROPOSALS": model.LOAD_PROPOSALS,
        "META_ARCHITECTURE": model.META_ARCHITECTURE in _NO_INSTANCES,
    }
    for key in [key for key, given in others.items() if given and not (own_loader and own_results)]:
        raise ConfigError(
            f"MODEL.{key} {model[key]}: gn_det's loader and evaluation are for boxes and masks of objects; override "
            f"build_train_loader and build_evaluator, {instead}"
        )
    if own_loader:
        return
    if sampler not in _SAMPLERS:
        raise ConfigError(
            f"DATALOADER.SAMPLER_TRAIN {sampler!r}: gn_det's loader supports {', '.join(_SAMPLERS)}; override "
            "build_train_loader for another one"
        )
    ratio = cfg.DATALOADER.get("RANDOM_SUBSET_RATIO", 1.0)  # of the last one; Detectron2's defaults lack the key
    check = number(0, 1, above=True) if sampler == _SAMPLERS[-1] else one_of(1.0, 1)
    try:
        check(ratio, "DATALOADER.RANDOM_SUBSET_RATIO")
    except InvalidValue as error:
        raise ConfigError(f"{error} with DATALOADER.SAMPLER_TRAIN {sampler}") from None


def _settle_own_classes(cfg: CfgNode) -> None:
    """Set the number of classes of an architecture without RoI heads; Detectron2's default becomes the dataset's."""
    section = OWN_CLASSES.get(cfg.MODEL.META_ARCHITECTURE, "")
    if section not in cfg.MODEL:
        return
    node, names = cfg.MODEL[section], cfg.DATASETS.TRAIN
    is_default = node.NUM_CLASSES in (0, _THEIR_NUM_CLASSES)
    known = cfg.MODEL.CLASS_NAMES or (MetadataCatalog.get(names[0]).get("thing_classes") if names else None)
    try:
        count = len(known) if known else _count_classes(cfg) if is_default else node.NUM_CLASSES
    except (ConfigError, DataError, OSError):  # a model for prediction whose dataset is missing
        return
    if count == node.NUM_CLASSES:
        return
    if not is_default:
        raise ConfigError(
            f"MODEL.{section}.NUM_CLASSES is {node.NUM_CLASSES}, but the training set has {count} classes: set it to "
            f"{count}, or to 0 to take it from the data set"
        )
    logger.info("MODEL.%s.NUM_CLASSES: %d -> %d, the classes of the data set.", section, node.NUM_CLASSES, count)
    node.NUM_CLASSES = count


def mention_other_groups(cfg: CfgNode) -> None:
    """Warn if MODEL.WEIGHTS is a gn_det checkpoint that was trained with another MODEL.GN."""
    path = str(cfg.MODEL.WEIGHTS)
    if _read or not path.endswith(".pth") or not os.path.isfile(path):
        return
    try:
        meta = read_meta(read_checkpoint(path, mmap=True))
        stored = parse_config(meta["config"], path) if meta and meta["config"] else cfg
    except UserError:  # loading it will raise the error
        return
    ours, theirs = cfg.MODEL.GN, stored.MODEL.GN
    other = [key for key in ("NUM_GROUPS", "CHANNELS_PER_GROUP", "EPS") if ours[key] != theirs[key]]
    if other:
        keys = ", ".join(f"MODEL.GN.{key} {theirs[key]} instead of {ours[key]}" for key in other)
        logger.warning("MODEL.WEIGHTS %s was trained with other groups: set %s.", path, keys)


@contextmanager
def _thawed(cfg: CfgNode) -> Iterator[None]:
    frozen = cfg.is_frozen()
    cfg.defrost()
    try:
        yield
    finally:
        if frozen:
            cfg.freeze()
