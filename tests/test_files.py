"""Paths from outside: only regular files are opened, names stay in their folder, a lock dies with its process."""

from __future__ import annotations

import errno
import json
import os
import platform
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from gn_det.errors import WriteError
from gn_det.files import (
    Busy,
    NotRegularFile,
    atomic_write,
    check_writable,
    inside,
    json_bytes,
    lock,
    open_append,
    open_regular,
)


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


# ------------------------------------------------------------ atomic writes


@pytest.mark.parametrize(
    ("content", "expected"),
    [("ä", b"\xc3\xa4"), (b"ab", b"ab"), (iter([b"a", b"b"]), b"ab"), (lambda file: file.write(b"ab"), b"ab")],
)
def test_atomic_write_takes_text_bytes_pieces_and_functions(tmp_path: Path, content: Any, expected: bytes) -> None:
    atomic_write(tmp_path / "new" / "x", content)
    assert (tmp_path / "new" / "x").read_bytes() == expected
    assert os.listdir(tmp_path / "new") == ["x"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, TypeError])
def test_what_fails_while_writing_leaves_the_old_file_alone(tmp_path: Path, error: type[BaseException]) -> None:
    def interrupted(file: Any) -> None:
        file.write(b"half")
        raise error

    atomic_write(tmp_path / "x", "old")
    with pytest.raises(error):
        atomic_write(tmp_path / "x", interrupted)
    assert os.listdir(tmp_path) == ["x"] and (tmp_path / "x").read_text() == "old"


def test_unwritable_places_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    os.mkfifo(tmp_path / "pipe")
    for path, reason in (
        (tmp_path / "file" / "x", "[Nn]ot a directory"),
        (tmp_path / "pipe", "named pipe, not a regular file"),
        (tmp_path, "folder, not a regular file"),
        (f"{tmp_path}/a\0b", "null"),
        (f"{tmp_path}/{'x' * 300}", "too long"),
    ):
        with pytest.raises(WriteError, match=rf"cannot be written \(.*{reason}.*\); ") as raised:
            atomic_write(path, b"x")
        remedy = "give the name of a file" if "not a regular" in reason else "free space or choose another place"
        assert str(raised.value).endswith(remedy) and str(raised.value).count("\n") == 0
    assert sorted(os.listdir(tmp_path)) == ["file", "pipe"]


@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_files_have_the_mode_that_the_user_asks_for(mask: int, tmp_path: Path) -> None:
    """Not that of a temporary file, which nobody else can read."""
    old = os.umask(mask)
    try:
        atomic_write(tmp_path / "x", "")
    finally:
        os.umask(old)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o666 & ~mask


def test_json_of_names_that_are_not_utf8() -> None:
    """They read back as the names that open the files."""
    for name in ("ä", "\udcff"):
        assert json.loads(json_bytes({"file_name": name})) == {"file_name": name}
    assert json_bytes("ä") == b'"\xc3\xa4"'


def test_unwritable_folder_is_found_at_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="OUTPUT_DIR"):
        check_writable(tmp_path / "file" / "out")
