"""Configuration: Detectron2's YAML, keys and defaults, checked strictly."""

from __future__ import annotations

from gn_det.config.defaults import get_cfg
from gn_det.config.load import dump_config, load_config, parse_config, shipped_configs

__all__ = ["dump_config", "get_cfg", "load_config", "parse_config", "shipped_configs"]
