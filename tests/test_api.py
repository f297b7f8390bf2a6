"""The Python API gives what the command line gives, as arrays, and names what it cannot take."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import gn_det
from gn_det.checkpoint.io import save_checkpoint
from gn_det.checkpoint.meta import build_meta
from gn_det.config import load_config
from gn_det.errors import ConfigError, DataError, WeightsError
from gn_det.modeling.build import build_model

NAMES, IDS = ("disk", "square", "star"), (7, 3, 11)
TINY = ["MODEL.ROI_HEADS.NUM_CLASSES", "3", "MODEL.DEVICE", "cpu", "INPUT.MIN_SIZE_TEST", "96"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the quickstart's detector with random weights, biased to detect something."""
    cfg = load_config("quickstart", [*TINY, "TEST.DETECTIONS_PER_IMAGE", "8"])
    torch.manual_seed(3)
    model = build_model(cfg)
    path = tmp_path_factory.mktemp("api") / "model.pth"
    save_checkpoint(path, {"model": model.state_dict(), "gn_det": build_meta(cfg, NAMES, IDS)})
    return path


@pytest.fixture(scope="module")
def model(weights: Path) -> gn_det.Model:
    return gn_det.load_model(weights, device="cpu")


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 255, (70, 110, 3), dtype=np.uint8)


def test_result_has_the_promised_arrays(model: gn_det.Model, pixels: np.ndarray) -> None:
    r = model.predict(pixels, threshold=0.0)
    n = len(r)
    assert n == 8 and model.class_names == NAMES and model.category_ids == IDS
    assert r.boxes.shape == (n, 4) and r.boxes.dtype == np.float32
    assert r.scores.shape == (n,) and (np.diff(r.scores) <= 0).all()
    assert r.classes.dtype == np.int64 and r.names == [NAMES[c] for c in r.classes]
    assert r.masks is not None and r.masks.shape == (n, 70, 110) and r.masks.dtype == bool
    assert r.image_size == (70, 110) and not model.module.training and model.device == torch.device("cpu")


def test_path_image_and_array_are_the_same_image(model: gn_det.Model, pixels: np.ndarray, tmp_path: Path) -> None:
    """A file, a PIL image and RGB pixels give equal detections, and a list gives them in its order."""
    path = tmp_path / "x.png"
    Image.fromarray(pixels).save(path)
    forms: list[Any] = [path, str(path), Image.open(path), pixels]
    first, *others = model.predict(forms, threshold=0.0)
    for other in others:
        assert np.array_equal(first.boxes, other.boxes) and np.array_equal(first.masks, other.masks)
        assert np.array_equal(first.scores, other.scores)
    turned = Image.fromarray(np.ascontiguousarray(np.rot90(pixels)))
    exif = turned.getexif()
    exif[274] = 6  # the camera was turned: upright again after a rotation of 270 degrees
    turned.save(tmp_path / "turned.png", exif=exif)
    turned = Image.open(tmp_path / "turned.png")
    by_path, by_image = model.predict([tmp_path / "turned.png", turned], threshold=0.0)
    assert by_path.image_size == by_image.image_size == (70, 110)
    assert np.array_equal(by_path.boxes, by_image.boxes) and np.array_equal(by_path.boxes, first.boxes)


def test_colors_are_rgb(model: gn_det.Model, pixels: np.ndarray) -> None:
    """Swapped channels are another image: the order matters, and RGB is the one that files have."""
    assert not np.array_equal(
        model.predict(pixels, threshold=0.0).scores, model.predict(pixels[:, :, ::-1], threshold=0.0).scores
    )


def test_select_draw_and_coco(model: gn_det.Model, pixels: np.ndarray) -> None:
    r = model.predict(pixels, threshold=0.0)
    mask = np.zeros(len(r), dtype=bool)
    mask[[0, 2]] = True
    some = r[mask]
    assert (
        len(some) == 2 and np.array_equal(some.boxes, r.boxes[[0, 2]]) and np.array_equal(some.masks, r.masks[[0, 2]])
    )
    assert len(r[1:3]) == 2 and len(r[0]) == 1 and len(r[[]]) == 0 and r[[]].names == []
    assert isinstance(r.draw(), Image.Image) and np.asarray(r[[]].draw()).shape[2] == 3
    for entry, box, index in zip(r.to_coco("a.jpg"), r.boxes, r.classes):
        x0, y0, x1, y1 = box.tolist()
        assert entry["image_id"] == "a.jpg" and entry["category_id"] == IDS[index]
        assert (
            entry["bbox"] == pytest.approx([x0, y0, x1 - x0, y1 - y0], abs=1e-4) and "counts" in entry["segmentation"]
        )
    only = model.predict(pixels, threshold=0.0, classes=[r.names[0]])
    assert set(only.names) == {r.names[0]}
    assert len(model.predict(pixels, threshold=float(r.scores[2]))) == 3


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ([], "predict got an empty list"),
        (np.zeros((4, 4), np.uint8), r"image is an array of uint8 with shape \(4, 4\)"),
        (np.zeros((3, 40, 40), np.uint8), r"shape \(3, 40, 40\); give a path, a PIL image, or an \(H, W, 3\) uint8"),
        (np.zeros((4, 4, 3), np.float32), "image is an array of float32"),
        (np.zeros((0, 4, 3), np.uint8), r"shape \(0, 4, 3\)"),
        ([np.zeros((9, 9, 3), np.uint8), 5], r"images\[1\] is of type int"),
        (None, "image is of type NoneType"),
        (Image.new("I;16", (8, 8)), "mode I;16; convert it to 8 bits"),
        ("no/such.png", "no/such.png"),
        (["a\0b.png"], "a"),
    ],
)
def test_bad_images_are_named(model: gn_det.Model, given: Any, says: str) -> None:
    with pytest.raises(DataError, match=says):
        model.predict(given)


