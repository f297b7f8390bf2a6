"""A non-finite loss names the layer that failed first and leaves a batch that fails again when it is replayed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from gn_det.checkpoint.io import read_checkpoint
from gn_det.config import load_config
from gn_det.data.shapes import make_shapes
from gn_det.engine import run as engine
from gn_det.engine.nonfinite import Pass, find_origin, main, replay
from gn_det.errors import TrainingError, WeightsError
from tests.engine.cases import Tiny, batch, run
from tests.engine.test_run import SMALL


class Overflows(nn.Module):
    def __init__(self, module: nn.Module, calls: int) -> None:
        super().__init__()
        self.module, self.left = module, calls

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.left -= 1
        return self.module(x) * (1.0 if self.left >= 0 else float("inf"))


def test_the_layer_is_named(tmp_path: Path) -> None:
    """Iteration 2 overflows in the norm layer; what follows from it is not blamed."""
    model = Tiny()
    model.gn = Overflows(model.gn, 2)  # type: ignore[assignment]
    with pytest.raises(TrainingError) as told:
        run(tmp_path, model=model)
    message = str(told.value)
    assert "iteration 2: loss_cls = nan, loss_box_reg = nan, images 8, 9, 10, 11;" in message and "\n" not in message
    assert "the first non-finite activations are in gn (Overflows), whose inputs reach " in message
    kept = tmp_path / "nonfinite_0000002_rank0.pth"
    assert f"python -m gn_det.engine.nonfinite {kept}" in message
    content = read_checkpoint(kept)
    assert [s["image_id"] for s in content["batch"]] == [8, 9, 10, 11] and content["iteration"] == 2
    assert torch.equal(content["model"]["fc.weight"], model.fc.weight)


def test_weights_and_losses_are_told_apart() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    x = torch.ones(1, 2)
    assert "all activations are finite" in find_origin(model, lambda: model(x))
    with torch.no_grad():
        model[0].bias[0] = float("nan")
    assert "weights already contain nan or inf, first in 0.bias" in find_origin(model, lambda: model(x))
    assert not any(m._forward_hooks for m in model.modules())


def test_a_pass_is_repeated_with_its_random_numbers() -> None:
    """The model draws; whatever was drawn since, the losses are the same to the bit."""
    model, samples = Tiny(), batch(7, 0, 4)
    done = Pass(samples, {"torch": torch.get_rng_state(), "cuda": None}, "cpu", None)
    first = model(samples)
    torch.rand(5)
    assert all(torch.equal(value, first[name]) for name, value in done.again(model).items())


def test_replay_of_a_real_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A learning rate that is far too high: the file alone, on another machine, shows the same loss and layer."""
    data = make_shapes(tmp_path / "shapes", "train", 4)
    keys = ["DATASETS.TRAIN_JSON", data.json_file, "DATASETS.TRAIN_IMAGES", data.image_root, "DATASETS.TEST", "()"]
    keys += ["SOLVER.BASE_LR", "1000", "SOLVER.WARMUP_ITERS", "0", "SOLVER.MAX_ITER", "30", "SEED", "1"]
    with pytest.raises(TrainingError, match="not finite at iteration") as told:
        engine.train(load_config("quickstart.yaml", [*SMALL, *keys, "OUTPUT_DIR", str(tmp_path / "out")]))
    (kept,) = (tmp_path / "out").glob("nonfinite_*.pth")
    text = replay(kept)
    origin = text.splitlines()[-1]
    assert origin in str(told.value), text
    assert main([str(kept)]) == 0 and origin in capsys.readouterr().out
    torch.save({"model": {}}, tmp_path / "other.pth")
    with pytest.raises(WeightsError, match="holds no batch to replay"):
        replay(tmp_path / "other.pth")
    content = read_checkpoint(kept)
    first = content["batch"][0]
    targets = first["targets"]
    hostile: list[tuple[dict[str, object], str]] = [
        ({"autocast": "load"}, "autocast is 'load'"),
        ({"rng": 7}, "rng is 7"),
        ({"batch": [{}]}, r"batch\[0\].image is missing"),
        ({"batch": [{"image": torch.zeros(3)}]}, r"batch\[0\].image has shape 3"),
        ({"batch": [{**first, "targets": {**targets, "classes": targets["classes"] + 99}}]}, "5"),
        (
            {"batch": [{**first, "targets": {**targets, "boxes": targets["boxes"][:0]}}]},
            "numbers? of boxes",
        ),
        ({"model": {**content["model"], "x": torch.ones(1)}}, "configured model"),
    ]
    for change, message in hostile:
        torch.save({**content, **change}, tmp_path / "hostile.pth")
        with pytest.raises(WeightsError, match=rf"hostile\.pth: cannot replay it: .*{message}"):
            replay(tmp_path / "hostile.pth")
