"""URIs become local files; offline says what to place where; never half a file in the cache."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gn_det.checkpoint import download
from gn_det.checkpoint.catalog import CATALOG, MIRROR, cache_path, local_path, resolve_url
from gn_det.errors import WeightsError

BASE = "https://dl.fbaipublicfiles.com"
WEIGHTS = b"\x80\x02}q\x00N." * 1000


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(MIRROR, raising=False)
    monkeypatch.setattr(download, "_WAIT", 0.01)


@pytest.mark.parametrize(
    ("uri", "url"),
    [
        (
            "catalog://ImageNetPretrained/FAIR/R-50-GN",
            f"{BASE}/detectron/ImageNetPretrained/47261647/R-50-GN.pkl",
        ),
        (
            "catalog://ImageNetPretrained/FAIR/R-101-GN",
            f"{BASE}/detectron/ImageNetPretrained/47592356/R-101-GN.pkl",
        ),
        ("catalog://ImageNetPretrained/MSRA/R-50", f"{BASE}/detectron/ImageNetPretrained/MSRA/R-50.pkl"),
        ("detectron2://ImageNetPretrained/MSRA/R-101.pkl", f"{BASE}/detectron2/ImageNetPretrained/MSRA/R-101.pkl"),
        ("https://example.org/a/w.pth?matching_heuristics=True", "https://example.org/a/w.pth"),
        ("timm://resnet50_gn", "https://huggingface.co/timm/resnet50_gn.a1h_in1k/resolve/main/model.safetensors"),
        (
            "timm://resnet50_gn.a1h_in1k",
            "https://huggingface.co/timm/resnet50_gn.a1h_in1k/resolve/main/model.safetensors",
        ),
        ("hf://a/b/c/d.pth", "https://huggingface.co/a/b/resolve/main/c/d.pth"),
        (
            "open-mmlab://detectron/resnet50_gn",
            "https://download.openmmlab.com/pretrain/third_party/resnet50_gn-9186a21c.pth",
        ),
        ("weights/w.pth", None),
        ("file:///w.pth", None),
    ],
)
def test_urls(uri: str, url: str | None) -> None:
    assert resolve_url(uri) == url


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("catalog://ImageNetPretrained/FAIR/R-50GN", "catalog://ImageNetPretrained/FAIR/R-50-GN"),
        ("zoo://resnet50_gn", "scheme zoo:// is not known"),
        ("open-mmlab://resnet50_gn", "open-mmlab:// knows detectron/resnet50_gn"),
        ("hf://resnet50_gn", "hf://OWNER/NAME"),
        ("", "MODEL.WEIGHTS is empty"),
    ],
)
def test_unknown_names(uri: str, expected: str) -> None:
    with pytest.raises(WeightsError) as caught:
        local_path(uri)
    assert expected in str(caught.value)


def test_local_paths(tmp_path: Path) -> None:
    assert local_path(tmp_path / "ü.pth") == tmp_path / "ü.pth"
    assert local_path("file:///a/b.pth") == Path("/a/b.pth")
    assert local_path("~/b.pth") == Path.home() / "b.pth"


@pytest.mark.parametrize("name", sorted(CATALOG))
def test_a_placed_file_is_found(name: str) -> None:
    """What the offline message asks for works."""
    placed = cache_path(CATALOG[name])
    placed.parent.mkdir(parents=True)
    placed.touch()
    assert local_path(f"catalog://{name}") == placed


def test_offline_names_url_file_and_place(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(WeightsError) as caught:
        local_path("catalog://ImageNetPretrained/FAIR/R-50-GN")
    message = str(caught.value)
    url = CATALOG["ImageNetPretrained/FAIR/R-50-GN"]
    assert "\n" not in message and url in message and "MODEL.WEIGHTS" in message
    assert f"place the file at {tmp_path}/cache/detectron/ImageNetPretrained/47261647/R-50-GN.pkl" in message
    assert capfd.readouterr().err == ""  # no progress bar of a download that never began


class _Handler(http.server.BaseHTTPRequestHandler):
    requests = 0

    def do_GET(self) -> None:
        type(self).requests += 1
        content = WEIGHTS
        self.send_response(404 if "missing" in self.path else 200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content[:100] if "broken" in self.path else content)

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[str]:
    _Handler.requests = 0
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()
    thread.join()


def test_download_once(server: str) -> None:
    path = local_path(f"{server}/a/w.pkl?matching_heuristics=True")
    assert path.read_bytes() == WEIGHTS
    requests = _Handler.requests
    assert path == cache_path(f"{server}/a/w.pkl") == local_path(f"{server}/a/w.pkl")
    assert _Handler.requests == requests


@pytest.mark.parametrize(("name", "reason"), [("broken.pkl", "100 out of 7000 bytes"), ("missing.pkl", "Not Found")])
def test_a_broken_download_leaves_no_file(server: str, tmp_path: Path, name: str, reason: str) -> None:
    with pytest.raises(WeightsError) as caught:
        local_path(f"{server}/a/{name}")
    assert reason in str(caught.value) and "place the file at" in str(caught.value)
    assert not cache_path(f"{server}/a/{name}").exists()
    assert [f.name for f in (tmp_path / "cache").rglob("*") if f.is_file() and f.suffix != ".lock"] == []
