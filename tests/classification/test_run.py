"""Whole runs on a few generated pictures: what is written, what is refused, and that a kill changes nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gn_det.checkpoint.io import read_checkpoint
from gn_det.classification import Settings, pretrain
from gn_det.classification.classifier_loop import ClassifierLoss, top1_error, validate
from gn_det.classification.image_sources import Batch, Input, epoch_batches
from gn_det.classification.pretraining import dry_run
from gn_det.errors import ConfigError, DataError, TrainingError

TINY = Settings(
    arch="resnet8", norm="GN", groups=8, data="shapes", output="out", image_size=16, images=40, batch_size=8, epochs=4,
    lr=0.05, workers=0, device="cpu",
)  # fmt: skip


def tiny(output: Path, **changes: Any) -> Settings:
    return replace(TINY, output=str(output), **changes)


def weights(folder: Path) -> dict[str, Tensor]:
    return dict(read_checkpoint(folder / "model_final.pth")["model"])


@pytest.mark.parametrize(
    ("changes", "told"),
    [({"images": 10, "batch_size": 10, "epochs": 1}, "1 epoch = 1 iteration,"), ({}, "4 epochs = 20 ")],
)
def test_numbers_of_epochs_and_iterations(
    changes: dict[str, Any], told: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO"):
        dry_run(tiny(tmp_path, **changes))
    assert f", {told}" in caplog.text


def test_run_writes_weights_curve_and_summary(tmp_path: Path) -> None:
    summary = pretrain(tiny(tmp_path))
    on_disk = json.loads((tmp_path / "summary.json").read_text())
    assert on_disk == json.loads(json.dumps(summary)) and on_disk["finished"] is True
    assert Settings.from_dict(on_disk["settings"]) == tiny(tmp_path)
    curve = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert curve == on_disk["curve"] and [row["epoch"] for row in curve] == [1, 2, 3, 4]
    # 20 iterations: lr drops before iterations 6, 12 and 18, the last one of an epoch is told
    assert [row["lr"] for row in curve] == pytest.approx([0.05, 0.005, 0.0005, 0.00005], rel=1e-6)
    assert summary["top1_error"] == pytest.approx(np.median([row["val_error"] for row in curve]), abs=1e-12)
    assert summary["median_of_epochs"] == 4
    assert summary["best"]["val_error"] == min(row["val_error"] for row in curve)
    assert summary["parameters"] == sum(v.numel() for v in weights(tmp_path).values())  # GN has no buffers
    for name in ("seconds_per_iteration", "inference_seconds_per_image", "peak_memory_mb"):
        assert summary[name] > 0
    assert summary["machine"]["processes"] == 1 and summary["versions"]["torch"] == torch.__version__
    assert (tmp_path / "model_best.pth").is_file() and list(tmp_path.glob("events.out.tfevents.*"))
    assert not list(tmp_path.glob(".*.tmp-*"))


def test_same_seed_same_weights_other_seed_others(tmp_path: Path) -> None:
    states = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        pretrain(tiny(tmp_path / name, epochs=1, seed=seed))
        states.append(weights(tmp_path / name))
    assert all(torch.equal(states[0][k], states[1][k]) for k in states[0])
    assert not torch.equal(states[0]["stem.conv1.weight"], states[2]["stem.conv1.weight"])


_KILLED = """
import os, signal, sys
from dataclasses import replace
sys.path.insert(0, sys.argv[2])
import torch
torch.set_num_threads(1)
from tests.classification.test_run import tiny
from pathlib import Path
from gn_det.classification import pretraining as command
from gn_det.classification import classifier_loop as loop

def attempt(resume, room, name, at):
    pid = os.fork()
    if pid == 0:
        done, original = 0, getattr(room, name)
        def deadly(*args, **kwargs):
            nonlocal done
            done += 1
            if done == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **kwargs)
        setattr(room, name, deadly)
        command.pretrain(tiny(Path(sys.argv[1]), norm="BN", groups=None), resume=resume)
        os._exit(0)
    print(os.WTERMSIG(os.waitpid(pid, 0)[1]))

