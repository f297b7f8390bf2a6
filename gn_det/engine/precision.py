"""Mixed precision and memory layout of a run: resolve ``auto``, and apply them to a model.

``auto`` depends only on CPU features and never on timing, so that it is the same on every start. It becomes True or
False before anything is built; config.yaml, checkpoints and the rows of a suite store the choice.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar

import torch
from fvcore.common.config import CfgNode
from torch import nn

from gn_det.compiler import cpu_features
from gn_det.config.defaults import edited, get_value
from gn_det.modeling.layers import fold_weights

logger = logging.getLogger(__name__)

#: CPU features for bf16; with none of them, torch emulates it more slowly than float32.
BF16_FEATURES = ("amx_bf16", "avx512_bf16", "bf16")  # two of x86, one of Arm
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
#: Keys that may be "auto".
AUTO = ("SOLVER.AMP.ENABLED", "TEST.AMP", "MODEL.CHANNELS_LAST")

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def chosen_by_auto(device: str) -> tuple[bool, str]:
    """Return whether ``auto`` enables bf16 and channels_last on ``device``, and why."""
    if not device.startswith("cpu"):
        return False, "no GPU has been measured yet"
    has = [feature for feature in BF16_FEATURES if feature in cpu_features()]
    return bool(has), f"this CPU has {has[0]}" if has else f"this CPU has none of {', '.join(BF16_FEATURES)}"


def settle(
    cfg: CfgNode, device: str, stored: Mapping[str, Any] | None = None, report: Callable[[str], None] = logger.info
) -> CfgNode:
    """Return ``cfg`` with True or False for every "auto"; warn if this CPU only emulates bf16.

    Args:
        device: resolved device, such as "cpu".
        stored: config of the checkpoint to resume, whose choice is kept.
        report: receives a line for each key that was "auto".
    """
    chosen, why = chosen_by_auto(device)
    for key in AUTO:
        if get_value(cfg, key) == "auto":
            old = get_value(stored, key)
            kept = isinstance(old, bool)
            cfg = edited(cfg, {key: old if kept else chosen})
            report(f"{key} auto: {get_value(cfg, key)} ({'as the checkpoint has it' if kept else why}).")
    if device.startswith("cpu") and (cfg.SOLVER.AMP.ENABLED or cfg.TEST.AMP) and not chosen and cpu_features():
        logger.warning("bf16 is emulated and slower than float32: %s.", why)
    return cfg


def lay_out(model: ModuleT, cfg: CfgNode) -> ModuleT:
    """Convert the weights of ``model`` to the layout of MODEL.CHANNELS_LAST, which activations then follow."""
    return model.to(memory_format=torch.channels_last) if cfg.MODEL.CHANNELS_LAST is True else model


def lay_out_for_inference(model: ModuleT, cfg: CfgNode, device: str) -> ModuleT:
    """:func:`lay_out`, and standardized weights folded: for a model that is neither trained nor saved.

    With TEST.AMP on a CPU, weights also become bf16 in channels_last. Autocast would cast those of convolutions and
    linear layers at every image, to the same values.
    """
    fold_weights(model)
    if cfg.TEST.AMP is not True or not device.startswith("cpu"):
        return lay_out(model, cfg)
    for layer in model.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            for parameter in (layer.weight, layer.bias):
                if parameter is not None:
                    parameter.data = parameter.data.to(torch.bfloat16)
    return model.to(memory_format=torch.channels_last)


def inference_autocast(cfg: CfgNode, device: str) -> AbstractContextManager[Any]:
    """Return the autocast for evaluation and prediction; without TEST.AMP, that of the caller, if any, stays."""
    if cfg.TEST.AMP is not True:
        return nullcontext()
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16 if kind == "cpu" else DTYPES[cfg.SOLVER.AMP.DTYPE])
