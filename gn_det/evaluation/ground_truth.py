"""Ground truth of a COCO json, made safe for the evaluators.

COCO's evaluators trust their input: annotation id 0 counts as "not matched", a repeated id hides another object, a
missing ``area`` or ``iscrowd`` is a KeyError and a non-finite polygon vertex ends the process inside the mask API. So
the ground truth is what training's reader makes of the json: the same entries dropped, the same repairs. On a sound
json it evaluates to the same numbers.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from gn_det.data.annotations import AnnotationReader, usable_pieces
from gn_det.data.coco import CocoDataset
from gn_det.data.coco_json import CocoJson, collector_paused, read_json, structure
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
    if isinstance(source, CocoDataset):
        truth = source.ground_truth()
        annotations = truth.get("annotations", [])
        return GroundTruth(
            source.json_file, truth["images"], truth["categories"], annotations, [], source.has_annotations
        )
    name = "ground truth" if isinstance(source, Mapping) else os.fspath(source)
    problems = Problems(name)
    with collector_paused():
        data = source if isinstance(source, Mapping) else read_json(source, advice=_ADVICE)
        entries = data.get("images") if isinstance(data, Mapping) else None
        if isinstance(entries, list):  # no image is opened: its name does not matter
            entries = [{"file_name": "-", **e} if isinstance(e, Mapping) else e for e in entries]
            data = {**data, "images": entries}
        content = structure(data, problems, need_annotations=False)
        annotations = list(_annotations(content, AnnotationReader(content.category_ids, problems)))
    warnings = [f"{name}: {line}" for line in (*problems.notes(), *(f"ignored {bad}" for bad in problems.bad))]
    categories = [{"id": i, "name": n} for i, n in zip(content.category_ids, content.class_names)]
    return GroundTruth(name, content.images, categories, annotations, warnings, content.has_annotations)


def _annotations(content: CocoJson, reader: AnnotationReader) -> Iterator[dict[str, Any]]:
    """The usable annotations, with segmentations as the json has them."""
    number = 0
    for image in content.images:
        for raw in content.annotations_of.get(image["id"], ()):
            a = reader.read(raw, image)
            if a is None:
                continue
            number += 1
            entry = {**a, "id": number, "image_id": image["id"], "category_id": reader.category_ids[a["category_id"]]}
            if "segmentation" in a:
                pieces = raw["segmentation"]
                entry["segmentation"] = pieces if isinstance(pieces, dict) else usable_pieces(pieces)
            yield entry
