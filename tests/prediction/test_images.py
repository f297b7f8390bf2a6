"""predict: any input, any name, one bad file does not cost the others, the json says what was found."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from pycocotools import mask as coco_mask

from gn_det.data.image import ImageReader
from gn_det.engine.dist import resolve_device
from gn_det.errors import ConfigError, DataError, UserError, WeightsError
from gn_det.files import atomic_write
from gn_det.prediction.images import predict
from gn_det.prediction.predictor import Predictor, Selection, nms
from gn_det.structures import Detections, Sample

NAMES = ("Kreis", "日本", "square")


def find(sample: Sample) -> Detections:
    """Three objects on every image, the second one below a threshold of 0.5."""
    height, width = sample["height"], sample["width"]
    masks = torch.zeros(3, height, width, dtype=torch.bool)
    masks[:, 4:10, 5:20] = True
    boxes = torch.tensor([[5.0, 4, 20, 10]]).repeat(3, 1)
    return Detections((height, width), boxes, torch.tensor([0.6, 0.3, 0.9]), torch.tensor([0, 1, 2]), masks)


def sample_of(image: Path | np.ndarray) -> Sample:
    pixels = ImageReader("RGB").read(image) if isinstance(image, Path) else image
    return Sample(image=torch.from_numpy(pixels.copy()), height=pixels.shape[0], width=pixels.shape[1])


def fake(infer: Callable[[Sample], Detections], **more: Any) -> Predictor:
    """A predictor of three classes that finds what ``infer`` says."""
    return Predictor(sample_of, infer, NAMES, (7, 8, 19), **more)


PREDICTOR = fake(find)


def run(images, output: Path, **kwargs):
    lines: list[str] = []
    result = predict("unused.pth", images, output, predictor=PREDICTOR, report=lines.append, **kwargs)
    return result, lines


def test_folder_with_any_names(photos: Path, tmp_path: Path) -> None:
    result, lines = run([photos], tmp_path / "out")
    drawings = {i["drawing"] for i in result["images"]}
    assert drawings == {"é 1.png", "x.png", "a[1].png", "x-2.png"}  # sub/x.png and x.jpg do not overwrite each other
    assert {p.name for p in (tmp_path / "out").iterdir()} == drawings | {"predictions.json"}
    assert any("notes.txt" in line for line in lines) and not any(".hidden" in line for line in lines)
    picture = np.array(Image.open(tmp_path / "out" / "é 1.png"))
    assert picture.std() > 0  # something was drawn


def test_json_is_coco(photos: Path, tmp_path: Path) -> None:
    """Two detections pass 0.5; ids, box, RLE and area agree with each other."""
    run(photos / "x.jpg", tmp_path / "out")
    data = json.loads((tmp_path / "out" / "predictions.json").read_text(encoding="utf-8"))
    assert data["categories"] == [{"id": i, "name": n} for i, n in zip((7, 8, 19), NAMES)]
    assert [(a["category_id"], a["category_name"]) for a in data["annotations"]] == [(19, "square"), (7, "Kreis")]
    assert [a["id"] for a in data["annotations"]] == [1, 2]
    ann = data["annotations"][0]
    assert ann["bbox"] == [5, 4, 15, 6] and ann["area"] == 90 and ann["iscrowd"] == 0
    assert coco_mask.decode(ann["segmentation"]).shape == (40, 60)
    assert data["images"][0] | {"file_name": ""} == {
        "id": 1, "file_name": "", "height": 40, "width": 60, "drawing": "x.png"
    }  # fmt: skip


def test_threshold_and_classes(photos: Path, tmp_path: Path) -> None:
    image = photos / "x.jpg"
    found = lambda **k: [a["category_id"] for a in run(image, tmp_path / "out", **k)[0]["annotations"]]  # noqa: E731
    assert found(threshold=0.0) == [19, 7, 8]
    assert found(threshold=0.8) == [19]
    assert found(classes=["kreis"]) == [7]
    assert found(threshold=0.95) == []
    for typo in ("sqare", "SQARE"):
        with pytest.raises(ConfigError, match="did you mean 'square'"):
            run(image, tmp_path / "out", classes=[typo])
    with pytest.raises(ConfigError, match="give a number from 0 to 1"):
        run(image, tmp_path / "out", threshold=50)


def test_corrupt_image_is_named_and_the_others_go_on(photos: Path, tmp_path: Path) -> None:
    (photos / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n but not really")
    with pytest.raises(DataError, match=r"1 of 5 images could not be read.*broken\.png"):
        run([photos], tmp_path / "out")
    data = json.loads((tmp_path / "out" / "predictions.json").read_text(encoding="utf-8"))
    assert len(data["images"]) == 4 and [i["id"] for i in data["images"]] == [1, 2, 3, 4]


def test_nothing_readable_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("no image")
    with pytest.raises(DataError, match=r"no image could be read: .*a\.txt"):
        run([tmp_path / "a.txt"], tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_nothing_found_tells_the_best_score(photos: Path, tmp_path: Path) -> None:
    _, lines = run([photos / "x.jpg"], tmp_path / "out", threshold=0.95)
    assert lines[-1] == "note: no object was found with a score of 0.95 or more; the best score was 0.90"


@pytest.mark.parametrize("device", ["gpu", "xla", "meta", "cuda:99"])
def test_devices_that_are_none(device: str) -> None:
    with pytest.raises(ConfigError, match=f"device is '{device}'"):
        resolve_device(device, "device")


def test_drawings_are_no_inputs_of_the_next_run_and_inputs_are_never_overwritten(photos: Path) -> None:
    for _ in range(2):
        result, _ = run([photos], photos / "drawn")
        assert len(result["images"]) == 4
    with pytest.raises(ConfigError, match="overwrite an input"):
        run([photos], photos)


def test_a_checkpoint_brings_its_config_and_classes(photos: Path, tmp_path: Path) -> None:
    """Model, classes and ids come from the file alone; weights that leave a layer untrained are refused."""
    from gn_det.checkpoint.io import save_checkpoint
    from gn_det.checkpoint.meta import build_meta
    from gn_det.config import load_config
    from gn_det.modeling.build import build_model

    tiny = ["MODEL.ROI_HEADS.NUM_CLASSES", "3", "MODEL.FPN.OUT_CHANNELS", "32", "INPUT.MIN_SIZE_TEST", "64"]
    cfg = load_config("quickstart.yaml", [*tiny, "TEST.DETECTIONS_PER_IMAGE", "5"])
    state = build_model(cfg).state_dict()
    meta = build_meta(cfg, NAMES, (7, 8, 19))
    file = tmp_path / "w.pth"
    save_checkpoint(file, {"model": state, "iteration": 1, "gn_det": meta})
    lines: list[str] = []
    result = predict(
        file, photos / "x.jpg", tmp_path / "out", threshold=0.0, device="cpu", overrides={"TEST.AMP": "auto"},
        report=lines.append,
    )  # fmt: skip
    assert re.fullmatch(r"TEST.AMP auto: (True|False) \(this CPU has .*\).", lines[0])
    assert result["categories"][1] == {"id": 8, "name": "日本"}
    assert 0 < len(result["annotations"]) <= 5 and "segmentation" in result["annotations"][0]

    save_checkpoint(file, {"model": state})
    with pytest.raises(WeightsError, match="--config"):
        predict(file, photos / "x.jpg", tmp_path / "out", device="cpu", report=lines.append)
    del state["roi_heads.box_predictor.cls_score.weight"]
    save_checkpoint(file, {"model": state, "gn_det": meta})
    with pytest.raises(WeightsError, match="cls_score"):
        predict(file, photos / "x.jpg", tmp_path / "out", device="cpu", report=lines.append)
    with pytest.raises(ConfigError, match="device"):
        predict(file, photos / "x.jpg", tmp_path / "out", device="cuda:77", report=lines.append)


def test_names_that_are_not_utf_8_come_back_from_the_json(tmp_path: Path) -> None:
    folder, output = tmp_path / os.fsdecode(b"in\xff"), tmp_path / os.fsdecode(b"out\xff")
    folder.mkdir()
    for name in (os.fsdecode(b"caf\xe9.png"), "日本.png"):
        Image.fromarray(np.full((40, 60, 3), 90, np.uint8)).save(os.fsencode(folder / name), "PNG")
    run([folder], output)
    read = json.loads((output / "predictions.json").read_text(encoding="utf-8"))
    assert [Path(i["file_name"]).exists() for i in read["images"]] == [True, True]
    assert sorted(i["drawing"] for i in read["images"]) == ["caf_.png", "日本.png"]
    assert all((output / i["drawing"]).is_file() for i in read["images"]) and read["categories"][1]["name"] == "日本"


def test_an_image_too_large_for_the_memory_costs_only_itself(photos: Path, tmp_path: Path) -> None:
    seen = []

    def hungry(sample: Sample) -> Detections:
        seen.append(sample)
        if len(seen) == 2:  # x.jpg
            raise RuntimeError(
                "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"
            )
        return find(sample)

    with pytest.raises(DataError, match=r"1 of 4 images could not be read.*x\.jpg: not enough memory"):
        predict("w", [photos], tmp_path / "out", predictor=fake(hungry), report=lambda line: None)
    assert len(json.loads((tmp_path / "out" / "predictions.json").read_text())["images"]) == 3


def test_masks_of_the_best_are_not_copied() -> None:
    masks = torch.zeros(4, 8, 8, dtype=torch.bool)
    det = Detections((8, 8), torch.zeros(4, 4), torch.tensor([0.9, 0.8, 0.8, 0.1]), torch.tensor([0, 1, 0, 1]), masks)
    kept = Selection(0.5)(det).masks
    assert kept is not None and len(kept) == 3 and np.shares_memory(kept, masks.numpy())
    masks[2] = True
    some = Selection(0.5, {0})(det).masks
    assert some is not None and some.all(axis=(1, 2)).tolist() == [False, True]


def test_suppression_is_that_of_torchvision() -> None:
    """The same boxes in the same order; boxes without area, equal boxes, and none."""
    rng = np.random.RandomState(0)
    for number in (0, 1, 40, 300):
        corner = rng.randint(0, 40, (number, 2))
        boxes = np.concatenate([corner, corner + rng.randint(0, 30, (number, 2))], 1).astype(np.float32)
        scores = torch.linspace(1, 0, number)
        for iou in (0.0, 0.25, 0.5, 0.7):
            assert nms(boxes, iou).tolist() == torchvision.ops.nms(torch.from_numpy(boxes), scores, iou).tolist()


def test_output_is_a_folder_or_nothing(photos: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for output in (tmp_path / "pipe", Path("/dev/null"), "a\0b", "x" * 5000, photos / "x.jpg"):
        with pytest.raises(UserError):
            run([photos], output)
    for path in (str(tmp_path / "pipe"), "/dev/null", str(tmp_path)):
        with pytest.raises(UserError, match="not a regular file"):
            atomic_write(path, b"x")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["pipe", photos.name]


def test_the_threshold_itself_is_kept() -> None:
    """\"Lowest score kept\", also where it is no round number in binary; best first."""
    scores = torch.tensor([0.25, 0.5, 0.75])
    found = Selection(0.5)(Detections((4, 4), torch.zeros(3, 4), scores, torch.zeros(3, dtype=torch.int64)))
    assert found.scores.tolist() == [0.75, 0.5]


def test_area_is_that_of_the_mask(tmp_path: Path) -> None:
    """COCO's area is the mask's where there is one, the box's otherwise."""
    path = tmp_path / "a.png"
    Image.new("RGB", (40, 30)).save(path)

    def sparse(sample: Sample) -> Detections:
        found = find(sample)
        assert found.masks is not None
        found.masks[:, 5:] = False
        return found

    predict("unused.pth", [path], tmp_path / "out", predictor=fake(sparse))
    areas = [a["area"] for a in json.loads((tmp_path / "out" / "predictions.json").read_text())["annotations"]]
    assert areas == [15.0, 15.0]
