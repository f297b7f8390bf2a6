"""Download a file over http(s) into iopath's cache: resumed after a broken connection, verified, all or nothing.

Bytes go to a hidden file beside the target, which is renamed only when it is complete and its sha256, if known, is
right. A lock beside it makes other processes wait for the download.
"""

from __future__ import annotations

import hashlib
import http.client
import logging
import os
import re
import ssl
import time
from pathlib import Path
from typing import Any, BinaryIO
from urllib.error import HTTPError, URLError
from urllib.parse import urlparse
from urllib.request import HTTPRedirectHandler, Request, build_opener

from gn_det.checkpoint.io import not_weights
from gn_det.text import one_line

logger = logging.getLogger(__name__)

TIMEOUT = 30.0  # seconds without a byte until an attempt fails
ATTEMPTS = 5  # in a row without a single new byte
_RESTARTS = 10  # from the first byte, because the server did not send the rest
_WAIT = 0.5  # seconds before the second attempt, doubled for each further one
_BLOCK = 1 << 20
_MAX_BYTES = 1 << 34  # from a server that does not announce a length
_NETWORK = (URLError, ConnectionError, TimeoutError, ssl.SSLError, http.client.HTTPException)
_BUSY = (408, 429, 500, 502, 503, 504)  # worth another attempt
# Publishers that put the start of the sha256 into the file name.
_HASH_IN_NAME = re.compile(r"-([0-9a-f]{8,64})\.(?:pth|pt|pkl|safetensors)$")
_HASHING_HOSTS = ("download.pytorch.org", "download.openmmlab.com", "github.com")


class DownloadFailed(Exception):
    """The reason in one line, without the URL."""


def fetch(url: str, target: Path, *, source: str, sha256: str = "") -> None:
    """Download ``target`` from ``source``, which is ``url`` or its mirror, if it does not exist.

    ``sha256`` is a hex digest or the start of one; "" uses the published one, if known.

    Raises:
        DownloadFailed: no connection, not found, interrupted too often, wrong sha256, or not weights. No file is left.
    """
    from iopath.common.file_io import file_lock
    from tqdm import tqdm

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(str(target)):
            if target.is_file():  # another process was faster
                return
            for stale in target.parent.glob(f".{target.name}.part-*"):  # left by a killed process; we hold the lock
                stale.unlink(missing_ok=True)
            part = target.with_name(f".{target.name}.part-{os.getpid()}")
            try:
                logger.info("Downloading %s", url)
                look = {"desc": one_line(target.name, 40), "unit": "B", "unit_scale": True, "unit_divisor": 1024}
                with open(part, "w+b") as file, tqdm(disable=None, delay=1, **look) as bar:
                    _Download(source, file, bar, sha256 or _published_hash(url)).run()
                    file.flush()
                    os.fsync(file.fileno())
                    file.seek(0)
                    if what := not_weights(file.read(64)):
                        raise DownloadFailed(f"instead of weights the server sent {what}")
                os.replace(part, target)
            finally:
                part.unlink(missing_ok=True)
    except OSError as error:
        raise DownloadFailed(one_line(error.strerror or error)) from error


def _published_hash(url: str) -> str:
    parsed = urlparse(url)
    match = _HASH_IN_NAME.search(parsed.path)
    return match[1] if match and parsed.hostname in _HASHING_HOSTS else ""


