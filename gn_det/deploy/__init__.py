"""Export detectors to ONNX and torch.export, and predict with onnxruntime alone."""

from __future__ import annotations

from gn_det.deploy.detector import Detector

__all__ = ["Detector"]
