"""Shared by all tests: two threads at most, no network."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

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


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of four images with awkward names, beside what is none."""
    folder = tmp_path / "фото ä"
    (folder / "sub").mkdir(parents=True)
    for name in ("é 1.png", "x.jpg", "sub/x.png", "a[1].png"):
        Image.fromarray(np.full((40, 60, 3), 90, np.uint8)).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_bytes(b"")
    return folder


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """What the equality tests measured (tests/equality/table.py); nothing where none of them ran.

    It stands here and not beside them because the process that prints, under xdist, reads no conftest below this one.
    """
    from tests.equality.table import collect, format_table

    cells = collect(r for kind in ("passed", "failed") for r in terminalreporter.stats.get(kind, ()))
    if cells:
        terminalreporter.section("equality with Detectron2")
        terminalreporter.write_line(format_table(cells))
