"""Clips of videos for training and evaluation: which frames, scale jitter, crops, flips, and the lists of videos.

What is drawn for a clip depends on (seed, epoch, number) alone, not on the number of workers or interruptions. The
rules are those of Wang et al. 2018 (video-nonlocal-net), which the paper follows.
"""

from __future__ import annotations

import csv
import logging
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from gn_det.classification.image_sources import Batch, Entry, FileSource, Input, scan_parts
from gn_det.classification.settings import Settings
from gn_det.data.clip_frames import ClipError, VideoFile, import_av
from gn_det.data.video_frames import VIDEO_SUFFIXES
from gn_det.data.workers import WorkerData, load_batches
from gn_det.errors import DataError
from gn_det.files import open_regular
from gn_det.text import count, one_line

logger = logging.getLogger(__name__)

#: Input of a network that begins from scratch.
RGB = Input("RGB", (114.75,) * 3, (57.375,) * 3)
#: Scale jitter and test size of the shorter side, for a crop of 224.
_CROP, _JITTER, _TEST = 224, (256, 320), 256
#: A test crop is as large as the shorter side (256), but of a multiple of this many pixels, the network's stride: 37
#: pixels instead of 32 would make a last map of 2x2 instead of 1x1, which a network trained on 32 has never seen.
_STRIDE = 32
#: Bytes of a list of videos.
_MOST_BYTES = 1 << 28


class Video(Protocol):
    """Something with frames: a file, or one that is generated."""

    frames: int

    def read(self, numbers: Sequence[int], side: int) -> np.ndarray:
        """Frames (T, H, W, 3) uint8 RGB of the shorter side ``side``."""
        ...


class Loaded(NamedTuple):
    """What a worker sends back: clips (N, 3, T, side, side) uint8 and classes (N,).

    ``bad`` holds videos that could not be used, with the reason, and ``short`` the frames of one that is shorter than a
    clip, 0 for none.
    """

    pixels: Tensor
    labels: Tensor
    bad: list[tuple[str, str]]
    short: int


class ClipSource(FileSource):
    """Clips of videos; validation is augmented as training is (Figure 7).

    Args:
        train, val: (name, class index) of every video.
        open_video: opens one by its name.
        flip: whether a clip keeps its class when it is mirrored.

    Attributes:
        bad: why videos were skipped, by name.
    """

    def __init__(
        self,
        class_names: Sequence[str],
        train: list[Entry],
        val: list[Entry],
        settings: Settings,
        *,
        open_video: Callable[[str], Video] = VideoFile,
        flip: bool = True,
    ) -> None:
        super().__init__(class_names, train, val, RGB, settings)
        self.bad: dict[str, str] = {}
        self._open, self._flip = open_video, flip
        self._told = False

    def test_batches(self, numbers: Sequence[int]) -> Iterator[tuple[int, Batch]]:
        """The number of a validation video, and the crops of one of its clips; its clips one after the other."""
        clips = [(number, clip) for number in numbers for clip in range(self._settings.test_clips)]
        data = _TestClips(self._val, self._settings, None, self._open, self._flip, self.input.order)
        for (number, _), loaded in zip(clips, self._loaded(data, clips)):
            yield number, (loaded.pixels, loaded.labels)

    def _load(self, entries: list[Entry], batches: list[list[int]], epoch: int | None) -> Iterator[Batch]:
        data = _Clips(entries, self._settings, epoch, self._open, self._flip, self.input.order)
        for loaded in self._loaded(data, batches):
            if len(loaded.labels):
                yield loaded.pixels, loaded.labels
            elif epoch is not None:
                raise DataError(f"{self._settings.data}: no training video can be used")

    def _loaded(self, data: _Clips, batches: Sequence[Any]) -> Iterator[Loaded]:
        for loaded in load_batches(data, batches, min(self._settings.workers, len(batches))):
            self.note(loaded.bad)
            if loaded.short and not self._told:
                self._told = True
                logger.warning(
                    "some videos are shorter than a clip (one has %s, a clip spans %d) and are read again from their "
                    "start; lower --frames or --frame-stride",
                    *(count(loaded.short, "frame"), self._settings.span),
                )
            yield loaded

    def note(self, bad: Sequence[tuple[str, str]]) -> None:
        """Record skipped videos (name, reason); raise DataError for more than max_bad of them."""
        for name, reason in bad:
            if name not in self.bad:
                self.bad[name] = reason
                if len(self.bad) <= self._settings.max_bad:
                    logger.warning("skipped: %s", reason)
        if len(self.bad) > self._settings.max_bad:
            raise DataError(
                f"{self._settings.data}: {count(len(self.bad), 'video')} cannot be used, more than max_bad "
                f"{self._settings.max_bad}: {reason}; repair or remove them, or raise --max-bad"
            )


