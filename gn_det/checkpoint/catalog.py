"""Names and URLs of published weights, downloaded once into iopath's cache.

``catalog://ImageNetPretrained/FAIR/R-50-GN``, ``detectron2://...`` and ``https://...`` become a local file under
``$FVCORE_CACHE`` (default ``~/.torch/iopath_cache``); the same cache as Detectron2's.
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
from collections.abc import Iterator
from difflib import get_close_matches
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import urlopen

from gn_det.checkpoint.io import StrPath, one_line
from gn_det.checkpoint.source import Preprocessing
from gn_det.errors import WeightsError

_C2 = "https://dl.fbaipublicfiles.com/detectron"
_D2 = "https://dl.fbaipublicfiles.com/detectron2"

# Detectron2's model catalog, as far as this engine can use it.
CATALOG = {
    "ImageNetPretrained/MSRA/R-50": f"{_C2}/ImageNetPretrained/MSRA/R-50.pkl",
    "ImageNetPretrained/MSRA/R-101": f"{_C2}/ImageNetPretrained/MSRA/R-101.pkl",
    "ImageNetPretrained/FAIR/R-50-GN": f"{_C2}/ImageNetPretrained/47261647/R-50-GN.pkl",
    "ImageNetPretrained/FAIR/R-101-GN": f"{_C2}/ImageNetPretrained/47592356/R-101-GN.pkl",
    "ImageNetPretrained/FAIR/X-101-32x8d": f"{_C2}/ImageNetPretrained/20171220/X-101-32x8d.pkl",
    "ImageNetPretrained/FAIR/X-101-64x4d": f"{_C2}/ImageNetPretrained/FBResNeXt/X-101-64x4d.pkl",
}

# Backbones whose file does not tell what they were trained with, by their published place.
_PUBLISHED = (
    (
        re.compile(r"ImageNetPretrained/torchvision/"),
        Preprocessing("RGB", (123.675, 116.280, 103.530), (58.395, 57.120, 57.375), stride_in_1x1=False),
    ),
)

_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://")
_TIMEOUT = 30.0  # seconds without a byte; iopath sets none, and a silent network would hang for ever


def resolve_url(uri: str) -> str | None:
    """The https URL behind a URI, or None for a local path (or ``file://``).

    Raises:
        WeightsError: unknown scheme, or a name that is not in the catalog (the nearest is named).
    """
    match = _SCHEME.match(uri)
    scheme = match.group(1).lower() if match else "file"
    rest = uri[match.end() :] if match else uri
    if scheme == "file":
        return None
    if scheme in ("http", "https"):
        return uri.split("?", 1)[0]  # Detectron2 puts options such as ?matching_heuristics=True behind the name
    if scheme == "detectron2":
        return f"{_D2}/{rest.split('?', 1)[0]}"
    if scheme == "catalog":
        if rest not in CATALOG:
            near = get_close_matches(rest, CATALOG, n=1, cutoff=0.0)[0]
            raise WeightsError(f"{uri}: not in the catalog; the nearest name is catalog://{near} (MODEL.WEIGHTS)")
        return CATALOG[rest]
    raise WeightsError(
        f"{uri}: scheme {scheme}:// is not known; MODEL.WEIGHTS takes a local path, https://, detectron2:// or catalog://"
    )


def published_preprocessing(uri: str) -> Preprocessing | None:
    """What a published backbone expects, told by its URI or its path in the cache; None when unknown."""
    return next((needs for pattern, needs in _PUBLISHED if pattern.search(uri)), None)


def cache_path(url: str) -> Path:
    """Where the file of an https URL lies, or would lie, in the cache (nothing is created)."""
    cache = os.path.expanduser(os.getenv("FVCORE_CACHE", "~/.torch/iopath_cache"))
    return Path(cache) / urlparse(url).path.lstrip("/")


def local_path(path_or_uri: StrPath) -> Path:
    """A local file for a path or URI; downloads (to a temporary file, then renamed) when the cache lacks it.

    Raises:
        WeightsError: empty string, unknown name, or no download possible; the message names the URL, and the file to
            place and where. Whether a local path exists is left to the reader.
    """
    uri = os.fspath(path_or_uri)
    if not uri.strip():
        raise WeightsError("MODEL.WEIGHTS is empty; give a path, https://, detectron2:// or catalog://")
    url = resolve_url(uri)
    if url is None:
        return Path(re.sub("^file://", "", uri, flags=re.IGNORECASE)).expanduser()
    cached = cache_path(url)
    if cached.is_file():
        return cached
    return _download(uri, url, cached)


def _download(uri: str, url: str, cached: Path) -> Path:
    try:
        from iopath.common.file_io import HTTPURLHandler, PathManager
    except ImportError:
        raise WeightsError(f"{uri}: downloading needs the package iopath; or place {url} at {cached}") from None
    # Our own manager: iopath's global one is shared with whoever else registers handlers in this process.
    manager = PathManager()
    manager.register_handler(HTTPURLHandler())
    try:
        with _timeout(_TIMEOUT):
            urlopen(url).close()  # fails without the progress bar and log that iopath shows first
            return Path(manager.get_local_path(url))
    except Exception as error:  # urllib, ssl, http, portalocker and OSError have no common base
        reason = one_line(getattr(error, "reason", "") or str(error) or type(error).__name__)
        raise WeightsError(
            f"{uri}: cannot download {url} ({reason}); place the file at {cached}, or set MODEL.WEIGHTS to a local path"
        ) from error


@contextlib.contextmanager
def _timeout(seconds: float) -> Iterator[None]:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
