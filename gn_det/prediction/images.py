"""Detect objects in images and write drawings, one COCO-style json and other formats.

Loading, drawing and writing run in threads beside the model. Images are not batched: on a CPU that is no faster, and
padding would change the statistics of GN.
"""

from __future__ import annotations

import io
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from PIL import Image

from gn_det.config.load import Overrides
from gn_det.data.inputs import collect_images, output_names
from gn_det.errors import ConfigError, DataError, out_of_memory
from gn_det.evaluation.results import detections_to_coco
from gn_det.files import atomic_write, check_writable
from gn_det.prediction.outputs import PREDICTIONS_FILE, check_outputs, write_outputs
from gn_det.prediction.pipeline import in_thread
from gn_det.prediction.predictor import Predictor, Selection, crops_of, load_predictor
from gn_det.prediction.tiles import Found, LargeImage, Tiling, detect_tiles
from gn_det.result import lowest_score
from gn_det.structures import ArrayDetections, MaskCrop, encode_crop
from gn_det.terminal import say
from gn_det.text import count, one_line, shown
from gn_det.visualize.draw import Colors, Labels, draw_detections

__all__ = ["PREDICTIONS_FILE", "Predictor", "load_predictor", "predict"]

T = TypeVar("T")

#: Longer side of the drawing of an image that is predicted in tiles.
_LARGE = 4096


def predict(
    weights: str | os.PathLike[str],
    inputs: Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    threshold: float | None = None,
    classes: Sequence[str] | None = None,
    agnostic_nms: bool = False,
    save: Sequence[str] = ("drawings", "coco"),
    labels: Labels = "fit",
    colors: Colors = "class",
    tiling: Tiling | None = None,
    config: str | None = None,
    overrides: Overrides = (),
    device: str = "auto",
    predictor: Predictor | None = None,
    report: Callable[[str], None] = say,
) -> dict[str, Any]:
    """Detect objects in every image; write drawings, ``predictions.json`` and other formats to ``output``.

    Args:
        weights: gn_det checkpoint (with config and classes), or other weights with ``config``.
        inputs: images, folders (searched recursively) and globs.
        output: folder, created if missing.
        threshold: lowest score to keep, in [0, 1]; None: those of the checkpoint, or 0.5.
        classes: only these class names; None keeps all.
        agnostic_nms: drop detections that overlap a better one of another class.
        save: what to write; see :data:`gn_det.prediction.outputs.OUTPUTS`.
        labels, colors: as for :func:`gn_det.visualize.draw.draw_detections`.
        tiling: cut images into tiles; None predicts whole images.
        config: path or shipped name; None uses the config stored in the checkpoint.
        overrides: config keys and values that override the config.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` ...
        predictor: replaces ``weights`` and ``config``.
        report: receives one line per image, and the notes.

    Returns:
        The content of ``predictions.json``: ``images`` (``id``, ``file_name``, ``height``, ``width``, ``drawing``),
        ``categories``, ``annotations`` (COCO, with ``score`` and ``category_name``; RLE masks).

    Raises:
        UserError: no images, unknown class or unusable weights; or, after all other images are written, images that
            could not be read, with reasons.
    """
    check_outputs(save)
    lowest_score(threshold, ())
    folder = named_folder(output)
    given = [inputs] if isinstance(inputs, (str, os.PathLike)) else list(inputs)
    paths, notes = collect_images(given, exclude=folder)
    for note in notes:
        report(f"note: {note}")
    names = output_names(paths)
    check_writable(folder, "--output")
    refuse_to_overwrite(folder, paths, names)
    predictor = predictor or load_predictor(weights, config=config, overrides=overrides, device=device, report=report)
    keep = Selection.of(predictor, threshold, classes, agnostic_nms)
    categories = [{"id": i, "name": name} for i, name in zip(predictor.category_ids, predictor.class_names)]
    document: dict[str, list[Any]] = {"images": [], "categories": categories, "annotations": []}
    drawn = names if "drawings" in save else [""] * len(names)
    draw = partial(draw_scaled, predictor=predictor, labels=labels, colors=colors)
    job = _Job(predictor, keep, folder, draw, tiling)
    failed: list[str] = []
    best, started = 0.0, time.perf_counter()
    try:
        for number, (path, name, result) in enumerate(zip(paths, names, job.run(paths, drawn)), 1):
            if isinstance(result, str):
                failed.append(result)
                report(f"[{number}/{len(paths)}] skipped: {result}")
                continue
            best = max(best, result.best)
            _add(document, path, name, result, predictor)
            report(f"[{number}/{len(paths)}] {path}: {_summary(result.found, predictor.class_names)}")
            for note in result.notes:
                report(f"note: {path}: {note}")
    finally:  # also after an interruption
        if document["images"]:
            for note in write_outputs(save, document, folder):
                report(f"note: {note}")
    seconds = time.perf_counter() - started
    some = "; ".join(one_line(f, 400) for f in failed[:3]) + ("; ..." if len(failed) > 3 else "")
    done = len(document["images"])
    if not done:
        raise DataError(f"no image could be read: {some}")
    report(f"{count(done, 'image')} in {seconds:.1f} s ({done / seconds:.2f} a second); {', '.join(save)} in {folder}")
    if not document["annotations"]:
        report(f"note: no object was found with {keep}; the best score was {best:.2f}")
    if failed:
        raise DataError(f"{len(failed)} of {len(paths)} images could not be read; the others are done: {some}")
    return document


