"""Classifier training: ``gn-det classify`` against a bare PyTorch loop, the norms against BN, and the cost of --record.

All sides take turns in one process, and CPU time counts; ratios are medians over the rounds, with their quartiles.

- loop: ResNet-20 on 32x32 images, batch 32. The bare loop has plain modules, torch's DataLoader and torchvision's
  transforms (crop with padding 4, flip, to tensor, normalize). Ours is what ``pretrain`` runs, without validation.
- norms: a step (forward, backward, optimizer) of the same network with each norm, relative to BN.
- record: CPU time of looking at a layer once, as a share of the steps from one look to the next.

    python benchmarks/classifier.py --threads 1
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engine import environment
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import LambdaLR
from torchvision import transforms

from gn_det.classification.classifier_loop import ClassifierLoop, ClassifierLoss, Epochs, Plan, Progressed
from gn_det.classification.image_sources import BGR, ArraySource, epoch_batches
from gn_det.classification.network import build_classifier, build_optimizer
from gn_det.classification.other_norms import BatchRenorm2d
from gn_det.classification.recording import Recorder, layer_of
from gn_det.classification.settings import Settings, lr_factor
from gn_det.engine.hooks import Schedule
from gn_det.engine.scalars import Metrics
from gn_det.engine.state import TrainState

RESULTS = Path(__file__).parent / "results"
IMAGES, TOTAL = 2048, 10**6


def classifier_settings(norm: str, arch: str = "resnet20", batch: int = 32) -> Settings:
    groups = 4 if norm == "GN" and arch == "resnet20" else None
    return Settings(arch=arch, norm=norm, groups=groups, data="cifar10", output="-", batch_size=batch)


# ------------------------------------------------------------ the loop


class PlainBlock(nn.Module):
    """Two 3x3 convolutions with batch norm, and a 1x1 projection where the shape changes."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(after)
        self.shortcut = nn.Sequential()
        if stride > 1 or before != after:
            self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


def plain_resnet20() -> nn.Sequential:
    parts: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    before = 16
    for width in (16, 32, 64):
        for k in range(3):
            parts.append(PlainBlock(before, width, 2 if k == 0 and width > 16 else 1))
            before = width
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


class Pictures(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """What torchvision's CIFAR10 does with its arrays."""

    def __init__(self, images: np.ndarray, labels: np.ndarray) -> None:
        self.images, self.labels = images, labels
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(32, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize((0.49, 0.48, 0.45), (0.25, 0.24, 0.26)),
            ]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[index])), int(self.labels[index])


def bare_loop(images: np.ndarray, labels: np.ndarray, batch: int) -> Callable[[], None]:
    """A step of the loop that everybody writes."""
    loader = torch.utils.data.DataLoader(Pictures(images, labels), batch, shuffle=True, drop_last=True)
    batches = itertools.chain.from_iterable(iter(loader) for _ in itertools.count())
    model = plain_resnet20()
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4, nesterov=True)
    schedule = LambdaLR(optimizer, lambda step: 1.0)

    def step() -> None:
        x, y = next(batches)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        loss.item()

    return step


def our_loop(images: np.ndarray, labels: np.ndarray, batch: int, folder: Path) -> Callable[[], None]:
    """A step of ``gn-det classify`` with its hooks."""
    given = classifier_settings("BN", batch=batch)
    arrays = np.ascontiguousarray(images.transpose(0, 3, 1, 2)), labels
    source = ArraySource([str(k) for k in range(10)], arrays, arrays, BGR, shift=4)
    model = build_classifier(given, 10)
    loss = ClassifierLoss(model, BGR)
    optimizer = build_optimizer(given, model, 0.01)
    state = TrainState(model, optimizer, LambdaLR(optimizer, lambda step: lr_factor(given, step, TOTAL)), 1)
    epochs = Epochs(given, source, Plan(0.01, TOTAL, TOTAL), loss, Progressed(), folder)
    loop = ClassifierLoop(state, loss, [Schedule(), Metrics([]), epochs], total=TOTAL)

    def batches() -> Iterator[Any]:
        for epoch in itertools.count():
            yield from source.train_batches(epoch, epoch_batches(given, epoch, len(labels), 0, 1))

    loop.begin()
    loop.batches = batches()

    def step() -> None:
        for work in (lambda: loop.call("before_step"), loop.step, lambda: loop.call("after_step")):
            work()
        loop.call("end_step")

    return step


