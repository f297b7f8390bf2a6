"""Detect objects in videos, cameras and streams; write an annotated video, and one line of json per frame."""

from __future__ import annotations

import hashlib
import json
import operator
import os
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice, repeat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gn_det.checkpoint.weights_uri import local_path, sha256_of
from gn_det.config.load import Overrides
from gn_det.data.annotations import Defect
from gn_det.data.formats.draft import crop_of_rle
from gn_det.data.inputs import output_names
from gn_det.data.video_frames import Frame, VideoFrames, import_cv2
from gn_det.errors import ConfigError, DataError, WriteError
from gn_det.files import check_writable, open_append
from gn_det.prediction.images import entries_of, named_folder, refuse_to_overwrite
from gn_det.prediction.pipeline import AHEAD, in_thread
from gn_det.prediction.predictor import Predictor, Selection, crops_of, load_predictor
from gn_det.structures import ArrayDetections, MaskCrop
from gn_det.terminal import say
from gn_det.text import count, shown
from gn_det.visualize.draw import Colors, Labels, draw_detections

#: Codec and extension of annotated videos, supported by every build of OpenCV.
_CODEC, _SUFFIX = "mp4v", ".mp4"
#: Seconds between two lines of progress.
_PROGRESS = 10.0
#: Frames of a live source after which its actual frame rate is measured.
_WARM_UP = 5


class _Work(NamedTuple):
    """A frame and its detections; ``known`` if they come from an interrupted run."""

    frame: Frame
    found: ArrayDetections
    crops: list[MaskCrop] | None
    known: bool


def predict_videos(
    weights: str | os.PathLike[str],
    sources: Sequence[str],
    output: str | os.PathLike[str],
    *,
    threshold: float | None = None,
    classes: Sequence[str] | None = None,
    agnostic_nms: bool = False,
    save: Sequence[str] = ("drawings", "coco"),
    labels: Labels = "fit",
    colors: Colors = "class",
    every: int = 1,
    max_frames: int | None = None,
    resume: bool = False,
    config: str | None = None,
    overrides: Overrides = (),
    device: str = "auto",
    predictor: Predictor | None = None,
    report: Callable[[str], None] = say,
) -> None:
    """Detect objects in each video; write ``NAME.mp4`` (drawings) and ``NAME.jsonl`` (coco) to ``output``.

    The first line of ``NAME.jsonl`` describes the video and the run, each further line is a frame: ``frame`` (its
    number), ``time`` (seconds) and ``annotations`` as in ``predictions.json``.

    Args:
        sources: video files, cameras by number, addresses of streams.
        every: process only every n-th frame; the output plays at the original speed.
        max_frames: stop after this many frames; None reads to the end.
        resume: reuse the detections of an interrupted run; frames are drawn again.
        weights, output, threshold, classes, agnostic_nms, save, labels, colors, config, overrides, device, predictor,
            report: as for :func:`gn_det.prediction.images.predict`.

    Raises:
        UserError: a video cannot be opened, an output cannot be written, or a run cannot be resumed. Output written so
            far is kept.
    """
    if not save or not {"drawings", "coco"}.issuperset(save):
        raise ConfigError(f"--save {shown(','.join(save))}: for videos, use drawings, coco or both")
    folder = check_writable(named_folder(output), "--output")
    names = output_names([Path(_stem(source)) for source in sources], _SUFFIX)
    predictor = predictor or load_predictor(weights, config=config, overrides=overrides, device=device, report=report)
    keep = Selection.of(predictor, threshold, classes, agnostic_nms)
    known = predictor.module is not None or os.path.isfile(weights)
    run = {
        "weights": sha256_of(local_path(weights)) if known else os.fspath(weights),
        "threshold": keep.threshold,
        "classes": None if keep.wanted is None else sorted(keep.wanted),
        "agnostic_iou": keep.agnostic_iou,
        "every": every,
    }
    if (cfg := predictor.config) is not None:  # what an exported file fixes is part of its sha256
        decisive = json.dumps([cfg.INPUT, cfg.MODEL, cfg.TEST, cfg.SOLVER.AMP.DTYPE], sort_keys=True)
        run["config"] = hashlib.sha256(decisive.encode()).hexdigest()[:16]
    draw = partial(draw_detections, class_names=predictor.class_names, labels=labels, colors=colors)
    refuse_to_overwrite(folder, [Path(source) for source in sources if os.path.exists(source)], names)
    for source, name in zip(sources, names):
        with VideoFrames(source, every=every, max_pixels=predictor.reader.max_pixels) as video:
            if resume and video.live:
                raise ConfigError(f"{video.name}: a camera or stream cannot be resumed; leave out --resume")
            _VideoJob(video, predictor, keep, folder / name, draw, report).run(run, save, resume, max_frames)


