"""Norm census: which norm sits where, with how many groups, and what of it trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from gn_det.norm import FrozenBatchNorm2d, GroupNorm, GroupRule

#: (stage, prefixes of module names), in the order of the table; the first match wins.
_STAGES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("stem", ("backbone.stem", "backbone.bottom_up.stem")),
    ("res2", ("backbone.res2", "backbone.bottom_up.res2")),
    ("res3", ("backbone.res3", "backbone.bottom_up.res3")),
    ("res4", ("backbone.res4", "backbone.bottom_up.res4")),
    ("res5", ("backbone.res5", "backbone.bottom_up.res5")),
    ("fpn", ("backbone.fpn_",)),
    ("rpn", ("proposal_generator",)),
    ("res5 head", ("roi_heads.res5",)),
    ("box head", ("roi_heads.box_head",)),
    ("mask head", ("roi_heads.mask_head",)),
)
_BACKBONE = ("stem", "res2", "res3", "res4", "res5")


@dataclass(frozen=True)
class CensusRow:
    """Norm layers of one kind in one stage.

    Attributes:
        stage: "stem", "res2" .. "res5", "fpn", "rpn", "res5 head", "box head" or "mask head".
        norm: "GN", "LN", "IN", "BN", "SyncBN", "FrozenBN", another class's name, or "none"; "GN+WS" where the
            convolutions before it have standardized weights.
        layers: number of norm layers.
        groups: numbers of groups that occur, increasing; empty where the norm has none.
        trainable: gamma and beta tensors that train.
        frozen: gamma and beta tensors that do not (buffers of FrozenBN included).
    """

    stage: str
    norm: str
    layers: int
    groups: tuple[int, ...] = ()
    trainable: int = 0
    frozen: int = 0


def norm_name(module: nn.Module) -> str | None:
    """The name under which a config asks for ``module``; its class name if it looks like a norm; None if not."""
    if isinstance(module, GroupNorm):
        return module.kind
    if isinstance(module, nn.GroupNorm):
        return "GN"
    if isinstance(module, nn.SyncBatchNorm):
        return "SyncBN"
    if isinstance(module, nn.BatchNorm2d):
        return "BN"
    name = type(module).__name__
    if isinstance(module, FrozenBatchNorm2d) or name == "FrozenBatchNorm2d":  # Detectron2's class has this name, too
        return "FrozenBN"
    return name if name.endswith("Norm") and name != "ConvNorm" else None


def norm_census(model: nn.Module) -> list[CensusRow]:
    """Rows per stage and kind of norm, in the order of the forward pass; stages that exist without norm say "none"."""
    found: dict[tuple[str, str], list[nn.Module]] = {}
    stages: set[str] = set()
    standardized: set[nn.Module] = set()
    for name, module in model.named_modules():
        stage = next((s for s, prefixes in _STAGES if name.startswith(prefixes)), None)
        if stage is None:
            continue
        stages.add(stage)
        if getattr(module, "ws", "") and isinstance(norm := getattr(module, "norm", None), nn.Module):
            standardized.add(norm)
        kind = norm_name(module)
        if kind is not None:
            kind += "+WS" if module in standardized else ""
            found.setdefault((stage, kind), []).append(module)
    rows = []
    for stage, _ in _STAGES:
        kinds = [kind for s, kind in found if s == stage]
        rows += [_row(stage, kind, found[stage, kind]) for kind in kinds]
        if stage in stages and not kinds:
            rows.append(CensusRow(stage, "none", 0))
    return rows


def norms_off_rule(model: nn.Module, rule: GroupRule) -> dict[str, list[str]]:
    """Names of group norms whose groups or eps are not those of ``rule``, by what they have instead.

    Detectron2's own "LN", over channels alone, counts among them; LN, IN and other norms of gn_det do not.
    """
    found: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        what = ""
        if isinstance(module, nn.GroupNorm) and norm_name(module) == "GN":
            groups, channels = module.num_groups, module.num_channels
            divisor = rule.channels_per_group or rule.num_groups
            wanted = channels // divisor if rule.channels_per_group else divisor
            if channels % divisor or groups != wanted:
                what = f"{groups} groups"
            elif module.eps != rule.eps:
                what = f"eps {module.eps:g}"
        elif type(module).__name__ == "LayerNorm" and type(module).__module__.startswith("detectron2."):
            what = "LN over channels alone"
        if what:
            found.setdefault(what, []).append(name)
    return found


def _row(stage: str, kind: str, modules: Sequence[nn.Module]) -> CensusRow:
    trainable = frozen = 0
    for module in modules:
        for name in ("weight", "bias"):
            tensor = getattr(module, name, None)
            if tensor is not None:
                trainable += bool(tensor.requires_grad)
                frozen += not tensor.requires_grad
    groups = {m.num_groups for m in modules if isinstance(m, nn.GroupNorm)}
    return CensusRow(stage, kind, len(modules), tuple(sorted(groups)), trainable, frozen)


def sum_census(rows: Sequence[CensusRow]) -> str:
    """Return the number of norm layers of each kind in each part, in one line."""
    parts: dict[str, dict[str, int]] = {}
    for row in rows:
        if row.layers:
            kinds = parts.setdefault("backbone" if row.stage in _BACKBONE else row.stage, {})
            kinds[row.norm] = kinds.get(row.norm, 0) + row.layers
    return " + ".join(f"{n} {kind} in {part}" for part, kinds in parts.items() for kind, n in kinds.items()) or "none"


def frozen_by(cfg: Any) -> str:
    """Name the keys that freeze parts of a model: MODEL.BACKBONE.FREEZE_AT, MODEL.FREEZE, or both."""
    at, parts = int(cfg.MODEL.BACKBONE.FREEZE_AT), cfg.MODEL.get("FREEZE", ())
    keys = ["MODEL.BACKBONE.FREEZE_AT"] if at or not parts else []
    return " and ".join([*keys, f"MODEL.FREEZE ({', '.join(parts)})"] if parts else keys)


def format_census(rows: Sequence[CensusRow], frozen_by: str = "MODEL.BACKBONE.FREEZE_AT") -> str:
    """Return the rows as a table, and a last line with the sums per part.

    Args:
        frozen_by: keys that froze gamma and beta, see the function of this name.
    """
    lines = [f"{'stage':<10} {'norm':<9} {'layers':>6}  {'groups':<12} gamma/beta tensors"]
    for row in rows:
        groups = ", ".join(map(str, row.groups)) or "-"
        state = [f"{n} {what}" for n, what in ((row.trainable, "trainable"), (row.frozen, "frozen")) if n]
        lines.append(f"{row.stage:<10} {row.norm:<9} {row.layers:>6}  {groups:<12} {', '.join(state) or '-'}")
    trainable, frozen = sum(r.trainable for r in rows), sum(r.frozen for r in rows)
    total = f"{trainable + frozen} gamma/beta tensors: {trainable} trainable, {frozen} frozen"
    as_frozen_bn = sum(r.frozen for r in rows if r.norm.startswith("FrozenBN"))
    reasons = ((as_frozen_bn, "as FrozenBN"), (frozen - as_frozen_bn, f"by {frozen_by}"))
    if frozen:
        total += f" ({', '.join(f'{n} {why}' for n, why in reasons if n)})"
    lines.append(f"total: {sum_census(rows)}; {total}")
    return "\n".join(lines)
