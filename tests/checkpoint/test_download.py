"""Downloads against a server that breaks off: resumed, verified, and never half a file in the cache."""

from __future__ import annotations

import hashlib
import http.server
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gn_det.checkpoint import download
from gn_det.checkpoint.weights_uri import CATALOG, MIRROR, cache_path, local_path
from gn_det.errors import WeightsError

CONTENT = (b"PK\x03\x04" + bytes(range(4, 256))) * 1200  # 300 kB that begin as an archive of torch.save
CHANGED = CONTENT[:4] + CONTENT[4:][::-1]
SHA = hashlib.sha256(CONTENT).hexdigest()
STEP = 70_000
LIES = ("etag", "no-etag", "start", "end", "total", "no-range", "too-short", "unasked", "more")
NO_WEIGHTS = {
    "page": (b"<!DOCTYPE html><html>Sign in</html>", "a web page or XML"),
    "xml": (b"\n  <?xml version='1.0'?><Error>AccessDenied</Error>", "a web page or XML"),
    "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer"),
    "json": (b'{"error": "not found"}', "something that begins with"),
    "gzip": (b"\x1f\x8b\x08\0\0", "a gzip archive"),
    "text": (b"\x1b[2JToo many requests", "something that begins with"),
}


class Server(http.server.ThreadingHTTPServer):
    """What a path begins with says how the server misbehaves."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.log: list[tuple[str, str | None]] = []  # path, Range
        self.etag = '"one"'
        self.release = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(http.server.BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        wanted = self.headers.get("Range")
        self.server.log.append((self.path, wanted))
        way = self.path.split("/")[1]
        if way == "redirect":
            self.send_response(302)
            told = {"good": SHA, "bad": "0" * 64, "longer": "0" * 65, "parts": f"{'0' * 64}-2"}[self.path.split("/")[2]]
            self.send_header("X-Linked-ETag", f'"{told}"')
            self.send_header("Location", "/whole/blob")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if way == "elsewhere":
            self.send_response(302)
            self.send_header(
                "Location",
                {"file": "file:///etc/passwd", "ftp": "ftp://127.0.0.1/x"}.get(
                    self.path.split("/")[2], f"/elsewhere/loop/{len(self.server.log)}"
                ),
            )
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if way in LIES:
            self.lie(way, wanted)
            return
        if way == "missing" or (way == "busy" and len(self.server.log) < 3):
            self.send_error(404 if way == "missing" else 503)
            return
        begin = 0
        ranges = way in ("breaks", "changes") and wanted and self.headers.get("If-Range") == self.server.etag
        if ranges and wanted:
            begin = int(wanted.removeprefix("bytes=").removesuffix("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {begin}-{len(CONTENT) - 1}/{len(CONTENT)}")
        else:
            self.send_response(200)
        content = CONTENT if self.server.etag == '"one"' else CHANGED
        body = b"" if way == "empty" else content[begin:]
        body = NO_WEIGHTS[way][0] if way in NO_WEIGHTS else body
        if way != "chunkless":
            self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", self.server.etag)
        self.end_headers()
        if way in ("breaks", "changes", "norange", "stuck"):
            first = len([p for p, _ in self.server.log if p == self.path]) == 1
            self.wfile.write(body[:STEP] if way != "norange" or first else body)
            self.wfile.flush()
            if way == "stuck":
                self.server.release.wait(30)
            if way == "changes":
                self.server.etag = '"two"'
        else:
            self.wfile.write(body)

    def lie(self, way: str, wanted: str | None) -> None:
        """The first answer breaks off after STEP bytes; what is sent as the rest is not the rest."""
        begin = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted else 0
        last, total = len(CONTENT) - 1, len(CONTENT)
        body, etag, part = CONTENT[begin:], self.server.etag, f"bytes {begin}-{last}/{total}"
        if wanted and way == "etag":
            etag, body = '"two"', CHANGED[begin:]
        elif wanted and way == "no-etag":
            etag, body = "", CHANGED[begin:]
        elif wanted and way == "start":
            part, body = f"bytes 0-{last}/{total}", CONTENT
        elif wanted and way == "end":
            part = f"bytes {begin}-{last - 1}/{total}"
        elif wanted and way == "total":
            part = f"bytes {begin}-{last}/{total + 1}"
        elif wanted and way == "no-range":
            part = ""
        elif way == "unasked":
            wanted = wanted or "bytes=0-"
        elif wanted and way == "too-short":
            self.send_error(416)
            return
        self.send_response(206 if wanted else 200)
        for name, value in (("Content-Range", part if wanted else ""), ("ETag", etag)):
            if value:
                self.send_header(name, value)
        if way == "more":
            self.send_header("Content-Length", "100")
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(CONTENT), CONTENT))
            return
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        first = len([p for p, _ in self.server.log if p == self.path]) == 1
        self.wfile.write(body[:STEP] if first else body)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(download, "_WAIT", 0.01)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield server
    server.release.set()
    server.shutdown()
    server.server_close()
    thread.join()


def cached(tmp_path: Path) -> list[str]:
    return [f.name for f in (tmp_path / "cache").rglob("*") if f.is_file() and f.suffix != ".lock"]


@pytest.mark.parametrize("way", ["whole", "breaks", "norange", "chunkless", "busy"])
def test_the_file_arrives_whole(server: Server, tmp_path: Path, way: str) -> None:
    path = local_path(f"{server.url}/{way}/w.pth")
    assert path == tmp_path / "cache" / way / "w.pth" and path.read_bytes() == CONTENT
    assert cached(tmp_path) == ["w.pth"]
    ranges = [wanted for _, wanted in server.log]
    if way == "breaks":  # each attempt brings 70 kB more, none is fetched twice
        assert ranges == [None, "bytes=70000-", "bytes=140000-", "bytes=210000-", "bytes=280000-"]
    elif way == "norange":
        assert ranges == [None, "bytes=70000-"]
    before = len(server.log)
    assert local_path(f"{server.url}/{way}/w.pth") == path and len(server.log) == before


def test_a_file_that_changes_between_attempts_begins_anew(server: Server) -> None:
    """The second attempt offers the validator of the first, which no longer holds: no two versions are joined."""
    path = local_path(f"{server.url}/changes/w.pth")
    assert path.read_bytes() == CHANGED
    assert [wanted for _, wanted in server.log][:3] == [None, "bytes=70000-", "bytes=70000-"]


def test_a_weak_etag_recognizes_no_version(server: Server, tmp_path: Path) -> None:
    """It stands for several files: what broke off begins with nothing."""
    server.etag = 'W/"one"'
    assert local_path(f"{server.url}/norange/w.pth").read_bytes() == CHANGED
    assert [wanted for _, wanted in server.log] == [None, None]
    server.etag = '"one"'
    url, target = f"{server.url}/whole/w.pth", tmp_path / "upper.pth"
    download.fetch(url, target, source=url, sha256=SHA.upper())
    assert target.read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("missing/w.pth", "404 Not Found"),
        ("empty/w.pth", "the server sent an empty file"),
        (f"whole/w.pth#sha256={'0' * 64}", f"its sha256 is {SHA}, expected {'0' * 64}"),
        ("redirect/bad/w.pth", f"its sha256 is {SHA}, expected {'0' * 64}"),
    ],
)
def test_nothing_is_left_of_a_failure(server: Server, tmp_path: Path, path: str, expected: str) -> None:
    with pytest.raises(WeightsError) as caught:
        local_path(f"{server.url}/{path}")
    message = str(caught.value)
    assert expected in message and "\n" not in message
    assert f"place the file at {cache_path(f'{server.url}/{path}')}" in message
    assert cached(tmp_path) == []


def test_sha256_from_the_user_and_from_hugging_face(server: Server, tmp_path: Path) -> None:
    assert local_path(f"{server.url}/whole/w.pth#sha256={SHA[:12]}").read_bytes() == CONTENT
    assert local_path(f"{server.url}/redirect/good/w.pth").read_bytes() == CONTENT
    assert local_path(f"{server.url}/norange/w.pth#sha256={SHA}").read_bytes() == CONTENT  # of the second attempt alone
    for other in ("longer", "parts"):  # no sha256: the tag of an upload in parts, say
        assert local_path(f"{server.url}/redirect/{other}/w.pth").read_bytes() == CONTENT
    # What lies in the cache is verified too when the user asks.
    (tmp_path / "cache" / "whole" / "w.pth").write_bytes(b"other")
    with pytest.raises(WeightsError, match="delete it and download it again"):
        local_path(f"{server.url}/whole/w.pth#sha256={SHA}")


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("https://download.pytorch.org/models/resnet50-0676ba61.pth", "0676ba61"),
        ("https://download.openmmlab.com/pretrain/third_party/resnet50_gn-9186a21c.pth", "9186a21c"),
        ("https://example.org/run-20240101.pth", ""),
        ("https://download.pytorch.org/models/resnet50.pth", ""),
    ],
)
def test_hashes_in_names_count_where_publishers_put_them(url: str, expected: str) -> None:
    assert download._published_hash(url) == expected


def test_a_mirror_on_a_server(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MIRROR, f"{server.url}/whole/")
    path = local_path("catalog://ImageNetPretrained/FAIR/R-50-GN")
    assert path == cache_path(CATALOG["ImageNetPretrained/FAIR/R-50-GN"]) and path.read_bytes() == CONTENT
    assert server.log == [("/whole/detectron/ImageNetPretrained/47261647/R-50-GN.pkl", None)]
    monkeypatch.setenv(MIRROR, f"{server.url}/missing")
    with pytest.raises(WeightsError, match=f"from the mirror {server.url}/missing/detectron2/x.pkl"):
        local_path("detectron2://x.pkl")


def test_a_mirror_in_a_folder_is_a_copy_of_a_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv(MIRROR, str(tmp_path / "mirror"))
    file = tmp_path / "mirror" / "timm" / "resnet50_gn.a1h_in1k" / "resolve" / "main" / "model.safetensors"
    with pytest.raises(WeightsError, match=rf"the mirror has no file {re.escape(str(file))} \(GN_DET_MIRROR\)"):
        local_path("timm://resnet50_gn")
    file.parent.mkdir(parents=True)
    file.write_bytes(b"x")
    assert local_path("timm://resnet50_gn") == file


def test_hub_mirror(monkeypatch: pytest.MonkeyPatch) -> None:
    from gn_det.checkpoint.weights_uri import resolve_url

    monkeypatch.setenv("HF_ENDPOINT", "https://hub.example.org/")
    assert resolve_url("hf://a/b") == "https://hub.example.org/a/b/resolve/main/model.safetensors"


def test_two_at_once_download_once(server: Server) -> None:
    paths: list[Path] = []
    url = f"{server.url}/breaks/w.pth"
    threads = [threading.Thread(target=lambda: paths.append(local_path(url))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == 4 and len(set(paths)) == 1 and paths[0].read_bytes() == CONTENT
    assert len([wanted for _, wanted in server.log if wanted is None]) == 1


def test_a_killed_download_leaves_nothing_that_passes_for_the_file(server: Server, tmp_path: Path) -> None:
    url = f"{server.url}/stuck/w.pth"
    code = f"from gn_det.checkpoint.weights_uri import local_path; local_path({url!r})"
    process = subprocess.Popen([sys.executable, "-c", code], env=os.environ, stderr=subprocess.DEVNULL)
    while not any(f.stat().st_size == STEP for f in (tmp_path / "cache").rglob(".w.pth.part-*")):
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert not cache_path(url).exists() and len(cached(tmp_path)) == 1
    server.release.set()
    with pytest.raises(WeightsError, match="got only 70000 out of 307200"):
        local_path(url)
    assert cached(tmp_path) == []  # also the part of the killed process


def test_a_folder_that_cannot_be_made_is_named(server: Server, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(WeightsError) as caught:
        local_path(f"{server.url}/whole/w.pth")
    assert "cannot download" in str(caught.value) and "\n" not in str(caught.value)


def test_no_network_fails_at_the_first_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(download.time, "sleep", waits.append)
    with pytest.raises(download.DownloadFailed, match="Connection refused"):
        download.fetch("http://127.0.0.1:9/x.pth", tmp_path / "x.pth", source="http://127.0.0.1:9/x.pth")
    assert waits == []


@pytest.mark.parametrize("way", sorted(NO_WEIGHTS))
def test_what_is_not_weights_is_not_kept(server: Server, tmp_path: Path, way: str) -> None:
    with pytest.raises(WeightsError) as caught:
        local_path(f"{server.url}/{way}/w.pth")
    assert f"instead of weights the server sent {NO_WEIGHTS[way][1]}" in str(caught.value)
    assert str(caught.value).isprintable() and cached(tmp_path) == []


@pytest.mark.parametrize("way", ["etag", "no-etag", "start", "end", "total", "no-range", "too-short"])
def test_a_rest_that_is_not_the_rest_is_dropped(server: Server, tmp_path: Path, way: str) -> None:
    """The download begins anew, without asking for a part; no two versions are joined."""
    assert local_path(f"{server.url}/{way}/w.pth").read_bytes() == CONTENT
    assert [wanted for _, wanted in server.log] == [None, "bytes=70000-", None]


def test_a_part_that_was_not_asked_for(server: Server, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="wrong part of the file"):
        local_path(f"{server.url}/unasked/w.pth")
    assert cached(tmp_path) == [] and len(server.log) <= download.ATTEMPTS


def test_no_more_is_written_than_was_announced(server: Server, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="sends more than the 100 bytes announced"):
        local_path(f"{server.url}/more/w.pth")
    assert cached(tmp_path) == []


@pytest.mark.parametrize(
    ("where", "expected"),
    [("file", r"file:///etc/passwd.* is not allowed"), ("ftp", "redirects to ftp://"), ("loop", "302")],
)
def test_redirects_stay_on_the_web_and_end(server: Server, tmp_path: Path, where: str, expected: str) -> None:
    with pytest.raises(WeightsError, match=expected):
        local_path(f"{server.url}/elsewhere/{where}/w.pth")
    assert cached(tmp_path) == [] and len(server.log) <= 11


def test_a_server_that_always_begins_anew_is_given_up(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each attempt brings more than the one before, so that none counts as a failure."""
    attempts: list[int] = []

    def attempt(self: Any) -> None:
        attempts.append(1)
        self.restart()
        self.total, self.have = 10**9, len(attempts)

    monkeypatch.setattr(download._Download, "attempt", attempt)
    with pytest.raises(WeightsError, match="attempts"):
        local_path(f"{server.url}/whole/w.pth")
    assert len(attempts) == 11
