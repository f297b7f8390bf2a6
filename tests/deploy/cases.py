"""Checkpoints of the golden models, for tests that export them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from gn_det.checkpoint.meta import build_meta
from gn_det.config import get_cfg
from gn_det.modeling import MaskRCNN, build_model
from tests.golden.model_cases import (
    NUM_CLASSES,
    apply_calibration,
    calibration_batch,
    configure,
    fill_weights,
    make_scene,
    measure_calibration,
)

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = [f"thing {k}" for k in range(NUM_CLASSES)]
#: json ids that are not the class indices.
IDS = [10 * k + 3 for k in range(NUM_CLASSES)]


def golden_model(case: str, **changes: Any) -> tuple[Any, MaskRCNN]:
    """Config and calibrated model, in evaluation mode; ``changes`` are keys with "__" for "."."""
    cfg = configure(get_cfg(), case, INPUT__MIN_SIZE_TEST=96, INPUT__MAX_SIZE_TEST=160, **changes)
    model = build_model(cfg).eval()
    fill_weights(model)
    meta = json.loads(dict(np.load(GOLDEN / f"{case}.npz"))["meta"].tobytes())
    apply_calibration(model, meta["calibration"])
    return cfg, model


#: Keys over those of a golden case: few layers, which export fast.
SMALL = {
    "MODEL__RESNETS__DEPTH": 18,
    "MODEL__RESNETS__STEM_OUT_CHANNELS": 32,
    "MODEL__RPN__PRE_NMS_TOPK_TEST": 100,
    "MODEL__ROI_MASK_HEAD__NUM_CONV": 1,
}


def small_model(case: str, **changes: Any) -> tuple[Any, MaskRCNN]:
    """A golden case with :data:`SMALL`, calibrated anew."""
    cfg = configure(get_cfg(), case, INPUT__MIN_SIZE_TEST=96, INPUT__MAX_SIZE_TEST=160, **{**SMALL, **changes})
    model = build_model(cfg).eval()
    fill_weights(model)
    measure_calibration(model, calibration_batch())
    return cfg, model.eval()


def checkpoint(path: Path, case: str, *, small: bool = False, **changes: Any) -> Path:
    """Write a golden model as gn-det train would."""
    cfg, model = (small_model if small else golden_model)(case, **changes)
    torch.save({"model": model.state_dict(), "gn_det": build_meta(cfg, NAMES, IDS)}, path)
    return path


def pictures(folder: Path) -> list[Path]:
    """PNG files of odd sizes, high, wide and small, and one of a single color."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for k, (height, width) in enumerate([(97, 131), (130, 90), (33, 70), (240, 200)]):
        paths.append(folder / f"{k}.png")
        Image.fromarray(make_scene(20 + k, height, width, 0).image.transpose(1, 2, 0)).save(paths[-1])
    return paths
