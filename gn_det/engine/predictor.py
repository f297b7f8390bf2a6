"""Detect objects on images, draw them, and write the detections as one COCO-style json."""

from __future__ import annotations

import contextlib
import io
import os
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from gn_det.data.image import ImageReader
from gn_det.data.inputs import collect_images, output_names
from gn_det.engine.dist import resolve_device
from gn_det.errors import ConfigError, DataError, UserError, WeightsError
from gn_det.evaluation.results import detections_to_coco
from gn_det.files import atomic_write, json_bytes
from gn_det.structures import Detections
from gn_det.terminal import say
from gn_det.text import nearest, one_line, shown
from gn_det.visualize.draw import draw_detections

if TYPE_CHECKING:
    from fvcore.common.config import CfgNode
    from torch import nn

    from gn_det.engine.engines import Engine

#: Name of the json beside the drawings.
PREDICTIONS_FILE = "predictions.json"


@dataclass(frozen=True)
class Predictor:
    """A model and the names of what it finds.

    Attributes:
        detect: path of an image, or an (H, W, 3) uint8 array in RGB order (OpenCV frames are BGR: pass
            ``frame[:, :, ::-1]``) -> detections at its (upright) original size; raises DataError for an unreadable
            image.
        class_names: name of each class index.
        category_ids: json category id of each class index.
        read: path of an image -> its RGB pixels, for drawing.
        module: the model, in evaluation mode.
        config: its resolved configuration.
    """

    detect: Callable[[Path | np.ndarray], Detections]
    class_names: Sequence[str]
    category_ids: Sequence[int]
    read: Callable[[Path], np.ndarray] = ImageReader("RGB").read
    module: nn.Module | None = None
    config: CfgNode | None = None


def predict(
    weights: str | os.PathLike[str],
    inputs: Sequence[str | os.PathLike[str]] | str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    threshold: float = 0.5,
    classes: Sequence[str] | None = None,
    config: str | None = None,
    device: str = "auto",
    predictor: Predictor | None = None,
    report: Callable[[str], None] = say,
) -> dict[str, Any]:
    """Detect on every image; write a drawing of each and ``predictions.json`` into ``output``.

    Args:
        weights: checkpoint of gn_det (config and classes come from it), or other weights with ``config``.
        inputs: images, folders (searched with subfolders) and globs.
        output: folder, made if absent.
        threshold: lowest score kept, in [0, 1].
        classes: only these class names; None keeps all.
        config: path or shipped name; None takes the config stored in the checkpoint.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1`` ...
        predictor: replaces ``weights`` and ``config``.
        report: receives one line per image, and the notes.

    Returns:
        The content of ``predictions.json``: ``images`` (``id``, ``file_name``, ``height``, ``width``, ``drawing``),
        ``categories``, ``annotations`` (COCO, with ``score`` and ``category_name``; RLE masks).

    Raises:
        UserError: nothing to do, unknown class or unusable weights; or, after all other images are done and written,
            images that could not be read, named with their reasons.
    """
    if not 0 <= threshold <= 1:
        raise ConfigError(f"threshold {threshold} must lie between 0 and 1")
    if not os.fspath(output) or "\0" in os.fspath(output):
        raise ConfigError(f"output folder {shown(os.fspath(output))}: no folder can have this name; give another")
    folder = Path(os.path.expanduser(output))
    given = [inputs] if isinstance(inputs, (str, os.PathLike)) else list(inputs)
    paths, notes = collect_images(given, exclude=folder)
    for note in notes:
        report(f"note: {note}")
    names = output_names(paths)
    _make_folder(folder, paths, names)
    from gn_det.engine.advice import out_of_memory

    predictor = predictor or load_predictor(weights, config=config, device=device)
    wanted = wanted_classes(classes, predictor.class_names)
    categories = [{"id": i, "name": name} for i, name in zip(predictor.category_ids, predictor.class_names)]
    document: dict[str, list[Any]] = {"images": [], "categories": categories, "annotations": []}
    failed: list[str] = []
    best = 0.0
    for number, (path, name) in enumerate(zip(paths, names), 1):
        started = time.perf_counter()
        try:
            found = predictor.detect(path)
            best = max(best, found.scores.max().item() if len(found) else 0.0)
            det = select(found, threshold, wanted)
            drawing = draw_detections(predictor.read(path), det, predictor.class_names)
        except (DataError, RuntimeError, MemoryError) as error:
            if not isinstance(error, DataError) and not out_of_memory(error):
                raise
            reason = f"{path}: too little memory for this image of {os.path.getsize(path)} bytes"
            failed.append(str(error) if isinstance(error, DataError) else reason)
            report(f"[{number}/{len(paths)}] skipped: {failed[-1]}")
            continue
        write_png(folder / name, drawing)
        _add(document, path, name, det, predictor)
        summary = _summary(det, predictor.class_names)
        report(f"[{number}/{len(paths)}] {path}: {summary} ({time.perf_counter() - started:.2f} s)")
    some = "; ".join(one_line(f, 400) for f in failed[:3]) + ("; ..." if len(failed) > 3 else "")
    count = len(document["images"])
    if not count:
        raise DataError(f"no image could be read: {some}")
    atomic_write(folder / PREDICTIONS_FILE, json_bytes(document))
    report(f"{count} drawing{'s' * (count != 1)} and {PREDICTIONS_FILE} are in {folder}")
    if not document["annotations"]:
        report(f"note: no object was found with a score of {threshold:g} or more; the best score was {best:.2f}")
    if failed:
        raise DataError(f"{len(failed)} of {len(paths)} images could not be read, the others are done: {some}")
    return document