attempt(True, command, "lr_factor", 8)       # in the middle of epoch 2
attempt(True, loop, "save_checkpoint", 2)  # epoch 3 stands in metrics.jsonl, but not in last.ckpt
"""


def test_killed_and_resumed_run_equals_an_undisturbed_one(tmp_path: Path) -> None:
    """Bit for bit: weights, running statistics, momentum and curve, after two SIGKILLs."""
    tests = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-c", _KILLED, str(tmp_path / "killed"), str(tests.parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert [line for line in done.stdout.splitlines() if line in ("9", "0")] == ["9", "9"], done.stdout + done.stderr
    assert not (tmp_path / "killed" / "summary.json").exists()
    assert read_checkpoint(tmp_path / "killed" / "last.ckpt")["done"]["epochs"] == 2
    resumed = pretrain(tiny(tmp_path / "killed", norm="BN", groups=None), resume=True)
    whole = pretrain(tiny(tmp_path / "whole", norm="BN", groups=None))
    ours, theirs = weights(tmp_path / "killed"), weights(tmp_path / "whole")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    last = [read_checkpoint(tmp_path / name / "last.ckpt")["optimizer"]["state"] for name in ("killed", "whole")]
    assert last[0].keys() == last[1].keys()
    assert all(torch.equal(last[0][k]["momentum_buffer"], last[1][k]["momentum_buffer"]) for k in last[0])
    learned = ("epoch", "train_loss", "train_error", "val_error", "lr")
    assert [[row[k] for k in learned] for row in resumed["curve"]] == [
        [row[k] for k in learned] for row in whole["curve"]
    ]
    assert len((tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()) == 4


def test_earlier_runs_are_never_lost_silently(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = tiny(tmp_path, epochs=1)
    first = pretrain(settings)
    with pytest.raises(TrainingError, match=r"holds an earlier run \(summary.json\).*--resume.*--overwrite"):
        pretrain(settings)
    assert pretrain(settings, resume=True) == json.loads(json.dumps(first))
    assert "finished already" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"summary.json: was started with lr 0.05, not 0.1"):
        pretrain(replace(settings, lr=0.1), resume=True)
    again = pretrain(settings, overwrite=True)
    assert again["curve"][0]["val_error"] == first["curve"][0]["val_error"]


def test_resume_with_other_settings_is_refused(tmp_path: Path) -> None:
    pretrain(tiny(tmp_path, epochs=1))
    (tmp_path / "summary.json").unlink()
    with pytest.raises(ConfigError, match=r"last.ckpt: was started with batch_size 8, not 4"):
        pretrain(tiny(tmp_path, epochs=1, batch_size=4), resume=True)
    assert pretrain(tiny(tmp_path, epochs=1), resume=True)["finished"]


def test_epochs_may_be_a_fraction(tmp_path: Path) -> None:
    """1.4 epochs of 5 iterations are 7."""
    summary = pretrain(tiny(tmp_path, epochs=1.4, steps=()))
    assert [row["epoch"] for row in summary["curve"]] == [1, 2]
    state = read_checkpoint(tmp_path / "last.ckpt")
    assert state["done"]["epochs"] == 2
    whole = pretrain(tiny(tmp_path / "two", epochs=2, steps=()))
    assert whole["curve"][0]["val_error"] == summary["curve"][0]["val_error"]
    assert whole["curve"][1]["train_loss"] != summary["curve"][1]["train_loss"]


def test_divergence_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"the loss is (nan|inf) in iteration \d+: training has diverged; lower lr"):
        pretrain(tiny(tmp_path, lr=1000.0, weight_decay=1000.0))
    assert not (tmp_path / "summary.json").exists()


def test_too_few_images_for_a_batch(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="shapes: 40 training images do not fill one batch of 64"):
        pretrain(tiny(tmp_path, batch_size=64))


def test_fp16_needs_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="classify amp is fp16, which needs a GPU"):
        pretrain(tiny(tmp_path, amp="fp16"))


def test_bf16_trains(tmp_path: Path) -> None:
    full, half = pretrain(tiny(tmp_path / "a", epochs=1)), pretrain(tiny(tmp_path / "b", epochs=1, amp="bf16"))
    assert half["curve"][0]["train_loss"] == pytest.approx(full["curve"][0]["train_loss"], rel=0.05)
    assert half["curve"][0]["train_loss"] != full["curve"][0]["train_loss"]
    assert all(v.dtype == torch.float32 for v in weights(tmp_path / "b").values())


def test_dry_run_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dry_run(tiny(tmp_path / "none", epochs=10))
    out = capsys.readouterr().out
    assert "x 0.1 after epochs 3, 6, 9" in out
    assert "weight decay 0.0001 on all parameters, gamma and beta included" in out
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_batches_of_all_processes_are_those_of_one(processes: int) -> None:
    """Together the ranks see what one process with the whole batch sees; every image once, another order each epoch."""
    one = replace(TINY, output="x", batch_size=8)
    share = replace(one, batch_size=8 // processes)
    whole = epoch_batches(one, 3, 40, 0, 1)
    ranks = [epoch_batches(share, 3, 40, r, processes) for r in range(processes)]
    for k, batch in enumerate(whole):
        assert sorted(np.concatenate([rank[k] for rank in ranks])) == sorted(batch)
    assert sorted(np.concatenate(whole)) == list(range(40))
    assert [b.tolist() for b in epoch_batches(one, 4, 40, 0, 1)] != [b.tolist() for b in whole]


@pytest.mark.slow
def test_two_processes_train_like_one_with_the_whole_batch(tmp_path: Path) -> None:
    """GN's loss is a mean over images: equal weights, within what summation order does in float32."""
    one = pretrain(tiny(tmp_path / "one", epochs=2, workers=0))
    two = pretrain(tiny(tmp_path / "two", epochs=2, batch_size=4), num_gpus=2)
    assert two["machine"]["processes"] == 2
    assert two["curve"][0]["train_loss"] == pytest.approx(one["curve"][0]["train_loss"], rel=1e-4)
    ours, theirs = weights(tmp_path / "one"), weights(tmp_path / "two")
    for name in ours:
        torch.testing.assert_close(theirs[name], ours[name], rtol=1e-3, atol=1e-4, msg=name)


