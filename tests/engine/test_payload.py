"""A checkpoint is untrusted: ``--resume`` uses an entry, or refuses it by name and changes nothing."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gn_det.checkpoint.io import read_checkpoint, save_checkpoint
from gn_det.engine.optimizer import build_optimizer
from gn_det.engine.payload import restore_slots
from gn_det.engine.schedule import build_lr_scheduler
from gn_det.engine.state import Resume, TrainState, capture_rng, find_resume, restore
from gn_det.errors import WeightsError
from tests.engine.cases import Tiny, run, tiny_cfg

EMA = ["SOLVER.EMA.ENABLED", True, "TEST.EVAL_PERIOD", 4]
NAN, INF, DEEP = float("nan"), float("inf"), [[[[[[[[1]]]]]]]]
MOMENTUM = "optimizer.state[0].momentum_buffer"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    run(folder, EMA, evaluate=lambda model, _: {"segm/AP": 1.0})
    return folder


def fresh_state(cfg: Any) -> TrainState:
    model = Tiny()
    optimizer = build_optimizer(cfg, model)
    return TrainState(model, optimizer, build_lr_scheduler(cfg, optimizer), seed=7)


def resume(folder: Path, payload: dict[str, Any], path: Path) -> TrainState:
    """State after ``payload`` was saved, found and restored."""
    torch.save(payload, path / "model_0000004.pth")
    cfg = tiny_cfg(path, EMA)
    state, found = fresh_state(cfg), find_resume(path)
    assert found is not None
    restore(found, state, cfg)
    return state


def counters(state: TrainState) -> list[Any]:
    names = ("seed", "iteration", "images_seen", "best", "best_iteration", "stale", "evaluated_at", "results", "saved")
    return [getattr(state, name) for name in names]


def put(payload: dict[str, Any], where: str, value: Any) -> None:
    """Replace one entry; ``value`` may be a function of the old one."""
    node: Any = payload
    where, dot, tensor = where.partition("|")  # a name with dots
    *path, last = [int(p) if p.isdigit() else p for p in where.replace("]", "").replace("[", ".").split(".")]
    path, last = ([*path, last], tensor) if dot else (path, last)
    for name in path:
        node = node[name]
    node[last] = value(node[last]) if callable(value) else value


HOSTILE: list[tuple[str, Any]] = [
    *(("iteration", v) for v in ("5", NAN, -7, 10**30, True, None, 5.0, DEEP)),
    *((f"gn_det.{name}", v) for name in ("images_seen", "seed") for v in ("5", -1, 10**18 * 100, 2.5, DEEP, True)),
    ("gn_det.images_seen", 10**15),
    ("gn_det.seed", 2**63),
    *(("gn_det.best_metric", v) for v in ("x", NAN, 10**400, DEEP)),
    *((f"gn_det.{name}", v) for name in ("best_iteration", "stale", "evaluated_at") for v in ("1", -2, 10**10, NAN)),
    *(("gn_det.results", v) for v in ("x", [1], {"segm/AP": "high"}, {5: 1.0}, {"a": DEEP})),
    *(("gn_det.config", v) for v in (5, "x" * (2 << 20), DEEP)),
    *(("rng", v) for v in ("x", 5, [None], [{}], [[]], {"a": 1})),
    *(("rng[0].python", v) for v in ([3, [1, 2], None], [3, [-1] * 625, None], [3, [10**30] * 625, None], "x", [2])),
    ("rng[0].python[1]", lambda words: [*words[:-1], 625]),
    ("rng[0].python[2]", "gauss"),
    *(("rng[0].numpy", v) for v in (["PCG64", 1, 2, 3, 4], None, [])),
    *(("rng[0].numpy[1]", v) for v in (lambda t: t.float(), lambda t: t[:5], lambda t: t - 2**33, "x")),
    ("rng[0].numpy[1]", lambda t: t * 0 + 2**32),
    ("rng[0].numpy[2]", 10**9),
    *(("rng[0].torch", v) for v in (lambda t: t[:-1], lambda t: t.float(), lambda t: t * 0 + 255, None, [1])),
    ("rng[0].cuda", "x"),
    *(("logs", v) for v in ("x", [1], {"scalars": {}}, {"scalars": 5, "written": 1, "lowest": None})),
    *(("logs.written", v) for v in ("4", NAN, 10**12, 99, True)),
    *(("logs.lowest", v) for v in ("x", [1], [NAN, 1], [1.0, "x"], [1.0, 1, 1])),
    *(("logs.scalars.total_loss", v) for v in ("x", [True, [], 4, 5, 0.1], [True, ["a"], 4, 5, 0.1],
                                               [1, [1.0], 4, 5, 1.0],
                                               [True, [1.0], 10**6, 5, 1.0], [True, [1.0] * 5000, 4, 5, 1.0])),
    ("logs.scalars", {"\x1b[31mloss": [True, [1.0], 4, 5, 1.0]}),
    *(("grad_scaler", v) for v in ("x", 5, {"scale": 1.0}, {"scale": NAN, "growth_factor": 2.0, "backoff_factor": 0.5,
                                                          "growth_interval": 5, "_growth_tracker": 0})),
    *(("ema", v) for v in ("x", [1], {"steps": 1}, {"steps": 1, "learning": {}})),
    *(("ema.steps", v) for v in ("x", NAN, -1, 10**30)),
    *((f"{part}|fc.weight", v) for part in ("model", "ema.learning") for v in (
        "x", None, lambda t: t.double().to(torch.complex64), lambda t: t.int(), lambda t: t.to_sparse(), DEEP,
        lambda t: t.to("meta"), lambda t: t * NAN, lambda t: t - INF, lambda t: t[:1],
        lambda t: t.to(torch.float8_e4m3fn))),
    *(("model", v) for v in ("x", None, {}, {5: 1}, {"fc.weight": torch.zeros(8, 8)})),
    *(("optimizer", v) for v in ("x", [1], {}, {"state": {}, "param_groups": 5}, {"state": [], "param_groups": []})),
    *((MOMENTUM, v) for v in ("x", 5, lambda t: t[:1], lambda t: t.flatten(), lambda t: t.int(), lambda t: t * NAN,
                              lambda t: t.to_sparse(), lambda t: t.to("meta"), lambda t: t.to(torch.complex64))),
    *(("optimizer.state", v) for v in (
        "x", {"0": {}}, {0: 5}, {0: {5: 5, "momentum_buffer": 1}}, {-1: {}}, {10**30: {}})),
    *(("optimizer.param_groups", v) for v in ("x", [], [5], [{}], [{"params": "x"}], [{"params": [0]}] * 2)),
    ("optimizer.param_groups", lambda groups: [{"params": [number for group in groups for number in group["params"]]}]),
    ("optimizer.param_groups[0].params", lambda numbers: [numbers[0]] * len(numbers)),
    ("optimizer.param_groups[0].params", lambda numbers: [DEEP] * len(numbers)),
]  # fmt: skip


def bits(state: TrainState) -> Any:
    """All that a resumed run restores."""
    tensors = [*state.model.state_dict().values(), torch.get_rng_state()]
    rest = (state.optimizer.state_dict(), counters(state), state.rng, state.scheduler.last_epoch, random.getstate())
    return [t.detach().numpy().tobytes() for t in tensors], repr(rest), np.random.get_state()[1].tobytes()


def test_hostile_entries_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    """One line that names file and entry; model, momentum, counters and random streams are as before."""
    valid = read_checkpoint(folder / "model_0000004.pth")
    failed = []
    cfg = tiny_cfg(tmp_path, EMA)
    state = fresh_state(cfg)
    before = bits(state)
    for where, value in HOSTILE:
        payload = copy.deepcopy(valid)
        put(payload, where, value)
        try:
            restore(Resume(tmp_path / "x.pth", payload), state, cfg)
        except WeightsError as error:
            text = str(error)
            named = where.split("|")[-1].split(".")[-1].partition("[")[0] in text
            if not named or "\n" in text or len(text) > 700 or str(tmp_path) not in text or bits(state) != before:
                failed.append((where, value, text))
        except Exception as error:
            failed.append((where, value, repr(error)))
        else:
            failed.append((where, value, "accepted"))
    assert not failed, failed[:3]


def test_the_message_says_where_what_and_what_to_do(folder: Path, tmp_path: Path) -> None:
    payload = read_checkpoint(folder / "model_0000004.pth")
    put(payload, "optimizer.state[3].momentum_buffer", lambda t: t.flatten()[:3])
    with pytest.raises(WeightsError) as error:
        resume(folder, payload, tmp_path)
    assert str(error.value) == (
        f"{tmp_path}/model_0000004.pth: cannot resume from this checkpoint: optimizer.state[3].momentum_buffer has "
        "shape 3; it must have 8; delete that file to resume from an older checkpoint, or start a new run with "
        "MODEL.WEIGHTS"
    )


def test_what_nothing_reads_is_ignored(folder: Path, tmp_path: Path) -> None:
    """Foreign entries, and the hyperparameters of saved groups, which are the config's."""
    payload = read_checkpoint(folder / "model_0000004.pth")
    reference = resume(folder, payload, tmp_path)
    payload |= {"foreign": DEEP, "scheduler": "x", "trainer": [1], 7: 5}
    payload["gn_det"]["foreign"] = NAN
    payload["rng"][0]["foreign"] = NAN
    payload["optimizer"]["state"][0]["foreign"] = DEEP
    for group in payload["optimizer"]["param_groups"]:
        group |= {"lr": "fast", "momentum": NAN, "maximize": True, "foreach": DEEP, "nesterov": 5}
    state = resume(folder, payload, tmp_path)
    assert counters(state) == counters(reference)
    assert repr(state.model.state_dict()) == repr(reference.model.state_dict())
    assert repr(state.optimizer.state_dict()) == repr(reference.optimizer.state_dict())
    assert not state.optimizer.param_groups[0]["maximize"]


