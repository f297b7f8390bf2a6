"""Shared by all tests: two threads at most, no network."""

from __future__ import annotations

import socket
from collections.abc import Iterator

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
