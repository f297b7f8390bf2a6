"""gn-det export: the file computes what the model does, says what it is, and refuses what it cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gn_det.cli import main
from gn_det.config.schema import KEYS
from gn_det.errors import UserError
from gn_det.modeling.postprocess import paste_masks
from tests.deploy.cases import IDS, NAMES, checkpoint, pictures
from tests.test_imports import run_blocked

onnx = pytest.importorskip("onnx", reason="needs onnx (extra export)")
pytest.importorskip("onnxscript", reason="needs onnxscript (extra export)")
onnxruntime = pytest.importorskip("onnxruntime", reason="needs onnxruntime (extra export)")
if tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 7):
    pytest.skip("torch 2.6 cannot export graphs whose sizes depend on the data", allow_module_level=True)

from gn_det.deploy import Detector  # noqa: E402
from gn_det.deploy.detector import STORED, Metadata  # noqa: E402
from gn_det.deploy.export import Exported, Options, _check_reacts, export, translations  # noqa: E402
from gn_det.deploy.parity import ProgramDetector, compare  # noqa: E402


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    pictures(folder)
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("weights") / "gn_fpn.pth", "gn_fpn_2fc", small=True)


@pytest.fixture(scope="module")
def dynamic(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> Exported:
    """GN, FPN, any size, any batch."""
    return export(weights, tmp_path_factory.mktemp("onnx") / "model.onnx")


def agrees(exported: Exported, images: Path) -> None:
    """The tolerance of boxes and scores is that of the golden tests: their weights amplify the last bit."""
    parity = compare(exported, [images])
    assert parity.images == 4 and parity.original > 40
    assert parity.unmatched == 0 and parity.boxes < 0.02 and parity.scores < 5e-4 and parity.masks > 0.998, parity


def test_same_detections_at_any_size(dynamic: Exported, images: Path) -> None:
    agrees(dynamic, images)
    assert dynamic.shape == (None, None, None)


def test_file_is_valid_and_small_and_tells_nothing_of_this_machine(dynamic: Exported) -> None:
    model = onnx.load(dynamic.path)
    onnx.checker.check_model(model, full_check=True)
    assert [(o.domain, o.version) for o in model.opset_import] == [("", 18)]
    kinds = [node.op_type for node in model.graph.node]
    norms = sum(type(m).__name__ == "GroupNorm" for m in dynamic.predictor.module.modules())
    # gamma and beta of every GN are one node
    assert kinds.count("InstanceNormalization") == kinds.count("BatchNormalization") == norms > 20
    assert "GroupNormalization" not in kinds
    assert kinds.count("NonMaxSuppression") == 2
    axes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in model.graph.input}
    assert axes == {"image": ["batch", "height", "width", 3], "size": ["batch", 2]}
    content = dynamic.path.read_bytes()
    assert b"gn_det/modeling" not in content and b"site-packages" not in content
    tensors = sum(t.numel() * t.element_size() for t in dynamic.predictor.module.state_dict().values())
    assert len(content) < 1.05 * tensors + 300_000  # the nodes of so narrow a model weigh as much as a tenth of it


@pytest.mark.parametrize(("groups", "channels"), [(8, 16), (1, 16), (16, 16)])
def test_norm_is_exact_far_from_zero(groups: int, channels: int) -> None:
    """GN of the file equals float64's within 1e-4 at a mean of 30 deviations, where E[x^2] - E[x]^2 is off by 2e-3."""
    torch.manual_seed(0)
    norm = torch.nn.GroupNorm(groups, channels)
    torch.nn.init.normal_(norm.weight, 1, 0.2)
    torch.nn.init.normal_(norm.bias, 0, 0.2)
    x = torch.randn(2, channels, 48, 80) + 30
    program = torch.export.export(norm, (x,))
    made = torch.onnx.export(program, (), dynamo=True, opset_version=18, custom_translation_table=translations(18))
    session = onnxruntime.InferenceSession(made.model_proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got).double(), norm.double()(x.double()), atol=1e-4, rtol=0)


def test_metadata_holds_what_prediction_needs(dynamic: Exported) -> None:
    detector = Detector(dynamic.path)
    assert detector.metadata == dynamic.metadata
    assert detector.class_names == tuple(NAMES) and detector.category_ids == tuple(IDS)
    assert detector.metadata.keys["INPUT.MIN_SIZE_TEST"] == 96
    assert detector.metadata.keys["MODEL.ROI_HEADS.SCORE_THRESH_TEST"] == 0.1


