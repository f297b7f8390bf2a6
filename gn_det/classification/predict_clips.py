"""``gn-det predict`` with the weights of a classifier of videos: the top classes of each video."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from gn_det.checkpoint.formats.common import Weights
from gn_det.checkpoint.meta import names_of_classes
from gn_det.checkpoint.open_weights import read_weights
from gn_det.checkpoint.weights_uri import local_path
from gn_det.classification.classifier_loop import ClassifierLoss, summed_softmax
from gn_det.classification.clip_sources import ClipSource
from gn_det.classification.image_sources import Input
from gn_det.classification.network import build_classifier
from gn_det.classification.settings import Settings
from gn_det.engine import dist
from gn_det.errors import ConfigError, WeightsError
from gn_det.files import atomic_write, check_writable, json_bytes
from gn_det.terminal import say
from gn_det.text import one_line

#: Classes that are named for a video.
TOP = 5


def predict_clips(
    weights: str, videos: Sequence[str], output: str, *, device: str = "auto", unused: Sequence[str] = ()
) -> bool:
    """Print the top classes of each video and write them to ``<output>/classes.json``; see :func:`final_test`.

    Args:
        unused: flags that were given and mean nothing to a classifier.

    Returns:
        False, having done nothing, where ``weights`` are not of a classifier of videos.
    """
    found = read_weights(local_path(weights))
    run = _run_of(found, weights)
    if run is None:
        return False
    settings, names = run
    if unused:
        raise ConfigError(f"{unused[0]} is for detectors, and {weights} is a classifier of videos; leave it out")
    kind = dist.resolve_device(device)
    model, given = _load(found, settings, names, weights)
    model.to(kind).eval()
    folder = check_writable(output, "--output")
    results = []
    source = ClipSource(names, [], [(video, 0) for video in videos], replace(settings, max_bad=0, workers=0))
    source.input = given
    with torch.inference_mode():
        sums = summed_softmax(model, source, range(len(videos)))
    for video, (scores, _) in zip(videos, sums.values()):
        top = (scores / (settings.test_clips * settings.test_crops)).topk(min(TOP, len(names)))
        classes = [{"name": names[i], "score": float(s)} for s, i in zip(top.values, top.indices.tolist())]
        results.append({"file": video, "classes": classes})
        say(f"{one_line(video, 200)}: " + ", ".join(f"{one_line(c['name'])} {c['score']:.2f}" for c in classes))
    atomic_write(folder / "classes.json", json_bytes(results, indent=1))
    say(f"Written: {Path(output) / 'classes.json'}")
    return True


def _run_of(weights: Weights, source: str) -> tuple[Settings, tuple[str, ...]] | None:
    """Settings and classes of the training that wrote a file; None for any other file."""
    steps = (weights.meta or {}).get("provenance")
    run = steps[0] if isinstance(steps, list) and steps and isinstance(steps[0], dict) else {}
    stored = run.get("settings")
    if not isinstance(stored, dict):
        return None
    try:
        settings = Settings.from_dict({**stored, "output": "-"})
    except ConfigError as error:
        raise WeightsError(f"{source}: its settings cannot be used ({error})") from None
    return (settings, names_of_classes(run.get("classes"))) if settings.of_clips else None


def _load(weights: Weights, settings: Settings, names: Sequence[str], source: str) -> tuple[ClassifierLoss, Input]:
    needs = weights.preprocessing
    if not names or needs is None or not needs.format or not needs.pixel_mean or not needs.pixel_std:
        raise WeightsError(f"{source}: does not say its classes, channel order, mean and std; train it again")
    model = build_classifier(settings, len(names))
    tensors, placed = {**weights.state, **weights.aside}, {}
    for name, own in model.state_dict().items():
        stored = name.removeprefix("trunk.").replace("linear.", "stem.fc.")
        if stored not in tensors or tensors[stored].shape != own.shape:
            raise WeightsError(f"{source}: {one_line(stored)} is missing or of another shape; train it again")
        placed[name] = tensors[stored]
    model.load_state_dict(placed)
    given = Input(needs.format, needs.pixel_mean, needs.pixel_std)
    return ClassifierLoss(model, given), given
