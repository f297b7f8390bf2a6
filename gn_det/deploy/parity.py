"""Compare an exported file with its original model on images."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from tabulate import tabulate

from gn_det.data.inputs import collect_images
from gn_det.data.mapper import InferenceMapper
from gn_det.deploy.detector import Detector
from gn_det.deploy.export import Exported, quiet
from gn_det.errors import DataError
from gn_det.evaluation.coco_eval import evaluate_coco
from gn_det.evaluation.ground_truth import load_ground_truth
from gn_det.evaluation.results import detections_to_coco
from gn_det.files import StrPath
from gn_det.modeling.mask_rcnn import MaskRCNN
from gn_det.structures import AnyDetections, box_iou, to_numpy
from gn_det.text import count, one_line, some


class Tolerance(NamedTuple):
    """Largest allowed differences between an exported model and its original."""

    boxes: float  # in pixels of the original image
    scores: float
    masks: float  # lowest IoU of all masks of an image together
    unmatched: float  # share of detections without a counterpart
    ap: float  # in percent
    share: float = 1.0  # of the detections, whose boxes and scores must be that close


#: By precision of the weights. A detection may have no counterpart if its suppression depends on the last bit; in half
#: precision, another one of the same object may survive.
TOLERANCES = {"fp32": Tolerance(0.01, 1e-4, 0.999, 0.001, 0.1), "fp16": Tolerance(0.1, 0.01, 0.98, 0.01, 0.5, 0.99)}


@dataclass
class Parity:
    """Largest differences so far, as in :class:`Tolerance`; numbers of images, and of detections of the two sides."""

    tolerance: Tolerance
    images: int = 0
    original: int = 0
    exported: int = 0
    masks: float = 1.0
    unmatched: int = 0
    #: (n, 2) differences of boxes and scores of each image's pairs
    pairs: list[np.ndarray] = field(default_factory=list)
    #: task -> AP of the original, of the exported file, and of the original without the padding of a fixed size (nan
    #: if dynamic); empty without ground truth
    ap: dict[str, tuple[float, float, float]] = field(default_factory=dict)

    def add(self, original: AnyDetections, exported: AnyDetections, threshold: float) -> None:
        """Compare the detections of one image, at its original size, with scores of at least ``threshold``.

        Differences around the threshold do not count as unmatched.
        """
        self.images += 1
        self.original += len(original)
        self.exported += len(exported)
        pairs, alone = match(original, exported, threshold + self.tolerance.scores)
        self.unmatched += alone
        if not len(pairs):
            return
        a, b = pairs.T
        boxes = np.abs(to_numpy(original.boxes)[a] - to_numpy(exported.boxes)[b]).max(axis=1)
        scores = np.abs(to_numpy(original.scores)[a] - to_numpy(exported.scores)[b])
        self.pairs.append(np.stack([boxes, scores], axis=1))
        if original.masks is not None and exported.masks is not None:
            left, right = to_numpy(original.masks), to_numpy(exported.masks)
            both = sum(int((left[i] & right[j]).sum()) for i, j in pairs)
            either = sum(int((left[i] | right[j]).sum()) for i, j in pairs)
            self.masks = min(self.masks, both / either if either else 1.0)

    @property
    def boxes(self) -> float:
        """Largest difference of boxes in pixels, of the share of detections that the tolerance asks for."""
        return self._largest(0)

    @property
    def scores(self) -> float:
        """The same for scores."""
        return self._largest(1)

    def _largest(self, column: int) -> float:
        return float(np.quantile(np.concatenate(self.pairs)[:, column], self.tolerance.share)) if self.pairs else 0.0

    @property
    def rows(self) -> list[tuple[str, str, str, bool]]:
        """Return name, value, tolerance, and whether the value is within it."""
        limit = self.tolerance
        most = limit.unmatched * max(self.original, self.exported)
        of = f" of {limit.share:.0%}" if limit.share < 1 else ""
        rows = [
            (f"boxes{of}, pixels", f"{self.boxes:.2g}", f"<= {limit.boxes:g}", self.boxes <= limit.boxes),
            (f"scores{of}", f"{self.scores:.2g}", f"<= {limit.scores:g}", self.scores <= limit.scores),
            ("masks, IoU of an image", f"{self.masks:.5f}", f">= {limit.masks:g}", self.masks >= limit.masks),
            ("detections unmatched", str(self.unmatched), f"<= {limit.unmatched:.1%}", self.unmatched <= most),
        ]
        for task, (original, exported, unpadded) in self.ap.items():
            difference = abs(original - exported)
            sides = f"torch {original:.2f}, exported {exported:.2f}"
            if not np.isnan(unpadded):
                sides += f"; torch without the padding {unpadded:.2f}"
            rows.append((f"{task}/AP", f"{difference:.2f} ({sides})", f"<= {limit.ap:g}", difference <= limit.ap))
        return rows

    @property
    def ok(self) -> bool:
        return all(kept for *_, kept in self.rows)

    def lines(self) -> list[str]:
        """Format the comparison as text."""
        rows = [(name, value, limit, "ok" if kept else "FAILED") for name, value, limit, kept in self.rows]
        table = tabulate(rows, ("largest difference", "", "tolerance", ""), disable_numparse=True)
        sides = f"{self.original} detections by torch, {self.exported} by the exported file"
        return [f"{count(self.images, 'image')}: {sides}", *table.splitlines()]


def match(original: AnyDetections, exported: AnyDetections, threshold: float) -> tuple[np.ndarray, int]:
    """Match the detections of an image with those of the same class by IoU, best scores first.

    Returns:
        (n, 2) indices of pairs with an IoU of at least 0.5, and the number of detections above ``threshold`` in
        neither side's pairs.
    """
    iou = box_iou(*(to_numpy(d.boxes).astype(np.float64) for d in (original, exported)))
    iou *= to_numpy(original.classes)[:, None] == to_numpy(exported.classes)
    pairs = []
    for i in np.argsort(-to_numpy(original.scores), kind="stable"):
        if iou.shape[1] and iou[i].max() >= 0.5:
            j = int(iou[i].argmax())
            pairs.append((int(i), j))
            iou[:, j] = 0
    found = np.array(pairs, dtype=int).reshape(-1, 2)
    alone = 0
    for side, scores in enumerate((to_numpy(original.scores), to_numpy(exported.scores))):
        alone += int((np.delete(scores, found[:, side]) > threshold).sum())
    return found, alone


class ProgramDetector(Detector):
    """A ``torch.export`` program or AOTInductor package with the interface of :class:`Detector`."""

    def __init__(self, exported: Exported) -> None:
        self.path = os.fspath(exported.path)
        self._describe(exported.metadata)
        self.shape = exported.shape
        self._names = exported.outputs
        compiled = exported.options.to == "aoti"
        self._run: Callable[..., Any] = (
            torch._inductor.aoti_load_package(self.path) if compiled else torch.export.load(self.path).module()
        )

    def run(self, image: np.ndarray, size: np.ndarray) -> dict[str, np.ndarray]:
        with torch.no_grad():
            outputs = self._run(torch.from_numpy(image), torch.from_numpy(size))
        return dict(zip(self._names, map(to_numpy, outputs)))


def compare(
    exported: Exported, inputs: Sequence[StrPath], *, ground_truth: StrPath | None = None, provider: str = "cpu"
) -> Parity:
    """Detect objects in every image with the exported file and, on the same padded input, with the original.

    Args:
        inputs: images, folders and globs.
        ground_truth: COCO json of the images, matched by file name; AP is computed if it is given.
        provider: see :class:`gn_det.deploy.Detector`.

    Raises:
        DataError: an image or the json cannot be used.
    """
    model, cfg = exported.predictor.module, exported.predictor.config
    assert isinstance(model, MaskRCNN) and cfg is not None
    onnx = exported.options.to == "onnx"
    detector = Detector(exported.path, provider=provider) if onnx else ProgramDetector(exported)
    mapper = InferenceMapper(cfg)
    paths, _ = collect_images(inputs)
    ids = {} if ground_truth is None else image_ids(ground_truth, paths)
    parity = Parity(TOLERANCES[exported.metadata.precision])
    results: tuple[list[Any], list[Any], list[Any]] = ([], [], [])
    for path in paths:
        sample = mapper(path)
        image, _ = detector.prepare(*detector._load(path))
        with torch.inference_mode():
            original = model.detect([sample], least=(image.shape[1], image.shape[2]))[0]
            unpadded = model.detect([sample])[0] if path in ids and detector.shape[1] else None
        found = detector.predict(path, threshold=0)
        # At the limit, rounding decides which detection is the last one.
        last = float(original.scores.min()) if len(original) == cfg.TEST.DETECTIONS_PER_IMAGE else 0.0
        parity.add(original, found, max(float(cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST), last))
        for part, side in zip(results, (original, found, unpadded)):
            if path in ids and side is not None:
                part += detections_to_coco(ids[path], side, detector.category_ids)
    if ground_truth is not None:
        parity.ap = _precisions(ground_truth, ids, results, cfg.TEST.MAX_DETS)
    return parity


def image_ids(ground_truth: StrPath, paths: Sequence[Path]) -> dict[Path, Any]:
    """Return the ids of the images at ``paths`` in a json, by file name; DataError names missing or ambiguous ones."""
    known: dict[str, Any] = {}
    for image in load_ground_truth(ground_truth).images:
        name = Path(image["file_name"]).name
        if name in known:
            raise DataError(f"{ground_truth}: two images are called {one_line(name)}; AP needs unique file names")
        known[name] = image["id"]
    missing = [path.name for path in paths if path.name not in known]
    if missing:
        raise DataError(f"{ground_truth}: has no image {some(missing)}; give only images of this json")
    return {path: known[path.name] for path in paths}


def _precisions(
    ground_truth: StrPath, ids: Mapping[Path, Any], results: tuple[list[Any], list[Any], list[Any]], max_dets: int
) -> dict[str, tuple[float, float, float]]:
    """Return the AP of each task on the images in ``ids``, for each list of results; nan for an empty list."""
    whole, chosen = load_ground_truth(ground_truth), set(ids.values())
    part = replace(
        whole,
        images=[image for image in whole.images if image["id"] in chosen],
        annotations=[a for a in whole.annotations if a["image_id"] in chosen],
    )
    with quiet():  # hides explanations that belong to gn-det eval
        scores = [evaluate_coco(part, r, max_dets=max_dets) if r else {} for r in results]
    return {
        task: tuple(side[task]["AP"] if task in side else math.nan for side in scores)  # type: ignore[misc]
        for task in scores[0]
    }
