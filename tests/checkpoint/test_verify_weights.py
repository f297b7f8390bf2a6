"""benchmarks/verify_weights.py: what it records, and what it calls a failure, on small files."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.verify_weights import FILES, Published, run
from gn_det.checkpoint.weights_uri import MIRROR, resolve_url
from gn_det.config import load_config
from gn_det.modeling.build import build_model

URI = "detectron2://Toys/model_final_123456.pkl"
TOY = Published(URI, "quickstart.yaml", ("MODEL.ROI_HEADS.NUM_CLASSES", "3"), 42.6, 38.6)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A toy detector in the mirror, as ``torch.save`` writes it."""
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(MIRROR, str(tmp_path / "mirror"))
    path = tmp_path / "mirror" / "detectron2/Toys/model_final_123456.pkl"
    path.parent.mkdir(parents=True)
    model = build_model(load_config(TOY.config, list(TOY.overrides)))
    torch.save({"model": model.state_dict(), "__author__": "test"}, path)
    return path


def rows(results: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(results.read_text())["files"]
    return found


def test_a_file_as_published(file: Path, tmp_path: Path) -> None:
    calls: list[str] = []

    def evaluate(weights: str, cfg: Any) -> dict[str, float]:
        calls.append(weights)
        return {"bbox/AP": 42.64, "segm/AP": 38.55}

    assert run([TOY], tmp_path / "r.json", evaluate) == 0
    (row,) = rows(tmp_path / "r.json")
    assert row["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest() and row["bytes"] == file.stat().st_size
    assert row["error"] == "" and row["measured_box_ap"] == 42.64 and row["loaded"] > 50 and calls == [URI]
    assert run([TOY], tmp_path / "s.json", None) == 0 and "measured_box_ap" not in rows(tmp_path / "s.json")[0]


@pytest.mark.parametrize("measured", [42.2, float("nan")])
def test_another_ap_is_a_failure(file: Path, tmp_path: Path, measured: float) -> None:
    assert run([TOY], tmp_path / "r.json", lambda *_: {"bbox/AP": 42.6, "segm/AP": measured}) == 1
    (row,) = rows(tmp_path / "r.json")
    assert row["error"] == f"mask AP {measured:.2f} instead of 38.6"


def test_one_bad_file_does_not_cost_the_others(file: Path, tmp_path: Path) -> None:
    """A missing file, one that misses a tensor, and one that fits: each has its row."""
    payload = torch.load(file, weights_only=True)
    del payload["model"]["backbone.bottom_up.res3.0.conv1.weight"]
    torch.save(payload, file.with_name("partial.pkl"))
    missing, partial = (replace(TOY, uri=f"detectron2://Toys/{name}.pkl") for name in ("none", "partial"))
    assert run([missing, partial, TOY], tmp_path / "r.json", None) == 2
    first, second, third = rows(tmp_path / "r.json")
    assert "none.pkl" in first["error"] and first["sha256"] == ""
    assert "res3.0.conv1.weight" in second["error"] and second["sha256"] and third["error"] == ""


def test_every_listed_file_has_a_url_and_a_config() -> None:
    assert len({f.uri for f in FILES}) == len(FILES)
    for entry in FILES:
        assert (resolve_url(entry.uri) or "").startswith("https://")
        cfg = load_config(entry.config, list(entry.overrides))
        assert ("GN" if "gn" in entry.uri.lower() else "FrozenBN") == cfg.MODEL.RESNETS.NORM
