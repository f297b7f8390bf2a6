"""Generated classification images: one object of the ``shapes`` set on its kind of background."""

from __future__ import annotations

import functools
import logging
import time

import numpy as np

from gn_det.checkpoint.source import CAFFE
from gn_det.classification.image_sources import ArraySource, Input
from gn_det.classification.settings import NUM_SHAPES, Settings
from gn_det.data.shapes_draw import CLASSES, draw_single

#: Part of the training images that is generated again, differently, for validation.
_VAL_PART = 5
#: Of the set itself: the run's seed changes what is done with the images, not the images.
_SET_SEED = 20180322

logger = logging.getLogger(__name__)


def load_shapes(settings: Settings) -> ArraySource:
    """``settings.images`` training pictures (3000) and a fifth of that for validation, BGR, of ``settings.side``.

    Every picture is a function of (part, number, side). Drawing takes milliseconds a picture.
    """
    count, side = settings.images or NUM_SHAPES, settings.side
    train, val = draw_set("train", count, side), draw_set("val", max(count // _VAL_PART, len(CLASSES)), side)
    assert CAFFE.pixel_mean is not None and CAFFE.pixel_std is not None
    given = Input("BGR", CAFFE.pixel_mean, CAFFE.pixel_std)
    return ArraySource(CLASSES, train, val, given, shift=side // 8, flip=True, seed=settings.seed)


@functools.lru_cache(maxsize=4)
def draw_set(part: str, count: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """(count, 3, side, side) uint8 BGR and class indices; the classes take turns."""
    started = time.perf_counter()
    labels = np.arange(count) % len(CLASSES)
    images = np.empty((count, 3, side, side), dtype=np.uint8)
    part_number = 0 if part == "train" else 1
    for k in range(count):
        rng = np.random.default_rng([_SET_SEED, part_number, side, k])
        images[k] = draw_single(rng, int(labels[k]), side)[:, :, ::-1].transpose(2, 0, 1)
    logger.info("Drew %d %s pictures of %d px in %.1f s.", count, part, side, time.perf_counter() - started)
    return images, labels
