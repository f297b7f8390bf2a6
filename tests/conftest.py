"""Shared by all tests: two threads at most, no network."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The suite is offline: a connection to anything but this machine fails the test that tries it."""
    connect = socket.socket.connect

    def local_only(self: socket.socket, address: object) -> None:
        host = address[0] if isinstance(address, tuple) else ""
        if self.family != socket.AF_UNIX and host not in ("localhost", "127.0.0.1", "::1", "0.0.0.0"):
            raise OSError(f"tests are offline, connection to {address} refused")
        connect(self, address)  # type: ignore[arg-type]

    monkeypatch.setattr(socket.socket, "connect", local_only)
    yield


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What the equality tests measured (tests/equality/table.py); nothing where none of them ran.

    It stands here and not beside them because the process that prints, under xdist, reads no conftest below this one.
    """
    from tests.equality.table import collect, format_table

    cells = collect(r for kind in ("passed", "failed") for r in terminalreporter.stats.get(kind, ()))
    if cells:
        terminalreporter.section("equality with Detectron2")
        terminalreporter.write_line(format_table(cells))
