"""Which frames a clip takes, how it is cut, which videos lists name, and videos that cannot be used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gn_det.classification import Settings
from gn_det.classification.classifier_loop import ClassifierLoss, validate
from gn_det.classification.clip_sources import ClipSource, load_videos
from gn_det.classification.motions import MOTIONS, load_motions
from gn_det.errors import DataError
from tests.data.test_clip_frames import write_audio, write_video


def settings(data: str = "folder", **changes: Any) -> Settings:
    given = {"frames": 8, "frame_stride": 2, "image_size": 32, "workers": 0, "test_clips": 2, "epochs": 1, **changes}
    return Settings(arch="i3d_r18", norm="GN", data=data, output="out", **given)


class Counted:
    """Frame k of 40x60 pixels has the value k everywhere; records what is asked for."""

    def __init__(self, name: str) -> None:
        self.frames = int(name)

    def read(self, numbers: Sequence[int], side: int) -> np.ndarray:
        frames = np.array(numbers) % self.frames
        return np.broadcast_to(frames.astype(np.uint8)[:, None, None, None], (len(frames), side, side * 3 // 2, 3))


@pytest.mark.parametrize("frames", [1, 20, 64, 300])
def test_training_clips(frames: int) -> None:
    """32 frames at stride 2: the start is uniform in [0, n - 64], 0 for shorter videos, which are read modulo n."""
    of_paper = settings(frames=32, frame_stride=2)
    source = ClipSource(["a", "b"], [(str(frames), 0)], [(str(frames), 0)], of_paper, open_video=Counted)
    starts = set()
    for epoch in range(60):
        ((pixels, labels),) = source.train_batches(epoch, [np.array([0])])
        assert pixels.shape == (1, 3, 32, 32, 32) and labels.tolist() == [0]
        seen = pixels[0, 0, :, 0, 0].tolist()
        start = seen[0]
        starts.add(start)
        assert seen == [(start + 2 * k) % frames % 256 for k in range(32)]
    assert starts == {0} if frames <= 64 else min(starts) >= 0 and max(starts) <= 236 and len(starts) > 40


@pytest.mark.parametrize(
    "frames, starts",
    [
        (1, [0] * 10),
        (20, [0, 2, 4, 6, 8, 10, 12, 14, 16, 18]),
        (64, [0, 6, 12, 19, 25, 32, 38, 44, 51, 57]),
        (250, list(range(0, 250, 25))),
    ],
)
def test_test_clips_begin_at_tenths(frames: int, starts: list[int]) -> None:
    """And take every second frame, modulo the length."""
    source = ClipSource(["a", "b"], [], [(str(frames), 1)], settings(test_clips=10), open_video=Counted)
    found = [pixels[0, 0, :, 0, 0].tolist() for _, (pixels, _) in source.test_batches([0])]
    assert found == [[(start + 2 * k) % frames for k in range(8)] for start in starts]


class Ramp(Counted):
    """Values grow to the right."""

    def read(self, numbers: Sequence[int], side: int) -> np.ndarray:
        width = side * 2
        return np.broadcast_to(np.arange(width, dtype=np.uint8)[None, None, :, None], (len(numbers), side, width, 3))


def test_three_crops_lie_at_both_ends_and_in_the_middle() -> None:
    """Shorter side 37 for crops of 32, as 256 for 224; on the longer side of 74 they begin at 0, 21 and 42."""
    source = ClipSource(["a", "b"], [], [("9", 1), ("9", 0)], settings(), open_video=Ramp)
    found = list(source.test_batches([0, 1]))
    assert [number for number, _ in found] == [0, 0, 1, 1]
    pixels, labels = found[0][1]
    assert pixels.shape == (3, 3, 8, 32, 32) and labels.tolist() == [1, 1, 1]
    assert pixels[:, 0, 0, 0, 0].tolist() == [0, 21, 42]


@pytest.mark.parametrize(
    ("size", "tall", "short", "crop", "starts"),
    [
        (224, False, 256, 256, [(0, 0), (0, 128), (0, 256)]),
        (224, True, 256, 256, [(0, 0), (128, 0), (256, 0)]),
        (112, False, 128, 128, [(0, 0), (0, 64), (0, 128)]),
        (32, True, 37, 32, [(0, 2), (21, 2), (42, 2)]),
        (16, False, 18, 16, [(1, 0), (1, 10), (1, 20)]),
    ],
)
def test_test_crops(size: int, tall: bool, short: int, crop: int, starts: list[tuple[int, int]]) -> None:
    """The whole shorter side of 256 for 224; never a map larger than that of training by a part of the stride of 32."""
    asked: list[int] = []

    class Places(Counted):
        """Red is the row, green the column, both modulo 256."""

        def read(self, numbers: Sequence[int], side: int) -> np.ndarray:
            asked.append(side)
            height, width = (2 * side, side) if tall else (side, 2 * side)
            rows, columns = np.mgrid[:height, :width]
            frame = np.stack([rows, columns, rows], axis=2).astype(np.uint8)
            return np.broadcast_to(frame, (len(numbers), *frame.shape))

    given = settings(image_size=size, test_clips=1)
    source = ClipSource(["a", "b"], [], [("9", 1)], given, open_video=Places)
    ((_, (pixels, _)),) = source.test_batches([0])
    assert asked == [short] and pixels.shape[3:] == (crop, crop)
    assert [tuple(p[:2, 0, 0, 0].tolist()) for p in pixels] == [(y % 256, x % 256) for y, x in starts]


def test_a_test_video_is_opened_once_and_its_first_length_counts() -> None:
    """Opening reads all packets. A damaged video is found to be shorter by ``read``: clip starts stay the same."""
    opened: list[str] = []

    class Shrinks(Counted):
        def __init__(self, name: str) -> None:
            opened.append(name)
            super().__init__(name)

        def read(self, numbers: Sequence[int], side: int) -> np.ndarray:
            self.frames = 50
            return super().read(numbers, side)

    given = settings(test_clips=5)
    source = ClipSource(["a", "b"], [], [("100", 1), ("80", 0)], given, open_video=Shrinks)
    starts = [int(pixels[0, 0, 0, 0, 0]) for _, (pixels, _) in source.test_batches([0, 1])]
    assert opened == ["100", "80"]
    assert starts == [k % 50 for k in (0, 20, 40, 60, 80, 0, 16, 32, 48, 64)]


def test_scale_jitter_crop_and_flip() -> None:
    """The shorter side is uniform in [256, 320] of 224, crops lie inside, half of the clips are mirrored."""
    sides: set[int] = set()

    class Sided(Ramp):
        def read(self, numbers: Sequence[int], side: int) -> np.ndarray:
            sides.add(side)
            return super().read(numbers, side)

    source = ClipSource(["a", "b"], [("9", 0)] * 4, [], settings(), open_video=Sided)
    flips, corners = [], set()
    for epoch in range(50):
        ((pixels, _),) = source.train_batches(epoch, [np.arange(4)])
        rows = pixels[:, 0, 0, 0]
        steps = rows[:, 1].int() - rows[:, 0].int()
        assert set(steps.tolist()) <= {1, -1}
        flips += steps.tolist()
        corners |= set(rows.amin(1).tolist())
    assert sides == set(range(37, 47)) and len(corners) > 20
    assert 0.35 < flips.count(-1) / len(flips) < 0.65


def test_clips_depend_on_seed_epoch_and_number_alone() -> None:
    def batch(numbers: list[int], workers: int, epoch: int = 3) -> torch.Tensor:
        source = load_motions(settings("motions", images=16, workers=workers))
        return next(iter(source.train_batches(epoch, [np.array(numbers)])))[0]

    assert torch.equal(batch([3, 5], 0)[1], batch([5, 1], 1)[0])
    assert not torch.equal(batch([5], 0, 4)[0], batch([5], 0)[0])


def test_motions_differ_in_time_alone() -> None:
    """A video read backwards is one of the opposite motion: no single frame tells the class."""
    source = load_motions(settings("motions", images=16))
    names = list(MOTIONS)
    assert source.class_names == tuple(names) and source.train_images == 16 and source.val_images == 8
    for there, back in (("left", "right"), ("up", "down"), ("zoom in", "zoom out"), ("clockwise", "counterclockwise")):
        assert [-v for v in MOTIONS[there]] == list(MOTIONS[back])
    (pixels, labels), *_ = source.val_batches(range(8), 8)
    assert labels.tolist() == list(range(8)) and pixels.shape == (8, 3, 8, 32, 32)
    moved = (pixels[:, :, 1:].float() - pixels[:, :, :-1].float()).abs().mean((1, 2, 3, 4))
    assert float(moved.min()) > 0.5


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for part in ("train", "val"):
        for name in ("run", "jump"):
            for k in range(2):
                write_video(tmp_path / part / name / f"{name}_{part}{k}_000000_000010.mp4", frames=20)
    return tmp_path


def read_all(source: ClipSource) -> tuple[int, int]:
    train = sum(len(labels) for _, labels in source.train_batches(0, [np.arange(source.train_images)]))
    return train, sum(len(labels) for _, labels in source.val_batches(range(source.val_images), 3))


def test_folder_of_classes(folder: Path) -> None:
    source = load_videos(settings(str(folder)))
    assert source.class_names == ("jump", "run") and read_all(source) == (4, 4) and not source.bad


def test_videos_shorter_than_a_clip_are_told_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("WARNING"):
        read_all(load_videos(settings(str(folder), frame_stride=3)))
    assert [r.getMessage().split(" and are")[0] for r in caplog.records] == [
        "some videos are shorter than a clip (one has 20 frames, a clip spans 24)"
    ]


def test_no_video_that_can_be_used(folder: Path) -> None:
    """Fewer than max_bad, but all of them."""
    for path in folder.rglob("*.mp4"):
        path.write_bytes(b"no video")
    source = load_videos(settings(str(folder)))
    with pytest.raises(DataError, match="no training video can be used"):
        read_all(source)
    with pytest.raises(DataError, match="no validation video can be used"):
        validate(ClassifierLoss(torch.nn.Conv3d(3, 2, 1), source.input), source)


def test_bad_videos_are_skipped_and_named(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """In training the next one takes the place; validation goes on without them."""
    for part in ("train", "val"):
        (folder / part / "run" / "empty.mp4").write_bytes(b"")
        (folder / part / "run" / "noise.avi").write_bytes(bytes(range(256)) * 40)
        write_audio(folder / part / "jump" / "song.mp4")
    with caplog.at_level("WARNING"):
        source = load_videos(settings(str(folder)))
        assert read_all(source) == (7, 4)
    assert len(source.bad) == 6 and "song.mp4: has no video stream" in caplog.text
    with pytest.raises(DataError, match=r"3 videos cannot be used, more than max_bad 2: .*; repair or remove them"):
        read_all(load_videos(settings(str(folder), max_bad=2)))


def test_kinetics_and_ucf_lists(folder: Path) -> None:
    kinetics, ucf = {}, {}
    for part in ("train", "val"):
        kinetics[part], ucf[part] = folder / f"{part}.csv", folder / f"{part}.txt"
        rows = [f"{name},{name}_{part}{k},0,10,{part}" for name in ("run", "jump") for k in range(2)]
        kinetics[part].write_text("\n".join(["label,youtube_id,time_start,time_end,split", *rows]))
        names = [f"{name}/{name}_{part}{k}_000000_000010.mp4" for name in ("run", "jump") for k in range(2)]
        ucf[part].write_text("".join(f"{name} 1\n" if part == "train" else f"{name}\n" for name in names))
    for lists in (kinetics, ucf):
        source = load_videos(settings(str(folder), train_list=str(lists["train"]), val_list=str(lists["val"])))
        assert source.class_names == ("jump", "run") and read_all(source) == (4, 4)
    # a video that is not there, and one in the folder of another class
    with kinetics["train"].open("a") as file:
        file.write("\nrun,gone,0,10,train\njump,run_val1,0,10,train")
    lists = {"train_list": str(kinetics["train"]), "val_list": str(kinetics["val"])}
    source = load_videos(settings(str(folder), **lists))
    assert sorted(source.bad) == [str(folder / "val" / "run" / "run_val1_000000_000010.mp4"), "gone_000000_000010"]
    with pytest.raises(DataError, match=r"2 videos cannot be used.*is in the folder of 'run', but listed as 'jump'"):
        load_videos(settings(str(folder), max_bad=0, **lists))
    kinetics["val"].write_text("label,youtube_id,time_start,time_end,split\nswim,a,0,10,val")
    with pytest.raises(DataError, match="class 'jump' is only in one of"):
        load_videos(settings(str(folder), **lists))
    for text in ("just words", "label,time_start,time_end,youtube_id\njump,0,10"):
        kinetics["val"].write_text(text)
        with pytest.raises(DataError, match=r"val.csv: line 1 is neither of Kinetics' csv"):
            load_videos(settings(str(folder), **lists))
