"""Ground truth of a COCO json, made safe for the evaluators.

COCO's evaluators trust their input: annotation id 0 counts as "not matched", a repeated id hides another object, a
missing ``area`` or ``iscrowd`` is a KeyError and a non-finite polygon vertex ends the process inside the mask API. So
the ground truth is what training's reader makes of the json: the same entries dropped, the same repairs. On a sound
json it evaluates to the same numbers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from gn_det.data.annotation_table import check_annotations
from gn_det.data.annotations import AnnotationReader
from gn_det.data.catalog import DatasetSource
from gn_det.data.coco import CocoDataset, build_dataset
from gn_det.data.coco_json import collector_paused, read_json, structure
from gn_det.data.problems import Problems
from gn_det.files import StrPath

_ADVICE = "give the COCO json of the set to evaluate on"


@dataclass
class GroundTruth:
    """A checked COCO data set.

    Attributes:
        source: path (or a short name) for messages.
        images: ``{"id", "height", "width", ...}``, ids unique.
        categories: ``{"id", "name"}`` sorted by id.
        annotations: COCO annotations with ``id`` 1..N, grouped by image, ``bbox`` (XYWH), ``area``, ``iscrowd``; a
            usable ``segmentation`` or none at all.
        warnings: one sentence for each kind of repair and each entry that was dropped.
        has_annotations: False for a test json, which has no ``annotations`` key.
    """

    source: str
    images: list[dict[str, Any]]
    categories: list[dict[str, Any]]
    annotations: list[dict[str, Any]]
    warnings: list[str] = field(default_factory=list)
    has_annotations: bool = True

    @property
    def image_ids(self) -> list[Any]:
        """Image ids in the order of ``images``."""
        return [image["id"] for image in self.images]

    @property
    def category_ids(self) -> list[int]:
        """Category ids, ascending."""
        return [category["id"] for category in self.categories]


def load_ground_truth(source: StrPath | Mapping[str, Any] | CocoDataset | GroundTruth) -> GroundTruth:
    """Read and check a COCO json; the file or dict given is never changed.

    Args:
        source: path of a COCO json, its content as a dict, a set that was loaded for training or testing (what was
            dropped and repaired there is not reported again), or a :class:`GroundTruth` (returned as it is).

    Raises:
        DataError: the file cannot be used, as in training; of an image only ``id``, ``height`` and ``width`` are
            needed.
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
        if isinstance(entries, list):  # no image is opened: its name does not matter
            entries = [{"file_name": "-", **e} if isinstance(e, Mapping) else e for e in entries]
            data = {**data, "images": entries}
        content = structure(data, problems, need_annotations=False)
        table = check_annotations(content, content.images, AnnotationReader(content.category_ids, problems))
        return build_dataset(DatasetSource(problems.path, problems.path, ""), content, table)
