"""Check the datasets of a config: report, files and exit code."""

from __future__ import annotations

import json
from itertools import islice
from typing import Any

import numpy as np

from gn_det.check.audit import Training, survey
from gn_det.check.fix import Cleaner, changes_file, refuse_overwriting
from gn_det.check.report import Report, as_json, as_text, look_across
from gn_det.data.catalog import datasets_for
from gn_det.data.coco import CocoDataset
from gn_det.data.image import png_bytes
from gn_det.data.loader import build_train_loader
from gn_det.data.sets import load_set
from gn_det.errors import ConfigError, UserError
from gn_det.files import atomic_write
from gn_det.terminal import say
from gn_det.text import count
from gn_det.visualize.draw import draw_grid, draw_sample

#: Number of changes to print; the file beside the copy lists all. Number of augmented images.
_CHANGES, _IMAGES = 10, 12


def check(
    cfg: Any,
    *,
    config: str = "",
    decode: bool = False,
    json_out: str | None = None,
    html_out: str | None = None,
    fix_out: str | None = None,
    augmented_out: str | None = None,
) -> int:
    """Check the training and validation sets of ``cfg`` and print the report.

    Args:
        cfg: DATASETS names the sets; INPUT, MODEL and DATALOADER say how training would use them.
        config: name of ``cfg`` in the report.
        decode: decode every image, on all cores.
        json_out: path for the report as JSON.
        html_out: path for the report as one HTML page with images.
        fix_out: path for a cleaned copy of the training annotations.
        augmented_out: path for a picture of training images as the model sees them.

    Returns:
        0 if clean (notes do not count), 1 if there are only warnings, 2 if there are errors.

    Raises:
        ConfigError: no training set is named.
        UserError: an output cannot be written, or would overwrite an input.
    """
    train = datasets_for(cfg, "train")
    if not train:
        raise ConfigError("no training set is named: give --train-json, or a --config that names one")
    if fix_out and len(train) > 1:
        raise UserError(f"--fix {fix_out}: {len(train)} training sets are named; clean them one by one (--train-json)")
    sources = [*((s, "train") for s in train), *((s, "val") for s in datasets_for(cfg, "test"))]
    outputs = {"--fix": fix_out, "--json": json_out, "--html": html_out, "--augmented": augmented_out}
    refuse_overwriting(outputs, [s.json_file for s, _ in sources])
    training = Training.of(cfg)
    report = look_across([survey(s, split, training, decode=decode) for s, split in sources], training, cfg, config)
    print(as_text(report), flush=True)
    try:
        if fix_out:
            _fix(report, fix_out)
    finally:
        if json_out:
            atomic_write(json_out, json.dumps(as_json(report), indent=1, default=str))
            say(f"{json_out}: this report as JSON")
        if html_out:
            from gn_det.check.page import as_html

            atomic_write(html_out, as_html(report).encode("utf-8", "backslashreplace"))
            say(f"{html_out}: this report with images")
    if augmented_out:
        atomic_write(augmented_out, png_bytes(_draw_augmented(cfg, load_set(cfg, train[0], quiet=True))))
        say(f"{augmented_out}: training images as the model sees them")
    return report.exit_code


def _draw_augmented(cfg: Any, dataset: CocoDataset) -> np.ndarray:
    """Draw the first images of a run with this config and seed (0 if SEED is negative) as one RGB image."""
    loader = build_train_loader(cfg, [dataset], images_per_rank=1, seed=max(int(cfg.SEED), 0), num_workers=0)
    samples = [batch[0] for batch in islice(loader, _IMAGES)]
    drawn = [draw_sample(s, dataset.class_names, bgr=cfg.INPUT.FORMAT == "BGR") for s in samples]
    return draw_grid(drawn, [str(s["image_id"]) for s in samples], columns=4)


def _fix(report: Report, target: str) -> None:
    cleaner = Cleaner(report.surveys[0])
    cleaner.write(target)
    report.changes = cleaner.changes
    # errors that a cleaned training json does not fix
    kinds = [name for name, kind, _ in report.across.kinds() if kind.severity == "error"]
    report.not_fixed = [str(finding) for name in kinds for finding in report.across.found[name]]
    report.not_fixed += [
        f"{other.source.json_file} has {count(errors, 'error')} of its own: give it as --train-json to --fix it"
        for other in report.surveys[1:]
        if (errors := other.findings.total("error"))
    ]
    print()
    say(f"{target}: cleaned copy of {report.surveys[0].source.json_file}, {count(len(cleaner.changes), 'change')}")
    for line in cleaner.changes[:_CHANGES]:
        say(f"  {line}")
    if len(cleaner.changes) > _CHANGES:
        say(f"  ... and {len(cleaner.changes) - _CHANGES} more")
    say(f"  all changes: {changes_file(target)}")
    for line in report.not_fixed:
        say(f"  not fixed: {line}")
