"""The loop: exact resume, accumulation, non-finite losses, best model, early stop, signals, files."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gn_det.engine.hooks import Interrupted
from gn_det.engine.loop import Hook, Loop
from gn_det.engine.optimizer import build_optimizer
from gn_det.engine.schedule import lr_multiplier
from gn_det.errors import TrainingError
from tests.engine.cases import Tiny, batch, loader_factory, run, tiny_cfg


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["model"]


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def stop_at(number: int, signum: int = signal.SIGTERM) -> Callable[[int, int], Iterator[Any]]:
    """A loader during whose batch ``number`` this process gets a signal."""

    def make(start: int, seed: int) -> Iterator[Any]:
        for offset, samples in enumerate(loader_factory(4)(start, seed)):
            if start + offset == number:
                os.kill(os.getpid(), signum)
            yield samples

    return make


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_weights_equal_a_plain_loop(tmp_path: Path, accumulate: int) -> None:
    """The loop adds nothing: the same batches in a hand-written SGD loop give the same bits."""
    cfg = tiny_cfg(tmp_path, ["SOLVER.ACCUMULATE", accumulate])
    run(tmp_path, ["SOLVER.ACCUMULATE", accumulate])
    from gn_det.engine.state import seed_everything

    seed_everything(7)
    model = Tiny().train()
    optimizer = build_optimizer(cfg, model)
    multiplier, number = lr_multiplier(cfg), 0
    for iteration in range(cfg.SOLVER.MAX_ITER):
        for group in optimizer.param_groups:
            group["lr"] = cfg.SOLVER.BASE_LR * multiplier(iteration)
        optimizer.zero_grad()
        for _ in range(accumulate):
            losses = model(batch(7, number, 4 // accumulate))
            (torch.stack(list(losses.values())).sum() / accumulate).backward()
            number += 1
        optimizer.step()
    assert same(weights(tmp_path / "model_final.pth"), model.state_dict())


@pytest.mark.parametrize("optimizer", [[], ["SOLVER.OPTIMIZER", "ADAMW"]], ids=["sgd", "adamw"])
def test_interrupted_and_resumed_run_is_bit_identical(tmp_path: Path, optimizer: list[Any]) -> None:
    """SIGTERM after any iteration, --resume: same weights, momentum and metrics as the run left alone."""

    def evaluate(model: nn.Module, on_progress: Any) -> dict[str, float]:
        torch.rand(3)  # evaluation may draw: training must not notice
        return {"bbox/AP": next(model.parameters()).sum().item()}

    overrides = ["TEST.EVAL_PERIOD", 4, *optimizer]
    run(tmp_path / "whole", overrides, evaluate=evaluate)
    cut = tmp_path / "cut"
    with pytest.raises(Interrupted, match="--resume") as stopped:
        run(cut, overrides, evaluate=evaluate, make_loader=stop_at(7))
    assert stopped.value.exit_code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL  # handlers are put back
    run(cut, overrides, evaluate=evaluate, resume=True)
    a, b = (torch.load(f / "model_final.pth", weights_only=True) for f in (tmp_path / "whole", cut))
    assert same(a["model"], b["model"])
    for index, slot in a["optimizer"]["state"].items():
        assert slot and same(slot, b["optimizer"]["state"][index])
    assert torch.equal(a["rng"][0]["torch"], b["rng"][0]["torch"])
    assert a["scheduler"] == b["scheduler"] and a["gn_det"]["best_metric"] == b["gn_det"]["best_metric"]
    found = [[(e["iteration"], e["bbox/AP"]) for e in lines(f) if "bbox/AP" in e] for f in (tmp_path / "whole", cut)]
    assert found[0] == found[1]
    assert [iteration for iteration, _ in found[0]] == [3, 7, 12]


def test_precise_bn(tmp_path: Path) -> None:
    """Statistics are those of other batches under the final weights, computed again here; a resume gives the same."""
    keys = ["TEST.PRECISE_BN.ENABLED", True, "TEST.PRECISE_BN.NUM_ITER", 3, "TEST.EVAL_PERIOD", 4]
    run(tmp_path / "plain")
    run(tmp_path / "precise", keys)
    with pytest.raises(Interrupted):
        run(tmp_path / "cut", keys, make_loader=stop_at(7))
    run(tmp_path / "cut", keys, resume=True)
    plain, precise, cut = (weights(tmp_path / f / "model_final.pth") for f in ("plain", "precise", "cut"))
    assert same(precise, cut)
    statistics = ("bn.running_mean", "bn.running_var")
    assert all(torch.equal(plain[k], precise[k]) != (k in statistics) for k in plain if "tracked" not in k)
    model = Tiny().train()
    model.load_state_dict(plain)
    with torch.no_grad():
        seen = [model.gn(model.conv(torch.stack([s["image"] for s in b]).float() / 255)).relu()
                for b in (batch(8, 12 + k, 4) for k in range(3))]  # fmt: skip
    values = torch.cat(seen).transpose(0, 1).flatten(1)
    torch.testing.assert_close(precise["bn.running_mean"], values.mean(1))
    torch.testing.assert_close(precise["bn.running_var"], values.var(1, correction=0))


def test_killed_run_resumes_from_its_last_checkpoint(tmp_path: Path) -> None:
    """Death without a word (here an exception in the loader) loses only what came after the checkpoint."""
    run(tmp_path / "whole")

    def dies(start: int, seed: int) -> Iterator[Any]:
        for offset, samples in enumerate(loader_factory(4)(start, seed)):
            if start + offset == 8:
                raise RuntimeError("power cut")
            yield samples

    cut = tmp_path / "cut"
    with pytest.raises(RuntimeError, match="power cut"):
        run(cut, make_loader=dies)
    assert (cut / "last_checkpoint").read_text() == "model_0000004.pth"
    run(cut, resume=True)
    assert same(weights(tmp_path / "whole" / "model_final.pth"), weights(cut / "model_final.pth"))
    assert (cut / "last_checkpoint").read_text() == "model_final.pth"


def test_resume_with_nothing_there_starts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="gn_det"):
        run(tmp_path / "new", resume=True)
    assert "starting from the beginning" in caplog.text
    run(tmp_path / "ref")
    assert (tmp_path / "new" / "model_final.pth").is_file()


def test_resume_of_a_finished_run_says_what_to_raise(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path, max_iter=5)
    with caplog.at_level("INFO", logger="gn_det"):
        run(tmp_path, max_iter=5, resume=True)
    assert "raise SOLVER.MAX_ITER" in caplog.text
    caplog.clear()
    with caplog.at_level("INFO", logger="gn_det"):
        run(tmp_path, ["SOLVER.STEPS", (3,)], max_iter=9, resume=True)
    assert torch.load(tmp_path / "model_final.pth", weights_only=True)["iteration"] == 8
    assert "SOLVER.MAX_ITER 5 -> 9" in caplog.text  # changed keys are told


class Poisoned(Tiny):
    """Gives nan for one image."""

    def forward(self, samples: list[Any]) -> Any:
        out = super().forward(samples)
        if self.training and any(s["image_id"] == 26 for s in samples):
            out["loss_box_reg"] = out["loss_box_reg"] * float("nan")
        return out


@pytest.mark.parametrize("accumulate", [1, 2])
def test_non_finite_loss_stops_before_the_step(tmp_path: Path, accumulate: int) -> None:
    """Image 26 is in iteration 6; the message names loss, iteration and images; the checkpoint stays good."""
    model = Poisoned()
    with pytest.raises(TrainingError) as error:
        run(tmp_path, ["SOLVER.ACCUMULATE", accumulate], model=model)
    message = str(error.value)
    assert "iteration 6" in message and "loss_box_reg = nan" in message and "26" in message
    assert "loss_cls" not in message and "\n" not in message
    assert str(tmp_path / "model_0000004.pth") in message
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert torch.load(tmp_path / "model_0000004.pth", weights_only=True)["iteration"] == 4


def test_diverged_proposals_name_the_images(tmp_path: Path) -> None:
    """The model cannot make proposals of nan predictions: no loss to look at, the same message."""

    class Diverged(Tiny):
        def forward(self, samples: list[Any]) -> Any:
            raise FloatingPointError("RPN predictions hold inf or nan")

    with pytest.raises(TrainingError, match=r"not finite at iteration 0: loss_rpn_cls.* images \d+.*SOLVER.BASE_LR"):
        run(tmp_path, [], model=Diverged())


def test_weights_gone_bad_are_not_saved(tmp_path: Path) -> None:
    class Bad(Tiny):
        def forward(self, samples: list[Any]) -> Any:
            if self.training:
                self.bn.running_mean.fill_(float("inf"))  # spoils no loss in training mode
            return super().forward(samples)

    with pytest.raises(TrainingError, match="nan or inf"):
        run(tmp_path, ["SOLVER.CHECKPOINT_PERIOD", 2], model=Bad())
    assert not list(tmp_path.glob("*.pth"))


def scripted(values: list[float]) -> Any:
    left = iter(values)
    return lambda model, on_progress: {"bbox/AP": next(left)}


def test_best_is_kept_and_patience_stops(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    overrides = ["TEST.EVAL_PERIOD", 2, "TEST.PATIENCE", 2]
    with caplog.at_level("INFO", logger="gn_det"):
        results = run(tmp_path, overrides, evaluate=scripted([1.0, 3.0, 2.0, float("nan"), 9.0]))
    best = torch.load(tmp_path / "model_best.pth", weights_only=True)
    assert best["iteration"] == 3 and best["gn_det"]["best_metric"] == 3.0
    assert "optimizer" not in best
    final = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert final["iteration"] == 7 and final["gn_det"]["stale"] == 2
    assert "Stopped early" in caplog.text and results["bbox/AP"] != results["bbox/AP"]


def test_an_equal_metric_is_no_better_one(tmp_path: Path) -> None:
    """The first of equals is kept, and TEST.PATIENCE counts the others."""
    run(tmp_path, ["TEST.EVAL_PERIOD", 4], evaluate=scripted([3.0, 3.0, 3.0]))
    assert torch.load(tmp_path / "model_best.pth", weights_only=True)["iteration"] == 3
    assert torch.load(tmp_path / "model_final.pth", weights_only=True)["gn_det"]["stale"] == 2


def test_best_survives_resume(tmp_path: Path) -> None:
    """A resumed run does not overwrite model_best.pth with something worse."""
    with pytest.raises(Interrupted):
        run(tmp_path, ["TEST.EVAL_PERIOD", 4], evaluate=scripted([5.0]), make_loader=stop_at(6))
    run(tmp_path, ["TEST.EVAL_PERIOD", 4], evaluate=scripted([4.0, 3.0]), resume=True)
    assert torch.load(tmp_path / "model_best.pth", weights_only=True)["iteration"] == 3


def test_evaluation_that_died_runs_on_resume(tmp_path: Path) -> None:
    def dies(model: nn.Module, on_progress: Any) -> dict[str, float]:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        run(tmp_path, evaluate=dies)
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    assert run(tmp_path, evaluate=scripted([2.0]), resume=True) == {"bbox/AP": 2.0}
    assert lines(tmp_path)[-1] == {"bbox/AP": 2.0, "iteration": 12}


def test_signal_during_evaluation_saves_the_state_before_it(tmp_path: Path) -> None:
    def slow(model: nn.Module, on_progress: Any) -> dict[str, float]:
        torch.rand(5)
        os.kill(os.getpid(), signal.SIGINT)
        on_progress(None)
        raise AssertionError("the evaluation should have been left")

    with pytest.raises(Interrupted):
        run(tmp_path / "cut", ["TEST.EVAL_PERIOD", 7], evaluate=slow)
    assert (tmp_path / "cut" / "last_checkpoint").read_text() == "model_0000006.pth"
    whole, cut = ["TEST.EVAL_PERIOD", 7], tmp_path / "cut"
    run(tmp_path / "whole", whole, evaluate=scripted([1.0, 2.0]))
    run(cut, whole, evaluate=scripted([1.0, 2.0]), resume=True)
    assert same(weights(tmp_path / "whole" / "model_final.pth"), weights(cut / "model_final.pth"))


def test_checkpoints_are_pruned_and_plain(tmp_path: Path) -> None:
    run(tmp_path, ["SOLVER.CHECKPOINT_PERIOD", 2, "SOLVER.CHECKPOINT_KEEP", 2])
    assert sorted(f.name for f in tmp_path.glob("*.pth")) == [
        "model_0000007.pth", "model_0000009.pth", "model_final.pth",
    ]  # fmt: skip
    payload = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert payload["gn_det"]["class_names"] == ["thing"] and payload["gn_det"]["category_ids"] == [1]
    assert "MAX_ITER: 12" in payload["gn_det"]["config"]


def test_metrics_file_has_detectron2s_names(tmp_path: Path) -> None:
    run(tmp_path, max_iter=25)
    first, second = lines(tmp_path)
    expected = {"iteration", "total_loss", "loss_cls", "loss_box_reg", "lr", "time", "data_time", "eta_seconds",
                "roi_head/num_fg_samples"}  # fmt: skip
    assert set(first) == set(second) == expected
    assert (first["iteration"], second["iteration"]) == (19, 24)
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_bf16_autocast_trains(tmp_path: Path) -> None:
    run(tmp_path, ["SOLVER.AMP.ENABLED", True], max_iter=4)
    assert all(
        v.dtype == torch.float32 for v in weights(tmp_path / "model_final.pth").values() if v.is_floating_point()
    )


def test_model_of_another_shape_cannot_be_resumed(tmp_path: Path) -> None:
    run(tmp_path, max_iter=3)
    model = Tiny()
    model.fc = nn.Linear(8, 9)
    with pytest.raises(TrainingError.__base__, match=r"fc\.weight"):
        run(tmp_path, max_iter=6, model=model, resume=True)


def test_disk_full_at_a_checkpoint_keeps_the_old_one_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third checkpoint does not fit; with space again, --resume ends as the run that never noticed."""
    import errno

    from gn_det import files

    make, written = files._ErrorKeeper.__init__, 0

    class Disk:
        """Stands where the file is, below everything that the product does about errors."""

        def __init__(self, file: Any) -> None:
            self.file = file

        def write(self, data: Any) -> int:
            nonlocal written
            written += len(data)
            if written > 2.5 * size:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(data)

        def flush(self) -> None:
            self.file.flush()

    run(tmp_path / "whole", ["SOLVER.CHECKPOINT_PERIOD", 3])
    size = (tmp_path / "whole" / "model_0000005.pth").stat().st_size
    cut = tmp_path / "cut"
    with monkeypatch.context() as patch:
        patch.setattr(files._ErrorKeeper, "__init__", lambda self, file: make(self, Disk(file)))
        with pytest.raises(TrainingError, match=r"model_0000008.pth: .*No space left.*free space .*--resume") as told:
            run(cut, ["SOLVER.CHECKPOINT_PERIOD", 3])
    assert "\n" not in str(told.value)
    assert sorted(f.name for f in cut.glob("*.pth*")) == ["model_0000002.pth", "model_0000005.pth"]
    assert not list(cut.glob(".*"))
    run(cut, ["SOLVER.CHECKPOINT_PERIOD", 3], resume=True)
    assert same(weights(tmp_path / "whole" / "model_final.pth"), weights(cut / "model_final.pth"))
    assert [e["total_loss"] for e in lines(cut)] == [e["total_loss"] for e in lines(tmp_path / "whole")]


