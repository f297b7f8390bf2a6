"""Read frames of video files, cameras and streams with OpenCV, which is imported on use."""

from __future__ import annotations

import math
import os
import re
import threading
from collections.abc import Generator, Iterator
from contextlib import suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

import numpy as np

from gn_det.data.image import MAX_PIXELS
from gn_det.errors import ConfigError, DataError
from gn_det.files import check_regular
from gn_det.text import one_line

VIDEO_SUFFIXES = frozenset(
    {".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".ts", ".mts", ".wmv", ".flv", ".ogv", ".3gp"}
)
_STREAM = re.compile(r"(rtsp|rtsps|rtmp|http|https|udp|tcp)://", re.IGNORECASE)
#: FFmpeg demuxers that a file may use: none that opens further files or addresses (playlists).
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,avi,matroska,webm,mpeg,mpegts,mpegvideo,asf,flv,ogg,m4v,h264,hevc,mjpeg"
#: Where OpenCV reads options for FFmpeg.
_OPTIONS = "OPENCV_FFMPEG_CAPTURE_OPTIONS"
#: Milliseconds to wait for a stream.
_PATIENCE = 10_000
#: Assumed frame rate if the video does not state it.
_FPS = 25.0


class Frame(NamedTuple):
    """``number`` counts from 0; ``seconds`` from the start; ``pixels`` (H, W, 3) uint8 RGB."""

    number: int
    seconds: float
    pixels: np.ndarray


def is_video(word: str) -> bool:
    """Return whether an input names a video: a file extension, a camera number, or a stream address."""
    return _is_live(word) or Path(word).suffix.lower() in VIDEO_SUFFIXES


def _is_live(word: str) -> bool:
    """Return whether an input is a stream's address, or the number of a camera and no file."""
    return bool(_STREAM.match(word) or (re.fullmatch(r"\d{1,2}", word) and not os.path.exists(word)))


def check_video(path: str, name: str, error: type[DataError] = DataError) -> None:
    """Raise ``error``, naming the video ``name``, unless ``path`` is a regular file."""
    try:
        check_regular(path)
    except FileNotFoundError:
        raise error(f"{name}: no such video") from None
    except (OSError, ValueError) as problem:
        raise error(f"{name}: {problem.strerror if isinstance(problem, OSError) else problem}") from None


def import_cv2() -> Any:
    """Import OpenCV with its own messages silenced; raise ConfigError if it is not installed."""
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
    try:
        import cv2
    except ImportError:
        raise ConfigError("videos need OpenCV: pip install opencv-python-headless") from None
    cv2.utils.logging.setLogLevel(0)
    return cv2


class VideoFrames:
    """An open video; iterating yields every ``every``-th frame. Close it, or use it as a context manager.

    Attributes:
        name: for messages.
        live: whether it is a camera or stream, which has no end and drops frames that are not read in time.
        fps: frames per second, counting every frame.
        total: number of frames stated by the file, or None.
        dropped: number of frames of a live source that were not read.
        notes: irregularities.
    """

    def __init__(self, source: str, *, every: int = 1, max_pixels: int = MAX_PIXELS) -> None:
        """Open a file, a camera by its number, or a stream by its address.

        Raises:
            ConfigError: OpenCV is not installed.
            DataError: it does not exist or cannot be opened.
        """
        self._cv2 = import_cv2()
        self.every, self._limit = every, max_pixels
        self.live = _is_live(source)
        self.name = one_line(source, 200)
        self.dropped = 0
        self.notes: list[str] = []
        self._capture = self._open(source)
        if not self._capture.isOpened():
            self._capture.release()
            raise DataError(f"{self.name}: {self._advice(source)}")
        names = ("FPS", "FRAME_COUNT", "FRAME_WIDTH", "FRAME_HEIGHT")
        fps, total, width, height = (self._capture.get(getattr(self._cv2, f"CAP_PROP_{name}")) for name in names)
        self.fps = fps if 0 < fps <= 1000 else _FPS
        self.total = int(total) if not self.live and math.isfinite(total) and 0 < total < 2**40 else None
        if width * height > max_pixels:
            self.close()
            raise DataError(
                f"{self.name}: frames of {width:.0f}x{height:.0f} pixels are larger than INPUT.MAX_PIXELS "
                f"({max_pixels}): make the video smaller, or raise INPUT.MAX_PIXELS if you trust it"
            )

    def _open(self, source: str) -> Any:
        cv2 = self._cv2
        if _STREAM.match(source):
            timeouts = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, _PATIENCE, cv2.CAP_PROP_READ_TIMEOUT_MSEC, _PATIENCE]
            return cv2.VideoCapture(source, cv2.CAP_FFMPEG, timeouts)
        if self.live:
            return cv2.VideoCapture(int(source))
        check_video(source, self.name)
        before = os.environ.get(_OPTIONS)
        os.environ[_OPTIONS] = f"protocol_whitelist;file|format_whitelist;{CONTAINERS}"
        try:
            return cv2.VideoCapture(os.path.abspath(source), cv2.CAP_FFMPEG)
        finally:
            del os.environ[_OPTIONS]
            if before is not None:
                os.environ[_OPTIONS] = before

    def _advice(self, source: str) -> str:
        if _STREAM.match(source):
            return f"no video from this address within {_PATIENCE // 1000} s; check it with a player such as ffplay"
        if self.live:
            return "no such camera; check its number and that nothing else uses it"
        return "cannot be read as a video; convert it, for example with ffmpeg -i IN OUT.mp4"

    def __enter__(self) -> VideoFrames:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the file, camera or stream."""
        self._capture.release()

    def __iter__(self) -> Generator[Frame, None, None]:
        """Yield frames of one size until the video ends.

        Raises:
            DataError: the video has no frame that can be decoded.
        """
        frames = _latest(self) if self.live else self._frames()
        size: tuple[int, ...] = ()
        number = -1
        for number, seconds, pixels in frames:
            if not size:
                size = pixels.shape
            elif pixels.shape != size:
                if not any("size" in note for note in self.notes):
                    self.notes.append(f"frame size changes at frame {number}; later frames are scaled to the first one")
                pixels = self._cv2.resize(pixels, (size[1], size[0]), interpolation=self._cv2.INTER_AREA)
            yield Frame(number, seconds, np.ascontiguousarray(pixels[:, :, ::-1]))
        if number < 0:
            raise DataError(f"{self.name}: no frame can be decoded")
        if self.total is not None and number + self.every < 0.9 * self.total:
            self.notes.append(f"ends after {number + 1} of {self.total} frames; the rest cannot be decoded")

    def _frames(self) -> Iterator[Frame]:
        """Yield BGR frames in order, without decoding the skipped ones if possible."""
        number = 0
        while True:
            if number % self.every:
                if not self._capture.grab():
                    return
            else:
                good, pixels = self._capture.read()
                if not good or pixels is None or pixels.ndim != 3 or pixels.shape[0] * pixels.shape[1] > self._limit:
                    return
                yield Frame(number, number / self.fps, pixels)
            number += 1


def _latest(video: VideoFrames) -> Iterator[Frame]:
    """Yield the newest frame on each request; a thread reads all frames, so that none gets stale in a buffer."""
    newest: SimpleQueue[Frame | None] = SimpleQueue()  # at most one frame, and None at the end
    stopped = threading.Event()

    def read() -> None:
        try:
            for frame in video._frames():
                with suppress(Empty):
                    newest.get_nowait()
                    video.dropped += 1
                newest.put(frame)
                if stopped.is_set():
                    return
        finally:
            newest.put(None)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        while True:
            with suppress(Empty):
                frame = newest.get(timeout=0.2)  # wakes up regularly, so that Ctrl-C works
                if frame is None:
                    return
                yield frame
    finally:
        stopped.set()
        thread.join(timeout=_PATIENCE / 1000)
