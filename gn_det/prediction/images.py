"""Detect objects in images and write drawings, one COCO-style json and other formats.

Loading, drawing and writing run in threads beside the model. Images are not batched: on a CPU that is no faster, and
padding would change the statistics of GN.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

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
from gn_det.text import count, one_line, shown, some
from gn_det.visualize.draw import Colors, Labels, draw_detections

__all__ = ["PREDICTIONS_FILE", "Predictor", "load_predictor", "predict"]

T = TypeVar("T")

#: Detections of an image, and what returns the pixels to draw on.
_Detected = tuple[Found, Callable[[], np.ndarray]]

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
    draw = partial(draw_detections, class_names=predictor.class_names, labels=labels, colors=colors)
    job = _Job(predictor, keep, folder, draw, tiling)
    failed: list[str] = []
    best, started = 0.0, time.perf_counter()
    try:
        for number, (path, name, result) in enumerate(zip(paths, names, job.run(paths, drawn)), 1):
            if isinstance(result, str):
                failed.append(result)
                report(f"[{number}/{len(paths)}] skipped: {result}")
                continue
            found, entries = result
            best = max(best, found.best)
            _add(document, path, name, found.detections.image_size, entries)
            counts = Counter(entry["category_name"] for entry in entries).most_common()
            objects = count(len(entries), "object") + (f": {some(f'{n} {c}' for c, n in counts)}" if counts else "")
            report(f"[{number}/{len(paths)}] {path}: {objects}")
            for note in found.notes:
                report(f"note: {path}: {note}")
    finally:  # also after an interruption
        if document["images"]:
            for note in write_outputs(save, document, folder):
                report(f"note: {note}")
    seconds = time.perf_counter() - started
    reasons = "; ".join(one_line(f, 400) for f in failed[:3]) + ("; ..." if len(failed) > 3 else "")
    done = len(document["images"])
    if not done:
        raise DataError(f"no image could be read: {reasons}")
    report(f"{count(done, 'image')} in {seconds:.1f} s ({done / seconds:.2f} a second); {', '.join(save)} in {folder}")
    if not document["annotations"]:
        report(f"note: no object was found with {keep}; the best score was {best:.2f}")
    if failed:
        raise DataError(f"{len(failed)} of {len(paths)} images could not be read; the others are done: {reasons}")
    return document


@dataclass
class _Job:
    """Three stages per image: load (thread), detect (caller's thread), draw and write (thread)."""

    predictor: Predictor
    keep: Selection
    folder: Path
    draw: Callable[..., np.ndarray]  # draw_detections with the names of the classes
    tiling: Tiling | None

    def run(self, paths: Sequence[Path], drawings: Sequence[str]) -> Iterator[tuple[Found, list[dict[str, Any]]] | str]:
        """Yield detections (without masks) and json entries of each image in order, or why it has none.

        A drawing without a name is skipped.
        """
        for path, writing in zip(paths, in_thread(self._finish, self._detected(paths, drawings))):
            yield _or_reason(path, writing.result)

    def _load(self, path: Path) -> tuple[Any, np.ndarray] | LargeImage:
        return self.predictor.load(path) if self.tiling is None else LargeImage(path, self.predictor.reader)

    def _detected(self, paths: Sequence[Path], drawings: Sequence[str]) -> Iterator[tuple[str, _Detected | str]]:
        for path, drawing, loading in zip(paths, drawings, in_thread(self._load, paths)):
            yield drawing, _or_reason(path, partial(self._detect, loading))

    def _detect(self, loading: Future[tuple[Any, np.ndarray] | LargeImage]) -> _Detected:
        loaded = loading.result()
        if isinstance(loaded, LargeImage):
            assert self.tiling is not None
            return detect_tiles(self.predictor, loaded, self.tiling, self.keep), partial(loaded.thumbnail, _LARGE)
        sample, pixels = loaded
        det = self.predictor.infer(sample)
        kept = self.keep(det)
        return Found(kept, crops_of(kept), float(det.scores.max()) if len(det) else 0.0, []), lambda: pixels

    def _finish(self, work: tuple[str, _Detected | str]) -> tuple[Found, list[dict[str, Any]]] | str:
        drawing, detected = work
        if isinstance(detected, str):
            return detected
        found, pixels = detected
        found.detections.masks = None
        if drawing:
            write_png(self.folder / drawing, self.draw(pixels(), found.detections, crops=found.crops))
        return found._replace(crops=None), entries_of(found.detections, found.crops, self.predictor)


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
    atomic_write(path, lambda file: Image.fromarray(picture).save(file, "PNG", compress_level=1))


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


def _add(
    document: dict[str, list[Any]], path: Path, drawing: str, size: tuple[int, int], entries: list[dict[str, Any]]
) -> None:
    """Add an image and its detections to the json."""
    image_id = len(document["images"]) + 1
    image = {"id": image_id, "file_name": path.as_posix(), "height": size[0], "width": size[1], "drawing": drawing}
    document["images"].append(image)
    for number, entry in enumerate(entries, len(document["annotations"]) + 1):
        document["annotations"].append({"id": number, "image_id": image_id, **entry})
