"""Lean memory: y = relu(norm(x)) is not kept for the layer that reads it, but made again from x in the backward pass.

Normally a norm keeps x, and the convolution behind it keeps y. In-place ABN gets rid of x by inverting the activation;
ReLU cannot be inverted, so here y goes instead (the checkpoint variant of that paper, arXiv 1712.02616). The maker of y
leaves a :class:`Recipe` on it; the reader wraps itself in :func:`saving`, which stores the recipe instead of y.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_ATTRIBUTE = "_gn_det_recipe"

Plain = Callable[[Tensor, Tensor, Tensor], Tensor]


class Recipe:
    """How to make one y again; holds x, and never y for longer than from its reader's backward to its maker's."""

    def __init__(self, make: Callable[[], Tensor]) -> None:
        self._make = make
        self._mark: tuple[int, int, torch.dtype, int] | None = None

    def leave_on(self, y: Tensor) -> Tensor:
        """Make ``y`` known to :func:`saving`; returns it."""
        self._mark = (y.data_ptr(), y.numel(), y.dtype, y._version)
        setattr(y, _ATTRIBUTE, self)
        return y

    def fits(self, t: Tensor) -> bool:
        """Whether ``t`` is that y, or a view of all of it, and nobody has changed it."""
        return (t.data_ptr(), t.numel(), t.dtype, t._version) == self._mark

    def y(self) -> Tensor:
        """The same values in the same layout."""
        return self._make()


def saving(y: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Around an operation that reads ``y``: what it would keep of ``y`` for its backward pass is made again instead."""
    recipe: Recipe | None = getattr(y, _ATTRIBUTE, None)
    if recipe is None or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return contextlib.nullcontext()
    found = recipe

    def pack(t: Tensor) -> Any:
        return (found, t.shape, t.stride(), t.storage_offset()) if found.fits(t) else t

    def unpack(kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        own, shape, stride, offset = kept
        made: Tensor = own.y().as_strided(shape, stride, offset)
        return made

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


class _Replay:
    """Runs ``plain`` again with gradients; y made for the reader is kept until the maker's backward has used it."""

    def __init__(self, plain: Plain, x: Tensor, weight: Tensor, bias: Tensor) -> None:
        self.plain = plain
        self.needs = [t.requires_grad for t in (x, weight, bias)]
        self.inputs = [t.detach() for t in (x, weight, bias)]
        kind = x.device.type
        self.autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        self.made: tuple[list[Tensor], Tensor] | None = None

    def run(self) -> tuple[list[Tensor], Tensor]:
        if self.made is None:
            kind, dtype, enabled = self.autocast
            with torch.enable_grad(), torch.autocast(kind, dtype=dtype, enabled=enabled):
                inputs = [t.detach().requires_grad_(need) for t, need in zip(self.inputs, self.needs)]
                self.made = inputs, self.plain(inputs[0], inputs[1], inputs[2])
        return self.made

    def y(self) -> Tensor:
        return self.run()[1].detach()

    def gradients(self, dy: Tensor) -> list[Tensor | None]:
        inputs, y = self.run()
        self.made = None
        wanted = [t for t, need in zip(inputs, self.needs) if need]
        found = iter(torch.autograd.grad(y, wanted, dy))
        return [next(found) if need else None for need in self.needs]


class _KeepInput(torch.autograd.Function):
    """``plain(x, weight, bias)`` that keeps its inputs only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, replay: _Replay) -> Tensor:
        ctx.replay = replay
        ctx.save_for_backward(x, weight, bias)  # they are in the replay, too; here torch checks and counts them
        return replay.plain(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors
        return (*ctx.replay.gradients(dy), None)


def keep_input(plain: Plain, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """``plain(x, weight, bias)``, whose result neither it nor a reader under :func:`saving` keeps.

    The backward pass runs ``plain`` once more and differentiates that: the same operations on the same numbers, so the
    gradients have the same bits. Statistics are computed again with it.
    """
    if not torch.is_grad_enabled() or not (x.requires_grad or weight.requires_grad or bias.requires_grad):
        return plain(x, weight, bias)
    replay = _Replay(plain, x, weight, bias)
    y: Tensor = _KeepInput.apply(x, weight, bias, replay)
    return Recipe(replay.y).leave_on(y)
