"""Training and test sets of a run, their classes, and their (known or assumed) sizes."""

from __future__ import annotations

import itertools
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass

from fvcore.common.config import CfgNode

from gn_det.data.catalog import BUILTIN, DatasetSource, datasets_for
from gn_det.data.coco import CocoDataset, check_num_classes, check_trainable, load_coco
from gn_det.data.coco_json import read_coco_json
from gn_det.data.image import ImageReader
from gn_det.data.split import held_out
from gn_det.errors import ConfigError, DataError
from gn_det.text import shown, some

logger = logging.getLogger(__name__)

#: Test sets with fewer images are logged as small.
_FEW = 20


@dataclass(frozen=True)
class RunData:
    """Training and test data of a run."""

    train: tuple[CocoDataset, ...]  # training sets, all with the same classes; empty for evaluation
    test: tuple[CocoDataset, ...]  # test sets
    class_names: tuple[str, ...]  # one name per class in the model's order
    category_ids: tuple[int, ...]  # json category ids of the first set, in the same order
    images: int  # number of images in an epoch
    boxes_only: bool = False  # whether masks are configured but no training object has one


def load_run_data(cfg: CfgNode) -> RunData:
    """Read, check and log all sets of a training run.

    Raises:
        ConfigError: no training set is named.
        DataError: as for :func:`gn_det.data.coco.load_coco`; or classes differ between sets or from NUM_CLASSES.
    """
    sources = datasets_for(cfg, "train")
    if not sources:
        raise ConfigError("DATASETS.TRAIN is empty; name a training set, or give --train-json and --train-images")
    train = tuple(load_set(cfg, source) for source in sources)
    boxes_only = bool(cfg.MODEL.MASK_ON and train[0].without_mask) and all(
        dataset.without_mask == len(dataset.object_images) for dataset in train
    )
    if boxes_only:
        cfg = without_masks(cfg)
        logger.info("No object has a mask: training boxes only (MODEL.MASK_ON False, --boxes-only).")
    has_objects = check_trainable(cfg, train)
    for dataset in train:
        check_num_classes(int(cfg.MODEL.ROI_HEADS.NUM_CLASSES), dataset)
    test = load_test_sets(cfg, train[0].class_names)
    images = int(has_objects.sum()) if cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS else len(has_objects)
    if not test:
        logger.info("No test set (DATASETS.TEST, --val-json): nothing is evaluated and no model_best.pth is written.")
    if test and cfg.TEST.PATIENCE > 0 and not any(dataset.object_counts.any() for dataset in test):
        raise DataError(
            f"{test[0].json_file}: has no object, so it gives no AP and TEST.PATIENCE {cfg.TEST.PATIENCE} would stop "
            "the run for no reason; give a test set with objects, or set TEST.PATIENCE 0"
        )
    for dataset in test:
        if not dataset.object_counts.any():
            logger.info("%s has no objects: there is no AP, and no model_best.pth is written.", dataset.name)
        elif len(dataset) < _FEW:
            logger.info("%s has few images (%d): expect a noisy AP.", dataset.name, len(dataset))
    return RunData(train, test, train[0].class_names, train[0].category_ids, images, boxes_only)


