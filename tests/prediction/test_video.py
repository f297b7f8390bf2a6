"""Videos, cameras and streams: every frame once and in order, resume, and hostile input in one line."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gn_det.config import get_cfg
from gn_det.config.defaults import set_value
from gn_det.data.video_frames import VideoFrames, is_video
from gn_det.errors import ConfigError, DataError, UserError, WriteError
from gn_det.prediction.predictor import Predictor
from gn_det.prediction.video import predict_videos
from gn_det.structures import Detections, Sample
from tests.prediction.test_images import fake

cv2 = pytest.importorskip("cv2", reason="needs OpenCV (extra video)")

SIZE = (96, 64)


def picture(number: int) -> np.ndarray:
    """A frame whose brightness is its number, with a white square that moves."""
    pixels = np.full((SIZE[1], SIZE[0], 3), 10 + 6 * number, np.uint8)
    pixels[20:36, 4 * number % 70 : 4 * number % 70 + 16] = 255
    return pixels


def write_clip(path: Path, frames: int = 20, code: str = "mp4v", fps: float = 10) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*code), fps, SIZE)
    for number in range(frames):
        writer.write(picture(number))
    writer.release()
    return path


def find_square(sample: Sample) -> Detections:
    """The white square, with the brightness of the ground as score."""
    pixels = sample["image"].numpy()[:, :, 0]
    mask = pixels > 220
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    box = torch.tensor([[columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]], dtype=torch.float32)
    score = torch.tensor([0.5 + float(np.median(pixels)) / 600])
    return Detections(pixels.shape, box, score, torch.zeros(1, dtype=torch.int64), torch.from_numpy(mask[None]))


SQUARE = fake(find_square)


def run(
    source: Any, output: Path, predictor: Predictor = SQUARE, **more: Any
) -> tuple[list[dict[str, Any]], list[str]]:
    said: list[str] = []
    predict_videos("w", [str(source)], output, predictor=predictor, report=said.append, **more)
    files = sorted(output.glob("*.jsonl"))
    return [json.loads(line) for line in files[0].read_text().splitlines()] if files else [], said


def frames_of(path: Path) -> tuple[int, float, tuple[int, int]]:
    with VideoFrames(str(path)) as video:
        pictures = list(video)
        return len(pictures), video.fps, (pictures[0].pixels.shape[1], pictures[0].pixels.shape[0])


@pytest.mark.parametrize(("suffix", "code"), [(".mp4", "mp4v"), (".avi", "MJPG")])
def test_every_frame_once_and_in_order(tmp_path: Path, suffix: str, code: str) -> None:
    """The square is where it was drawn, scores follow the brightness, and the film has as many frames."""
    clip = write_clip(tmp_path / f"clip{suffix}", code=code)
    (header, *lines), said = run(clip, tmp_path / "out")
    assert header["fps"] == 10 and header["categories"][0] == {"id": 7, "name": "Kreis"}
    assert [line["frame"] for line in lines] == list(range(20))
    assert [line["time"] for line in lines] == [round(n / 10, 6) for n in range(20)]
    lefts = [line["annotations"][0]["bbox"][0] for line in lines]
    assert np.abs(np.array(lefts) - [4 * n % 70 for n in range(20)]).max() <= 3
    scores = [line["annotations"][0]["score"] for line in lines]
    assert scores == sorted(scores) and "segmentation" in lines[0]["annotations"][0]
    number, fps, size = frames_of(tmp_path / "out" / "clip.mp4")
    assert (number, fps) == (20, 10) and size == (96 * 7, 64 * 7)
    assert said[-1].startswith(f"{clip}: 20 frames in ")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"clip.mp4", "clip.jsonl"}


def test_every_third_frame_and_a_limit(tmp_path: Path) -> None:
    """The film keeps the speed of the original."""
    clip = write_clip(tmp_path / "clip.mp4")
    (_, *lines), _ = run(clip, tmp_path / "a", every=3)
    assert [line["frame"] for line in lines] == [0, 3, 6, 9, 12, 15, 18]
    number, fps, _ = frames_of(tmp_path / "a" / "clip.mp4")
    assert number == 7 and fps == pytest.approx(10 / 3, rel=1e-3)
    (_, *lines), _ = run(clip, tmp_path / "b", max_frames=4, save=["coco"])
    assert len(lines) == 4 and [p.name for p in (tmp_path / "b").iterdir()] == ["clip.jsonl"]


def test_resume_detects_only_what_is_missing(tmp_path: Path) -> None:
    """After an interruption and a torn line: the same lines and film as in one go, and each frame detected once."""
    clip = write_clip(tmp_path / "clip.mp4")
    whole, _ = run(clip, tmp_path / "whole")
    calls: list[int] = []

    def interrupted(sample: Sample) -> Detections:
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return find_square(sample)

    with pytest.raises(KeyboardInterrupt):
        run(clip, tmp_path / "out", fake(interrupted))
    path = tmp_path / "out" / "clip.jsonl"
    done = len(path.read_text().splitlines()) - 1
    assert done == 7 and frames_of(tmp_path / "out" / "clip.mp4")[0] == 7  # what was written so far stays
    path.write_bytes(path.read_bytes() + b'{"frame": 7, "ti')
    calls[:] = [0] * 100
    lines, said = run(clip, tmp_path / "out", fake(interrupted), resume=True)
    assert lines == whole and len(calls) == 100 + 20 - done and "7 of them from the interrupted run" in said[-1]
    assert (tmp_path / "out" / "clip.mp4").read_bytes() == (tmp_path / "whole" / "clip.mp4").read_bytes()
    with pytest.raises(ConfigError, match="with other weights or settings"):
        run(clip, tmp_path / "out", resume=True, threshold=0.7)


@pytest.mark.parametrize(
    ("key", "value"), [("INPUT.MIN_SIZE_TEST", 64), ("TEST.AMP", True), ("MODEL.CHANNELS_LAST", True), ("", None)]
)
def test_resume_refuses_frames_of_another_config(tmp_path: Path, key: str, value: Any) -> None:
    """Also those of a file that does not say its config; paths of data and output do not matter."""
    clip = write_clip(tmp_path / "clip.mp4", 3)
    cfg = get_cfg()
    whole, _ = run(clip, tmp_path / "out", fake(find_square, config=cfg))
    other = get_cfg()
    other.OUTPUT_DIR = "elsewhere"
    assert run(clip, tmp_path / "out", fake(find_square, config=other), resume=True)[0] == whole
    if key:
        set_value(other, key, value)
    else:
        path = tmp_path / "out" / "clip.jsonl"
        first, _, rest = path.read_text().partition("\n")
        header = json.loads(first)
        del header["run"]["config"]
        path.write_text(json.dumps(header) + "\n" + rest)
    with pytest.raises(
        ConfigError, match=r"clip\.jsonl: was made from another video or with other weights or settings"
    ):
        run(clip, tmp_path / "out", fake(find_square, config=other), resume=True)


DAMAGED_MASK = '{"bbox": [1, 2, 3, 4], "score": 1, "category_id": 7, "segmentation": {"size": [9, 9], "counts": "~"}}'


@pytest.mark.parametrize(
    "line",
    [
        "3",
        '{"frame": 1, "annotations": [{"bbox": [1]}]}',
        '{"frame": "x"}',
        f'{{"frame": 1, "annotations": [{DAMAGED_MASK}]}}',
    ],
)
def test_resume_refuses_lines_that_are_no_frames(tmp_path: Path, line: str) -> None:
    clip = write_clip(tmp_path / "clip.mp4", 3)
    run(clip, tmp_path / "out")
    path = tmp_path / "out" / "clip.jsonl"
    path.write_text(path.read_text().splitlines()[0] + f"\n{line}\n")
    with pytest.raises(DataError, match="line 2: is not a frame"):
        run(clip, tmp_path / "out", resume=True)


class Camera:
    """A capture that gives a frame every 10 ms, 30 in all, the last ones of another size."""

    opened: Any = None

    def __init__(self, source: int) -> None:
        Camera.opened, self.number = source, 0

    def isOpened(self) -> bool:
        return Camera.opened == 0

    def get(self, _: int) -> float:
        return 0.0

    def grab(self) -> bool:
        return True

    def read(self) -> tuple[bool, np.ndarray | None]:
        time.sleep(0.01)
        self.number += 1
        if self.number > 30:
            return False, None
        return True, picture(self.number) if self.number < 25 else np.repeat(picture(self.number), 2, axis=0)

    def release(self) -> None:
        Camera.opened = None


def test_a_camera_gives_its_newest_frame(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model slower than the camera drops frames and says how many; a change of size is mentioned."""
    monkeypatch.setattr(cv2, "VideoCapture", Camera)

    def slow(sample: Sample) -> Detections:
        time.sleep(0.05)
        return find_square(sample)

    (header, *lines), said = run("0", tmp_path / "out", fake(slow))
    numbers = [line["frame"] for line in lines]
    assert numbers == sorted(set(numbers)) and 2 <= len(numbers) < 30 and header["video"] == "0"
    assert any("came faster than the model and were dropped" in line for line in said)
    assert Camera.opened is None and (tmp_path / "out" / "camera-0.jsonl").is_file()
    with pytest.raises(ConfigError, match="cannot be resumed"):
        run("0", tmp_path / "out", resume=True)
    with pytest.raises(DataError, match="7: no such camera"):
        run("7", tmp_path / "out")


