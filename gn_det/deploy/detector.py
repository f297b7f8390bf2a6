"""Predict with an exported ONNX file, using onnxruntime, NumPy and Pillow without torch."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from gn_det.about import __version__
from gn_det.config.schema import KEYS
from gn_det.data.image import ImageReader
from gn_det.data.transforms import Resize, resized_shape
from gn_det.errors import ConfigError, DataError, UserError, WeightsError
from gn_det.files import StrPath, check_regular
from gn_det.prediction.predictor import Predictor
from gn_det.result import ImageModel, Result, checked_path
from gn_det.structures import ArrayDetections
from gn_det.text import did_you_mean, one_line, shown
from gn_det.values import InvalidValue, integer, items, number, one_of, record, table, text

logger = logging.getLogger(__name__)

#: Entry of the file's metadata that holds :class:`Metadata` as json.
NAME = "gn_det"
#: Stored config keys: how an image is read and resized, and which detections the graph returns.
STORED = (
    *("INPUT.FORMAT", "INPUT.MIN_SIZE_TEST", "INPUT.MAX_SIZE_TEST", "INPUT.BIT_DEPTH", "INPUT.MAX_PIXELS"),
    *("MODEL.ROI_HEADS.SCORE_THRESH_TEST", "MODEL.ROI_HEADS.NMS_THRESH_TEST", "TEST.DETECTIONS_PER_IMAGE"),
)
_MOST = 64 * 2**20
_ENTRIES = record(
    {
        "version": text(100),
        "class_names": items(text(1000), 1, 20_000),
        "category_ids": items(integer(-(2**63), 2**63 - 1), 1, 20_000),
        "divisor": integer(1, 1024),
        "masks": one_of("none", "box", "image"),
        "precision": one_of("fp32", "fp16"),
        "keys": table(text(100), lambda value, where: None, 100),
    },
    thresholds=items(number(0, 1), 0, 20_000),
)
#: Name of a provider -> its name in onnxruntime, and its package.
PROVIDERS = {
    "cpu": ("CPUExecutionProvider", "onnxruntime"),
    "cuda": ("CUDAExecutionProvider", "onnxruntime-gpu"),
    "tensorrt": ("TensorrtExecutionProvider", "onnxruntime-gpu"),
    "openvino": ("OpenVINOExecutionProvider", "onnxruntime-openvino"),
}
#: Providers on which the exported graphs have been run.
MEASURED = ("cpu", "openvino")
#: Smallest input height and width of a graph in pixels; smaller images are padded.
LEAST = 32
#: Largest input of a file in pixels; 32 times that of the paper's models.
_MOST_PIXELS = 2**25


@dataclass(frozen=True)
class Metadata:
    """How to feed a graph and read its outputs."""

    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    divisor: int  # height and width of the input are multiples of it
    masks: str  # "none"; "box": probabilities within the boxes; "image": pasted at the size of the input
    precision: str  # "fp32" or "fp16", of the weights
    keys: Mapping[str, Any] = field(default_factory=dict)  # values of STORED
    thresholds: tuple[float, ...] = ()  # lowest score of each class to keep; () where the checkpoint stores none
    version: str = __version__

    @property
    def image_format(self) -> str:
        """ "L" for a model of gray images, else "RGB", whatever the model's internal order."""
        return "L" if self.keys["INPUT.FORMAT"] == "L" else "RGB"

    def reader(self, image_format: str = "") -> ImageReader:
        """Return a reader of image files in the graph's format, or another one."""
        depth, pixels = self.keys["INPUT.BIT_DEPTH"], self.keys["INPUT.MAX_PIXELS"]
        return ImageReader(image_format or self.image_format, depth, pixels)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, content: str | None, source: StrPath) -> Metadata:
        """Invert :meth:`to_json`; raise WeightsError if the entry is missing (another tool's file) or invalid."""
        where = one_line(str(source), 400)
        if content is None:
            raise WeightsError(f"{where}: it has no gn_det metadata; give a file written by gn-det export --to onnx")
        try:
            if len(content) > _MOST:
                raise ValueError(f"its metadata has {len(content)} characters")
            values = json.loads(content)
            _ENTRIES(values, "")
            for key in STORED:
                KEYS[key].check(values["keys"].get(key), key)
            for name in ("category_ids", "thresholds"):
                if len(values.get(name, ())) not in (0, len(values["class_names"])):
                    raise InvalidValue(name, "has another length than class_names")
        except (ValueError, RecursionError) as error:
            problem = f"its gn_det metadata cannot be used ({one_line(error)})"
            raise WeightsError(f"{where}: {problem}; export it again") from None
        known = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        known |= {name: tuple(known.get(name, ())) for name in ("class_names", "category_ids", "thresholds")}
        return cls(**known)


