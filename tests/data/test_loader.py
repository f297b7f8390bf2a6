"""Batch k depends on (seed, k) alone; unreadable images are replaced, counted, and refused beyond MAX_BAD."""

from __future__ import annotations

import gc
import itertools
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gn_det.config import get_cfg
from gn_det.data import loader as loader_module
from gn_det.data import workers as workers_module
from gn_det.data.catalog import DatasetSource
from gn_det.data.coco import CocoDataset, load_coco
from gn_det.data.loader import build_test_loader, build_train_loader
from gn_det.data.shapes import make_shapes
from gn_det.data.workers import pack_samples, shared_memory_fits, unpack_samples, worker_failure
from gn_det.errors import ConfigError, DataError
from gn_det.structures import Sample
from tests.data.own_coco import write


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> DatasetSource:
    return make_shapes(tmp_path_factory.mktemp("shapes"), "train", 14)


@pytest.fixture
def shapes(source: DatasetSource) -> CocoDataset:
    return load_coco(source, max_bad=0)


def _cfg(**dataloader: Any):
    cfg = get_cfg()
    cfg.INPUT.MIN_SIZE_TRAIN = (40, 50, 60)
    cfg.INPUT.MIN_SIZE_TEST = 40
    cfg.MODEL.MASK_ON = True
    for key, value in dataloader.items():
        cfg.DATALOADER[key] = value
    return cfg


def _same(a: Sample, b: Sample) -> bool:
    masks = zip(a["targets"].masks.masks, b["targets"].masks.masks)
    return (
        a["image_id"] == b["image_id"]
        and torch.equal(a["image"], b["image"])
        and torch.equal(a["targets"].boxes, b["targets"].boxes)
        and torch.equal(a["targets"].classes, b["targets"].classes)
        and all(np.array_equal(m, n) for x, y in masks for m, n in zip(x, y))
    )


def _batches(cfg: Any, data: CocoDataset, count: int, **more: Any) -> list[list[Sample]]:
    loader = build_train_loader(cfg, [data], **{"images_per_rank": 3, "seed": 5, "num_workers": 0} | more)
    return list(itertools.islice(loader, count))


@pytest.mark.parametrize(("workers", "start", "memory"), [(0, 4, True), (1, 0, True), (2, 3, True), (2, 0, False)])
def test_batch_is_a_function_of_seed_and_number(
    shapes: CocoDataset, monkeypatch: pytest.MonkeyPatch, workers: int, start: int, memory: bool
) -> None:
    """Any number of workers, any resume point, any transport: the same tensors."""
    monkeypatch.setattr(loader_module, "shared_memory_fits", lambda *_: memory)
    want = _batches(_cfg(), shapes, 8)[start:]
    got = _batches(_cfg(), shapes, 8 - start, num_workers=workers, start_batch=start)
    assert len(got) == len(want)
    for a, b in zip(got, want):
        assert len(a) == len(b) == 3 and all(map(_same, a, b))
    other = _batches(_cfg(), shapes, 8 - start, seed=6, start_batch=start)
    assert not all(_same(x, y) for a, b in zip(got, other) for x, y in zip(a, b))


def test_one_image_is_augmented_anew_each_time(shapes: CocoDataset) -> None:
    seen: dict[int, set[tuple]] = {}
    for sample in itertools.chain(*_batches(_cfg(), shapes, 60)):
        seen.setdefault(sample["image_id"], set()).add((*sample["image"].shape, int(sample["image"][0, 0, :15].sum())))
    assert len(seen) == 14 and all(len(v) > 2 for v in seen.values())


def test_aspect_groups_and_ranks(shapes: CocoDataset) -> None:
    for batch in _batches(_cfg(), shapes, 20):
        assert len({s["width"] > s["height"] for s in batch}) == 1
    mixed = _batches(_cfg(ASPECT_RATIO_GROUPING=False), shapes, 20)
    assert any(len({s["width"] > s["height"] for s in batch}) == 2 for batch in mixed)
    whole = [s["image_id"] for s in itertools.chain(*mixed)]
    parts = [
        [
            s["image_id"]
            for b in _batches(_cfg(ASPECT_RATIO_GROUPING=False), shapes, 10, rank=r, world_size=2)
            for s in b
        ]
        for r in (0, 1)
    ]
    assert [i for pair in zip(*parts) for i in pair] == whole  # ranks share one stream, nothing twice
    assert sorted(whole[:14]) == list(range(1, 15))  # an epoch shows every image once


