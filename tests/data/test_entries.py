"""Annotations read in chunks of typed values equal those that the careful reader reads one by one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from gn_det.data import coco_json
from gn_det.data.annotations import check_segmentation, covers_no_pixel, mask_box
from gn_det.data.catalog import DatasetSource
from gn_det.data.coco import CocoDataset, load_coco
from gn_det.data.coco_json import read_json
from gn_det.data.entries import _CHUNK, Entries
from gn_det.data.shapes import make_shapes
from tests.data.own_coco import write
from tests.data.test_bad_data import BAD_ANNOTATIONS


def read(source: DatasetSource) -> Entries:
    entries = read_json(source.json_file, keep_text=True)["annotations"]
    assert isinstance(entries, Entries)
    return entries


def everything(data: CocoDataset) -> list[Any]:
    arrays = (data.sizes, data.object_images, data.object_classes, data.object_sizes, data.crowd_images)
    records = [str(record) for record in data.records]
    return [records, data.bad, data.notes, data.maskless, data.ground_truth(), *(a.tolist() for a in arrays)]


def both(source: DatasetSource, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read once as usual, once without the typed reader."""
    typed = everything(load_coco(source, max_bad=100))
    with monkeypatch.context() as patch:
        patch.setattr(coco_json, "_with_text", lambda data: None)
        assert everything(load_coco(source, max_bad=100)) == typed


def test_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Polygons and RLE of several chunks; most pass without the careful reader."""
    source = make_shapes(tmp_path, "train", 120)
    both(source, monkeypatch)
    entries = read(source)
    assert len(entries) > _CHUNK and 0.3 < entries.sound.mean() < 1
    for position in range(len(entries)):
        entry = entries[position]
        assert entry["id"] == position + 1
        polygons = isinstance(entry["segmentation"], list)
        assert entries.sound[position] == polygons
        if polygons:
            assert entries.bbox[position].tolist() == entry["bbox"]
            assert entries.hull[position].tolist() == list(mask_box([np.array(p) for p in entry["segmentation"]]))


@pytest.mark.parametrize("case", BAD_ANNOTATIONS)
def test_one_bad_annotation(tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    both(write(tmp_path, BAD_ANNOTATIONS[case][0]), monkeypatch)


@pytest.mark.parametrize("form", [{"indent": 3}, {"separators": (",", ":")}, {"separators": ("\t,\r\n ", " : ")}])
def test_places_in_the_text(tmp_path: Path, form: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is between the entries; text in other sections that looks like entries does not matter."""
    source = write(tmp_path)
    content = json.loads(Path(source.json_file).read_text())
    content["annotations"][1]["note"] = '}, {"id": 99'
    content["annotations"].append("é}, {")
    decoys = [{"info": {"annotations": [{"id": 7}]}, "annotations": [{"id": 5}, 3]}, content]
    text = json.dumps(decoys[0], **form)[:-1] + "," + json.dumps(content, ensure_ascii=False, **form)[1:]
    Path(source.json_file).write_text(text)
    assert list(read(source)) == content["annotations"]  # of a repeated key the last one counts
    both(source, monkeypatch)


def test_whole_numbers_stay_whole(tmp_path: Path) -> None:
    """As in the json: Detectron2 moves boxes and polygons of whole numbers differently."""

    def change(content: dict[str, Any]) -> None:
        for a, number in zip(content["annotations"][:2], (int, float)):
            a["bbox"] = [number(v) for v in (2, 3, 10, 8)]
            a["segmentation"] = [[number(v) for v in (2, 3, 12, 3, 12, 11, 2, 11)]]

    whole, decimal = load_coco(write(tmp_path, change), max_bad=0).records[0]["annotations"]
    assert [type(v) for v in whole["bbox"]] == [int] * 4 and [type(v) for v in decimal["bbox"]] == [float] * 4
    assert whole["segmentation"][0].dtype == np.int64 and decimal["segmentation"][0].dtype == np.float64


def test_sound_polygons_are_those_that_the_careful_reader_takes_unchanged() -> None:
    """A sound polygon has no short piece and covers a pixel; one that is not sound is rare, and may be good."""
    rng = np.random.default_rng(0)
    masks = [
        [(rng.normal(50, rng.choice([0.3, 20]), int(rng.integers(4, 12)))).round(1).tolist() for _ in range(k % 3 + 1)]
        for k in range(600)
    ]
    others = {"image_id": 1, "category_id": 1, "bbox": [1, 1, 2, 2], "area": 1, "iscrowd": 0}
    texts = [json.dumps({"id": i + 1, "segmentation": mask, **others}) for i, mask in enumerate(masks)]
    text = bytearray("[" + ",".join(texts) + "]", "ascii")
    entries = Entries(msgspec.json.decode(text, type=list[msgspec.Raw]), text)
    for mask, sound in zip(masks, entries.sound):
        simple = all(len(p) >= 6 and len(p) % 2 == 0 for p in mask)
        if not simple:
            assert not sound
            continue
        found, left_out = check_segmentation(mask, 100, 100)
        assert found is not None and not left_out
        assert not (sound and covers_no_pixel(found, 100, 100))
    assert 50 < entries.sound.sum() < 400