class Detector(ImageModel):
    """An exported detector; its graph returns nothing below the ``MODEL.ROI_HEADS.SCORE_THRESH_TEST`` of its metadata.

    Attributes:
        metadata: the file's metadata.
        shape: batch, height and width of the input; None if dynamic.
    """

    def __init__(self, path: str | os.PathLike[str], *, provider: str = "cpu", threads: int = 0) -> None:
        """Load a file.

        Args:
            path: written by ``gn-det export --to onnx``.
            provider: what runs it: "cpu", "cuda", "tensorrt" or "openvino".
            threads: threads on a CPU; 0: one per core.

        Raises:
            WeightsError: the file is missing or damaged, or was not written by gn_det.
            ConfigError: onnxruntime or the provider is not installed.
        """
        self.path = checked_path(path, "path", "model.onnx")
        self._session = _session(self.path, provider, threads)
        self._describe(Metadata.from_json(self._session.get_modelmeta().custom_metadata_map.get(NAME), self.path))
        self.shape = self._checked_shape()

    def _describe(self, metadata: Metadata) -> None:
        """Set all that follows from the file's metadata."""
        self.metadata, self._reader, self._thresholds = metadata, metadata.reader(), metadata.thresholds
        self.class_names, self.category_ids = metadata.class_names, metadata.category_ids

    def run(self, image: np.ndarray, size: np.ndarray) -> dict[str, np.ndarray]:
        """Return the outputs of the graph by name, or raise UserError, such as for lack of memory.

        Args:
            image: (B, H, W, channels) uint8.
            size: (B, 2) int64, rows and columns of each image before padding.
        """
        names = [output.name for output in self._session.get_outputs()]
        try:
            return dict(zip(names, self._session.run(names, {"image": image, "size": size})))
        except Exception as error:  # onnxruntime's exceptions have no base of their own
            problem = f"onnxruntime failed on an input of {image.shape}: {one_line(error)}"
            raise UserError(f"{self.path}: {problem}") from error

    def prepare(self, pixels: np.ndarray, name: str = "image") -> tuple[np.ndarray, np.ndarray]:
        """Resize and pad an image (H, W, channels) uint8 to the graph's ``image`` and ``size``, or raise DataError."""
        keys, (height, width) = self.metadata.keys, pixels.shape[:2]
        if keys["INPUT.MIN_SIZE_TEST"]:
            shape = resized_shape(height, width, keys["INPUT.MIN_SIZE_TEST"], keys["INPUT.MAX_SIZE_TEST"])
            pixels = Resize(height, width, *shape).image(pixels)
        batch, *sides = self.shape
        divisor = self.metadata.divisor
        padded = [fixed or max(-(-side // divisor) * divisor, LEAST) for fixed, side in zip(sides, pixels.shape)]
        if any(side > most for side, most in zip(pixels.shape, padded)):
            raise DataError(
                f"{name}: resized to {pixels.shape[0]}x{pixels.shape[1]} (height x width) it does not fit the fixed "
                f"{padded[0]}x{padded[1]} of {self.path}; export without --size, or with a larger one"
            )
        image = np.zeros((batch or 1, *padded, pixels.shape[2]), dtype=np.uint8)
        image[:, : pixels.shape[0], : pixels.shape[1]] = pixels
        return image, np.array([pixels.shape[:2]] * len(image), dtype=np.int64)

    def detect(self, pixels: np.ndarray, name: str = "image") -> dict[str, Any]:
        """Detections of one image (H, W, channels) uint8, as the keywords ``boxes``, ``scores``, ``classes``, ``masks``
        and ``image_size`` of :class:`gn_det.Result`."""
        image, size = self.prepare(pixels, name)
        outputs = self.run(image, size)
        number = int(outputs.pop("counts")[0])
        (height, width), (rows, columns) = pixels.shape[:2], size[0].tolist()
        scale = np.array([width / columns, height / rows] * 2, np.float32)
        outputs["boxes"] = boxes = (outputs["boxes"] * scale).clip(0, np.array([width, height] * 2, np.float32))
        keep = np.flatnonzero((boxes[:number, 2:] > boxes[:number, :2]).all(axis=1))
        found: dict[str, Any] = {name: values[keep] for name, values in outputs.items()}
        if self.metadata.masks == "box":
            found["masks"] = paste_masks(found["masks"], found["boxes"], height, width)
        elif self.metadata.masks == "image":
            resize = Resize(rows, columns, height, width)
            masks = [resize.image(np.uint8(255) * mask) >= 128 for mask in found["masks"][:, :rows, :columns]]
            found["masks"] = np.array(masks, bool).reshape(-1, height, width)
        return {"masks": None, **found, "image_size": (height, width)}

    def _load(self, image: Path | np.ndarray) -> tuple[np.ndarray, str]:
        """Return the pixels for :meth:`detect` and a name for messages."""
        if isinstance(image, np.ndarray):
            return self._reader.from_array(image), "image"
        return self._reader.read(image), os.fspath(image)

    def _predict_one(
        self, source: Path | np.ndarray, lowest: float | Sequence[float], wanted: set[int] | None
    ) -> Result:
        found = self.detect(*self._load(source))
        limits = np.array(lowest, np.float32)
        keep = found["scores"] >= (limits[found["classes"]] if limits.ndim else limits)
        if wanted is not None:
            keep &= np.isin(found["classes"], sorted(wanted))
        read = self.metadata.reader("RGB").read
        names, ids = self.class_names, self.category_ids
        return Result(**found, class_names=names, category_ids=ids, _source=source, _read=read)[keep]

    def _checked_shape(self) -> tuple[int | None, int | None, int | None]:
        """Return batch, height and width of the input, None if dynamic; raise WeightsError for another graph."""
        inputs = {i.name: (i.type, len(i.shape)) for i in self._session.get_inputs()}
        outputs = {o.name for o in self._session.get_outputs()}
        wanted = {"boxes", "scores", "classes", "counts"} | ({"masks"} if self.metadata.masks != "none" else set())
        if inputs != {"image": ("tensor(uint8)", 4), "size": ("tensor(int64)", 2)} or outputs != wanted:
            raise WeightsError(
                f"{self.path}: its inputs {shown(sorted(inputs))} and outputs {shown(sorted(outputs))} are not those "
                "of a detector exported by gn-det; export it again"
            )
        batch, height, width = (d if isinstance(d, int) else None for d in self._session.get_inputs()[0].shape[:3])
        fixed = [side or 1 for side in (batch, height, width)]
        if min(fixed) < 1 or math.prod(fixed) > _MOST_PIXELS:
            raise WeightsError(
                f"{self.path}: its input of {batch} x {height} x {width} pixels is larger than {_MOST_PIXELS} pixels; "
                "export with a smaller --size"
            )
        return batch, height, width


def as_predictor(
    path: StrPath, device: str = "auto", *, max_pixels: int | None = None, bit_depth: str | None = None
) -> Predictor:
    """Load an ONNX file for ``gn-det predict``; see :class:`Detector` for the errors.

    Args:
        path: written by ``gn-det export --to onnx``.
        device: a provider; "auto" is the CPU.
        max_pixels: larger images are refused; None takes the limit in the file.
        bit_depth: as INPUT.BIT_DEPTH; None takes that of the file.
    """
    detector = Detector(path, provider="cpu" if device == "auto" else device)
    given: dict[str, Any] = {"max_pixels": max_pixels, "bit_depth": bit_depth}
    detector._reader = replace(detector._reader, **{name: v for name, v in given.items() if v is not None})
    return Predictor(
        detector._load,
        lambda sample: ArrayDetections(**detector.detect(*sample)),
        detector.class_names,
        detector.category_ids,
        replace(detector._reader, image_format="RGB"),
        thresholds=detector.metadata.thresholds,
        gray=detector.metadata.image_format == "L",
    )


def find_provider(provider: str) -> str:
    """Return onnxruntime's name of a provider; raise ConfigError if it, or onnxruntime, is not installed."""
    try:
        import onnxruntime
    except ImportError:
        raise ConfigError("ONNX files need onnxruntime; install it: pip install 'gn-det[export]'") from None
    if provider not in PROVIDERS:
        near = did_you_mean(provider, PROVIDERS)
        raise ConfigError(f"provider {shown(provider)}: use one of {', '.join(PROVIDERS)}{near}")
    name, distribution = PROVIDERS[provider]
    if name not in onnxruntime.get_available_providers():
        raise ConfigError(
            f"provider {provider} is not part of the installed onnxruntime {onnxruntime.__version__}; "
            f"pip install {distribution} instead, or use the provider cpu"
        )
    return name


def _session(path: str, provider: str, threads: int) -> Any:
    """Create an onnxruntime session; raise ConfigError without the provider, WeightsError for a bad file."""
    name = find_provider(provider)
    import onnxruntime

    onnxruntime.set_default_logger_severity(3)  # providers log outside of the session
    onnxruntime.disable_telemetry_events()  # some builds report usage; see its Privacy.md
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = threads
    try:
        check_regular(path)
        session = onnxruntime.InferenceSession(path, options, providers=[name])
    except Exception as error:  # onnxruntime's exceptions have no base of their own
        reason = error.strerror if isinstance(error, OSError) and error.strerror else one_line(error, 300)
        raise WeightsError(f"{one_line(path, 400)}: cannot be loaded ({reason}); export it again") from None
    if session.get_providers()[0] != name:  # onnxruntime falls back silently
        raise ConfigError(f"provider {provider} does not start on this machine; use the provider cpu")
    if provider not in MEASURED:
        logger.warning(
            "Provider %s: no exported graph has been run on it by gn_det's tests; check its results.", provider
        )
    return session


def paste_masks(masks: np.ndarray, boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """(N, S, S) probabilities within boxes (N, 4) to (N, height, width) bool; bilinear, as torch's grid_sample.

    Sampling is separable: a matrix of weights for the rows and one for the columns of the pixels around the box.
    """
    out = np.zeros((len(masks), height, width), dtype=bool)
    side = np.arange(masks.shape[-1], dtype=np.float32)

    def weights(low: np.float32, high: np.float32, pixels: range) -> np.ndarray:
        at = (np.arange(pixels.start, pixels.stop, dtype=np.float32) + np.float32(0.5) - low) / (high - low)
        hat: np.ndarray = 1 - np.abs((at * len(side) - np.float32(0.5))[:, None] - side)
        return hat.clip(min=0)

    for mask, box, pasted in zip(masks, boxes, out):
        x0, y0 = (max(int(v) - 1, 0) for v in np.floor(box[:2]))
        x1, y1 = (min(int(v) + 1, most) for v, most in zip(np.ceil(box[2:]), (width, height)))
        rows, columns = weights(box[1], box[3], range(y0, y1)), weights(box[0], box[2], range(x0, x1))
        np.greater_equal(rows @ mask @ columns.T, 0.5, out=pasted[y0:y1, x0:x1])
    return out
