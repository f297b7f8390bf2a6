"""Normalization layers by name, and the rule that decides the number of groups.

GN is Group Normalization of Wu and He (ECCV 2018): channels are split into groups, mean and variance are taken over
(channels of a group, H, W) of each sample. LN (one group) and IN (one channel per group) are its two ends, with the
same per-channel gamma and beta.

Shape letters: N samples (images or RoIs), C channels, H, W rows and columns.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gn_det.errors import ConfigError
from gn_det.kernels import group_norm_act, takes_kernels

#: torch does not export it for type checkers; a comment in a method would be read by TorchScript.
is_scripting = torch.jit.is_scripting  # type: ignore[attr-defined, unused-ignore]

NORM_NAMES = ("GN", "LN", "IN", "BN", "SyncBN", "FrozenBN", "")

#: A norm: a name with Detectron2's defaults, a callable ``num_channels -> module``, or None or "" for no norm.
NormSpec = str | Callable[[int], nn.Module] | None


class BadGroups(ConfigError):
    """The groups of GN do not divide the channels of a layer.

    Attributes:
        problem: the numbers.
        key: key of MODEL.GN to change.
        works: values of it that work, separated by commas.
    """

    def __init__(self, problem: str, key: str, works: str, where: str) -> None:
        super().__init__(problem, key, works, where)
        self.problem, self.key, self.works, self.where = problem, key, works, where

    def __str__(self) -> str:
        return f"{self.where}: {self.problem}; set MODEL.GN.{self.key} to one of {self.works}"


@dataclass(frozen=True)
class GroupRule:
    """How many groups a GN layer of C channels gets, and how it is computed.

    Attributes:
        num_groups: groups of every layer, used while ``channels_per_group`` is 0.
        channels_per_group: if positive, a layer of C channels gets C / channels_per_group groups instead.
        eps: added to the variance; LN and IN use it too.
        fused, recompute: see :func:`gn_det.kernels.group_norm_act`. They change no result, so rules that differ only
            here are equal.
    """

    num_groups: int = 32
    channels_per_group: int = 0
    eps: float = 1e-5
    fused: str = field(default="auto", compare=False)
    recompute: bool = field(default=False, compare=False)

    def groups(self, num_channels: int, where: str = "GN") -> int:
        """Number of groups for ``num_channels`` channels.

        Raises:
            BadGroups: the groups would differ in size.
        """
        by_channels = self.channels_per_group > 0
        divisor = self.channels_per_group if by_channels else self.num_groups
        if divisor > 0 and num_channels % divisor == 0:
            return num_channels // divisor if by_channels else divisor
        works = ", ".join(str(d) for d in range(1, num_channels + 1) if num_channels % d == 0)
        what = f"groups of {divisor} channels" if by_channels else f"{divisor} groups"
        raise BadGroups(
            f"{what} do not divide a layer of {num_channels} channels",
            "CHANNELS_PER_GROUP" if by_channels else "NUM_GROUPS",
            works,
            where,
        )


class GroupNorm(nn.GroupNorm):
    """``nn.GroupNorm`` that records whether it is GN, LN or IN, and accepts inputs with 0 samples.

    It stays a subclass of ``nn.GroupNorm`` because weight-decay rules (Detectron2's WEIGHT_DECAY_NORM and ours) find
    gamma and beta by module class.

    Args:
        num_groups: groups; must divide ``num_channels``.
        num_channels: C.
        eps: added to the variance.
        kind: "GN", "LN" or "IN"; only shown (census, repr).
        fused, recompute: see :func:`gn_det.kernels.group_norm_act`.
    """

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        *,
        kind: str = "GN",
        fused: str = "auto",
        recompute: bool = False,
    ) -> None:
        super().__init__(num_groups, num_channels, eps=eps, affine=True)
        self.kind = kind
        self.fused = fused
        self.recompute = recompute

    def forward(self, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
        """Normalize ``x`` (N, C, ...), add ``residual``, and apply a ReLU if asked to.

        N may be 0; gamma and beta then get zero gradients.
        """
        if not is_scripting():
            return group_norm_act(
                x,
                self.num_groups,
                self.weight,
                self.bias,
                self.eps,
                residual,
                "relu" if relu else "none",
                fused=self.fused,
                recompute=self.recompute,
            )
        x = F.group_norm(x, self.num_groups, self.weight, self.bias, self.eps)
        if residual is not None:
            x += residual
        return F.relu_(x) if relu else x

    def takes_over(self, x: Tensor) -> bool:
        """Whether this layer should be given the add and the ReLU that follow it."""
        return self.recompute or takes_kernels(x, self.fused)

    def extra_repr(self) -> str:
        return f"{self.num_groups}, {self.num_channels}, eps={self.eps}, kind={self.kind}"


class FrozenBatchNorm2d(nn.Module):
    """BatchNorm as a fixed affine map: statistics, gamma and beta are buffers, never trained.

    Buffer names and defaults are Detectron2's: ``weight`` 1, ``bias`` 0, ``running_mean`` 0,
    ``running_var`` 1 - eps, so that a fresh layer is the identity. ``num_batches_tracked`` exists only in a layer
    converted from BatchNorm.

    Args:
        num_features: C.
        eps: added to the variance.
    """

    _version = 3
    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor | None

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps
        self.register_buffer("weight", torch.ones(num_features))
        self.register_buffer("bias", torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features) - eps)
        self.register_buffer("num_batches_tracked", None)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to the same shape and dtype."""
        if not x.requires_grad:
            return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
        # batch_norm's backward would keep x and compute gradients of gamma and beta; this form needs neither.
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.view(1, -1, 1, 1).to(x.dtype) + shift.view(1, -1, 1, 1).to(x.dtype)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, *args: Any) -> None:
        version = local_metadata.get("version", None)
        if version is None or version < 2:
            # Caffe2 weights carry gamma and beta with the statistics folded in.
            state_dict.setdefault(prefix + "running_mean", torch.zeros_like(self.running_mean))
            state_dict.setdefault(prefix + "running_var", torch.ones_like(self.running_var))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}"

    @classmethod
    def from_batch_norm(cls, bn: nn.BatchNorm2d | nn.SyncBatchNorm) -> FrozenBatchNorm2d:
        """A frozen layer with the statistics, gamma and beta of ``bn``."""
        frozen = cls(bn.num_features, bn.eps)
        if bn.affine:
            frozen.weight = bn.weight.detach().clone()
            frozen.bias = bn.bias.detach().clone()
        frozen.running_mean = bn.get_buffer("running_mean")
        frozen.running_var = bn.get_buffer("running_var")
        frozen.num_batches_tracked = bn.num_batches_tracked
        return frozen


