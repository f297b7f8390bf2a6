"""Version of gn_det, apart from the package itself so that its own modules need not import the Python API."""

from __future__ import annotations

__version__ = "0.3.0"
