"""Metadata of an exported file: the json entry ``gn_det`` in an ONNX file's metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from gn_det.about import __version__
from gn_det.config.schema import KEYS
from gn_det.data.image import ImageReader
from gn_det.errors import WeightsError
from gn_det.files import StrPath
from gn_det.text import one_line
from gn_det.values import InvalidValue, integer, items, number, one_of, record, table, text

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
            if len(values["class_names"]) != len(values["category_ids"]):
                raise InvalidValue("category_ids", "has another length than class_names")
            if len(values.get("thresholds", ())) not in (0, len(values["class_names"])):
                raise InvalidValue("thresholds", "has another length than class_names")
        except (ValueError, RecursionError) as error:
            problem = f"its gn_det metadata cannot be used ({one_line(error)})"
            raise WeightsError(f"{where}: {problem}; export it again") from None
        known = {name: values[name] for name in cls.__dataclass_fields__ if name in values}
        known |= {name: tuple(known.get(name, ())) for name in ("class_names", "category_ids", "thresholds")}
        return cls(**known)