def _shape(slot: dict[str, Any]) -> Any:
    return slot["momentum_buffer"].shape


def test_nothing_of_the_file_is_shared_with_the_run(folder: Path, tmp_path: Path) -> None:
    """Two parameters whose buffers are one tensor, and a buffer of other strides, learn separately afterwards."""
    payload = read_checkpoint(folder / "model_0000004.pth")
    slots = payload["optimizer"]["state"]
    same = [(i, j) for i in slots for j in slots if i < j and _shape(slots[i]) == _shape(slots[j])]
    assert same
    for i, j in same:
        slots[i]["momentum_buffer"] = slots[j]["momentum_buffer"]
    slots[0]["momentum_buffer"] = torch.zeros(8, 3, 3, 3).to(memory_format=torch.channels_last)
    state = resume(folder, payload, tmp_path)
    buffers = [s["momentum_buffer"] for s in state.optimizer.state.values()]
    assert len({b.untyped_storage().data_ptr() for b in buffers}) == len(buffers)
    for group in state.optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    state.optimizer.step()
    assert all(torch.isfinite(p).all() for p in state.model.parameters())


@pytest.mark.parametrize(
    ("entry", "last"),
    [
        (lambda n: {"gn_det": {"images_seen": n}}, 5 * 2048),
        (lambda n: {"gn_det": {"best_iteration": n}}, 4),
        (lambda n: {"gn_det": {"evaluated_at": n}}, 4),
        (lambda n: {"logs": {"scalars": {"loss": [True, [1.0], n, 5, 1.0]}}}, 4),
        (lambda n: {"logs": {"scalars": {}, "written": n}}, 5),  # the last evaluation comes behind the last iteration
    ],
)
def test_no_entry_is_beyond_the_iteration(entry: Any, last: int) -> None:
    """After 5 iterations of 64 batches of 32 images at most; the last possible number passes."""
    from gn_det.engine.payload import _check_together
    from gn_det.values import InvalidValue

    _check_together({"iteration": 4, **entry(last)}, 32)
    with pytest.raises(InvalidValue):
        _check_together({"iteration": 4, **entry(last + 1)}, 32)
    with pytest.raises(InvalidValue, match="more than 1024 images an iteration"):
        _check_together({"iteration": 4, "gn_det": {"images_seen": 5 * 1024 + 1}}, 16)


