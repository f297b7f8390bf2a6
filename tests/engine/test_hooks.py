"""Moving average of the weights, budget of hours, and pictures: what is evaluated, saved, drawn and gone on with."""

from __future__ import annotations

import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from gn_det.config import load_config
from gn_det.engine import dist, hooks
from gn_det.engine.hooks import Interrupted, TimeLimit, Visualize
from gn_det.engine.loop import Hook, Loop
from gn_det.engine.state import WeightAverage
from gn_det.modeling.build import build_model
from gn_det.structures import to_numpy
from gn_det.visualize.draw import draw_grid, draw_sample, jpeg_bytes
from tests.engine.cases import Tiny, loader_factory, run
from tests.engine.test_detector_loop import lines, same, stop_at, weights
from tests.faults.equal_ranks import SMALL, sample

EMA = ["SOLVER.EMA.ENABLED", True, "SOLVER.EMA.DECAY", 0.6, "TEST.EVAL_PERIOD", 4]


def whole_file(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def evaluate(model: nn.Module, on_progress: Any) -> dict[str, float]:
    return {"bbox/AP": float(sum(p.detach().double().sum() for p in model.parameters()))}


def test_average_follows_its_formula_and_leaves_the_training_alone(tmp_path: Path) -> None:
    """Weights of every iteration averaged by hand in float64: 1e-6; the weights that learn: the same bits without."""
    seen: list[dict[str, torch.Tensor]] = []

    class Watched(Tiny):
        def forward(self, samples: list[Any]) -> Any:
            seen.append({k: v.detach().clone() for k, v in self.state_dict().items()})
            return super().forward(samples)

    run(tmp_path / "plain", ["TEST.EVAL_PERIOD", 4], evaluate=evaluate)
    run(tmp_path / "ema", EMA, model=Watched(), evaluate=evaluate, seed=7)
    final = whole_file(tmp_path / "ema" / "model_final.pth")
    learning = final["ema"]["learning"]
    expected = {k: v.double() for k, v in seen[0].items()}
    for step, state in enumerate([*seen[1:], learning], 1):
        keep = min(0.6, (1 + step) / (10 + step))
        for name, value in state.items():
            expected[name] = keep * expected[name] + (1 - keep) * value if value.is_floating_point() else value
    assert final["ema"]["steps"] == 12
    for name, value in final["model"].items():
        torch.testing.assert_close(value.double(), expected[name].double(), rtol=1e-6, atol=1e-6)
        assert name.startswith("bn") or not torch.equal(value, learning[name])
    # Watched draws its first weights before the seed is set
    run(tmp_path / "again", EMA, evaluate=evaluate)
    assert same(
        weights(tmp_path / "plain" / "model_final.pth"),
        whole_file(tmp_path / "again" / "model_final.pth")["ema"]["learning"],
    )
    # what is evaluated is what is saved
    measured = [e["bbox/AP"] for e in lines(tmp_path / "again") if "bbox/AP" in e]
    model = Tiny()
    model.load_state_dict(weights(tmp_path / "again" / "model_final.pth"))
    assert measured[-1] == evaluate(model, None)["bbox/AP"]
    model.load_state_dict(weights(tmp_path / "again" / "model_best.pth"))
    assert max(measured) == evaluate(model, None)["bbox/AP"]


def test_frozen_tensors_stay_as_they_are() -> None:
    """Thousands of steps leave a constant to the last bit, which d * x + (1 - d) * x does not."""
    model = nn.Linear(50, 50)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    average = WeightAverage(model, 0.999)
    for _ in range(2000):
        average.update(model)
    assert same(average.tensors, before)


@pytest.mark.parametrize("in_evaluation", [False, True])
def test_interrupted_and_resumed_average_is_bit_identical(tmp_path: Path, in_evaluation: bool) -> None:
    """A signal while training, or while the averages are in the model's place."""
    run(tmp_path / "whole", EMA, evaluate=evaluate)
    cut = tmp_path / "cut"

    def interrupted(model: nn.Module, on_progress: Any) -> dict[str, float]:
        if in_evaluation:
            signal.raise_signal(signal.SIGTERM)
            on_progress(None)
        return evaluate(model, on_progress)

    with pytest.raises(Interrupted):
        run(cut, EMA, evaluate=interrupted, make_loader=None if in_evaluation else stop_at(6))
    run(cut, EMA, evaluate=evaluate, resume=True)
    a, b = (whole_file(f / "model_final.pth") for f in (tmp_path / "whole", cut))
    assert same(a["model"], b["model"]) and same(a["ema"]["learning"], b["ema"]["learning"])
    assert a["ema"]["steps"] == b["ema"]["steps"] == 12
    found = [[(e["iteration"], e["bbox/AP"]) for e in lines(f) if "bbox/AP" in e] for f in (tmp_path / "whole", cut)]
    assert found[0] == found[1] and len(found[0]) == 3


def test_switched_off_and_on_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without EMA the weights that learn go on; with it, a checkpoint without averages is where they start."""
    run(tmp_path, EMA, max_iter=6)
    with caplog.at_level("INFO", logger="gn_det"):
        run(tmp_path, max_iter=9, resume=True)
        assert "SOLVER.EMA.ENABLED True -> False" in caplog.text and "SOLVER.EMA:" not in caplog.text
        run(tmp_path, EMA, max_iter=12, resume=True)
    assert "it starts at these weights" in caplog.text
    run(tmp_path / "plain", max_iter=6)
    for last in (9, 12):
        run(tmp_path / "plain", max_iter=last, resume=True)
    final = whole_file(tmp_path / "model_final.pth")
    assert final["ema"]["steps"] == 3
    assert same(final["ema"]["learning"], weights(tmp_path / "plain" / "model_final.pth"))


def test_hours_end_with_an_evaluated_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The clock passes an hour a batch; --resume then ends as the run without a limit, to the bit."""
    now = [0.0]
    monkeypatch.setattr(hooks.time, "monotonic", lambda: now[0])

    def slow(start: int, seed: int) -> Any:
        for samples in loader_factory(4)(start, seed):
            now[0] += 3600.0
            yield samples

    keys = ["SOLVER.MAX_HOURS", 5.0]
    with caplog.at_level("INFO", logger="gn_det"):
        results = run(tmp_path / "cut", keys, evaluate=evaluate, make_loader=slow)
    # the hours are over after iteration 4; all ranks hear of it in the next one
    saved = whole_file(tmp_path / "cut" / "model_0000005.pth")
    assert saved["iteration"] == 5 == saved["gn_det"]["evaluated_at"] and results == saved["gn_det"]["results"]
    assert (tmp_path / "cut" / "last_checkpoint").read_text() == "model_0000005.pth"
    assert not (tmp_path / "cut" / "model_final.pth").exists()
    assert [e["iteration"] for e in lines(tmp_path / "cut") if "bbox/AP" in e] == [5]
    assert "Time limit of 5 h (SOLVER.MAX_HOURS) reached at iteration 5/12; saved" in caplog.text
    run(tmp_path / "cut", keys, evaluate=evaluate, make_loader=slow, resume=True)
    run(tmp_path / "cut", keys, evaluate=evaluate, make_loader=slow, resume=True)
    run(tmp_path / "whole", evaluate=evaluate)
    assert same(*(weights(tmp_path / f / "model_final.pth") for f in ("cut", "whole")))


def test_time_for_the_last_evaluation_is_kept_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour, an evaluation of 600 s before: the time is up after 3000 s."""
    now = [100.0]
    monkeypatch.setattr(hooks.time, "monotonic", lambda: now[0])
    limit, loop = TimeLimit(1.0, SimpleNamespace()), SimpleNamespace(flags={}, agreed={})  # type: ignore[arg-type]
    limit.before_train(loop)  # type: ignore[arg-type]
    limit.reserve = 600.0
    for seconds, up in ((2999, False), (1, True)):
        now[0] += seconds
        limit.end_step(loop)  # type: ignore[arg-type]
        assert loop.flags["time is up"] is up


def detector_run(folder: Path, *keys: Any, hooks: Any = (), max_iter: int = 5, **more: Any) -> None:
    """A small Mask R-CNN on random images of two (micro-)batches a step, two images each."""
    torch.manual_seed(3)
    model = build_model(load_config("quickstart.yaml", ["MODEL.DEVICE", "cpu", *SMALL], check=False))

    def make_loader(start: int, seed: int) -> Any:
        while True:
            yield [sample(2 * start, 3), sample(2 * start + 1, 3)]
            start += 1

    keys = ("SOLVER.IMS_PER_BATCH", 4, "SOLVER.ACCUMULATE", 2, "SOLVER.BASE_LR", 0.001, *keys)
    run(folder, list(keys), max_iter=max_iter, model=model, make_loader=make_loader, hooks=hooks, **more)


def pictures(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.glob("visualize/*"))


class Witness(Hook):
    """Records the first image and the proposals of every iteration."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, torch.Tensor]] = []

    def before_train(self, loop: Loop) -> None:
        def see(module: nn.Module, args: Any, output: Any) -> None:
            assert loop.current is not None
            self.seen.append((loop.current.batch[0], output[0][0].boxes))

        loop.state.model.get_submodule("proposal_generator").register_forward_hook(see)


def test_pictures_show_truth_and_proposals_and_leave_the_training_alone(tmp_path: Path) -> None:
    """Weights and random streams: the same bits without VIS_PERIOD. Pictures: the file drawn again from the batch."""
    witness = Witness()
    detector_run(tmp_path / "plain")
    detector_run(tmp_path / "drawn", "VIS_PERIOD", 2, hooks=[witness])
    plain, drawn = (whole_file(tmp_path / f / "model_final.pth") for f in ("plain", "drawn"))
    assert same(plain["model"], drawn["model"]) and torch.equal(plain["rng"][0]["torch"], drawn["rng"][0]["torch"])
    assert pictures(tmp_path / "plain") == []
    assert pictures(tmp_path / "drawn") == [f"iter_{i:07d}.jpg" for i in (0, 2, 4)]  # Detectron2's iterations
    for iteration in (0, 2, 4):
        shown, boxes = witness.seen[2 * iteration]
        assert shown["image_id"] == 4 * iteration and len(boxes) > 20
        halves = [draw_sample(shown, ("thing",), bgr=True, proposals=p) for p in (None, to_numpy(boxes[:20]))]
        expected = draw_grid(halves, ("ground truth", "20 best proposals"), columns=2, cell=800)
        assert (tmp_path / "drawn" / "visualize" / f"iter_{iteration:07d}.jpg").read_bytes() == jpeg_bytes(expected)


def test_pictures_are_bounded_and_follow_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest remain; what an earlier run drew beyond the checkpoint goes, other files stay."""
    monkeypatch.setattr(Visualize, "KEPT", 3)
    folder = tmp_path / "visualize"
    folder.mkdir()
    for name in ("iter_0000900.jpg", "iter_mine.jpg"):
        (folder / name).write_bytes(b"")
    detector_run(tmp_path, "VIS_PERIOD", 1)
    assert pictures(tmp_path) == [*(f"iter_{i:07d}.jpg" for i in (2, 3, 4)), "iter_mine.jpg"]
    (folder / "iter_0000005.jpg").write_bytes(b"")
    detector_run(tmp_path, "VIS_PERIOD", 3, max_iter=7, resume=True)
    assert pictures(tmp_path) == [*(f"iter_{i:07d}.jpg" for i in (3, 4, 6)), "iter_mine.jpg"]


def test_only_the_first_rank_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "rank", lambda: 1)
    monkeypatch.setattr(Visualize, "_draw", lambda *_: pytest.fail("drawn"))
    detector_run(tmp_path, "VIS_PERIOD", 1, max_iter=2)
    assert list(tmp_path.iterdir()) == []


def test_a_picture_that_cannot_be_written_does_not_end_the_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "visualize").write_text("a file")
    with caplog.at_level("WARNING", logger="gn_det"):
        detector_run(tmp_path, "VIS_PERIOD", 4)
    assert caplog.text.count("VIS_PERIOD: ") == 2 and (tmp_path / "model_final.pth").is_file()
