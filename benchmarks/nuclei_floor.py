"""What no training reaches on nuclei: Otsu's threshold and connected components, scored like a detector.

The floor of the suite experiments/nuclei.yaml, on its validation split:

    python benchmarks/nuclei_floor.py datasets/nuclei/val.json datasets/nuclei/images

Nothing is tuned: the smaller side of the threshold is the foreground, holes and specks of a few pixels are removed, and
components are ranked by their contrast. Touching nuclei stay one. Needs OpenCV.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from gn_det.evaluation.coco_eval import evaluate_coco
from gn_det.evaluation.results import encode_masks

#: Components of fewer pixels are specks.
LEAST_AREA = 20


def components(image: np.ndarray) -> list[tuple[np.ndarray, float]]:
    """Mask (H, W) and score in [0, 1] of every component of a (H, W) uint8 image."""
    smooth = cv2.GaussianBlur(image, (0, 0), 1)
    level, bright = cv2.threshold(smooth, 0, 1, cv2.THRESH_BINARY | cv2.THRESH_OTSU)
    foreground = bright if bright.mean() <= 0.5 else 1 - bright
    foreground = cv2.morphologyEx(foreground, cv2.MORPH_OPEN, np.ones((3, 3), np.uint8))
    outlines, _ = cv2.findContours(foreground, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    filled = cv2.drawContours(np.zeros_like(foreground), outlines, -1, 1, cv2.FILLED)
    number, labels, stats, _ = cv2.connectedComponentsWithStats(filled, connectivity=4)
    contrast = np.abs(smooth.astype(np.float32) - level) / 255
    found = []
    for k in range(1, number):
        if stats[k, cv2.CC_STAT_AREA] >= LEAST_AREA:
            mask = labels == k
            found.append((mask, float(contrast[mask].mean())))
    return found


def detect(path: Path, image_id: Any, category: int) -> list[dict[str, Any]]:
    """Results of one image in COCO's format."""
    image = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
    if image is None:
        raise SystemExit(f"{path}: cannot be read; give the folder of the images")
    found = components(image)
    masks = encode_masks(np.array([mask for mask, _ in found]).reshape(-1, *image.shape))
    results = []
    for (mask, score), segmentation in zip(found, masks):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        x, y = float(columns[0]), float(rows[0])
        box = [x, y, float(columns[-1]) + 1 - x, float(rows[-1]) + 1 - y]
        results.append(
            {"image_id": image_id, "category_id": category, "bbox": box, "score": score, "segmentation": segmentation}
        )
    return results


def main(argv: list[str] | None = None) -> int:
    """Print box and mask AP, and write them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("json", type=Path)
    parser.add_argument("images", type=Path)
    parser.add_argument("--max-dets", type=int, default=400, help="detections of an image that count")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "nuclei_floor.json")
    args = parser.parse_args(argv)
    content = json.loads(args.json.read_text(encoding="utf-8"))
    category = content["categories"][0]["id"]
    results = [r for i in content["images"] for r in detect(args.images / i["file_name"], i["id"], category)]
    metrics = evaluate_coco(args.json, results, max_dets=args.max_dets)
    found: dict[str, Any] = {
        task: {name: round(metrics[task][name], 2) for name in ("AP", "AP50", "AP75")} for task in ("bbox", "segm")
    }
    found |= {"images": len(content["images"]), "objects": len(results), "opencv": cv2.__version__}
    args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