class _Result(NamedTuple):
    """Result of one image: detections without masks, their json entries, and the best score of all."""

    found: ArrayDetections
    entries: list[dict[str, Any]]
    best: float
    notes: list[str]


@dataclass
class _Job:
    """Three stages per image: load (thread), detect (caller's thread), draw and write (thread)."""

    predictor: Predictor
    keep: Selection
    folder: Path
    draw: Callable[..., np.ndarray]  # draw_scaled for this predictor
    tiling: Tiling | None

    def run(self, paths: Sequence[Path], drawings: Sequence[str]) -> Iterator[_Result | str]:
        """Yield the result of each image in order, or why it has none; drawings without a name are skipped."""
        for path, writing in zip(paths, in_thread(self._finish, self._detected(paths, drawings))):
            yield _or_reason(path, writing.result)

    def _load(self, path: Path) -> tuple[Any, np.ndarray] | LargeImage:
        return self.predictor.load(path) if self.tiling is None else LargeImage(path, self.predictor.reader)

    def _detected(
        self, paths: Sequence[Path], drawings: Sequence[str]
    ) -> Iterator[tuple[str, tuple[Found, np.ndarray | LargeImage] | str]]:
        for path, drawing, loading in zip(paths, drawings, in_thread(self._load, paths)):
            yield drawing, _or_reason(path, partial(self._detect, loading))

    def _detect(self, loading: Future[tuple[Any, np.ndarray] | LargeImage]) -> tuple[Found, np.ndarray | LargeImage]:
        loaded = loading.result()
        if isinstance(loaded, LargeImage):
            assert self.tiling is not None
            return detect_tiles(self.predictor, loaded, self.tiling, self.keep), loaded
        det = self.predictor.infer(loaded[0])
        kept = self.keep(det)
        return Found(kept, crops_of(kept), float(det.scores.max()) if len(det) else 0.0, []), loaded[1]

    def _finish(self, work: tuple[str, tuple[Found, np.ndarray | LargeImage] | str]) -> _Result | str:
        drawing, detected = work
        if isinstance(detected, str):
            return detected
        (det, crops, best, notes), pixels = detected
        det.masks = None
        if drawing:
            if isinstance(pixels, LargeImage):
                pixels = pixels.thumbnail(_LARGE)
            write_png(self.folder / drawing, self.draw(pixels, det, crops))
        return _Result(det, entries_of(det, crops, self.predictor), best, notes)


