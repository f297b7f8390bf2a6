"""Fused GroupNorm + residual + ReLU: Triton kernels, torch operators, lean memory, and the plain way.

Importing this needs torch alone; Triton is imported when a kernel is launched.
"""

from __future__ import annotations

from gn_det.kernels.dispatch import group_norm_act, takes_kernels
from gn_det.kernels.recompute import saving

__all__ = ["group_norm_act", "saving", "takes_kernels"]