class _Download:
    """Download of one file, over as many connections as needed."""

    total: int | None

    def __init__(self, url: str, file: BinaryIO, bar: Any, sha256: str) -> None:
        self.url, self.file, self.bar, self.sha256 = url, file, bar, sha256
        self.begun = -1  # restarts from the first byte
        self.restart()

    def restart(self) -> None:
        """Discard the bytes received so far."""
        self.file.seek(0)
        self.file.truncate()
        self.have, self.total, self.digest = 0, None, hashlib.sha256()
        self.validator = ""  # ETag or date that identifies the version we have part of
        self.begun += 1

    def run(self) -> None:
        failures = 0
        while True:
            before = self.have
            try:
                self.attempt()
                if self.total in (None, self.have):
                    break  # without a length, the closed connection is the end
                reason = f"retrieval incomplete: got only {self.have} out of {self.total} bytes"
            except HTTPError as error:
                reason = f"{error.code} {one_line(error.reason)}"
                if error.code == 416 and self.have:  # its length has changed
                    self.restart()
                elif error.code not in _BUSY:
                    raise DownloadFailed(reason) from error
            except _NETWORK as error:  # any other OSError comes from the disk
                reason = one_line(getattr(error, "reason", "") or str(error) or type(error).__name__)
                if self.have == 0 and isinstance(error, URLError):
                    raise DownloadFailed(reason) from error  # no such host, no network: waiting will not help
            except ValueError as error:  # a URL or an answer that http.client cannot express
                raise DownloadFailed(one_line(error)) from error
            failures = 0 if self.have > before else failures + 1
            if failures >= ATTEMPTS or self.begun > _RESTARTS:
                raise DownloadFailed(f"{reason}, {ATTEMPTS if failures >= ATTEMPTS else self.begun} attempts")
            time.sleep(_WAIT * 2 ** max(0, failures - 1))
        if self.have == 0:
            raise DownloadFailed("the server sent an empty file")
        found = self.digest.hexdigest()
        if not found.startswith(self.sha256.lower()):
            raise DownloadFailed(f"its sha256 is {found}, expected {self.sha256}: it is damaged or a different file")

    def attempt(self) -> None:
        """Read until the end or until the connection breaks; continue at ``have`` if the server supports it."""
        headers = {"User-Agent": "gn_det", "Accept-Encoding": "identity"}
        if self.have and self.validator:
            headers |= {"Range": f"bytes={self.have}-", "If-Range": self.validator}
        redirects = _Redirects()
        with build_opener(redirects).open(Request(self.url, headers=headers), timeout=TIMEOUT) as response:
            if response.status == 206:
                if "Range" not in headers or not self._is_rest(response.headers):
                    self.restart()
                    raise ConnectionError("the server sent the wrong part of the file")
            else:
                self.restart()
                length = response.headers.get("Content-Length", "")
                self.total = int(length) if re.fullmatch(r"[0-9]{1,15}", length) else None
                etag = response.headers.get("ETag", "")
                strong = etag and not etag.startswith("W/")
                self.validator = etag if strong else response.headers.get("Last-Modified", "")
                self.sha256 = self.sha256 or redirects.sha256
                self.bar.reset(self.total)
            self._read(response)

    def _is_rest(self, headers: Any) -> bool:
        """Return whether a partial response continues the file that we have the start of."""
        sent = headers.get("Content-Range", "").strip()
        part = re.fullmatch(r"bytes (\d{1,15})-(\d{1,15})/(\d{1,15}|\*)", sent, re.A)
        validator = headers.get("ETag" if self.validator.startswith('"') else "Last-Modified", "")
        if not part or validator != self.validator or int(part[1]) != self.have:
            return False
        return self.total is None or (int(part[2]) == self.total - 1 and part[3] in ("*", str(self.total)))

    def _read(self, response: Any) -> None:
        while True:
            try:
                block = response.read1(_BLOCK)
            except http.client.IncompleteRead as error:
                block = error.partial
            if not block:
                return
            if self.have + len(block) > (most := _MAX_BYTES if self.total is None else self.total):
                announced = "announced" if self.total is not None else "that are read without an announced length"
                raise DownloadFailed(f"the server sends more than the {most} bytes {announced}")
            self.file.write(block)
            self.digest.update(block)
            self.have += len(block)
            self.bar.update(len(block))


class _Redirects(HTTPRedirectHandler):
    """Hugging Face sends the sha256 of a large file in the response that redirects to its storage."""

    sha256 = ""

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if urlparse(newurl).scheme not in ("http", "https"):
            raise DownloadFailed(f"the server redirects to {one_line(newurl)}, which is neither http nor https")
        digest = headers.get("X-Linked-ETag", "").strip('"')
        self.sha256 = digest if re.fullmatch(r"[0-9a-f]{64}", digest) else self.sha256
        return super().redirect_request(req, fp, code, msg, headers, newurl)