def _or_reason(path: Path, call: Callable[[], T]) -> T | str:
    """Return ``call()``, or why a bad image or lack of memory prevents it."""
    try:
        return call()
    except (DataError, RuntimeError, MemoryError) as error:
        if isinstance(error, DataError):
            return str(error)
        if not out_of_memory(error):
            raise
        return f"{path}: not enough memory for this image of {os.path.getsize(path)} bytes"


def draw_scaled(
    pixels: np.ndarray,
    det: ArrayDetections,
    crops: list[MaskCrop] | None,
    predictor: Predictor,
    labels: Labels,
    colors: Colors,
) -> np.ndarray:
    """Draw detections on ``pixels``, which may be a smaller version of their image."""
    rows, columns = pixels.shape[0] / det.image_size[0], pixels.shape[1] / det.image_size[1]
    if rows != 1 or columns != 1:
        boxes = det.boxes * np.array([columns, rows, columns, rows], np.float32)
        det = ArrayDetections(det.image_size, boxes, det.scores, det.classes)
    return draw_detections(pixels, det, predictor.class_names, labels=labels, colors=colors, crops=crops)


def named_folder(output: str | os.PathLike[str]) -> Path:
    """Return the output folder; raise ConfigError for an invalid name."""
    if not os.fspath(output) or "\0" in os.fspath(output):
        raise ConfigError(f"output folder {shown(os.fspath(output))}: not a valid folder name; give another")
    return Path(os.path.expanduser(output))


def refuse_to_overwrite(folder: Path, inputs: Sequence[Path], names: Sequence[str]) -> None:
    """Raise ConfigError if one of the files ``names`` of ``folder`` is an input."""
    there = {path.resolve() for path in inputs}
    for name in names:
        if (folder / name).resolve() in there:
            raise ConfigError(f"output folder {folder}: {name} would overwrite an input; choose another folder")


def write_png(path: Path, picture: np.ndarray) -> None:
    """Write an (H, W, 3) uint8 RGB image atomically."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", compress_level=1)
    atomic_write(path, buffer.getvalue())


def _summary(det: ArrayDetections, names: Sequence[str]) -> str:
    """``3 objects: 2 dog, 1 cat``."""
    counts = Counter(names[index] for index in det.classes.tolist()).most_common()
    parts = [f"{n} {one_line(name, 60)}" for name, n in counts]
    some = ", ".join(parts[:5]) + (", ..." if len(parts) > 5 else "")
    return f"{count(len(det), 'object')}" + (f": {some}" if some else "")


def entries_of(det: ArrayDetections, crops: list[MaskCrop] | None, predictor: Predictor) -> list[dict[str, Any]]:
    """Return the annotation of each detection, without ids; ``crops`` are the masks."""
    entries = []
    for i, (index, result) in enumerate(zip(det.classes.tolist(), detections_to_coco(0, det, predictor.category_ids))):
        del result["image_id"]
        area = result["bbox"][2] * result["bbox"][3]
        if crops is not None:
            result["segmentation"] = encode_crop(crops[i], *det.image_size)
            area = float(np.count_nonzero(crops[i].bitmap))
        entries.append({**result, "category_name": predictor.class_names[index], "area": area, "iscrowd": 0})
    return entries


def _add(document: dict[str, list[Any]], path: Path, drawing: str, result: _Result, predictor: Predictor) -> None:
    """Add an image and its detections to the json."""
    image_id = len(document["images"]) + 1
    height, width = result.found.image_size
    image = {"id": image_id, "file_name": path.as_posix(), "height": height, "width": width, "drawing": drawing}
    document["images"].append(image)
    for number, entry in enumerate(result.entries, len(document["annotations"]) + 1):
        document["annotations"].append({"id": number, "image_id": image_id, **entry})
