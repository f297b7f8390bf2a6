"""Where the runs of a comparison lie, and what is known of each: ``runs/<row>/seed-<n>-<key>/run.json``.

The folder's name holds the key of the run, so that a change of settings, weights or code begins a new folder and
nothing that was measured is overwritten.
"""

from __future__ import annotations

import json
import math
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime
from pathlib import Path
from typing import Any

from gn_det.files import atomic_write, json_bytes

RUNNING, DONE, FAILED, INTERRUPTED = "running", "done", "failed", "interrupted"
RECORD = "run.json"


@dataclass
class Record:
    """What is known of one run.

    Attributes:
        row, seed: of which.
        key: hash of settings and code; names the folder.
        settings_key: hash of the settings, data and weights alone.
        version: of gn_det's code, see :mod:`gn_det.compare.version`.
        status: "running" (also: killed), "done", "failed" or "interrupted".
        reason: why it failed, in one line.
        sessions: one entry for each start: host, device, day.
        software: versions of torch and of the engine.
        metrics: column -> percent; None where an evaluation gives no number.
        cost: column -> number, or None where it could not be measured.
        size: column -> number, of the model.
        curve: points of the course of training.
        weights: final weights, relative to the record.
        weights_sha: their sha256.
        config: resolved config or settings, as text.
    """

    row: str
    seed: int
    key: str
    settings_key: str
    version: str
    status: str = RUNNING
    reason: str = ""
    sessions: list[dict[str, Any]] = field(default_factory=list)
    software: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float | None] = field(default_factory=dict)
    cost: dict[str, float | None] = field(default_factory=dict)
    size: dict[str, float | None] = field(default_factory=dict)
    curve: list[dict[str, float]] = field(default_factory=list)
    weights: str = ""
    weights_sha: str = ""
    config: str = ""


class Store:
    """The folder of a comparison."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)

    def folder(self, row: str, seed: int, key: str) -> Path:
        """Of one run; ``*`` of an id is no letter for a file name."""
        return self.root / "runs" / row.replace("*", "_star") / f"seed-{seed}-{key[:8]}"

    def folder_of(self, record: Record) -> Path:
        return self.folder(record.row, record.seed, record.key)

    def read(self, row: str, seed: int) -> list[Record]:
        """All records of a row and seed, newest last; an unreadable one counts as absent."""
        found = []
        for path in self.folder(row, seed, "").parent.glob(f"seed-{seed}-*/{RECORD}"):
            try:
                content = json.loads(path.read_text(encoding="utf-8"))
                names = {f.name for f in fields(Record)}
                record = Record(**{k: v for k, v in content.items() if k in names})
            except (OSError, ValueError, TypeError):
                continue
            if (record.row, record.seed) == (row, seed) and self.folder_of(record) == path.parent:
                found.append((_last_start(record), path.parent.name, record))
        return [entry[-1] for entry in sorted(found, key=lambda entry: entry[:2])]

    def write(self, record: Record) -> None:
        """Atomically.

        Raises:
            WriteError: the folder cannot be written.
        """
        write_json(self.folder_of(record) / RECORD, asdict(record))


def _last_start(record: Record) -> str:
    return str(record.sessions[-1].get("started", "")) if record.sessions else ""


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Readable json, atomically; numbers that are not finite become null."""
    atomic_write(path, json_bytes(finite(content), indent=1, allow_nan=False) + b"\n")


def finite(value: Any) -> Any:
    """The same with null for numbers that json does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    return value


def new_session(device: str) -> dict[str, Any]:
    """Machine and day of a start; costs are compared within one of both only."""
    now = datetime.now().astimezone()
    load = round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None
    return {
        "host": platform.node(),
        "device": device,
        "day": now.date().isoformat(),
        "started": now.isoformat(timespec="seconds"),
        "load": load,
    }
