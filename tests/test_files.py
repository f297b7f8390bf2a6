"""Paths from outside: only regular files are opened, names stay in their folder, a lock dies with its process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gn_det.files import Busy, NotRegularFile, inside, lock, open_regular


def test_only_regular_files_open(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    os.mkfifo(tmp_path / "pipe")
    for name in ("file", "link"):
        with open_regular(tmp_path / name) as file:
            assert file.read() == b"content"
    with pytest.raises(NotRegularFile, match="named pipe"):
        open_regular(tmp_path / "pipe")  # a plain open() waits for a writer for ever
    with pytest.raises(NotRegularFile, match="folder"):
        open_regular(tmp_path)
    with pytest.raises(NotRegularFile, match="device"):
        open_regular("/dev/zero")
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "none")


@pytest.mark.parametrize(
    "name",
    ["../x", "a/../../x", "/etc/x", "", ".", "a//b", "a\0b", "..\\x", "a/..", "outside/x", "self", "loop", "loop/x"],
)
def test_names_stay_in_their_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "outside").symlink_to(tmp_path)
    (folder / "self").symlink_to(folder)
    (folder / "loop").symlink_to(folder / "loop")
    with pytest.raises(ValueError):
        inside(folder, name)
    assert inside(folder, "a/b.pth") == folder.resolve() / "a" / "b.pth"


def test_lock_excludes_others_and_is_left_by_a_killed_process(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    with lock(path), pytest.raises(Busy), lock(path):
        pass
    hold = "\n".join(
        [
            "import time",
            "from gn_det.files import lock",
            f"with lock({str(path)!r}):",
            "    print('held', flush=True)",
            "    time.sleep(60)",
        ]
    )
    other = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE)
    assert other.stdout is not None and other.stdout.readline() == b"held\n"
    with pytest.raises(Busy), lock(path):
        pass
    other.kill()
    other.wait()
    with lock(path):
        pass