@pytest.mark.parametrize("threshold", [-0.1, 1.5, "0.5", True, float("nan")])
def test_bad_threshold(model: gn_det.Model, pixels: np.ndarray, threshold: Any) -> None:
    with pytest.raises(ConfigError, match="give a number from 0 to 1"):
        model.predict(pixels, threshold=threshold)


@pytest.mark.parametrize("threshold", [np.float32(0.0), np.float64(0), np.int64(0), 0])
def test_threshold_may_be_any_number(model: gn_det.Model, pixels: np.ndarray, threshold: Any) -> None:
    assert len(model.predict(pixels, threshold=threshold)) == 8


def test_default_threshold_is_that_of_the_checkpoint(weights: Path, pixels: np.ndarray, tmp_path: Path) -> None:
    """One for each class, as with gn-det predict; 0.5 where none is stored."""
    every = gn_det.load_model(weights, device="cpu").predict(pixels, threshold=0)
    lowest = float(every.scores.max()) - 1e-6
    payload = torch.load(weights, weights_only=True)
    payload["gn_det"]["thresholds"] = [lowest if k == every.classes[0] else 1.0 for k in range(3)]
    save_checkpoint(tmp_path / "stored.pth", payload)
    stored = gn_det.load_model(tmp_path / "stored.pth", device="cpu")
    assert every.scores[0] < 0.5  # otherwise 0.5 would find it, too
    assert len(gn_det.load_model(weights, device="cpu").predict(pixels)) == 0
    assert stored.predict(pixels).scores.tolist() == [s for s in every.scores.tolist() if s >= lowest]
    assert len(stored.predict(pixels, threshold=0)) == 8


def test_results_compare_by_identity_and_show_in_one_line(model: gn_det.Model, pixels: np.ndarray) -> None:
    one, other = model.predict([pixels, pixels], threshold=0.0)
    assert one == one and one != other and other in [one, other] and one not in [other]
    number = Counter(one.names).most_common(1)[0]
    assert repr(one).startswith(f"<Result: 8 objects ({number[1]} {number[0]}")
    assert repr(one).endswith("), image_size=(70, 110)>")
    assert repr(one[[]]) == "<Result: 0 objects, image_size=(70, 110)>"


def test_weights_of_a_classifier_are_named_as_such(tmp_path: Path) -> None:
    block = {"version": "1", "provenance": [{"kind": "R-50 GN classifier of photos", "trained": True}]}
    save_checkpoint(tmp_path / "c.pth", {"model": {}, "gn_det": block})
    with pytest.raises(WeightsError, match=r"c\.pth: these are weights of a classifier .* MODEL\.WEIGHTS") as told:
        gn_det.load_model(tmp_path / "c.pth")
    assert "--config" not in str(told.value)


def test_what_cannot_be_loaded(tmp_path: Path, model: gn_det.Model, pixels: np.ndarray) -> None:
    with pytest.raises(WeightsError, match=r"none\.pth"):
        gn_det.load_model(tmp_path / "none.pth")
    nothing: Any = None
    with pytest.raises(ConfigError, match=r"weights is None; give a path, such as output/model_best\.pth"):
        gn_det.load_model(nothing)
    with pytest.raises(ConfigError, match=r"config is \[1\]; give a path"):
        gn_det.load_model("a.pth", config=[1])  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="did you mean 'star'"):
        model.predict(pixels, classes=["stat"])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("draw", "visualize.draw"),
        ("evaluation.coco", "evaluation.coco_eval"),
        ("predict", "prediction.images"),
        ("pretrain", "classification"),
        ("run", "engine"),
    ],
)
def test_old_module_names_are_the_new_modules(old: str, new: str) -> None:
    sys.modules.pop(f"gn_det.{old}", None)
    with pytest.warns(DeprecationWarning, match=f"gn_det.{old} is now gn_det.{new}"):
        module = importlib.import_module(f"gn_det.{old}")
    assert module is importlib.import_module(f"gn_det.{new}") and module.__name__ == f"gn_det.{new}"


def test_a_module_that_moved_still_runs(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gn_det.run.replay", str(tmp_path / "none.pth")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "none.pth" in done.stderr
    assert done.stderr.startswith("note: gn_det.run.replay is now gn_det.engine.nonfinite\n")
