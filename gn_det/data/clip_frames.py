"""Read frames of a video file by number with PyAV, which needs only its wheel and is imported on use.

Decoders differ in what they return for a file. Here a video is its first video stream that is not a cover picture, and
its frames are those that can be decoded, in presentation order. So a file with variable frame rate has no repeated or
dropped frames, and a truncated one ends where it can no longer be read.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import islice
from typing import Any

import numpy as np

from gn_det.data.image import MAX_PIXELS
from gn_det.data.video_frames import CONTAINERS, check_video
from gn_det.errors import ConfigError, DataError
from gn_det.text import one_line


class ClipError(DataError):
    """An unusable video; the message names the file."""


def import_av() -> Any:
    """Import PyAV with its own messages silenced; raise ConfigError if it is not installed."""
    try:
        import av
    except ImportError:
        raise ConfigError("training on videos needs PyAV: pip install av (or gn-det[video])") from None
    av.logging.set_level(av.logging.PANIC)
    return av


class VideoFile:
    """The frames of a video file.

    Attributes:
        frames: number of frames.
    """

    def __init__(self, path: str) -> None:
        """Open the file and find its frames.

        Raises:
            ConfigError: PyAV is not installed.
            ClipError: no such file, no video, or no frame that can be decoded.
        """
        self._av, self._path, self.name = import_av(), os.path.abspath(path), one_line(path, 300)
        check_video(path, self.name, ClipError)
        self._times = self._presented()
        self.frames = len(self._times) or self._count()

    def read(self, numbers: Sequence[int], side: int) -> np.ndarray:
        """Return frames ``numbers``, modulo :attr:`frames`, with the shorter side scaled to ``side`` pixels.

        Returns:
            (T, H, W, 3) uint8 RGB.

        Raises:
            ClipError: they cannot be decoded.
        """
        wanted = {number % self.frames for number in numbers}
        found = self._sought(wanted, side) if self._times else {}
        if len(found) < len(wanted):  # damaged, or a container that cannot seek: use what can be decoded
            self.frames, self._times = self._count(), []
            wanted = {number % self.frames for number in numbers}
            scale = self._scaler(side)
            decoded = enumerate(islice(self._from_start(), max(wanted) + 1))
            found = {k: scale(frame) for k, frame in decoded if k in wanted}
        return np.stack([found[number % self.frames] for number in numbers])

    # ------------------------------------------------------------ decoding

    @contextmanager
    def _opened(self) -> Iterator[tuple[Any, Any]]:
        """The container and its video stream."""
        av = self._av
        options = {"protocol_whitelist": "file", "format_whitelist": CONTAINERS}
        try:
            container = av.open(self._path, options=options, metadata_errors="replace")
        except (av.FFmpegError, OSError, ValueError) as error:
            reason = one_line(getattr(error, "strerror", None) or error, 100)
            raise ClipError(f"{self.name}: cannot be read as a video ({reason})") from None
        with closing(container):
            cover = av.stream.Disposition.attached_pic
            stream = next((s for s in container.streams.video if not s.disposition & cover), None)
            if stream is None or stream.codec_context is None:
                raise ClipError(f"{self.name}: has no video stream that can be decoded")
            if stream.width * stream.height > MAX_PIXELS:
                raise ClipError(f"{self.name}: frames of {stream.width}x{stream.height} pixels are too large")
            stream.codec_context.thread_count = 1  # workers are many
            yield container, stream

    def _presented(self) -> list[int]:
        """Times of all frames in order, by the packets alone; [] where these do not say it."""
        with self._opened() as (container, stream):
            try:
                times = [p.pts for p in container.demux(stream) if p.size and not p.is_discard]
            except (self._av.FFmpegError, OSError, ValueError):
                return []
        return sorted(times) if None not in times and len(set(times)) == len(times) else []

    def _decoded(self, container: Any, stream: Any) -> Iterator[Any]:
        """Frames from where the container is; packets that cannot be decoded are left out."""
        packets = container.demux(stream)
        while True:
            try:
                frames = next(packets).decode()
            except (StopIteration, EOFError, OSError):
                return
            except self._av.FFmpegError:
                continue
            yield from frames

    def _count(self) -> int:
        frames = sum(1 for _ in self._from_start())
        if not frames:
            raise ClipError(f"{self.name}: no frame can be decoded")
        return frames

    def _from_start(self) -> Iterator[Any]:
        with self._opened() as (container, stream):
            yield from self._decoded(container, stream)

    def _sought(self, wanted: Collection[int], side: int) -> dict[int, np.ndarray]:
        """Frames by number, decoded from the last keyframe before them."""
        numbers = {time: number for number, time in enumerate(self._times)}
        found: dict[int, np.ndarray] = {}
        scale, last = self._scaler(side), max(wanted)
        with self._opened() as (container, stream):
            try:
                container.seek(self._times[min(wanted)], stream=stream)
            except (self._av.FFmpegError, OSError, ValueError):
                return {}
            for frame in self._decoded(container, stream):
                number = numbers.get(frame.pts)
                if number is not None and number in wanted:
                    found[number] = scale(frame)
                if len(found) == len(wanted) or (number is not None and number > last):
                    break
        return found

    def _scaler(self, side: int) -> Any:
        """A function from a frame to (H, W, 3) uint8 RGB; all have the size of the first one."""
        reformatter = self._av.video.reformatter.VideoReformatter()
        size: list[int] = []

        def scale(frame: Any) -> np.ndarray:
            if not size:
                short = min(frame.width, frame.height)
                size.extend(side * edge // short for edge in (frame.width, frame.height))
                if size[0] * size[1] > MAX_PIXELS:
                    raise ClipError(f"{self.name}: frames of {frame.width}x{frame.height} pixels are too long")
            try:
                made = reformatter.reformat(frame, *size, "rgb24", interpolation="BILINEAR").to_ndarray()
            except (self._av.FFmpegError, ValueError) as error:
                raise ClipError(f"{self.name}: its pixels cannot be read ({one_line(error, 100)})") from None
            return np.rot90(made, round(frame.rotation / 90))

        return scale