def test_absent_entries_and_remedies(folder: Path, tmp_path: Path) -> None:
    """An empty dict or None stands for an absent entry; each kind of problem has its own remedy."""
    from gn_det.engine.payload import refuse
    from gn_det.values import InvalidValue

    for nothing in ({}, None):
        payload = read_checkpoint(folder / "model_0000004.pth") | {"logs": nothing, "grad_scaler": nothing}
        assert resume(folder, payload, tmp_path).iteration == 4
    errors = (InvalidValue("model", "why"), InvalidValue("model", "why", "its own"))
    remedies = [str(refuse("x.pth", error)).rpartition("model why; ")[2] for error in errors]
    assert "delete that file" in remedies[0] and remedies[1] == "its own"
    assert str(refuse("x.pth", errors[1], "use --overwrite")).endswith("model why; use --overwrite")


def test_steps_of_other_optimizers_are_copied() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    optimizer = torch.optim.AdamW([parameter])
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    restore_slots(optimizer, saved, "optimizer")()
    for name, value in optimizer.state[parameter].items():
        theirs = saved["state"][0][name]
        assert torch.equal(value, theirs) and value.data_ptr() != theirs.data_ptr(), name


def adamw(model: Any) -> torch.optim.AdamW:
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("change", [
    ("step", lambda t: t - 2), ("step", lambda t: t * NAN), ("step", "x"), ("step", lambda t: t.expand(2)),
    ("exp_avg_sq", lambda t: -t), ("exp_avg", lambda t: t[:1]), ("exp_avg", lambda t: t.int()),
])  # fmt: skip
def test_hostile_state_of_adamw_is_refused_by_name(change: tuple[str, Any]) -> None:
    from gn_det.values import InvalidValue

    optimizer = adamw(torch.nn.Linear(3, 2))
    saved = copy.deepcopy(optimizer.state_dict())
    put(saved, f"state[0].{change[0]}", change[1])
    with pytest.raises(InvalidValue, match=rf"optimizer\.state\[0\]\.{change[0]} "):
        restore_slots(optimizer, saved, "optimizer")