def test_predict_without_torch_finds_what_the_checkpoint_finds(
    dynamic: Exported, weights: Path, images: Path, tmp_path: Path
) -> None:
    """``gn-det predict`` with the checkpoint, and with the file where torch cannot be imported."""
    words = ["predict", str(images), "--threshold", "0.3", "--output"]
    assert main([*words, str(tmp_path / "a"), "--weights", str(weights)]) == 0
    command = [*words, str(tmp_path / "b"), "--weights", str(dynamic.path)]
    done = run_blocked({"torch", "torchvision"}, f"from gn_det.cli import main\nassert main({command!r}) == 0")
    assert done.returncode == 0, done.stderr
    ours, theirs = (json.loads((tmp_path / side / "predictions.json").read_text()) for side in "ab")
    assert ours["images"] == theirs["images"] and ours["categories"] == theirs["categories"]
    assert len(ours["annotations"]) == len(theirs["annotations"]) > 10
    for a, b in zip(ours["annotations"], theirs["annotations"]):
        assert (a["image_id"], a["category_name"]) == (b["image_id"], b["category_name"])
        assert a["bbox"] == pytest.approx(b["bbox"], abs=0.05) and a["score"] == pytest.approx(b["score"], abs=1e-3)
    for picture in (tmp_path / "a").glob("*.png"):
        left, right = (np.asarray(Image.open(p), int) for p in (picture, tmp_path / "b" / picture.name))
        assert (abs(left - right).max(axis=2) > 8).mean() < 0.01


def test_batch_of_two_is_one_after_the_other(dynamic: Exported) -> None:
    """Two images of one size give the detections of each alone."""
    detector = Detector(dynamic.path)
    rng = np.random.RandomState(0)
    image = rng.randint(0, 256, (2, 96, 128, 3)).astype(np.uint8).repeat(4, 1).repeat(4, 2)[:, :96, :128]
    size = np.array([[96, 128], [90, 101]])
    both = detector.run(image, size)
    alone = [detector.run(image[k : k + 1], size[k : k + 1]) for k in (0, 1)]
    assert both["counts"].tolist() == [len(a["scores"]) for a in alone] and min(both["counts"]) > 0
    np.testing.assert_allclose(both["boxes"], np.concatenate([a["boxes"] for a in alone]), atol=0.02)
    assert (alone[0]["boxes"][:, 2] <= 128).all() and (alone[1]["boxes"][:, 2] <= 101).all()


def test_no_detection_and_a_flat_image(dynamic: Exported) -> None:
    found = Detector(dynamic.path).predict(np.zeros((40, 60, 3), dtype=np.uint8), threshold=1.0)
    assert len(found) == 0 and found.boxes.shape == (0, 4)
    assert found.masks is not None and found.masks.shape == (0, 40, 60)


def test_difference_is_found(dynamic: Exported, images: Path) -> None:
    """The comparison fails for another model's weights."""
    with torch.no_grad():
        head = dynamic.predictor.module.roi_heads.box_predictor.cls_score
        head.weight[1] += 0.05
        try:
            assert not compare(dynamic, [images]).ok
        finally:
            head.weight[1] -= 0.05


def test_command_of_a_fixed_c4_with_check(tmp_path: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """C4 at a fixed size with pasted masks: the same on the same padding; the check prints its table."""
    source = checkpoint(tmp_path / "c4.pth", "gn_c4", small=True, MODEL__ROI_MASK_HEAD__NUM_CONV=0)
    target = tmp_path / "c4.onnx"
    code = main(
        ["export", "--weights", f"{source}", "--output", f"{target}", "--size", "160x160", "--check", f"{images}"]
    )
    out = capsys.readouterr()
    assert "1 x 160 x 160" in out.out and "detections unmatched" in out.out and "4 images" in out.out
    # Weights that amplify the last bit may exceed the tolerance of trained ones.
    assert code == 0 or "by more than the tolerance" in out.err
    detector = Detector(target)
    assert detector.shape == (1, 160, 160)
    with pytest.raises(UserError, match=r"resized to 288x96 .* does not fit the fixed 160x160"):
        detector.metadata.keys["INPUT.MAX_SIZE_TEST"] = 400  # type: ignore[index]
        detector.predict(np.zeros((300, 100, 3), dtype=np.uint8))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "options"),
    [
        ("gn_c4", Options()),
        ("bn_c4_boxes", Options()),
        ("bn_fpn_gn_head", Options()),
        ("resnext", Options()),
        ("cascade", Options()),
        ("gn_fpn", Options(opset=21)),
        ("gn_fpn", Options(size=(160, 160), batch=2)),
        ("r18", Options(to="pt2")),
        ("gn_c4", Options(to="pt2", size=(160, 160))),
        ("r18", Options(to="aoti")),
    ],
)
def test_other_models_and_formats(case: str, options: Options, tmp_path: Path, images: Path) -> None:
    exported = export(checkpoint(tmp_path / "model.pth", case), tmp_path / "model", options)
    agrees(exported, images)
    if options.opset == 21:
        kinds = [node.op_type for node in onnx.load(exported.path).graph.node]
        norms = sum(type(m).__name__ == "GroupNorm" for m in exported.predictor.module.modules())
        assert kinds.count("GroupNormalization") == norms > 20


