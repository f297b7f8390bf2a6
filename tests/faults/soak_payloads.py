"""Hostile checkpoints: valid files of torch.save in which one entry or a few are not what they should be.

Each is read as ``--resume``, ``eval`` and ``predict``, or ``pretrain --resume`` read it, on models of a few parameters.
It is either used, and then the next step works and gives finite numbers, or refused in one line that names the file,
and then nothing of the model, the optimizer or the random streams has changed.
"""

from __future__ import annotations

import copy
import io
import json
import random
from collections import OrderedDict
from collections.abc import Callable
from contextlib import redirect_stdout, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.faults.soak_case import Case, run_mutations, watch_mutations

MEMORY = 2 << 30
SECONDS = 20.0

Paths = list[tuple[Any, ...]]


def mutations(case: Case) -> None:
    """As many of each of the three readers."""
    import torchvision  # noqa: F401

    torch.manual_seed(0)
    each = case.count(10_000, 60) // 3
    for name, make in (("--resume", _Resume), ("eval and predict", _Weights), ("pretrain --resume", _Pretraining)):
        target = make(case.folder / make.__name__)
        run_mutations(case, f"payloads for {name}", each, 500, MEMORY, partial(_piece, target))


def _piece(target: Any, first: int, count: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    return watch_mutations(range(first, first + count), SECONDS, partial(_one, target))


def _one(target: Any, number: int) -> Callable[[], str]:
    payload = copy.deepcopy(target.content)
    rng = random.Random(number)
    containers = _containers(payload)
    for _ in range(rng.choice((0, 1, 1, 1, 1, 2, 4)) if number else 0):
        mutate(containers, rng)
    torch.save(payload, target.path)
    return partial(_outcome, target)


def _outcome(target: Any) -> str:
    from gn_det.errors import TrainingError, UserError

    parts = target.fresh()
    before = _state(parts)
    try:
        with redirect_stdout(io.StringIO()):
            use = target.read(parts)
    except UserError as error:
        text = str(error)
        if "\n" in text or not text.isprintable() or len(text) > 1500:
            return f"OTHER: message of {len(text)} characters: {text[:200]!r}"
        if str(target.path.parent) not in text:
            return f"OTHER: the message does not name the place: {text[:200]!r}"
        if _state(parts) != before:
            return f"OTHER: half restored, then refused: {text[:200]!r}"
        return "refused in one line, nothing changed"
    try:
        with redirect_stdout(io.StringIO()):
            use()
    except TrainingError as error:  # weights of 1e38 are finite, and their losses are not
        return "used, then the loss is not finite" if "\n" not in str(error) else f"OTHER: {error}"
    return "used"


def _state(parts: tuple[Any, ...]) -> Any:
    """All values of models and optimizers, and the random streams."""

    def plain(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.detach().numpy().tobytes()
        return {k: plain(v) for k, v in value.items()} if isinstance(value, dict) else repr(value)

    of = [plain(p.state_dict()) for p in parts if isinstance(p, (nn.Module, torch.optim.Optimizer))]
    return of, plain(torch.get_rng_state()), random.getstate(), np.random.get_state()[1].tobytes()


# ------------------------------------------------------------ mutations


def mutate(containers: list[Any], rng: random.Random) -> None:
    """Replace, delete, add or share one entry; entries at the top are chosen more often than single tensors."""
    chosen = rng.choice(containers[: 1 + int(len(containers) ** rng.random())])
    keys = list(chosen) if isinstance(chosen, dict) else list(range(len(chosen)))
    if not keys:
        return
    key = rng.choice(keys)
    what = rng.random()
    if what < 0.75:
        chosen[key] = hostile(chosen[key], rng)
    elif what < 0.82 and isinstance(chosen, dict):
        del chosen[key]
    elif what < 0.9 and isinstance(chosen, dict):
        chosen[rng.choice(("x" * 3000, "\x1b[31m", 7, "state", "ema", "learning", True, ""))] = hostile(
            chosen[key], rng
        )
    elif isinstance(chosen, list):
        chosen.extend([chosen[key]] * rng.choice((1, 100, 2000)))
    else:
        chosen[key] = chosen[rng.choice(keys)]  # one object twice


def _containers(value: Any) -> list[Any]:
    """All dicts and lists of a valid payload, outer ones first."""
    found, at = [value], 0
    while at < len(found):
        inner = found[at].values() if isinstance(found[at], dict) else found[at][:3]
        found += [v for v in inner if isinstance(v, (dict, list))]
        at += 1
    return found


def hostile(value: Any, rng: random.Random) -> Any:
    """A value that may stand where ``value`` is."""
    if isinstance(value, Tensor) and rng.random() < 0.7:
        with suppress(Exception):  # not every change can be made to a tensor that was changed before
            return rng.choice(_TENSORS)(value)
    return rng.choice(_VALUES)()


def _nested(levels: int, step: Callable[[Any], Any]) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = step(value)
    return value


_VALUES: list[Callable[[], Any]] = [
    *(partial(lambda v: v, v) for v in (
        None, True, False, 0, 1, -1, -7, 3, 10**6, 10**15, 10**18, 10**30, -(10**40), 2**63, 2**64, 1 << 16000,
        0.0, -1.5, 1e308, float("nan"), float("inf"), -float("inf"), "", "text", "5", "nan", "\x1b[31mred\x1b[0m\n\r",
        "\udcff\u202e", "é" * 300_000, b"bytes", "a: &a [1]\nb: *a", "{" * 3000, "MODEL: {META_ARCHITECTURE: 5}",
        "OUTPUT_DIR: /tmp/elsewhere\n", "MODEL: []", "a: 1\n" * 5000, "SOLVER: {MAX_ITER: " + "9" * 5000 + "}",
    )),
    list, dict, tuple, OrderedDict, lambda: [0] * 20_000, lambda: {i: i for i in range(5000)},
    lambda: _nested(60, lambda v: [v]), lambda: _nested(40, lambda v: [v, v]), lambda: _nested(40, lambda v: (v, v)),
    lambda: _nested(60, lambda v: {"state": v}), lambda: _nested(30, lambda v: {"a": v, "b": v}),
    lambda: {(1, 2): 3}, lambda: {"model": {}}, lambda: {"steps": 3, "learning": {}}, lambda: [[], {}, None],
    lambda: torch.zeros(3), lambda: torch.tensor(5), lambda: torch.tensor(float("nan")), lambda: torch.Size([2, 3]),
    lambda: torch.float32, lambda: torch.zeros(0), lambda: torch.zeros(5056, dtype=torch.uint8),
    lambda: torch.zeros((1, 1)).expand(50_000, 50_000), lambda: torch.empty(10**12, device="meta"),
    lambda: {"state": {}, "param_groups": []}, lambda: {"state": {0: {"momentum_buffer": torch.zeros(2)}},
                                                       "param_groups": [{"params": [0]}]},
    lambda: {"scale": float("nan"), "growth_factor": 2.0, "backoff_factor": 0.5, "growth_interval": 0,
             "_growth_tracker": "x"},
]  # fmt: skip

_TENSORS: list[Callable[[Tensor], Any]] = [
    lambda t: t.double(),
    lambda t: t.half(),
    lambda t: t.to(torch.complex64),
    lambda t: t.to(torch.int64),
    lambda t: t.bool(),
    lambda t: t.to(torch.float8_e4m3fn) if t.is_floating_point() else t,
    lambda t: t.flatten()[:-1],
    lambda t: t[None],
    lambda t: t.flatten(),
    lambda t: t.flatten()[:1].expand(t.shape) if t.numel() else t,
    lambda t: t.to_sparse() if t.dim() else t,
    lambda t: t.to("meta"),
    lambda t: nn.Parameter(t) if t.is_floating_point() else t,
    lambda t: torch.full_like(t, float("nan")) if t.is_floating_point() else t - 1,
    lambda t: torch.full_like(t, float("inf")) if t.is_floating_point() else t + 1,
    lambda t: torch.full_like(t, 3e38) if t.dtype == torch.float32 else t * 0,
    lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8) if t.dtype == torch.float32 else t,
    lambda t: t.transpose(0, -1) if t.dim() > 1 else t,
    lambda t: t.to(torch.complex64).conj(),
    lambda t: t.tolist(),
    torch.zeros_like,
]


# ------------------------------------------------------------ what reads them


class _Resume:
    """``train --resume``: the stand-in detector, a run of 12 iterations that has done 5, with SOLVER.EMA."""

    def __init__(self, folder: Path) -> None:
        from tests.engine.cases import Tiny, run, tiny_cfg

        keys = ["SOLVER.EMA.ENABLED", True, "TEST.EVAL_PERIOD", 4]
        run(folder, keys, evaluate=lambda model, _: {"segm/AP": 1.0, "bbox/AP": 2.0})
        self.cfg, self.make = tiny_cfg(folder, keys, max_iter=12), Tiny
        self.path = folder / "model_0000004.pth"
        self.content = torch.load(self.path, weights_only=True)
        self.content["gn_det"]["config"] = "SOLVER: {MAX_ITER: 90}\nOUTPUT_DIR: /elsewhere\n"  # short: YAML is slow
        for file in folder.glob("*.pth"):
            file.unlink()
        (folder / "last_checkpoint").write_text(self.path.name)
        self.lines = (folder / "metrics.json").read_text()

    def fresh(self) -> tuple[Any, ...]:
        from gn_det.engine.optimizer import build_optimizer
        from gn_det.engine.schedule import build_lr_scheduler

        (self.path.parent / "metrics.json").write_text(self.lines)
        model = self.make()
        optimizer = build_optimizer(self.cfg, model)
        return model, optimizer, build_lr_scheduler(self.cfg, optimizer)

    def read(self, parts: tuple[Any, ...]) -> Callable[[], None]:
        from gn_det.engine.state import TrainState, find_resume, restore

        point = find_resume(self.path.parent)
        assert point is not None and point.path == self.path
        state = TrainState(*parts, seed=7)
        restore(point, state, self.cfg)
        return partial(self.go_on, state, point)

    def go_on(self, state: Any, point: Any) -> None:
        """Two iterations, with what is recorded and written after them."""
        from gn_det.engine import detector_loop as fit
        from gn_det.engine import hooks, loggers
        from gn_det.engine.hooks import Schedule
        from gn_det.engine.scalars import Metrics, progress_line
        from gn_det.engine.state import ModelMeta
        from tests.engine.cases import loader_factory

        loggers.LOGGERS["tensorboard"] = _NoBoard  # type: ignore[assignment]  # takes longer than all the rest
        fit.build_meta = lambda *words, **more: {}  # type: ignore[assignment]  # so does the YAML of the config
        meta = ModelMeta(self.cfg, ("a",), (1,))
        loop = fit.make_loop(self.cfg, state, state.model, [Schedule()], meta, None, point)
        loop.total = state.iteration + 3
        loop.hooks = [h for h in loop.hooks if not isinstance(h, hooks.Checkpoint)]
        loop.run(lambda: loader_factory(4)(fit.first_batch(self.cfg, state), state.seed))
        (log,) = (h.log for h in loop.hooks if isinstance(h, Metrics))
        line = progress_line(log, state.iteration)
        assert line.isprintable() and len(line) < 10_000, line[:200]
        lines = (self.path.parent / "metrics.json").read_text().splitlines()
        assert json.loads(lines[-1])["iteration"] == state.iteration, lines[-1]
        assert json.loads(lines[-1])["lr"] > 0


class _NoBoard:
    def __init__(self, folder: Path, written: int) -> None:
        self.written = written

    def write(self, iteration: int, scalars: Any) -> None:
        pass

    def flush(self) -> None:
        pass

    def close(self) -> None:
        pass


class _Weights:
    """``eval`` and ``predict``: config, classes and weights of one file, into a detector of three tensors."""

    KEYS = ("backbone.bottom_up.stem.conv1.weight", "roi_heads.box_predictor.cls_score.weight",
            "roi_heads.box_predictor.cls_score.bias")  # fmt: skip

    def __init__(self, folder: Path) -> None:
        from gn_det.checkpoint.meta import build_meta
        from gn_det.config import get_cfg

        folder.mkdir()
        self.path = folder / "model.pth"
        block = build_meta(get_cfg(), ["a", "b"], [1, 2], iteration=5, best_metric=1.0)
        block["config"] = (
            "MODEL: {MASK_ON: False, DEVICE: 'cuda:7', ROI_HEADS: {NUM_CLASSES: 2}}\nOUTPUT_DIR: /elsewhere\n"
        )
        self.content = {"model": self.fresh()[0].state_dict(), "iteration": 5, "gn_det": block}

    def fresh(self) -> tuple[Any, ...]:
        model = nn.Module()
        for key, shape in zip(self.KEYS, ((4, 3, 7, 7), (3, 4), (3,))):
            *names, last = key.split(".")
            node = model
            for name in names:
                if not hasattr(node, name):
                    node.add_module(name, nn.Module())
                node = getattr(node, name)
            node.register_parameter(last, nn.Parameter(torch.ones(shape)))
        return (model,)

    def read(self, parts: tuple[Any, ...]) -> Callable[[], None]:
        from gn_det.checkpoint.meta import config_of_checkpoint
        from gn_det.engine.run import _classes_of
        from gn_det.prediction.predictor import load_predictor

        outer = self

        class Stub:
            name = "embedded"

            def build_model(self, cfg: Any) -> nn.Module:
                assert 0 <= int(cfg.MODEL.ROI_HEADS.NUM_CLASSES) <= 1 << 20
                return parts[0]

            def detector(self, model: nn.Module, cfg: Any) -> Any:
                return model

        cfg = config_of_checkpoint(outer.path)
        assert (cfg.OUTPUT_DIR, cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS) == ("./output", "auto", "")
        names = _classes_of(str(outer.path))
        predictor = load_predictor(outer.path, device="cpu", engine=Stub())  # type: ignore[arg-type]
        assert names is None or all(isinstance(n, str) for n in names)
        assert len(predictor.class_names) == len(predictor.category_ids)
        return partial(_all_finite, parts[0])


def _all_finite(model: nn.Module) -> None:
    assert all(torch.isfinite(t).all() for t in model.state_dict().values())


class _Pretraining:
    """``pretrain --resume``: one convolution and a linear layer after an epoch."""

    def __init__(self, folder: Path) -> None:
        from gn_det.classification.settings import Settings

        folder.mkdir()
        self.settings = Settings.from_dict({"arch": "resnet20", "norm": "GN", "data": "digits", "output": str(folder)})
        self.path = folder / "last.ckpt"
        model, optimizer = self.fresh()
        model(torch.ones(2, 3, 6, 6)).sum().backward()
        optimizer.step()
        row = {"epoch": 1, "train_loss": 2.0, "train_error": 50.0, "val_error": 40.0, "lr": 0.1,
               "seconds_per_iteration": 0.1, "inference_seconds_per_image": 0.1}  # fmt: skip
        self.content = {
            "model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": None,
            "done": {"epochs": 1, "curve": [row], "best": {"epoch": 1, "val_error": 40.0}, "peak_memory_mb": 5.0},
            "settings": self.settings.to_dict(), "processes": 1,
        }  # fmt: skip

    def fresh(self) -> tuple[Any, ...]:
        torch.manual_seed(1)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(64, 3))
        return model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def read(self, parts: tuple[Any, ...]) -> Callable[[], None]:
        from types import SimpleNamespace

        from gn_det.classification.classifier_loop import summarize
        from gn_det.classification.earlier_run import restore

        model, optimizer = parts
        state = SimpleNamespace(model=model, optimizer=optimizer, scaler=None)
        done = restore(self.path, self.settings, state)  # type: ignore[arg-type]

        def use() -> None:
            optimizer.zero_grad()
            model(torch.ones(2, 3, 6, 6)).sum().backward()
            optimizer.step()
            if done.curve:
                json.dumps(summarize(self.settings, done, model, self.path, "cpu"))

        return use
