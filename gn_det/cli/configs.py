"""List the shipped configs and what each reproduces."""

from __future__ import annotations

import argparse


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--keys", action="store_true", help="print the reference of all config keys (Markdown) instead")


def run(args: argparse.Namespace) -> int:
    from gn_det.config.key_reference import key_reference
    from gn_det.config.load import shipped_config, shipped_configs

    if args.keys:
        print(key_reference(), end="")
        return 0
    for name in shipped_configs():
        comment = [line[2:].strip() for line in shipped_config(name).read_text(encoding="utf-8").splitlines()[:2]]
        print(f"{name:28s} {' '.join(comment)}")
    return 0
