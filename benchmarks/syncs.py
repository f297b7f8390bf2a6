"""How often one training step and one inference make the host wait for the device: gn_det, and Detectron2 if installed.

Each wait empties the queue of kernels, so that small kernels (norms, NMS, sampling) start late. On a CPU the operations
that would wait are counted as they are dispatched; on a GPU torch's own sync debug mode reports real waits. Compare
training steps: on a CPU both engines paste masks in another way than on a GPU, Detectron2 with several waits for each.

    python benchmarks/syncs.py                 # both configs, any machine; prints what waits where with --places
    python benchmarks/syncs.py --device cuda   # real waits, of gn_det only
"""

from __future__ import annotations

import argparse
import sys
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parent))
from engine import load_cfg, make_steps

#: Operations whose result the host needs: a number, or the size of the output.
WAITING = (
    "aten._local_scalar_dense", "aten.is_nonzero", "aten.equal", "aten.nonzero.", "aten.masked_select", "aten._unique2",
    "aten.unique_dim", "aten.bincount", "aten.repeat_interleave.Tensor", "torchvision.nms",
)  # fmt: skip
#: Methods that bring values to the host without a dispatched operation on a CPU; both count once per tensor.
METHODS = ("tolist", "cpu")
SMALL = [
    "MODEL.RPN.POST_NMS_TOPK_TRAIN", "60", "MODEL.RPN.POST_NMS_TOPK_TEST", "30",
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", "32",
]  # fmt: skip


class _Count(TorchDispatchMode):
    """Counts (operation, line of the model that asked for it)."""

    def __init__(self) -> None:
        super().__init__()
        self.places: Counter[tuple[str, str]] = Counter()

    def note(self, name: str) -> None:
        frames = [f for f in traceback.extract_stack() if "/gn_det/" in f.filename or "/detectron2/" in f.filename]
        place = f"{'/'.join(Path(frames[-1].filename).parts[-2:])}:{frames[-1].lineno}" if frames else "backward"
        self.places[name, place] += 1

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        name = str(func)
        if name.startswith(WAITING):
            self.note(name)
        elif name.startswith(("aten.index.Tensor", "aten.index_put")) and any(
            isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        ):
            self.note("index by a boolean tensor")
        return func(*args, **(kwargs or {}))


@contextmanager
def counting() -> Iterator[Counter[tuple[str, str]]]:
    """Within: count what would wait on a GPU, by (operation, place)."""
    own = {name: getattr(Tensor, name) for name in METHODS}
    mode = _Count()

    def noting(name: str) -> Callable[..., Any]:
        def method(self: Tensor, *args: Any, **keywords: Any) -> Any:
            mode.note(f"Tensor.{name}")
            return own[name](self, *args, **keywords)

        return method

    try:
        for name in METHODS:
            setattr(Tensor, name, noting(name))
        with mode:
            yield mode.places
    finally:
        for name, method in own.items():
            setattr(Tensor, name, method)


def waits(function: Callable[[], Any]) -> Counter[tuple[str, str]]:
    """What waits in one call of ``function``."""
    with counting() as places:
        function()
    return places


def of_the_model(places: Counter[tuple[str, str]]) -> Counter[tuple[str, str]]:
    """Without reading the losses and gn_det's metrics: the loop does that, once or when it writes its log."""
    apart = ("backward", "modeling/metrics.py")
    return Counter({key: count for key, count in places.items() if not key[1].startswith(apart)})


def real_waits(function: Callable[[], Any]) -> int:
    """Reports of torch's sync debug mode in one call."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            function()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in seen)


def main(argv: Sequence[str] | None = None) -> int:
    """Print one line per config and step."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--configs", default="gn_fpn.yaml,gn_c4.yaml")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--size", type=int, default=128, help="side of the square images")
    parser.add_argument("--places", action="store_true", help="say which line waits how often")
    args = parser.parse_args(argv)
    if args.device != "cpu":
        return _on_gpu(args)
    engines = ["embedded"]
    try:
        import detectron2.modeling  # noqa: F401

        engines.append("detectron2")
    except ImportError:
        print("Detectron2 is not installed: counted for gn_det alone")
    for config in args.configs.split(","):
        cfg = load_cfg(config, SMALL)
        for engine in engines:
            for what, step in make_steps(engine, cfg, (args.size, args.size), args.batch).items():
                places = of_the_model(waits(step))
                print(f"{config} {what}: {places.total()} waits, {engine}")
                if args.places:
                    for (name, place), number in places.most_common():
                        print(f"    {number:3d}  {name}  {place}")
    return 0


def _on_gpu(args: argparse.Namespace) -> int:
    from train_step import Side
    from train_step import parse as parse_train

    for model in ("fpn", "c4"):
        options = parse_train(["--device", args.device, "--models", model])
        side = Side(model, "gn", "bfloat16", args.batch, options)
        for what, step in (("training step", side.train), ("inference", side.infer)):
            step()  # the first one compiles and asks for memory
            print(f"{model} {what}: {real_waits(step)} waits on {torch.cuda.get_device_name()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