def freeze_batch_norm(module: nn.Module) -> nn.Module:
    """Replace every BatchNorm below ``module`` in place by :class:`FrozenBatchNorm2d`; GN, LN and IN stay.

    Returns ``module``, or the replacement when it is itself a BatchNorm.
    """
    if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)):
        return FrozenBatchNorm2d.from_batch_norm(module)
    for name, child in module.named_children():
        replacement = freeze_batch_norm(child)
        if replacement is not child:
            module.add_module(name, replacement)
    return module


def norm_act(norm: nn.Module | None, x: Tensor, residual: Tensor | None = None, relu: bool = False) -> Tensor:
    """``relu(norm(x) + residual)``, each of the three left out where it is None or False.

    ``x`` and what the norm returns may be overwritten: neither norms nor convolutions need their own output.
    """
    if isinstance(norm, GroupNorm) and (relu or residual is not None) and norm.takes_over(x):
        y: Tensor = norm(x, residual, relu)
        return y
    if norm is not None:
        x = norm(x)
    if residual is not None:
        x += residual
    return F.relu_(x) if relu else x


@dataclass(frozen=True)
class NormFactory:
    """Build norm layers of one kind: ``factory(num_channels) -> module``, what every constructor takes as ``norm``.

    Attributes:
        kind: one of :data:`NORM_NAMES` except "".
        rule: groups of GN, and the eps of GN, LN and IN.
        key: config key that chose the norm, for messages.
        ws: standardize the weights of the convolutions before these norms, by one of
            :data:`gn_det.kernels.weight_standardization.FORMULAS`; "" for none.
    """

    kind: str
    rule: GroupRule = GroupRule()
    key: str = "norm"
    ws: str = ""

    def __call__(self, num_channels: int) -> nn.Module:
        """A fresh norm of ``num_channels`` channels.

        Raises:
            BadGroups: the groups do not divide the channels.
            ConfigError: unknown kind.
        """
        if self.kind in _BATCH_NORMS:
            return _BATCH_NORMS[self.kind](num_channels)
        if self.kind not in ("GN", "LN", "IN"):
            raise ConfigError(f"{self.key}: unknown norm {self.kind!r}; use one of {', '.join(map(repr, NORM_NAMES))}")
        if self.kind == "GN":
            groups = self.rule.groups(num_channels, f"{self.key} GN")
        else:
            groups = 1 if self.kind == "LN" else num_channels
        rule = self.rule
        return GroupNorm(groups, num_channels, rule.eps, kind=self.kind, fused=rule.fused, recompute=rule.recompute)


def get_norm(norm: NormSpec, num_channels: int) -> nn.Module | None:
    """The norm layer that ``norm`` asks for, None where it asks for none; see :class:`NormFactory`."""
    if norm is None or norm == "":
        return None
    return (NormFactory(norm) if isinstance(norm, str) else norm)(num_channels)


def norm_with_groups(norm: NormSpec, groups: GroupRule | None) -> NormSpec:
    """``norm`` with ``groups``, which used to be a keyword of its own; now ``NormFactory(norm, groups)`` says both."""
    if groups is None or not isinstance(norm, str) or not norm:
        return norm
    warnings.warn("groups= is deprecated: pass norm=NormFactory(kind, groups)", DeprecationWarning, stacklevel=3)
    return NormFactory(norm, groups)


_BATCH_NORMS: dict[str, Callable[[int], nn.Module]] = {
    "BN": nn.BatchNorm2d,
    "SyncBN": nn.SyncBatchNorm,
    "FrozenBN": FrozenBatchNorm2d,
}
