"""Random damage of a COCO json: refused in one line, or read exactly as json, Pillow and pycocotools read it.

Each mutation goes through the loader with DATALOADER.MAX_BAD 0 and through ``gn-det check``, whose exit code must
agree; where it is accepted every value of every record is compared with what the file says. A process of its own takes
the mutations piece by piece, so that a crash counts and costs no more than its piece.
"""

from __future__ import annotations

import copy
import io
import json
import math
import random
import unicodedata
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np

from tests.faults.soak_case import Case, run_mutations, watch_mutations

VALUES: list[Any] = [
    None, -1, 0, 1, 2, 0.5, 1e9, 1e308, math.nan, math.inf, "", "x", "5", [], [1], {}, True, False, 10**400, 2**63,
    [[1, 2, 3, 4, 5, 6]], [[1, 2, 3, 4]], [[5, 5, 5, 5, 5, 5]], [1, 2, 3, 4], {"size": [30, 40], "counts": [1200]},
    {"size": [30, 40], "counts": [0, 1200]}, {"size": [40, 30], "counts": [0, 1200]}, "../x.png", "\x00", "é" * 300,
]  # fmt: skip
HANG_SECONDS = 20.0


def mutations(case: Case) -> None:
    """Values, keys, entries and bytes of two sets."""
    wanted, piece = case.count(3000, 20), 100
    sets = _sets(case.folder)
    for json_file, root in sets:  # once before any time is taken: the forks find everything imported
        name = _outcome(json_file, root)
        case.require(name.startswith("accepted"), f"{json_file} as it is: {name}")
    run_mutations(case, "a json", wanted, piece, 3 << 30, partial(_piece, sets, case.folder))


def _sets(folder: Path) -> list[tuple[str, str]]:
    """(json, image folder) of the sets that are damaged: all kinds of annotations, small; and shapes."""
    import sys

    sys.path.insert(0, str(Path(__file__).parents[2]))
    from gn_det.data.shapes import make_shapes
    from tests.data import own_coco

    (folder / "own").mkdir()
    own = own_coco.write(folder / "own")
    shapes = make_shapes(folder / "shapes", "train", 5)
    return [(own.json_file, own.image_root), (shapes.json_file, shapes.image_root)]


def _piece(sets: list[tuple[str, str]], folder: Path, start: int, count: int) -> dict[str, Any]:
    def one(number: int) -> Callable[[], str]:
        json_file, root = sets[number % len(sets)]
        path = folder / f"mutated{start}.json"
        path.write_bytes(_mutated(Path(json_file).read_text(), random.Random(number)))
        return partial(_outcome, str(path), root)

    return watch_mutations(range(start, start + count), HANG_SECONDS, one)


def _mutated(text: str, rng: random.Random) -> bytes:
    """One to three damages of the values, or of the bytes."""
    if rng.random() < 0.25:
        data = bytearray(text.encode())
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(data))
            kind = rng.randrange(4)
            if kind == 0:
                data[at] = rng.choice((*b'0123456789.-eE,:[]{}"ntf ', rng.randrange(256)))
            elif kind == 1:
                del data[at : at + rng.choice((1, 1, 2, 30))]
            elif kind == 2:
                data[at:at] = data[max(0, at - rng.randint(1, 60)) : at]
            else:
                data[at:at] = bytes([rng.choice(b'0123456789.-eE,:[]{}"')])
        return bytes(data[: rng.randrange(len(data))] if rng.random() < 0.05 else data)
    content = json.loads(text)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        _damage(content, rng)
    return json.dumps(content).encode()


