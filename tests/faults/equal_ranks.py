"""The real model on made-up batches, in one process or several; run by ``test_equal_ranks``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from gn_det.config import load_config
from gn_det.data.catalog import DatasetSource
from gn_det.data.coco import load_coco
from gn_det.engine import dist
from gn_det.structures import Detections, Masks, Sample, Targets

SIDE = 64
#: Four sampled foreground RoIs an image, of sixteen RoIs.
SMALL = [
    "MODEL.FPN.OUT_CHANNELS", "32", "MODEL.ROI_BOX_HEAD.CONV_DIM", "32", "MODEL.ROI_BOX_HEAD.FC_DIM", "32",
    "MODEL.ROI_MASK_HEAD.CONV_DIM", "32", "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "16",
    "MODEL.RPN.POST_NMS_TOPK_TRAIN", "30", "MODEL.RPN.PRE_NMS_TOPK_TRAIN", "50", "MODEL.ROI_HEADS.NUM_CLASSES", "2",
    "MODEL.ROI_HEADS.POSITIVE_FRACTION", "0.25",
]  # fmt: skip


def sample(position: int, objects: int) -> Sample:
    """Image and objects depend on their position in the stream alone."""
    rng = np.random.RandomState(position)
    corner = rng.uniform(0, SIDE - 24, (objects, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(12, 24, (objects, 2))], 1).astype(np.float32)
    polygons = [[np.array([x0, y0, x1, y0, x1, y1, x0, y1], np.float64)] for x0, y0, x1, y1 in boxes]
    targets = Targets(
        (SIDE, SIDE), torch.from_numpy(boxes), torch.from_numpy(rng.randint(0, 2, objects)), Masks(polygons)
    )
    image = torch.from_numpy(rng.randint(0, 256, (3, SIDE, SIDE)).astype(np.uint8))
    return Sample(image=image, height=SIDE, width=SIDE, image_id=position, targets=targets)


def train(
    folder: Path, images: int, accumulate: int, counts: list[int], iterations: int, batch: int = 2, rate: float = 0.01
) -> None:
    """``images`` a micro-batch, ``batch`` a step; image i of the stream has ``counts[i % 2]`` objects."""
    from tests.engine.cases import run

    torch.set_num_threads(1)
    rank, world = dist.rank(), dist.world_size()
    old = torch.randperm
    torch.randperm = lambda n, **kw: torch.arange(n, device=kw.get("device"))  # sampling takes the first
    try:
        torch.manual_seed(3)
        from gn_det.modeling.build import build_model

        model = build_model(load_config("quickstart.yaml", ["MODEL.DEVICE", "cpu", *SMALL], check=False))

        def make_loader(start: int, seed: int) -> Any:
            number = start
            while True:
                first = (number * world + rank) * images
                yield [sample(i, counts[i % 2]) for i in range(first, first + images)]
                number += 1

        keys = ["SOLVER.IMS_PER_BATCH", batch, "SOLVER.ACCUMULATE", accumulate]
        keys += ["SOLVER.BASE_LR", rate, "SOLVER.WARMUP_ITERS", 0]
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(model.state_dict(), folder / "start.pth")
        run(folder, keys, max_iter=iterations, model=model, make_loader=make_loader)
    finally:
        torch.randperm = old


def truth_as_detections(samples: list[Sample]) -> list[Detections]:
    """Made of the image id alone, so that every process gives the same."""
    out = []
    for s in samples:
        rng = np.random.RandomState(int(s["image_id"]))
        boxes = torch.from_numpy(rng.uniform(0, 30, (3, 4)).astype(np.float32))
        boxes[:, 2:] += boxes[:, :2] + 10
        scores = torch.from_numpy(np.sort(rng.uniform(0, 1, 3).astype(np.float32))[::-1].copy())
        out.append(Detections((s["height"], s["width"]), boxes, scores, torch.from_numpy(rng.randint(0, 5, 3))))
    return out


def evaluate(folder: Path, sources: list[tuple[str, str]]) -> list[dict[str, float]]:
    """APs on each set, the results file in a folder of its own."""
    from gn_det.engine.evaluator import evaluate_model

    found = []
    for number, (json_file, images) in enumerate(sources):
        keys = ["MODEL.MASK_ON", "False", "OUTPUT_DIR", str(folder / str(number)), "DATALOADER.NUM_WORKERS", "0"]
        cfg = load_config("quickstart.yaml", keys)
        data = load_coco(DatasetSource(f"set{number}", json_file, images), max_bad=0, need_annotations=False)
        found.append(evaluate_model(cfg, truth_as_detections, [data], data.class_names))
    return found


def three_of_it(folder: Path, sources: list[tuple[str, str]]) -> list[dict[str, float]]:
    """What three processes do in one go."""
    train(folder / "one", 1, 1, [4, 4], 1, batch=3)
    train(folder / "equal", 1, 1, [4, 4], 3, batch=3)
    return evaluate(folder / "eval", sources)


def all_of_it(folder: Path, sources: list[tuple[str, str]]) -> list[dict[str, float]]:
    """What two processes do in one go, since starting them takes most of the time."""
    train(folder / "equal", 1, 1, [4, 4], 3)
    return evaluate(folder / "eval", sources)
