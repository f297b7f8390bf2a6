"""SOLVER.AUTO_BATCH with an allocator that is not there: which number of images is taken, and what refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gn_det.cli import flags, main, train
from gn_det.config import get_cfg
from gn_det.engine.auto_batch import largest_fit, train_once, trial_batch, with_accumulate
from gn_det.engine.prepare import check_run
from gn_det.engine.schedule import scale_schedule
from gn_det.errors import ConfigError
from gn_det.modeling import build_model
from tests.golden.model_cases import configure


class Allocator:
    """Takes 1000 bytes and 300 an image, has ``total`` of them, and remembers what was tried."""

    def __init__(self, total: int) -> None:
        self.total, self.tried = total, list[int]()

    def peak(self, images: int) -> int:
        self.tried.append(images)
        needed = 1000 + 300 * images
        if needed > self.total:
            raise torch.OutOfMemoryError("no memory")
        return needed


@pytest.mark.parametrize(
    ("total", "limit", "found", "tried"),
    [
        (10_000, 10_000, 16, [16]),
        (4000, 4000, 8, [16, 8]),
        (4000, 2300, 4, [16, 8, 4]),  # 8 fit, but above the limit
        (1200, 1200, 0, [16, 8, 4, 2, 1]),
    ],
)
def test_the_largest_number_that_fits(total: int, limit: int, found: int, tried: list[int]) -> None:
    """Too much is either an error of the allocator or a peak above the limit; nothing smaller is tried than needed."""
    allocator = Allocator(total)
    assert largest_fit([16, 8, 4, 2, 1], allocator.peak, limit) == found
    assert allocator.tried == tried


def test_another_error_is_not_taken_for_missing_memory() -> None:
    def peak(images: int) -> int:
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        largest_fit([1], peak, 1)


def test_the_batch_stays_and_is_divided() -> None:
    """16 images of a config for 8 GPUs on one GPU: batch and learning rate as written; 6 fit, 4 divide 16."""
    cfg = get_cfg()
    cfg.merge_from_list(["SOLVER.AUTO_BATCH", True, "SOLVER.REFERENCE_WORLD_SIZE", 8, "SOLVER.BASE_LR", 0.02])
    scaled, _ = scale_schedule(cfg, 1, 100)
    assert (scaled.SOLVER.IMS_PER_BATCH, scaled.SOLVER.BASE_LR) == (16, 0.02)
    chosen = with_accumulate(scaled, 16, 6)
    assert (chosen.SOLVER.ACCUMULATE, chosen.SOLVER.IMS_PER_BATCH, chosen.SOLVER.AUTO_BATCH) == (4, 16, False)
    assert with_accumulate(scaled, 16, 16).SOLVER.ACCUMULATE == 1
    with pytest.raises(ConfigError, match="a single image does not fit"):
        with_accumulate(scaled, 16, 0)


@pytest.mark.parametrize("lsj", [False, True])
def test_a_trial_is_a_training_step_of_the_largest_size(lsj: bool) -> None:
    """The model runs on it, every weight keeps its value and no gradient stays."""
    cfg: Any = configure(get_cfg(), "gn_fpn", INPUT__MIN_SIZE_TRAIN=(64, 96), INPUT__MAX_SIZE_TRAIN=128)
    cfg.INPUT.LSJ.ENABLED, cfg.INPUT.LSJ.SIZE, cfg.MODEL.DEVICE = lsj, 64, "cpu"
    batch = trial_batch(cfg, 2)
    assert [tuple(s["image"].shape) for s in batch] == [(3, 64, 64) if lsj else (3, 96, 128)] * 2
    model = build_model(cfg).train()
    before = [p.clone() for p in model.parameters()]
    train_once(cfg, model, 1)
    assert all(torch.equal(p, q) and p.grad is None for p, q in zip(model.parameters(), before))


def test_flags_set_their_keys() -> None:
    """A batch that is typed is literal; --balance needs both keys; each wrong value is named."""
    parser = flags.Parser()
    train.add_flags(parser)

    def read(*words: str) -> Any:
        return flags.config_from_args(parser.parse(["--config", "gn_fpn.yaml", *words]))

    cfg = read("--batch", "4", "--balance", "0.1")
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.AUTO_BATCH) == (4, False)
    assert "SOLVER.IMS_PER_BATCH" in cfg.SOLVER.NO_RESCALE
    assert (cfg.DATALOADER.SAMPLER_TRAIN, cfg.DATALOADER.REPEAT_THRESHOLD) == ("RepeatFactorTrainingSampler", 0.1)
    cfg = read("--batch", "auto")
    assert (cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.AUTO_BATCH) == (16, True)
    with pytest.raises(ConfigError, match=r"DATALOADER.REPEAT_THRESHOLD is 2.0; it must be a number from 0 up to 1"):
        read("--balance", "2")
    with pytest.raises(SystemExit):
        read("--batch", "0")


def test_refused_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["train", "--engine", "embedded", "--config", "quickstart.yaml", "--device", "cpu", "--batch", "auto"]
    assert main([*words, "--output", str(tmp_path / "out")]) == 2
    assert "(--batch auto) needs a GPU, MODEL.DEVICE is cpu; give a number" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    cfg = get_cfg()
    cfg.SOLVER.AUTO_BATCH = True
    check_run(cfg, "cuda", 1)
