"""The weights file: a backbone by Detectron2's bare names, with what a detection config must know of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gn_det
from gn_det.checkpoint.io import save_checkpoint
from gn_det.classification.image_sources import Source
from gn_det.classification.network import Classifier
from gn_det.classification.settings import DEPTHS, Settings


def write_weights(path: Path, model: Classifier, settings: Settings, source: Source, facts: dict[str, Any]) -> None:
    """Write ``model`` for MODEL.WEIGHTS of either engine.

    Trunk tensors are named ``stem.conv1.weight``, ``res2.0.conv1.weight`` ...; the classifier goes along as
    ``stem.fc``, which detectors pass over and conversion to torchvision's layout keeps.

    Args:
        facts: plain values of the run to keep in the provenance (epoch, error, date).

    Raises:
        WriteError: the file cannot be written.
    """
    state = {name: value.detach().cpu().contiguous() for name, value in model.trunk.state_dict().items()}
    state["stem.fc.weight"] = model.linear.weight.detach().cpu()
    state["stem.fc.bias"] = model.linear.bias.detach().cpu()
    backbone = settings.arch in DEPTHS
    kind = f"{settings.arch} {settings.norm} classifier of {Path(settings.data).name}"
    block = {
        "version": gn_det.__version__,
        "class_names": [],
        "category_ids": [],
        "config": "",
        "weights": {
            "norm": settings.norm,
            "groups": list(settings.group_rule) if settings.norm == "GN" else None,
            "preprocessing": _preprocessing(settings, source) if backbone else None,
            # Channel order and std may be folded into the stem for a config that wants others.
            "foldable": backbone,
            "asks": False,
        },
        "provenance": [
            {
                "kind": kind,
                "trained": True,
                "settings": {**settings.to_dict(), "data": Path(settings.data).name, "output": ""},
                "classes": list(source.class_names),
                **facts,
            }
        ],
    }
    # Detectron2 finds where bare names belong only when told to search.
    save_checkpoint(
        path,
        {
            "model": state,
            "__author__": f"gn_det {gn_det.__version__}",
            "matching_heuristics": True,
            "gn_det": block,
        },
    )


def _preprocessing(settings: Settings, source: Source) -> dict[str, Any]:
    return {
        "format": source.input.order,
        "pixel_mean": list(source.input.mean),
        "pixel_std": list(source.input.std),
        # Basic blocks have one place for the stride: any config suits.
        "stride_in_1x1": settings.stride_in_1x1 if DEPTHS[settings.arch] >= 50 else None,
    }