def test_state_of_another_optimizer_is_refused() -> None:
    """Neither reads the other's, and zero momentum in its place would go unnoticed."""
    from gn_det.values import InvalidValue

    model = torch.nn.Linear(3, 2)
    adam, sgd = adamw(model), torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sgd.step()
    for optimizer, other in ((adam, sgd), (sgd, adam)):
        with pytest.raises(InvalidValue, match=rf"state\[0\] has no state of {type(optimizer).__name__}") as error:
            restore_slots(optimizer, copy.deepcopy(other.state_dict()), "optimizer")
        assert "SOLVER.OPTIMIZER" in error.value.remedy


def test_checkpoints_of_detectron2s_trainer_and_bare_weights_resume(folder: Path, tmp_path: Path) -> None:
    """Momentum below ``trainer``; no gn_det block, logs or random streams."""
    ours = read_checkpoint(folder / "model_0000004.pth")
    plain = {"model": ours["ema"]["learning"], "iteration": 4}
    trainer = {"_trainer": {"optimizer": ours["optimizer"], "iteration": 4}, "iteration": 4, "hooks": {}}
    state = resume(folder, {**plain, "trainer": trainer}, tmp_path)
    assert (state.iteration, state.seed, state.images_seen) == (4, 7, 0)
    found = state.optimizer.state_dict()["state"][0]["momentum_buffer"]
    assert torch.equal(found, ours["optimizer"]["state"][0]["momentum_buffer"])
    state = resume(folder, plain, tmp_path)
    assert state.iteration == 4 and not state.optimizer.state_dict()["state"]
    trainer["_trainer"]["optimizer"] = copy.deepcopy(ours["optimizer"])
    trainer["_trainer"]["optimizer"]["state"][0]["momentum_buffer"] = torch.zeros(5)
    with pytest.raises(WeightsError, match=r"trainer\._trainer\.optimizer\.state\[0\]\.momentum_buffer has shape 5"):
        resume(folder, {**plain, "trainer": trainer}, tmp_path)


def test_random_states_are_those_of_this_schema() -> None:
    """What this machine's libraries give passes, whatever was drawn before, and puts the streams back."""
    from gn_det.engine.payload import _RNG
    from gn_det.engine.state import restore_rng

    for draws in (0, 1, 7, 700):
        for _ in range(draws):
            random.gauss(0, 1)
            np.random.standard_normal()
            torch.randn(1)
        state = capture_rng()
        _RNG(state, "rng[0]")
        wanted = (random.gauss(0, 1), np.random.standard_normal(), torch.randn(1).item())
        restore_rng(state)
        assert (random.gauss(0, 1), np.random.standard_normal(), torch.randn(1).item()) == wanted


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("done", DEEP),
        ("done.epochs", 10**30),
        ("done.epochs", 2),
        ("done.curve", [{"epoch": 1}]),
        ("done.curve[0].val_error", "low"),
        ("done.best", {}),
        ("done.best", lambda best: {**best, "more": torch.zeros(2)}),  # it is written to summary.json whole
        ("done.peak_memory_mb", "x"),
        ("settings", DEEP),
        ("settings.steps", torch.zeros(3)),
        ("settings.arch", torch.zeros(3)),
        ("processes", torch.ones(2)),
        ("model", {}),
        ("model|linear.bias", lambda t: t * NAN),
        ("optimizer", {"state": {}, "param_groups": []}),
        ("optimizer.state[0].momentum_buffer", lambda t: t[:1]),
        ("scaler", {"scale": "x"}),
    ],
)
def test_pretraining_checks_its_checkpoint(where: str, value: Any, pretrained: Path) -> None:
    from gn_det.classification import pretrain

    payload = read_checkpoint(pretrained / "valid.bin")
    put(payload, where, value)
    save_checkpoint(pretrained / "last.ckpt", payload)
    with pytest.raises((WeightsError, WeightsError.__base__)) as error:
        pretrain(_settings(pretrained), resume=True)
    assert str(pretrained / "last.ckpt") in str(error.value) and "--overwrite" in str(error.value)
    assert where.replace("|", ".").partition(".")[0] in str(error.value) and "\n" not in str(error.value)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from gn_det.classification import pretrain

    folder = tmp_path_factory.mktemp("pretrained")
    pretrain(_settings(folder))
    (folder / "last.ckpt").rename(folder / "valid.bin")
    (folder / "summary.json").unlink()
    return folder


def _settings(folder: Path) -> Any:
    from gn_det.classification import Settings

    values = {"image_size": 16, "images": 40, "batch_size": 8, "epochs": 1, "lr": 0.05, "workers": 0, "device": "cpu"}
    return Settings(arch="resnet8", norm="GN", groups=8, data="shapes", output=str(folder), **values)