# ------------------------------------------------------------ norms and recording


def step_of(given: Settings) -> tuple[nn.Module, Callable[[], None]]:
    """The classifier, and a step of it on one batch; BR with its final limits."""
    model = build_classifier(given, 10)
    for module in model.modules():
        if isinstance(module, BatchRenorm2d):
            module.r_max, module.d_max = 1.5, 0.5
    optimizer = build_optimizer(given, model, 0.001)
    x, y = torch.randn(given.batch_size, 3, 32, 32), torch.arange(given.batch_size) % 10

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return model, step


def record_share(arch: str, layer_name: str, batch: int, rounds: int) -> dict[str, Any]:
    """CPU seconds of one look at the layer and of a step, and the share of the time of a long training."""
    model, step = step_of(classifier_settings("BN", arch, batch))
    layer = layer_of(model.trunk, layer_name)  # type: ignore[arg-type]
    recorder = Recorder(layer, [], total=1, per_epoch=1)  # the shortest distance between two looks
    seen: list[Any] = []
    handle = layer.register_forward_hook(lambda m, inputs, output: seen.append((inputs, output)))
    step()
    handle.remove()
    found = take_turns({"step": step, "look": lambda: recorder._look(layer, *seen[0])}, rounds, 1)
    share = float(np.median(found["look"])) / float(np.median(found["step"])) / recorder.every
    return {"what": f"{arch} {layer_name}, batch {batch}", "every": recorder.every, "share": share, **found}


def take_turns(ways: dict[str, Callable[[], None]], rounds: int, steps: int) -> dict[str, list[float]]:
    """CPU seconds of a step of each way, by round; the first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, run in ways.items():
            start = time.process_time()
            for _ in range(steps):
                run()
            seconds[name] += [(time.process_time() - start) / steps] * (number > 0)
    return seconds


def quartiles(values: Any) -> list[float]:
    return [round(float(v), 4) for v in np.quantile(values, (0.25, 0.5, 0.75))]


def main(argv: list[str] | None = None) -> int:
    """Print and write the results."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=8, help="of one side before the next has its turn")
    parser.add_argument("--quick", action="store_true", help="two rounds of one step: checks that it runs")
    parser.add_argument("--output", default="", help="json file; default benchmarks/results/classifier.json")
    args = parser.parse_args(argv)
    if args.quick:
        args.rounds, args.steps = 2, 1
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (IMAGES, 32, 32, 3), dtype=np.uint8), rng.integers(0, 10, IMAGES)
    with tempfile.TemporaryDirectory() as folder:
        ways = {"bare": bare_loop(images, labels, 32), "ours": our_loop(images, labels, 32, Path(folder))}
        loop = take_turns(ways, args.rounds, args.steps)
    speed = quartiles(np.array(loop["bare"]) / np.array(loop["ours"]))
    print(f"loop: images a second relative to the bare loop, quartiles {speed}; target 0.9")
    result: dict[str, Any] = {"environment": environment(), "loop": {**loop, "relative_speed": speed}, "norms": []}
    for batch in (32, 4):
        steps = {norm: step_of(classifier_settings(norm, batch=batch))[1] for norm in ("BN", "GN", "BR", "WN")}
        found = take_turns(steps, args.rounds, args.steps)
        ratios = {n: quartiles(np.array(found[n]) / np.array(found["BN"])) for n in found if n != "BN"}
        print(f"norms, batch {batch}: step relative to BN, quartiles {ratios}; target 1.3")
        result["norms"].append({"batch": batch, "seconds": found, "relative": ratios})
    looks = (("resnet20", "res4.2.conv2", 32), ("resnet20", "res4.2.conv2", 2), ("vgg16", "conv5_3", 32))
    result["record"] = [record_share(*look, args.rounds) for look in looks]
    for row in result["record"]:
        print(f"record {row['what']}: {100 * row['share']:.2f} % of the training at most; target 2 %")
    output = Path(args.output or RESULTS / "classifier.json")
    output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"written to {output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