def _stem(source: str) -> str:
    """Return the base name of the outputs: that of the file, ``camera-0`` or ``stream``."""
    if "://" in source:
        return "stream"
    return f"camera-{source}.x" if source.isdigit() and not os.path.exists(source) else source


@dataclass
class _VideoJob:
    """One video: read (thread), detect (caller's thread), draw and write (thread)."""

    video: VideoFrames
    predictor: Predictor
    keep: Selection
    target: Path
    draw: Callable[..., np.ndarray]  # draw_detections with the names of the classes
    report: Callable[[str], None]

    def run(self, settings: dict[str, Any], save: Sequence[str], resume: bool, max_frames: int | None) -> None:
        """Process the video; after an error or interruption, the output so far is kept."""
        categories = [{"id": i, "name": n} for i, n in zip(self.predictor.category_ids, self.predictor.class_names)]
        header = {"video": self.video.name, "fps": self.video.fps, "categories": categories, "run": settings}
        if resume and "coco" not in save:
            raise ConfigError("--resume needs the json lines of the interrupted run; add coco to --save")
        started = said = time.perf_counter()
        done = objects = 0
        with ExitStack() as stack:
            enter, path = stack.enter_context, self.target.with_suffix(".jsonl")
            lines = enter(closing(_Lines(path, header, resume))) if "coco" in save else None
            known = lines.known if lines is not None else {}
            film = enter(closing(_Film(self.target, self.video))) if "drawings" in save else None
            detected = islice(enter(closing(self._detected(known))), max_frames)
            write = partial(self._write, film=film, lines=lines)
            for writing in enter(closing(in_thread(write, detected, finish=True))):
                work = writing.result()
                done, objects, now = done + 1, objects + len(work.found), time.perf_counter()
                if now - said >= _PROGRESS:
                    said = now
                    total = "" if self.video.total is None else f" of {self.video.total}"
                    speed = done / (now - started)
                    self.report(f"{self.video.name}: frame {work.frame.number + 1}{total}, {speed:.1f} fps")
        for note in self.video.notes:
            self.report(f"note: {self.video.name}: {note}")
        if self.video.dropped:
            dropped = count(self.video.dropped, "frame")
            self.report(f"note: {self.video.name}: {dropped} came faster than the model and were dropped")
        seconds = time.perf_counter() - started
        reused = f", {len(known):,} of them from the interrupted run" if known else ""
        self.report(
            f"{self.video.name}: {count(done, 'frame')} in {seconds:.1f} s ({done / seconds:.1f} fps{reused}), "
            f"{count(objects, 'object')}; {', '.join(save)} in {self.target.parent}"
        )

    def _detected(self, known: dict[int, list[dict[str, Any]]]) -> Generator[_Work, None, None]:
        """Yield frames with their detections, in order."""
        # A live source returns its newest frame on request, so do not request early.
        ahead = 0 if self.video.live else AHEAD
        frames = iter(self.video)

        def load(_: None) -> tuple[Frame | None, Any]:
            frame = next(frames, None)
            return frame, None if frame is None or frame.number in known else self.predictor.sample(frame.pixels)

        loading = in_thread(load, repeat(None), ahead)
        try:
            for future in loading:
                frame, given = future.result()
                if frame is None:
                    return
                if frame.number in known:
                    size = frame.pixels.shape[0], frame.pixels.shape[1]
                    found, crops = _remembered(known[frame.number], self.predictor.category_ids, size)
                else:
                    found = self.keep(self.predictor.infer(given))
                    crops, found.masks = crops_of(found), None
                yield _Work(frame, found, crops, frame.number in known)
        finally:  # no thread may read the video after it is closed
            loading.close()
            frames.close()

    def _write(self, work: _Work, film: _Film | None, lines: _Lines | None) -> _Work:
        if film is not None:
            film.add(self.draw(work.frame.pixels, work.found, crops=work.crops))
        if lines is not None and not work.known:
            entries = entries_of(work.found, work.crops, self.predictor)
            lines.add({"frame": work.frame.number, "time": round(work.frame.seconds, 6), "annotations": entries})
        return work


