"""gn_det.deploy.Detector: what goes into the graph, what comes out of it, and which files it refuses. No torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gn_det.cli import main
from gn_det.config import get_cfg
from gn_det.data.mapper import InferenceMapper
from gn_det.deploy.detector import PROVIDERS, STORED, Detector, Metadata, as_predictor, paste_masks
from gn_det.errors import ConfigError, DataError, UserError, WeightsError
from gn_det.modeling import postprocess
from tests.test_imports import run_blocked

onnx = pytest.importorskip("onnx", reason="needs onnx (extra export)")
pytest.importorskip("onnxruntime", reason="needs onnxruntime (extra export)")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

KEYS = {
    **dict.fromkeys(STORED),
    "INPUT.FORMAT": "BGR",
    "INPUT.MIN_SIZE_TEST": 64,
    "INPUT.MAX_SIZE_TEST": 128,
    "INPUT.BIT_DEPTH": "",
    "INPUT.MAX_PIXELS": 10**6,
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": 0.05,
    "MODEL.ROI_HEADS.NMS_THRESH_TEST": 0.5,
    "TEST.DETECTIONS_PER_IMAGE": 100,
}
METADATA = Metadata(("cat", "dog"), (7, 9), 32, "box", "fp32", KEYS)
#: Detections that the stand-in for a graph gives, whatever it sees: one is empty in the original image.
BOXES = np.array([[10, 4, 50, 60], [0, 0, 64, 64], [5, 5, 5, 9]], np.float32)
SCORES = np.array([0.9, 0.4, 0.3], np.float32)
Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write a file with the inputs and outputs of an exported detector and constants inside."""

    def make(
        metadata: str | None = METADATA.to_json(),
        *,
        shape: tuple[Any, ...] = ("batch", "height", "width", 3),
        names: tuple[str, str] = ("image", "size"),
        opset: int = 21,
    ) -> Path:
        masks = np.random.RandomState(0).uniform(0, 1, (3, 28, 28)).astype(np.float32)
        values = {"boxes": BOXES, "scores": SCORES, "classes": np.array([1, 0, 1]), "masks": masks}
        values["counts"] = np.array([3])
        nodes = [helper.make_node("Identity", [f"{name}_"], [name]) for name in values]
        graph = helper.make_graph(
            nodes,
            "g",
            [
                helper.make_tensor_value_info(names[0], TensorProto.UINT8, shape),
                helper.make_tensor_value_info(names[1], TensorProto.INT64, [shape[0], 2]),
            ],
            [
                helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(v.dtype), v.shape)
                for n, v in values.items()
            ],
            [numpy_helper.from_array(value, f"{name}_") for name, value in values.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
        if metadata is not None:
            helper.set_model_props(model, {"gn_det": metadata})
        path = tmp_path / "model.onnx"
        path.write_bytes(model.SerializeToString())
        return path

    return make


def test_boxes_are_scaled_clipped_and_filtered(write: Write) -> None:
    """The image of 100 x 50 becomes 128 x 64; the third box has no area; the second is below the threshold."""
    detector = Detector(write())
    pixels = np.zeros((50, 100, 3), np.uint8)
    found = detector.predict(pixels, threshold=0.0)
    assert found.image_size == (50, 100) and found.names == ["dog", "cat"] and found.category_ids == (7, 9)
    np.testing.assert_allclose(found.boxes, BOXES[:2] * 50 / 64, atol=1e-5)
    assert found.masks is not None and found.masks.shape == (2, 50, 100)
    assert detector.predict(pixels, threshold=0.0, classes=["cat"]).names == ["cat"]
    with pytest.raises(ConfigError, match="did you mean 'cat'"):
        detector.predict(pixels, classes=["cats"])
    best = detector.predict([pixels, pixels])
    assert [len(b) for b in best] == [1, 1] and best[0].scores[0] == np.float32(0.9)


def test_default_threshold_is_that_of_the_file(write: Write) -> None:
    """The cat of 0.4 is below 0.5, but not below the threshold of its class."""
    pixels = np.zeros((50, 100, 3), np.uint8)
    assert Detector(write()).predict(pixels).names == ["dog"]
    detector = Detector(write(replace(METADATA, thresholds=(0.4, 0.95)).to_json()))
    assert detector.predict(pixels).names == ["cat"]
    assert detector.predict(pixels, threshold=np.float32(0.5)).names == ["dog"]


def test_deep_images_with_bit_depth(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without the flag the error names it; a wrong value is one line."""
    Image.fromarray(np.full((50, 100), 1000, np.uint16)).save(tmp_path / "a.png")
    command = ["predict", "--weights", f"{write()}", f"{tmp_path / 'a.png'}", "--output", f"{tmp_path / 'out'}"]
    for words, code, told in (
        ([], 2, "gn-det predict has --bit-depth"),
        (["--bit-depth", "x"], 2, "INPUT.BIT_DEPTH"),
        (["--bit-depth", "0,2000"], 0, ""),
    ):
        assert main([*command, *words]) == code
        error = capsys.readouterr().err
        assert told in error and error.count("\n") <= 1
    assert as_predictor(write(), bit_depth="0,2000").sample(tmp_path / "a.png")[0].tolist()[0][0] == [128] * 3


def test_input_is_that_of_the_mapper(write: Write, tmp_path: Path) -> None:
    """Read, turned by EXIF, resized and padded as for the model itself; the graph takes RGB."""
    rng = np.random.RandomState(1)
    image = Image.fromarray(rng.randint(0, 256, (61, 37, 3)).astype(np.uint8))
    exif = Image.Exif()
    exif[274] = 6
    image.save(tmp_path / "a.png", exif=exif)
    cfg = get_cfg()
    cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = 64, 128
    expected = InferenceMapper(cfg)(tmp_path / "a.png")["image"].numpy()[::-1].transpose(1, 2, 0)
    detector = Detector(write())
    got, size = detector.prepare(detector.metadata.reader().read(tmp_path / "a.png"))
    height, width = expected.shape[:2]
    assert size.tolist() == [[height, width]] and got.shape[1] % 32 == got.shape[2] % 32 == 0
    assert (
        np.array_equal(got[0, :height, :width], expected) and not got[0, height:].any() and not got[0, :, width:].any()
    )


def test_masks_are_those_of_torch() -> None:
    rng = np.random.RandomState(2)
    masks = rng.uniform(0, 1, (8, 28, 28)).astype(np.float32)
    corner = rng.uniform(-1, 60, (8, 2)).clip(0)
    boxes = np.concatenate([corner, corner + rng.uniform(0.3, 45, (8, 2))], 1).astype(np.float32).clip(0, 90)
    expected = postprocess.paste_masks(torch.from_numpy(masks), torch.from_numpy(boxes), 80, 90).numpy()
    assert expected.any(axis=(1, 2)).sum() >= 6
    assert (paste_masks(masks, boxes, 80, 90) != expected).sum() <= 2  # pixels on the threshold


def test_works_without_torch(write: Write) -> None:
    path = write()
    code = f"""
import numpy as np
from gn_det.deploy import Detector
found = Detector({str(path)!r}).predict(np.zeros((50, 100, 3), np.uint8))
print(found.names, found.draw().size, len(found.to_coco()))
assert not any(name.split('.')[0] in ('torch', 'torchvision', 'matplotlib.pyplot') for name in sys.modules)
"""
    done = run_blocked({"torch", "torchvision"}, code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("['dog'] (") and done.stdout.rstrip().endswith(" 1")


def files_of(folder: Path) -> dict[str, bytes]:
    return {f"{path.relative_to(folder)}": path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_predict_command_without_torch(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every output of images, of tiles and of a video is byte for byte that of the command with torch."""
    cv2 = pytest.importorskip("cv2", reason="needs OpenCV (extra video)")
    path = write(replace(METADATA, thresholds=(0.5, 0.2)).to_json())
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    pixels = np.random.RandomState(0).randint(0, 256, (50, 100, 3)).astype(np.uint8)
    Image.fromarray(pixels).save("photos/a.png")
    film = cv2.VideoWriter("clip.avi", cv2.VideoWriter.fourcc(*"MJPG"), 10, (100, 50))
    for _ in range(3):
        film.write(pixels)
    film.release()
    runs = [
        ["photos", "--save", "drawings,coco,csv,labelme,cvat,yolo,masks", "--agnostic-nms"],
        ["photos", "--tiles", "64", "--threshold", "0.1"],
        ["clip.avi", "--colors", "instance"],
    ]
    code = "from gn_det.cli import main\n"
    for number, words in enumerate(runs):
        command = ["predict", "--weights", str(path), *words, "--output"]
        assert main([*command, f"with/{number}"]) == 0
        code += f"assert main({[*command, f'without/{number}']!r}) == 0\n"
    done = run_blocked({"torch", "torchvision"}, code + "assert 'torch' not in sys.modules\n")
    assert done.returncode == 0, done.stderr
    expected = files_of(Path("with"))
    assert files_of(Path("without")) == expected
    assert {"0/a.png", "0/predictions.csv", "0/yolo/data.yaml", "1/predictions.json", "2/clip.mp4"} <= set(expected)
    document = json.loads(expected["0/predictions.json"])
    assert [a["category_name"] for a in document["annotations"]] == ["dog"]  # 0.4 is below the 0.5 of cats


def test_predict_command_refuses_in_one_line(write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A graph of another tool, a provider that is not there, an image that does not fit, flags of checkpoints."""
    Image.new("RGB", (100, 50)).save(tmp_path / "a.png")
    cases: list[tuple[dict[str, Any], list[str], str]] = [
        ({"metadata": None}, [], "it has no gn_det metadata; give a file written by gn-det export"),
        ({}, ["--device", "gpu"], "provider 'gpu': use one of cpu"),
        ({}, ["--device", "cuda"], "provider cuda"),
        ({"shape": (1, 64, 96, 3)}, [], "does not fit the fixed 64x96"),
        ({}, ["--amp", "auto"], "--amp is for checkpoints"),
        ({}, ["--config", "gn_small.yaml"], "--config is for checkpoints"),
        ({}, ["--max-pixels", "100"], "raise INPUT.MAX_PIXELS"),
    ]
    for options, words, told in cases:
        path = write(**options)
        command = ["predict", "--weights", f"{path}", f"{tmp_path / 'a.png'}", "--output", f"{tmp_path / 'out'}"]
        assert main([*command, *words]) == 2
        error = capsys.readouterr().err
        assert told in error and error.count("\n") == 1


def test_fixed_size_refuses_what_does_not_fit(write: Write) -> None:
    detector = Detector(write(shape=(1, 64, 96, 3)))
    assert detector.shape == (1, 64, 96)
    assert len(detector.predict(np.zeros((64, 96, 3), np.uint8), threshold=0)) == 2
    with pytest.raises(
        DataError, match=r"resized to 64x128 .* does not fit the fixed 64x96 of .*; export without --size"
    ):
        detector.predict(np.zeros((50, 100, 3), np.uint8))


def broken(key: str, value: Any) -> str:
    content = json.loads(METADATA.to_json())
    content[key] = value
    return json.dumps(content)


@pytest.mark.parametrize(
    ("metadata", "told"),
    [
        (None, "it has no gn_det metadata; give a file written by gn-det export"),
        ("{", "metadata cannot be used"),
        ("[" * 100_000, "metadata cannot be used"),
        ("[]", "it must be a dict"),
        (broken("class_names", "cat"), "class_names is 'cat'"),
        (broken("category_ids", [1]), "category_ids has another length"),
        (broken("divisor", 0), "divisor is 0"),
        (broken("keys", {**KEYS, "INPUT.MIN_SIZE_TEST": -5}), "INPUT.MIN_SIZE_TEST is -5"),
        (broken("keys", {}), "INPUT.FORMAT is None"),
        (broken("masks", "all"), "masks is 'all'"),
        (broken("thresholds", [0.5]), "thresholds has another length"),
        (broken("thresholds", [2, 2]), "thresholds[0] is 2"),
    ],
)
def test_metadata_from_elsewhere(write: Write, metadata: str | None, told: str) -> None:
    with pytest.raises(WeightsError) as error:
        Detector(write(metadata))
    assert told in str(error.value) and "\n" not in str(error.value)


def test_files_that_are_refused(write: Write, tmp_path: Path) -> None:
    """Another tool's graph, gigantic inputs, unknown opsets, damaged files, folders: one line each."""
    with pytest.raises(WeightsError, match="are not those of a detector exported by gn-det"):
        Detector(write(names=("input", "size")))
    with pytest.raises(WeightsError, match="input of 1 x 1000000 x 1000000 pixels is larger"):
        Detector(write(shape=(1, 10**6, 10**6, 3)))
    with pytest.raises(WeightsError, match="cannot be loaded"):
        Detector(write(opset=99))
    (tmp_path / "junk.onnx").write_bytes(b"junk" * 100)
    with pytest.raises(WeightsError, match=r"junk\.onnx: cannot be loaded \(.*; export it again"):
        Detector(tmp_path / "junk.onnx")
    with pytest.raises(WeightsError, match="No such file"):
        Detector(tmp_path / "absent.onnx")
    with pytest.raises(ConfigError, match="path is None; give a path"):
        Detector(None)  # type: ignore[arg-type]
    with pytest.raises(WeightsError, match="a folder, not a regular file"):
        Detector(tmp_path)


@pytest.mark.parametrize("location", ["/etc/passwd", "../../../../../../etc/passwd", "link.bin"])
def test_weights_outside_of_the_file_are_not_read(write: Write, tmp_path: Path, location: str) -> None:
    """An ONNX file may keep tensors in other files; none outside of its folder is opened."""
    path = write()
    (tmp_path / "link.bin").symlink_to("/etc/passwd")
    model = onnx.load(path)
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", str(BOXES.nbytes))):
        tensor.external_data.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(WeightsError, match="cannot be loaded"):
        Detector(path)


def test_providers(write: Write) -> None:
    import onnxruntime

    with pytest.raises(ConfigError, match="provider 'gpu': use one of cpu, cuda, tensorrt, openvino"):
        Detector(write(), provider="gpu")
    for name, (long_name, distribution) in PROVIDERS.items():
        if long_name not in onnxruntime.get_available_providers():
            with pytest.raises(ConfigError, match=f"provider {name} is not part of .*; pip install {distribution}"):
                Detector(write(), provider=name)


def test_reports_no_usage(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    off: list[bool] = []
    monkeypatch.setattr("onnxruntime.disable_telemetry_events", lambda: off.append(True))
    Detector(write())
    assert off == [True]


def test_failure_inside_of_onnxruntime_is_one_line(write: Write) -> None:
    detector = Detector(write(shape=(1, 64, 96, 3)))
    with pytest.raises(UserError, match="onnxruntime failed on an input of") as error:
        detector.run(np.zeros((2, 64, 96, 3), np.uint8), np.zeros((2, 2), np.int64))
    assert "\n" not in str(error.value)
