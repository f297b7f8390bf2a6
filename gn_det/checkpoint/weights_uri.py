"""Names and URLs of published weights, downloaded once into iopath's cache.

``catalog://ImageNetPretrained/FAIR/R-50-GN``, ``detectron2://...``, ``timm://resnet50_gn.a1h_in1k``,
``hf://owner/name``, ``open-mmlab://detectron/resnet50_gn`` and ``https://...`` resolve to a local file under
``$FVCORE_CACHE`` (default ``~/.torch/iopath_cache``), the same cache as Detectron2's. ``$GN_DET_MIRROR`` names a server
or folder to fetch from instead. ``https://host/x.pth#sha256=HEX`` is verified.

URIs are untrusted: whatever one contains, its file stays inside the cache or the mirror.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

from gn_det.checkpoint.preprocessing import CAFFE, PREPROCESSINGS, TORCH, Preprocessing
from gn_det.errors import WeightsError
from gn_det.files import StrPath, digest, inside
from gn_det.text import nearest, one_line

_C2 = "https://dl.fbaipublicfiles.com/detectron"
_D2 = "https://dl.fbaipublicfiles.com/detectron2"

# The part of Detectron2's model catalog that the embedded engine can use.
CATALOG = {
    "ImageNetPretrained/MSRA/R-50": f"{_C2}/ImageNetPretrained/MSRA/R-50.pkl",
    "ImageNetPretrained/MSRA/R-101": f"{_C2}/ImageNetPretrained/MSRA/R-101.pkl",
    "ImageNetPretrained/FAIR/R-50-GN": f"{_C2}/ImageNetPretrained/47261647/R-50-GN.pkl",
    "ImageNetPretrained/FAIR/R-101-GN": f"{_C2}/ImageNetPretrained/47592356/R-101-GN.pkl",
    "ImageNetPretrained/FAIR/X-101-32x8d": f"{_C2}/ImageNetPretrained/20171220/X-101-32x8d.pkl",
    "ImageNetPretrained/FAIR/X-101-64x4d": f"{_C2}/ImageNetPretrained/FBResNeXt/X-101-64x4d.pkl",
}

_MM = "https://download.openmmlab.com/pretrain/third_party"
# mmdetection's GN backbones: Detectron's, one trained in PyTorch, and those of Weight Standardization's authors.
OPEN_MMLAB = {
    "detectron/resnet50_gn": f"{_MM}/resnet50_gn-9186a21c.pth",
    "detectron/resnet101_gn": f"{_MM}/resnet101_gn-cac0ab98.pth",
    "contrib/resnet50_gn": f"{_MM}/resnet50_gn_thangvubk-ad1730dd.pth",
    "jhu/resnet50_gn_ws": f"{_MM}/resnet50_gn_ws-15beedd8.pth",
    "jhu/resnet101_gn_ws": f"{_MM}/resnet101_gn_ws-3e3c308c.pth",
    "jhu/resnext50_32x4d_gn_ws": f"{_MM}/resnext50_32x4d_gn_ws-0d87ac85.pth",
    "jhu/resnext101_32x4d_gn_ws": f"{_MM}/resnext101_32x4d_gn_ws-34ac1a9e.pth",
    "jhu/resnext50_32x4d_gn": f"{_MM}/resnext50_32x4d_gn-c7e8b754.pth",
    "jhu/resnext101_32x4d_gn": f"{_MM}/resnext101_32x4d_gn-ac3bb84e.pth",
}
# timm's names without the tag of the training recipe.
_TIMM_TAGS = {"resnet50_gn": "resnet50_gn.a1h_in1k"}

# Start of the sha256, which the publisher puts into the file name -> what a file does not store: preprocessing and
# formula of Weight Standardization ("" for none).
_PUBLISHED = {
    url[-12:-4]: (CAFFE if name.startswith("detectron/") else TORCH, "jhu" if name.endswith("_ws") else "")
    for name, url in OPEN_MMLAB.items()
}

SCHEMES = ("https://", "detectron2://", "catalog://", "timm://", "hf://", "open-mmlab://")
_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://")
_MAX_URI = 2000
#: Environment variable: a server or folder to fetch from instead of the original hosts.
MIRROR = "GN_DET_MIRROR"


def resolve_url(uri: str) -> str | None:
    """Return the https URL of a URI, or None for a local path (or ``file://``).

    Raises:
        WeightsError: unknown scheme, or a name that is not in the catalog (the message suggests the nearest).
    """
    match = _SCHEME.match(uri)
    scheme = match[1].lower() if match else "file"
    if match is None or scheme == "file":
        return None
    if len(uri) > _MAX_URI or not uri.isprintable() or " " in uri:
        problem = f"it has a space, a control character or more than {_MAX_URI} characters"
        raise WeightsError(f"{one_line(uri)}: is not a URL: {problem} (MODEL.WEIGHTS)")
    rest = uri[match.end() :]
    plain = rest.split("?", 1)[0]  # Detectron2 appends options such as ?matching_heuristics=True
    if scheme in ("http", "https"):
        return f"{scheme}://{plain}"
    if scheme == "detectron2":
        return f"{_D2}/{plain}"
    if scheme in ("hf", "timm"):
        name = rest if scheme == "hf" else f"timm/{_TIMM_TAGS.get(rest, rest)}"
        if found := re.fullmatch(r"([\w.-]+/[\w.-]+)(?:/(.*))?", name):
            hub = os.getenv("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
            return f"{hub}/{found[1]}/resolve/main/{found[2] or 'model.safetensors'}"
        problem = "give timm://NAME, hf://OWNER/NAME or hf://OWNER/NAME/FILE"
    elif scheme in ("catalog", "open-mmlab"):
        names = CATALOG if scheme == "catalog" else OPEN_MMLAB
        if rest in names:
            return names[rest]
        near = [f"{scheme}://{name}" for name in nearest(rest[:200], names, cutoff=0.0)]
        problem = f"not in the catalog; the nearest names are {', '.join(near)}"
    else:
        problem = f"unknown scheme {one_line(scheme, 40)}://; give a local path, {', '.join(SCHEMES)}"
    raise WeightsError(f"{one_line(uri, 200)}: {problem} (MODEL.WEIGHTS)")


def published(uri: str, path: StrPath) -> tuple[Preprocessing | None, str | None]:
    """Return preprocessing and formula of Weight Standardization ("" for none) of a published backbone.

    It is known by its URI, its path in the cache or its sha256; None if unknown.
    """
    if "ImageNetPretrained/torchvision/" in uri:
        return TORCH, None
    url = OPEN_MMLAB.get(uri.removeprefix("open-mmlab://"), "")
    return _PUBLISHED.get(url[-12:-4] or sha256_of(path)[:8], (None, None))


@dataclass(frozen=True)
class Options:
    """Options appended to a name, as in ``x.pth?preprocessing=torch&allow_partial=True``."""

    preprocessing: Preprocessing | None = None
    allow_partial: bool = False


_OPTIONS = re.compile(r"\?((?:(?:preprocessing|allow_partial|matching_heuristics)=[^&?]*&?)+)$")


def split_options(uri: str) -> tuple[str, Options]:
    """Split a name and its options. Detectron2's ``matching_heuristics`` is accepted and has no effect.

    Raises:
        WeightsError: an unknown value.
    """
    match = _OPTIONS.search(uri)
    if not match:
        return uri, Options()
    given = dict(word.split("=", 1) for word in match[1].split("&") if word)
    for name, value in given.items():
        values = PREPROCESSINGS if name == "preprocessing" else ("True", "False")
        if value not in values:
            raise WeightsError(f"{one_line(uri, 400)}: {name} must be {' or '.join(values)}")
    return uri[: match.start()], Options(
        PREPROCESSINGS.get(given.get("preprocessing", "")), given.get("allow_partial") == "True"
    )


def with_option(uri: str, option: str) -> str:
    """Return ``x.pth?allow_partial=True`` for ``x.pth`` and ``allow_partial=True``."""
    return f"{uri}{'&' if _OPTIONS.search(uri) else '?'}{option}" if uri else uri


def sha256_of(path: StrPath) -> str:
    """Return the hex digest of a file's contents."""
    return digest(path, hashlib.sha256()).hex()


def cache_path(url: str) -> Path:
    """Return the path of an https URL in the cache, without creating anything.

    Raises:
        WeightsError: the URL's path leads out of the cache folder, or cannot name a file in it.
    """
    return _placed(os.path.expanduser(os.getenv("FVCORE_CACHE", "~/.torch/iopath_cache")), url, "FVCORE_CACHE")


def _mirrored(url: str) -> str:
    """Return where to fetch a URL: URL or file of the mirror, if the environment names one, else the URL itself.

    A mirror is a copy of the cache folder, on a server or on a disk.
    """
    mirror = os.getenv(MIRROR, "").strip()
    if not mirror:
        return url
    if re.match(r"https?://", mirror, flags=re.IGNORECASE):
        return f"{mirror.rstrip('/')}/{urlparse(url).path.lstrip('/')}"
    return str(_placed(_local(mirror), url, MIRROR))


def _local(path: str) -> Path:
    return Path(os.path.expanduser(re.sub("^file://", "", path, flags=re.IGNORECASE)))


def _placed(folder: StrPath, url: str, variable: str) -> Path:
    """Return the file of a URL in ``folder``: the path after the host, as in iopath's cache."""
    try:
        path = re.sub("/+", "/", urlparse(url).path).removeprefix("/")
        if re.search("%(25)*(2e|2f|5c|00)", path, flags=re.IGNORECASE):  # a server or a proxy may decode them
            raise ValueError("the name has encoded dots or slashes")
        return inside(folder, path)
    except (ValueError, OSError) as error:
        raise WeightsError(
            f"{one_line(url, 400)}: names no file inside the folder {one_line(str(folder), 200)} ({one_line(error)}; "
            f"{variable} sets the folder); give another URL or a local path (MODEL.WEIGHTS)"
        ) from None


def _parse(path_or_uri: StrPath) -> tuple[str, str, str | None]:
    """Return the URI without options and ``#sha256=HEX``, the digest (or its start) in lower case, and the URL."""
    uri, _ = split_options(os.fspath(path_or_uri))
    if not uri.strip():
        raise WeightsError(f"MODEL.WEIGHTS is empty; give a path, {', '.join(SCHEMES)}")
    rest, name, digest = re.fullmatch(r"(.*?)(?:(#sha256=)([^#]*))?", uri, re.IGNORECASE | re.DOTALL).groups("")  # type: ignore[union-attr]
    if name and not re.fullmatch(r"[0-9a-fA-F]{8,64}", digest):
        raise WeightsError(f"{one_line(uri, 400)}: #sha256= takes 8 to 64 hexadecimal digits (MODEL.WEIGHTS)")
    if "#" in rest and _SCHEME.match(rest):
        fragment = one_line(rest.partition("#")[2], 60)
        raise WeightsError(f"{one_line(uri, 400)}: unknown fragment #{fragment}, only #sha256=HEX (MODEL.WEIGHTS)")
    return rest, digest.lower(), resolve_url(rest)


def locate(path_or_uri: StrPath) -> tuple[Path, str]:
    """Return the local file of a path or URI, and the URL to download it from ("" for none).

    Raises:
        WeightsError: empty string, unknown name, or a path outside the cache or the mirror.
    """
    uri, _, url = _parse(path_or_uri)
    if url is None:
        return _local(uri), ""
    cached, source = cache_path(url), _mirrored(url)
    if cached.is_dir():
        raise WeightsError(f"{one_line(uri, 400)}: {cached} is a folder; give the URL of a file (MODEL.WEIGHTS)")
    if cached.is_file():
        return cached, ""
    return (cached, source) if "://" in source else (Path(source), "")


def local_path(path_or_uri: StrPath) -> Path:
    """Return a local file for a path or URI, downloading it if it is not cached; a local path may not exist.

    Raises:
        WeightsError: see :func:`locate`; or the download failed (the message names the URL and where to put the file).
    """
    path, source = locate(path_or_uri)
    uri, sha256, url = _parse(path_or_uri)
    shown = one_line(uri, 400)
    if source:
        from gn_det.checkpoint.download import DownloadFailed, fetch

        try:
            fetch(str(url), path, source=source, sha256=sha256)
        except DownloadFailed as error:
            mirror = f" from the mirror {source}" if source != url else ""
            remedy = f"place the file at {path}, or set MODEL.WEIGHTS to a local path"
            raise WeightsError(f"{shown}: cannot download {url}{mirror} ({error}); {remedy}") from error
    if url and not path.is_file():
        raise WeightsError(f"{shown}: the mirror has no file {path} ({MIRROR})")
    try:
        found = sha256_of(path) if sha256 else ""
    except (OSError, ValueError) as error:
        reason = one_line(getattr(error, "strerror", "") or error)
        raise WeightsError(f"{shown}: cannot be read ({reason}) (MODEL.WEIGHTS)") from None
    if not found.startswith(sha256):
        advice = "delete it and download it again" if url else "it is another file, or damaged"
        raise WeightsError(f"{shown}: {path} has sha256 {found}, not {sha256}: {advice}")
    return path
