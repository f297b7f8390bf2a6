"""Diagnose a non-finite loss: find its layer, and save the batch for a replay.

``python -m gn_det.engine.nonfinite OUTPUT_DIR/nonfinite_....pth`` repeats the step on any machine. The file contains
batch, weights, random streams and configuration.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._pytree import tree_leaves

from gn_det.checkpoint.io import read_checkpoint, save_checkpoint
from gn_det.checkpoint.meta import config_of_checkpoint
from gn_det.config.check import check_config
from gn_det.engine import dist
from gn_det.engine.payload import TORCH_RNG, refuse, tensor, weights_of
from gn_det.engine.state import restore_rng
from gn_det.errors import UserError, WeightsError, WriteError
from gn_det.structures import Masks, Sample, Targets
from gn_det.text import as_line, printable
from gn_det.values import InvalidValue, every, integer, items, one_of, optional, record, text

logger = logging.getLogger(__name__)


@dataclass
class Pass:
    """A forward pass that can be repeated."""

    batch: Sequence[Any]  # samples of gn_det or inputs of Detectron2
    rng: dict[str, Any]  # states of torch's generators before the pass
    device: str  # "cpu" or "cuda"
    dtype: torch.dtype | None  # of autocast

    def again(self, model: Callable[[Any], Any]) -> Any:
        """Run ``model`` on the batch exactly as the first time."""
        restore_rng(self.rng)
        with torch.autocast(self.device, self.dtype, self.dtype is not None):
            return model(self.batch)

    def images(self) -> str:
        """Return ids and file names, if the samples have them."""
        names = []
        for sample in self.batch:
            name, file = str(sample.get("image_id")), sample.get("file_name")
            names.append(f"{name} ({file})" if file and str(file) != name else name)
        return ", ".join(names)


def diagnose(done: Pass, model: nn.Module, folder: Path, about: Mapping[str, Any]) -> str:
    """Save the batch, repeat the pass, and return in one line what was found.

    Args:
        model: the bare module, with the weights that gave the losses.
        about: further plain values to save, with ``iteration``.
    """
    path = folder / f"nonfinite_{about['iteration']:07d}_rank{dist.rank()}.pth"
    try:
        save_checkpoint(
            path,
            {
                **about,
                "batch": [_plain(sample) for sample in done.batch],
                "rng": done.rng,
                "autocast": str(done.dtype or ""),
                "model": {k: v.detach().cpu() for k, v in model.state_dict().items()},
            },
        )
        saved = f"batch and weights are in {path}: python -m gn_det.engine.nonfinite {path}"
    except (WriteError, TypeError, AttributeError) as error:  # a batch from user code
        saved = f"the batch could not be saved ({error})"
    if any("Sync" in type(m).__name__ for m in model.modules()) and dist.world_size() > 1:
        return saved  # such layers communicate with other processes, which do not repeat the pass
    return f"{find_origin(model, lambda: done.again(model))}; {saved}"


def find_origin(model: nn.Module, forward: Callable[[], Any]) -> str:
    """Describe in one sentence the first layer of the bare ``model`` with a non-finite output, and its inputs' size.

    ``forward`` runs it once, as in training; its exceptions are ignored.
    """
    for name, parameter in model.named_parameters():  # not buffers: this pass may have ruined running statistics
        if not bool(torch.isfinite(parameter).all()):
            return f"the weights already contain nan or inf, first in {name}: an earlier update went wrong"
    names = {module: name for name, module in model.named_modules() if name}
    found: list[str] = []

    def watch(module: nn.Module, args: Any, output: Any) -> None:
        if not found and module in names and not all(bool(torch.isfinite(t).all()) for t in _numbers(output)):
            inputs = [float(t.abs().max()) for t in _numbers(args)]
            size = f", whose inputs reach {max(inputs):.3g}" if inputs else ""
            layer = f"{names[module]} ({type(module).__name__})"
            found.append(f"the first non-finite activations are in {layer}{size}")

    handle = register_module_forward_hook(watch)
    try:
        with torch.no_grad():
            forward()
    except Exception as error:  # proposals fail on nan; the hook already has the layer
        logger.debug("replay ended by %s", error)
    finally:
        handle.remove()
    return found[0] if found else "all activations are finite: check the objects in these images"


def _numbers(value: Any) -> list[Tensor]:
    """Return the floating-point tensors in nested containers."""
    return [t.detach() for t in tree_leaves(value) if isinstance(t, Tensor) and t.is_floating_point() and t.numel()]


# ------------------------------------------------------------ the file


def _plain(sample: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a sample of either engine to tensors and plain values."""
    out: dict[str, Any] = {"image": sample["image"].cpu()}
    out |= {k: sample[k] for k in ("image_id", "file_name", "height", "width") if type(sample.get(k)) in (int, str)}
    if (targets := sample.get("targets")) is not None:
        boxes, classes, masks = targets.boxes, targets.classes, targets.masks
    elif (instances := sample.get("instances")) is not None:
        boxes, classes = instances.gt_boxes.tensor, instances.gt_classes
        masks = instances.gt_masks if instances.has("gt_masks") else None
    else:
        return out
    each = next((getattr(masks, name) for name in ("masks", "polygons", "tensor") if hasattr(masks, name)), None)
    if each is not None:
        each = [[torch.tensor(p) for p in m] if isinstance(m, list) else torch.tensor(m) for m in each]
    return {**out, "targets": {"boxes": boxes.cpu(), "classes": classes.cpu(), "masks": each}}


