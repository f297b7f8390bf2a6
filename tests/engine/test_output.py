"""OUTPUT_DIR: one run at a time, and files that stay regular files inside it."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gn_det.checkpoint.io import save_checkpoint
from gn_det.checkpoint.last import last_name, prune, read_last, write_last
from gn_det.cli import main
from gn_det.engine import output, run
from gn_det.engine.log import run_log
from gn_det.engine.loggers import JsonLogger
from gn_det.engine.output import LOCK, InUse, alone_in, check_output_name
from gn_det.errors import DataError, TrainingError, WeightsError
from gn_det.files import atomic_write, open_append

needs_posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and pipes")

HOLD = """
import sys, time
import torch
from gn_det.engine.output import alone_in
class Slow(torch.utils.data.Dataset):
    def __len__(self): return 100
    def __getitem__(self, i):
        time.sleep(100 if i > 3 else 0)
        return i
with alone_in(sys.argv[1]):
    batches = iter(torch.utils.data.DataLoader(Slow(), num_workers=2, multiprocessing_context="fork"))
    next(batches)
    print("ready", flush=True)
    time.sleep(600)
"""


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "PATIENCE", 0.0)


@pytest.fixture()
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that is alone in the folder, with two forked workers of a loader."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


@needs_posix
def test_second_run_is_told_which_process_has_the_folder(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(InUse) as error, alone_in(tmp_path):
        raise AssertionError("both are alone")
    assert f"OUTPUT_DIR {tmp_path} is in use by another run (process {holder.pid} on " in str(error.value)
    assert "set OUTPUT_DIR to another folder" in str(error.value) and "\n" not in str(error.value)


@needs_posix
def test_killed_run_does_not_block_the_next_at_once(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    """Its forked workers live on for seconds, and hold nothing."""
    children = Path(f"/proc/{holder.pid}/task/{holder.pid}/children")
    workers = [int(n) for n in children.read_text().split()] if children.is_file() else []
    holder.send_signal(signal.SIGSTOP)
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)  # so that they are there for certain
    holder.kill()
    holder.wait()
    try:
        with alone_in(tmp_path):
            assert all(Path(f"/proc/{worker}").exists() for worker in workers)
    finally:
        for worker in workers:
            os.kill(worker, signal.SIGKILL)


def test_one_process_is_alone_only_once(tmp_path: Path) -> None:
    with alone_in(tmp_path):
        for _ in range(2):  # a failed attempt must not release the lock
            with pytest.raises(InUse, match=f"process {os.getpid()}"), alone_in(tmp_path):
                raise AssertionError("both are alone")
        child = "from gn_det.files import *; import sys\ntry:\n with lock(sys.argv[1]): pass\nexcept Busy: print(1)"
        said = subprocess.run(
            [sys.executable, "-c", child, tmp_path / LOCK], capture_output=True, text=True, check=True
        )
        assert said.stdout == "1\n"
    with alone_in(tmp_path):
        pass


@needs_posix
def test_lock_file_is_never_followed_or_waited_for(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    inner = tmp_path / "inner"
    inner.mkdir()
    (inner / LOCK).symlink_to(victim)
    with pytest.raises(TrainingError, match=r"cannot be locked .*delete it"), alone_in(inner):
        raise AssertionError
    assert victim.read_text() == "precious"
    (inner / LOCK).unlink()
    os.mkfifo(inner / LOCK)
    with pytest.raises(TrainingError, match="named pipe"), alone_in(inner):
        raise AssertionError


def test_file_system_without_locks_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import errno

    def none(path: Any, patience: float) -> Any:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(output, "lock", none)
    with caplog.at_level("WARNING", logger="gn_det"), alone_in(tmp_path):
        pass
    assert "has no locks" in caplog.text


@pytest.mark.parametrize("what", ["train", "eval", "pretrain", "compare"])
def test_every_command_that_writes_is_alone(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused with one line before a file is read or written."""
    from gn_det.cli import main
    from gn_det.data.shapes import make_shapes

    made = make_shapes(tmp_path / "shapes", "train", 4)
    out = tmp_path / "out"
    out.mkdir()
    train = ["--train-json", made.json_file, "--train-images", made.image_root]
    val = ["--val-json", made.json_file, "--val-images", made.image_root]
    config = ["--config", "quickstart.yaml", "--engine", "embedded", "--device", "cpu", "--output", str(out)]
    words = {
        "train": ["train", *config, *train],
        "eval": ["eval", *config, *val, "--weights", "nowhere.pth"],
        "pretrain": ["classify", "--arch", "resnet20", "--norm", "BN", "--data", "digits", "--output", str(out)],
        "compare": ["compare", *config[-2:], "--engine", "embedded", *train, *val, "--configs", "quickstart.yaml"],
    }[what]
    with alone_in(out):
        assert main(words) == 2
    said = capsys.readouterr()
    assert f"{out} is in use by another run (process {os.getpid()})" in said.err
    assert len(said.err.splitlines()) == 1 and "Traceback" not in said.out
    assert [f.name for f in out.iterdir()] == [LOCK]