class _Still(torch.nn.Module):
    """Stands in for a graph: one box, whatever it sees."""

    def forward(self, image: torch.Tensor, size: torch.Tensor) -> tuple[torch.Tensor, ...]:
        seen = 0 * image.sum() + 0 * size.sum()
        return torch.tensor([[8.0, 8, 40, 40]]) + seen, torch.tensor([0.9]) + seen, 0 * size[0, :1], 1 + 0 * size[0, :1]


def test_program_predicts_as_an_onnx_file_does(tmp_path: Path) -> None:
    """What --check compares for pt2 and aoti has all that ``predict`` of a detector reads."""
    keys = {key: KEYS[key].default for key in STORED} | {"INPUT.MIN_SIZE_TEST": 64, "INPUT.MAX_SIZE_TEST": 64}
    program = torch.export.export(_Still(), (torch.zeros(1, 64, 64, 3, dtype=torch.uint8), torch.tensor([[64, 64]])))
    torch.export.save(program, tmp_path / "model.pt2")
    metadata = Metadata(("cat",), (7,), 32, "none", "fp32", keys, (0.95,))
    options, outputs = Options(to="pt2", size=(64, 64)), ("boxes", "scores", "classes", "counts")
    detector = ProgramDetector(Exported(tmp_path / "model.pt2", options, metadata, None, outputs))  # type: ignore[arg-type]
    image = np.zeros((64, 64, 3), np.uint8)
    assert detector.predict(image, threshold=0).boxes.tolist() == [[8, 8, 40, 40]]
    assert len(detector.predict(image)) == 0  # below the stored threshold


@pytest.mark.slow
def test_masks_pasted_in_the_graph(tmp_path: Path, images: Path, weights: Path, dynamic: Exported) -> None:
    """They are torch's, pasted from the masks of the other graph at the size of the input."""
    whole = export(weights, tmp_path / "whole.onnx", Options(paste=True))
    parity = compare(whole, [images])
    assert parity.unmatched == 0 and parity.boxes < 0.02
    boxed, pasted = Detector(dynamic.path), Detector(whole.path)
    image, size = boxed.prepare(np.array(Image.open(sorted(images.iterdir())[0]).convert("RGB")))
    found, masks = boxed.run(image, size), pasted.run(image, size)["masks"]
    expected = paste_masks(*(torch.from_numpy(found[key]) for key in ("masks", "boxes")), *image.shape[1:3]).numpy()
    assert masks.shape == expected.shape and len(masks) > 10 and expected.any()
    assert (masks != expected).mean() < 1e-4


