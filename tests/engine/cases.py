"""Schedules and a stand-in model shared by the tests of training and of the comparison with Detectron2."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gn_det.config import get_cfg

#: Overrides by name; small enough to compare every iteration.
SCHEDULES: dict[str, list[Any]] = {
    "multistep": ["SOLVER.MAX_ITER", 90, "SOLVER.STEPS", (60, 80), "SOLVER.WARMUP_ITERS", 10],
    "multistep_constant_warmup": [
        "SOLVER.MAX_ITER", 90, "SOLVER.STEPS", (60, 80), "SOLVER.WARMUP_ITERS", 10, "SOLVER.WARMUP_METHOD", "constant",
    ],
    "steps_beyond_the_end": ["SOLVER.MAX_ITER", 50, "SOLVER.STEPS", (30, 80), "SOLVER.WARMUP_ITERS", 7],
    "no_steps_no_warmup": ["SOLVER.MAX_ITER", 40, "SOLVER.STEPS", (), "SOLVER.WARMUP_ITERS", 0],
    "warmup_over_a_step": ["SOLVER.MAX_ITER", 60, "SOLVER.STEPS", (10, 40), "SOLVER.WARMUP_ITERS", 25],
    "warmup_longer_than_run": ["SOLVER.MAX_ITER", 20, "SOLVER.STEPS", (15,), "SOLVER.WARMUP_ITERS", 100],
    "rescaled": [
        "SOLVER.MAX_ITER", 90, "SOLVER.STEPS", (60, 80), "SOLVER.WARMUP_ITERS", 10, "SOLVER.RESCALE_INTERVAL", True,
    ],
    "cosine": ["SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", "SOLVER.MAX_ITER", 73, "SOLVER.WARMUP_ITERS", 9],
    "cosine_end": [
        "SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR", "SOLVER.MAX_ITER", 73, "SOLVER.WARMUP_ITERS", 9,
        "SOLVER.BASE_LR", 0.02, "SOLVER.BASE_LR_END", 0.001, "SOLVER.RESCALE_INTERVAL", True,
    ],
    "fixed_gamma": [
        "SOLVER.LR_SCHEDULER_NAME", "WarmupStepWithFixedGammaLR", "SOLVER.MAX_ITER", 80, "SOLVER.WARMUP_ITERS", 5,
        "SOLVER.NUM_DECAYS", 3, "SOLVER.GAMMA", 0.5,
    ],
    "paper_long_scaled_down": [
        "SOLVER.MAX_ITER", 270, "SOLVER.STEPS", (210, 250), "SOLVER.BASE_LR", 0.02, "SOLVER.BIAS_LR_FACTOR", 2.0,
    ],
}  # fmt: skip


class MyGroupNorm(nn.GroupNorm):
    """A subclass, as gn_det.norm's: it must be found by class."""


class Tiny(nn.Module):
    """Convolution, a GroupNorm subclass, frozen BatchNorm, LayerNorm and a linear layer; losses like a detector's."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.gn = MyGroupNorm(2, 8)
        self.bn = nn.BatchNorm2d(8)
        self.bn.weight.requires_grad_(False)
        self.bn.bias.requires_grad_(False)
        self.fc = nn.Linear(8, 8)
        self.ln = nn.LayerNorm(8)
        self.dropout = dropout

    @property
    def device(self) -> torch.device:
        return self.fc.weight.device

    def features(self, x: Tensor) -> Tensor:
        x = self.bn(self.gn(self.conv(x)).relu()).mean((2, 3))
        return self.ln(self.fc(x))

    def forward(self, samples: list[Any]) -> Any:
        x = torch.stack([s["image"] for s in samples]).to(self.device).float() / 255
        y = self.features(x)
        if not self.training:
            return [float(v.sum()) for v in y]
        # torch's generator takes part, as RPN sampling does in the real model
        keep = torch.rand_like(y) > 0.3
        return {"loss_cls": (y * keep).pow(2).mean(), "loss_box_reg": (y - 1).abs().mean()}

    def pop_metrics(self) -> dict[str, float]:
        return {"roi_head/num_fg_samples": 1.0}


def tiny_cfg(folder: Path, overrides: list[Any] | None = None, *, max_iter: int = 12) -> Any:
    """A config for :class:`Tiny` on the CPU, 4 images a step."""
    cfg = get_cfg()
    cfg.OUTPUT_DIR = str(folder)
    cfg.MODEL.DEVICE = "cpu"
    cfg.SOLVER.MAX_ITER = max_iter
    cfg.SOLVER.STEPS = (8,)
    cfg.SOLVER.WARMUP_ITERS = 3
    cfg.SOLVER.BASE_LR = 0.05
    cfg.SOLVER.IMS_PER_BATCH = 4
    cfg.SOLVER.CHECKPOINT_PERIOD = 5
    cfg.merge_from_list(overrides or [])
    return cfg


def batch(seed: int, number: int, images: int, rank: int = 0, world: int = 1) -> list[dict[str, Any]]:
    """Samples of global batch ``number`` that belong to ``rank``; image i depends on (seed, its position) alone."""
    out = []
    for i in range(images):
        position = (number * world + rank) * images + i
        g = torch.Generator().manual_seed(seed * 1_000_003 + position)
        image = torch.randint(0, 256, (3, 6, 6), generator=g, dtype=torch.uint8)
        out.append({"image": image, "image_id": position})
    return out


def loader_factory(images: int, rank: int = 0, world: int = 1) -> Callable[[int, int], Iterator[Any]]:
    def make(start_batch: int, seed: int) -> Iterator[Any]:
        number = start_batch
        while True:
            yield batch(seed, number, images, rank, world)
            number += 1

    return make


def run(
    folder: Path,
    overrides: list[Any] | None = None,
    *,
    max_iter: int = 12,
    model: nn.Module | None = None,
    evaluate: Any = None,
    resume: bool = False,
    make_loader: Any = None,
    hooks: Any = (),
    seed: int = 7,
) -> dict[str, float]:
    """:func:`gn_det.engine.detector_loop.fit` on the stand-ins; returns its results."""
    from gn_det.engine.detector_loop import fit
    from gn_det.engine.engines import Engine
    from gn_det.engine.state import ModelMeta, find_resume, seed_everything

    cfg = tiny_cfg(folder, overrides, max_iter=max_iter)
    folder.mkdir(parents=True, exist_ok=True)
    point = find_resume(folder) if resume else None
    seed_everything(seed)
    model = Tiny() if model is None else model
    if resume:
        torch.manual_seed(12345)  # whatever happened before must not matter
    return fit(
        Engine(),
        cfg,
        model=model,
        make_loader=make_loader or loader_factory(cfg.SOLVER.IMS_PER_BATCH // cfg.SOLVER.ACCUMULATE),
        meta=ModelMeta(cfg, ("thing",), (1,)),
        seed=seed,
        evaluate=evaluate,
        resume=point,
        hooks=hooks,
    )
