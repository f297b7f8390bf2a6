"""Held-out images: every class keeps its share, the same seed gives the same parts, and nothing is lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gn_det.config import load_config
from gn_det.data import split
from gn_det.data.catalog import DatasetSource
from gn_det.data.sets import estimate_sizes, load_run_data
from gn_det.data.shapes import make_shapes
from gn_det.data.split import fold_numbers, split_keys, stratified, write_split
from gn_det.engine.schedule import format_schedule
from gn_det.errors import ConfigError, DataError


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> DatasetSource:
    return make_shapes(tmp_path_factory.mktemp("shapes"), "train", 30)


def _cfg(source: DatasetSource, out: Path, **more: Any) -> Any:
    own = {"DATASETS.TRAIN_JSON": source.json_file, "DATASETS.TRAIN_IMAGES": source.image_root}
    given = {"DATASETS.TEST": (), "DATASETS.VAL_FRACTION": 0.2, "OUTPUT_DIR": str(out), **own, **more}
    return load_config("quickstart.yaml", given)


def test_parts_are_disjoint_and_complete(source: DatasetSource, tmp_path: Path) -> None:
    cfg = write_split(_cfg(source, tmp_path / "a"))
    assert cfg.DATASETS.VAL_FRACTION == 0 and cfg.DATASETS == split_keys(_cfg(source, tmp_path / "a")).DATASETS
    whole, train, val = (
        json.loads(Path(f).read_text()) for f in (source.json_file, cfg.DATASETS.TRAIN_JSON, cfg.DATASETS.VAL_JSON)
    )
    ids = [{image["id"] for image in part["images"]} for part in (whole, train, val)]
    assert ids[1] | ids[2] == ids[0] and not ids[1] & ids[2] and len(ids[2]) == 6
    assert len(train["annotations"]) + len(val["annotations"]) == len(whole["annotations"])
    assert train["categories"] == val["categories"] == whole["categories"]
    data = load_run_data(cfg)
    assert (len(data.train[0]), len(data.test[0])) == (24, 6) and data.test[0].class_counts.all()
    again = write_split(_cfg(source, tmp_path / "b"))
    assert Path(again.DATASETS.VAL_JSON).read_text() == Path(cfg.DATASETS.VAL_JSON).read_text()
    other = write_split(_cfg(source, tmp_path / "c", SEED=5))
    assert Path(other.DATASETS.VAL_JSON).read_text() != Path(cfg.DATASETS.VAL_JSON).read_text()


def test_no_image_changes_sides_while_a_run_continues(source: DatasetSource, tmp_path: Path) -> None:
    """Another seed or fraction is refused and writes nothing; the same split with corrected annotations is not."""
    cfg = write_split(_cfg(source, tmp_path))
    files = [Path(cfg.DATASETS.TRAIN_JSON), Path(cfg.DATASETS.VAL_JSON)]
    before = [file.read_bytes() for file in files]
    for change in ({"SEED": 5}, {"DATASETS.VAL_FRACTION": 0.5}):
        with pytest.raises(DataError, match=r"would change between training and validation .*--val-json .*val.json$"):
            write_split(_cfg(source, tmp_path, **change), started=True)
    assert [file.read_bytes() for file in files] == before
    content = json.loads(Path(source.json_file).read_text())
    content["annotations"][0]["bbox"][2] += 1
    corrected = tmp_path / "corrected.json"
    corrected.write_text(json.dumps(content))
    again = write_split(_cfg(source, tmp_path, **{"DATASETS.TRAIN_JSON": str(corrected)}), started=True)
    assert again.DATASETS == cfg.DATASETS and [file.read_bytes() for file in files] != before
    write_split(_cfg(source, tmp_path, SEED=5))  # a new run


def test_ids_of_annotations_are_read_once_per_pass(
    source: DatasetSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for the division and once for the files; of a million annotations each pass takes a second."""
    keys, read = [], split._id
    monkeypatch.setattr(split, "_id", lambda entry, key="id": keys.append(key) or read(entry, key))
    write_split(_cfg(source, tmp_path))
    assert keys.count("image_id") == 2 * len(json.loads(Path(source.json_file).read_text())["annotations"]) > 0


def test_every_class_keeps_its_share() -> None:
    labels = [{"common"} for _ in range(80)] + [{"common", "rare"} for _ in range(10)] + [{"twice"}] * 2 + [set()] * 8
    held = stratified(labels, 0.2, 0)
    assert sum(held) == 20
    counts = {name: sum(name in found for found, h in zip(labels, held) if h) for name in ("common", "rare", "twice")}
    assert counts["rare"] == 2 and counts["twice"] == 1 and 16 <= counts["common"] <= 19
    assert sum(h and not found for found, h in zip(labels, held)) == 2


