"""Which checkpoint a resumed run goes on from, and which are deleted."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
import torch
import yaml

from gn_det.checkpoint.io import save_checkpoint
from gn_det.checkpoint.last import prune, read_last, remove_leftovers, write_last
from gn_det.checkpoint.meta import build_meta, config_of_checkpoint, read_meta
from gn_det.config import get_cfg
from gn_det.errors import WeightsError


def save(folder: Path, iteration: int, name: str = "") -> Path:
    path = folder / (name or f"model_{iteration:07d}.pth")
    save_checkpoint(path, {"model": {"w": torch.ones(2)}, "iteration": iteration})
    return path


def test_detectron2s_format(tmp_path: Path) -> None:
    path = save(tmp_path, 9)
    write_last(tmp_path, str(path))
    assert (tmp_path / "last_checkpoint").read_text() == "model_0000009.pth"
    assert read_last(tmp_path) == path


def test_nothing_there(tmp_path: Path) -> None:
    assert read_last(tmp_path) is None
    assert read_last(tmp_path / "absent") is None
    write_last(tmp_path, "model_1.pth")
    with pytest.raises(WeightsError, match="without --resume"):
        read_last(tmp_path)


@pytest.mark.parametrize("damage", ["gone", "no marker", "empty marker"])
def test_falls_back_to_the_newest_readable_with_a_warning(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    older, newest = save(tmp_path, 100), save(tmp_path, 200)
    write_last(tmp_path, newest.name)
    expected = older
    if damage == "gone":
        newest.unlink()
    else:
        (tmp_path / "last_checkpoint").write_text("") if damage == "empty marker" else (
            tmp_path / "last_checkpoint"
        ).unlink()
        # The highest iteration counts, not the latest change on disk.
        os.utime(newest, (1, 1))
        expected = newest
    with caplog.at_level(logging.WARNING):
        assert read_last(tmp_path) == expected
    assert str(expected) in caplog.text
    for file in tmp_path.glob("*.pth"):
        file.write_bytes(b"x")
    with pytest.raises(WeightsError, match="no other checkpoint there can be read"):
        read_last(tmp_path)


@pytest.mark.parametrize("damage", ["truncated", "zeroed", "one bit in a tensor", "page of zeros"])
def test_a_damaged_newest_checkpoint_falls_back(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    """torch itself reads a file with a flipped bit without a word; the archive's checksums tell."""
    paths = [tmp_path / f"model_{i:07d}.pth" for i in (1, 2)]
    for path in paths:
        save_checkpoint(
            path, {"model": {"w": torch.full((3000,), 1.5)}, "iteration": int(path.stem[6:]), "optimizer": {}}
        )
    save_checkpoint(tmp_path / "model_best.pth", {"model": {"w": torch.ones(3)}, "iteration": 2})
    write_last(tmp_path, paths[1].name)
    whole = bytearray(paths[1].read_bytes())
    middle = whole.index(torch.full((8,), 1.5).numpy().tobytes()) + 4800
    if damage == "truncated":
        del whole[middle:]
    elif damage == "zeroed":
        whole[:] = bytes(len(whole))
    elif damage == "page of zeros":
        whole[middle : middle + 4096] = bytes(4096)
    else:
        whole[middle] ^= 1
    paths[1].write_bytes(whole)
    if damage == "one bit in a tensor":
        assert not torch.equal(torch.load(paths[1])["model"]["w"], torch.full((3000,), 1.5))
    with caplog.at_level(logging.WARNING):
        assert read_last(tmp_path) == paths[0]  # not model_best.pth, which has no momentum to go on with
    assert paths[1].name in caplog.text and f"resuming from {paths[0]}" in caplog.text


def test_leftovers_of_killed_processes(tmp_path: Path) -> None:
    import subprocess
    import sys

    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    dead, own, alive, other = (
        tmp_path / f".model_0000001.pth.tmp-{n}" for n in (gone.pid, os.getpid(), os.getppid(), "x")
    )
    huge = tmp_path / ".model_0000001.pth.tmp-99999999999999999999"
    for file in (dead, own, alive, other, huge):
        file.touch()
    assert set(remove_leftovers(tmp_path)) == {dead, own, huge}
    assert alive.exists() and other.exists()


def test_prune_keeps_the_last_ones_and_what_has_a_name(tmp_path: Path) -> None:
    for iteration in (1, 2, 3, 10, 20):
        save(tmp_path, iteration)
    save(tmp_path, 1, "model_best.pth")
    save(tmp_path, 20, "model_final.pth")
    write_last(tmp_path, "model_0000002.pth")
    assert {f.name for f in prune(tmp_path, 2)} == {"model_0000001.pth", "model_0000003.pth"}
    assert prune(tmp_path, 0) == []


def test_meta_round_trip(tmp_path: Path) -> None:
    cfg = get_cfg()
    meta = build_meta(cfg, ["a", "b"], [3, 90], iteration=5, best_metric=None)
    save_checkpoint(tmp_path / "m.pth", {"model": {}, "gn_det": meta})
    read = read_meta(torch.load(tmp_path / "m.pth", weights_only=True))
    assert read is not None
    assert read["class_names"] == ("a", "b") and read["category_ids"] == (3, 90)
    assert read["iteration"] == 5 and read["best_metric"] is None
    again = get_cfg()
    again.merge_from_other_cfg(type(cfg).load_cfg(read["config"]))
    assert yaml.safe_load(again.dump()) == yaml.safe_load(cfg.dump())


def test_config_of_a_checkpoint(tmp_path: Path) -> None:
    cfg = get_cfg()
    cfg.MODEL.GN.NUM_GROUPS = 16
    save_checkpoint(tmp_path / "m.pth", {"model": {}, "gn_det": build_meta(cfg, [], [])})
    assert config_of_checkpoint(tmp_path / "m.pth").MODEL.GN.NUM_GROUPS == 16
    save_checkpoint(tmp_path / "d2.pth", {"model": {}})
    with pytest.raises(WeightsError, match="stores no config"):
        config_of_checkpoint(tmp_path / "d2.pth")


def test_meta_of_foreign_files() -> None:
    assert read_meta({"model": {}}) is None and read_meta({"gn_det": 3}) is None
    read = read_meta({"gn_det": {"class_names": [1], "category_ids": "x", "config": 5, "best_metric": "y"}})
    assert read is not None
    assert (read["class_names"], read["category_ids"], read["config"], read["best_metric"]) == ((), (), "", None)
