"""The loop alone, without configuration: what a step reports, and who is called when."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
from torch import nn

from gn_det.engine.loop import Hook, Loop
from gn_det.engine.state import TrainState


def test_the_rate_of_most_tensors_is_the_one_that_is_logged() -> None:
    """As Detectron2 logs it, wherever that group stands."""
    few, many = [nn.Parameter(torch.zeros(9))], [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    optimizer = torch.optim.SGD([{"params": few, "lr": 0.3}, {"params": many, "lr": 0.2}], lr=0.1)
    state = TrainState(nn.Linear(1, 1), optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0))
    loop = Loop(state, lambda batch: {"loss": many[0].sum()}, total=1)
    loop.run(lambda: [None])
    assert loop.lr == 0.2


def test_waiting_for_data_and_losses_of_micro_batches() -> None:
    """The time adds up; losses are means."""
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = TrainState(model, optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0))

    def slow() -> Iterator[float]:
        for value in (1.0, 3.0):
            time.sleep(0.05)
            yield value

    loop = Loop(state, lambda value: {"loss": model.bias.sum() * 0 + value}, total=1, accumulate=2)
    loop.run(slow)
    assert loop.losses == {"loss": 2.0} and 0.1 <= loop.data_time < 0.5 and state.iteration == 0


class Calls(Hook):
    """Notes what it is told; ends the training after ``stop``."""

    def __init__(self, stop: int = -1, fails: bool = False) -> None:
        self.stop, self.fails, self.seen = stop, fails, []  # type: ignore[var-annotated]

    def before_train(self, loop: Loop) -> None:
        self.seen.append("start")

    def after_step(self, loop: Loop) -> None:
        self.seen.append(loop.state.iteration)
        if loop.state.iteration == self.stop:
            loop.stop(finished=False)

    def after_train(self, loop: Loop) -> None:
        self.seen.append("end")
        if self.fails:
            raise RuntimeError("while closing")


def loop_of(hooks: list[Hook], *, done: int = -1, total: int = 5) -> Loop:
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer, 1.0)
    state = TrainState(model, optimizer, scheduler, iteration=done)
    return Loop(state, lambda batch: {"loss": model(batch).sum()}, hooks, total=total)


def ones() -> Iterator[torch.Tensor]:
    while True:
        yield torch.ones(1, 1)


def test_a_hook_ends_the_training() -> None:
    hook = Calls(stop=2)
    loop = loop_of([hook])
    loop.run(ones)
    assert hook.seen == ["start", 0, 1, 2, "end"] and not loop.last and not loop.finished
    loop = loop_of([Calls()])
    loop.run(ones)
    assert loop.last and loop.finished


def test_a_finished_run_reads_no_batch() -> None:
    hook = Calls()
    loop_of([hook], done=4).run(lambda: pytest.fail("no loader is needed"))
    assert hook.seen == ["start", "end"]


def test_all_hooks_are_closed_however_many_fail() -> None:
    first, second = Calls(fails=True), Calls(fails=True)
    with pytest.raises(RuntimeError, match="while closing"):
        loop_of([first, second], total=1).run(ones)
    assert first.seen == second.seen == ["start", 0, "end"]
