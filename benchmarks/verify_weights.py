"""Fetch every published weights file that gn_det names, load it strictly, and compare AP where COCO is present.

``make verify-weights`` on a machine with a network; about 2 GB stay in the download cache. For each file: its sha256
and size, whether every tensor of the backbone or detector finds its place, and for detectors, where
``$DETECTRON2_DATASETS/coco`` has val2017, box and mask AP beside the published ones. Results go to
``benchmarks/results/verify_weights.json`` after every file. The exit code is 1 if a file failed.
"""

from __future__ import annotations

import argparse
import datetime
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import gn_det
from gn_det.checkpoint.weights import load_weights
from gn_det.checkpoint.weights_uri import local_path, sha256_of, split_options
from gn_det.errors import UserError
from gn_det.files import atomic_write, json_bytes
from gn_det.modeling.build import build_model

RESULTS = Path(__file__).parent / "results" / "verify_weights.json"
#: Largest accepted difference to a published AP, which has one decimal.
TOLERANCE = 0.1


@dataclass(frozen=True)
class Published:
    """One file: where it is, the config it belongs to, and for detectors the published AP on val2017.

    AP as in Detectron2's model zoo.
    """

    uri: str
    config: str
    overrides: tuple[str, ...] = ()
    box_ap: float | None = None
    mask_ap: float | None = None


_X101 = ("MODEL.RESNETS.DEPTH", "101", "MODEL.RESNETS.STRIDE_IN_1X1", "False")
_MISC = "detectron2://Misc"
_SCRATCH_3X = "scratch_mask_rcnn_R_50_FPN_3x_gn/138602908/model_final_01ca85.pkl"
_SCRATCH_9X = "scratch_mask_rcnn_R_50_FPN_9x_gn/183808979/model_final_da7b4c.pkl"
_ZOO = "detectron2://COCO-InstanceSegmentation"
FILES = (
    Published("catalog://ImageNetPretrained/FAIR/R-50-GN", "gn_fpn.yaml"),
    Published("catalog://ImageNetPretrained/FAIR/R-101-GN", "gn_fpn_r101.yaml"),
    Published("catalog://ImageNetPretrained/MSRA/R-50", "bn_fpn.yaml"),
    Published("catalog://ImageNetPretrained/MSRA/R-101", "bn_fpn_r101.yaml"),
    Published(
        "catalog://ImageNetPretrained/FAIR/X-101-32x8d",
        "bn_fpn.yaml",
        (*_X101, "MODEL.RESNETS.NUM_GROUPS", "32", "MODEL.RESNETS.WIDTH_PER_GROUP", "8")
        + ("MODEL.PIXEL_STD", "[57.375,57.120,58.395]"),
    ),
    Published("timm://resnet50_gn.a1h_in1k", "gn_fpn.yaml"),
    Published("open-mmlab://detectron/resnet50_gn", "gn_fpn.yaml"),
    Published("open-mmlab://detectron/resnet101_gn", "gn_fpn_r101.yaml"),
    Published("open-mmlab://contrib/resnet50_gn", "gn_fpn.yaml"),
    Published(f"{_MISC}/mask_rcnn_R_50_FPN_3x_gn/138602888/model_final_dc5d9e.pkl", "gn_fpn.yaml", (), 42.6, 38.6),
    Published(f"{_MISC}/{_SCRATCH_3X}", "gn_fpn_scratch.yaml", (), 39.9, 36.6),
    Published(f"{_MISC}/{_SCRATCH_9X}", "gn_fpn_scratch_9x.yaml", (), 43.7, 39.6),
    Published(f"{_ZOO}/mask_rcnn_R_50_C4_1x/137259246/model_final_9243eb.pkl", "bn_c4.yaml", (), 36.8, 32.2),
    Published(f"{_ZOO}/mask_rcnn_R_50_FPN_3x/137849600/model_final_f10217.pkl", "bn_fpn.yaml", (), 41.0, 37.2),
    Published(f"{_ZOO}/mask_rcnn_R_101_FPN_3x/138205316/model_final_a3ec72.pkl", "bn_fpn_r101.yaml", (), 42.9, 38.6),
)

#: ``evaluate(weights, cfg)`` returns COCO metrics in percent.
Evaluate = Callable[[str, Any], dict[str, float]]


def verify(file: Published, evaluate: Evaluate | None) -> dict[str, Any]:
    """One row of the result file; an ``error`` where the file cannot be fetched or does not load strictly.

    Args:
        file: what is verified.
        evaluate: measures a detector's AP; None where COCO is absent.
    """
    row: dict[str, Any] = {**asdict(file), "overrides": list(file.overrides), "sha256": "", "bytes": 0, "error": ""}
    detector = file.box_ap is not None
    try:
        path = local_path(split_options(file.uri)[0])
        row |= {"sha256": sha256_of(path), "bytes": path.stat().st_size}
        cfg = gn_det.load_config(file.config, list(file.overrides))
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.ROI_HEADS.NUM_CLASSES or 80
        torch.manual_seed(0)
        report = load_weights(build_model(cfg), file.uri, cfg, require_all=detector)
        row |= {"kind": report.kind, "loaded": len(report.loaded), "notes": list(report.notes)}
        if detector and evaluate is not None:
            metrics = evaluate(file.uri, cfg)
            row |= {"measured_box_ap": metrics["bbox/AP"], "measured_mask_ap": metrics["segm/AP"]}
            wrong = [
                f"{name} AP {row[f'measured_{name}_ap']:.2f} instead of {published}"
                for name, published in (("box", file.box_ap), ("mask", file.mask_ap))
                if published is not None and not abs(row[f"measured_{name}_ap"] - published) <= TOLERANCE
            ]
            row["error"] = ", ".join(wrong)
    except UserError as error:
        row["error"] = str(error)
    return row


def run(files: Sequence[Published], results: Path, evaluate: Evaluate | None) -> int:
    """Verify ``files``, write ``results`` after each, and return the number that failed."""
    rows: list[dict[str, Any]] = []
    for file in files:
        rows.append(row := verify(file, evaluate))
        document = {
            "date": datetime.date.today().isoformat(),
            "gn_det": gn_det.__version__,
            "torch": torch.__version__,
            "ap_measured": evaluate is not None,
            "files": rows,
        }
        atomic_write(results, json_bytes(document, indent=1))
        status = f"FAILED: {row['error']}" if row["error"] else f"loaded {row['loaded']} tensors"
        if "measured_box_ap" in row:
            status += f", AP {row['measured_box_ap']:.1f} / {row['measured_mask_ap']:.1f}"
        print(f"{file.uri}\n  {row['bytes']:,} bytes, sha256 {row['sha256'] or 'unknown'}\n  {status}", flush=True)
    failed = sum(bool(row["error"]) for row in rows)
    print(f"{len(rows) - failed} of {len(rows)} files are as published; {results}")
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", metavar="TEXT", help="only files whose URI contains TEXT")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    coco = Path(os.getenv("DETECTRON2_DATASETS", "datasets")) / "coco"
    present = (coco / "annotations" / "instances_val2017.json").is_file() and (coco / "val2017").is_dir()
    if not present:
        print(f"{coco} has no val2017 (set DETECTRON2_DATASETS): files are loaded, AP is not measured")

    def evaluate(weights: str, cfg: Any) -> dict[str, float]:
        return gn_det.evaluate(cfg, {"OUTPUT_DIR": "output/verify_weights"}, weights=weights, engine="embedded")

    files = [file for file in FILES if args.only in file.uri]
    return 1 if run(files, args.results, evaluate if present else None) else 0


if __name__ == "__main__":
    sys.exit(main())