def load_predictor(
    weights: str | os.PathLike[str],
    *,
    config: str | None = None,
    device: str = "auto",
    engine: Engine | None = None,
) -> Predictor:
    """Build the model that a checkpoint describes and load it; ``engine`` None takes the embedded one if that has it.

    Raises:
        WeightsError: unreadable file, no stored config and none given, or weights that do not fill the model.
        ConfigError: unusable config or device.
    """
    from gn_det.checkpoint.io import read_any
    from gn_det.checkpoint.meta import read_meta
    from gn_det.checkpoint.weights import load_weights
    from gn_det.checkpoint.weights_uri import local_path
    from gn_det.config import load_config, parse_config
    from gn_det.data.mapper import InferenceMapper

    meta = read_meta(read_any(local_path(weights)), weights) or {}
    if config is not None:
        cfg = load_config(config)
    elif meta.get("config"):
        cfg = parse_config(meta["config"], os.fspath(weights))
    else:
        raise WeightsError(
            f"{os.fspath(weights)}: no config is stored in this file; name the one it was trained with by --config"
        )
    names, ids = _classes_of(meta, cfg)
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(names)
    target = resolve_device(device, "device")
    engine = engine or _engine_for(cfg, os.fspath(weights))
    model = engine.build_model(cfg).eval()
    load_weights(model, weights, cfg, require_all=True)
    model.to(target)
    mapper, detector = InferenceMapper(cfg), engine.detector(model)

    @torch.inference_mode()
    def detect(image: Path | np.ndarray) -> Detections:
        return detector([mapper(image)])[0]

    return Predictor(detect, names, ids, ImageReader.of(cfg, "RGB").read, model, cfg)


def _engine_for(cfg: Any, source: str) -> Engine:
    """Return the embedded engine, or Detectron2 for a model that only it implements.

    Raises:
        UserError: the model needs Detectron2, which is not installed or cannot be used.
    """
    from gn_det.config.check import check_config
    from gn_det.engine import choice

    name = "embedded"
    try:
        check_config(cfg)
    except ConfigError as error:
        with contextlib.suppress(ConfigError):  # neither engine implements the config: the model may not depend on it
            check_config(cfg, "detectron2")
            name = "detectron2"
        if name == "detectron2" and not choice.is_installed():
            raise ConfigError(
                f"{source} needs Detectron2, which is not installed ({error}); see {choice.INSTALL_PAGE}"
            ) from None
    return choice.load(choice.Choice(name, ""))


