"""bf16 and channels_last: what ``auto`` means, that it stays, and that nothing changes where it is off."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gn_det.classification import Settings, pretrain
from gn_det.compare.plan import make_plan
from gn_det.compare.suite import parse_suite
from gn_det.config import load_config, parse_config
from gn_det.engine import precision
from gn_det.engine.engines import Engine
from gn_det.engine.run import evaluate, train
from gn_det.modeling import build_model
from gn_det.prediction.predictor import load_predictor
from gn_det.structures import Masks, Targets
from tests.classification.test_run import tiny
from tests.engine.test_run import shapes, small

assert shapes  # a fixture
AUTO = ["SOLVER.AMP.ENABLED", "auto", "MODEL.CHANNELS_LAST", "auto"]
ON = ["SOLVER.AMP.ENABLED", "True", "MODEL.CHANNELS_LAST", "True"]


@pytest.fixture
def cpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``cpu("avx512_bf16")`` is this CPU from then on."""

    def become(*features: str) -> None:
        monkeypatch.setattr(precision, "cpu_features", lambda: frozenset({"avx2", *features}))

    become("avx512_bf16")
    return become


def chosen(cfg: Any) -> tuple[bool, bool]:
    return cfg.SOLVER.AMP.ENABLED, cfg.MODEL.CHANNELS_LAST


