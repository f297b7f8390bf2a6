"""Two processes with one image each, two accumulated batches of one, and one batch of two: what is equal, and how far.

Detectron2's losses, and so ours, are means over a micro-batch: of the RPN over BATCH_SIZE_PER_IMAGE times images, of
the boxes over the sampled RoIs, of the masks over the foreground ones. A step is the mean of its micro-batches' losses.
Hence everything is equal where the images have the same size (padding enters GroupNorm's statistics) and equally many
sampled RoIs, which is the rule (512 of many candidates), and equally many foreground ones. Where these differ, the
RPN's losses still are equal, and the others weigh every micro-batch, not every RoI, the same.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from gn_det.data.shapes import make_shapes
from gn_det.engine import dist
from tests.faults import equal_ranks


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "model_final.pth", weights_only=True)["model"]


def losses(folder: Path) -> dict[str, float]:
    last = json.loads((folder / "metrics.json").read_text().splitlines()[-1])
    return {k: v for k, v in last.items() if "loss" in k}


def apart(a: Path, b: Path) -> float:
    """How far the weights are from each other, as a part of the way that training has taken them (2-norms)."""
    x, y, start = weights(a), weights(b), torch.load(a / "start.pth", weights_only=True)
    assert x.keys() == y.keys()
    way = torch.cat([(x[k] - start[k]).double().flatten() for k in x])
    difference = torch.cat([(x[k] - y[k]).double().flatten() for k in x])
    return float(difference.norm() / way.norm())


@pytest.fixture(scope="module")
def one_batch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one_batch")
    equal_ranks.train(folder, 2, 1, [4, 4], 3)
    return folder


def losses_apart(a: Path, b: Path) -> float:
    """The largest relative difference of a loss of the last logged iteration."""
    ours, theirs = losses(a), losses(b)
    assert ours.keys() == theirs.keys()
    return max(abs(ours[k] / theirs[k] - 1) for k in theirs)


def test_two_processes_equal_one_batch_of_two(
    one_batch: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Three steps in float32: losses to 1e-5, weights to 1e-2 of the way they went (a wrong mean is off by tenths).

    Rounding grows tenfold a step (1.2e-5, 2.7e-4, 1.7e-3 measured): signs of L1 and ReLU flip. Evaluation is exact.
    """
    shapes = make_shapes(tmp_path / "shapes", "val", 3)
    content = json.loads(Path(shapes.json_file).read_text())
    first = content["images"][0]["id"]
    single = {
        **content,
        "images": content["images"][:1],
        "annotations": [a for a in content["annotations"] if a["image_id"] == first],
    }
    (tmp_path / "single.json").write_text(json.dumps(single))
    sources = [(str(tmp_path / "single.json"), shapes.image_root), (shapes.json_file, shapes.image_root)]
    found = dist.launch(equal_ranks.all_of_it, (tmp_path / "two", sources), device="cpu", num_gpus=2)
    off, worst = apart(one_batch, tmp_path / "two" / "equal"), losses_apart(tmp_path / "two" / "equal", one_batch)
    with capsys.disabled():
        print(f"\n2 processes and a batch of 2: weights {off:.1e} of their way after 3 steps; losses {worst:.1e}")
    assert off < 1e-2 and worst < 1e-5
    alone = equal_ranks.evaluate(tmp_path / "one", sources)
    assert [str(f) for f in found] == [str(f) for f in alone]  # nan is equal to nan
    for number, images in enumerate((1, 3)):  # with one image, a process has none
        name = f"{number}/inference/coco_instances_results.json"
        results = [json.loads((tmp_path / who / name).read_text()) for who in ("two/eval", "one")]
        assert results[0] == results[1] and len(results[0]) == 3 * images


def part_of(content: dict, images: int, path: Path) -> str:
    """The first images of a set, with their annotations, as a json of their own."""
    kept = content["images"][:images]
    ids = {image["id"] for image in kept}
    annotations = [a for a in content["annotations"] if a["image_id"] in ids]
    path.write_text(json.dumps({**content, "images": kept, "annotations": annotations}))
    return str(path)


