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
_SHA256 = re.compile(r"#sha256=([^#]*)$", re.IGNORECASE)
#: Environment variable: a server or folder to fetch from instead of the original hosts.
MIRROR = "GN_DET_MIRROR"


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
    if len(uri) > _MAX_URI or not uri.isprintable() or " " in uri:
        raise WeightsError(
            f"{one_line(uri)}: is not a URL: it has a space, a control character or more than {_MAX_URI} characters "
            "(MODEL.WEIGHTS)"
        )
    if scheme in ("http", "https"):
        # Detectron2 puts options such as ?matching_heuristics=True behind the name.
        return f"{scheme}://{rest.split('?', 1)[0]}"
    if scheme == "detectron2":
        return f"{_D2}/{rest.split('?', 1)[0]}"
    if scheme in ("hf", "timm"):
        return _hub_url(uri, rest if scheme == "hf" else f"timm/{_TIMM_TAGS.get(rest, rest)}")
    if scheme == "open-mmlab":
        if rest not in OPEN_MMLAB:
            raise WeightsError(f"{one_line(uri, 200)}: open-mmlab:// knows {', '.join(OPEN_MMLAB)} (MODEL.WEIGHTS)")
        return OPEN_MMLAB[rest]
    if scheme == "catalog":
        if rest not in CATALOG:
            near = get_close_matches(rest, CATALOG, n=1, cutoff=0.0)[0]
            raise WeightsError(
                f"{one_line(uri, 200)}: not in the catalog; the nearest name is catalog://{near} (MODEL.WEIGHTS)"
            )
        return CATALOG[rest]
    raise WeightsError(
        f"{one_line(uri, 200)}: scheme {one_line(scheme, 40)}:// is not known; MODEL.WEIGHTS takes a local path, "
        f"{', '.join(SCHEMES)}"
    )


def _hub_url(uri: str, rest: str) -> str:
    """``owner/name[/file]`` on Hugging Face's hub; the file is ``model.safetensors`` unless named."""
    owner, _, name = rest.partition("/")
    name, _, file = name.partition("/")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", f"{owner}/{name}"):
        raise WeightsError(
            f"{one_line(uri, 200)}: give timm://NAME, or hf://OWNER/NAME and, behind a slash, the file (MODEL.WEIGHTS)"
        )
    hub = os.getenv("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    return f"{hub}/{owner}/{name}/resolve/main/{file or 'model.safetensors'}"


def published_preprocessing(uri: str) -> Preprocessing | None:
    """What a published backbone expects, told by its URI or its path in the cache; None when unknown."""
    return next((needs for pattern, needs in _PUBLISHED if pattern.search(uri)), None)


def published_file(path: StrPath) -> Preprocessing | None:
    """What a published backbone expects, told by its sha256; None when unknown."""
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
    """Where the file of an https URL lies, or would lie, in the cache (nothing is created).

    Raises:
        WeightsError: the URL's path leads out of the cache folder, or cannot name a file in it.
    """
    return _placed(os.path.expanduser(os.getenv("FVCORE_CACHE", "~/.torch/iopath_cache")), url, "FVCORE_CACHE")


def _placed(folder: StrPath, url: str, variable: str) -> Path:
    """The file of a URL in ``folder``: the path behind the host, as iopath's cache has it.

    Servers and file systems differ in what they decode, so every form of the path must be a plain one.
    """
    try:
        written = re.sub("/+", "/", urlparse(url).path).removeprefix("/")
        form = written
        for _ in range(4):
            inside(folder, form)
            if (decoded := unquote(form, errors="surrogateescape")) == form:
                break
            form = decoded
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
    """The URI without ``#sha256=HEX``, and the digest (or its beginning) in lower case; "" where there is none.

    Raises:
        WeightsError: another fragment behind a URL, or a digest that is none.
    """
    match = _SHA256.search(uri)
    rest = uri[: match.start()] if match else uri
    if match and not re.fullmatch(r"[0-9a-fA-F]{8,64}", match[1]):
        raise WeightsError(f"{one_line(uri, 400)}: behind #sha256= stand 8 to 64 hexadecimal digits (MODEL.WEIGHTS)")
    if "#" in rest and _SCHEME.match(rest):
        raise WeightsError(
            f"{one_line(uri, 400)}: #{one_line(rest.partition('#')[2], 60)} is not known; behind a URL may stand "
            "#sha256=HEX (MODEL.WEIGHTS)"
        )
    return rest, match[1].lower() if match else ""


def local_path(path_or_uri: StrPath) -> Path:
    """A local file for a path or URI; downloads (to a temporary file, then renamed) when the cache lacks it.

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
    if url is None:
        try:
            cached = Path(re.sub("^file://", "", uri, flags=re.IGNORECASE)).expanduser()
        except RuntimeError as error:  # ~ of a user who does not exist
            raise WeightsError(f"{shown}: {one_line(error)} (MODEL.WEIGHTS)") from None
        if not sha256:
            return cached
    else:
        cached = cache_path(url)
        source = mirrored(url)
        if cached.is_dir():
            raise WeightsError(f"{shown}: {cached} is a folder; give the URL of a file (MODEL.WEIGHTS)")
        if not cached.is_file():
            if "://" not in source:
                cached = Path(source)
                if not cached.is_file():
                    raise WeightsError(f"{shown}: the mirror has no file {cached} ({MIRROR})")
            else:
                cached = _download(shown, url, cached, source, sha256)
    if sha256:
        try:
            found = sha256_of(cached)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", "") or error
            raise WeightsError(f"{shown}: cannot be read ({one_line(reason)}) (MODEL.WEIGHTS)") from None
        if not found.startswith(sha256):
            advice = "delete it and download it again" if url else "it is another file, or damaged"
            raise WeightsError(f"{shown}: {cached} has sha256 {found}, not {sha256}: {advice}")
    return cached


def mirrored(url: str) -> str:
    """Where to fetch a URL: the mirror's URL or file where the environment names one, else the URL itself.

    A mirror is a copy of the cache folder: the path behind the host of the original URL, on a server or on a disk.

    Raises:
        WeightsError: the URL's path leads out of the mirror's folder.
    """
    mirror = os.getenv(MIRROR, "").strip()
    if not mirror:
        return url
    if re.match(r"https?://", mirror, flags=re.IGNORECASE):
        return f"{mirror.rstrip('/')}/{urlparse(url).path.lstrip('/')}"
    return str(_placed(Path(re.sub("^file://", "", mirror, flags=re.IGNORECASE)).expanduser(), url, MIRROR))


def _download(uri: str, url: str, cached: Path, source: str, sha256: str) -> Path:
    try:
        from gn_det.checkpoint.download import DownloadFailed, fetch

        return fetch(url, cached, source=source, sha256=sha256)
    except ImportError:
        raise WeightsError(f"{uri}: downloading needs the package iopath; or place {url} at {cached}") from None
    except DownloadFailed as error:
        mirror = f" from the mirror {source}" if source != url else ""
        raise WeightsError(
            f"{uri}: cannot download {url}{mirror} ({error}); place the file at {cached}, or set MODEL.WEIGHTS to a "
            "local path"
        ) from error