@pytest.mark.parametrize("at", [11, 7])
def test_owed_evaluation_has_its_consequences(tmp_path: Path, at: int) -> None:
    """Death in an evaluation, the last one or the one that patience ends with: files equal to the run left alone."""
    values = {3: 5.0, 7: 4.0, 11: 6.0}

    def evaluate(model: nn.Module, on_progress: Any, dies: bool = False) -> dict[str, float]:
        iteration = next(i for i, w in reached.items() if torch.equal(w, model.conv.weight))
        if dies and iteration == at:
            raise RuntimeError("power cut")
        return {"bbox/AP": values[iteration]}

    keys = ["TEST.EVAL_PERIOD", 4, "SOLVER.CHECKPOINT_PERIOD", 4, "TEST.BEST_METRIC", "bbox/AP"]
    keys += ["TEST.PATIENCE", 1] if at == 7 else []
    run(tmp_path / "plain", ["SOLVER.CHECKPOINT_PERIOD", 4, "SOLVER.CHECKPOINT_KEEP", 9])
    names = {3: "model_0000003.pth", 7: "model_0000007.pth", 11: "model_final.pth"}
    reached = {i: weights(tmp_path / "plain" / name)["conv.weight"] for i, name in names.items()}
    run(tmp_path / "whole", keys, evaluate=evaluate)
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path / "cut", keys, evaluate=partial(evaluate, dies=True))
    run(tmp_path / "cut", keys, evaluate=evaluate, resume=True)
    final = [torch.load(tmp_path / f / "model_final.pth", weights_only=True) for f in ("whole", "cut")]
    assert final[0]["iteration"] == at and final[0]["gn_det"] == final[1]["gn_det"] | {
        "config": final[0]["gn_det"]["config"]
    }
    assert same(final[0]["model"], final[1]["model"])
    assert torch.equal(*(f["rng"][0]["torch"] for f in final)) and final[0]["scheduler"] == final[1]["scheduler"]
    measured = [
        [(e["iteration"], e.get("bbox/AP"), e.get("total_loss")) for e in lines(tmp_path / f)] for f in ("whole", "cut")
    ]
    assert measured[0] == measured[1]