@pytest.mark.slow
def test_three_processes_equal_one_batch_of_three(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Float32: weights after one step to 1e-3 of the way they went; after three, losses to 1e-4 and weights to 1e-2.

    Evaluation of 1, 2 and 5 images by three processes (some have none, or more than others) is exact.
    """
    shapes = make_shapes(tmp_path / "shapes", "val", 5)
    content = json.loads(Path(shapes.json_file).read_text())
    sizes = (1, 2, 5)
    sources = [(part_of(content, n, tmp_path / f"{n}.json"), shapes.image_root) for n in sizes]
    for name, iterations in (("one", 1), ("equal", 3)):
        equal_ranks.train(tmp_path / "alone" / name, 3, 1, [4, 4], iterations, batch=3)
    found = dist.launch(equal_ranks.three_of_it, (tmp_path / "three", sources), device="cpu", num_gpus=3)
    steps = {name: apart(tmp_path / "alone" / name, tmp_path / "three" / name) for name in ("one", "equal")}
    worst = losses_apart(tmp_path / "three" / "equal", tmp_path / "alone" / "equal")
    with capsys.disabled():
        print(f"\n3 processes and a batch of 3: weights {steps['one']:.1e} of their way after 1 step, "
              f"{steps['equal']:.1e} after 3; losses {worst:.1e}")  # fmt: skip
    assert steps["one"] < 1e-3 and steps["equal"] < 1e-2 and worst < 1e-4
    alone = equal_ranks.evaluate(tmp_path / "one_process", sources)
    assert [str(f) for f in found] == [str(f) for f in alone]
    for number, images in enumerate(sizes):
        name = f"{number}/inference/coco_instances_results.json"
        results = [json.loads((tmp_path / who / name).read_text()) for who in ("three/eval", "one_process")]
        assert results[0] == results[1] and len(results[0]) == 3 * images


@pytest.mark.slow
def test_three_processes_on_uneven_data(tmp_path: Path) -> None:
    """The command line on 4 training and 2 test images: one process has no test image; ends, with one line an AP."""
    from tests.faults.soak_case import finish, train_words

    words = train_words(tmp_path / "shapes", tmp_path / "run", "--num-gpus=3", "SOLVER.IMS_PER_BATCH", "3",
                        "SOLVER.MAX_ITER", "4", "TEST.EVAL_PERIOD", "2", "DATALOADER.NUM_WORKERS", "1")  # fmt: skip
    for split, images in (("train", 4), ("val", 2)):
        at = words.index(f"--{split}-json") + 1
        words[at] = part_of(json.loads(Path(words[at]).read_text()), images, tmp_path / f"{split}.json")
    code, _ = finish(words, tmp_path / "log", seconds=400)
    text = (tmp_path / "log").read_text()
    assert code == 0, text[-2000:]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.json").read_text().splitlines()]
    assert [e["iteration"] for e in lines if "bbox/AP" in e] == [1, 4]
    assert "batch 3 (3 processes × 1 image)" in text and "detections in 2 images" in text


def test_accumulation_equals_the_larger_batch(one_batch: Path, tmp_path: Path) -> None:
    """One step in float32: weights to 1e-4 of the way they went; three steps: losses to 1e-5."""
    for name, images, accumulate in (("batch", 2, 1), ("accumulated", 1, 2)):
        equal_ranks.train(tmp_path / name, images, accumulate, [4, 4], 1)
    assert apart(tmp_path / "batch", tmp_path / "accumulated") < 1e-4
    equal_ranks.train(tmp_path / "two", 1, 2, [4, 4], 3)
    assert apart(one_batch, tmp_path / "two") < 1e-2
    assert losses_apart(tmp_path / "two", one_batch) < 1e-5


def test_what_differs_with_unequal_numbers_of_objects(tmp_path: Path) -> None:
    """4 and 1 foreground RoIs: the mean over five masks is not the mean of the two images' means.

    The mask losses of a fresh model are all close to ln 2; the losses are good to 1e-7 (float32).
    """
    for name, images, accumulate in (("large", 2, 1), ("accumulated", 1, 2)):
        equal_ranks.train(tmp_path / name, images, accumulate, [4, 1], 1)
    large, accumulated = losses(tmp_path / "large"), losses(tmp_path / "accumulated")
    for name in ("loss_rpn_cls", "loss_rpn_loc", "loss_cls", "loss_box_reg"):
        assert accumulated[name] == pytest.approx(large[name], rel=1e-6), name
    assert accumulated["loss_mask"] != pytest.approx(large["loss_mask"], rel=1e-6)
