"""Files that other tools read, made of what predict found, and their way back into training."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gn_det.data.formats import exchange
from gn_det.errors import ConfigError
from gn_det.prediction.images import predict
from tests.prediction.test_images import NAMES, PREDICTOR


@pytest.mark.parametrize("name", ["labelme", "cvat", "yolo", "masks"])
def test_predictions_in_a_format_can_be_read_again(name: str, tmp_path: Path) -> None:
    """Two objects of two images with the same name: classes, boxes and (to a pixel) masks come back."""
    for folder in ("a", "b"):
        (tmp_path / "in" / folder).mkdir(parents=True)
        Image.fromarray(np.full((40, 60, 3), 90, np.uint8)).save(tmp_path / "in" / folder / "x.png")
    lines: list[str] = []
    predict("w", tmp_path / "in", tmp_path / "out", save=[name], predictor=PREDICTOR, report=lines.append)
    assert not any(line.startswith("note") for line in lines) and not (tmp_path / "out" / "predictions.json").exists()
    source, images = tmp_path / "out" / name, tmp_path / "images"
    images.mkdir()
    for stem in ("x", "x-2"):
        Image.new("RGB", (60, 40)).save(images / f"{stem}.png")
    read, bad = exchange.read(name, source, images)
    assert not bad and len(read["images"]) == 2 and [c["name"] for c in read["categories"]] == list(NAMES)
    boxes = np.array([a["bbox"] for a in read["annotations"]])
    assert boxes.shape == (4, 4) and np.abs(boxes - [5, 4, 15, 6]).max() <= 1
    assert sorted(
        {c["name"] for c in read["categories"] for a in read["annotations"] if a["category_id"] == c["id"]}
    ) == [
        "Kreis",
        "square",
    ]
    if name == "labelme":
        content = json.loads((source / "x-2.json").read_text("utf-8"))
        assert (source / content["imagePath"]).resolve() == (tmp_path / "in" / "b" / "x.png").resolve()
        assert content["shapes"][0]["shape_type"] == "polygon" and content["shapes"][0]["description"] == "score 0.900"


def test_csv(tmp_path: Path) -> None:
    Image.fromarray(np.full((40, 60, 3), 90, np.uint8)).save(tmp_path / "x.png")
    predict("w", tmp_path / "x.png", tmp_path / "out", save=["csv"], predictor=PREDICTOR, report=lambda line: None)
    with (tmp_path / "out" / "predictions.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == ["square", "Kreis"]
    numbers = {key: float(rows[0][key]) for key in ("score", "x0", "y0", "x1", "y1", "area")}
    assert numbers == {"score": 0.9, "x0": 5, "y0": 4, "x1": 20, "y1": 10, "area": 90}


def test_unknown_output(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="unknown output 'labelm'; did you mean 'labelme'"):
        predict("w", tmp_path, tmp_path / "out", save=["labelm"], predictor=PREDICTOR)
    with pytest.raises(ConfigError, match="--save is empty"):
        predict("w", tmp_path, tmp_path / "out", save=[], predictor=PREDICTOR)
    assert not (tmp_path / "out").exists()
