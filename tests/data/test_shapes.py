"""The generated set: deterministic, made once, atomic, and true to its pictures."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gn_det.data import shapes
from gn_det.data.coco import load_coco
from gn_det.data.shapes import make_shapes
from gn_det.data.shapes_draw import CLASSES, draw_scene
from gn_det.errors import DataError
from gn_det.structures import rasterize_polygons


def _files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_deterministic_and_different_by_split_and_seed(tmp_path: Path) -> None:
    for name, split, seed in (("a", "train", 0), ("b", "train", 0), ("c", "train", 1), ("d", "val", 0)):
        make_shapes(tmp_path / name, split, 3, seed)
    a, b, c = (_files(tmp_path / n / "train") for n in "abc")
    d = _files(tmp_path / "d" / "val")
    assert a == b
    first = "images/000001.jpg"
    assert len({a[first], c[first], d[first]}) == 3


def test_made_once_and_again_when_asked_for_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = make_shapes(tmp_path, "train", 2)
    written = Path(source.json_file).stat().st_mtime_ns
    make_shapes(tmp_path, "train", 2)
    assert Path(source.json_file).stat().st_mtime_ns == written
    make_shapes(tmp_path, "train", 3)
    assert len(load_coco(source, max_bad=0)) == 3
    monkeypatch.setattr(shapes, "VERSION", 99)
    make_shapes(tmp_path, "train", 3)
    assert json.loads((tmp_path / "train" / "stamp.json").read_text())["version"] == 99
    assert [p.name for p in tmp_path.iterdir()] == ["train"]  # no leftovers


def test_interrupted_generation_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_shapes(tmp_path, "train", 2)
    before = _files(tmp_path)
    monkeypatch.setattr(shapes, "draw_scene", lambda rng: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        make_shapes(tmp_path, "train", 5)
    assert _files(tmp_path) == before


def test_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"the shapes set cannot be written .* DETECTRON2_DATASETS"):
        make_shapes(tmp_path / "file" / "shapes", "train", 2)


def test_annotations_are_valid_and_varied(tmp_path: Path) -> None:
    source = make_shapes(tmp_path, "train", 60)
    data = load_coco(source, max_bad=0)
    assert data.class_names == CLASSES and data.class_counts.min() > 20
    assert max(data.category_ids) > len(data.category_ids)  # gaps
    raw = json.loads(Path(source.json_file).read_text())["annotations"]
    kinds = {
        type(a["segmentation"] if isinstance(a["segmentation"], list) else a["segmentation"]["counts"]) for a in raw
    }
    forms = {"polygon" if isinstance(a["segmentation"], list) else "rle" for a in raw}
    assert kinds == {list, str} and forms == {"polygon", "rle"}
    areas = np.array([a["area"] for a in raw])
    assert (areas < 32**2).mean() > 0.3 and (areas > 32**2).mean() > 0.2
    assert len({tuple(s) for s in data.sizes.tolist()}) > 3


def test_masks_do_not_overlap_and_match_polygons() -> None:
    overlaps = 0
    for seed in range(30):
        pixels, objects = draw_scene(np.random.default_rng(seed))
        assert pixels.dtype == np.uint8 and len(objects) >= 1
        stacked = np.sum([o.visible for o in objects], axis=0)
        assert stacked.max() == 1  # every pixel belongs to one object
        for drawn in objects:
            assert drawn.visible.sum() > 50
            if drawn.outline is None:
                overlaps += 1
                continue
            polygon = rasterize_polygons([drawn.outline.reshape(-1)], *drawn.visible.shape)
            union = (polygon | drawn.visible).sum()
            assert (polygon & drawn.visible).sum() / union > 0.85
    assert overlaps > 20


def test_objects_stand_out_in_the_picture(tmp_path: Path) -> None:
    """A picture is not only noise: object pixels differ from their surroundings in color."""
    data = load_coco(make_shapes(tmp_path, "val", 6), max_bad=0)
    from gn_det.config import get_cfg
    from gn_det.data.mapper import TrainMapper

    cfg = get_cfg()
    cfg.INPUT.MASK_FORMAT, cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.RANDOM_FLIP = "bitmask", (0,), "none"
    cfg.MODEL.MASK_ON = True
    for record in data.records:
        sample = TrainMapper(cfg)(record, np.random.RandomState(0))
        pixels = np.asarray(Image.open(record["file_name"]), dtype=float)
        anything = np.any(sample["targets"].masks.masks, axis=0)
        for mask in sample["targets"].masks.masks:
            assert np.abs(pixels[mask].mean(0) - pixels[~anything].mean(0)).max() > 15
