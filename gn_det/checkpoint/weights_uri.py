"""Names and URLs of published weights, downloaded once into iopath's cache.

``catalog://ImageNetPretrained/FAIR/R-50-GN``, ``detectron2://...``, ``timm://resnet50_gn.a1h_in1k``,
``hf://owner/name``, ``open-mmlab://detectron/resnet50_gn`` and ``https://...`` become a local file under
``$FVCORE_CACHE`` (default ``~/.torch/iopath_cache``); the same cache as Detectron2's. ``$GN_DET_MIRROR`` names a server
or folder to fetch from instead; ``https://host/x.pth#sha256=HEX`` is verified.

URIs are untrusted: whatever one contains, its file is inside the cache or the mirror.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from urllib.parse import unquote, urlparse

from gn_det.checkpoint.preprocessing import CAFFE, PREPROCESSINGS, TORCH, Preprocessing
from gn_det.errors import WeightsError
from gn_det.files import StrPath, inside, open_regular
from gn_det.text import one_line

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

_MM = "https://download.openmmlab.com/pretrain/third_party"
# mmdetection's GN backbones: Detectron's, and one trained in PyTorch.
OPEN_MMLAB = {
    "detectron/resnet50_gn": f"{_MM}/resnet50_gn-9186a21c.pth",
    "detectron/resnet101_gn": f"{_MM}/resnet101_gn-cac0ab98.pth",
    "contrib/resnet50_gn": f"{_MM}/resnet50_gn_thangvubk-ad1730dd.pth",
}
# timm's names without the tag of the training recipe.
_TIMM_TAGS = {"resnet50_gn": "resnet50_gn.a1h_in1k"}

# Backbones whose file does not tell what they were trained with, by their published place ...
_PUBLISHED = (
    (re.compile(r"ImageNetPretrained/torchvision/"), TORCH),
    (re.compile(r"open-mmlab://detectron/resnet(?:50|101)_gn$"), CAFFE),
    (re.compile(r"open-mmlab://contrib/resnet50_gn$"), TORCH),
)
# ... or by the beginning of their sha256, which their publisher puts into the file name.
_PUBLISHED_FILES = {"9186a21c": CAFFE, "cac0ab98": CAFFE, "ad1730dd": TORCH}

SCHEMES = ("https://", "detectron2://", "catalog://", "timm://", "hf://", "open-mmlab://")
_SCHEME = re.compile(r"([a-zA-Z][a-zA-Z0-9+.-]*)://")
_MAX_URI = 2000
# Of one part of a path, in bytes: file systems take 255, and a download adds its own ending.
_MAX_PART = 200
#: Environment variable: a server or folder to fetch from instead of the original hosts.
MIRROR = "GN_DET_MIRROR"


def resolve_url(uri: str) -> str | None:
    """The https URL behind a URI, or None for a local path (or ``file://``).

    Raises:
        WeightsError: unknown scheme, or a name that is not in the catalog (the nearest is named).
    """
    match = _SCHEME.match(uri)
    scheme = match[1].lower() if match else "file"
    if match is None or scheme == "file":
        return None
    if len(uri) > _MAX_URI or not uri.isprintable() or " " in uri:
        raise WeightsError(
            f"{one_line(uri)}: is not a URL: it has a space, a control character or more than {_MAX_URI} characters "
            "(MODEL.WEIGHTS)"
        )
    rest = uri[match.end() :]
    plain = rest.split("?", 1)[0]  # Detectron2 puts options such as ?matching_heuristics=True behind the name
    if scheme in ("http", "https"):
        return f"{scheme}://{plain}"
    if scheme == "detectron2":
        return f"{_D2}/{plain}"
    if scheme in ("hf", "timm"):
        found = re.fullmatch(
            r"([\w.-]+/[\w.-]+)(?:/(.*))?", rest if scheme == "hf" else f"timm/{_TIMM_TAGS.get(rest, rest)}"
        )
        if found is None:
            problem = "give timm://NAME, or hf://OWNER/NAME and, behind a slash, the file"
        else:
            hub = os.getenv("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
            return f"{hub}/{found[1]}/resolve/main/{found[2] or 'model.safetensors'}"
    elif scheme in ("catalog", "open-mmlab"):
        names = CATALOG if scheme == "catalog" else OPEN_MMLAB
        if rest in names:
            return names[rest]
        near = [f"{scheme}://{name}" for name in get_close_matches(rest, names, n=2, cutoff=0.0)]
        problem = f"not in the catalog; the nearest names are {' and '.join(near)}"
    else:
        problem = f"scheme {one_line(scheme, 40)}:// is not known; give a local path, {', '.join(SCHEMES)}"
    raise WeightsError(f"{one_line(uri, 200)}: {problem} (MODEL.WEIGHTS)")


def published_preprocessing(uri: str) -> Preprocessing | None:
    """Return what a published backbone expects, told by its URI or its path in the cache; None when unknown."""
    return next((needs for pattern, needs in _PUBLISHED if pattern.search(uri)), None)


def published_file(path: StrPath) -> Preprocessing | None:
    """Return what a published backbone expects, told by its sha256; None when unknown."""
    return _PUBLISHED_FILES.get(sha256_of(path)[:8])


@dataclass(frozen=True)
class Options:
    """What a user says behind a name, as in ``x.pth?preprocessing=torch&allow_partial=True``."""

    preprocessing: Preprocessing | None = None
    allow_partial: bool = False


_OPTIONS = re.compile(r"\?((?:(?:preprocessing|allow_partial|matching_heuristics)=[^&?]*&?)+)$")


def split_options(uri: str) -> tuple[str, Options]:
    """The name without its options, and those. Detectron2's ``matching_heuristics`` is admitted: we always search.

    Raises:
        WeightsError: an unknown value.
    """
    match = _OPTIONS.search(uri)
    if not match:
        return uri, Options()
    words = dict(word.split("=", 1) for word in match[1].split("&") if word)
    needs, partial = words.get("preprocessing"), words.get("allow_partial", "False")
    if needs is not None and needs not in PREPROCESSINGS:
        raise WeightsError(f"{one_line(uri, 400)}: preprocessing is one of {', '.join(PREPROCESSINGS)}")
    for name, value in (("allow_partial", partial), ("matching_heuristics", words.get("matching_heuristics", "True"))):
        if value not in ("True", "False"):
            raise WeightsError(f"{one_line(uri, 400)}: {name} is True or False")
    return uri[: match.start()], Options(PREPROCESSINGS[needs] if needs else None, partial == "True")


def with_option(uri: str, option: str) -> str:
    """``x.pth`` and ``allow_partial=True`` become ``x.pth?allow_partial=True``."""
    return f"{uri}{'&' if _OPTIONS.search(uri) else '?'}{option}" if uri else uri


def sha256_of(path: StrPath) -> str:
    """Hex digest of a file's contents."""
    digest = hashlib.sha256()
    with open_regular(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def cache_path(url: str) -> Path:
    """Return where the file of an https URL is, or would be, in the cache (nothing is created).

    Raises:
        WeightsError: the URL's path leads out of the cache folder, or cannot name a file in it.
    """
    return _placed(os.path.expanduser(os.getenv("FVCORE_CACHE", "~/.torch/iopath_cache")), url, "FVCORE_CACHE")


def mirrored(url: str) -> str:
    """Return where to fetch a URL: the mirror's URL or file where the environment names one, else the URL itself.

    A mirror is a copy of the cache folder: the path behind the host of the original URL, on a server or on a disk.

    Raises:
        WeightsError: the URL's path leads out of the mirror's folder.
    """
    mirror = os.getenv(MIRROR, "").strip()
    if not mirror:
        return url
    if re.match(r"https?://", mirror, flags=re.IGNORECASE):
        return f"{mirror.rstrip('/')}/{urlparse(url).path.lstrip('/')}"
    return str(_placed(_without_scheme(mirror).expanduser(), url, MIRROR))


def _without_scheme(path: str) -> Path:
    return Path(re.sub("^file://", "", path, flags=re.IGNORECASE))


def _placed(folder: StrPath, url: str, variable: str) -> Path:
    """The file of a URL in ``folder``: the path behind the host, as iopath's cache has it.

    Servers and file systems differ in what they decode, so every form of the path must be a plain one.
    """
    try:
        written = form = re.sub("/+", "/", urlparse(url).path).removeprefix("/")
        for _ in range(4):
            inside(folder, form)
            form, before = unquote(form, errors="surrogateescape"), form
            if form == before:
                break
        else:
            raise ValueError("the name is encoded many times over")
        if any(len(part.encode("utf-8", "surrogateescape")) > _MAX_PART for part in written.split("/")):
            raise ValueError(f"a part of the name is longer than {_MAX_PART} bytes")
        return inside(folder, written)
    except (ValueError, OSError, RuntimeError) as error:  # RuntimeError: a loop of links
        raise WeightsError(
            f"{one_line(url, 400)}: names no file inside the folder {one_line(str(folder), 200)} ({one_line(error)}; "
            f"{variable} sets the folder); give another URL or a local path (MODEL.WEIGHTS)"
        ) from None


def split_digest(uri: str) -> tuple[str, str]:
    """Return the URI without ``#sha256=HEX``, and the digest (or its beginning) in lower case; "" if there is none.

    Raises:
        WeightsError: another fragment behind a URL, or a digest that is none.
    """
    rest, name, digest = re.fullmatch(r"(.*?)(?:(#sha256=)([^#]*))?", uri, re.IGNORECASE | re.DOTALL).groups("")  # type: ignore[union-attr]
    if name and not re.fullmatch(r"[0-9a-fA-F]{8,64}", digest):
        raise WeightsError(f"{one_line(uri, 400)}: #sha256= takes 8 to 64 hexadecimal digits (MODEL.WEIGHTS)")
    if "#" in rest and _SCHEME.match(rest):
        fragment = one_line(rest.partition("#")[2], 60)
        raise WeightsError(f"{one_line(uri, 400)}: #{fragment} is not known, only #sha256=HEX (MODEL.WEIGHTS)")
    return rest, digest.lower()


def local_path(path_or_uri: StrPath) -> Path:
    """Return a local file for a path or URI; downloads when the cache lacks it.

    Raises:
        WeightsError: empty string, unknown name, a place outside the cache, or no download possible; the message names
            the URL, and the file to place and where. Whether a local path exists is left to the reader.
    """
    uri, _ = split_options(os.fspath(path_or_uri))
    if not uri.strip():
        raise WeightsError(f"MODEL.WEIGHTS is empty; give a path, {', '.join(SCHEMES)}")
    uri, sha256 = split_digest(uri)
    url = resolve_url(uri)
    shown = one_line(uri, 400)
    try:
        path = _without_scheme(uri).expanduser() if url is None else _cached(shown, url, sha256)
        found = sha256_of(path) if sha256 else ""
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: ~ of a user who does not exist
        reason = one_line(getattr(error, "strerror", "") or error)
        raise WeightsError(f"{shown}: cannot be read ({reason}) (MODEL.WEIGHTS)") from None
    if not found.startswith(sha256):
        advice = "delete it and download it again" if url else "it is another file, or damaged"
        raise WeightsError(f"{shown}: {path} has sha256 {found}, not {sha256}: {advice}")
    return path


def _cached(shown: str, url: str, sha256: str) -> Path:
    """The file of a URL in the cache or a mirror's folder, downloaded where it is not there."""
    cached, source = cache_path(url), mirrored(url)
    if cached.is_dir():
        raise WeightsError(f"{shown}: {cached} is a folder; give the URL of a file (MODEL.WEIGHTS)")
    if cached.is_file():
        return cached
    if "://" not in source:
        if not os.path.isfile(source):
            raise WeightsError(f"{shown}: the mirror has no file {source} ({MIRROR})")
        return Path(source)
    from gn_det.checkpoint.download import DownloadFailed, fetch

    try:
        return fetch(url, cached, source=source, sha256=sha256)
    except DownloadFailed as error:
        mirror = f" from the mirror {source}" if source != url else ""
        raise WeightsError(
            f"{shown}: cannot download {url}{mirror} ({error}); place the file at {cached}, or set MODEL.WEIGHTS to a "
            "local path"
        ) from error
