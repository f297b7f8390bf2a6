"""Ground truth of a COCO json, made safe for the evaluators.

COCO's evaluators trust their input. Annotation id 0 counts as "not matched", a repeated id hides another object, a
missing ``area`` or ``iscrowd`` is a KeyError, and a non-finite polygon vertex crashes the mask API. So the json is read
by training's reader, which drops and repairs the same entries. A sound json evaluates to the same numbers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gn_det.data.annotation_table import check_annotations
from gn_det.data.catalog import DatasetSource
from gn_det.data.coco import CocoDataset, build_dataset
from gn_det.data.coco_json import collector_paused, read_json, structure
from gn_det.data.problems import Problems
from gn_det.files import StrPath

_ADVICE = "give the COCO json of the set to evaluate on"


@dataclass
class GroundTruth:
    """A checked COCO data set."""

    source: str  # path (or short name) for messages
    images: list[dict[str, Any]]  # ``{"id", "height", "width", ...}``, ids unique
    categories: list[dict[str, Any]]  # ``{"id", "name"}`` sorted by id
    #: COCO annotations with ``id`` 1..N, grouped by image, ``bbox`` (XYWH), ``area``, ``iscrowd``, and a usable
    #: ``segmentation`` or none
    annotations: list[dict[str, Any]]
    warnings: list[str] = field(default_factory=list)  # one sentence for each kind of repair and each dropped entry
    has_annotations: bool = True  # False for a test json, which has no ``annotations`` key

    @property
    def image_ids(self) -> list[Any]:
        """Image ids in the order of ``images``."""
        return [image["id"] for image in self.images]

    @property
    def category_ids(self) -> list[int]:
        """Category ids, ascending."""
        return [category["id"] for category in self.categories]


def load_ground_truth(source: StrPath | Mapping[str, Any] | CocoDataset | GroundTruth) -> GroundTruth:
    """Read and check a COCO json, without changing the file or dict.

    Args:
        source: path of a COCO json, its content as a dict, a set loaded for training or testing (its repairs are not
            reported again), or a :class:`GroundTruth` (returned unchanged).

    Raises:
        DataError: the file cannot be used, as in training; images need only ``id``, ``height`` and ``width``.
    """
    if isinstance(source, GroundTruth):
        return source
    warnings: list[str] = []
    if not isinstance(source, CocoDataset):
        problems = Problems("ground truth" if isinstance(source, Mapping) else os.fspath(source))
        source = _read(source, problems)
        found = (*problems.notes(), *(f"ignored {bad}" for bad in problems.bad))
        warnings = [f"{problems.path}: {line}" for line in found]
    truth = source.ground_truth()
    annotations = truth.get("annotations", [])
    return GroundTruth(
        source.json_file, truth["images"], truth["categories"], annotations, warnings, source.has_annotations
    )


def _read(source: StrPath | Mapping[str, Any], problems: Problems) -> CocoDataset:
    with collector_paused():
        data = source if isinstance(source, Mapping) else read_json(source, advice=_ADVICE, keep_text=True)
        entries = data.get("images") if isinstance(data, Mapping) else None
        if isinstance(entries, list):  # images are not opened, so their names do not matter
            entries = [{"file_name": "-", **e} if isinstance(e, Mapping) else e for e in entries]
            data = {**data, "images": entries}
        content = structure(data, problems, need_annotations=False)
        table = check_annotations(content, content.images, problems)
        return build_dataset(DatasetSource(problems.path, problems.path, ""), content, table)