def _classes_of(meta: dict[str, Any], cfg: Any) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Names and ids: from the checkpoint, else from the config, else numbers."""
    names, ids = tuple(meta.get("class_names") or ()), tuple(meta.get("category_ids") or ())
    if not names:
        names = tuple(cfg.MODEL.CLASS_NAMES)
    if not names:
        count = int(cfg.MODEL.ROI_HEADS.NUM_CLASSES)
        if count < 1:
            raise ConfigError("MODEL.ROI_HEADS.NUM_CLASSES is 0 and the checkpoint stores no classes; set it")
        names = tuple(f"class {i}" for i in range(count))
    return names, ids if len(ids) == len(names) else tuple(range(1, len(names) + 1))


def _make_folder(folder: Path, paths: Sequence[Path], names: Sequence[str]) -> None:
    """Make the output folder before the model runs, so that an hour's work is not lost to a typo.

    Raises:
        UserError: it cannot be written, or a drawing would overwrite an input.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror}); choose another output folder") from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{folder}: is not writable; choose another output folder")
    images = {path.resolve() for path in paths}
    for name in names:
        if (folder / name).resolve() in images:
            raise ConfigError(f"output folder {folder}: {name} would overwrite an input; choose another folder")


def wanted_classes(classes: Sequence[str] | None, names: Sequence[str]) -> set[int] | None:
    """Indices of the named classes, whatever their case; None for all.

    Raises:
        ConfigError: an unknown name, or an empty list.
    """
    if classes is None:
        return None
    if not classes:
        raise ConfigError("the list of classes is empty; name at least one, or leave it out for all")
    lower = {name.lower(): i for i, name in enumerate(names)}
    indices = set()
    for name in classes:
        index = names.index(name) if name in names else lower.get(name.lower())
        if index is None:
            near = nearest(name.lower(), lower, 1)
            known = ", ".join(one_line(n, 60) for n in names[:10])
            hint = f"did you mean {shown(names[lower[near[0]]])}?" if near else f"the model knows {known}"
            raise ConfigError(f"class {shown(name)} is not one of the model's {len(names)} classes; {hint}")
        indices.add(index)
    return indices


def select(det: Detections, threshold: float, wanted: set[int] | None) -> Detections:
    """Detections on the CPU with enough score and of the wanted classes, best first."""
    keep = det.scores >= threshold
    if wanted is not None:
        keep &= torch.isin(det.classes, torch.tensor(sorted(wanted), device=det.classes.device))
    index = torch.nonzero(keep).flatten()
    index = index[det.scores[index].argsort(descending=True, stable=True)]
    masks = det.masks
    if masks is not None:
        # The best ones usually come first: then no mask is copied.
        first = torch.equal(index.cpu(), torch.arange(len(index)))
        masks = (masks[: len(index)] if first else masks[index]).cpu()
    return Detections(det.image_size, det.boxes[index].cpu(), det.scores[index].cpu(), det.classes[index].cpu(), masks)


def write_png(path: Path, picture: np.ndarray) -> None:
    """Write an (H, W, 3) uint8 RGB image atomically."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", compress_level=3)
    atomic_write(path, buffer.getvalue())


def _summary(det: Detections, names: Sequence[str]) -> str:
    """``3 objects: 2 dog, 1 cat``."""
    counts = Counter(names[index] for index in det.classes.tolist()).most_common()
    parts = [f"{n} {one_line(name, 60)}" for name, n in counts]
    some = ", ".join(parts[:5]) + (", ..." if len(parts) > 5 else "")
    return f"{len(det)} object{'s' * (len(det) != 1)}" + (f": {some}" if some else "")


def _add(document: dict[str, list[Any]], path: Path, drawing: str, det: Detections, predictor: Predictor) -> None:
    """Add an image and its detections to the json."""
    from pycocotools import mask as coco_mask

    image_id = len(document["images"]) + 1
    height, width = det.image_size
    image = {"id": image_id, "file_name": path.as_posix(), "height": height, "width": width, "drawing": drawing}
    document["images"].append(image)
    entries = zip(det.classes.tolist(), detections_to_coco(image_id, det, predictor.category_ids))
    for number, (index, result) in enumerate(entries, len(document["annotations"]) + 1):
        mask = result.get("segmentation")
        area = float(coco_mask.area(mask)) if mask else result["bbox"][2] * result["bbox"][3]
        extra = {"category_name": predictor.class_names[index], "area": area, "iscrowd": 0}
        document["annotations"].append({"id": number, **result, **extra})