def test_frames_that_change_their_size_are_scaled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    with VideoFrames("0") as video:
        sizes = {frame.pixels.shape for frame in video}
    assert sizes == {(64, 96, 3)}
    assert video.notes == [] or "frame size changes" in video.notes[0]


@pytest.fixture
def server() -> Iterator[str]:
    """Motion JPEG over HTTP, as network cameras send it: 15 frames, then the end."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
            self.end_headers()
            for number in range(15):
                file = io.BytesIO()
                Image.fromarray(picture(number)).save(file, "JPEG")
                head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(file.getvalue())}\r\n\r\n"
                self.wfile.write(head.encode() + file.getvalue() + b"\r\n")
                time.sleep(0.02)

        def log_message(self, *_: object) -> None: ...

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()


def test_a_stream(tmp_path: Path, server: str) -> None:
    (_, *lines), _ = run(f"{server}/cam.mjpg", tmp_path / "out")
    assert lines and all(len(line["annotations"]) == 1 for line in lines)
    assert frames_of(tmp_path / "out" / "stream.mp4")[0] == len(lines)


def test_a_stream_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no video from this address"):
        run("http://127.0.0.1:9/none", tmp_path / "out")


def test_hostile_files_are_one_line(tmp_path: Path, server: str) -> None:
    """No video, an empty one, a torn one, none, a folder, a playlist that would open an address."""
    clip = write_clip(tmp_path / "good.mp4")
    cases = {
        "text.mp4": (b"no video at all" * 100, "cannot be read as a video"),
        "empty.mp4": (b"", "cannot be read as a video"),
        "torn.mp4": (clip.read_bytes()[:900], "cannot be read as a video|no frame can be decoded"),
        "list.mp4": (f"#EXTM3U\n#EXTINF:1,\n{server}/cam.mjpg\n".encode(), "cannot be read as a video"),
        "concat.mp4": (f"ffconcat version 1.0\nfile {clip.name}\n".encode(), "cannot be read as a video"),
    }
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=message) as raised:
            run(tmp_path / name, tmp_path / "out")
        assert "\n" not in str(raised.value) and name in str(raised.value)
    with pytest.raises(DataError, match="no such video"):
        run(tmp_path / "none.mp4", tmp_path / "out")
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(DataError, match="it is a folder"):
        run(tmp_path / "folder.mp4", tmp_path / "out")
    with pytest.raises(ConfigError, match="would overwrite an input"):
        run(clip, tmp_path)
    other = tmp_path / "other" / clip.name  # its film would take the place of the second video
    other.parent.mkdir()
    other.write_bytes(clip.read_bytes())
    with pytest.raises(ConfigError, match="would overwrite an input"):
        predict_videos("w", [str(other), str(clip)], tmp_path, predictor=SQUARE)
    with pytest.raises(ConfigError, match="for videos, use drawings, coco or both"):
        run(clip, tmp_path / "out", save=["yolo"])
    assert list((tmp_path / "out").glob("*.mp4")) == []


def test_a_film_that_cannot_be_written_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clip = write_clip(tmp_path / "clip.mp4")
    monkeypatch.setattr("gn_det.prediction.video._CODEC", "ZZZZ")
    with pytest.raises(WriteError, match="cannot write a video of 672x448 pixels with the codec ZZZZ"):
        run(clip, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["clip.jsonl"]


def test_a_rate_that_mpeg4_cannot_write_is_rounded(tmp_path: Path) -> None:
    """69.857 frames a second as 69857/1000 exceeds MPEG-4's 65535."""
    clip = write_clip(tmp_path / "clip.avi", code="MJPG", fps=69.857)
    run(clip, tmp_path / "out")
    assert frames_of(tmp_path / "out" / "clip.mp4")[0] == frames_of(clip)[0]


def test_frames_beyond_the_limit_of_pixels(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.mp4")
    with pytest.raises(DataError, match=r"frames of 96x64 pixels are larger than INPUT\.MAX_PIXELS \(1000\)"):
        VideoFrames(str(clip), max_pixels=1000)


def test_a_torn_video_gives_its_first_frames(tmp_path: Path) -> None:
    clip = write_clip(tmp_path / "clip.avi", 40, "MJPG")
    data = clip.read_bytes()
    clip.write_bytes(data[: len(data) // 2])
    try:
        lines, said = run(clip, tmp_path / "out")
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert (1 < len(lines) < 40 and any(line.startswith("note") for line in said)) or len(lines) > 10


def test_what_is_a_video(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert all(map(is_video, ("0", "12", "a/b.MP4", "rtsp://x/y", "https://x/y", "c.mkv")))
    assert not any(map(is_video, ("a.jpg", "folder", "123", "*.png", "-1", "x://y")))
    (tmp_path / "0").mkdir()
    assert not is_video("0")
