"""Train a classifier with the paper's recipe and any norm.

Of images: a backbone for MODEL.WEIGHTS. Of videos: I3D, a 2-D backbone inflated over time.
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

from gn_det.classification.settings import OF_CLIPS, Settings
from gn_det.cli import flags

#: Flags that differ from those of other settings of their type.
_SPECIAL: dict[str, dict[str, Any]] = {
    **{name: {"metavar": "DIR"} for name in ("data", "output")},
    **{name: {"metavar": "FILE"} for name in ("weights", "train_list", "val_list")},
    "epochs": {"metavar": "N"},
    "dropout": {"metavar": "P"},
    "amp": {"metavar": "TYPE"},
    "record": {"metavar": "LAYER"},
    "channels_last": {"nargs": "?", "const": True, "choices": ("auto",), "metavar": None},
    "stride_in_1x1": {"action": "store_true", "default": None},
}
#: Settings of the recipe, which only Python sets.
_WITHOUT_FLAG = ("momentum", "weight_decay", "steps", "gamma", "renorm_ramp")


def add_flags(parser: argparse.ArgumentParser) -> None:
    clips = parser.add_argument_group("videos")
    for each in fields(Settings):
        if each.name in _WITHOUT_FLAG:
            continue
        flag, text = f"--{each.name.replace('_', '-')}", each.metadata["doc"].replace("%", "%%")
        options = dict(_SPECIAL.get(each.name, {}))
        kind = {"int": int, "float": float}.get(str(each.type).partition(" ")[0], str)
        if each.name == "color":
            flag, options = "--no-color", {"dest": "color", "action": "store_false", "default": None}
        elif "action" not in options:
            options = {"type": kind, "metavar": {int: "N", float: "X", str: "NAME"}[kind], **options}
            options["required"] = each.name in ("arch", "norm", "data")
        (clips if each.name in OF_CLIPS else parser).add_argument(flag, help=text, **options)
    flags.add_gpus(parser, "GPUs on this machine; or use torchrun")
    flags.add_restart(parser, dry_run="print data, network and recipe, then exit")


def run(args: argparse.Namespace) -> int:
    from gn_det import classification

    given = {f.name: getattr(args, f.name, None) for f in fields(Settings)}
    given["output"] = args.output or f"output/classify_{args.arch}_{args.norm}"
    settings = Settings.from_dict({name: value for name, value in given.items() if value is not None})
    if args.dry_run:
        from gn_det.classification.pretraining import dry_run

        dry_run(settings, num_gpus=args.num_gpus)
    else:
        classification.pretrain(settings, resume=args.resume, overwrite=args.overwrite, num_gpus=args.num_gpus)
    return 0
