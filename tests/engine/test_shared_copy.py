"""On one machine one process reads, the others map what it read: equal values, one copy, writes stay private."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from gn_det.data.coco import CocoDataset, load_coco
from gn_det.data.shapes import make_shapes
from gn_det.engine import dist
from gn_det.engine.shared_copy import load_once
from gn_det.errors import DataError

_SIZE = 1 << 25


def read_set(folder: Path) -> CocoDataset:
    (folder / f"read by {dist.rank()}").touch()
    return load_coco(make_shapes(folder, "train", 12), max_bad=0)


def everything(data: CocoDataset) -> str:
    return str([list(data.records), data.sizes, data.summary()])


def proportional(key: str = "Pss") -> int:
    """Bytes of memory of this process, shared pages divided among those that share them."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{key}:"))


def share(folder: Path) -> list[Any]:
    data = load_once(lambda: read_set(folder))

    def load() -> dict[str, Any]:
        return {"array": np.arange(_SIZE, dtype=np.uint8), "tensor": torch.ones(_SIZE, dtype=torch.uint8), "small": [1]}

    before = proportional()
    value = load_once(load)
    total = int(value["array"].sum(dtype=np.int64)) + int(value["tensor"].sum())  # touches every page
    dist.broadcast(dist.gather_objects(None))
    more = proportional() - before
    dist.broadcast(dist.gather_objects(None))
    value["array"][dist.rank()] = value["tensor"][dist.rank()] = 77
    dist.broadcast(dist.gather_objects(None))
    ours = [int(np.count_nonzero(value["array"][:8] == 77)), int((value["tensor"][:8] == 77).sum())]
    return dist.broadcast(dist.gather_objects((total, more, ours, value["small"], everything(data))))  # type: ignore[no-any-return]


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="needs files without a name")
def test_processes_share_one_copy(tmp_path: Path) -> None:
    alone = everything(load_once(lambda: read_set(tmp_path)))
    found = dist.launch(share, (tmp_path,), device="cpu", num_gpus=2)
    assert [path.name for path in tmp_path.glob("read by *")] == ["read by 0"]
    values = int(np.arange(_SIZE, dtype=np.uint8).sum(dtype=np.int64)) + _SIZE
    assert [(total, *rest) for total, _, *rest in found] == [(values, [1, 1], [1], alone)] * 2
    assert sum(more for _, more, *_ in found) < 1.5 * 2 * _SIZE  # two copies would be 2 * 2 * _SIZE


def refuse() -> None:
    def load() -> None:
        raise DataError("a.json: no")

    load_once(load)


def test_an_error_reaches_every_process() -> None:
    with pytest.raises(DataError, match=r"^a\.json: no$"):
        dist.launch(refuse, (), device="cpu", num_gpus=2)
