"""Repeat the step that a non-finite loss ended: ``python -m gn_det.engine.replay OUTPUT_DIR/nonfinite_....pth``.

The file holds batch, weights, random streams and configuration, so that it can be looked at on any machine.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import torch

from gn_det.checkpoint.io import read_checkpoint
from gn_det.checkpoint.meta import config_of_checkpoint
from gn_det.config.check import check_config
from gn_det.engine import choice as engines
from gn_det.engine.nonfinite import Pass, find_origin, load_batch
from gn_det.engine.payload import check_replay, refuse
from gn_det.errors import UserError, WeightsError
from gn_det.text import as_line, printable
from gn_det.values import InvalidValue


def replay(path: str | os.PathLike[str]) -> str:
    """What happened, as text: the losses, one line each, and the layer that was the first to go bad.

    Args:
        path: a file written when a loss was not finite, by either engine; the embedded engine's model repeats it, on
            the CPU.

    Raises:
        WeightsError: not such a file, or its weights do not fit.
        ConfigError: the embedded engine does not have that model.
    """
    content = read_checkpoint(path)
    if not {"batch", "rng", "model", "gn_det"} <= content.keys():
        raise WeightsError(f"{path}: holds no batch to replay; give a nonfinite_*.pth of an OUTPUT_DIR")
    cfg = config_of_checkpoint(path)
    check_config(cfg, "embedded")
    model = engines.load(engines.Choice("embedded", "")).build_model(cfg)
    try:
        check_replay(content, model, int(cfg.MODEL.ROI_HEADS.NUM_CLASSES))
    except InvalidValue as error:
        raise refuse(os.fspath(path), error, "give a file as a run of this version wrote it", "replay it") from None
    model.load_state_dict(content["model"])
    model.train()
    dtype = getattr(torch, content["autocast"].removeprefix("torch.")) if content["autocast"] else None
    samples = load_batch(content["batch"])
    done = Pass(samples, {**content["rng"], "cuda": None}, "cpu", dtype)
    lines = [f"image {s.get('image_id')} {s.get('file_name', '')}".rstrip() for s in samples]
    try:
        with torch.no_grad():
            lines += [f"{name} = {float(value):g}" for name, value in done.again(model).items()]
    except FloatingPointError as error:
        lines.append(str(error))
    return "\n".join([*lines, find_origin(model, lambda: done.again(model))])


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m gn_det.engine.replay", description="Repeat a failed step.")
    parser.add_argument("file", help="nonfinite_*.pth of an OUTPUT_DIR")
    try:
        print(printable(replay(parser.parse_args(argv).file)))
    except UserError as error:
        print(f"error: {as_line(error)}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
