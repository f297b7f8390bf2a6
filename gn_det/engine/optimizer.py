"""SGD and AdamW, with parameter groups as Detectron2's ``get_default_optimizer_params`` forms them.

Parameters of a *module* in :data:`NORM_MODULES` (subclasses included) get ``SOLVER.WEIGHT_DECAY_NORM``. A parameter
*named* ``bias`` then takes ``SOLVER.WEIGHT_DECAY_BIAS`` and ``SOLVER.BIAS_LR_FACTOR`` where they are set, the beta of a
norm layer included. ``SOLVER.BACKBONE_LR_FACTOR`` multiplies the rate of parameters below ``backbone``, which is what
Detectron2's ``lr_factor_func`` is for.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from fvcore.common.config import CfgNode
from torch import nn

from gn_det.errors import ConfigError
from gn_det.modeling.census import frozen_by
from gn_det.text import count

#: Module classes whose parameters count as gamma and beta; the first is the base of all batch and instance norms.
NORM_MODULES: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
)


def _own_parameters(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """(module, full parameter name, parameter), each parameter once, in module order."""
    seen: set[nn.Parameter] = set()
    for prefix, module in model.named_modules():
        for name, param in module.named_parameters(recurse=False):
            if param not in seen:
                seen.add(param)
                yield module, f"{prefix}.{name}", param


def _hyperparameters(cfg: CfgNode, module: nn.Module, name: str) -> dict[str, float]:
    """Return the explicit settings of a parameter's group; a missing weight decay is the optimizer's default."""
    solver = cfg.SOLVER
    explicit = {"lr": float(solver.BASE_LR)}
    if isinstance(module, NORM_MODULES) and solver.WEIGHT_DECAY_NORM is not None:
        explicit["weight_decay"] = float(solver.WEIGHT_DECAY_NORM)
    if name.endswith(".bias"):
        if solver.BIAS_LR_FACTOR is not None and solver.BIAS_LR_FACTOR != 1.0:
            explicit["lr"] = float(solver.BASE_LR) * float(solver.BIAS_LR_FACTOR)
        if solver.WEIGHT_DECAY_BIAS is not None:
            explicit["weight_decay"] = float(solver.WEIGHT_DECAY_BIAS)
    if name.startswith("backbone."):
        explicit["lr"] *= float(solver.BACKBONE_LR_FACTOR)
    return explicit


def optimizer_groups(cfg: CfgNode, model: nn.Module) -> list[dict[str, Any]]:
    """Parameter groups of what requires a gradient, one for each distinct set of hyperparameters.

    Their order is Detectron2's, so that a momentum buffer has the same index in both.
    """
    merged: dict[tuple[tuple[str, float], ...], list[nn.Parameter]] = {}
    for module, name, param in _own_parameters(model):
        if param.requires_grad:
            merged.setdefault(tuple(_hyperparameters(cfg, module, name).items()), []).append(param)
    return [{**dict(key), "params": params} for key, params in merged.items()]


def check_trainable(model: nn.Module) -> None:
    """Raise ConfigError for a model of which every parameter is frozen."""
    if not any(p.requires_grad for p in model.parameters()):
        raise ConfigError(
            "every parameter of the model is frozen; lower MODEL.BACKBONE.FREEZE_AT or shorten MODEL.FREEZE"
        )


def build_optimizer(cfg: CfgNode, model: nn.Module) -> torch.optim.SGD | torch.optim.AdamW:
    """Build SOLVER.OPTIMIZER over :func:`optimizer_groups`; raise ConfigError if every parameter is frozen."""
    check_trainable(model)
    groups, solver = optimizer_groups(cfg, model), cfg.SOLVER
    common = {"lr": solver.BASE_LR, "weight_decay": solver.WEIGHT_DECAY, "foreach": True}
    if solver.OPTIMIZER == "ADAMW":
        return torch.optim.AdamW(groups, betas=tuple(solver.BETAS), **common)
    return torch.optim.SGD(groups, momentum=solver.MOMENTUM, nesterov=solver.NESTEROV, **common)


def clip_gradients(cfg: CfgNode, parameters: Iterable[nn.Parameter]) -> None:
    """Clip gradients in place as ``SOLVER.CLIP_GRADIENTS`` says.

    ``value`` and ``norm`` treat every parameter tensor alone, as Detectron2 does; ``full_model`` clips the norm over
    all of them together.
    """
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if clip.CLIP_TYPE == "full_model":
        nn.utils.clip_grad_norm_(parameters, clip.CLIP_VALUE, clip.NORM_TYPE)
        return
    for param in (p for p in parameters if p.grad is not None):
        if clip.CLIP_TYPE == "value":
            nn.utils.clip_grad_value_(param, clip.CLIP_VALUE)
        else:
            nn.utils.clip_grad_norm_(param, clip.CLIP_VALUE, clip.NORM_TYPE)


def format_groups(cfg: CfgNode, model: nn.Module) -> tuple[str, str]:
    """Return a table of parameter tensors by kind and hyperparameters, and its last line, about gamma and beta."""
    kinds = ("gamma/beta", "bias", "weight")
    counts: dict[tuple[int, float | None, float | None], list[int]] = {}  # (kind, lr, decay): elements of each tensor
    for module, name, param in _own_parameters(model):
        kind = 0 if isinstance(module, NORM_MODULES) else 1 if name.endswith(".bias") else 2
        lr = decay = None  # frozen
        if param.requires_grad:
            explicit = _hyperparameters(cfg, module, name)
            lr, decay = explicit["lr"], explicit.get("weight_decay", float(cfg.SOLVER.WEIGHT_DECAY))
        counts.setdefault((kind, lr, decay), []).append(param.numel())
    lines = ["Optimizer groups", f"  {'kind':<12}{'tensors':>8}{'parameters':>13}{'lr':>10}{'weight decay':>14}"]
    norms: dict[str, int] = {}  # what happens to gamma and beta: number of tensors
    for kind, lr, decay in sorted(counts, key=lambda k: (k[1] is None, k[0], -(k[2] or 0.0))):
        sizes = counts[kind, lr, decay]
        rate, factor = ("frozen", "-") if lr is None else (f"{lr:g}", f"{decay:g}")
        lines.append(f"  {kinds[kind]:<12}{len(sizes):>8}{sum(sizes):>13,}{rate:>10}{factor:>14}")
        if kind == 0:
            how = f"frozen by {frozen_by(cfg)}" if lr is None else f"trained with weight decay {factor}"
            norms[how] = norms.get(how, 0) + len(sizes)
    total, parts = sum(norms.values()), ", ".join(f"{number} {how}" for how, number in norms.items())
    sentence = f"{count(total, 'gamma/beta tensor')}{': ' if norms else ''}{parts}."
    return "\n".join([*lines, f"  {sentence}"]), sentence
