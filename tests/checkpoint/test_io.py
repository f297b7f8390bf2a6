"""Checkpoint files: atomic, safe to read, every broken file one line."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch

from gn_det import files
from gn_det.checkpoint.io import read_any, read_checkpoint, save_checkpoint
from gn_det.errors import WeightsError, WriteError


def payload(value: float = 1.0) -> dict:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(1, 3, 5, 5)).sum().backward()
    optimizer.step()
    return {
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "iteration": 7,
        "gn_det": {"class_names": ["a", "ü"], "best_metric": value, "none": None, "flag": True, "pair": (1, 2.5)},
    }


def refused(call: object, *args: object, error: type[Exception] = WeightsError) -> str:
    """The message, which must be one line that names the file."""
    with pytest.raises(error) as caught:
        call(*args)  # type: ignore[operator]
    message = str(caught.value)
    assert "\n" not in message
    assert str(args[0]) in message
    return message


@pytest.mark.parametrize("mmap", [False, True])
def test_what_is_written_is_read(tmp_path: Path, mmap: bool) -> None:
    saved = payload()
    save_checkpoint(tmp_path / "new" / "m.pth", saved)
    read = read_checkpoint(tmp_path / "new" / "m.pth", mmap=mmap)
    assert read["gn_det"] == saved["gn_det"] and read["iteration"] == 7
    assert list(read["model"]) == list(saved["model"])
    assert all(torch.equal(read["model"][k], v) for k, v in saved["model"].items())
    momentum = saved["optimizer"]["state"][0]["momentum_buffer"]
    assert torch.equal(read["optimizer"]["state"][0]["momentum_buffer"], momentum)
    assert read["optimizer"]["param_groups"] == saved["optimizer"]["param_groups"]
    assert os.listdir(tmp_path / "new") == ["m.pth"]
    assert torch.load(tmp_path / "new" / "m.pth", weights_only=True)["iteration"] == 7


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (np.float64(1.0), "numpy.float64"),
        (np.zeros(2), "numpy.ndarray"),
        (Counter([1]), "collections.Counter"),
        (Path("x"), "Path"),
        (lambda: 0, "function"),
        ({1, 2}, "builtins.set"),
        (torch.float32, "dtype"),
    ],
)
def test_a_payload_that_would_not_load_safely_is_a_defect_named_by_its_place(
    tmp_path: Path, value: object, kind: str
) -> None:
    with pytest.raises(TypeError, match=r"payload\['scheduler'\]\[0\]") as caught:
        save_checkpoint(tmp_path / "m.pth", {"scheduler": [value]})
    assert kind in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_failure_while_writing_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.pth"
    save_checkpoint(path, payload(1.0))

    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", no_space)
    message = refused(save_checkpoint, path, payload(2.0), error=WriteError)
    assert "No space left" in message
    assert read_checkpoint(path)["gn_det"]["best_metric"] == 1.0
    assert os.listdir(tmp_path) == ["m.pth"]


def test_a_really_full_disk(tmp_path: Path) -> None:
    # A file-size limit fails inside torch's archive writer, as a full disk does, where errno gets lost.
    code = f"""
import resource, signal, torch
from gn_det.checkpoint.io import save_checkpoint, read_checkpoint
from gn_det.errors import WriteError
path = {str(tmp_path / "m.pth")!r}
save_checkpoint(path, {{"model": {{"w": torch.ones(3)}}}})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save_checkpoint(path, {{"model": {{"w": torch.zeros(1_000_000)}}}})
except WriteError as error:
    print(error)
assert torch.equal(read_checkpoint(path)["model"]["w"], torch.ones(3))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "File too large" in done.stdout and done.stdout.count("\n") == 1
    assert os.listdir(tmp_path) == ["m.pth"]


def test_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = refused(save_checkpoint, tmp_path / "file" / "m.pth", payload(), error=WriteError)
    assert "another place" in message


def test_missing_empty_and_folder(tmp_path: Path) -> None:
    assert "no such file" in refused(read_checkpoint, tmp_path / "none.pth")
    (tmp_path / "empty.pth").touch()
    assert "empty" in refused(read_checkpoint, tmp_path / "empty.pth")
    assert "folder" in refused(read_checkpoint, tmp_path)


@pytest.mark.parametrize("mmap", [False, True])
def test_truncated(tmp_path: Path, mmap: bool) -> None:
    save_checkpoint(tmp_path / "m.pth", payload())
    whole = (tmp_path / "m.pth").read_bytes()
    for size in (5, 100, len(whole) // 2, len(whole) - 10):
        (tmp_path / "cut.pth").write_bytes(whole[:size])
        assert "damaged" in refused(lambda p: read_checkpoint(p, mmap=mmap), tmp_path / "cut.pth")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"<!DOCTYPE html><html>404</html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "git lfs pull"),
        (b"\x89PNG\r\n\x1a\n", "picture"),
        (b"hello", "not a checkpoint"),
        (pickle.dumps([1]), "not a checkpoint"),
    ],
)
def test_not_a_checkpoint(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "x.pth").write_bytes(content)
    assert expected in refused(read_checkpoint, tmp_path / "x.pth")


