"""`unlabeled embed`, `index` and `search` one after another, as a user types them, and bad use of them."""

import json
import os
import resource
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import unlabeled
from tests.features.conftest import random_model
from unlabeled import cli
from unlabeled.weights.huggingface import save_huggingface

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, photograph: np.ndarray) -> Path:
    """Images with two copies among them, a file that is none, two models, a table and an index."""
    folder = tmp_path_factory.mktemp("made")
    save_huggingface(random_model(), folder / "model")
    save_huggingface(random_model(seed=1), folder / "other")
    for number in range(20):
        place = folder / "images" / ("cat" if number % 2 else "dog")
        place.mkdir(parents=True, exist_ok=True)
        top, left = (number * 11) % 200, (number * 41) % 350
        Image.fromarray(photograph[top : top + 90, left : left + 100]).save(place / f"{number:02}.png")
    for copy in ("copy a.png", "copy b.png"):
        (folder / "images" / "cat" / copy).write_bytes((folder / "images" / "cat" / "05.png").read_bytes())
    (folder / "images" / "cat" / "broken.png").write_bytes(b"\x89PNG no more")
    unlabeled.embed(folder / "images", folder / "model", folder / "table")
    unlabeled.build_index(folder / "table", folder / "index")
    (folder / "empty").mkdir()
    return folder


@pytest.fixture
def run(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    """Run a command in the folder of `made`; $TMP in it is a folder of the test's own."""
    monkeypatch.chdir(made)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*words: str) -> tuple[int, str, str]:
        arguments = [word.replace("$TMP", str(tmp_path)) for word in words]
        monkeypatch.setattr(sys, "argv", ["unlabeled", *arguments])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, *capsys.readouterr()

    return run


def test_from_images_to_hits(run: Run, made: Path, tmp_path: Path) -> None:
    code, said, _ = run("embed", "images", "--model", "model", "--out", "$TMP/table")
    assert code == 0 and f"next: unlabeled index {tmp_path}/table --out index" in said
    assert "22 images, cls of 24 in float32; 1 file could not be read" in said
    code, said, _ = run("index", "$TMP/table", "--out", "$TMP/index")
    assert code == 0 and "22 images (22 added), exact search" in said
    assert f"next: unlabeled search IMAGE --index {tmp_path}/index" in said
    query = "images/cat/05.png"
    code, said, _ = run("search", query, "--index", "$TMP/index", "--k", "4", "--out", "$TMP/hits.png")
    lines = [line.split() for line in said.splitlines()]
    assert code == 0 and lines[0] == [query]
    assert {(line[1], line[2]) for line in lines[2:5]} == {("1.0000", "cat")}
    assert {" ".join(line[3:]) for line in lines[2:5]} == {
        "cat/05.png",
        "cat/copy a.png",
        "cat/copy b.png",
    }
    with Image.open(tmp_path / "hits.png") as picture:
        assert picture.format == "PNG"
    code, said, _ = run("search", query, "images/dog/06.png", "--index", "$TMP/index", "--k", "2",
                        "--where", "label = 'dog'", "--out", "$TMP/hits.png", "--json")  # fmt: skip
    result = json.loads(said)
    assert result["picture"] == f"{tmp_path}/hits.png"
    assert [(hit["query"], hit["rank"]) for hit in result["hits"]] == [
        (name, rank) for name in (query, "images/dog/06.png") for rank in (1, 2)
    ]
    assert all(hit["key"].startswith("dog/") for hit in result["hits"])
    assert result["hits"][2]["key"] == "dog/06.png"
    code, said, _ = run("search", query, query, "--index", "$TMP/index", "--k", "9", "--where", "key LIKE '%copy%'",
                        "--out", "$TMP/hits.png")  # fmt: skip
    assert code == 0 and said.count("2 of 9 hits: no more images meet key LIKE '%copy%'") == 1
    model = unlabeled.load_model(made / "model")
    index = unlabeled.open_index(tmp_path / "index")
    expected = unlabeled.Extractor(model)("images/dog/06.png")
    assert index.search(expected, k=3) == index.search("images/dog/06.png", k=3)
    with Image.open("images/dog/06.png") as image:
        pixels = np.asarray(image)
    both = index.search(np.stack((pixels, pixels[::-1])), k=3)  # a batch has a list of hits an image
    assert both == [index.search(pixels, k=3), index.search(pixels[::-1], k=3)]


