"""Fused GroupNorm + residual + ReLU: Triton kernels, C++ for CPUs, torch operators, recomputation, and plain torch.

Importing this needs only torch; Triton is imported, and C++ compiled, when a kernel is first launched.
"""

from __future__ import annotations

from gn_det.kernels.dispatch import group_norm_act, takes_kernels, takes_native_roi_align
from gn_det.kernels.recompute import saving

__all__ = ["group_norm_act", "saving", "takes_kernels", "takes_native_roi_align"]