@pytest.mark.parametrize("sampler", ["RepeatFactorTrainingSampler", "RandomSubsetTrainingSampler"])
def test_other_samplers(shapes: CocoDataset, sampler: str) -> None:
    cfg = _cfg(SAMPLER_TRAIN=sampler, REPEAT_THRESHOLD=0.9)
    first, second = _batches(cfg, shapes, 6), _batches(cfg, shapes, 6)
    assert all(_same(x, y) for a, b in zip(first, second) for x, y in zip(a, b))
    with pytest.raises(ConfigError, match="SAMPLER_TRAIN 'Other' is not implemented"):
        _batches(_cfg(SAMPLER_TRAIN="Other"), shapes, 1)


def test_images_without_objects(tmp_path: Path) -> None:
    data = load_coco(write(tmp_path), max_bad=0)
    loader = build_train_loader(_cfg(), [data], images_per_rank=2, seed=0, num_workers=0)
    assert loader.num_images == 2 and "; 2 without objects left out" in loader.summary
    cfg = _cfg(FILTER_EMPTY_ANNOTATIONS=False)
    loader = build_train_loader(cfg, [data], images_per_rank=4, seed=0, num_workers=0)
    batch = next(iter(loader))
    assert loader.num_images == 4 and "; 2 without objects included" in loader.summary
    assert sorted(len(s["targets"]) for s in batch) == [0, 0, 1, 2]
    none = load_coco(write(tmp_path, lambda c: c.update(annotations=[])), max_bad=0)
    with pytest.raises(DataError, match="no image has an object to learn from"):
        build_train_loader(cfg, [none], images_per_rank=1, seed=0)


def test_objects_without_mask(tmp_path: Path) -> None:
    data = load_coco(write(tmp_path, lambda c: c["annotations"][0].pop("segmentation")), max_bad=0)
    with pytest.raises(
        DataError, match=r"MASK_ON True: 1 bad .* annotation 11 of image 5 \(im 5é.png\): has no segmentation"
    ):
        build_train_loader(_cfg(MAX_BAD=0), [data], images_per_rank=1, seed=0)
    samples = _batches(_cfg(MAX_BAD=1), data, 4)
    assert {len(s["targets"]) for s in itertools.chain(*samples)} == {1}
    boxes_only = load_coco(write(tmp_path, lambda c: [a.pop("segmentation") for a in c["annotations"]]), max_bad=0)
    with pytest.raises(DataError, match="none of its 3 objects has a segmentation"):
        build_train_loader(_cfg(MAX_BAD=100), [boxes_only], images_per_rank=1, seed=0)


@pytest.mark.parametrize("workers", [0, 2])
def test_truncated_image_is_replaced(tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture) -> None:
    """The header was fine when the run started; the pixels are not. Same replacement with any number of workers."""
    source = make_shapes(tmp_path, "train", 9)
    data = load_coco(source, max_bad=0)
    cut = Path(data.records[4]["file_name"])
    before = _batches(_cfg(), data, 6)
    cut.write_bytes(cut.read_bytes()[:2000])
    with caplog.at_level(logging.WARNING):
        after = _batches(_cfg(), data, 6, num_workers=workers)
    assert sum(cut.name in m for m in caplog.messages) == 1  # named once, not every time
    for a, b in zip(before, after):
        for x, y in zip(a, b):
            assert y["image_id"] != 5 and (_same(x, y) or x["image_id"] == 5)
            assert (y["width"] > y["height"]) == (x["width"] > x["height"])
    with pytest.raises(DataError, match=r"1 bad .*MAX_BAD allows 0: .*000005.jpg: image cannot be read .*truncated"):
        _batches(_cfg(MAX_BAD=0), data, 6, num_workers=workers)
    loader = build_test_loader(_cfg(), data, num_workers=workers)
    assert [s["image_id"] for batch in loader for s in batch] == [1, 2, 3, 4, 6, 7, 8, 9]
    assert list(loader.skipped) == [str(cut)]
    with pytest.raises(DataError, match="MAX_BAD allows 0"):
        list(build_test_loader(_cfg(MAX_BAD=0), data, num_workers=workers))


