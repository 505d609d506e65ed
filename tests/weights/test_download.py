"""Downloads from servers on this machine: whole, broken off, damaged, refused, and not there."""

import hashlib
import io
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.weights.conftest import CONFIGS, random_backbone
from tests.weights.loopback import Served, Server, hub_repository, serving
from unlabeled.errors import UserError
from unlabeled.weights import download
from unlabeled.weights.download import fetch_file
from unlabeled.weights.huggingface import save_huggingface
from unlabeled.weights.load import load_model

CONTENT = bytes(range(256)) * 1000
MD5 = f'"{hashlib.md5(CONTENT).hexdigest()}"'
PLACE = "/dinov2/weights.pth"


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "CHUNK", 10_000)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def fetch(server: Server, folder: Path) -> bytes:
    return fetch_file(server.address + PLACE, folder / "weights.pth").read_bytes()


def fault(server: Server, folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        fetch(server, folder)
    assert "\n" not in str(caught.value) and visible(folder) == []
    return str(caught.value)


@pytest.mark.parametrize("etag", [MD5, '"abc-12"', 'W/"weak"', ""])
@pytest.mark.parametrize("length", [True, False])
def test_a_whole_file_once(etag: str, length: bool, tmp_path: Path) -> None:
    with serving({PLACE: Served(CONTENT, etag, length=length)}) as server:
        for _ in range(2):
            assert fetch(server, tmp_path / "cache") == CONTENT
        assert server.bodies() == [PLACE]
        assert server.asked[0][2]["User-Agent"] == "unlabeled"
    assert not list((tmp_path / "cache").glob(".*.part"))


@pytest.mark.parametrize("etag", [MD5, '"abc-12"'])
def test_a_broken_transfer_goes_on_where_it_stopped(etag: str, tmp_path: Path) -> None:
    with serving({PLACE: Served(CONTENT, etag, break_after=100_000)}) as server:
        assert fetch(server, tmp_path) == CONTENT
        ranges = [headers["Range"] for _, _, headers in server.asked if "Range" in headers]
        assert ranges == ["bytes=100000-", "bytes=200000-"]
    assert visible(tmp_path) == ["weights.pth"] and not list(tmp_path.glob(".*.part"))


def test_it_goes_on_in_the_next_call(tmp_path: Path) -> None:
    served = Served(CONTENT, MD5, break_after=0)
    with serving({PLACE: served}) as server:
        assert "put it at" in fault(server, tmp_path)
        served.break_after, served.breaks = 50_000, 1
        served.status = 200
        assert fetch(server, tmp_path) == CONTENT
    with serving({PLACE: Served(CONTENT, MD5, ranges=False, break_after=70_000)}) as server:
        message = fault(server, tmp_path / "other")
        assert "after 70,000 bytes" in message and "70,000 of 256,000" in message
    with serving({PLACE: Served(CONTENT, MD5)}) as server:
        assert fetch(server, tmp_path / "other") == CONTENT
        assert server.asked[-1][2]["Range"] == "bytes=70000-"


def test_a_server_without_ranges_or_tags_starts_anew(tmp_path: Path) -> None:
    for number, served in enumerate(
        (
            Served(CONTENT, MD5, ranges=False, break_after=1000, breaks=1),
            Served(CONTENT, "", break_after=1000, breaks=1),
        )
    ):
        with serving({PLACE: served}) as server:
            assert fetch(server, tmp_path / str(number)) == CONTENT


def test_the_rest_of_another_file_is_never_added(tmp_path: Path) -> None:
    with serving({PLACE: Served(b"old" * 9000, '"old-1"', ranges=False, break_after=5000)}) as server:
        fault(server, tmp_path)
    with serving({PLACE: Served(CONTENT, '"new-1"')}) as server:
        assert fetch(server, tmp_path) == CONTENT
    assert not list(tmp_path.glob(".*.part"))


def test_a_damaged_transfer(tmp_path: Path) -> None:
    damaged = CONTENT[:-1] + b"x"
    with serving({PLACE: Served(damaged, MD5)}) as server:
        message = fault(server, tmp_path)
        assert "arrived damaged (MD5 " in message and MD5.strip('"') in message
        assert not list(tmp_path.glob(".*.part"))
        server.files[PLACE].content = CONTENT
        assert fetch(server, tmp_path) == CONTENT


def test_a_pinned_sum(tmp_path: Path) -> None:
    pinned = tmp_path / "weights.pth.sha256"
    sha256 = hashlib.sha256(CONTENT).hexdigest()
    with serving({PLACE: Served(CONTENT, '"abc-12"')}) as server:
        pinned.write_text("0" * 64 + "  weights.pth\n")
        for _ in range(2):
            with pytest.raises(UserError, match=f"has the SHA-256 {sha256}, and .* wants 0000"):
                fetch(server, tmp_path)
            assert visible(tmp_path) == [pinned.name]
        pinned.write_text("a sum\n")
        with pytest.raises(UserError, match="holds no SHA-256; expected 64 hexadecimal digits"):
            fetch(server, tmp_path)
        pinned.write_text(f"{sha256.upper()}  weights.pth\n")
        assert fetch(server, tmp_path) == CONTENT
        (tmp_path / "weights.pth").write_bytes(b"damaged since")
        with pytest.raises(UserError, match="fetch it anew"):
            fetch(server, tmp_path)


@pytest.mark.parametrize("status", [404, 403, 500, 503])
def test_a_server_that_refuses(status: int, tmp_path: Path) -> None:
    with serving({PLACE: Served(b"<html>", status=status)}) as server:
        message = fault(server, tmp_path)
    assert f"the server says {status}" in message and f"put it at {tmp_path / 'weights.pth'}" in message


def test_a_server_that_is_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as server:
        pass
    assert "Connection refused" in fault(server, tmp_path)
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in fault(server, tmp_path)


def test_no_room(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with serving({PLACE: Served(CONTENT)}) as server, pytest.raises(UserError, match="cannot be written"):
        fetch(server, tmp_path / "file")


def test_many_at_once_fetch_it_once(tmp_path: Path) -> None:
    with serving({PLACE: Served(CONTENT, MD5)}) as server, ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: fetch(server, tmp_path), range(4))) == {CONTENT}
        assert server.bodies() == [PLACE]


