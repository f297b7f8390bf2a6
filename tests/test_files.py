"""Paths from outside: only regular files are opened, names stay in their folder, a lock dies with its process."""

from __future__ import annotations

import errno
import os
import platform
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from gn_det.files import Busy, NotRegularFile, inside, lock, open_append, open_regular


def test_only_regular_files_open(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    os.mkfifo(tmp_path / "pipe")
    for name in ("file", "link"):
        with open_regular(tmp_path / name) as file:
            assert file.read() == b"content"
    with pytest.raises(NotRegularFile, match="named pipe"):
        open_regular(tmp_path / "pipe")  # a plain open() waits for a writer for ever
    with pytest.raises(NotRegularFile, match="folder") as error:
        open_regular(tmp_path)
    assert error.value.errno == errno.EISDIR
    with pytest.raises(NotRegularFile, match="device"):
        open_regular("/dev/zero")
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "none")


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "loop",
        "loop/x",
        "a/./b",
        "a\\\\b",
        "a/../../x",
        "/etc/x",
        "",
        ".",
        "a//b",
        "a\0b",
        "..\\x",
        "a/..",
        "outside/x",
        "self",
    ],
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


def test_lock_of_one_process(tmp_path: Path) -> None:
    """It names its holder, is left empty, follows no link, and a forked process does not hold it."""
    path = tmp_path / ".lock"
    path.write_text("x" * 300)
    with lock(path):
        with pytest.raises(Busy) as busy, lock(path):
            pass
        assert busy.value.holder == f"process {os.getpid()}"
        holder = f"process {os.getpid()} on {platform.node()}"
        child = os.fork()
        if child == 0:
            status = 1
            try:
                with lock(path):
                    pass
            except Busy as error:  # the kernel's answer, not that of what was copied from the parent
                status = 0 if error.holder == holder else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert path.read_text() == ""
    with lock(path):
        pass
    (tmp_path / "link").symlink_to(tmp_path / "other")
    with pytest.raises(OSError) as error, lock(tmp_path / "link"):
        pass
    assert error.value.errno == errno.ELOOP and not (tmp_path / "other").exists()


def test_lock_waits_for_a_holder_that_ends(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    hold = f"from gn_det.files import lock\nwith lock({str(path)!r}): print('held', flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdin is not None and other.stdout is not None and other.stdout.readline() == b"held\n"
    ended = threading.Timer(0.3, other.communicate, [b"\n"])
    ended.start()
    with lock(path, patience=60):
        pass
    ended.join()
    assert other.returncode == 0


def test_only_regular_files_are_appended_to(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)  # else opening it fails anyway
    (tmp_path / "out").symlink_to("/dev/null")
    for name, error in (("pipe", NotRegularFile), ("out", OSError)):
        with pytest.raises(error):
            open_append(tmp_path, name)
    os.close(reader)
    for line in ("a\n", "b\n"):
        with open_append(tmp_path, "log.txt") as file:
            file.write(line)
    assert (tmp_path / "log.txt").read_text() == "a\nb\n"
