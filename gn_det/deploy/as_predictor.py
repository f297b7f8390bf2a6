"""Use an exported file like a model in ``gn-det predict``, without importing torch."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from gn_det.deploy.detector import Detector
from gn_det.files import StrPath
from gn_det.prediction.predictor import Predictor
from gn_det.structures import ArrayDetections


def as_predictor(
    path: StrPath, device: str = "auto", *, max_pixels: int | None = None, bit_depth: str | None = None
) -> Predictor:
    """Load an ONNX file of ``gn-det export``; see :class:`gn_det.deploy.Detector` for the errors.

    Args:
        device: a provider; "auto" is the CPU.
        max_pixels: larger images are refused; None takes the limit in the file.
        bit_depth: as INPUT.BIT_DEPTH; None takes that of the file.
    """
    detector = Detector(path, provider="cpu" if device == "auto" else device)
    reader = detector.metadata.reader()
    if max_pixels is not None:
        reader = replace(reader, max_pixels=max_pixels)
    if bit_depth is not None:
        reader = replace(reader, bit_depth=bit_depth)

    def sample(image: Path | np.ndarray) -> tuple[np.ndarray, str]:
        if isinstance(image, np.ndarray):
            return reader.from_array(image), "image"
        return reader.read(image), os.fspath(image)

    def infer(sample: tuple[np.ndarray, str]) -> ArrayDetections:
        return ArrayDetections(**detector.detect(*sample))

    return Predictor(
        sample,
        infer,
        detector.class_names,
        detector.category_ids,
        replace(reader, image_format="RGB"),
        thresholds=detector.metadata.thresholds,
        gray=detector.metadata.image_format == "L",
    )