def test_meta_s_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    model = random_backbone(replace(CONFIGS["small with registers"], width=64, num_heads=1))
    buffer = io.BytesIO()
    torch.save(dict(model.state_dict()), buffer)
    place = "/dinov2/dinov2_vits14/dinov2_vits14_reg4_pretrain.pth"
    with serving({place: Served(buffer.getvalue(), '"abc-2"', break_after=30_000)}) as server:
        monkeypatch.setattr(download, "META_SERVER", server.address)
        for _ in range(2):
            assert torch.equal(load_model("dinov2_vits14_reg").pos_embed, model.pos_embed)
        assert (tmp_path / "checkpoints" / "dinov2_vits14_reg4_pretrain.pth").exists()
        with pytest.raises(UserError, match=r"dino_vits16|404 Not Found"):
            load_model("dino_vits16")


# The Hugging Face hub, in processes of its own: the client reads its environment once.

SCRIPT = """
import json, sys
import unlabeled
from unlabeled.errors import UserError
for name in sys.argv[1:]:
    try:
        model = unlabeled.load_model(name)
        print(json.dumps(["loaded", float(model.pos_embed.detach().double().sum())]))
    except UserError as error:
        print(json.dumps(["refused", str(error)]))
"""


def in_a_process(server: Server, home: Path, *names: str, **environment: str) -> list[tuple[str, object]]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
    given = {"HF_ENDPOINT": server.address, "HF_HOME": str(home), "OMP_NUM_THREADS": "1"} | environment
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *names], env=clean | given, capture_output=True, text=True, check=True
    )
    return [tuple(json.loads(line)) for line in done.stdout.splitlines()]


def test_the_hub(tmp_path: Path) -> None:
    model = random_backbone(CONFIGS["small images"])
    total = pytest.approx(float(model.pos_embed.detach().double().sum()))
    save_huggingface(model, tmp_path / "model")
    contents = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    contents["README.md"] = contents["tf_model.h5"] = b"not wanted"
    home = tmp_path / "home"
    with serving(hub_repository("someone/good", contents)) as server:
        server.files |= hub_repository(
            "someone/llama", {"config.json": b'{"model_type": "llama"}', "model.safetensors": b""}
        )
        server.files |= hub_repository("someone/breaking", contents)
        server.files |= hub_repository("someone/stuck", contents)
        for path, served in server.files.items():
            if path.endswith("model.safetensors") and "/breaking/" in path:
                served.break_after, served.breaks = len(served.content) // 2, 1
            if path.endswith("model.safetensors") and "/stuck/" in path:
                served.status = 404
        gated = {"X-Error-Code": "GatedRepo", "X-Error-Message": "ask for it"}
        server.files["/api/models/someone/gated/revision/main"] = Served(b"{}", status=403, headers=gated)
        missing = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "no such model"}
        server.files["/api/models/someone/missing/revision/main"] = Served(b"{}", status=404, headers=missing)
        names = [f"someone/{x}" for x in ("good", "llama", "breaking", "stuck", "gated", "missing")]
        good, llama, breaking, stuck, gated, missing = in_a_process(
            server, home, *names, HF_TOKEN="hf_secret"
        )
        assert good == ("loaded", total)
        assert breaking == ("loaded", total)
        asked_for = [headers for _, path, headers in server.asked if "someone/" in path]
        assert all(headers["Authorization"] == "Bearer hf_secret" for headers in asked_for)
        bodies = server.bodies()
        assert not any("README" in path or "h5" in path for path in bodies)
        assert llama[0] == "refused" and "model_type 'llama'" in llama[1]
        assert not any("llama/resolve" in path and "safetensors" in path for path in bodies)
        assert stuck[0] == "refused" and "the hub answers 404; fetch" in stuck[1]
        assert gated[0] == "refused" and "set HF_TOKEN" in gated[1]
        assert missing[0] == "refused" and "the Hugging Face hub has no model of that name" in missing[1]
        assert all("\n" not in str(text) for _, text in (llama, stuck, gated, missing))

        asked = len(server.asked)
        good, unknown = in_a_process(server, home, "someone/good", "someone/new", HF_HUB_OFFLINE="1")
        assert good == ("loaded", total) and len(server.asked) == asked
        assert "is not in" in unknown[1] and "HF_HUB_OFFLINE is set; fetch" in unknown[1]
        assert f"{server.address}/someone/new (config.json, model.safetensors)" in unknown[1]
    good, stuck, unknown = in_a_process(server, home, "someone/good", "someone/stuck", "someone/new")
    assert good == ("loaded", total)
    assert stuck[0] == "refused" and "\n" not in stuck[1]
    assert "the hub cannot be reached; fetch" in unknown[1] and "\n" not in unknown[1]
