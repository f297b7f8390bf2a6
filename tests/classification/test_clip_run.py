"""Whole runs on generated videos: training, the final test, prediction, and that a kill changes nothing."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from gn_det.checkpoint.io import read_checkpoint
from gn_det.classification import Settings, pretrain, pretraining
from gn_det.classification import classifier_loop as loop
from gn_det.classification.classifier_loop import ClassifierLoss, final_test
from gn_det.classification.clip_sources import RGB
from gn_det.classification.predict_clips import predict_clips
from gn_det.cli import main
from gn_det.errors import ConfigError
from tests.data.test_clip_frames import write_video

TINY = Settings(
    arch="i3d_r18", norm="BN", data="motions", output="out", images=16, frames=8, frame_stride=4, image_size=16,
    batch_size=8, iterations=4, lr=0.01, workers=0, device="cpu", test_clips=2, test_crops=1, precise_bn=2,
)  # fmt: skip


def state(folder: Path) -> dict[str, Tensor]:
    return dict(read_checkpoint(folder / "model_final.pth")["model"])


def killed(settings: Settings, at: int) -> int:
    """Signal that ends a process of this run while it saves for the ``at``-th time."""
    pid = os.fork()
    if pid == 0:
        saves, original = 0, loop.save_checkpoint

        def deadly(*args: Any) -> None:
            nonlocal saves
            saves += args[0].name == loop.LAST
            if saves == at:
                os.kill(os.getpid(), signal.SIGKILL)
            original(*args)

        loop.save_checkpoint = deadly
        torch.set_num_threads(1)
        pretrain(settings)
        os._exit(0)
    return os.WTERMSIG(os.waitpid(pid, 0)[1])


def test_killed_and_resumed_run_equals_an_undisturbed_one(tmp_path: Path) -> None:
    """Bit for bit: weights, precise statistics of BN, curve, and the errors of the final test, dropout included."""
    first, whole = (replace(TINY, output=str(tmp_path / name)) for name in ("killed", "whole"))
    assert killed(first, 2) == signal.SIGKILL
    assert read_checkpoint(tmp_path / "killed" / "last.ckpt")["done"]["epochs"] == 1
    resumed, straight = pretrain(first, resume=True), pretrain(whole)
    ours, theirs = state(tmp_path / "killed"), state(tmp_path / "whole")
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)
    learned = ("epoch", "train_loss", "train_error", "val_error", "lr")
    assert [[row[k] for k in learned] for row in resumed["curve"]] == [
        [row[k] for k in learned] for row in straight["curve"]
    ]
    assert len(straight["curve"]) == 2  # 4 iterations of 2 in an epoch
    assert all(resumed[k] == straight[k] for k in ("top1_error", "top5_error")) and straight["test_videos"] == 8
    with pytest.raises(ConfigError, match=r"was started with frames 8, not 16"):
        pretrain(replace(first, frames=16), resume=True)


@pytest.mark.parametrize("norm", ["GN", "BN"])
def test_channels_last_trains_the_same_network(norm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights and error of the final test after two steps; maps of images have 4 dimensions, those of clips 5."""
    layouts: list[bool] = []

    class Seen(ClassifierLoss):
        def forward(self, batch: Any) -> Any:
            weight = self.classifier.trunk.stem.conv1.weight
            layouts.append(weight.is_contiguous(memory_format=torch.channels_last_3d))
            return super().forward(batch)

    monkeypatch.setattr(pretraining, "ClassifierLoss", Seen)
    short = replace(TINY, norm=norm, precise_bn=2 if norm == "BN" else None, iterations=2)
    for last in (False, True):
        pretrain(replace(short, output=str(tmp_path / str(last)), channels_last=last))
    assert layouts == [False] * (len(layouts) // 2) + [True] * (len(layouts) // 2)
    plain, other = state(tmp_path / "False"), state(tmp_path / "True")
    for name in plain:
        torch.testing.assert_close(other[name], plain[name], rtol=1e-3, atol=1e-4)


class Videos:
    """Three videos of class 0 in two clips of two crops; a crop's first value is the class that it looks like.

    10 more: it looks like it beyond doubt.
    """

    class_names = tuple("abcdefg")
    val_images = 3
    looks: ClassVar[Any] = {0: [[0, 0], [0, 11]], 1: [[1, 1], [1, 0]], 2: [[0, 11], [11, 0]]}

    def test_batches(self, numbers: range) -> Any:
        for number in numbers:
            for crops in self.looks[number]:
                yield number, (torch.tensor(crops).view(2, 1, 1, 1, 1), torch.zeros(2, dtype=torch.int64))


class Sees(torch.nn.Module):
    """Scores 4 for the class that a crop looks like, 30 beyond doubt."""

    def forward(self, x: Tensor) -> Tensor:
        value = (x[:, 0, 0, 0, 0] * RGB.std[0] + RGB.mean[0]).round().long()
        return torch.where(value >= 10, 30, 4)[:, None] * torch.nn.functional.one_hot(value % 10, 7).float()


def test_final_test_averages_softmax() -> None:
    """Three sure crops beat one beyond doubt (not so the mean of the scores); two against two, doubt loses."""
    found = final_test(ClassifierLoss(Sees(), RGB), Videos())
    assert found == {"top1_error": pytest.approx(200 / 3), "top5_error": 0.0, "test_videos": 3}


def test_prediction_names_the_top_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the weights' own preprocessing and clips; equal to what the trained network gives for the video."""
    monkeypatch.chdir(tmp_path)
    pretrain(replace(TINY, output="run", norm="GN", precise_bn=None, iterations=1))
    assert main(["weights", "run/model_final.pth"]) == 0
    assert "goes into     gn-det predict on videos" in capsys.readouterr().out
    video = str(write_video(tmp_path / "v.mp4", frames=20))
    assert main(["predict", "--weights", "run/model_final.pth", "--output", "found", "--device", "cpu", video]) == 0
    (found,) = json.loads(Path("found/classes.json").read_text())
    scores = {c["name"]: c["score"] for c in found["classes"]}
    assert len(scores) == 5 and list(scores.values()) == sorted(scores.values(), reverse=True)
    assert f"v.mp4: {next(iter(scores))} " in capsys.readouterr().out
    write_video(tmp_path / "broken.mp4", frames=1).write_bytes(b"no video")
    assert main(["predict", "--weights", "run/model_final.pth", "--output", "found", "broken.mp4"]) == 2
    assert "broken.mp4: cannot be read as a video" in capsys.readouterr().err
    pretrain(replace(TINY, output="flat", arch="resnet8", data="digits", norm="BN", image_size=8, images=None,
                     epochs=0.05, iterations=None, frames=None, frame_stride=None, test_clips=None, test_crops=None,
                     precise_bn=None, dropout=None, max_bad=None))  # fmt: skip
    assert not predict_clips("flat/model_final.pth", [video], "found")


def test_old_name_of_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--arch", "i3d_r18", "--norm", "GN", "--data", "motions", "--images", "64", "--dry-run"]
    assert main(["pretrain", *words]) == 0
    found = capsys.readouterr()
    assert "pretrain is now called classify" in found.err and "32 x 2 frames of 32 px" in found.out