def test_logged_rate_and_clipping_are_those_of_the_step(tmp_path: Path) -> None:
    """Iteration 11 is in the second third of STEPS; a clip of 1e-9 leaves nothing of the gradients."""
    keys = ["SOLVER.WEIGHT_DECAY", 0.0, "SOLVER.CLIP_GRADIENTS.ENABLED", True, "SOLVER.CLIP_GRADIENTS.CLIP_VALUE", 1e-9]
    torch.manual_seed(7)
    before = {name: value.clone() for name, value in Tiny().state_dict().items()}
    run(tmp_path, keys)
    after = weights(tmp_path / "model_final.pth")
    for name, _ in Tiny().named_parameters():  # not the statistics of batch norm
        torch.testing.assert_close(after[name], before[name], rtol=0, atol=1e-7, msg=name)
    multiplier = lr_multiplier(tiny_cfg(tmp_path))
    (last,) = [entry for entry in lines(tmp_path) if entry["iteration"] == 11]
    assert last["lr"] == pytest.approx(0.05 * multiplier(11)) and multiplier(11) < 1


def test_cudnn_benchmark_is_the_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    run(tmp_path, ["CUDNN_BENCHMARK", True], max_iter=1)
    assert torch.backends.cudnn.benchmark is True


class Watching(Hook):
    """A user's hook: adds a number to the log, sees losses and evaluations, and ends the training."""

    def __init__(self) -> None:
        self.calls: list[str] = []

    def before_train(self, loop: Loop) -> None:
        self.calls.append(f"start {loop.state.iteration + 1}")

    def before_step(self, loop: Loop) -> None:
        assert loop.state.model.training
        self.calls.append("before")

    def after_step(self, loop: Loop) -> None:
        loop.scalars["mine"] = 10.0 * loop.state.iteration
        self.calls.append(f"after {loop.state.iteration} {sorted(loop.losses)}")
        if loop.state.iteration == 4:
            loop.stop()

    def after_eval(self, loop: Loop) -> None:
        self.calls.append(f"eval {loop.state.results}")

    def after_train(self, loop: Loop) -> None:
        self.calls.append("end")