@pytest.mark.slow
def test_half_precision(tmp_path: Path, images: Path, weights: Path, dynamic: Exported) -> None:
    half = export(weights, tmp_path / "half.onnx", Options(fp16=True))
    assert half.path.stat().st_size < 0.6 * dynamic.path.stat().st_size
    parity = compare(half, [images])
    assert parity.unmatched < 0.2 * parity.original  # these weights amplify; a trained model loses fewer


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (
            ["--size", "100x160"],
            "--size 100x160: this model takes sides from 32 to 16384 that are multiples of 32; use 128x160",
        ),
        (["--size", "16"], "'16' is not HEIGHTxWIDTH"),
        (["--size", "99999x64"], "use 16384x64"),
        (["--opset", "99"], "--opset 99: use one of 18, 19, 20, 21"),
        (["--check-json", "x.json"], "--check-json needs --check"),
        (["--to", "aoti"], "--to aoti needs --check"),
        (["--size", "64x64", "--dynamic"], "not allowed with argument"),
        (["--weights", "absent.pth"], "absent.pth"),
    ],
)
def test_mistakes_are_one_line(
    flags: list[str], told: str, weights: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "model.onnx"
    try:
        code = main(["export", "--weights", f"{weights}", "--output", f"{target}", *flags])
    except SystemExit as end:
        code = int(end.code or 0)
    error = capsys.readouterr().err
    assert code == 2 and told in error and error.count("\n") == 1
    assert not target.exists()


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--check", "absent.png"], "absent.png: no such image"),
        (["--check", "IMAGES", "--provider", "gpu"], "provider 'gpu': use one of cpu"),
        (["--check", "IMAGES", "--check-json", "absent.json"], "absent.json"),
        (["--output", "FOLDER"], "it is a folder; name a file, such as"),
        (
            ["--output", "x.pt2"],
            "--output x.pt2: --to onnx writes another format; use --to pt2 or aoti, or a name",
        ),
        (
            ["--output", "x.ONNX", "--to", "pt2"],
            "--to pt2 writes another format; use --to onnx, or a name like m",
        ),
    ],
)
def test_cheap_mistakes_are_refused_before_the_export(
    flags: list[str],
    told: str,
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """An export would fail here for lack of the weights."""
    monkeypatch.chdir(tmp_path)
    words = [{"IMAGES": f"{images}", "FOLDER": f"{tmp_path}"}.get(word, word) for word in flags]
    assert main(["export", "--weights", "absent.pth", "--output", "model.onnx", *words]) == 2
    error = capsys.readouterr().err
    assert told in error and "absent.pth" not in error and error.count("\n") == 1


def test_pooling_that_onnx_lacks(tmp_path: Path) -> None:
    source = checkpoint(tmp_path / "m.pth", "gn_fpn_2fc", small=True, MODEL__ROI_MASK_HEAD__POOLER_TYPE="ROIPool")
    with pytest.raises(UserError, match=r"MODEL\.ROI_MASK_HEAD\.POOLER_TYPE ROIPool cannot be exported to ONNX"):
        export(source, tmp_path / "m.onnx")


def test_old_torch_is_one_line(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "__version__", "2.6.0+cpu")
    assert main(["export", "--weights", f"{weights}", "--output", f"{tmp_path / 'm.onnx'}"]) == 2
    error = capsys.readouterr().err
    assert "export needs torch 2.7 or newer; this is 2.6.0+cpu: pip install -U" in error and error.count("\n") == 1
    monkeypatch.setattr(torch, "__version__", "2.7.0a0+79aa17489c.nv25.4")  # of a container: new enough
    with pytest.raises(UserError, match=r"absent\.pth"):
        export("absent.pth", tmp_path / "m.onnx")


def test_weights_without_a_number_of_classes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": {}}, tmp_path / "bare.pth")
    words = ["export", "--weights", f"{tmp_path / 'bare.pth'}", "--output", f"{tmp_path / 'm.onnx'}"]
    assert main([*words, "--config", "gn_c4", "--to", "onnx"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert main(words) == 2
    assert "no config is stored" in capsys.readouterr().err


def test_graph_that_ignores_its_image_is_refused() -> None:
    """Nothing else sees it where there is no --check."""

    class Value:
        def __init__(self, name: str, *inputs: Any) -> None:
            self.name, self.inputs = name, inputs

        def producer(self) -> Any:
            return self if self.inputs else None

    image, size, weight = Value("image"), Value("size"), Value("w")
    good = Value("boxes", Value("conv", image, weight), None, size)
    graph = type("Graph", (), {"inputs": [image, size], "outputs": [good]})
    _check_reacts(graph)
    graph.outputs = [good, Value("scores", Value("conv", weight), size)]
    with pytest.raises(UserError, match="output scores does not depend"):
        _check_reacts(graph)


def test_average_precision_of_both_sides(dynamic: Exported, images: Path, tmp_path: Path) -> None:
    """AP of the original against its own detections as ground truth is high, and the same for the file."""
    paths = sorted(images.iterdir())
    entries: dict[str, list[Any]] = {"images": [], "annotations": [], "categories": []}
    entries["categories"] = [{"id": i, "name": n} for i, n in zip(IDS, NAMES)]
    for number, path in enumerate(paths):
        found = Detector(dynamic.path).predict(path, threshold=0.2)
        height, width = found.image_size
        entries["images"].append({"id": number, "file_name": path.name, "height": height, "width": width})
        for result in found.to_coco(number):
            area = float(np.prod(result["bbox"][2:]))
            entries["annotations"].append({**result, "id": len(entries["annotations"]) + 1, "iscrowd": 0, "area": area})
    truth = tmp_path / "truth.json"
    truth.write_text(json.dumps(entries))
    parity = compare(dynamic, [images], ground_truth=truth)
    assert set(parity.ap) == {"bbox", "segm"}
    original, exported, unpadded = parity.ap["bbox"]
    assert original > 40 and abs(original - exported) < 1 and np.isnan(unpadded)
    entries["images"][0]["file_name"] = "other.png"
    truth.write_text(json.dumps(entries))
    with pytest.raises(UserError, match=r"has no image 0\.png"):
        compare(dynamic, [images], ground_truth=truth)
