"""The demo's tiles, and a demo run of a few steps with its pictures."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from unlabeled.demo import TILE, demo_tiles, photographs, run_demo, tile_places
from unlabeled.images.sources import open_source


@pytest.fixture(scope="module")
def tiles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiles")
    demo_tiles(folder)
    return folder


def test_no_pixel_is_in_both_parts() -> None:
    for path in photographs():
        with Image.open(path) as image:
            width, height = image.size
        seen = {}
        for test in (False, True):
            seen[test] = np.zeros((height, width), bool)
            for top, left in tile_places(height, width, test):
                assert top + TILE <= height
                assert left + TILE <= width
                seen[test][top : top + TILE, left : left + TILE] = True
            assert seen[test].any(), path.name
        assert not (seen[True] & seen[False]).any()


def test_tiles_are_labelled_real_and_made_once(tiles: Path) -> None:
    assert len(photographs()) == 16
    train_path, test_path = tiles / "train", tiles / "test"
    train, test = open_source(train_path), open_source(test_path)
    assert train.class_names == test.class_names
    assert len(train.class_names or []) == 16
    counts = np.bincount(np.asarray(train.labels()))
    assert counts.min() >= 100
    before = {path: path.stat().st_mtime_ns for path in train_path.rglob("*.png")}
    assert demo_tiles(tiles) == (train_path, test_path)
    assert before == {path: path.stat().st_mtime_ns for path in train_path.rglob("*.png")}


def test_a_short_demo_ends_with_figures_and_pictures(tiles: Path, tmp_path: Path) -> None:
    shutil.copytree(tiles, tmp_path / "run" / "tiles", copy_function=os.link)
    overrides = {
        "run.steps": 2,
        "run.batch_size": 8,
        "run.workers": 0,
        "optimizer.lr": 0,
        "optimizer.final_lr": 0,
        "model.width": 64,
        "model.num_heads": 1,
    }
    result = run_demo(tmp_path / "run", device="cpu", console=Console(quiet=True), overrides=overrides)
    assert set(result["knn"]) == {"pixels", "untrained", "trained"}
    assert all(1 / 16 < value < 1 for value in result["knn"].values())
    assert result["knn"]["trained"] == result["knn"]["untrained"]  # at no learning rate: the run's own start
    for name in ("losses", "neighbours", "patch_pca"):
        with Image.open(tmp_path / "run" / "pictures" / f"{name}.png") as picture:
            assert min(picture.size) > 200
