"""The model card beside a Hugging Face export, and pushing the folder to a hub on this machine."""

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

from unlabeled.vit import VitConfig
from unlabeled.weights.card import card, last_metrics, write_card
from unlabeled.weights.huggingface import save_huggingface

from .conftest import random_backbone

CONFIG = VitConfig(width=64, depth=1, num_heads=1, patch_size=8, image_size=32, num_registers=2)
RECIPE = """
name = "tiny"
[run]
steps = 40
batch_size = 8
seed = 3
[crops]
global_size = 32
[data]
train = "{data}"
"""


class Hub(ThreadingHTTPServer):
    """As much of the hub as a push needs; `status` other than 200 is its answer to everything."""

    def __init__(self, status: int = 200) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status = status
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()
        self.address = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self.answer({"id": "me/mine", "sha": "0" * 40, "siblings": [], "private": True})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.server.tokens.add(self.headers.get("Authorization"))
        if self.path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self.answer({"url": f"{self.server.address}/me/mine", "name": "me/mine"})
        elif "/preupload/" in self.path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            self.answer({"files": files})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"commitUrl": f"{self.server.address}/me/mine/commit/1", "commitOid": "1" * 40})
        else:
            self.answer({"errors": [], "warnings": []})

    def answer(self, held: dict[str, Any]) -> None:
        body = json.dumps(held if self.server.status == 200 else {"error": "no"}).encode()
        self.send_response(self.server.status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


@pytest.fixture
def hub(request: pytest.FixtureRequest) -> Iterator[Hub]:
    server = Hub(getattr(request, "param", 200))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def make_run(folder: Path, data: str = "hf:me/photos:train") -> Path:
    save_huggingface(random_backbone(CONFIG), folder / "model")
    (folder / "recipe.toml").write_text(RECIPE.format(data=data))
    rows = [{"step": 0, "loss": 9.0, "knn": 0.25}, {"step": 1, "loss": 7.5, "gradient": None}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 2, "lo')
    return folder


def front_matter(text: str) -> dict[str, Any]:
    _, head, _ = text.split("---\n", 2)
    held = yaml.safe_load(head)
    assert isinstance(held, dict)
    return held


def push(model: Path, out: Path, endpoint: str, *more: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: the hub's client reads its endpoint when it is imported."""
    environment = os.environ | {
        "HF_ENDPOINT": endpoint, "HF_TOKEN": "hf_secret", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1",
    }  # fmt: skip
    words = ["export", str(model), "--to", "hf", "--out", str(out), "--push", "me/mine", *more]
    return subprocess.run(
        [sys.executable, "-m", "unlabeled", *words],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_card_of_a_run_tells_data_recipe_and_metrics(tmp_path: Path) -> None:
    text = card(CONFIG, "mine", make_run(tmp_path / "run"))
    head = front_matter(text)
    assert head["library_name"] == "transformers" and head["pipeline_tag"] == "image-feature-extraction"
    assert head["datasets"] == ["me/photos"] and "dinov2" in head["tags"]
    assert "license" not in head and "# license:" in text  # the user's to choose
    for row in (
        "| recipe | tiny |",
        "| steps | 40 |",
        "| loss | 7.5 |",
        "| knn | 0.25 |",
        "`hf:me/photos:train`",
    ):
        assert row in text
    assert 'AutoModel.from_pretrained("mine")' in text and 'unlabeled.load_model("mine")' in text
    assert "tokens[:, 3:]" in text  # after CLS and two registers


def test_card_keeps_the_users_folders_to_itself(tmp_path: Path) -> None:
    text = card(CONFIG, "mine", make_run(tmp_path / "run", "/home/anna/secret/photos"))
    assert "`photos`" in text and "anna" not in text and "datasets" not in front_matter(text)


def test_card_of_a_hub_model_names_it() -> None:
    text = card(CONFIG, "mine", "facebook/dinov2-small")
    assert front_matter(text)["base_model"] == "facebook/dinov2-small"
    assert "## Training" not in text and "## Metrics" not in text


def test_a_card_that_is_there_is_left(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("mine")
    assert not write_card(CONFIG, tmp_path, tmp_path, "mine")
    assert (tmp_path / "README.md").read_text() == "mine"


def test_last_metrics_of_a_cut_file(tmp_path: Path) -> None:
    assert last_metrics(make_run(tmp_path) / "metrics.jsonl") == {"step": 1, "loss": 7.5, "knn": 0.25}
    assert last_metrics(tmp_path / "none") == {}


def test_push_makes_a_private_repository_and_fills_it(hub: Hub, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = push(make_run(tmp_path / "run"), out, hub.address, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["url"] == f"{hub.address}/me/mine"
    made = hub.created[0]
    assert made["name"] == "mine"
    assert made.get("visibility") == "private" or made.get("private") is True  # by the client's version
    assert hub.tokens == {"Bearer hf_secret"}
    names = ["README.md", "config.json", "model.safetensors", "preprocessor_config.json"]
    assert sorted(hub.files) == names
    assert all(hub.files[name] == (out / name).read_bytes() for name in names)
    assert 'from_pretrained("me/mine")' in hub.files["README.md"].decode()


@pytest.mark.parametrize(
    ("hub", "words"), [(401, "refuses your token"), (500, "not pushed")], indirect=["hub"]
)
def test_a_hub_that_refuses_is_one_line(hub: Hub, words: str, tmp_path: Path) -> None:
    done = push(make_run(tmp_path / "run"), tmp_path / "out", hub.address)
    check_refused(done, words, tmp_path)


def test_a_hub_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    # Port 9 of this machine: nothing listens there.
    done = push(make_run(tmp_path / "run"), tmp_path / "out", "http://127.0.0.1:9")
    check_refused(done, "cannot be reached", tmp_path)


def check_refused(done: subprocess.CompletedProcess[str], words: str, folder: Path) -> None:
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("unlabeled: ") and words in last and "hf upload me/mine" in last
    assert "Traceback" not in done.stderr and "hf_secret" not in done.stderr
    assert (folder / "out" / "model.safetensors").exists()
