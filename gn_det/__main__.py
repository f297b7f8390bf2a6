"""``python -m gn_det`` is ``gn-det``."""

from __future__ import annotations

import sys

from gn_det.cli import main

sys.exit(main())
