"""Random damage of image files: refused in one line, or read to the pixels that they had.

JPEG, and other formats without a checksum of their own, cannot tell damage from a picture: there "read" means exactly
the pixels that Pillow reads, and the number of pictures that changed in silence is shown. A PNG must not change.
"""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tests.faults.soak_case import Case, run_mutations, watch_mutations

HANG_SECONDS = 10.0


def mutations(case: Case) -> None:
    """Bytes of JPEG (plain, progressive, with orientation), PNG (three kinds), GIF, BMP, TIFF and WebP files."""
    wanted, piece = case.count(8000, 100), 500
    seeds = _seeds()
    _piece(seeds, case.folder, 0, len(seeds))  # imports
    run_mutations(case, "image files", wanted, piece, 2 << 30, partial(_piece, seeds, case.folder))


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


def _piece(seeds: dict[str, bytes], folder: Path, start: int, count: int) -> dict[str, Any]:
    names = sorted(seeds)

    def one(number: int) -> Callable[[], str]:
        name = names[number % len(names)]
        path = folder / f"{start}.{name.split()[0]}"
        path.write_bytes(seeds[name])
        truth = _pillow(path)
        path.write_bytes(_mutated(seeds[name], random.Random(number)))
        return partial(_named_outcome, path, truth)

    return watch_mutations(range(start, start + count), HANG_SECONDS, one)


def _named_outcome(path: Path, truth: np.ndarray | None) -> str:
    """With the kind of file; a PNG has checksums and must not change."""
    kind, result = path.suffix[1:], _outcome(path, truth)
    if result == "changed" and kind == "png":
        return "OTHER: a PNG changed in silence"
    if result == "changed":
        result = "read to other pixels, the ones Pillow reads (no checksum)"
    return result if result.startswith("OTHER") else f"{kind}: {result}"


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

    from gn_det.check.decode import decode
    from gn_det.data.image import ImageError, ImageReader
    from gn_det.data.mapper import read_record_image
    from gn_det.data.records import Record

    assert truth is not None
    height, width = truth.shape[:2]
    record = Record(file_name=str(path), width=width, height=height)
    checked = decode(record, ImageReader("RGB"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pixels = read_record_image(record, ImageReader("RGB"))
            again = ImageReader("RGB").read(path)
    except ImageError as error:
        told = str(error)
        if "\n" in told or str(path) not in told:
            return f"OTHER: not one line with the file's name: {told[:60]!r}"
        return "refused in one line" if checked.kind == error.kind else f"OTHER: check says {checked.kind!r}"
    if checked.kind not in ("", "image-checksum", "image-constant"):
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
