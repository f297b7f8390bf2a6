"""Decode every image of a dataset on all cores, in worker processes, so that a corrupt image cannot crash the check."""

from __future__ import annotations

import hashlib
import multiprocessing
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, TimeoutError
from concurrent.futures.process import BrokenProcessPool
from itertools import takewhile
from typing import NamedTuple

from PIL import Image

from gn_det.data.image import ImageError, ImageReader, one_color
from gn_det.data.mapper import read_record_image
from gn_det.data.records import Record
from gn_det.data.workers import cores
from gn_det.files import digest, open_regular
from gn_det.parent_watch import end_with_parent

#: Images per task: enough to make passing them negligible.
_CHUNK = 16
#: An image that takes longer (seconds) counts as damaged.
SECONDS = 60.0


class Decoded(NamedTuple):
    """Result for one file.

    ``kind`` is empty for a good image, otherwise a key of ``KINDS``; ``digest`` is the hash of the file, or empty if it
    cannot be read.
    """

    kind: str
    text: str
    digest: bytes


def digest_of(path: str) -> bytes:
    """Return the content hash of a file, or b"" if it cannot be read."""
    try:
        return digest(path, hashlib.blake2b(digest_size=16))
    except (OSError, ValueError):
        return b""


def decode(record: Record, reader: ImageReader) -> Decoded:
    """Decode one image like training."""
    path = record["file_name"]
    found = digest_of(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            pixels = read_record_image(record, reader)
        except ImageError as error:
            return Decoded(error.kind, error.text, found)
        if one_color(pixels):
            value = ", ".join(dict.fromkeys(str(v) for v in pixels[0, 0].tolist()))
            return Decoded("image-constant", value, found)
        try:
            with open_regular(path) as file, Image.open(file) as image:
                image.verify()  # the checksums of a PNG outside its pixels, which the reader ignores
        except Exception as error:
            return Decoded("image-checksum", f"{path}: {error}: download or copy this file again", found)
    return Decoded("", "", found)


def _decode_part(records: Sequence[Record], reader: ImageReader) -> list[Decoded]:
    return [decode(record, reader) for record in records]


def decode_all(records: Sequence[Record], reader: ImageReader, workers: int | None = None) -> Iterator[Decoded]:
    """Yield results in the order of ``records``; an image that crashes or hangs the decoder counts as damaged.

    If the pool breaks, any part in flight may be the cause. The first of them is then decoded image by image in one
    process, which identifies the image.
    """
    workers = cores() if workers is None else workers
    # Forked processes start immediately; spawned ones first import what they need.
    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else None
    context = multiprocessing.get_context(method)
    parts = [records[i : i + _CHUNK] for i in range(0, len(records), _CHUNK)]
    while parts:
        single = len(parts[0]) == 1
        now = list(takewhile(lambda part: len(part) == 1, parts)) if single else parts
        done, problem = 0, ""
        # Use a process even for a single part: a decoder crash must not crash the check.
        with ProcessPoolExecutor(1 if single else min(workers, len(parts)), context, end_with_parent) as pool:
            try:
                for waiting in [pool.submit(_decode_part, part, reader) for part in now]:
                    found = waiting.result(timeout=len(now[0]) * SECONDS)
                    done += 1
                    yield from found
            except BrokenProcessPool:
                problem = "the decoder crashes on this image: replace it"
            except TimeoutError:
                problem = f"not decoded within {SECONDS:g} s: replace it, or check the storage that holds it"
            finally:
                if problem:  # a hanging process would block everything that waits for the pool
                    for process in list((pool._processes or {}).values()):
                        process.kill()
                pool.shutdown(wait=False, cancel_futures=True)
        del parts[:done]
        if problem and single:
            yield Decoded("image-damaged", f"{parts.pop(0)[0]['file_name']}: {problem}", b"")
        elif problem:
            parts[:1] = [[record] for record in parts[0]]