def test_second_run_looks_again_before_it_replaces_an_earlier_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs start in an empty folder: the one that waited must not delete what the first one wrote meanwhile."""
    from tests.engine.cases import tiny_cfg

    def finished_meanwhile(*args: Any, **kwargs: Any) -> Any:
        (tmp_path / "model_final.pth").write_bytes(b"of the first run")
        return args[0](*args[1])

    monkeypatch.setattr(run.dist, "launch", finished_meanwhile)
    with pytest.raises(TrainingError, match="holds 1 checkpoint"):
        run.train(tiny_cfg(tmp_path))
    assert (tmp_path / "model_final.pth").read_bytes() == b"of the first run"


def test_stored_config_does_not_decide_where_files_go(tmp_path: Path) -> None:
    """``eval`` writes to --output or ./output, and loads what it is given, whatever the file says."""
    from gn_det.checkpoint.meta import build_meta, config_of_checkpoint
    from gn_det.config import get_cfg

    cfg = get_cfg()
    cfg.OUTPUT_DIR, cfg.MODEL.WEIGHTS, cfg.MODEL.DEVICE = "/elsewhere", "http://host/x.pth", "cuda:7"
    cfg.MODEL.GN.NUM_GROUPS = 16
    save_checkpoint(tmp_path / "m.pth", {"model": {}, "gn_det": build_meta(cfg, [], [])})
    found = config_of_checkpoint(tmp_path / "m.pth")
    assert (found.OUTPUT_DIR, found.MODEL.WEIGHTS, found.MODEL.DEVICE) == ("./output", "", "auto")
    assert found.MODEL.GN.NUM_GROUPS == 16


# ------------------------------------------------------------ files of the folder


def checkpoint(path: Path, iteration: int) -> None:
    save_checkpoint(path, {"model": {}, "iteration": iteration, "optimizer": {}})


@pytest.mark.parametrize(
    "name", ["../out.pth", "/etc/passwd", "a/b.pth", "link.pth", "loop.pth", "x" * 5000, "..", "\0"]
)
def test_last_checkpoint_stays_in_its_folder(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A name or link that leads out is not read; the newest file of the folder is."""
    folder = tmp_path / "run"
    folder.mkdir()
    checkpoint(tmp_path / "out.pth", 99)
    checkpoint(folder / "model_0000004.pth", 4)
    (folder / "a").mkdir()
    checkpoint(folder / "a" / "b.pth", 98)
    (folder / "link.pth").symlink_to(tmp_path / "out.pth")
    (folder / "loop.pth").symlink_to(folder / "loop.pth")
    (folder / "last_checkpoint").write_text(name)
    assert read_last(folder) == folder / "model_0000004.pth"
    assert "resuming from" in caplog.text and all(len(r.getMessage()) < 1500 for r in caplog.records)


