"""Push to a local server that speaks the Hub's protocol, and pull what was pushed."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

pytest.importorskip("huggingface_hub", reason="needs huggingface_hub (extra hub)")

from gn_det.checkpoint import hub
from gn_det.checkpoint.io import read_any, save_checkpoint
from gn_det.checkpoint.meta import build_meta, read_meta
from gn_det.checkpoint.weights_uri import local_path
from gn_det.cli import main
from gn_det.config import load_config
from gn_det.errors import ConfigError, UserError, WeightsError


class Hub(ThreadingHTTPServer):
    """Keeps the files of one repository; small files come in the commit itself."""

    files: dict[str, bytes]
    refuse = False


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def _answer(self, body: bytes, status: int = 200, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        url = f"http://127.0.0.1:{self.server.server_port}"
        if self.server.refuse:
            self._answer(b'{"error": "Invalid username or password."}', 401)
        elif self.path == "/api/repos/create":
            self._answer(json.dumps({"url": f"{url}/me/x"}).encode())
        elif self.path.endswith("/preupload/main"):
            names = [f["path"] for f in json.loads(body)["files"]]
            files = [{"path": n, "uploadMode": "regular", "shouldIgnore": False, "oid": None} for n in names]
            self._answer(json.dumps({"files": files}).encode())
        elif "/commit/main" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.server.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            done = {"commitUrl": f"{url}/me/x/commit/{'0' * 40}", "commitOid": "0" * 40, "success": True}
            self._answer(json.dumps(done).encode())
        else:
            self._answer(json.dumps({"isValid": True, "message": "ok"}).encode())

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        known = "/resolve/main/" in self.path and name in self.server.files
        if self.path.startswith("/api/models/"):
            self._answer(json.dumps({"id": "me/x", "sha": "0" * 40, "siblings": [], "private": False}).encode())
        else:
            self._answer(self.server.files.get(name, b""), 200 if known else 404, "application/octet-stream")

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    httpd = Hub(("127.0.0.1", 0), Handler)
    httpd.files = {}
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{httpd.server_port}"
    monkeypatch.setenv("HF_ENDPOINT", url)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", url)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", url)
    monkeypatch.setenv("HF_TOKEN", "hf_test")
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))
    yield httpd
    httpd.shutdown()


def checkpoint(folder: Path, **more: object) -> Path:
    folder.mkdir()
    cfg = load_config("quickstart", ["OUTPUT_DIR", "/home/me/secret", "TEST.BEST_METRIC", "segm/AP"])
    meta = build_meta(cfg, ("cat", "<b>dog"), (1, 2), iteration=7)
    save_checkpoint(folder / "model_best.pth", {"model": {"w": torch.arange(3.0)}, "gn_det": meta, **more})
    lines = [{"iteration": 5, "bbox/AP": 50.0, "segm/AP": 41.26}, {"iteration": 7, "bbox/AP": 51.0, "segm/AP": 40.0}]
    (folder / "metrics.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "model_best.pth"


@pytest.mark.parametrize("line", ["[1]", "3", '{"bbox/AP": 60.0, "segm/AP": "x"}', '{"bbox/AP": [1]}', "{"])
def test_odd_lines_of_metrics_are_no_traceback(line: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text('{"bbox/AP": 50.0, "segm/AP": 41.26}\n' + line + "\n")
    found = hub._metrics(tmp_path / "model_best.pth")
    assert all(type(value) is float for value in found.values())
    assert found == {} if line == "{" else found["bbox/AP"] in (50.0, 60.0)


def test_what_was_pushed_can_be_pulled(server: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same bytes come back through hf://; card and config say norms, AP and classes, and no local path."""
    path = checkpoint(tmp_path / "run")
    assert main(["push", "--weights", str(path), "--repo", "me/x", "--license", "apache-2.0"]) == 0
    assert "load it with --weights hf://me/x/model.pth" in capsys.readouterr().out
    assert set(server.files) == {"model.pth", "config.yaml", "README.md"}
    pulled = local_path("hf://me/x/model.pth")
    assert Path(pulled).read_bytes() == path.read_bytes()
    meta = read_meta(read_any(pulled))
    assert meta is not None and meta["class_names"] == ("cat", "<b>dog")
    card, config = (server.files[name].decode() for name in ("README.md", "config.yaml"))
    for text in ("license: apache-2.0", "| mask head | GN |", "| mask AP | 41.3 |", "| box AP | 50.0 |", "- &lt;b>dog"):
        assert text in card
    assert "secret" not in card + config and "NORM: GN" in config


def test_what_cannot_be_pushed(server: Hub, tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "run")
    for repo in ("x", "a/b/c", "a b/c", "../x"):
        with pytest.raises(ConfigError, match="give OWNER/NAME"):
            hub.push(path, repo)
    training = checkpoint(tmp_path / "other", optimizer={"state": {}})
    with pytest.raises(WeightsError, match=r"push model_best\.pth"):
        hub.push(training, "me/x")
    server.refuse = True
    with pytest.raises(UserError, match="the Hub refused the upload") as raised:
        hub.push(path, "me/x")
    assert "\n" not in str(raised.value) and server.files == {}
