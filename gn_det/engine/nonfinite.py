"""A non-finite loss: which layer it came from, and the batch saved in a file that can be replayed.

``python -m gn_det.engine.nonfinite OUTPUT_DIR/nonfinite_....pth`` repeats the step on any machine: the file holds
batch, weights, random streams and configuration.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from gn_det.checkpoint.io import read_checkpoint, save_checkpoint
from gn_det.checkpoint.meta import config_of_checkpoint
from gn_det.config.check import check_config
from gn_det.engine import dist
from gn_det.engine.payload import check_replay, refuse
from gn_det.engine.state import TrainState
from gn_det.errors import TrainingError, UserError, WeightsError, WriteError
from gn_det.structures import Masks, Sample, Targets
from gn_det.text import as_line, printable
from gn_det.values import InvalidValue

logger = logging.getLogger(__name__)


@dataclass
class Pass:
    """A forward pass as it can be repeated.

    Attributes:
        batch: samples of gn_det or inputs of Detectron2.
        rng: states of torch's generators before it.
        device: "cpu" or "cuda".
        dtype: of autocast, None without.
    """

    batch: Sequence[Any]
    rng: dict[str, Any]
    device: str
    dtype: torch.dtype | None

    def again(self, model: Callable[[Any], Any]) -> Any:
        """Run ``model`` on the batch as it ran the first time."""
        torch.set_rng_state(self.rng["torch"])
        if self.rng["cuda"] is not None:
            torch.cuda.set_rng_state(self.rng["cuda"])
        context = nullcontext() if self.dtype is None else torch.autocast(self.device, dtype=self.dtype)
        with context:
            return model(self.batch)


def stop_non_finite(
    state: TrainState,
    done: Pass,
    names: Sequence[str],
    rows: Sequence[Sequence[float]],
    folder: Path | None,
    about: Mapping[str, Any],
) -> NoReturn:
    """Raise the error of a run in which a loss of some rank is not finite; all ranks together.

    Args:
        done: the micro-batch of this rank.
        names: of the losses.
        rows: every rank's losses, in the order of ``names``.
        folder, about: see :class:`gn_det.engine.loop.Loop`.

    Raises:
        TrainingError: names losses, images, and the layer that failed first.
    """
    own = {n: v for n, v in zip(names, rows[dist.rank()]) if not abs(v) < float("inf")}
    origin = _diagnose(state, done, folder, about) if own else ""
    found = [r for r in dist.broadcast(dist.gather_objects((dist.rank(), own, _image_names(done), origin))) if r[1]]
    parts = []
    for rank, losses, images, _ in found:
        where = f" on GPU {rank}" if len(rows) > 1 else ""
        parts.append(f"{', '.join(f'{n} = {v:g}' for n, v in losses.items())}{where}, images {images}")
    raise _error(state, "; ".join(parts), [r[-1] for r in found])


def not_finite(
    state: TrainState, done: Pass, error: FloatingPointError, folder: Path | None, about: Mapping[str, Any]
) -> TrainingError:
    """The error of a run whose model cannot make proposals of its predictions, so that there is no loss to look at."""
    what = f"loss_rpn_cls, loss_rpn_loc, images {_image_names(done)} ({error})"
    return _error(state, what, [_diagnose(state, done, folder, about)])


def _error(state: TrainState, what: str, origins: Sequence[str]) -> TrainingError:
    kept = f"the last good checkpoint is {state.saved}" if state.saved else "no checkpoint was written yet"
    return TrainingError(
        f"loss is not finite at iteration {state.iteration + 1}: {what}; the weights were not updated, {kept}: "
        "look at the objects of these images, lower SOLVER.BASE_LR or set SOLVER.CLIP_GRADIENTS.ENABLED True"
        + "".join(f"; {origin}" for origin in origins if origin)
    )


def _image_names(done: Pass) -> str:
    """Ids and file names, as far as the samples have them."""
    names = []
    for sample in done.batch:
        name, file = str(sample.get("image_id")), sample.get("file_name")
        names.append(f"{name} ({file})" if file and str(file) != name else name)
    return ", ".join(names)


def _diagnose(state: TrainState, done: Pass, folder: Path | None, about: Mapping[str, Any]) -> str:
    """Save the batch, repeat the pass, and say in one line what was found; "" where there is no folder for it."""
    if folder is None:
        return ""
    model, iteration = state.model, state.iteration + 1
    path = folder / f"nonfinite_{iteration:07d}_rank{dist.rank()}.pth"
    saved = save_batch(path, done, model, {**about, "iteration": iteration})
    if any("Sync" in type(m).__name__ for m in model.modules()) and dist.world_size() > 1:
        return saved  # such layers talk to the other processes, which do not repeat theirs
    return f"{find_origin(model, lambda: done.again(model))}; {saved}"


def find_origin(model: nn.Module, forward: Callable[[], Any]) -> str:
    """One sentence: the layer whose output was the first that is not finite, and what went into it.

    Args:
        model: the bare module; hooks are put on all of its modules meanwhile.
        forward: runs it once, as in training; whatever it raises is passed over.
    """
    for name, tensor in model.named_parameters():  # running statistics may be spoilt by this very pass
        if not bool(torch.isfinite(tensor).all()):
            return f"the weights hold nan or inf already, first in {name}: an earlier update went wrong"
    found: list[str] = []

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not found and not all(bool(torch.isfinite(t).all()) for t in _numbers(output)):
                inputs = [float(t.abs().max()) for t in _numbers(args)]
                size = f", whose inputs reach {max(inputs):.3g}" if inputs else ""
                found.append(f"the first activations to go bad are those of {name} ({type(module).__name__}){size}")

        return hook

    handles = [m.register_forward_hook(watch(n)) for n, m in model.named_modules() if n]
    try:
        with torch.no_grad():
            forward()
    except Exception as error:  # proposals cannot be made of nan; the hooks have seen what led there
        logger.debug("replay ended by %s", error)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "all activations are finite: the objects of these images are what to look at"


def _numbers(value: Any) -> list[Tensor]:
    """Floating point tensors inside nested containers."""
    return [t.detach() for t in tree_leaves(value) if isinstance(t, Tensor) and t.is_floating_point() and t.numel()]


# ------------------------------------------------------------ the file


def save_batch(path: Path, done: Pass, model: nn.Module, extra: dict[str, Any]) -> str:
    """Write what :func:`replay` needs; returns a sentence, also where it cannot be written.

    Args:
        path: in OUTPUT_DIR.
        done: the pass.
        model: its weights as they were when the losses were computed.
        extra: further plain values, such as the iteration.
    """
    weights = {k: v.detach().cpu() for k, v in model.state_dict().items()}
    try:
        batch = [_plain(s) for s in done.batch]
        payload = {**extra, "batch": batch, "rng": done.rng, "autocast": str(done.dtype or ""), "model": weights}
        save_checkpoint(path, payload)
    except (WriteError, TypeError, AttributeError) as error:  # a batch of the user's own making
        return f"the batch could not be kept ({error})"
    return f"batch and weights are in {path}: python -m gn_det.engine.nonfinite {path}"


def _plain(sample: Mapping[str, Any]) -> dict[str, Any]:
    """A sample of either engine as tensors and plain values."""
    out: dict[str, Any] = {"image": sample["image"].cpu()}
    out |= {k: sample[k] for k in ("image_id", "file_name", "height", "width") if type(sample.get(k)) in (int, str)}
    targets, instances = sample.get("targets"), sample.get("instances")
    if targets is not None:
        masks = None if targets.masks is None else targets.masks.masks
        out["targets"] = _plain_targets(targets.image_size, targets.boxes, targets.classes, masks)
    elif instances is not None:
        masks = instances.gt_masks if instances.has("gt_masks") else None
        masks = getattr(masks, "masks", None) or getattr(masks, "polygons", None) or getattr(masks, "tensor", None)
        out["targets"] = _plain_targets(instances.image_size, instances.gt_boxes.tensor, instances.gt_classes, masks)
    return out


def _plain_targets(size: Sequence[int], boxes: Tensor, classes: Tensor, masks: Any) -> dict[str, Any]:
    plain = None
    if masks is not None:
        plain = [[torch.tensor(p) for p in m] if isinstance(m, list) else torch.tensor(m) for m in masks]
    return {"image_size": [int(v) for v in size], "boxes": boxes.cpu(), "classes": classes.cpu(), "masks": plain}


def load_batch(entries: Sequence[Mapping[str, Any]]) -> list[Sample]:
    """Inverse of what :func:`save_batch` does to samples."""
    samples = []
    for entry in entries:
        sample = Sample(**{k: v for k, v in entry.items() if k != "targets"})  # type: ignore[typeddict-item]
        if "targets" in entry:
            t = entry["targets"]
            plain = t["masks"]
            if plain is not None:
                plain = Masks([[p.numpy() for p in m] if isinstance(m, list) else np.asarray(m) for m in plain])
            sample["targets"] = Targets(tuple(t["image_size"]), t["boxes"], t["classes"], plain)
        samples.append(sample)
    return samples


# ------------------------------------------------------------ replay


def replay(path: str | os.PathLike[str]) -> str:
    """What happened, as text: the losses, one line each, and the layer that was the first to go bad.

    Args:
        path: a file written when a loss was not finite, by either engine; the embedded engine's model repeats it, on
            the CPU.

    Raises:
        WeightsError: not such a file, or its weights do not fit.
        ConfigError: the embedded engine does not have that model.
    """
    from gn_det.modeling.build import build_model

    content = read_checkpoint(path)
    if not {"batch", "rng", "model", "gn_det"} <= content.keys():
        raise WeightsError(f"{path}: holds no batch to replay; give a nonfinite_*.pth of an OUTPUT_DIR")
    cfg = config_of_checkpoint(path)
    check_config(cfg, "embedded")
    model = build_model(cfg)
    try:
        check_replay(content, model, int(cfg.MODEL.ROI_HEADS.NUM_CLASSES))
    except InvalidValue as error:
        raise refuse(os.fspath(path), error, "give a file as a run of this version wrote it", "replay it") from None
    model.load_state_dict(content["model"])
    model.train()
    dtype = getattr(torch, content["autocast"].removeprefix("torch.")) if content["autocast"] else None
    samples = load_batch(content["batch"])
    done = Pass(samples, {**content["rng"], "cuda": None}, "cpu", dtype)
    lines = [f"image {s.get('image_id')} {s.get('file_name', '')}".rstrip() for s in samples]
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
