"""An exported file in the place of a model, for ``gn-det predict``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from gn_det.deploy.detector import Detector
from gn_det.files import StrPath
from gn_det.prediction.predictor import Predictor
from gn_det.structures import Detections, Sample


def as_predictor(path: StrPath, device: str = "auto") -> Predictor:
    """Load an ONNX file; ``device`` names a provider, "auto" is the CPU.

    Raises:
        UserError: see :class:`gn_det.deploy.Detector`.
    """
    detector = Detector(path, provider="cpu" if device == "auto" else device)
    reader = detector.metadata.reader()

    def sample(image: Path | np.ndarray) -> Sample:
        pixels = reader.from_array(image) if isinstance(image, np.ndarray) else reader.read(image)
        return Sample(image=torch.from_numpy(np.array(pixels)))

    def infer(sample: Sample) -> Detections:
        found = detector.detect(sample["image"].numpy())
        boxes, scores, classes = (torch.from_numpy(found[name]) for name in ("boxes", "scores", "classes"))
        masks = None if found["masks"] is None else torch.from_numpy(found["masks"])
        return Detections(found["image_size"], boxes, scores, classes, masks)

    return Predictor(sample, infer, detector.class_names, detector.category_ids, detector.metadata.reader("RGB"))