class _Lines:
    """The json lines of a video; ``known`` are the annotations of an interrupted run by frame."""

    def __init__(self, path: Path, header: dict[str, Any], resume: bool) -> None:
        self._path = path
        self.known: dict[int, list[dict[str, Any]]] = {}
        if resume and path.is_file():
            self._read(json.loads(json.dumps(header)))
        else:
            path.unlink(missing_ok=True)
        with self._naming_file():
            self._file = open_append(path.parent, path.name)
        if path.stat().st_size == 0:
            self.add(header)

    def _read(self, header: dict[str, Any]) -> None:
        """Read the complete lines of an earlier run, and cut off an incomplete last one."""
        end, category_ids = 0, [c["id"] for c in header["categories"]]
        with self._path.open("rb") as file:
            for number, raw in enumerate(file, 1):
                try:
                    line = json.loads(raw) if raw.endswith(b"\n") else None
                except ValueError:
                    line = None
                if line is None:
                    break
                if number == 1 and line != header:
                    raise ConfigError(
                        f"{self._path}: was made from another video or with other weights or settings, or by another "
                        f"version of gn-det; use these again, or leave out --resume to start over"
                    )
                if number > 1:
                    try:
                        _remembered(line["annotations"], category_ids, (1, 1))
                        self.known[operator.index(line["frame"])] = line["annotations"]
                    except (TypeError, KeyError, ValueError, OverflowError, Defect):
                        what = f"{self._path} line {number}: is not a frame; leave out --resume to start over"
                        raise DataError(what) from None
                end += len(raw)
        os.truncate(self._path, end)

    def add(self, line: dict[str, Any]) -> None:
        with self._naming_file():
            self._file.write(json.dumps(line) + "\n")
            self._file.flush()

    @contextmanager
    def _naming_file(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise WriteError(f"{self._path}: cannot be written ({error.strerror})") from None

    def close(self) -> None:
        self._file.close()


def _remembered(
    entries: list[dict[str, Any]], category_ids: Sequence[int], size: tuple[int, int]
) -> tuple[ArrayDetections, list[MaskCrop] | None]:
    """Return the detections of a line that :class:`_VideoJob` wrote; another line raises the errors of a wrong type."""
    index = {category: i for i, category in enumerate(category_ids)}
    boxes = np.array([a["bbox"] for a in entries], np.float32).reshape(len(entries), 4)
    boxes[:, 2:] += boxes[:, :2]
    scores = np.array([float(a["score"]) for a in entries], np.float32)
    classes = np.array([index[a["category_id"]] for a in entries], np.int64)
    crops = [crop_of_rle(a["segmentation"]) for a in entries if "segmentation" in a]
    return ArrayDetections(size, boxes, scores, classes), crops if len(crops) == len(entries) else None


class _Film:
    """The annotated video, written to a temporary file and moved into place when closed."""

    def __init__(self, path: Path, video: VideoFrames) -> None:
        self._cv2, self._path, self._video = import_cv2(), path, video
        self._part = path.with_name(f".{path.stem}.part{_SUFFIX}")
        self._writer: Any = None
        self._waiting: list[np.ndarray] = []
        self._started = time.perf_counter()

    def add(self, pixels: np.ndarray) -> None:
        """Append a frame; the frame rate of a live source is measured on the first frames."""
        self._waiting.append(pixels)
        if self._writer is not None or not self._video.live or len(self._waiting) >= _WARM_UP:
            self._write()

    def _write(self) -> None:
        frames, self._waiting = self._waiting, []
        self._writer = self._writer or self._open(frames)
        for frame in frames:
            self._writer.write(np.ascontiguousarray(frame[:, :, ::-1]))

    def _open(self, frames: Sequence[np.ndarray]) -> Any:
        fps = self._video.fps / self._video.every
        if self._video.live:
            fps = len(frames) / max(time.perf_counter() - self._started, 1e-3)
        height, width = frames[0].shape[:2]
        code = self._cv2.VideoWriter.fourcc(*_CODEC)
        # MPEG-4 has fractions of up to 65535: OpenCV would write 69.857 frames a second as 69857/1000, and fail.
        fps = min(max(fps, 0.1), 240.0)
        fps = round(fps, 3 if fps < 65 else 2)
        writer = self._cv2.VideoWriter(os.fspath(self._part), code, fps, (width, height))
        if not writer.isOpened():
            self._part.unlink(missing_ok=True)
            raise WriteError(
                f"{self._path}: OpenCV cannot write a video of {width}x{height} pixels with the codec {_CODEC} there; "
                f"check the folder, or use --save coco"
            )
        return writer

    def close(self) -> None:
        """Write what waits (a live source may give only a few frames), and move the film into place."""
        if self._waiting:
            self._write()
        if self._writer is not None:
            self._writer.release()
            if self._part.exists():
                os.replace(self._part, self._path)
