"""Decoding every image of a dataset on all cores, in processes that a broken picture may take down."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, TimeoutError
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

from PIL import Image

from gn_det.data.image import ImageError, ImageReader, one_colour
from gn_det.data.mapper import read_record_image
from gn_det.data.records import Record
from gn_det.files import open_regular
from gn_det.parent_watch import end_with_parent

#: Images that a process takes at once: enough that handing them over costs nothing.
_CHUNK = 16
#: An image that takes longer is taken for damaged.
SECONDS = 60.0


class DecodeJob(NamedTuple):
    """One file and what it should be."""

    path: str
    width: int
    height: int
    reader: ImageReader


class Decoded(NamedTuple):
    """What became of one file.

    ``kind`` is empty for a good picture, a key of ``KINDS`` otherwise; ``digest`` is the hash of the file, empty where
    it cannot be read.
    """

    kind: str
    text: str
    digest: bytes


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def digest_of(path: str) -> bytes:
    """Content hash of a file; empty where it cannot be read."""
    try:
        with open_regular(path) as file:
            hasher = hashlib.blake2b(digest_size=16)
            while block := file.read(1 << 20):
                hasher.update(block)
            return hasher.digest()
    except (OSError, ValueError):
        return b""


def decode(job: DecodeJob) -> Decoded:
    """Decode one image as training does."""
    record = Record(file_name=job.path, width=job.width, height=job.height)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pixels = read_record_image(record, job.reader)
    except ImageError as error:
        return Decoded(error.kind, error.text, digest_of(job.path))
    if one_colour(pixels):
        value = ", ".join(dict.fromkeys(str(v) for v in pixels[0, 0].tolist()))
        return Decoded("image-constant", value, digest_of(job.path))
    return Decoded(*_checksum_problem(job.path), digest_of(job.path))


def _checksum_problem(path: str) -> tuple[str, str]:
    """Pillow decodes a PNG without looking at the checksums after its pixels; those of the pixels our reader checks."""
    try:
        with open_regular(path) as file:
            if file.read(8) != b"\x89PNG\r\n\x1a\n":
                return "", ""
            file.seek(0)
            with warnings.catch_warnings(), Image.open(file) as image:
                warnings.simplefilter("ignore")
                image.verify()
    except Exception as error:
        return "image-checksum", f"{path}: {error}: get this file again"
    return "", ""


def _decode_chunk(jobs: Sequence[DecodeJob]) -> list[Decoded]:
    return [decode(job) for job in jobs]


def decode_all(jobs: Sequence[DecodeJob], workers: int | None = None) -> Iterator[Decoded]:
    """Results in the order of ``jobs``. A picture that kills or holds up the decoder is one more damaged picture."""
    workers = cores() if workers is None else workers
    chunks = [jobs[i : i + _CHUNK] for i in range(0, len(jobs), _CHUNK)]
    if workers <= 1 or len(chunks) <= 1:
        # One process more all the same: what kills the decoder must not kill the check.
        workers = 1
    position = 0
    while position < len(chunks):
        with _pool(workers) as pool:
            try:
                for found in _in_order(pool, chunks[position:], 4 * workers):
                    position += 1
                    yield from found
                continue
            except (BrokenProcessPool, TimeoutError):
                _kill(pool)
        # Some chunk in flight did it. The next one is done picture by picture, then all goes on as before.
        for job in chunks[position]:
            yield _decode_alone(job)
        position += 1


def _pool(workers: int) -> ProcessPoolExecutor:
    # Forked processes start at once; elsewhere they import what they need.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    return ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context(method), initializer=end_with_parent)


def _in_order(pool: ProcessPoolExecutor, chunks: Sequence[Sequence[DecodeJob]], ahead: int) -> Iterator[list[Decoded]]:
    """Results chunk by chunk, no more than ``ahead`` of them waiting."""
    waiting: list[Future[list[Decoded]]] = []
    following = iter(chunks)
    for chunk in following:
        waiting.append(pool.submit(_decode_chunk, chunk))
        if len(waiting) >= ahead:
            break
    while waiting:
        yield waiting.pop(0).result(timeout=_CHUNK * SECONDS)
        for chunk in following:
            waiting.append(pool.submit(_decode_chunk, chunk))
            break


def _decode_alone(job: DecodeJob) -> Decoded:
    with _pool(1) as pool:
        try:
            return pool.submit(decode, job).result(timeout=SECONDS)
        except BrokenProcessPool:
            return Decoded("image-damaged", f"{job.path}: the decoder crashes on this image: replace it", b"")
        except TimeoutError:
            _kill(pool)
            what = f"not decoded within {SECONDS:g} s: replace it, or look at the storage it lies on"
            return Decoded("image-damaged", f"{job.path}: {what}", b"")


def _kill(pool: ProcessPoolExecutor) -> None:
    """End its processes at once: one that hangs would hold up everything that waits for the pool."""
    for process in list((pool._processes or {}).values()):
        process.kill()