def test_duplicates_are_listed(run: Run, tmp_path: Path) -> None:
    words = ("search", "--duplicates", "--similarity", "0.99999", "--index", "index", "--out", "$TMP/d.png")
    code, said, _ = run(*words)
    assert code == 0 and "3 images, 1.000 and more to the first:" in said
    assert "1 group of 3 images at a similarity of 0.99999 and more" in said
    code, said, _ = run(*words, "--json")
    (group,) = json.loads(said)["groups"]
    assert sorted(group["keys"]) == ["cat/05.png", "cat/copy a.png", "cat/copy b.png"]
    assert (tmp_path / "d.png").exists()
    code, said, _ = run(*words, "--where", "label = 'dog'", "--json")
    assert json.loads(said) == {"groups": [], "picture": None}


def test_an_index_is_changed(run: Run, made: Path, tmp_path: Path) -> None:
    def result(*words: str) -> dict:
        code, said, _ = run("index", *words, "--out", "$TMP/index", "--json")
        assert code == 0
        return json.loads(said)

    assert result("table") == {"images": 22, "kind": "exact", "recall": 1.0, "index": f"{tmp_path}/index",
                               "added": 22}  # fmt: skip
    assert result("--delete", "label = 'dog'") | {"index": ""} == {
        "images": 12, "kind": "exact", "recall": 1.0, "index": "", "deleted": 10}  # fmt: skip
    assert result("table")["added"] == 10
    assert result("--rebuild")["images"] == 22
    code, said, _ = run("index", "--delete", "label = 'cat'", "--rebuild", "--out", "$TMP/index")
    assert code == 0 and "10 images (12 deleted), exact search" in said


