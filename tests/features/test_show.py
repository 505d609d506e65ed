"""`unlabeled show attention | pca | match | similar`: what is printed and written, and bad use."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.features.conftest import random_model
from unlabeled import attention, cli, load_model, match, patch_pca, similar
from unlabeled.features.fitting import default_size
from unlabeled.vit import VisionTransformer, vit_config
from unlabeled.weights.huggingface import save_huggingface

Run = Callable[..., dict]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, photograph: np.ndarray) -> Path:
    """A model, and photographs of several shapes."""
    folder = tmp_path_factory.mktemp("show")
    save_huggingface(random_model(registers=2), folder / "model")
    for name, pixels in {
        "a.png": photograph,
        "b.jpg": np.ascontiguousarray(photograph.transpose(1, 0, 2)),
        "small.png": photograph[100:198, 150:248],
        "ribbon.png": photograph[100:130],
        "flat.png": photograph[:5],
    }.items():
        Image.fromarray(pixels).save(folder / name)
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff and no more")
    return folder


@pytest.fixture
def run(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Run:
    def run(*words: str) -> dict:
        monkeypatch.chdir(folder)
        out = str(tmp_path / "out.png")
        monkeypatch.setattr(
            sys,
            "argv",
            ["unlabeled", "show", *words, "--model", "model", "--out", out, "--device", "cpu", "--json"],
        )
        cli.main()
        printed = capsys.readouterr()
        assert printed.err == f"{words[0]}: {out}\n"
        result: dict = json.loads(printed.out)
        assert result["picture"] == out and list(tmp_path.iterdir()) == [Path(out)]
        with Image.open(out) as picture:
            assert picture.format == "PNG" and 300 < picture.width <= 1600
        return result

    return run


def test_attention(run: Run, folder: Path) -> None:
    result = run("attention", "a.png", "b.jpg", "--layer", "0", "--mass", "0.5", "--size", "64")
    model = load_model(str(folder / "model"))
    assert result["layer"] == 0 and result["mass"] == 0.5
    for about, name, grid in zip(result["images"], ("a.png", "b.jpg"), ([8, 12], [12, 8]), strict=True):
        found = attention(model, folder / name, layer=0, mass=0.5, size=64)
        assert about["image"] == name and about["grid"] == grid and about["heads"] == 3
        assert about["on_patches"] == pytest.approx(found.heads.sum((1, 2)).tolist(), abs=1e-4)
        assert about["mask_patches"] == pytest.approx(found.mask.mean(), abs=1e-4)
        row, column = np.unravel_index(found.mean.argmax(), found.mean.shape)
        expected = ((column + 0.5) * about["width"] / grid[1], (row + 0.5) * about["height"] / grid[0])
        assert about["peak"] == pytest.approx(expected, abs=0.01)


def test_the_default_size_is_that_of_the_training_images_but_no_handful_of_patches(run: Run) -> None:
    assert run("attention", "a.png")["images"][0]["grid"] == [14, 21]
    with torch.device("meta"):
        released = VisionTransformer(vit_config("vit_small", depth=1))
    assert default_size(released) == 518


@pytest.mark.parametrize("images", [["small.png"], ["a.png", "b.jpg", "ribbon.png", "small.png"]])
@pytest.mark.parametrize("plain", [False, True])
def test_pca(run: Run, folder: Path, images: list[str], plain: bool) -> None:
    result = run("pca", *images, "--size", "48", *(["--no-foreground"] if plain else []))
    found = patch_pca(
        load_model(str(folder / "model")), [folder / name for name in images], not plain, size=48
    )
    assert result["explained"] == pytest.approx(found.explained.tolist(), abs=1e-4)
    for about, mask in zip(result["images"], found.foreground, strict=True):
        assert about["grid"] == list(mask.shape)
        assert about["foreground"] == pytest.approx(mask.mean(), abs=1e-4)
        assert (about["foreground"] == 1) == plain


def test_match(run: Run, folder: Path) -> None:
    result = run("match", "a.png", "small.png", "--most", "5", "--size", "64")
    found = match(load_model(str(folder / "model")), folder / "a.png", folder / "small.png", size=64)
    assert result["mutual"] == len(found.similarities) > 5 and len(result["shown"]) == 5
    best = result["shown"][0]
    assert best["a"] == pytest.approx(found.points_a[0].tolist(), abs=0.01)
    assert best["b"] == pytest.approx(found.points_b[0].tolist(), abs=0.01)
    assert best["similarity"] == pytest.approx(float(found.similarities[0]), abs=1e-4)


def test_similar(run: Run, folder: Path) -> None:
    result = run("similar", "a.png", "b.jpg", "--at", "100,60.5", "--size", "64")
    values = similar(load_model(str(folder / "model")), folder / "a.png", at=(100, 60.5), size=64)
    assert result["at"] == [100, 60.5]
    assert result["images"][0]["mean"] == pytest.approx(float(values.mean()), abs=1e-4)
    assert result["images"][0]["best"] == pytest.approx(float(np.sort(values.ravel())[-2]), abs=1e-4)
    assert [about["grid"] for about in result["images"]] == [[8, 12], [12, 8]]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("attention nowhere.png", "nowhere.png cannot be read: No such file or directory"),
        ("pca a.png broken.jpg", "broken.jpg cannot be read: "),
        ("match a.png .", ". cannot be read: Is a directory"),
        ("attention a.png --layer 2", "no layer 2: this model has blocks 0 to 1, or -2 to -1"),
        ("attention a.png --mass 0", "mass above 0"),
        ("pca flat.png", "flat.png: An image of 451 x 5 pixels is smaller than one patch of 8"),
        ("pca a.png --size 4", "a.png: A short side of 4 pixels is smaller than one patch of 8"),
        ("pca a.png --size 9999", "choose a smaller size"),
        ("similar a.png --at 451,20", "451,20 is outside of the image: x is from 0 to 450, y to 299"),
        ("similar a.png --at -1,20", "-1,20 is outside of the image"),
        ("similar a.png --at here", "--at here is no point; X,Y in pixels is"),
        ("similar a.png --at 1,2,3", "--at 1,2,3 is no point"),
        ("similar a.png", "--at"),
        ("match a.png", "Missing argument 'B'"),
        ("match a.png b.jpg --most 0", "At least one line"),
        ("pca a.png --out nowhere/x.png", "nowhere/x.png cannot be written: "),
        ("pca a.png --out model", "model should end in .png"),
        ("pca a.png --out pca.jpg", "pca.jpg should end in .png"),
        ("pca a.png b.jpg --out ./a.png", "a.png is one of the images"),
        ("pca a.png --width 300", "400 to 2000 pixels wide, not 300"),
        ("pca" + 17 * " a.png", "16 images at most, not 17"),
        ("pca a.png --device warp", "--device warp is not on this machine"),
        ("pca a.png --model nothing/here.pth", "nothing/here.pth"),
    ],
)
def test_bad_use_is_one_line(
    words: str, said: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    default = [] if "--model" in words else ["--model", "model"]
    monkeypatch.setattr(sys, "argv", ["unlabeled", "show", *words.split(), *default])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    printed = capsys.readouterr()
    assert stop.value.code == 2 and not printed.out
    assert printed.err.count("\n") == 1 and said in printed.err
    assert sorted(folder.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_place_without_permission(
    folder: Path, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(SystemExit) as stop:
        run("pca", "a.png")
    assert stop.value.code == 2 and "cannot be written: " in capsys.readouterr().err


def test_pyplot_is_left_alone(folder: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from unlabeled.features.show import write_pca; from unlabeled import load_model\n"
        f"write_pca(load_model('model'), ['a.png'], {str(tmp_path / 'out.png')!r})\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], cwd=folder, check=True)


def test_functions_take_the_text_of_a_model(folder: Path) -> None:
    model, image = load_model(folder / "model"), folder / "a.png"
    text = str(folder / "model")
    np.testing.assert_array_equal(attention(text, image).mean, attention(model, image).mean)
    np.testing.assert_array_equal(similar(text, image, (1, 1)), similar(model, image, (1, 1)))
    assert len(match(text, image, image).similarities) > 0
    one, two = (patch_pca(given, iter([image, image])) for given in (text, model))
    np.testing.assert_array_equal(one.colours, two.colours)
