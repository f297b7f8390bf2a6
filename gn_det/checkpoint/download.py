"""Fetch a file over http(s) into iopath's cache: resumed when the connection breaks, verified, whole or not there.

Bytes go to a hidden file beside the target, which gets its name only when it is complete and its sha256, where known,
is right. A lock beside it makes other processes wait for the one download.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import logging
import os
import re
import ssl
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import urlparse
from urllib.request import (
    HTTPDefaultErrorHandler,
    HTTPErrorProcessor,
    HTTPHandler,
    HTTPRedirectHandler,
    HTTPSHandler,
    OpenerDirector,
    ProxyHandler,
    Request,
    UnknownHandler,
)

from gn_det.checkpoint.io import not_weights
from gn_det.text import one_line

logger = logging.getLogger(__name__)

TIMEOUT = 30.0  # seconds without a byte, then the attempt counts as broken
ATTEMPTS = 5  # in a row without a single new byte
_RESTARTS = 10  # from the first byte, because the server gave something else than the rest
_WAIT = 0.5  # seconds before the second attempt, doubled for each further one
_BLOCK = 1 << 20
_MAX_BYTES = 1 << 34  # from a server that does not tell how much it will send
_NETWORK = (URLError, ConnectionError, TimeoutError, ssl.SSLError, http.client.HTTPException)
_BUSY = (408, 429, 500, 502, 503, 504)  # worth another attempt
# Publishers who put the beginning of the sha256 into the file name.
_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.(?:pth|pt|pkl|safetensors)$")
_HASHING_HOSTS = ("download.pytorch.org", "download.openmmlab.com", "github.com")


class DownloadFailed(Exception):
    """The reason in one line, without the URL."""


@dataclass
class _Progress:
    """What is known of the file being fetched."""

    have: int = 0
    total: int | None = None
    validator: str = ""  # ETag or date by which the server recognises the version we hold a part of
    sha256: str = ""
    begun: int = 0  # times from the first byte
    digest: Any = field(default_factory=hashlib.sha256)

    def restart(self, file: Any) -> None:
        """Drop what we have."""
        file.seek(0)
        file.truncate()
        self.have, self.total, self.validator, self.digest = 0, None, "", hashlib.sha256()
        self.begun += 1


class _Anew(ConnectionError):
    """What the server sent is not the rest of what we have; another attempt begins with nothing."""


def fetch(url: str, target: Path, *, source: str = "", sha256: str = "") -> Path:
    """``target``, downloaded from ``url`` when it is not there.

    Args:
        url: http(s).
        target: in the cache; its folder is created.
        source: where to fetch it really, when a mirror takes the place of ``url``.
        sha256: hex digest, or the beginning of one; "" = what the publisher tells, if anything.

    Raises:
        DownloadFailed: no connection, not found, broken off too often, another sha256, or no weights. Nothing is left
            behind.
    """
    from iopath.common.file_io import file_lock

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(str(target)):
            if target.is_file():  # another process was faster
                return target
            for stale in target.parent.glob(f".{target.name}.part-*"):  # of a killed process: we hold the lock
                stale.unlink(missing_ok=True)
            part = target.with_name(f".{target.name}.part-{os.getpid()}")
            try:
                _fetch(source or url, part, sha256 or _published_hash(url))
                with open(part, "rb") as file:
                    if what := not_weights(file.read(64)):
                        raise DownloadFailed(f"the server sent no weights but {what}")
                os.replace(part, target)
            finally:
                part.unlink(missing_ok=True)
    except OSError as error:
        raise DownloadFailed(one_line(error.strerror or error)) from error
    return target


def _published_hash(url: str) -> str:
    parsed = urlparse(url)
    match = _HASH_IN_NAME.search(parsed.path)
    return match[1] if match and parsed.hostname in _HASHING_HOSTS else ""


def _fetch(url: str, part: Path, sha256: str) -> None:
    state = _Progress(sha256=sha256)
    failures = 0
    with open(part, "wb") as file, _bar(url) as bar:
        while state.total is None or state.have < state.total:
            before = state.have
            try:
                _attempt(url, file, state, bar)
                if state.total is None:
                    break  # the server told no length and closed the connection: that was all
                reason = f"retrieval incomplete: got only {state.have} out of {state.total} bytes"
            except HTTPError as error:
                if error.code == 416 and state.have:  # it has another length by now
                    state.restart(file)
                elif error.code not in _BUSY:
                    raise DownloadFailed(f"{error.code} {one_line(error.reason)}") from error
                reason = f"{error.code} {one_line(error.reason)}"
            except _NETWORK as error:  # any other OSError is the disk's
                reason = one_line(getattr(error, "reason", "") or str(error) or type(error).__name__)
                if state.have == 0 and isinstance(error, URLError):
                    raise DownloadFailed(reason) from error  # no such host, no network: waiting will not help
            except ValueError as error:  # a URL or an answer that http.client cannot express
                raise DownloadFailed(one_line(error)) from error
            if state.total is not None and state.have >= state.total:
                break
            failures = 0 if state.have > before else failures + 1
            if failures >= ATTEMPTS or state.begun > _RESTARTS:
                raise DownloadFailed(f"{reason}, {ATTEMPTS if failures >= ATTEMPTS else state.begun} attempts")
            time.sleep(_WAIT * 2 ** max(0, failures - 1))
        file.flush()
        os.fsync(file.fileno())
    if state.have == 0:
        raise DownloadFailed("the server sent an empty file")
    found = state.digest.hexdigest()
    if state.sha256 and not found.startswith(state.sha256.lower()):
        raise DownloadFailed(f"its sha256 is {found}, expected {state.sha256}: damaged on the way, or another file")


def _attempt(url: str, file: Any, state: _Progress, bar: Any) -> None:
    """Read until the end or until the connection breaks; goes on at ``state.have`` where the server lets us."""
    headers = {"User-Agent": "gn_det", "Accept-Encoding": "identity"}
    if state.have and state.validator:
        headers |= {"Range": f"bytes={state.have}-", "If-Range": state.validator}
    redirects = _Redirects()
    with _opener(redirects).open(Request(url, headers=headers), timeout=TIMEOUT) as response:
        if response.status == 206:
            _check_rest(response.headers, state, asked="Range" in headers, file=file)
        else:
            state.restart(file)
            length = response.headers.get("Content-Length", "")
            state.total = int(length) if re.fullmatch(r"[0-9]{1,15}", length) else None
            etag = response.headers.get("ETag", "")
            weak = etag.startswith("W/")
            state.validator = response.headers.get("Last-Modified", "") if weak or not etag else etag
            state.sha256 = state.sha256 or redirects.sha256
            if bar is not None:
                bar.reset(state.total)
        while True:
            try:
                block = response.read1(_BLOCK)
            except http.client.IncompleteRead as error:
                block = error.partial
            if not block:
                return
            if state.have + len(block) > (_MAX_BYTES if state.total is None else state.total):
                announced = (
                    f"than {_MAX_BYTES} bytes without announcing it"
                    if state.total is None
                    else f"than the {state.total} bytes announced"
                )
                raise DownloadFailed(f"the server sends more {announced}")
            file.write(block)
            state.digest.update(block)
            state.have += len(block)
            if bar is not None:
                bar.update(len(block))


def _check_rest(headers: Any, state: _Progress, asked: bool, file: Any) -> None:
    """Check that an answer of a part is the rest of the very file that we have the beginning of.

    Raises:
        _Anew: it is not; what we have is dropped.
    """
    match = re.fullmatch(
        r"bytes ([0-9]{1,15})-([0-9]{1,15})/([0-9]{1,15}|\*)", headers.get("Content-Range", "").strip()
    )
    same = state.validator == headers.get("ETag" if state.validator.startswith('"') else "Last-Modified", "")
    if asked and match and same and match[1] == str(state.have):
        total = state.total
        if total is None or (match[3] in ("*", str(total)) and match[2] == str(total - 1)):
            return
    state.restart(file)
    raise _Anew("the server sent another part of the file than the missing one")


def _opener(redirects: HTTPRedirectHandler) -> OpenerDirector:
    """http and https alone: a redirect to file: or ftp: finds no handler."""
    opener = OpenerDirector()
    handlers = (ProxyHandler, UnknownHandler, HTTPHandler, HTTPSHandler, HTTPDefaultErrorHandler, HTTPErrorProcessor)
    for handler in (*(kind() for kind in handlers), redirects):
        opener.add_handler(handler)
    return opener


class _Redirects(HTTPRedirectHandler):
    """Hugging Face tells the sha256 of a large file in the answer that redirects to its storage."""

    sha256 = ""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if urlparse(newurl).scheme not in ("http", "https"):
            raise DownloadFailed(f"the server redirects to {one_line(newurl)}, which is neither http nor https")
        told = headers.get("X-Linked-ETag", "").strip('"')
        self.sha256 = told if re.fullmatch(r"[0-9a-f]{64}", told) else self.sha256
        return super().redirect_request(req, fp, code, msg, headers, newurl)


@contextlib.contextmanager
def _bar(url: str) -> Iterator[Any]:
    """A progress bar on a terminal, a line in the log elsewhere."""
    logger.info("Downloading %s", url)
    try:
        from tqdm import tqdm
    except ImportError:
        yield None
        return
    name = one_line(urlparse(url).path.rsplit("/", 1)[-1], 40)
    with tqdm(unit="B", unit_scale=True, unit_divisor=1024, desc=name, disable=None, delay=1) as bar:
        yield bar