@pytest.mark.parametrize("length", [0x3C, 0x213C, 0x683C, 0x3C20, 0x8B1F, 0xD8FF])
def test_length_of_a_safetensors_header_may_look_like_text(tmp_path: Path, length: int) -> None:
    """The file begins with this number, low byte first: as "<", "<!", "<h", " <", or as gzip."""
    path, data = tmp_path / "m.safetensors", b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    values = np.array([3, 4], np.float32)
    path.write_bytes(length.to_bytes(8, "little") + data.ljust(length) + values.tobytes())
    assert read_any(path)["state_dict"]["w"].tolist() == [3, 4]


@pytest.mark.parametrize(("content", "page"), [(b" \n<HTML>x", True), (b"<?xml ?>", True), (b"<\1\2\3\4", False)])
def test_only_text_is_a_web_page(tmp_path: Path, content: bytes, page: bool) -> None:
    (tmp_path / "m.pth").write_bytes(content)
    assert ("a web page" in refused(read_any, tmp_path / "m.pth")) == page


def test_code_is_named_and_not_run(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({"model": Evil()}, tmp_path / "evil.pth")
    message = refused(read_checkpoint, tmp_path / "evil.pth")
    assert "posix.system" in message and "torch.save" in message
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pth")
    assert "torch.nn.modules.linear.Linear" in refused(read_checkpoint, tmp_path / "module.pth")
    torch.save(torch.ones(3), tmp_path / "tensor.pth")
    assert "Tensor, not a dict" in refused(read_checkpoint, tmp_path / "tensor.pth")
    assert not (tmp_path / "ran").exists()


def test_other_archives(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "plain.pth", "w") as archive:
        archive.writestr("readme.txt", "hello")
    refused(read_checkpoint, tmp_path / "plain.pth")


def test_files_of_old_torch_are_read(tmp_path: Path) -> None:
    state = OrderedDict(w=torch.arange(4.0))
    torch.save({"model": state}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(read_checkpoint(tmp_path / "old.pth", mmap=True)["model"]["w"], state["w"])


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("mmap", [False, True])
def test_equals_torch_load(tmp_path: Path, protocol: int, legacy: bool, mmap: bool) -> None:
    """Every kind of tensor and value that people save: numbers, types, strides, and what shares its storage."""
    base, conv = torch.arange(24.0), torch.nn.Conv2d(3, 4, 3)
    shared = {"k": 1}
    saved = {
        "a": base[:12].view(3, 4), "b": base[12:], "transposed": base.view(4, 6).t(), "slice": base[3:9:2],
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), "empty": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.ones(2)), "leaf": torch.ones(3, requires_grad=True),
        "0-d": torch.tensor(3),
        **{str(t): torch.ones(3, dtype=t) for t in (torch.bfloat16, torch.float16, torch.bool, torch.int8)},
        "state": conv.state_dict(), "size": torch.Size([1, 2]), "counter": Counter({1: 2}), "type": torch.float32,
        "plain": [2**70, -5, 1.5, None, True, b"\x00\xff", "ü", (1, (2,)), [], {}, ()], "shared": [shared, shared],
    }  # fmt: skip
    path = tmp_path / "x.pth"
    torch.save(saved, path, _use_new_zipfile_serialization=not legacy, pickle_protocol=protocol)
    content = path.read_bytes()
    expected, read = torch.load(path, weights_only=False), read_checkpoint(path, mmap=mmap)
    assert list(read) == list(expected)
    for name, value in expected.items():
        found = read[name]
        if isinstance(value, torch.Tensor):
            assert torch.equal(found, value) and type(found) is type(value), name
            for fact in ("dtype", "requires_grad", "device"):
                assert getattr(found, fact) == getattr(value, fact), name
            assert found.stride() == value.stride() and found.storage_offset() == value.storage_offset(), name
        elif name != "state":
            assert found == value, name
    assert isinstance(read["state"], OrderedDict) and not hasattr(read["state"], "_metadata")
    assert all(torch.equal(read["state"][name], value) for name, value in conv.state_dict().items())
    assert read["shared"][0] is read["shared"][1]
    read["a"].zero_()  # as an optimizer does; what shares the storage changes too, the file does not
    assert read["transposed"].flatten()[0] == 0 and path.read_bytes() == content


@pytest.mark.parametrize("order", ["little", "big"])
def test_byte_order(tmp_path: Path, order: str) -> None:
    """A file of a big-endian machine: its record says so, and its numbers stand the other way round."""
    torch.save({"w": torch.arange(5, dtype=torch.float64)}, tmp_path / "x.pth")
    source = zipfile.ZipFile(tmp_path / "x.pth")
    with zipfile.ZipFile(tmp_path / "y.pth", "w") as target:
        for name in source.namelist():
            data = source.read(name)
            data = order.encode() if name.endswith("byteorder") else data
            if name.endswith("data/0") and order == "big":
                data = np.arange(5, dtype=">f8").tobytes()
            target.writestr(name, data)
    for mmap in (False, True):
        assert read_checkpoint(tmp_path / "y.pth", mmap=mmap)["w"].tolist() == [0, 1, 2, 3, 4]
