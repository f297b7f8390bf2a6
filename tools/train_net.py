#!/usr/bin/env python
"""Train or evaluate: the same as ``gn-det train``."""

from __future__ import annotations

import sys

from gn_det.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]], prog="train_net.py"))
