"""Frames of videos by number: seeking gives what decoding from the start gives, and odd files end in one line."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gn_det.data import clip_frames
from gn_det.data.clip_frames import ClipError, VideoFile
from gn_det.errors import ConfigError

av: Any = pytest.importorskip("av", reason="needs PyAV (extra video)")


def write_video(path: Path, *, frames: int = 30, times: list[int] | None = None, codec: str = "mpeg4") -> Path:
    """Frames of 64x48 pixels; frame k is gray, 8 k bright. ``times``: presentation in 1/30 s."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=30)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 64, 48, "yuv420p", 8
        stream.bit_rate = 10_000_000  # so that the brightness tells the frame
        for k in range(frames):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 8 * k % 256, np.uint8), format="rgb24")
            frame.pts, frame.time_base = times[k] if times else k, Fraction(1, 30)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def write_audio(path: Path) -> Path:
    """A file of sound alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def levels(frames: np.ndarray) -> list[int]:
    """Number of each frame, from its brightness."""
    return [round(float(f.mean()) / 8) for f in frames]


@pytest.mark.parametrize("ending", ["mp4", "avi", "mkv"])
def test_frames_by_number(tmp_path: Path, ending: str) -> None:
    """Also behind keyframes, out of order, twice, and modulo the length; the shorter side is scaled."""
    video = VideoFile(str(write_video(tmp_path / f"v.{ending}")))
    assert video.frames == 30
    frames = video.read([0, 29, 9, 9, 17, 31], 24)
    assert frames.shape == (6, 24, 32, 3) and frames.dtype == np.uint8
    assert levels(frames) == [0, 29, 9, 9, 17, 1]


def test_seeking_gives_what_decoding_from_the_start_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(write_video(tmp_path / "v.mp4"))
    videos = [VideoFile(path) for _ in range(26)]
    sought = [video.read(range(s, s + 4), 48) for s, video in enumerate(videos)]
    assert all(video._times for video in videos)  # none had to be decoded from the start
    monkeypatch.setattr(VideoFile, "_sought", lambda *_: {})
    assert all(np.array_equal(VideoFile(path).read(range(s, s + 4), 48), frames) for s, frames in enumerate(sought))


def test_variable_rate_and_one_frame(tmp_path: Path) -> None:
    """Frames count, not seconds."""
    uneven = [0, 1, 2, 30, 31, 90, 200, 201, 202, 400]
    video = VideoFile(str(write_video(tmp_path / "uneven.mkv", frames=10, times=uneven)))
    assert video.frames == 10 and levels(video.read(range(10), 48)) == list(range(10))
    one = VideoFile(str(write_video(tmp_path / "one.mp4", frames=1)))
    assert one.frames == 1 and levels(one.read([0, 2, 5], 48)) == [0, 0, 0]


def test_video_that_is_cut_short_ends_where_it_can_be_read(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.mkv")
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    video = VideoFile(str(path))
    frames = levels(video.read(range(30), 48))
    assert 5 < video.frames < 30
    assert frames == [k % video.frames for k in range(30)]


def test_first_video_stream_is_taken(tmp_path: Path) -> None:
    """Of two streams, the first; decoders that choose by size take the other."""
    path = tmp_path / "two.mkv"
    with av.open(str(path), "w") as container:
        streams = [container.add_stream("mpeg4", rate=30) for _ in range(2)]
        for stream, side in zip(streams, (32, 96)):
            stream.width = stream.height = side
            stream.pix_fmt = "yuv420p"
        for stream, side in zip(streams, (32, 96)):
            for k in range(5 if side == 32 else 9):
                frame = av.VideoFrame.from_ndarray(np.zeros((side, side, 3), np.uint8), format="rgb24")
                frame.pts, frame.time_base = k, Fraction(1, 30)
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    assert VideoFile(str(path)).frames == 5


def test_what_cannot_be_used_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "list.mp4").write_text("#EXTM3U\n#EXTINF:1,\n/etc/passwd\n")
    write_audio(tmp_path / "song.mp4")
    for name, message in (
        ("gone.mp4", "no such video"),
        ("empty.mp4", "cannot be read as a video"),
        ("list.mp4", "cannot be read as a video"),
        ("song.mp4", "has no video stream"),
        (".", "it is a folder"),
    ):
        with pytest.raises(ClipError, match=message) as caught:
            VideoFile(str(tmp_path / name))
        assert "\n" not in str(caught.value)


def test_frames_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(write_video(tmp_path / "v.mp4"))
    monkeypatch.setattr(clip_frames, "MAX_PIXELS", 64 * 48 - 1)
    with pytest.raises(ClipError, match="frames of 64x48 pixels are too large"):
        VideoFile(path)
    monkeypatch.setattr(clip_frames, "MAX_PIXELS", 64 * 48)
    with pytest.raises(ClipError, match="are too long"):  # scaled up
        VideoFile(path).read([0], 49)


def test_without_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    with pytest.raises(ConfigError, match=r"needs PyAV: pip install av"):
        VideoFile("a.mp4")
