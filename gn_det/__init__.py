"""gn_det: fine-tune Mask R-CNN with Group Normalization."""

from __future__ import annotations

import os

__version__ = "0.1.0"

__all__ = ["__version__", "config_file"]


def config_file(name: str) -> str:
    """Absolute path of a shipped config, such as ``"gn_fpn_long.yaml"``.

    Raises:
        ConfigError: no shipped config has that name; the message lists those that exist.
    """
    from gn_det.config.load import shipped_config

    return os.fspath(shipped_config(name))