def _damage(content: dict[str, Any], rng: random.Random) -> None:
    section = rng.choice(["annotations"] * 5 + ["images"] * 3 + ["categories", "top"])
    if section == "top":
        key = rng.choice([*content])
        content[key] = rng.choice(VALUES)
        return
    entries = content.get(section)
    if not isinstance(entries, list) or not entries:
        return
    at = rng.randrange(len(entries))
    kind = rng.random()
    if kind < 0.08:
        entries[at] = rng.choice(VALUES)
    elif kind < 0.14:
        del entries[at]
    elif kind < 0.2:
        entries.append(copy.deepcopy(entries[at]))
    elif isinstance(entries[at], dict) and entries[at]:
        key = rng.choice([*entries[at], "segmentation", "bbox"] if section == "annotations" else [*entries[at]])
        if kind < 0.3:
            entries[at].pop(key, None)
        elif kind < 0.65 and key in entries[at]:
            entries[at][key] = _near(entries[at][key], rng)
        else:
            entries[at][key] = rng.choice(VALUES)


def _near(value: Any, rng: random.Random) -> Any:
    """A value of the same kind that is a little off: what no type check finds."""
    if isinstance(value, bool) or value is None:
        return not value
    if isinstance(value, (int, float)):
        return rng.choice((value + 1, value - 1, -value, value * 10, value / 2, float(value), str(value)))
    if isinstance(value, str):
        at = rng.randrange(len(value) + 1)
        return value[:at] + chr(rng.choice((rng.randrange(32, 127), rng.randrange(0x20, 0x250)))) + value[at + 1 :]
    if isinstance(value, list) and value:
        at = rng.randrange(len(value))
        return [*value[:at], _near(value[at], rng), *value[at + 1 :]]
    if isinstance(value, dict) and value:
        key = rng.choice([*value])
        return {**value, key: _near(value[key], rng)}
    return rng.choice(VALUES)


def _outcome(json_file: str, root: str) -> str:
    from gn_det.data.catalog import DatasetSource
    from gn_det.data.coco import load_coco
    from gn_det.errors import DataError

    told = ""
    try:
        data = load_coco(DatasetSource("mutated", json_file, root, "--train-json"), max_bad=0)
    except DataError as error:
        told = str(error)
        if "\n" in told or not told.strip():
            return f"OTHER: not one line: {told[:60]!r}"
    code, printed = _check(json_file, root)
    if "Traceback" in printed:
        return "OTHER: gn-det check shows a trace"
    if told:
        return "refused in one line" if code == 2 else f"OTHER: refused, but gn-det check ends with {code}"
    # a set that is read but has nothing to learn from is refused later, in prepare
    if code == 2 and data.object_counts.any() and not data.without_mask:
        return "OTHER: accepted, but gn-det check ends with 2"
    wrong = _compare(data, json.loads(Path(json_file).read_text(encoding="utf-8-sig")), root)
    if wrong:
        return f"OTHER: accepted a wrong value: {wrong}"
    return "accepted, every value as the file says" + (", gn-det check warns" if code == 1 else "")


def _check(json_file: str, root: str) -> tuple[int, str]:
    from gn_det.cli import main

    out = io.StringIO()
    with redirect_stdout(out), redirect_stderr(out):
        code = main(["check", "--train-json", json_file, "--train-images", root])
    return code, out.getvalue()


