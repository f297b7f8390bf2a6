"""Fused GroupNorm + residual + ReLU: Triton kernels, torch operators, recomputation, and plain torch.

Importing this needs only torch; Triton is imported when a kernel is launched.
"""

from __future__ import annotations

from gn_det.kernels.dispatch import group_norm_act, takes_kernels
from gn_det.kernels.recompute import saving

__all__ = ["group_norm_act", "saving", "takes_kernels"]
