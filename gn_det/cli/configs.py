"""List the shipped configs and what each reproduces."""

from __future__ import annotations

import argparse
import shutil
import textwrap

_FOR_WHOM = """\
First try             quickstart.yaml (generated images, minutes on a CPU)
Your own data         gn_fpn_finetune.yaml (a GPU) or gn_small.yaml (a CPU)
GN against BN*        gn_fpn.yaml and bn_fpn_4conv1fc.yaml
From scratch          gn_fpn_scratch.yaml
Beyond the paper      gn_ws_*, gn_cascade_*, *_lsj_*, *_6x, gn_retinanet.yaml
The paper's tables    all others; * marks frozen batch norm
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--keys", action="store_true", help="print the reference of all config keys (Markdown)")


def run(args: argparse.Namespace) -> int:
    from gn_det.config.key_reference import key_reference
    from gn_det.config.load import shipped_config, shipped_configs

    if args.keys:
        print(key_reference(), end="")
        return 0
    print(_FOR_WHOM)
    width = min(max(shutil.get_terminal_size().columns, 60), 120)
    names = shipped_configs()
    column = max(map(len, names)) + 1
    for name in names:
        comment = [line[2:].strip() for line in shipped_config(name).read_text(encoding="utf-8").splitlines()[:2]]
        first, others = name.ljust(column), " " * column
        print(textwrap.fill(" ".join(comment), width, initial_indent=first, subsequent_indent=others))
    return 0
