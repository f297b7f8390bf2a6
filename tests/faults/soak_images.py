"""Random damage of image files: refused in one line, or read to the pixels that they had.

JPEG, and other formats without a checksum of their own, cannot tell damage from a picture: there "read" means exactly
the pixels that Pillow reads, and the number of pictures that changed in silence is shown. A PNG must not change.
"""

from __future__ import annotations

import io
import random
import time
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from faults.soak_case import Case, Hang, in_fork, limit

HANG_SECONDS = 10.0


def mutations(case: Case) -> None:
    """Bytes of JPEG (plain, progressive, with orientation), PNG (three kinds), GIF, BMP, TIFF and WebP files."""
    wanted, piece = case.count(8000, 100), 500
    seeds = _seeds()
    outcomes: Counter[str] = Counter()
    slowest, others = 0.0, []
    _piece(seeds, 0, len(seeds), case.folder)  # imports
    for start in range(0, wanted, piece):
        found = in_fork(partial(_piece, seeds, start, min(piece, wanted - start), case.folder), memory=2 << 30)
        if isinstance(found, str):
            found = {"outcomes": {f"OTHER: the process {found}": 1}, "slowest": 0.0, "others": [f"from {start} on"]}
        outcomes.update(found["outcomes"])
        slowest, others = max(slowest, found["slowest"]), others + found["others"]
    case.say("mutations of image files", sum(outcomes.values()))
    for name, count in sorted(outcomes.items()):
        case.say(f"  {name}", count)
    case.say("slowest", f"{slowest:.2f} s")
    case.require(not others, f"{len(others)} mutations: {others[:3]}")


def _seeds() -> dict[str, bytes]:
    from PIL import Image

    rows, columns = np.mgrid[:48, :64]
    smooth = np.stack([rows * columns % 251, rows * 4, columns * 3], axis=2).astype(np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[274] = 6
    out = {}
    for name, pixels, form, how in (
        ("jpg", smooth, "JPEG", {"quality": 90}),
        ("jpg progressive", noise, "JPEG", {"progressive": True}),
        ("jpg turned", smooth, "JPEG", {"exif": exif}),
        ("png", smooth, "PNG", {}),
        ("png noise", noise, "PNG", {}),
        ("png flat", np.full((48, 64), 77, np.uint8), "PNG", {"exif": exif}),
        ("gif", smooth[..., 0], "GIF", {}),
        ("bmp", smooth, "BMP", {}),
        ("tif", smooth, "TIFF", {"compression": "tiff_deflate"}),
        ("webp", smooth, "WEBP", {"lossless": True}),
    ):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, form, **how)
        out[name] = buffer.getvalue()
    return out


def _piece(seeds: dict[str, bytes], start: int, count: int, folder: Path) -> dict[str, Any]:
    outcomes: Counter[str] = Counter()
    slowest, others = 0.0, []
    names = sorted(seeds)
    for number in range(start, start + count):
        name = names[number % len(names)]
        path = folder / f"{start}.{name.split()[0]}"
        path.write_bytes(seeds[name])
        truth = _pillow(path)
        path.write_bytes(_mutated(seeds[name], random.Random(number)))
        begun = time.perf_counter()
        try:
            with limit(HANG_SECONDS):
                result = _outcome(path, truth)
        except Hang:
            result = "OTHER: hang"
        except BaseException as error:
            result = f"OTHER: {type(error).__name__}: {str(error)[:80]}"
        slowest = max(slowest, time.perf_counter() - begun)
        kind = name.split()[0]
        if result == "changed" and kind != "png":
            result = "read to other pixels, the ones Pillow reads (no checksum)"
        elif result == "changed":
            result = "OTHER: a PNG changed in silence"
        outcomes[f"{kind}: {result}" if not result.startswith("OTHER") else result] += 1
        if result.startswith("OTHER"):
            others.append(f"number {number} of {name}: {result}")
    return {"outcomes": dict(outcomes), "slowest": slowest, "others": others}


def _mutated(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.choice((rng.randrange(len(out)), min(len(out) - 1, rng.randrange(120))))
        kind = rng.randrange(6)
        if kind == 0:
            out[at] = rng.randrange(256)
        elif kind == 1:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            out[at : at + 20] = bytes([rng.choice((0, 255))]) * 20
        elif kind == 3:
            del out[at : at + rng.choice((1, 4, 200))]
        elif kind == 4:
            out[at:at] = out[max(0, at - rng.randint(1, 200)) : at]
        else:
            del out[rng.randrange(len(out)) :]
        if not out:
            break
    return bytes(out)


def _outcome(path: Path, truth: np.ndarray | None) -> str:
    """The reader of training on the file, and ``gn-det check --images`` on the same, which must agree."""
    import warnings

    from gn_det.data.decode import DecodeJob, decode
    from gn_det.data.image import ImageError, read_image
    from gn_det.data.mapper import read_record_image
    from gn_det.data.records import Record

    assert truth is not None
    height, width = truth.shape[:2]
    checked = decode(DecodeJob(str(path), width, height, "RGB"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pixels = read_record_image(Record(file_name=str(path), width=width, height=height), "RGB")
            again = read_image(path, "RGB")
    except ImageError as error:
        told = str(error)
        if "\n" in told or str(path) not in told:
            return f"OTHER: not one line with the file's name: {told[:60]!r}"
        return "refused in one line" if checked.kind == error.kind else f"OTHER: check says {checked.kind!r}"
    if checked.kind not in ("", "image-checksum"):
        return f"OTHER: training takes it, check says {checked.kind}"
    if not np.array_equal(pixels, again):
        return "OTHER: read twice, two pictures"
    if np.array_equal(pixels, truth):
        return "read to the same pixels"
    return "changed" if np.array_equal(pixels, _pillow(path)) else "OTHER: read to other pixels than Pillow's"


def _pillow(path: Path) -> np.ndarray | None:
    """(H, W, 3) pixels, upright, by Pillow's own way of turning."""
    import warnings

    from PIL import Image, ImageOps

    with warnings.catch_warnings(), Image.open(path) as image:
        warnings.simplefilter("ignore")
        image.load()
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
