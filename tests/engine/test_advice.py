"""Out of memory, divergence, half-GN models and short schedules: one sentence each, and none where all is well."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gn_det.config import load_config
from gn_det.engine.advice import half_gn, high_rate, large_crop, short_for_scratch
from gn_det.engine.scalars import Metrics
from gn_det.errors import TrainingError
from gn_det.modeling.census import CensusRow
from tests.engine.cases import Tiny, run


def test_rate_of_sgd_under_adamw() -> None:
    keys = {"SOLVER.OPTIMIZER": "ADAMW"}
    assert "SOLVER.BASE_LR 0.02 is a learning rate for SGD" in high_rate(load_config("gn_fpn.yaml", keys))
    assert high_rate(load_config("gn_fpn.yaml")) == ""
    assert high_rate(load_config("gn_fpn.yaml", {**keys, "SOLVER.BASE_LR": 0.0002})) == ""


def test_crop_larger_than_images() -> None:
    """Height and width against width and height; fractions always fit."""
    sizes = np.array([[100, 50], [60, 60], [200, 200]])
    keys = {"INPUT.CROP.ENABLED": True, "INPUT.CROP.TYPE": "absolute", "INPUT.CROP.SIZE": [55, 80]}
    text = large_crop(load_config("gn_fpn.yaml", keys), sizes)
    assert text.startswith("INPUT.CROP.SIZE [55, 80] (height, width) is larger than 2 of 3 images")
    assert large_crop(load_config("gn_fpn.yaml", {**keys, "INPUT.CROP.SIZE": [50, 60]}), sizes) == ""
    assert large_crop(load_config("gn_fpn.yaml", {"INPUT.CROP.ENABLED": True}), sizes) == ""


class Full(Tiny):
    """Has no memory left in the pass after ``passes`` ones."""

    def __init__(self, error: Exception, passes: int) -> None:
        super().__init__()
        self.error, self.left = error, passes

    def forward(self, samples: list[Any]) -> Any:
        self.left -= self.training
        if self.left < 0:
            raise self.error
        return super().forward(samples)


CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 11 GiB")
CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:117] err == 0. DefaultCPUAllocator: can't allocate memory")


@pytest.mark.parametrize("error", [CUDA, CPU, MemoryError()], ids=["cuda", "cpu", "python"])
def test_out_of_memory_says_what_to_lower_and_to_what(tmp_path: Path, error: Exception) -> None:
    """Batch 4 on one device: accumulation, autocast, size, each with the value to set; which batch it was."""
    with pytest.raises(TrainingError) as told:
        run(tmp_path, model=Full(error, 6))
    message = str(told.value)
    assert message.startswith("out of memory at iteration 6") and "\n" not in message
    assert ("Tried to allocate 2.50 GiB" in message) == (error is CUDA)
    for part in (
        "4 images padded to 6x6, with 0 objects",
        "set SOLVER.ACCUMULATE 2 (the same batch, 2 instead of 4 images",
        "SOLVER.AMP.ENABLED True",
        'INPUT.MIN_SIZE_TRAIN "(640,)" INPUT.MAX_SIZE_TRAIN 1066 (36% fewer pixels)',
        "continue with --resume",
    ):
        assert part in message, message
    run(tmp_path, ["SOLVER.ACCUMULATE", 2], resume=True)  # as the message says


def test_out_of_memory_while_evaluating(tmp_path: Path) -> None:
    def evaluate(model: Any, on_progress: Any) -> dict[str, float]:
        raise CUDA

    with pytest.raises(TrainingError, match=r"while evaluating: set INPUT.MIN_SIZE_TEST 640 INPUT.MAX_SIZE_TEST 1066"):
        run(tmp_path, ["TEST.EVAL_PERIOD", 4], evaluate=evaluate)


def test_other_errors_pass(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"^something else$"):
        run(tmp_path, model=Full(RuntimeError("something else"), 2))


def test_divergence_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    metrics = Metrics([])
    for iteration, median in enumerate((3.0, 1.0, 2.5, 2.9, 4.0, 9.0)):
        metrics.log.histories.clear()
        metrics.log.put({"total_loss": median}, iteration)
        metrics._look_for_divergence(iteration, 0.02)
        assert len(caplog.messages) == (iteration >= 4)
    (text,) = caplog.messages
    assert "risen to 4 at iteration 4, 4.0 times its lowest (1 at iteration 1)" in text
    assert "SOLVER.BASE_LR (now 0.02), lengthen SOLVER.WARMUP_ITERS or set SOLVER.CLIP_GRADIENTS.ENABLED True" in text


def test_divergence_in_a_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A model whose loss grows from iteration 40 on; the lowest value survives a resume."""

    class Grows(Tiny):
        steps = 0

        def forward(self, samples: list[Any]) -> Any:
            self.steps += 1
            return {k: v * 0 + (1.0 if self.steps <= 40 else 10.0) for k, v in super().forward(samples).items()}

    run(tmp_path / "well", max_iter=45, model=Tiny())
    assert "diverges" not in caplog.text
    model = Grows()
    run(tmp_path / "bad", max_iter=45, model=model)
    assert "diverges" not in caplog.text  # 5 of the last 20 iterations: the median has not noticed
    run(tmp_path / "bad", max_iter=90, model=model, resume=True)
    assert len(re.findall("total_loss has risen to 20 .* lowest \\(2 at iteration 19\\)", caplog.text)) == 1


def rows(**norms: str) -> list[CensusRow]:
    stages = {"stem": "GN", "res2": "GN", "fpn": "GN", "rpn": "none", "box head": "GN", "mask head": "GN"}
    stages |= {k.replace("_", " "): v for k, v in norms.items()}
    return [CensusRow(stage, norm, 1) for stage, norm in stages.items()]


def test_models_that_are_partly_gn() -> None:
    """A norm in the RPN is not missed; whole GN and no GN at all say nothing."""
    assert half_gn(rows()) == "" and half_gn(rows(rpn="GN")) == ""
    assert half_gn([CensusRow("stem", "FrozenBN", 1), CensusRow("fpn", "none", 0)]) == ""
    text = half_gn(rows(stem="FrozenBN", box_head="none"))
    assert "backbone: FrozenBN and GN, box head: none" in text
    assert "MODEL.RESNETS.NORM GN, MODEL.ROI_BOX_HEAD.NORM GN" in text and "MASK" not in text


def test_schedule_too_short_for_scratch() -> None:
    keys = [
        "DATASETS.TRAIN_JSON",
        "x.json",
        "DATASETS.TRAIN_IMAGES",
        "x",
        "SOLVER.IMS_PER_BATCH",
        "2",
        "SOLVER.MAX_ITER",
        "100",
    ]
    cfg = load_config("gn_fpn.yaml", [*keys, "MODEL.WEIGHTS", ""])
    assert "the run has 20.0 epochs" in short_for_scratch(cfg, 10) and "--epochs 36" in short_for_scratch(cfg, 10)
    assert short_for_scratch(cfg, 5) == "" and short_for_scratch(cfg, 0) == ""
    assert short_for_scratch(load_config("gn_fpn.yaml", [*keys, "MODEL.WEIGHTS", "w.pth"]), 10) == ""
    assert short_for_scratch(load_config("quickstart.yaml"), 600) == ""