@pytest.mark.parametrize("workers", [0, 2])
def test_pictures_of_one_color_are_named_once(tmp_path: Path, workers: int, caplog: pytest.LogCaptureFixture) -> None:
    """The first one that a batch has; the batches stay as they are. A crop of one color is no mistake."""
    source = make_shapes(tmp_path, "train", 6)
    data = load_coco(source, max_bad=0)
    with caplog.at_level(logging.WARNING):
        _batches(_cfg(), data, 6)
    assert not caplog.messages
    flat = [Path(data.records[i]["file_name"]) for i in (1, 4)]
    for path in flat:
        Image.new("RGB", Image.open(path).size, (200, 30, 30)).save(path, "PNG")
    plain = _batches(_cfg(), data, 6)
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        got = _batches(_cfg(), data, 6, num_workers=workers)
    (told,) = [m for m in caplog.messages if "same color" in m]
    assert any(path.name in told for path in flat) and "check --images" in told
    assert all(_same(x, y) for a, b in zip(plain, got) for x, y in zip(a, b))
    cfg = _cfg()
    cfg.INPUT.CROP.ENABLED = True
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        _batches(cfg, data, 6)
    assert not [m for m in caplog.messages if "same color" in m]


def test_all_images_unreadable_is_refused(tmp_path: Path) -> None:
    """Even where MAX_BAD would allow to lose them all; a broken aspect group is replaced from the other one."""
    data = load_coco(make_shapes(tmp_path, "train", 5), max_bad=0)
    names = [Path(r["file_name"]) for r in data.records]
    wide = data.sizes[:, 0] > data.sizes[:, 1]
    assert wide.any() and not wide.all()
    for name, broken in zip(names, wide):
        if broken:
            name.write_bytes(name.read_bytes()[:2000])
    batches = _batches(_cfg(), data, 4, num_workers=0)
    assert all(batch and not any(wide[s["image_id"] - 1] for s in batch) for batch in batches)
    for name in names:
        name.write_bytes(name.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"none of the 5 training images can be read .*truncated"):
        _batches(_cfg(), data, 1, num_workers=0)


def test_test_loader_covers_everything_once(shapes: CocoDataset) -> None:
    ids: list[int] = []
    for rank in range(3):
        ids += [s["image_id"] for batch in build_test_loader(_cfg(), shapes, rank, 3, num_workers=0) for s in batch]
    assert ids == list(range(1, 15))


def test_transport_keeps_samples(shapes: CocoDataset, tmp_path: Path) -> None:
    mixed = load_coco(write(tmp_path), max_bad=0)
    samples = _batches(_cfg(FILTER_EMPTY_ANNOTATIONS=False), mixed, 4)[0]
    for shared in (True, False):
        for a, b in zip(samples, unpack_samples(pack_samples(samples, shared))):
            assert _same(a, b) and a.keys() == b.keys()
            assert b["targets"].image_size == a["targets"].image_size
    assert unpack_samples(pack_samples([])) == []