def _compare(data: Any, raw: dict[str, Any], root: str) -> str:
    """What of the loaded set is not what the file says; Pillow and pycocotools are asked, none of our readers."""
    from PIL import Image
    from pycocotools import mask as coco_mask

    names = {_id(c["id"]): c["name"] for c in raw["categories"]}
    if {str(k): name for k, name in zip(data.category_ids, data.class_names)} != {str(k): n for k, n in names.items()}:
        return "categories"
    images = {_id(i["id"]): i for i in raw["images"]}
    if {r["image_id"] for r in data.records} != set(images):
        return "images"
    by_image: dict[Any, list[dict[str, Any]]] = {}
    for entry in raw.get("annotations", []):
        known = by_image.setdefault(_known(entry["image_id"], images), [])
        if entry not in known or type(entry.get("id")) is not int or entry["id"] <= 0:  # exact copies count once
            known.append(entry)
    for record in data.records:
        image = images[record["image_id"]]
        size, told = (record["width"], record["height"]), [image.get("width"), image.get("height")]
        if _plain_name(record["file_name"]) != _plain_name(str(Path(root) / image["file_name"])):
            return f"file of image {image['id']}"
        with Image.open(record["file_name"]) as opened:
            # a size that the json lacks is the file's
            if opened.size != size or any(
                type(t) in (int, float) and 1 <= t < 1e9 and t != s for t, s in zip(told, size)
            ):
                return f"size of image {image['id']}"
        entries = by_image.get(_id(image["id"]), [])
        if len(entries) != len(record["annotations"]):
            return f"{len(record['annotations'])} of {len(entries)} annotations of image {image['id']}"
        for ours, entry in zip(record["annotations"], entries):
            if names[_known(entry["category_id"], names)] != data.class_names[ours["category_id"]]:
                return f"category of annotation {entry.get('id')}"
            if ours["bbox"] != entry.get("bbox") and not _is_box_of_mask(ours["bbox"], entry, size):
                return f"box of annotation {entry.get('id')}"
            if ours["iscrowd"] != (entry.get("iscrowd") or 0):
                return f"iscrowd of annotation {entry.get('id')}"
            segmentation = entry.get("segmentation")
            if not segmentation:
                if "segmentation" in ours:
                    return "a mask from nowhere"
                continue
            mask = ours["segmentation"]
            if isinstance(mask, list):
                mask = coco_mask.merge(coco_mask.frPyObjects([list(map(float, p)) for p in mask], size[1], size[0]))
            expected = _coco_mask(segmentation, size)
            if not np.array_equal(coco_mask.decode(mask), coco_mask.decode(expected)):
                return f"mask of annotation {entry.get('id')}"
            area = entry.get("area")
            usable = isinstance(area, (int, float)) and not isinstance(area, bool) and 0 < area < math.inf
            if ours["area"] != (area if usable else float(coco_mask.area(expected))):
                return f"area of annotation {entry.get('id')}"
    return ""


def _id(value: Any) -> Any:
    """77.0 is 77."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _known(value: Any, known: dict[Any, Any]) -> Any:
    """The id that a reference means: 77 and "77" are alike where only one of them is there."""
    value = _id(value)
    return value if value in known else next((k for k in known if str(k) == str(value)), value)


def _plain_name(path: str) -> str:
    """Slashes, letter case, accents and %20 do not tell files apart."""
    return unicodedata.normalize("NFC", unquote(path.replace("\\", "/"))).casefold()


def _is_box_of_mask(box: Any, entry: dict[str, Any], size: tuple[int, int]) -> bool:
    """Whether a box that the file lacks, or has of no use, is that of the mask, to a pixel."""
    from pycocotools import mask as coco_mask

    theirs = entry.get("bbox")
    if isinstance(theirs, list) and len(theirs) == 4 and all(type(v) in (int, float) for v in theirs):
        x, y, w, h = theirs
        near = max(x + w - size[0], -x) < 2 * size[0] and max(y + h - size[1], -y) < 2 * size[1]
        if w > 0 and h > 0 and x < size[0] and y < size[1] and x + w > 0 and y + h > 0 and near:
            return False
    expected = coco_mask.toBbox(_coco_mask(entry["segmentation"], size))
    corners = [np.array([b[0], b[1], b[0] + b[2], b[1] + b[3]]) for b in (box, expected)]
    return bool(np.abs(corners[0] - corners[1]).max() <= 1)


def _coco_mask(segmentation: Any, size: tuple[int, int]) -> Any:
    """pycocotools on the raw value; pieces that cannot be polygons are left out, as Detectron2 leaves them out."""
    from pycocotools import mask as coco_mask

    if isinstance(segmentation, dict):
        if isinstance(segmentation["counts"], list):
            return coco_mask.frPyObjects(
                {**segmentation, "counts": list(map(int, segmentation["counts"]))}, *size[::-1]
            )
        return segmentation
    pieces = [list(map(float, p)) for p in segmentation if len(p) >= 6 and len(p) % 2 == 0]
    return coco_mask.merge(coco_mask.frPyObjects(pieces, size[1], size[0]))