@dataclass(eq=False)
class _Clips(WorkerData):
    """Training clips of one epoch; without an epoch those of validation."""

    entries: list[Entry]
    settings: Settings
    epoch: int | None
    open_video: Callable[[str], Video]
    flip: bool
    order: str  # of the network's channels

    def name_of(self, index: int) -> str:
        return self.entries[index][0]

    def __getitem__(self, batch: Sequence[int]) -> Loaded:
        """A video that cannot be used is left out in validation, and in training replaced by the next one that can."""
        clips: list[Tensor] = []
        labels: list[int] = []
        bad: list[tuple[str, str]] = []
        short = 0
        for number in batch:
            for other in range(len(self.entries) if self.epoch is not None else 1):
                place = (number + other) % len(self.entries)
                name, label = self.entries[place]
                self.note(place)
                try:
                    video = self.open_video(name)
                    if video.frames < self.settings.span:
                        short = video.frames
                    clips.append(self._clip(video, number))
                    labels.append(label)
                    break
                except ClipError as error:
                    bad.append((name, str(error)))
                    if len(bad) > self.settings.max_bad:
                        break
        pixels = torch.stack(clips) if clips else torch.empty(0, dtype=torch.uint8)
        return Loaded(pixels, torch.tensor(labels, dtype=torch.int64), bad, short)

    def _clip(self, video: Video, number: int) -> Tensor:
        settings, side = self.settings, self.settings.side
        epoch = (0, 0) if self.epoch is None else (1, self.epoch)
        rng = np.random.default_rng([settings.seed, *epoch, number])
        start = int(rng.integers(0, max(video.frames - settings.span, 0) + 1))
        low, high = (round(side * edge / _CROP) for edge in _JITTER)
        frames = self._frames(video, start, int(rng.integers(low, high + 1)))
        y, x = (int(rng.integers(0, edge - side + 1)) for edge in frames.shape[1:3])
        crop = frames[:, y : y + side, x : x + side]
        return self._tensor(crop[:, :, ::-1] if rng.random() < 0.5 and self.flip else crop)

    def _frames(self, video: Video, start: int, side: int) -> np.ndarray:
        """The frames of a clip; a video that is shorter is read modulo its length."""
        settings = self.settings
        return video.read([start + settings.frame_stride * k for k in range(settings.frames)], side)

    def _tensor(self, frames: np.ndarray) -> Tensor:
        """(T, H, W, 3) RGB to (3, T, H, W) in the network's order of channels."""
        frames = frames[..., ::-1] if self.order == "BGR" else frames
        return torch.from_numpy(np.ascontiguousarray(frames.transpose(3, 0, 1, 2)))


