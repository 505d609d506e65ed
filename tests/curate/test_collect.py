"""Fetching from a server on 127.0.0.1 that does what bad servers do."""

import gzip
import socket
import tarfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import encoded
from unlabeled.curate import fetch
from unlabeled.curate.collect import collect, is_url_list
from unlabeled.curate.fetch import Fetcher, FetchError, is_public
from unlabeled.curate.recipe import CollectRecipe
from unlabeled.errors import UserError
from unlabeled.images.sources import open_source

IMAGE = encoded(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8), "JPEG")
BOMB = gzip.compress(bytes(5_000_000))
LIMITS = CollectRecipe(
    allow_private=True, timeout=1.0, max_bytes=100_000, retries=1, max_wait=1.0, delay=0.0, urls_per_shard=4
)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: Counter[str] = Counter()
        self.times: list[float] = []
        self.stopped = threading.Event()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name = self.path.strip("/").partition("/")[0]
        self.server.asked[self.path] += 1
        self.server.times.append(time.monotonic())
        with suppress(BrokenPipeError, ConnectionResetError):
            getattr(self, f"do_{name}", self.do_missing)()
        self.close_connection = True

    def say(self, body: bytes, status: int = 200, length: int | None = -1, **headers: str) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        if length is not None:
            self.send_header("Content-Length", str(len(body) if length < 0 else length))
        self.end_headers()
        self.wfile.write(body)

    def do_missing(self) -> None:
        self.say(b"", 404)

    def do_good(self) -> None:
        self.say(IMAGE, Content_Type="image/jpeg")

    def do_html(self) -> None:
        self.say(b"<!doctype html><p>no image", Content_Type="image/jpeg")

    def do_silent(self) -> None:
        self.server.stopped.wait(5)

    def do_drip(self) -> None:  # a byte of a header now and then: each read is in time, the whole never ends
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        while not self.server.stopped.wait(0.1):
            self.wfile.write(b"x")

    def do_endless(self) -> None:
        self.say(b"\xff\xd8\xff", length=None)
        while not self.server.stopped.is_set():
            self.wfile.write(bytes(10_000))

    def do_huge(self) -> None:
        self.say(b"", length=10**12)

    def do_cut(self) -> None:
        self.say(IMAGE[:100], length=len(IMAGE))

    def do_bomb(self) -> None:
        self.say(BOMB, Content_Encoding="gzip")

    def do_zipped(self) -> None:
        self.say(gzip.compress(IMAGE), Content_Encoding="gzip")

    def do_circle(self) -> None:
        self.say(b"", 302, Location="/circle/2" if self.path == "/circle" else "/circle")

    def do_far(self) -> None:
        self.say(b"", 302, Location=f"/far/{self.server.asked.total()}")

    def do_moved(self) -> None:
        self.say(b"", 301, Location="/good/there")

    def do_elsewhere(self) -> None:
        self.say(b"", 302, Location="file:///etc/passwd")

    def do_busy(self) -> None:
        busy = self.server.asked[self.path] == 1
        self.say(b"" if busy else IMAGE, 429 if busy else 200, Retry_After="1")

    def do_closed(self) -> None:
        self.say(b"", 429, Retry_After="3600")

    def do_broken(self) -> None:
        self.say(b"", 503)

    def do_noai(self) -> None:
        self.say(IMAGE, X_Robots_Tag="noindex, noai")

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield running
        running.stopped.set()
        running.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("html", "type"),
        ("silent", "timeout"),
        ("drip", "timeout"),
        ("endless", "size"),
        ("huge", "size"),
        ("cut", "connection"),
        ("bomb", "size"),
        ("circle", "redirects"),
        ("far", "redirects"),
        ("elsewhere", "url"),
        ("missing", "status 404"),
        ("broken", "status 503"),
        ("noai", "noai"),
    ],
)
def test_what_bad_servers_do_is_a_reason(server: Server, path: str, kind: str) -> None:
    fetcher, begun = Fetcher(LIMITS), time.monotonic()
    with pytest.raises(FetchError) as caught:
        fetcher.fetch(f"{server.address}/{path}")
    fetcher.close()
    assert caught.value.kind == kind, str(caught.value)
    assert time.monotonic() - begun < LIMITS.timeout + 4


def test_good_answers(server: Server) -> None:
    fetcher = Fetcher(LIMITS)
    assert fetcher.fetch(f"{server.address}/good").data == IMAGE
    assert fetcher.fetch(f"{server.address}/zipped").data == IMAGE
    moved = fetcher.fetch(f"{server.address}/moved")
    assert (moved.url, moved.suffix) == (f"{server.address}/good/there", ".jpg")
    assert fetcher.fetch(f"{server.address}/good/caf\u00e9 1.jpg?q=\u00fc").data == IMAGE
    fetcher.close()


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.1.2.3", "192.168.0.1", "172.16.0.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "224.0.0.1",
        "::1", "fe80::1%eth0", "fc00::1", "::ffff:127.0.0.1", "64:ff9b::7f00:1", "2002:7f00:1::",
        # Public by `ipaddress`, all or on some releases of Python from 3.11 to 3.13.
        "192.0.0.8", "192.0.0.9", "::7f00:1", "64:ff9b:1::7f00:1", "100:0:0:1::1", "2001:1::1", "2001:20::1",
        "3fff::1", "5f00::1", "fec0::1",
    ],
)  # fmt: skip
def test_addresses_that_are_not_public(address: str) -> None:
    assert not is_public(address)


def test_public_addresses() -> None:
    assert is_public("8.8.8.8") and is_public("2001:4860:4860::8888") and is_public("2606:4700::1111")
    assert is_public("64:ff9b::808:808") and is_public("2002:808:808::")