def test_kept_batches_are_no_checkpoints(tmp_path: Path) -> None:
    """The file of a non-finite loss is newer than every checkpoint; a run must not go on from it."""
    checkpoint(tmp_path / "model_0000004.pth", 4)
    checkpoint(tmp_path / "nonfinite_0000006_rank0.pth", 6)
    assert read_last(tmp_path) == tmp_path / "model_0000004.pth"


@needs_posix
def test_pipes_in_the_folder_hang_nothing(tmp_path: Path) -> None:
    for name in ("last_checkpoint", "model_0000004.pth", "metrics.json", "log.txt"):
        os.mkfifo(tmp_path / name)
    with pytest.raises(WeightsError, match="no other checkpoint there can be read"):
        read_last(tmp_path)
    assert last_name(tmp_path) == ""
    with pytest.raises(TrainingError, match=r"metrics\.json: cannot append to this file"):
        JsonLogger(str(tmp_path / "metrics.json"))
    with pytest.raises(TrainingError, match=r"log\.txt: cannot append to this file"), run_log(tmp_path):
        raise AssertionError
    (tmp_path / "last_checkpoint").unlink()
    (tmp_path / "last_checkpoint").write_text("model_0000004.pth")
    with pytest.raises(WeightsError, match="no other checkpoint there can be read"):
        read_last(tmp_path)


@needs_posix
def test_nothing_is_written_or_deleted_outside(tmp_path: Path) -> None:
    """Links under the names that a run writes to, temporary ones included."""
    victim, folder = tmp_path / "victim", tmp_path / "run"
    victim.write_text("precious")
    folder.mkdir()
    for name in (f".config.yaml.tmp-{os.getpid()}", "config.yaml", "metrics.json", ".old.tmp-1", "model_0000001.pth"):
        (folder / name).symlink_to(victim)
        os.utime(folder / name, (0, 0), follow_symlinks=False)
    os.utime(victim, (0, 0))
    atomic_write(folder / "config.yaml", b"new")
    assert (folder / "config.yaml").read_bytes() == b"new" and not (folder / "config.yaml").is_symlink()
    with pytest.raises(OSError, match="leads out"):
        open_append(folder, "metrics.json")
    checkpoint(folder / "model_0000002.pth", 2)
    write_last(folder, "model_0000002.pth")
    prune(folder, 1)
    assert victim.read_text() == "precious"
    assert not (folder / "model_0000001.pth").is_symlink() and victim.stat().st_mtime == 0


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_output_that_can_be_no_folder_is_told_before_anything_is_made(tmp_path: Path) -> None:
    """By a dry run, too; a folder that is not there yet is fine, and stays absent."""
    os.mkfifo(tmp_path / "pipe")
    for place in ("/dev/null", "/dev/null/x", tmp_path / "pipe", tmp_path / "pipe" / "a" / "b"):
        with pytest.raises(TrainingError, match=f"OUTPUT_DIR {place}: .* is not a folder"):
            check_output_name(place)
    assert main(["train", "--config", "quickstart.yaml", "--dry-run", "OUTPUT_DIR", "/dev/null"]) == 2
    for place in (tmp_path, tmp_path / "new" / "one", "new"):
        check_output_name(place)
    assert os.listdir(tmp_path) == ["pipe"]


def test_a_worker_that_imports_the_script_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its folder is in use by the very run that started the worker."""
    with alone_in(tmp_path):
        monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
        with pytest.raises(DataError, match="if __name__ == '__main__':"), alone_in(tmp_path):
            pass


def test_warnings_are_marked_in_the_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with run_log(tmp_path):
        logging.getLogger("gn_det.x").info("plain")
        logging.getLogger("gn_det.x").warning("look %s", "here\x1b")
    first, second = (tmp_path / "log.txt").read_text().splitlines()
    assert first.endswith("] plain") and second.endswith("] WARNING: look here\\x1b")