@pytest.mark.parametrize("feature", [*precision.BF16_FEATURES, ""])
def test_auto_reads_the_features_of_the_cpu(feature: str, cpu: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    cpu(feature)
    cfg = load_config("quickstart", AUTO)
    settled = precision.settle(cfg, "cpu")
    assert chosen(settled) == (bool(feature), bool(feature)) and chosen(cfg) == ("auto", "auto")
    assert chosen(precision.settle(cfg, "cuda:0")) == (False, False)  # no GPU has been measured
    assert f"SOLVER.AMP.ENABLED auto: {bool(feature)} (this CPU has {feature or 'none of amx_bf16'}" in caplog.text
    settings = tiny(Path("out"), amp="auto", channels_last="auto").settled("cpu", {})
    assert (settings.amp, settings.channels_last) == ("bf16" if feature else "off", bool(feature))


def test_emulated_bf16_is_a_warning_with_the_missing_features(cpu: Any, caplog: pytest.LogCaptureFixture) -> None:
    for keys in (["SOLVER.AMP.ENABLED", "True"], ["TEST.AMP", "True"]):
        caplog.clear()
        cpu()
        precision.settle(load_config("quickstart", keys), "cpu")
        assert "bf16 is emulated and slower than float32: this CPU has none of amx_bf16, avx512_bf16" in caplog.text
    caplog.clear()
    cpu("amx_bf16")
    precision.settle(load_config("quickstart", ON), "cpu")
    assert not caplog.text


def test_a_resumed_run_keeps_what_auto_chose(
    shapes: list[str], tmp_path: Path, cpu: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """On another CPU, too; and bf16 resumes bit for bit."""
    constant = ["SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR", "SOLVER.WARMUP_ITERS", "0", *AUTO]
    train(small(shapes, tmp_path / "whole", "SOLVER.MAX_ITER", "4", *constant))
    train(small(shapes, tmp_path / "cut", "SOLVER.MAX_ITER", "2", *constant))
    cpu()
    caplog.set_level(logging.INFO)
    train(small(shapes, tmp_path / "cut", "SOLVER.MAX_ITER", "4", *constant), resume=True)
    assert caplog.text.count("True (as the checkpoint has it)") == 2
    files = [torch.load(tmp_path / f / "model_final.pth", weights_only=True) for f in ("whole", "cut")]
    assert all(torch.equal(files[0]["model"][k], v) for k, v in files[1]["model"].items())
    for file in files:
        assert chosen(parse_config(file["gn_det"]["config"], "file")) == (True, True)
    assert chosen(load_config(tmp_path / "whole" / "config.yaml")) == (True, True)


def test_evaluation_and_prediction_are_fp32_unless_asked(
    shapes: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """autocast as the backbone sees it and as it is printed: in evaluation and prediction only with TEST.AMP."""
    caplog.set_level(logging.INFO)
    seen: list[tuple[bool, bool]] = []

    def spy(module: Any, inputs: tuple[Tensor, ...]) -> None:
        seen.append((module.training, torch.is_autocast_enabled("cpu")))

    class Watched(Engine):
        def build_model(self, cfg: Any) -> Any:
            model = build_model(cfg)
            model.backbone.register_forward_pre_hook(spy)
            return model

    cfg = small(shapes, tmp_path, "SOLVER.MAX_ITER", "1", *ON)
    train(cfg, engine=Watched())
    assert set(seen) == {(True, True), (False, False)}
    weights, image = tmp_path / "model_final.pth", torch.zeros(32, 32, 3, dtype=torch.uint8).numpy()
    for keys, amp in (([], False), (["TEST.AMP", "True"], True)):
        seen.clear()
        caplog.clear()
        evaluate(cfg, keys, weights=weights, engine=Watched())
        load_predictor(weights, overrides=keys, device="cpu", engine=Watched()).detect(image)
        assert set(seen) == {(False, amp)}
        assert ("bf16 autocast" in caplog.text) == amp


def test_the_autocast_of_the_caller_stays() -> None:
    """Who predicts within one, in a program of their own, gets it."""
    ones = torch.ones(2, 2)
    with torch.autocast("cpu", torch.bfloat16), precision.inference_autocast(load_config("quickstart"), "cpu"):
        assert (ones @ ones).dtype == torch.bfloat16
    with precision.inference_autocast(load_config("quickstart"), "cpu"):
        assert (ones @ ones).dtype == torch.float32


def test_weights_cast_once_give_what_autocast_gives() -> None:
    """Equal to the bit: both round the same weights; norms stay in fp32."""
    torch.manual_seed(0)
    cfg = load_config("quickstart", ["MODEL.ROI_HEADS.NUM_CLASSES", "5", "TEST.AMP", "True"])
    model = build_model(cfg).eval()
    samples = [{"image": torch.randint(0, 256, (3, 96, 128), dtype=torch.uint8)}]
    found = []
    for ready in (precision.lay_out, lambda m, c: precision.lay_out_for_inference(m, c, "cpu")):
        model = ready(model.to(memory_format=torch.channels_last), cfg)
        with torch.inference_mode(), precision.inference_autocast(cfg, "cpu"):
            found.append(model(samples)[0])
    assert model.backbone.bottom_up.stem.conv1.weight.dtype == torch.bfloat16
    assert {p.dtype for n, p in model.named_parameters() if ".norm." in n} == {torch.float32}
    assert torch.equal(found[0].boxes, found[1].boxes) and torch.equal(found[0].scores, found[1].scores)


def losses_of(*keys: str, autocast: bool = False) -> dict[str, float]:
    torch.manual_seed(0)
    cfg = load_config("quickstart", ["MODEL.ROI_HEADS.NUM_CLASSES", "5", *keys])
    model = precision.lay_out(build_model(cfg), cfg)
    boxes = torch.tensor([[10.0, 12, 60, 70], [30, 5, 90, 50]])
    polygons = [[torch.tensor([x0, y0, x1, y0, x1, y1, x0, y1]).double().numpy()] for x0, y0, x1, y1 in boxes]
    sample = {
        "image": torch.randint(0, 256, (3, 96, 128), dtype=torch.uint8),
        "targets": Targets((96, 128), boxes, torch.tensor([1, 3]), Masks(polygons)),
    }
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        losses: dict[str, Tensor] = model([sample])
        torch.stack([v.float() for v in losses.values()]).sum().backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in model.parameters())
    return {name: float(v.detach()) for name, v in losses.items()}


def test_channels_last_is_equal_up_to_rounding() -> None:
    """fp32: 1e-5; bf16: a few percent."""
    nchw = losses_of()
    assert losses_of("MODEL.CHANNELS_LAST", "True") == pytest.approx(nchw, rel=1e-5, abs=1e-6)
    assert losses_of("MODEL.CHANNELS_LAST", "True", autocast=True) == pytest.approx(nchw, rel=0.05, abs=0.02)


def test_rows_of_a_suite_store_what_auto_chose(cpu: Any) -> None:
    """Keys at their defaults do not enter the key of a run: finished runs of earlier versions still count."""
    rows = [
        {"id": "a", "config": "quickstart.yaml"},
        {"id": "b", "kind": "pretrain", "arch": "resnet8", "norm": "GN", "data": "digits", "groups": 8},
    ]
    plain = make_plan(parse_suite({"name": "case", "rows": rows}, "case.yaml"), Engine()).jobs
    for job in plain:
        decides = job._decides
        assert "channels_last" not in decides.get("settings", {})
        config = decides.get("config", "")
        assert "CHANNELS_LAST" not in config and "AMP: false" not in config
    rows[1] |= {"amp": "auto", "channels_last": "auto"}
    keys = []
    for feature in ("avx512_bf16", "amx_bf16", ""):
        cpu(feature)
        jobs = make_plan(parse_suite({"name": "case", "rows": rows}, "case.yaml"), Engine(), overrides=AUTO).jobs
        by_row = {job.row.id: job for job in jobs}
        assert chosen(by_row["a"].cfg) == (bool(feature), bool(feature))
        assert by_row["b"].settings["amp"] == ("bf16" if feature else "off")
        keys.append([job.settings_key("") for job in jobs])
    assert keys[0] == keys[1] and keys[2] == [job.settings_key("") for job in plain] != keys[0]


def test_pretraining_in_bf16_and_channels_last(tmp_path: Path, cpu: Any) -> None:
    """It learns as in fp32, resumes on another CPU as it began, and earlier versions' settings still count."""
    error = {}
    for amp, last in (("off", False), ("auto", "auto")):
        done = pretrain(tiny(tmp_path / amp, amp=amp, channels_last=last))
        error[amp] = done["curve"][-1]["train_loss"]
    assert error["auto"] == pytest.approx(error["off"], abs=0.1)
    assert (done["settings"]["amp"], done["settings"]["channels_last"]) == ("bf16", True)
    cpu()
    again = pretrain(tiny(tmp_path / "auto", amp="auto", channels_last="auto"), resume=True)
    assert again["settings"] == done["settings"]
    old = tmp_path / "off" / "summary.json"
    old.write_text(old.read_text().replace('"channels_last": false,', "").replace(',\n  "channels_last": false', ""))
    assert "channels_last" not in old.read_text()
    assert pretrain(tiny(tmp_path / "off"), resume=True)["settings"]["amp"] == "off"
    assert isinstance(Settings.from_dict(again["settings"]), Settings)