class Readable:
    """Pictures of one color, which is the class."""

    class_names = ("a", "b", "c", "d")
    train_images = val_images = 10
    input = Input("BGR", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))

    def train_batches(self, epoch: int, batches: Sequence[np.ndarray]) -> Iterator[Batch]:
        yield from ()

    def val_batches(self, numbers: Sequence[int], size: int) -> Iterator[Batch]:
        labels = torch.tensor([n % 4 for n in numbers])
        yield labels.view(-1, 1, 1, 1).expand(-1, 3, 2, 2).to(torch.uint8), labels


class Oracle(nn.Module):
    """Reads the class from the color, and is wrong about class ``blind``."""

    def __init__(self, blind: int) -> None:
        super().__init__()
        self.blind = blind
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        classes = x[:, 0, 0, 0].long()
        classes = torch.where(classes == self.blind, (classes + 1) % 4, classes)
        return nn.functional.one_hot(classes, 4).float()


@pytest.mark.parametrize("blind, error", [(-1, 0.0), (0, 30.0), (2, 20.0)])
def test_error_of_a_perfect_classifier_is_zero(blind: int, error: float) -> None:
    """10 images of classes 0 1 2 3 0 1 2 3 0 1: blind to class 0, 3 of 10 are wrong."""
    model = Oracle(blind)
    assert validate(ClassifierLoss(model, Readable.input), Readable())["val_error"] == error


def test_median_of_the_last_five() -> None:
    curve = [{"val_error": e} for e in (90.0, 80.0, 5.0, 1.0, 4.0, 2.0, 3.0)]
    assert top1_error(curve) == 3.0
    assert top1_error(curve[:2]) == 85.0
