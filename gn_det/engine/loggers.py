"""Where metrics are written: metrics.json always, and the loggers of ``--logger``."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from typing import Any, Protocol

from gn_det.errors import TrainingError
from gn_det.files import open_append
from gn_det.text import one_line


class Logger(Protocol):
    """Receives scalars now and then.

    Attributes:
        written: last iteration that it has; set by the caller.
    """

    written: int

    def write(self, iteration: int, scalars: Mapping[str, float]) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class JsonWriter:
    """One JSON object a line, appended. A value that is not a finite number is written as ``null`` (valid JSON).

    What lies up to iteration ``written`` is in the file already.
    """

    def __init__(self, path: str, written: int = -1) -> None:
        try:
            self._file = open_append(os.path.dirname(path) or ".", os.path.basename(path))
        except OSError as error:
            raise TrainingError(
                f"{path}: cannot be appended to ({one_line(error.strerror or error)}); move it away"
            ) from None
        self.written = written

    def write(self, iteration: int, scalars: Mapping[str, float]) -> None:
        record = {k: (v if math.isfinite(v) else None) for k, v in scalars.items()}
        self._file.write(json.dumps({**record, "iteration": iteration}, sort_keys=True, ensure_ascii=False) + "\n")

    def flush(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class TensorBoardWriter:
    """TensorBoard scalars under the same names; the event file is made at the first write."""

    def __init__(self, folder: str, written: int = -1) -> None:
        self._folder = folder
        self.written = written
        self._purge = None if written < 0 else written + 1  # what a killed run drew beyond it is hidden
        self._writer: Any = None

    def write(self, iteration: int, scalars: Mapping[str, float]) -> None:
        if any("\ud800" <= character <= "\udfff" for character in self._folder):
            return  # TensorBoard cannot name a folder that is not UTF-8; metrics.json has the same numbers
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(log_dir=self._folder, purge_step=self._purge)
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, iteration)

    def flush(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