class _TestClips(_Clips):
    """Crops (test_crops, 3, T, side, side) of one clip each, addressed by ``(video, clip)``."""

    #: The video read last, with its place and its number of frames when opened: all packets were read to count them.
    _last: tuple[int, Video, int] | None = None

    def __getitem__(self, place: tuple[int, int]) -> Loaded:  # type: ignore[override]
        settings, (number, clip) = self.settings, place
        short = round(settings.side * _TEST / _CROP)
        side = max(short // _STRIDE * _STRIDE, settings.side)
        name, label = self.entries[number]
        self.note(number)
        try:
            if self._last is None or self._last[0] != number:
                video = self.open_video(name)
                self._last = number, video, video.frames
            _, video, length = self._last
            frames = self._frames(video, int(clip * length / settings.test_clips), short)
        except ClipError as error:
            return Loaded(torch.empty(0), torch.empty(0), [(name, str(error))], 0)
        height, width = frames.shape[1:3]
        # Along the longer side: both ends and the middle; of the shorter side the middle.
        shares = (0.5,) if settings.test_crops == 1 else (0, 0.5, 1)
        along_y, along_x = ((0.5,) * 3, shares) if width >= height else (shares, (0.5,) * 3)
        corners = [(int(v * (height - side)), int(h * (width - side))) for v, h in zip(along_y, along_x)]
        crops = torch.stack([self._tensor(frames[:, y : y + side, x : x + side]) for y, x in corners])
        return Loaded(crops, torch.full((len(crops),), label), [], 0)


# ------------------------------------------------------------ which videos


def load_videos(settings: Settings) -> ClipSource:
    """The videos of ``settings.data``: its folders of classes, or those that two lists name.

    Raises:
        ConfigError: PyAV is not installed.
        DataError: folders or lists that cannot be used, classes that differ, or too many bad videos.
    """
    import_av()
    root = Path(settings.data).expanduser()
    if settings.train_list is None or settings.val_list is None:
        names, train, val = scan_parts(root, VIDEO_SUFFIXES, "videos")
        return ClipSource(names, train, val, settings)
    files: dict[str, str] = {}
    for folder, _, entries in sorted(os.walk(root)):
        for entry in entries:
            if Path(entry).suffix.lower() in VIDEO_SUFFIXES:
                files.setdefault(Path(entry).stem, os.path.join(folder, entry))
    bad: list[tuple[str, str]] = []
    parts = [read_list(Path(path).expanduser()) for path in (settings.train_list, settings.val_list)]
    names = sorted({label for _, label in parts[0]})
    other = sorted({label for _, label in parts[1]} ^ set(names))
    if other:
        raise DataError(f"class {other[0]!r} is only in one of {settings.train_list} and {settings.val_list}")
    if len(names) < 2:
        raise DataError(f"{settings.train_list}: lists {count(len(names), 'class', 'classes')}; at least 2 are needed")
    folders = {_plain(name): name for name in names}
    found: list[list[Entry]] = [[], []]
    for rows, usable in zip(parts, found):
        for stem, label in rows:
            file = files.get(stem)
            folder = folders.get(_plain(Path(file).parent.name), label) if file else label
            if file is None:
                bad.append((stem, f"{root}: has no video {one_line(stem, 200)}, which a list names"))
            elif folder != label:
                bad.append((file, f"{one_line(file, 300)}: is in the folder of {folder!r}, but listed as {label!r}"))
            else:
                usable.append((file, names.index(label)))
    source = ClipSource(names, found[0], found[1], settings)
    source.note(bad)
    if not all(found):
        raise DataError(f"{root}: holds no video of {settings.val_list if found[0] else settings.train_list}")
    return source


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def read_list(path: Path) -> list[tuple[str, str]]:
    """Return (file name without ending, class) of each line of a Kinetics csv or UCF101 list, or raise DataError."""
    try:
        with open_regular(path) as file:
            lines = file.read(_MOST_BYTES).decode().splitlines()
    except (OSError, ValueError) as error:
        reason = one_line(getattr(error, "strerror", None) or error, 100)
        raise DataError(f"{path}: cannot be read ({reason})") from None
    rows = []
    try:
        if lines and {"label", "youtube_id"} <= set(lines[0].split(",")):
            for row in csv.DictReader(lines):
                start, end = (int(float(row[key])) for key in ("time_start", "time_end"))
                # join() refuses the None of a row without it
                rows.append(("_".join([row["youtube_id"], f"{start:06d}", f"{end:06d}"]), row["label"].strip()))
        else:
            for line in filter(None, map(str.strip, lines)):
                label, name = re.sub(r"\s+\d+$", "", line).split("/")[-2:]
                rows.append((Path(name).stem, label))
    except (KeyError, ValueError, TypeError, AttributeError, csv.Error):
        raise DataError(
            f"{path}: line {len(rows) + 1} is neither of Kinetics' csv (label,youtube_id,time_start,time_end,split) "
            "nor of UCF101's lists (Class/file.avi 1)"
        ) from None
    return rows