def without_masks(cfg: CfgNode) -> CfgNode:
    """Return a copy of ``cfg`` that trains boxes only."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.MASK_ON, cfg.INPUT.COPY_PASTE = False, 0.0
    return cfg


def load_test_sets(cfg: CfgNode, class_names: Sequence[str] | None) -> tuple[CocoDataset, ...]:
    """Read the test sets; their classes must be ``class_names`` if given, in any order of ids.

    Raises:
        DataError: a set cannot be used, or its classes differ.
    """
    test = tuple(load_set(cfg, source, need_annotations=False) for source in datasets_for(cfg, "test"))
    for dataset in test if class_names is not None else ():
        model_category_ids(dataset, class_names or ())
        lacking = [shown(name) for name in class_names or () if name not in dataset.class_names]
        if lacking:
            logger.info("%s lacks classes of the model: no AP for %s.", dataset.name, some(lacking))
    return test


def load_set(cfg: CfgNode, source: DatasetSource, *, need_annotations: bool = True, quiet: bool = False) -> CocoDataset:
    """Read one set with the settings of ``cfg``, and log a summary unless ``quiet``.

    Raises:
        DataError: as for :func:`gn_det.data.coco.load_coco`.
    """
    max_bad, reader = int(cfg.DATALOADER.MAX_BAD), ImageReader.of(cfg)
    dataset = load_coco(source, max_bad=max_bad, need_annotations=need_annotations, reader=reader)
    if not quiet:
        logger.info(dataset.summary())
    return dataset


def load_first_test_set(cfg: CfgNode) -> CocoDataset:
    """Read the set whose images illustrate results; a training run has already checked and logged it."""
    return load_set(cfg, datasets_for(cfg, "test")[0], need_annotations=False, quiet=True)


def model_category_ids(dataset: CocoDataset, class_names: Sequence[str]) -> tuple[int, ...]:
    """Return the json category id in ``dataset`` of each of the model's classes, matched by name.

    A class that the set lacks gets an unused id, so it has no objects and no AP.

    Raises:
        DataError: the set has a class that the model does not know.
    """
    own = dict(zip(dataset.class_names, dataset.category_ids))
    extra = [n for n in own if n not in set(class_names)]
    if extra:
        raise DataError(
            f"{dataset.json_file}: its categories differ from the {len(class_names)} classes of the model: it has "
            f"{shown(extra[0])}, which the model does not know; give training and test json the same categories (a "
            "category may have no objects)"
        )
    unused = itertools.count(max(own.values(), default=0) + 1)
    return tuple(own[n] if n in own else next(unused) for n in class_names)


@dataclass(frozen=True)
class Sizes:
    """Dataset sizes for ``--dry-run``, where the files may be absent."""

    images: int  # training images in an epoch, 0 if unknown
    classes: int  # number of classes, 0 if unknown
    class_names: tuple[str, ...]  # class names, if known
    lines: tuple[str, ...]  # one sentence per set


def estimate_sizes(cfg: CfgNode) -> Sizes:
    """Count existing data, and assume the published sizes of missing built-in sets.

    Raises:
        DataError: a json exists but cannot be used; missing data is not an error.
    """
    images = 0
    names: tuple[str, ...] = ()
    lines = []
    sources = [(split, source) for split in ("train", "test") for source in datasets_for(cfg, split)]
    for split, source in sources:
        count, found, line = _size_of(cfg, source, split)
        lines.append(f"{split}: {line}")
        images += round(count * (1 - held_out(cfg))) if split == "train" else 0
        names = names or found
    assumed = (BUILTIN[source.name].num_classes for _, source in sources if source.name in BUILTIN)
    classes = len(names) or next(assumed, 0)
    return Sizes(images, classes, names, tuple(lines))


def _size_of(cfg: CfgNode, source: DatasetSource, split: str) -> tuple[int, tuple[str, ...], str]:
    """Return the number of images, the class names and a sentence."""
    if not os.path.isfile(source.json_file):
        count = BUILTIN[source.name].num_images if source.name in BUILTIN else 0
        if not count:
            return 0, (), f"{source.name} is missing ({source.json_file}); its size is unknown"
        return count, (), f"{count} images assumed for {source.name} ({source.json_file} is missing)"
    content = read_coco_json(source, need_annotations=split == "train")
    count, names = len(content.images), content.class_names
    without = ""
    if split == "train" and cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS:
        total = count
        count = len(content.images_with_objects())
        without = f", {total - count} without objects left out" if count != total else ""
    return count, names, f"{count} images{without}, {len(names)} classes in {source.name} ({source.json_file})"