def test_folders_with_spaces_and_names_that_are_no_utf8(run: Run, made: Path, tmp_path: Path) -> None:
    """What is to be typed next can be typed, and a name that a terminal has no letters for is escaped."""
    code, said, _ = run("index", "table", "--out", "$TMP/my index")
    assert code == 0
    following = next(line for line in said.splitlines() if line.startswith("next: "))
    words = shlex.split(following.removeprefix("next: ").replace("IMAGE", "images/cat/05.png"))
    assert words[:2] == ["unlabeled", "search"]
    assert run(*words[1:], "--out", "$TMP/hits.png")[0] == 0
    odd = os.fsencode(tmp_path) + b"/caf\xe9.png"
    Path(os.fsdecode(odd)).write_bytes((made / "images/cat/05.png").read_bytes())
    words = ["-m", "unlabeled", "search", odd, "--index", "index", "--out", tmp_path / "odd.png"]
    done = subprocess.run([sys.executable, *words], cwd=made, capture_output=True, check=True,
                          env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii:strict"})  # fmt: skip
    assert b"caf\\udce9.png" in done.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("words", [["info"], ["info", "--json"]])
def test_a_full_disk_behind_the_output_is_one_line(words: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "unlabeled", *words], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 2
    assert done.stderr == "unlabeled: what is printed cannot be written: No space left on device\n"


def test_ctrl_c_is_no_success(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("unlabeled.features.embed.embed", stop)
    assert run("embed", "images", "--model", "model", "--out", "$TMP/t") == (130, "", "unlabeled: stopped\n")
    assert run("--help")[0] == 0


BAD = [
    (["embed", "", "--model", "model", "--out", "$TMP/t"], "DATA is empty"),
    (
        "embed images --model dinov2_vits15 --out $TMP/t",
        "no model 'dinov2_vits15'; did you mean dinov2_vits14",
    ),
    ("embed images --model empty --out $TMP/t", "empty holds no model"),
    ("embed empty --model model --out $TMP/t", "empty"),
    ("embed nowhere --model model --out $TMP/t", "nothing at"),
    ("embed images/cat/broken.png --model model --out $TMP/t", "broken.png"),
    ("embed images --model model --out table --kind mean", "kind"),
    ("embed images --model other --out table", "only features of one model can be compared"),
    ("embed images --model model --size 0 --out $TMP/t", "no multiple of the model's patch of 8; 8 is"),
    ("embed images --model model --size -8 --out $TMP/t", "no multiple of the model's patch of 8; 8 is"),
    ("embed images --model model --size 80000 --out $TMP/t", "patches an image; choose 2048 at most"),
    ("embed images --model model --size 80000 --shape keep --out $TMP/t", "choose 2048 at most"),
    ("index", "Give a feature table"),
    ("index table --delete key='a' --out $TMP/i", "is no index: it has no index.json"),
    ("index --rebuild --out $TMP/i", "is no index: it has no index.json"),
    ("index images --out $TMP/i", "images is no feature table"),
    ("index table --out images", "images exists and is no index"),
    ("index table --out $TMP/i --recall 0", "above 0 and up to 1, not 0"),
    ("index table --out $TMP/i --kind fast", "auto, exact, approximate; not fast"),
    ("index table --out $TMP/i --kind approximate", "100 images or more, not 22; make it exact"),
    ("index table --out index --recall 0.9", "together with --rebuild"),
    ("index --out index --delete nothing=1", "nothing"),
    ("index --out index --delete true", "would delete all 22 images"),
    ("search --index index", "Give one image or more"),
    ("search images/cat/05.png --index table", "table is no index"),
    ("search images/cat/05.png --index index --k 23", "k is 1 to 22, the number of images in index; not 23"),
    ("search images/cat/05.png --index index --k 0", "k is 1 to 22"),
    ("search images/cat/05.png --index index --recall 2", "above 0 and up to 1, not 2"),
    ("search images/cat/broken.png --index index", "images/cat/broken.png cannot be read"),
    ("search images/cat/none.png --index index", "images/cat/none.png cannot be read: No such file"),
    ("search images/cat/05.png --index index --model other", "only features of one model can be compared"),
    ("search images/cat/05.png --index index --model gone.pth", "gone.pth"),
    ("search images/cat/05.png --index index --where colour=1", "Columns are key, source, label"),
    ("search images/cat/05.png --index index --out images/cat/05.png", "is one of the images"),
    ("search images/cat/05.png --index index --out $TMP/hits.jpg", "should end in .png"),
    ("search images/cat/05.png --index index --out $TMP/none/hits.png", "cannot be written"),
    ("search --duplicates 0.9 --index index", "--similarity says"),
    ("search --duplicates --similarity 3 --index index", "up to 1, not 3"),
]


@pytest.mark.parametrize(("words", "said"), BAD)
def test_bad_use_is_one_line(run: Run, made: Path, tmp_path: Path, words: str | list[str], said: str) -> None:
    def state() -> dict[str, bytes]:
        return {str(file): file.read_bytes() for file in made.rglob("*") if file.is_file()}

    before = state()
    arguments = words.split() if isinstance(words, str) else words
    default = [] if "--out" in words or arguments[0] != "search" else ["--out", "$TMP/hits.png"]
    code, out, err = run(*arguments, *default)
    assert code == 2 and (not out or "1 bad" in out)  # a run's progress is on standard output
    assert err.count("\n") == 1 and said in err
    assert state() == before and not list(tmp_path.glob("*.png"))


def test_a_full_disk_is_one_line_and_what_was_there_stays(made: Path, tmp_path: Path) -> None:
    """In processes of their own, that may write files of 4 KB at most."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, 1500))

    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for words in (
        ["index", "table", "--out", str(tmp_path / "index")],
        ["search", "images/cat/05.png", "--index", "index", "--k", "2", "--out", str(tmp_path / "hits.png")],
        ["embed", "images", "--model", "model", "--kind", "cls+mean", "--out", str(tmp_path / "table")],
    ):
        done = subprocess.run([sys.executable, "-m", "unlabeled", *words], cwd=made, preexec_fn=limit,
                              capture_output=True, text=True, env=environment)  # fmt: skip
        assert done.returncode == 2, done.stderr
        assert done.stderr.splitlines()[-1].startswith("unlabeled: ") and "cannot be written" in done.stderr
        assert "Traceback" not in done.stderr
    assert not (tmp_path / "hits.png").exists() and not (tmp_path / "index" / "index.json").exists()
    assert len(unlabeled.open_index(made / "index")) == 22
