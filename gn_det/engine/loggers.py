"""Loggers for the scalars of a run: always metrics.json, and those named in ``LOGGERS``."""

from __future__ import annotations

import csv
import importlib.util
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from fvcore.common.config import CfgNode
from PIL import Image

from gn_det.engine.log import open_log
from gn_det.engine.output import METRICS, trim_lines, trim_metrics
from gn_det.errors import ConfigError, TrainingError
from gn_det.files import atomic_write
from gn_det.text import one_line


class Logger:
    """Interface of a logger of scalars and pictures.

    Attributes:
        written: last iteration written; set by the caller.
    """

    def __init__(self, written: int = -1) -> None:
        self.written = written

    def write(self, iteration: int, scalars: Mapping[str, float]) -> None:
        """Write the scalars of an iteration."""
        raise NotImplementedError

    def picture(self, name: str, path: Path, iteration: int | None = None) -> None:
        """Keep a PNG or JPEG file under ``name``: of an iteration, or of the whole run. Most loggers take none."""

    def flush(self) -> None:
        """Flush buffered output."""

    def close(self) -> None:
        """Release resources; nothing is written afterwards."""


class _TextLogger(Logger):
    """Lines appended to a file."""

    def __init__(self, path: str | os.PathLike[str], written: int = -1) -> None:
        super().__init__(written)
        self._file = open_log(path)

    def flush(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class JsonLogger(_TextLogger):
    """Writes one JSON object per line, with ``null`` for values that are not finite."""

    def write(self, iteration: int, scalars: Mapping[str, float]) -> None:
        record = {k: (v if math.isfinite(v) else None) for k, v in scalars.items()}
        self._file.write(json.dumps({**record, "iteration": iteration}, sort_keys=True, ensure_ascii=False) + "\n")


class CsvLogger(_TextLogger):
    """Writes ``metrics.csv`` with columns iteration, name, value, because not every iteration has every scalar."""

    def __init__(self, folder: Path, written: int = -1) -> None:
        path = folder / "metrics.csv"
        trim_lines(path, lambda line: line.startswith("iteration,") or int(line.partition(",")[0]) <= written)
        super().__init__(path, written)
        self._csv = csv.writer(self._file, lineterminator="\n")
        if not path.stat().st_size:
            self._csv.writerow(("iteration", "name", "value"))

    def write(self, iteration: int, scalars: Mapping[str, float]) -> None:
        self._csv.writerows((iteration, name, value) for name, value in scalars.items())


class TensorBoardLogger(Logger):
    """Writes TensorBoard scalars to an event file that the first write creates.

    There is none if the folder's name is not UTF-8, which TensorBoard does not support.
    """

    _writer: Any = None

    def __init__(self, folder: str | os.PathLike[str], written: int = -1) -> None:
        super().__init__(written)
        self._folder = os.fspath(folder)
        self._purge = None if written < 0 else written + 1  # hides what a killed run wrote beyond it

    def _open(self) -> Any:
        if self._writer is None and os.fsencode(self._folder).decode(errors="ignore") == self._folder:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(log_dir=self._folder, purge_step=self._purge)
        return self._writer

    def write(self, iteration: int, scalars: Mapping[str, float]) -> None:
        writer = self._open()
        for name, value in scalars.items() if writer is not None else ():
            writer.add_scalar(name, value, iteration)

    def picture(self, name: str, path: Path, iteration: int | None = None) -> None:
        writer = self._open()
        if writer is not None:
            writer.add_image(name, np.asarray(Image.open(path).convert("RGB")), iteration, dataformats="HWC")

    def flush(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


class WandbLogger(Logger):
    """Weights & Biases; its own environment variables apply (WANDB_PROJECT, WANDB_MODE=offline ...).

    A resumed run continues the one whose id is in ``wandb_run`` of the folder.
    """

    def __init__(self, folder: Path, written: int = -1) -> None:
        import wandb

        super().__init__(written)
        known, project = _read_id(folder / "wandb_run", written), os.environ.get("WANDB_PROJECT", "gn_det")
        self._run: Any = wandb.init(project=project, name=folder.name, dir=os.fspath(folder), id=known, resume="allow")
        atomic_write(folder / "wandb_run", str(self._run.id))

    def write(self, iteration: int, scalars: Mapping[str, float]) -> None:
        self._run.log(dict(scalars), step=iteration)

    def picture(self, name: str, path: Path, iteration: int | None = None) -> None:
        import wandb

        self._run.log({name: wandb.Image(os.fspath(path))}, step=iteration)

    def close(self) -> None:
        self._run.finish()


class MlflowLogger(Logger):
    """MLflow; MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME apply; by default it writes ``mlruns`` in the folder.

    A resumed run continues the one whose id is in ``mlflow_run`` of the folder.
    """

    def __init__(self, folder: Path, written: int = -1) -> None:
        from mlflow import MlflowClient

        super().__init__(written)
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if not uri:
            uri = (folder / "mlruns").resolve().as_uri()
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        self._client: Any = MlflowClient(tracking_uri=uri)
        known = _read_id(folder / "mlflow_run", written)
        if known is None:
            name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "gn_det")
            found = self._client.get_experiment_by_name(name)
            experiment = found.experiment_id if found else self._client.create_experiment(name)
            known = str(self._client.create_run(experiment, run_name=folder.name).info.run_id)
            atomic_write(folder / "mlflow_run", known)
        self._id = known

    def write(self, iteration: int, scalars: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._client.log_metric(self._id, re.sub(r"[^\w\-. /]", "_", name), value, step=iteration)

    def picture(self, name: str, path: Path, iteration: int | None = None) -> None:
        self._client.log_artifact(self._id, os.fspath(path), None if iteration is None else name)

    def close(self) -> None:
        self._client.set_terminated(self._id)


def _read_id(path: Path, written: int) -> str | None:
    """Return the id of the logger's run to continue."""
    if written < 0 or not path.is_file():
        return None
    return path.read_text(encoding="utf-8").strip()[:200] or None


#: Name in ``LOGGERS``, also of the Python module that it needs: the logger, called with folder and last iteration.
LOGGERS: dict[str, Callable[[Path, int], Logger]] = {
    "tensorboard": TensorBoardLogger,
    "wandb": WandbLogger,
    "mlflow": MlflowLogger,
    "csv": CsvLogger,
}


def send_pictures(cfg: CfgNode, paths: Sequence[Path]) -> None:
    """Upload PNGs of a finished run to the W&B and MLflow of ``LOGGERS``; raise TrainingError if an upload fails."""
    for name in cfg.LOGGERS if paths else ():
        if name in ("wandb", "mlflow"):
            try:
                logger = LOGGERS[name](Path(cfg.OUTPUT_DIR), 0)
                for path in paths:
                    logger.picture(path.stem, path)
                logger.close()
            except Exception as error:  # of any kind: no account, no network ...
                raise TrainingError(f"{name}: cannot upload the pictures ({one_line(error, 300)})") from error


def check_loggers(cfg: CfgNode) -> None:
    """Raise ConfigError with the pip command if the package of a logger is not installed."""
    for name in cfg.LOGGERS:
        if importlib.util.find_spec(name) is None:
            problem = f"LOGGERS (--logger) names {name}, which is not installed"
            raise ConfigError(f"{problem}: pip install {name}, or leave it out")


def open_loggers(cfg: CfgNode, iteration: int, written: int | None) -> list[Logger]:
    """Open the loggers of rank 0, to continue after ``written``, or ``iteration`` if unknown."""
    folder = Path(cfg.OUTPUT_DIR)
    if iteration >= 0:
        trim_metrics(folder, iteration, written)
    # the last evaluation of a finished run is logged one iteration later
    start = min(written if written is not None else iteration, iteration)
    out: list[Logger] = [JsonLogger(folder / METRICS, start)]
    for name in cfg.LOGGERS:
        try:
            out.append(LOGGERS[name](folder, start))
        except Exception as error:  # of any kind: no account, no network ...
            reason = one_line(error, 300)
            raise TrainingError(f"LOGGERS (--logger): {name} cannot be started ({reason}); leave it out") from error
    return out
