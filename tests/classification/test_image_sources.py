"""Digits, shapes and folders: the same images whatever the workers, mistakes told with the file's name."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gn_det.classification import Settings, image_sources, pretrain
from gn_det.classification.image_sources import (
    ArraySource,
    FolderSource,
    Input,
    draw_set,
    epoch_batches,
    lighting,
    load_digits,
    load_shapes,
    scan_both,
    subset,
)
from gn_det.classification.pretraining import open_source
from gn_det.errors import ConfigError, DataError

NAMES = ("cat", "dog", "émeu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pictures of one color per class, of all sizes."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 6), ("val", 3)):
        for k, name in enumerate(NAMES):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                size = (int(rng.integers(40, 90)), int(rng.integers(40, 90)), 3)
                pixels = np.zeros(size, dtype=np.uint8)
                pixels[..., k] = 200 + i
                Image.fromarray(pixels).save(tmp_path / part / name / f"{i}.png")
    return tmp_path


def settings(folder: Path, **changes: Any) -> Settings:
    values: dict[str, Any] = {"arch": "resnet8", "norm": "LN", "batch_size": 4, "epochs": 1, "image_size": 32}
    values |= {"workers": 0, "device": "cpu", "lr": 0.01, "data": str(folder), "output": str(folder / "out")}
    return Settings(**{**values, **changes})


def train_images(given: Settings, epoch: int) -> tuple[torch.Tensor, torch.Tensor]:
    source = FolderSource(given)
    batches = list(source.train_batches(epoch, epoch_batches(given, epoch, source.train_images, 0, 1)))
    return torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])


def test_subset_has_equal_shares_of_the_classes_and_is_always_the_same(folder: Path) -> None:
    """12 of 18 images: 4 of each class, in the same order as all; no two sizes choose independently."""
    labels = np.repeat([0, 1, 2], 6)
    chosen = subset(labels, 12)
    assert np.bincount(labels[chosen]).tolist() == [4, 4, 4] and sorted(set(chosen)) == chosen.tolist()
    assert set(subset(labels, 6)) < set(chosen) and subset(labels, None).tolist() == list(range(18))
    source = FolderSource(settings(folder, images=12))
    assert (source.train_images, source.val_images) == (12, 9)
    entries = scan_both(settings(folder, images=12, seed=5))[1]
    assert entries == [scan_both(settings(folder))[1][k] for k in chosen]
    (folder / "train" / "cat" / "0.png").write_bytes(b"damaged")  # it is not read before the number is refused
    for augment in ("crop", "shift"):
        with pytest.raises(ConfigError, match=r"images is 19, but .* has 18 training images"):
            open_source(settings(folder, images=19, augment=augment))


def test_small_images_are_kept_in_memory_shifted_and_flipped(folder: Path) -> None:
    """Class k is the color channel k of RGB; edges are repeated, so a constant image stays one."""
    given = settings(folder, augment="shift", image_size=16)
    source = open_source(given)
    assert isinstance(source, ArraySource) and source.class_names == NAMES
    batches = epoch_batches(given, 0, source.train_images, 0, 1)
    for images, labels in (*source.train_batches(0, batches), *source.val_batches(range(9), 9)):
        assert images.shape[1:] == (3, 16, 16)
        for image, label in zip(images, labels.tolist()):
            values = image.flatten(1).unique(dim=1)
            assert values.shape == (3, 1) and values[2 - label] >= 200 and values.count_nonzero() == 1
    with pytest.raises(ConfigError, match="augment is 'shift', but data shapes has its own"):
        settings(folder, data="shapes", augment="shift")


def test_more_small_images_than_fit_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_sources, "_MOST_BYTES", 10_000)
    with pytest.raises(DataError, match=r"augment shift takes .* lower images or image_size, or use augment crop"):
        open_source(settings(folder, augment="shift"))


def test_folder_gives_bgr_pixels_and_sorted_classes(folder: Path) -> None:
    """Class k is the color channel k of RGB, hence channel 2 - k here; nothing is scaled or clipped in validation."""
    source = FolderSource(settings(folder))
    assert source.class_names == NAMES and (source.train_images, source.val_images) == (18, 9)
    (pixels, labels), *rest = source.val_batches(range(9), 64)
    assert not rest and pixels.shape == (9, 3, 32, 32) and pixels.dtype == torch.uint8
    for image, label, i in zip(pixels, labels, [0, 1, 2] * 3):
        assert torch.all(image[2 - label] == 200 + i) and int(image.sum()) == (200 + i) * 32 * 32
    assert source.input == Input("BGR", (103.53, 116.28, 123.675), (1.0, 1.0, 1.0))


def test_validation_is_the_centre_crop_of_a_larger_side(tmp_path: Path) -> None:
    """224 of a shorter side of 256: at side 28 a picture of 32 x 64 is cut by 2 above and 18 at the left."""
    pixels = np.zeros((32, 64, 3), dtype=np.uint8)
    pixels[..., 0] = np.arange(64)
    pixels[..., 1] = np.arange(32)[:, None]
    for part in ("train", "val"):
        for name in "ab":
            (tmp_path / part / name).mkdir(parents=True)
            Image.fromarray(pixels).save(tmp_path / part / name / "x.png")
    found, _ = next(iter(FolderSource(settings(tmp_path, image_size=28)).val_batches([0], 1)))
    assert found[0, 2, 0].tolist() == list(range(18, 46)) and found[0, 1, :, 0].tolist() == list(range(2, 30))


def test_augmentation_depends_on_seed_epoch_and_image_alone(folder: Path) -> None:
    given = settings(folder)
    torch.manual_seed(1)
    first, labels = train_images(given, 0)
    torch.manual_seed(2)
    again, _ = train_images(replace(given, workers=2), 0)
    assert first.dtype == torch.float32 and torch.equal(first, again)
    other, other_labels = train_images(given, 1)
    assert not torch.equal(labels, other_labels) or not torch.equal(first, other)
    assert not torch.equal(first, train_images(replace(given, seed=2), 0)[0])
    plain, _ = train_images(replace(given, color=False), 0)
    assert plain.dtype == torch.uint8 and plain.shape == first.shape


def test_lighting_adds_one_color_along_imagenets_axes() -> None:
    """Its covariance over draws is (0.1 x 255)^2 V diag(values^2) V^T, here within 5 %; in BGR order."""
    torch.manual_seed(0)
    zero = torch.zeros(3, 1, 1, dtype=torch.uint8)
    draws = torch.stack([lighting(zero).flatten() for _ in range(20000)])
    vectors = torch.tensor([[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]])
    values = torch.tensor([0.2175, 0.0188, 0.0045])
    expected = (25.5**2 * vectors @ torch.diag(values**2) @ vectors.T).flip(0, 1)
    torch.testing.assert_close(draws.T.cov(), expected, rtol=0.05, atol=0.1)


def broken_folders() -> list[Any]:
    def no_val(root: Path) -> None:
        for file in (root / "val").rglob("*.png"):
            file.unlink()
        for place in sorted((root / "val").rglob("*"), reverse=True):
            place.rmdir()
        (root / "val").rmdir()

    def extra_class(root: Path) -> None:
        (root / "train" / "zebra").mkdir()
        Image.new("RGB", (9, 9)).save(root / "train" / "zebra" / "z.png")

    def empty_class(root: Path) -> None:
        for file in (root / "val" / "dog").glob("*"):
            file.unlink()
        (root / "val" / "dog" / "notes.txt").write_text("no image")

    return [
        pytest.param(no_val, r"val: no such folder; data must hold train/<class>", id="no-val"),
        pytest.param(extra_class, r"class 'zebra' is only in train/ \(1 such", id="extra-class"),
        pytest.param(empty_class, r"dog: class folder without images", id="empty-class"),
    ]


@pytest.mark.parametrize("spoil, told", broken_folders())
def test_bad_folders(folder: Path, spoil: Any, told: str) -> None:
    spoil(folder)
    with pytest.raises(DataError, match=told) as caught:
        pretrain(settings(folder))
    assert "\n" not in str(caught.value)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"classify data '.*nowhere': no such folder; .* or shapes or cifar10"):
        pretrain(settings(tmp_path / "nowhere", output=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_image_is_named(folder: Path, workers: int) -> None:
    damaged = folder / "train" / "dog" / "3.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    with pytest.raises(DataError) as caught:
        pretrain(settings(folder, batch_size=18, workers=workers))
    assert str(caught.value).startswith(str(damaged)) and "\n" not in str(caught.value)


def test_trains_on_a_folder(folder: Path) -> None:
    """Three colors are told apart within a few iterations."""
    summary = pretrain(settings(folder, epochs=8, lr=0.02, color=False))
    assert summary["top1_error"] == 0.0


def test_digits_are_scikit_learns() -> None:
    datasets = pytest.importorskip("sklearn.datasets", reason="the images of digits come with scikit-learn")
    given = Settings(arch="resnet8", norm="BN", data="digits", output="x", image_size=8)
    source = load_digits(given)
    assert (source.train_images, source.val_images) == (901, 896) and len(source.class_names) == 10
    raw = datasets.load_digits()
    pixels, labels = next(iter(source.val_batches(range(896), 896)))
    assert pixels.shape == (896, 1, 8, 8)
    counts = torch.bincount(labels).tolist()
    assert counts == [int((raw.target == c).sum()) // 2 for c in range(10)]
    theirs = {
        (image.tobytes(), int(c)) for image, c in zip(np.round(raw.images * 255 / 16).astype(np.uint8), raw.target)
    }
    assert all((p[0].numpy().tobytes(), int(c)) in theirs for p, c in zip(pixels, labels))


def test_digits_without_scikit_learn_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "sklearn", None)
    with pytest.raises(ConfigError, match="pip install scikit-learn"):
        load_digits(Settings(arch="resnet8", norm="BN", data="digits", output="x"))


def test_array_source_shifts_and_flips() -> None:
    """Every crop is the picture moved by at most ``shift`` with repeated edges, or that mirrored; all moves occur."""
    picture = np.arange(16, dtype=np.uint8).reshape(1, 1, 4, 4)
    images, labels = np.repeat(picture, 300, axis=0), np.zeros(300, dtype=np.int64)
    data = (images, labels)
    source = ArraySource("a", data, data, Input("L", (0.0,), (1.0,)), shift=1, seed=0)
    found, _ = next(iter(source.train_batches(0, [np.arange(300)])))
    padded = np.pad(picture[0, 0], 1, mode="edge")
    moved = [padded[y : y + 4, x : x + 4] for y in range(3) for x in range(3)]
    allowed = {m.tobytes() for m in moved} | {np.ascontiguousarray(m[:, ::-1]).tobytes() for m in moved}
    assert {f.numpy().tobytes() for f in found[:, 0]} == allowed
    assert torch.equal(next(iter(source.val_batches([5], 1)))[0][0], torch.from_numpy(picture[0]))


def test_shapes_are_the_same_everywhere_and_balanced() -> None:
    images, labels = draw_set("train", 10, 32)
    draw_set.cache_clear()
    again, _ = draw_set("train", 10, 32)
    more, _ = draw_set("train", 12, 32)
    val, _ = draw_set("val", 10, 32)
    assert np.array_equal(images, again) and np.array_equal(images, more[:10])
    assert not any(np.array_equal(a, b) for a in val for b in images)
    assert labels.tolist() == [0, 1, 2, 3, 4] * 2 and images.shape == (10, 3, 32, 32)
    source = load_shapes(Settings(arch="resnet18", norm="GN", data="shapes", output="x", images=50, image_size=32))
    assert (source.train_images, source.val_images) == (50, 10)


def test_ranks_share_every_batch_and_every_epoch_has_an_order_of_its_own() -> None:
    """30 images, 2 processes with 4 each: three whole batches, no image twice; the same again from the same seed."""
    settings = Settings(arch="resnet8", norm="BN", data="digits", output="o", batch_size=4)
    ranks = [epoch_batches(settings, 0, 30, rank, 2) for rank in (0, 1)]
    assert [[len(batch) for batch in batches] for batches in ranks] == [[4, 4, 4]] * 2
    numbers = [int(n) for batches in ranks for batch in batches for n in batch]
    assert len(set(numbers)) == 24 and set(numbers) <= set(range(30))
    first, again, second = (np.concatenate(epoch_batches(settings, epoch, 30, 0, 1)).tolist() for epoch in (0, 0, 1))
    assert first == again != second


def test_an_array_without_shift_and_flip_is_not_augmented() -> None:
    """Digits: a mirrored 2 is no digit."""
    images = np.random.RandomState(0).randint(0, 256, (12, 1, 4, 4)).astype(np.uint8)
    labels = np.arange(12)
    given = (images, labels)
    source = ArraySource(["a"] * 12, given, given, Input("L", (0.0,), (1.0,)), seed=1)
    (made,) = source.train_batches(0, [labels])
    assert np.array_equal(made[0].numpy(), images) and made[1].tolist() == labels.tolist()


def cifar(folder: Path, monkeypatch: pytest.MonkeyPatch, images: int = 6) -> np.ndarray:
    """A small set in the layout of CIFAR-10's python version; returns its training pixels."""
    import hashlib
    import pickle

    from torchvision.datasets import CIFAR10

    base = folder / CIFAR10.base_folder
    base.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (images, 3072), dtype=np.uint8)
    sums = []
    for name, content in (
        ("data_batch_1", {"data": pixels, "labels": [k % 2 for k in range(images)]}),
        ("test_batch", {"data": pixels[:2], "labels": [1, 0]}),
        ("batches.meta", {"label_names": ["cat", "dog"]}),
    ):
        (base / name).write_bytes(pickle.dumps(content))
        sums.append((name, hashlib.md5((base / name).read_bytes()).hexdigest()))
    monkeypatch.setattr(CIFAR10, "train_list", [list(sums[0])])
    monkeypatch.setattr(CIFAR10, "test_list", [list(sums[1])])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": sums[2][0], "key": "label_names", "md5": sums[2][1]})
    return pixels.reshape(-1, 3, 32, 32)


def test_cifar10_in_its_own_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Classes, BGR pixels and labels; a damaged file is one line."""
    pixels = cifar(tmp_path, monkeypatch)
    settings = Settings(arch="resnet20", norm="BN", data=f"cifar10:{tmp_path}", output="o", batch_size=2)
    source = open_source(settings)
    assert source.class_names == ("cat", "dog") and (source.train_images, source.val_images) == (6, 2)
    (found, labels) = next(iter(source.val_batches([0, 1], 2)))
    assert np.array_equal(found.numpy(), pixels[:2, ::-1]) and labels.tolist() == [1, 0]
    (batch, labels) = next(iter(source.train_batches(0, [np.array([3, 4])])))
    assert batch.shape == (2, 3, 32, 32) and labels.tolist() == [1, 0]
    file = next(tmp_path.rglob("data_batch_1"))
    file.write_bytes(file.read_bytes()[:-9])
    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", _no_network)
    with pytest.raises(DataError, match=r"cifar10:.* is not in .*no network\); give .* \./cifar10") as told:
        open_source(settings)
    assert "\n" not in str(told.value)


def _no_network(*args: object, **kwargs: object) -> None:
    raise OSError("no network")