def test_killed_worker_is_one_line(shapes: CocoDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the system does when memory runs out: SIGKILL."""
    monkeypatch.setattr(
        loader_module, "augmentation_state", lambda *_: os.kill(os.getpid(), signal.SIGKILL), raising=True
    )
    with pytest.raises(DataError, match=r"process was killed \(worker 0 at .*jpg\), .*DATALOADER.NUM_WORKERS"):
        _batches(_cfg(), shapes, 1, num_workers=1)


def test_a_loader_that_an_error_keeps_alive_does_not_hold_up_the_end(tmp_path: Path) -> None:
    """Python ends the workers before the loader is gone: that SIGTERM, unlike a batch system's, is obeyed at once."""
    program = """
import sys
from gn_det.config import get_cfg
from gn_det.data.coco import load_coco
from gn_det.data.loader import build_train_loader
from gn_det.data.shapes import make_shapes
data = load_coco(make_shapes(sys.argv[1], "train", 4), max_bad=0)
kept = iter(build_train_loader(get_cfg(), [data], images_per_rank=1, seed=1, num_workers=2))
next(kept)
sys.exit(3)
"""
    words = [sys.executable, "-c", program, str(tmp_path)]
    done = subprocess.run(words, timeout=60, check=False, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (3, "")


def test_hanging_worker_is_one_line(shapes: CocoDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """The image that a worker does not get beyond is named (the other may wait at it, too), none that was read."""
    import time

    mapper = loader_module.TrainMapper.__call__

    def hangs(self: Any, record: Any, *others: Any) -> Any:
        if record["file_name"].endswith("000005.jpg"):
            time.sleep(3600)
        return mapper(self, record, *others)

    monkeypatch.setattr(workers_module, "TIMEOUT", 5)
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)  # how long torch waits for its workers
    monkeypatch.setattr(loader_module.TrainMapper, "__call__", hangs)
    told = (
        r"no batch arrived within 5 s: .* \(worker [01] at [^ ,]*000005.jpg(, worker 1 at [^ ,]*000005.jpg)?\); check"
    )
    with pytest.raises(DataError, match=told):
        _batches(_cfg(), shapes, 20, num_workers=2)
    gc.collect()  # ends the workers while torch waits for them no longer than this
    assert workers_module._watched is None


def test_negative_seed_is_refused(shapes: CocoDataset) -> None:
    with pytest.raises(ValueError, match="non-negative seed"):
        _batches(_cfg(), shapes, 1, seed=-1)


def test_other_errors_are_not_taken_for_a_dead_worker() -> None:
    assert worker_failure(RuntimeError("CUDA error: out of memory")) is None
    assert worker_failure(RuntimeError("DataLoader worker (pid 3) is killed by signal: Killed. ")) is not None


@pytest.mark.parametrize(("each", "fits"), [(132, True), (134, False)])
def test_shared_memory_must_hold_all_batches_in_flight(each: int, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """2 workers with 3 batches each, in four fifths of what is free; any size where the system has no such limit."""
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    assert shared_memory_fits(2, each) is fits

    def missing(path: str) -> Any:
        raise FileNotFoundError(path)

    monkeypatch.setattr("shutil.disk_usage", missing)
    assert shared_memory_fits(2, 10**15)


def test_a_script_that_workers_import_is_named(tmp_path: Path) -> None:
    """Without a __main__ guard and by spawn: both the worker and the run that waits for it say what is missing."""
    (tmp_path / "run.py").write_text(
        "import multiprocessing, sys\n"
        "from gn_det.config import get_cfg\n"
        "from gn_det.data.coco import load_coco\n"
        "from gn_det.data.loader import build_test_loader\n"
        "from gn_det.data.shapes import make_shapes\n"
        "from gn_det.errors import DataError\n"
        "multiprocessing.set_start_method('spawn', force=True)\n"
        "data = load_coco(make_shapes(sys.argv[1], 'train', 2), max_bad=0)\n"
        "try:\n"
        "    print(len(list(build_test_loader(get_cfg(), data, num_workers=1))))\n"
        "except DataError as error:\n"
        "    sys.exit(str(error))\n"
    )
    words = [sys.executable, str(tmp_path / "run.py"), str(tmp_path / "shapes")]
    found = subprocess.run(words, capture_output=True, text=True, timeout=300)
    lines = found.stderr.splitlines()
    assert found.returncode == 1 and len(lines) == 2
    for line in lines:
        assert line.startswith(f"{tmp_path / 'run.py'}: data loading processes import this script")
        assert "if __name__ == '__main__':" in line


@pytest.mark.parametrize("free", [0, 4096 * 13])
def test_too_little_shared_memory_to_start(shapes: CocoDataset, monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    """Two workers take 14 pages of /dev/shm for their semaphores."""
    monkeypatch.setattr(workers_module, "shared_memory_free", lambda: free)
    loader = build_test_loader(_cfg(), shapes, num_workers=2)
    with pytest.raises(DataError, match=f"no shared memory to start 2 .*[(]{free >> 10} kB of /dev/shm are free"):
        next(iter(loader))
    assert list(build_test_loader(_cfg(), shapes, num_workers=0))
    monkeypatch.setattr(workers_module, "shared_memory_free", lambda: 4096 * 14)
    assert next(iter(loader))


def test_shared_memory_that_runs_out_is_named() -> None:
    error = RuntimeError("unable to write to file </torch_1_2_3>: No space left on device (28)")
    assert "pass a batch through shared memory: lower DATALOADER.NUM_WORKERS" in str(worker_failure(error))
    killed = RuntimeError("DataLoader worker (pid 1) is killed by signal: Bus error. It is possible that ...")
    assert "of /dev/shm are free" in str(worker_failure(killed)) or not Path("/dev/shm").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("workers", [0, 1])
def test_images_are_pinned_where_the_model_is_on_a_gpu(shapes: CocoDataset, workers: int) -> None:
    """Models copy them without waiting, which only page-locked memory allows."""
    torch.zeros(1, device="cuda")
    loader = build_train_loader(_cfg(), [shapes], images_per_rank=2, seed=0, num_workers=workers)
    samples = next(iter(loader))
    assert all(s["image"].is_pinned() for s in samples)