def test_private_addresses_are_refused_unless_allowed(server: Server) -> None:
    fetcher = Fetcher(CollectRecipe(timeout=2.0))
    for host in ("127.0.0.1", "localhost", "2130706433"):
        with pytest.raises(FetchError) as caught:
            fetcher.fetch(f"http://{host}:{server.server_address[1]}/good")
        assert caught.value.kind in ("address", "name")
    fetcher.close()
    assert not server.asked


def test_a_redirect_and_a_rebound_name_do_not_lead_to_private_addresses(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = server.server_address[1]
    answers = iter(["93.184.215.14", "127.0.0.1"])
    connected: list[str] = []
    real = fetch.httpcore2.SyncBackend.connect_tcp

    def resolve(host: str, *args: object, **options: object) -> list[object]:
        address = next(answers) if host == "rebinding.example" else host
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    def connect(self: object, host: str, port: int, *args: object) -> object:
        connected.append(host)
        return real(self, "127.0.0.1", port, *args)  # the public address, as far as the fetcher knows

    monkeypatch.setattr(fetch.socket, "getaddrinfo", resolve)
    monkeypatch.setattr(fetch.httpcore2.SyncBackend, "connect_tcp", connect)
    fetcher = Fetcher(CollectRecipe(timeout=2.0))
    with pytest.raises(
        FetchError
    ) as caught:  # /moved closes its connection, and the name means another address then
        fetcher.fetch(f"http://rebinding.example:{port}/moved")
    fetcher.close()
    assert caught.value.kind == "address"
    assert connected == ["93.184.215.14"]
    assert list(server.asked) == ["/moved"]


def test_hosts(server: Server) -> None:
    for recipe in (
        CollectRecipe(hosts=("example.org",)),
        CollectRecipe(not_hosts=("0.0.1",), allow_private=True),
    ):
        fetcher = Fetcher(recipe)
        with pytest.raises(FetchError, match=r"127\.0\.0\.1") as caught:
            fetcher.fetch(f"{server.address}/good")
        fetcher.close()
        assert caught.value.kind == "host"


def urls_file(folder: Path, server: Server) -> Path:
    names = ["good/1", "html", "busy", "good/2", "closed", "good/3", "missing", "good/4", "good/5"]
    path = folder / "urls.parquet"
    table = {
        "URL": [f"{server.address}/{name}" for name in names],
        "label": [f"c{len(name)}" for name in names],
    }
    pq.write_table(pa.table(table), path)
    return path


def test_a_list_becomes_shards_and_a_record(server: Server, tmp_path: Path) -> None:
    found = collect(urls_file(tmp_path, server), tmp_path / "out", LIMITS)
    assert (found.urls, found.fetched) == (9, 6)
    assert found.failures == {"type": 1, "status 429": 1, "status 404": 1}
    assert server.asked["/busy"] == 2 and server.asked["/closed"] == 1  # a Retry-After of an hour is too long
    source = open_source(found.path)
    assert len(source) == 6 and source.class_names == ["c4", "c6"]
    assert [source.read(index).data for index in range(6)] == [IMAGE] * 6
    record = pq.read_table(found.record)
    assert record.column("number").to_pylist() == list(range(9))
    assert record.column("tries").to_pylist()[2] == 2


def test_a_stopped_run_goes_on_and_gives_the_same(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = urls_file(tmp_path, server)
    whole = collect(listed, tmp_path / "whole", LIMITS)
    server.asked.clear()
    real, calls = Fetcher.fetch, Counter[str]()

    def fetch_some(self: Fetcher, url: str) -> object:
        calls[url] += 1
        if sum(calls.values()) == 7:
            raise KeyboardInterrupt
        return real(self, url)

    monkeypatch.setattr(Fetcher, "fetch", fetch_some)
    with pytest.raises(KeyboardInterrupt):
        collect(listed, tmp_path / "again", LIMITS)
    monkeypatch.setattr(Fetcher, "fetch", real)
    again = collect(listed, tmp_path / "again", LIMITS)
    assert server.asked["/good/1"] == 1  # what had come was not asked for again
    assert again.failures == whole.failures
    for shard in sorted(whole.path.glob("*.tar")):
        assert (again.path / shard.name).read_bytes() == shard.read_bytes()
        with tarfile.open(shard) as archive:
            assert all(member.mtime == 0 for member in archive)
    before = server.asked.total()
    collect(listed, tmp_path / "again", LIMITS)
    assert server.asked.total() == before


def test_one_host_is_asked_politely(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "urls.txt"
    path.write_text("\n".join(f"{server.address}/good/{number}" for number in range(5)))
    collect(path, tmp_path / "out", CollectRecipe(allow_private=True, delay=0.2))
    assert np.diff(sorted(server.times)).min() > 0.1


def test_bad_lists(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("path,label\nx.jpg,1\n")
    assert not is_url_list(tmp_path / "a.csv")
    with pytest.raises(UserError, match="no list of URLs"):
        collect(tmp_path / "a.csv", tmp_path / "out")
    (tmp_path / "b.txt").write_text(f"{server.address}/html\nhttp://[::1\nnonsense\n")
    with pytest.raises(UserError, match="None of the 3 URLs"):
        collect(tmp_path / "b.txt", tmp_path / "out", LIMITS)
    with pytest.raises(UserError, match="no collection"):
        collect(tmp_path / "b.txt", tmp_path, LIMITS)
    (tmp_path / "b.txt").write_text(f"{server.address}/good\n")
    with pytest.raises(UserError, match="another list"):
        collect(tmp_path / "b.txt", tmp_path / "out", LIMITS)
