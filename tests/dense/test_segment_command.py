"""`unlabeled segment`: what is printed and written, resumed runs, and bad use."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from unlabeled import cli, load_model, segment
from unlabeled.dense.segment_data import Places

Run = Callable[..., dict]


@pytest.fixture
def run(workshop: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def run(*words: str) -> dict:
        monkeypatch.chdir(workshop)
        arguments = ["segment", *words, "--size", "48", "--device", "cpu", "--json"]
        monkeypatch.setattr(sys, "argv", ["unlabeled", *arguments, "--model", "model"])
        try:
            cli.main()
        except SystemExit as stop:
            assert stop.code == 2
            printed = capsys.readouterr()
            lines = [line for line in printed.err.splitlines() if not line.startswith(("image ", "frame "))]
            assert not printed.out and len(lines) == 1  # beside the progress
            return {"error": lines[0]}
        result: dict = json.loads(capsys.readouterr().out)
        return result

    return run


def test_a_folder_of_targets(run: Run, workshop: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["targets", "--reference", "a.png", "--mask", "a_mask.png", "--out", str(out)]
    result = run(*words)
    assert (result["targets"], result["bad_files"], result["out"]) == (3, 2, str(out))
    reasons = [json.loads(line) for line in (out / "bad_files.jsonl").read_text().splitlines()]
    assert {one["key"] for one in reasons} == {"broken.jpg", "flat.png"}
    assert any("smaller than one patch" in one["reason"] for one in reasons)
    model = load_model(str(workshop / "model"))
    pixels = 0
    for number in range(3):
        target = workshop / "targets" / "deep" / f"{number}.png"
        expected = segment(model, target, workshop / "a.png", workshop / "a_mask.png", size=48, device="cpu")
        mask = np.asarray(Image.open(out / "masks" / "deep" / f"{number}.png"))
        np.testing.assert_array_equal(mask, expected.mask)
        pixels += int((mask == 255).sum())
        with np.load(out / "similarity" / "deep" / f"{number}.npz") as arrays:
            np.testing.assert_allclose(arrays["similarity"], expected.similarity, atol=1e-3)
            np.testing.assert_allclose(arrays["margin"], expected.margin, atol=1e-3)
            assert arrays["classes"].tolist() == [0, 1]
        with Image.open(out / "overlays" / "deep" / f"{number}.jpg") as overlay:
            assert overlay.size == mask.shape[::-1]
    assert result["pixels"]["object"] == pixels > 0
    with Image.open(result["picture"]) as picture:
        assert picture.width > 300

    # What is there is kept, what is missing is made again; other settings have their own folder.
    (out / "masks" / "deep" / "1.png").unlink()
    before = (out / "masks" / "deep" / "0.png").stat().st_mtime_ns
    assert run(*words) == result
    assert (out / "masks" / "deep" / "0.png").stat().st_mtime_ns == before
    assert "prototypes differ" in run(*words, "--prototypes", "2")["error"]
    assert "radius differ" in run(*words, "--radius", "0")["error"]


def test_several_references_classes_and_sources(run: Run, workshop: Path, tmp_path: Path) -> None:
    mask = np.asarray(Image.open(workshop / "a_mask.png"))
    palette = Image.fromarray(np.where(mask > 0, 2, 0).astype(np.uint8), "P")
    palette.putpalette([0, 0, 0, 9, 9, 9, 200, 100, 50])
    palette.save(tmp_path / "palette.png")
    references = ["--reference", "a.png", "--mask", str(tmp_path / "palette.png")]
    result = run(
        "targets/deep/0.png",
        "b.png",
        *references,
        "--classes",
        "sea,land,disc",
        "--out",
        str(tmp_path / "out"),
    )
    assert result["targets"] == 2 and set(result["pixels"]) == {"sea", "disc"}
    assert set(np.unique(Image.open(tmp_path / "out" / "masks" / "b.png"))) == {0, 2}
    error = run("targets", *references, "--classes", "sea,land", "--out", str(tmp_path / "o"))["error"]
    assert "has the number 2, outside of the 2 classes" in error
    two = ["--reference", "a.png", "--mask", "a_mask.png,b_mask.png", "--out", str(tmp_path / "two")]
    assert set(run("b.png", *two)["pixels"]) == {"class 0", "class 1", "class 2"}


def test_a_first_mask_is_propagated(run: Run, workshop: Path, tmp_path: Path) -> None:
    result = run("frames", "--mask", "first.png", "--out", str(tmp_path / "out"))
    assert result["targets"] == 9 and Path(result["video"]).exists()
    assert len(list((tmp_path / "out" / "masks").iterdir())) == 9
    assert 0.05 < result["pixels"]["object"] / (9 * 96 * 128) < 0.25
    clip = run(
        result["video"], "--reference", "a.png", "--mask", "a_mask.png", "--out", str(tmp_path / "clip")
    )
    assert clip["targets"] == 9
    assert sorted(path.name for path in (tmp_path / "clip" / "masks").iterdir())[0] == "000000.png"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["targets", "--reference", "a.png", "--mask", "b.png"], "b.png is in colour"),
        (["targets", "--reference", "b.png", "--mask", "missing.png"], "missing.png cannot be read"),
        (
            ["targets", "--reference", "targets/broken.jpg", "--mask", "first.png"],
            "broken.jpg cannot be read",
        ),
        (
            ["targets", "--reference", "targets/flat.png", "--mask", "first.png"],
            "first.png has 128 x 96 pixels",
        ),
        (["targets", "--reference", "a.png"], "--mask"),
        (["nowhere", "--reference", "a.png", "--mask", "a_mask.png"], "nothing at nowhere"),
        (["targets/flat.png", "--reference", "a.png", "--mask", "a_mask.png"], "no image can be segmented"),
        (["a.png", "b.png", "--mask", "first.png"], "one video or folder of frames at a time, not 2"),
        (["frames", "--mask", "first.png", "--mask", "first.png"], "2 masks"),
        (["frames", "--mask", "first.png", "--prototypes", "4"], "--prototypes are of a --reference"),
        (["frames", "--mask", "first.png", "--model", "no_model"], ""),
    ],
)
def test_bad_use_is_one_line(run: Run, tmp_path: Path, words: list[str], said: str) -> None:
    assert said in run(*words, "--out", str(tmp_path / "out")).get("error", "")


def test_a_folder_of_something_else_is_not_written_to(run: Run, workshop: Path, tmp_path: Path) -> None:
    shutil.copytree(workshop / "frames", tmp_path / "out")
    words = ["targets", "--reference", "a.png", "--mask", "a_mask.png", "--out", str(tmp_path / "out")]
    assert "is no folder of results" in run(*words)["error"]


def test_each_key_has_a_place_of_its_own_below_the_folder() -> None:
    places = Places()
    keys = ["a/x.jpg", "a/x.png", "../a/x.jpg", "/a/x.jpg", "x.y.jpg", ".."]
    assert [places.of(key) for key in keys] == ["a/x", "a/x.png", "a/x.jpg", "a/x.jpg.2", "x.y", "image"]
