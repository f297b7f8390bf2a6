"""On a GPU: autocast with loss scaling, and its state across an interruption."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gn_det.checkpoint.io import read_checkpoint
from gn_det.classification import classifier_loop, pretrain
from tests.classification.test_run import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
def test_gpu_trains_like_the_cpu(tmp_path: Path, amp: str) -> None:
    """The first epoch's mean loss: within 1e-3 in float32, 5 % with 8 to 11 bits of mantissa."""
    cpu = pretrain(tiny(tmp_path / "cpu", epochs=1))
    gpu = pretrain(replace(tiny(tmp_path / "gpu", epochs=1), device="cuda", amp=amp))
    tolerance = 1e-3 if amp == "off" else 0.05
    assert gpu["curve"][0]["train_loss"] == pytest.approx(cpu["curve"][0]["train_loss"], rel=tolerance)
    assert gpu["machine"]["device"].startswith("cuda") and gpu["peak_memory_mb"] > 0


def test_interrupted_fp16_run_keeps_its_loss_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = replace(tiny(tmp_path), device="cuda", amp="fp16")
    original, calls = classifier_loop.validate, []

    def stop(*arguments: Any) -> dict[str, float]:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(classifier_loop, "validate", stop)
    with pytest.raises(KeyboardInterrupt):
        pretrain(settings)
    saved = read_checkpoint(tmp_path / "last.ckpt")
    assert saved["done"]["epochs"] == 2 and saved["scaler"]["scale"] > 0
    monkeypatch.undo()
    assert pretrain(settings, resume=True)["finished"]
    assert read_checkpoint(tmp_path / "last.ckpt")["scaler"]["_growth_tracker"] > saved["scaler"]["_growth_tracker"]
