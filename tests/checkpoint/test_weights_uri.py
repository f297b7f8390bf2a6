"""URIs become local files; offline says what to place where; never half a file in the cache."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from gn_det.checkpoint import download
from gn_det.checkpoint.io import read_head
from gn_det.checkpoint.weights_uri import CATALOG, MIRROR, cache_path, local_path, resolve_url
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
        ("catalog://ImageNetPretrained/FAIR/R-50GN" + "N" * 300, "catalog://ImageNetPretrained/FAIR/R-50-GN"),
        ("zoo://resnet50_gn", "unknown scheme zoo://"),
        ("open-mmlab://resnet50_gn", "open-mmlab://detectron/resnet50_gn"),
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


UP = "/".join([".."] * 12)


@pytest.mark.parametrize(
    "uri",
    [
        f"http://host/a/{UP}/lib/python3/site-packages/zz.pth",
        f"https://host/{UP}/zz.pth",
        f"http://host/a/{UP.replace('..', '%2e%2e')}/zz.pth",
        f"http://host/a/{UP.replace('..', '%252E%252e')}/zz.pth",
        f"http://host/a/{UP.replace('..', '%25252e%25252e')}/zz.pth",
        f"http://host/a/{UP.replace('/', '%2F')}%2fzz.pth",
        "http://host/a/..%5c..%5c..%5czz.pth",
        "http://host/a/..\\..\\..\\zz.pth",
        "http://host/a/.\t./.\t./.\t./zz.pth",
        "http://host/a/./zz.pth",
        "http://host/a%00.pth",
        "http://host/a\0.pth",
        "http://host/a/",
        "http://host/",
        "http://host",
        "http://",
        "http://[/a.pth",
        "http://host/" + "a/" * 1500 + "w.pth",
        "http://host/a b.pth",
        "http://host/link/zz.pth",
        "http://host/loop/zz.pth",
        "http://host/up/up/up/up/zz.pth",
        f"detectron2://{UP}/zz.pkl",
        f"hf://owner/name/{UP}/zz.pth",
        "hf://../../zz.pth",
        "timm://../zz",
        "timm://..",
        f"catalog://{UP}/zz",
        f"open-mmlab://{UP}/zz",
    ],
)
@pytest.mark.parametrize("mirror", ["", "folder"])
def test_no_uri_leads_out_of_the_cache_or_the_mirror(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uri: str, mirror: str
) -> None:
    """Nothing is fetched, nothing is written, one line says so."""
    for base in ("deep/cache", "deep/mirror"):
        (tmp_path / base).mkdir(parents=True)
        (tmp_path / base / "link").symlink_to(tmp_path)
        (tmp_path / base / "loop").symlink_to("loop")
        (tmp_path / base / "up").symlink_to("..")
    (tmp_path / "zz.pth").write_bytes(b"outside")
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "deep" / "cache"))
    monkeypatch.setenv(MIRROR, str(tmp_path / "deep" / "mirror") if mirror else "")
    monkeypatch.setattr(download, "fetch", lambda *args, **more: pytest.fail(f"fetched {args}"))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(WeightsError) as caught:
        local_path(uri)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 1000
    assert sorted(tmp_path.rglob("*")) == before


def test_a_mirror_may_not_be_left_either(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache has no such link, so only the mirror's own check can refuse it."""
    (tmp_path / "mirror").mkdir()
    (tmp_path / "mirror" / "link").symlink_to(tmp_path)
    (tmp_path / "zz.pth").write_bytes(b"outside")
    monkeypatch.setenv(MIRROR, str(tmp_path / "mirror"))
    with pytest.raises(WeightsError, match=rf"names no file inside the folder .*mirror .*{MIRROR} sets the folder"):
        local_path("http://host/link/zz.pth")


def test_a_folder_in_the_cache_is_no_file(tmp_path: Path) -> None:
    (tmp_path / "cache" / "a").mkdir(parents=True)
    with pytest.raises(WeightsError, match="is a folder; give the URL of a file"):
        local_path("http://host/a")


def test_names_as_they_stand_in_urls(tmp_path: Path) -> None:
    """What is encoded stays so, as in iopath's cache; the scheme's case and doubled slashes do not matter."""
    for uri, place in (
        ("https://h/a/w%20x.pth", "a/w%20x.pth"),
        ("HTTPS://h/a//ü.pth?y=1", "a/ü.pth"),
        ("hf://o/n/c/d.pth", "o/n/resolve/main/c/d.pth"),
    ):
        file = tmp_path / "cache" / place
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
        assert local_path(uri) == file


@pytest.mark.parametrize("name", ["#sha256=", "#SHA256=", "#Sha256="])
@pytest.mark.parametrize("place", ["http://host/w.pth", "local"])
def test_a_digest_counts_in_any_letter_case(tmp_path: Path, name: str, place: str) -> None:
    file = tmp_path / "cache" / "w.pth"
    file.parent.mkdir()
    file.write_bytes(WEIGHTS)
    uri, digest = (str(file) if place == "local" else place), hashlib.sha256(WEIGHTS).hexdigest()
    for good in (digest, digest.upper(), digest[:8].upper()):
        assert local_path(f"{uri}{name}{good}") == file
    for bad in (digest[::-1], "0" * 64, digest[:-1] + ("0" if digest[-1] != "0" else "1")):
        with pytest.raises(WeightsError, match="has sha256"):
            local_path(f"{uri}{name}{bad}")
    for ill in ("", "abc", "g" * 64, digest + "0", digest[:8] + " "):
        with pytest.raises(WeightsError, match="8 to 64 hexadecimal digits"):
            local_path(f"{uri}{name}{ill}")


def test_other_fragments_are_errors(tmp_path: Path) -> None:
    for uri in ("http://host/w.pth#md5=12345678", "timm://resnet50_gn#x", "http://h/w.pth#sha256=12345678#x"):
        with pytest.raises(WeightsError, match=r"unknown fragment|8 to 64 hexadecimal"):
            local_path(uri)
    with pytest.raises(WeightsError, match="matching_heuristics must be True or False"):
        local_path(f"http://host/w.pth?matching_heuristics=True#sha256={'0' * 64}")
    assert local_path("a#b.pth") == Path("a#b.pth")  # a local file may be named so
    with pytest.raises(WeightsError, match="no such file"):
        read_head(local_path("~no_such_user_here/w.pth"))