def _sample(entry: Mapping[str, Any]) -> Sample:
    """Invert :func:`_plain` for a checked entry."""
    sample: Sample = {**entry}  # type: ignore[typeddict-item]
    if "targets" in entry:
        boxes, classes, masks = (entry["targets"][name] for name in ("boxes", "classes", "masks"))
        if masks is not None:
            masks = Masks([[p.numpy() for p in m] if isinstance(m, list) else np.asarray(m) for m in masks])
        sample["targets"] = Targets(tuple(entry["image"].shape[-2:]), boxes, classes, masks)
    return sample


_AUTOCAST = {str(dtype or ""): dtype for dtype in (None, torch.float16, torch.bfloat16)}
_SIDE = integer(1, 1 << 16)
_POLYGONS = items(tensor((None,), torch.float32, torch.float64), 0, 10**5)
_BITMAP = tensor((None, None), torch.bool, torch.uint8)


def _mask(value: Any, where: str) -> None:
    (_POLYGONS if isinstance(value, list) else _BITMAP)(value, where)


def _same_lengths(targets: Any, where: str) -> None:
    lengths = {len(targets[name]) for name in ("boxes", "classes", "masks") if targets[name] is not None}
    if len(lengths) != 1:
        raise InvalidValue(where, "hold different numbers of boxes, classes and masks")


def _check(content: Mapping[str, Any], model: nn.Module, num_classes: int) -> None:
    """Raise InvalidValue unless batch, random states and weights can be used; weights may be nan or infinite."""

    def classes(value: Any, where: str) -> None:
        tensor((None,), torch.int64)(value, where)
        if len(value) and not 0 <= int(value.min()) <= int(value.max()) < num_classes:
            raise InvalidValue(where, f"go beyond the {num_classes} classes of the model")

    boxes, masks = tensor((None, 4), torch.float32), optional(items(_mask, 0, 10**5))
    targets = record({"boxes": boxes, "classes": classes, "masks": masks})
    sample = record(
        {"image": tensor((None, None, None), torch.uint8, torch.float32)},
        file_name=text(10_000),
        height=_SIDE,
        width=_SIDE,
        targets=every(targets, _same_lengths),
    )
    record(
        {
            "batch": items(sample, 1, 1 << 16),
            "rng": record({"torch": TORCH_RNG}),
            "autocast": one_of(*_AUTOCAST),
            "model": weights_of(model, finite=False),
        }
    )(content, "")


# ------------------------------------------------------------ replay


def replay(path: str | os.PathLike[str]) -> str:
    """Repeat a pass saved by either engine with the embedded engine's model; return losses and the first bad layer.

    Raises:
        WeightsError: not such a file, or its weights do not match.
        ConfigError: the embedded engine does not implement that model.
    """
    from gn_det.modeling.build import build_model

    content = read_checkpoint(path)
    if not {"batch", "rng", "model", "gn_det"} <= content.keys():
        raise WeightsError(f"{path}: holds no batch to replay; give a nonfinite_*.pth of an OUTPUT_DIR")
    cfg = config_of_checkpoint(path)
    check_config(cfg, "embedded")
    model = build_model(cfg)
    try:
        _check(content, model, int(cfg.MODEL.ROI_HEADS.NUM_CLASSES))
    except InvalidValue as error:
        raise refuse(os.fspath(path), error, "give a file as a run of this version wrote it", "replay it") from None
    model.load_state_dict(content["model"])
    model.train()
    rng, dtype = {**content["rng"], "cuda": None}, _AUTOCAST[content["autocast"]]
    done = Pass([_sample(e) for e in content["batch"]], rng, "cpu", dtype)
    lines = [f"image {s.get('image_id')} {s.get('file_name', '')}".rstrip() for s in done.batch]
    try:
        with torch.no_grad():
            lines += [f"{name} = {float(value):g}" for name, value in done.again(model).items()]
    except FloatingPointError as error:
        lines.append(str(error))
    return "\n".join([*lines, find_origin(model, lambda: done.again(model))])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m gn_det.engine.nonfinite", description="Repeat a failed step.")
    parser.add_argument("file", help="nonfinite_*.pth of an OUTPUT_DIR")
    try:
        print(printable(replay(parser.parse_args(argv).file)))
    except UserError as error:
        print(f"error: {as_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
