"""Detectors outside of Python's torch: export to ONNX and torch.export, and prediction with onnxruntime alone."""

from __future__ import annotations

from gn_det.deploy.detector import Detector

__all__ = ["Detector"]