def test_folds_hold_out_every_image_once_and_spread_every_class() -> None:
    labels = [{"common"} for _ in range(80)] + [{"common", "rare"} for _ in range(10)] + [{"five"}] * 5 + [set()] * 7
    numbers = fold_numbers(labels, 5)
    assert numbers == fold_numbers(labels, 5) and set(numbers) == {1, 2, 3, 4, 5}
    sizes = [numbers.count(k) for k in range(1, 6)]
    assert max(sizes) - min(sizes) <= 2
    for name, least, most in (("common", 17, 19), ("rare", 2, 2), ("five", 1, 1)):
        found = [sum(name in c for c, n in zip(labels, numbers) if n == k) for k in range(1, 6)]
        assert least <= min(found) and max(found) <= most, (name, found)


def test_the_files_of_all_folds_make_up_the_set(source: DatasetSource, tmp_path: Path) -> None:
    held: list[int] = []
    for k in (1, 2, 3):
        keys = {"DATASETS.VAL_FRACTION": 0.0, "DATASETS.VAL_FOLD": (k, 3), "SEED": k}
        cfg = write_split(_cfg(source, tmp_path / str(k), **keys))
        assert cfg.DATASETS.VAL_FOLD == (0, 0)
        train, val = (json.loads(Path(f).read_text()) for f in (cfg.DATASETS.TRAIN_JSON, cfg.DATASETS.VAL_JSON))
        ids = {image["id"] for image in val["images"]}
        assert not ids & {image["id"] for image in train["images"]} and len(train["images"]) + len(ids) == 30
        held += ids
    assert len(held) == len(set(held)) == 30


def test_a_dry_run_counts_the_images_of_a_fold(source: DatasetSource, tmp_path: Path) -> None:
    cfg = _cfg(source, tmp_path, **{"DATASETS.VAL_FRACTION": 0.0, "DATASETS.VAL_FOLD": (1, 3)})
    assert estimate_sizes(cfg).images == 20
    assert "evaluation" in format_schedule(cfg, 20) and "no test set" not in format_schedule(cfg, 20)


@pytest.mark.parametrize(
    ("keys", "error", "text"),
    [
        ({"DATASETS.VAL_FOLD": (1, 31)}, DataError, "too few for 31 folds: take "),
        ({"DATASETS.VAL_FOLD": (3, 2)}, ConfigError, r"must be \(0, 0\), or \(k, K\) with k from 1 to K"),
        ({"DATASETS.VAL_FOLD": (1, 2), "DATASETS.VAL_FRACTION": 0.1}, ConfigError, "VAL_FRACTION is set, too"),
    ],
)
def test_impossible_folds(
    source: DatasetSource, tmp_path: Path, keys: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        write_split(_cfg(source, tmp_path / "out", **{"DATASETS.VAL_FRACTION": 0.0, **keys}))
    assert not (tmp_path / "out").exists()


def test_the_only_image_of_a_class_is_for_training() -> None:
    for seed in range(20):
        assert stratified([{"a"}, {"a"}, {"a", "only"}], 0.3, seed)[2] is False
    assert sum(stratified([{"a"}, {"a"}], 0.9, 0)) == 1


def test_bad_splits_are_one_line(source: DatasetSource, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"DATASETS.VAL_JSON is set, too; set only one"):
        _cfg(source, tmp_path, **{"DATASETS.VAL_JSON": "b.json", "DATASETS.VAL_IMAGES": "b"})
    with pytest.raises(DataError, match=r"VAL_FRACTION 0.01 leaves no validation image for .*; hold out more"):
        write_split(_cfg(source, tmp_path / "few", **{"DATASETS.VAL_FRACTION": 0.01}))
    assert not (tmp_path / "few").exists()
    broken = tmp_path / "x.json"
    for content in ([], {"images": 3}, {"images": [{}], "annotations": []}):
        broken.write_text(json.dumps(content))
        with pytest.raises(DataError, match=r"x.json: DATASETS.VAL_FRACTION 0.2 needs COCO images"):
            write_split(_cfg(DatasetSource("x", str(broken), "."), tmp_path))
    strange = [{"id": [1]}, {"id": {}}, 7, {"id": 2}, None]
    broken.write_text(json.dumps({"images": strange, "annotations": [4, {"image_id": []}, {"image_id": 2}]}))
    with pytest.raises(DataError):  # it is the reader's to name what is wrong
        load_run_data(write_split(_cfg(DatasetSource("x", str(broken), "."), tmp_path)))


def test_sets_without_masks_train_boxes(source: DatasetSource, tmp_path: Path) -> None:
    """One line of notice; with some masks it stays an error, which tells what is missing."""
    content = json.loads(Path(source.json_file).read_text())
    bare = tmp_path / "boxes.json"
    bare.write_text(json.dumps({**content, "annotations": [{**a, "segmentation": []} for a in content["annotations"]]}))
    boxes = DatasetSource("boxes", str(bare), source.image_root)
    assert load_run_data(_cfg(boxes, tmp_path)).boxes_only
    assert not load_run_data(_cfg(source, tmp_path)).boxes_only
    content["annotations"][5:] = [{**a, "segmentation": []} for a in content["annotations"][5:]]
    bare.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"MODEL.MASK_ON"):
        load_run_data(_cfg(boxes, tmp_path))
