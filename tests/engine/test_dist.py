"""Two processes on the CPU (gloo) train as one process does; failures and counts are told in one line."""

from __future__ import annotations

import faulthandler
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.elastic.utils.distributed import get_free_port

from gn_det.config import get_cfg
from gn_det.engine import dist, prepare
from gn_det.errors import ConfigError, TrainingError
from tests.engine.cases import Tiny, loader_factory, run


class Plain(Tiny):
    """Nothing random and no batch statistics, so that only the arithmetic of the mean is left."""

    def __init__(self, poison: int = -1) -> None:
        super().__init__()
        self.poison = poison

    def forward(self, samples: list[Any]) -> Any:
        x = torch.stack([s["image"] for s in samples]).float() / 255
        y = self.ln(self.fc(self.gn(self.conv(x)).relu().mean((2, 3))))
        bad = any(s["image_id"] == self.poison for s in samples)
        return {"loss_cls": y.pow(2).mean() * (float("nan") if bad else 1.0), "loss_box_reg": (y - 1).abs().mean()}


def train_rank(folder: Path, poison: int, overrides: list[Any], resume: bool = False) -> dict[str, float]:
    torch.set_num_threads(1)
    world = dist.world_size()
    torch.manual_seed(7)
    model = Plain(poison)
    evaluate = lambda model, on_progress: {"bbox/AP": float(sum(dist.broadcast(dist.gather_objects(dist.rank() + 1))))}  # noqa: E731
    loader = loader_factory(4 // world // (2 if world == 1 else 1), dist.rank(), world)
    return run(folder, overrides, model=model, make_loader=loader, evaluate=evaluate, resume=resume)


def final(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "model_final.pth", weights_only=True)


def stop_and_resume(folder: Path) -> tuple[str, dict[str, float]]:
    """Image 27 spoils iteration 6 on rank 1 alone; then the same run, resumed, without it."""
    try:
        train_rank(folder, 27, [])
    except TrainingError as error:
        message = str(error)
    return message, train_rank(folder, -1, [], resume=True)


def test_two_processes_equal_accumulation(tmp_path: Path) -> None:
    """DDP's mean over two ranks is the mean over two micro-batches; stopped by one rank and resumed it stays so."""
    one, two = tmp_path / "one", tmp_path / "two"
    train_rank(one, -1, ["SOLVER.ACCUMULATE", 2])
    message, results = dist.launch(stop_and_resume, (two,), device="cpu", num_gpus=2)
    assert "iteration 6: loss_cls = nan on GPU 1, images 26, 27;" in message and "model_0000004.pth" in message
    assert results == {"bbox/AP": 3.0}  # 1 + 2: both ranks took part and got the sum
    a, b = final(one)["model"], final(two)["model"]
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6)
    assert len(final(two)["rng"]) == 2


def start_and_stop(folder: Path, times: int) -> int:
    """Every time an object travels last, whose memory gloo's threads give back while the group is left."""
    faulthandler.dump_traceback_later(120, exit=True)  # ends a hang, also one that holds Python's lock
    for number in range(times):
        dist.stop_group()
        store = torch.distributed.FileStore(f"{folder}/{number}", 2)
        torch.distributed.init_process_group("gloo", store=store, rank=int(os.environ["RANK"]), world_size=2)
        assert dist.broadcast([number] * 50) == [number] * 50
    faulthandler.cancel_dump_traceback_later()
    return times


def test_a_group_is_left_and_joined_again_and_again(tmp_path: Path) -> None:
    """Where a thread of gloo waits for Python's lock, and who leaves keeps it, both wait for ever (torch 2.6)."""
    assert dist.launch(start_and_stop, (tmp_path, 12), device="cpu", num_gpus=2) == 12


def no_space(folder: Path) -> list[str]:
    def full(*_: Any, **__: Any) -> None:
        raise TrainingError("no space")

    prepare.check_space, told, cfg = full, "", get_cfg()
    cfg.OUTPUT_DIR = str(folder)
    try:
        prepare.prepare_folder(cfg, Plain(), fresh=True)
    except TrainingError as error:
        told = str(error)
    return dist.gather_objects(told)


def test_a_full_disk_stops_every_rank(tmp_path: Path) -> None:
    """Rank 0 alone looks; the others would go on to a collective that nobody joins."""
    assert dist.launch(no_space, (tmp_path,), device="cpu", num_gpus=2) == ["no space"] * 2


def no_logger(folder: Path) -> list[str]:
    told = ""
    try:
        train_rank(folder, -1, ["LOGGERS", ("csv",)])
    except TrainingError as error:
        told = str(error)
    return dist.gather_objects(told)


def test_a_logger_that_cannot_start_stops_every_rank(tmp_path: Path) -> None:
    (tmp_path / "metrics.csv").mkdir()
    told = dist.launch(no_logger, (tmp_path,), device="cpu", num_gpus=2)
    assert len(told) == 2 and told[0] == told[1] and "metrics.csv: cannot append to this file" in told[0]


def master() -> str:
    return f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"


def test_the_address_of_one_machine_is_used_where_it_is_given() -> None:
    port = get_free_port()
    found = dist.launch(master, (), device="cpu", num_gpus=2, dist_url=f"tcp://localhost:{port}")
    assert found == f"localhost:{port}"


def mistake() -> None:
    raise ConfigError("nothing was started")


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"num_gpus": 0}, "num-gpus"),
        *(
            ({"num_machines": 2, "dist_url": u}, "dist-url")
            for u in ("auto", "h:1", "tcp://h:x", "tcp://h:99999", "tcp://[")
        ),
        ({"num_machines": 2, "machine_rank": 2}, "machine-rank"),
    ],
)
def test_impossible_counts(arguments: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        dist.launch(mistake, (), device="cpu", **arguments)


def test_device_names() -> None:
    assert dist.resolve_device("cpu") == "cpu"
    with pytest.raises(ConfigError, match=r"MODEL\.DEVICE"):
        dist.resolve_device("gpu")
    for index in ("", "x", "²", "٣", "9" * 5000):
        with pytest.raises(ConfigError, match="use auto, cpu, cuda or cuda:N"):
            dist.resolve_device(f"cuda:{index}")
    if not torch.cuda.is_available():
        assert dist.resolve_device("auto") == "cpu"
        with pytest.raises(ConfigError, match="no GPU"):
            dist.resolve_device("cuda")
