"""Where a non-finite loss came from: the batch run again with every layer watched, and kept in a file to replay."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gn_det.checkpoint.io import save_checkpoint
from gn_det.engine import dist
from gn_det.errors import WriteError
from gn_det.structures import Masks, Sample, Targets

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

    @classmethod
    def about_to_run(cls, model: nn.Module, batch: Sequence[Any]) -> Pass:
        device = next((p.device.type for p in model.parameters()), "cpu")
        rng = {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state() if device == "cuda" else None}
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return cls(batch, rng, device, dtype)

    def again(self, model: Callable[[Any], Any]) -> Any:
        torch.set_rng_state(self.rng["torch"])
        if self.rng["cuda"] is not None:
            torch.cuda.set_rng_state(self.rng["cuda"])
        context = nullcontext() if self.dtype is None else torch.autocast(self.device, dtype=self.dtype)
        with context:
            return model(self.batch)


def diagnose(model: nn.Module, done: Pass, path: Path, extra: dict[str, Any]) -> str:
    """Repeat a pass whose losses were not finite, keep it in ``path``, and say in one line what was found."""
    saved = save_batch(path, done, model, extra)
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
            if not found and not _finite(output):
                kind = type(module).__name__
                inputs = _largest(args)
                size = "" if inputs is None else f", whose inputs reach {inputs:.3g}"
                found.append(f"the first activations to go bad are those of {name} ({kind}){size}")

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


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)


def _finite(value: Any) -> bool:
    return all(bool(torch.isfinite(t).all()) for t in _tensors(value) if t.is_floating_point())


def _largest(value: Any) -> float | None:
    sizes = [float(t.detach().abs().max()) for t in _tensors(value) if t.is_floating_point() and t.numel()]
    return max(sizes, default=None)


# ------------------------------------------------------------ the file


def save_batch(path: Path, done: Pass, model: nn.Module, extra: dict[str, Any]) -> str:
    """Write what :func:`gn_det.engine.replay.replay` needs; returns a sentence, also where it cannot be written.

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
    return f"batch and weights are in {path}: python -m gn_det.engine.replay {path}"


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
