"""Clips made of pictures by motions of the camera, where the class is the motion: videos that need no download.

No frame alone tells the class, so a network must use time to learn it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F
from torchvision.datasets import CIFAR10

from gn_det.classification.clip_sources import ClipSource
from gn_det.classification.image_sources import draw_set
from gn_det.classification.settings import NUM_SHAPES, Settings
from gn_det.data.image import ImageError, ImageReader
from gn_det.data.inputs import collect_images
from gn_det.errors import DataError

#: Class -> (shift to the right, shift downwards, log of the zoom, turn in radians) of the camera over a whole video.
MOTIONS = {
    "left": (-1.0, 0.0, 0.0, 0.0),
    "right": (1.0, 0.0, 0.0, 0.0),
    "up": (0.0, -1.0, 0.0, 0.0),
    "down": (0.0, 1.0, 0.0, 0.0),
    "zoom in": (0.0, 0.0, -1.0, 0.0),
    "zoom out": (0.0, 0.0, 1.0, 0.0),
    "clockwise": (0.0, 0.0, 0.0, 3.0),
    "counterclockwise": (0.0, 0.0, 0.0, -3.0),
}
#: Frames of a video, the side to which pictures are brought, and how many of a folder are taken, evenly spread.
FRAMES, _SIDE, _MOST = 64, 96, 1000
_SET_SEED = 20180908


class MotionVideo:
    """A picture as a camera sees it that makes a motion; see :class:`clip_sources.Video`.

    Picture, speed, place, zoom and angle are drawn from the name; the camera sees about half of the picture.

    Args:
        pictures: (N, 3, S, S) of each part.
        name: "PART:NUMBER"; the number decides the motion, too.
    """

    frames = FRAMES

    def __init__(self, pictures: dict[str, torch.Tensor], name: str) -> None:
        part, number = name.split(":")
        rng = np.random.default_rng([_SET_SEED, len(part), int(number)])
        self._picture = pictures[part][int(rng.integers(len(pictures[part])))]
        motion = list(MOTIONS.values())[int(number) % len(MOTIONS)]
        self._motion = np.array(motion) * rng.uniform(0.4, 0.8)
        # In the middle of the video: place in halves of the picture, log of the zoom, angle.
        self._middle = np.array([*rng.uniform(-0.2, 0.2, 2), np.log(rng.uniform(0.4, 0.6)), rng.uniform(-np.pi, np.pi)])

    def read(self, numbers: Sequence[int], side: int) -> np.ndarray:
        times = (np.array(numbers) % FRAMES) / (FRAMES - 1) - 0.5
        right, down, zoom, turn = times * self._motion[:, None]
        x, y, middle_zoom, angle = self._middle
        # left and right are those of the camera, whatever its angle
        x, y = x + right * np.cos(angle) - down * np.sin(angle), y + right * np.sin(angle) + down * np.cos(angle)
        scale = np.exp(middle_zoom + zoom)
        cos, sin = scale * np.cos(angle + turn), scale * np.sin(angle + turn)
        theta = np.stack([cos, -sin, x, sin, cos, y], axis=1).reshape(-1, 2, 3)
        grid = F.affine_grid(torch.from_numpy(theta).float(), [len(theta), 3, side, side], align_corners=False)
        pictures = self._picture.float().expand(len(theta), -1, -1, -1)
        seen = F.grid_sample(pictures, grid, padding_mode="reflection", align_corners=False)
        return np.asarray(seen.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1))


def load_motions(settings: Settings) -> ClipSource:
    """``settings.images`` training clips and a fifth as many for validation, the classes in turn.

    The pictures are those of the folder of "motions:FOLDER", every fifth of them for validation, or CIFAR-10's where
    the folder holds it in torchvision's layout; without a folder generated shapes. Each clip is a function of (part,
    number) and the pictures. Raises DataError for a folder without usable pictures.
    """
    total = settings.images or NUM_SHAPES
    pictures = dict(zip(("train", "val"), _pictures(settings)))
    sizes = {"train": total, "val": max(total // 5, len(MOTIONS))}
    train, val = ([(f"{part}:{k}", k % len(MOTIONS)) for k in range(sizes[part])] for part in pictures)
    return ClipSource(list(MOTIONS), train, val, settings, open_video=partial(MotionVideo, pictures), flip=False)


def _pictures(settings: Settings) -> tuple[torch.Tensor, torch.Tensor]:
    """Training and validation pictures (N, 3, S, S) uint8 RGB."""
    folder = settings.data.partition(":")[2]
    if not folder:
        drawn = [draw_set(part, size, _SIDE)[0] for part, size in (("train", 200), ("val", 40))]
        train, val = (torch.from_numpy(np.ascontiguousarray(bgr[:, ::-1])) for bgr in drawn)
        return train, val
    if (Path(folder).expanduser() / "cifar-10-batches-py").is_dir():
        parts = [CIFAR10(Path(folder).expanduser(), train=train).data[:_MOST] for train in (True, False)]
        train, val = (torch.from_numpy(part).permute(0, 3, 1, 2) for part in parts)
        return train, val
    files, _ = collect_images([folder])
    made = []
    for file in files[:: -(-len(files) // _MOST)]:
        try:
            image = Image.fromarray(ImageReader("RGB").read(str(file)))
        except ImageError as error:
            raise DataError(f"{error} (repair or remove it)") from None
        edge = min(image.size)
        square = image.crop((0, 0, edge, edge)).resize((_SIDE, _SIDE), Image.Resampling.BILINEAR)
        made.append(torch.from_numpy(np.array(square)).permute(2, 0, 1))
    if len(made) < 5:
        raise DataError(f"{folder}: holds {len(made)} pictures; motions need at least 5")
    return torch.stack([p for k, p in enumerate(made) if k % 5]), torch.stack(made[::5])