def test_a_users_hook(tmp_path: Path) -> None:
    """Called around every step; its number is in metrics.json; its stop gives an evaluated model_final.pth."""
    hook = Watching()
    run(tmp_path, ["TEST.EVAL_PERIOD", 2], hooks=[hook], evaluate=scripted([1.0, 2.0, 3.0]))
    step = "['loss_box_reg', 'loss_cls']"
    assert hook.calls[:4] == ["start 0", "before", f"after 0 {step}", "before"]
    assert hook.calls[-2:] == ["eval {'bbox/AP': 3.0}", "end"]
    assert [c for c in hook.calls if c.startswith("after")] == [f"after {i} {step}" for i in range(5)]
    assert [c for c in hook.calls if c.startswith("eval")] == [f"eval {{'bbox/AP': {v}.0}}" for v in (1, 2, 3)]
    final = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert final["iteration"] == 4 == final["gn_det"]["evaluated_at"]
    assert lines(tmp_path)[-1]["mine"] == 20.0 and lines(tmp_path)[-1]["bbox/AP"] == 3.0  # the median of 0 .. 40

    class Fails(Hook):
        def before_step(self, loop: Loop) -> None:
            raise RuntimeError("mine")

    hook = Watching()
    with pytest.raises(RuntimeError, match=r"^mine$"):
        run(tmp_path / "fails", hooks=[Fails(), hook])
    assert hook.calls == ["start 0", "end"]


def test_metrics_of_a_checkpoint_that_was_not_followed_by_its_end(tmp_path: Path) -> None:
    """Death between checkpoint 19 and the writing of its metrics: the resumed run writes them."""

    class PowerCut(Hook):
        def end_step(self, loop: Loop) -> None:
            if loop.state.iteration == 19:
                raise RuntimeError("power cut")

    keys = ["SOLVER.CHECKPOINT_PERIOD", 20, "SOLVER.STEPS", (20,)]
    run(tmp_path / "whole", keys, max_iter=25)
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path / "cut", keys, max_iter=25, hooks=[PowerCut()])
    assert not lines(tmp_path / "cut")
    run(tmp_path / "cut", keys, max_iter=25, resume=True)
    found = [[(e["iteration"], e["total_loss"]) for e in lines(tmp_path / f)] for f in ("whole", "cut")]
    assert found[0] == found[1] and len(found[0]) == 2
