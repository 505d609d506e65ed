"""The demonstration: pretrain on photographs that are on the machine already, and measure what was learned."""

from __future__ import annotations

import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from unlabeled.pretrain.recipe import Recipe, override

if TYPE_CHECKING:
    from rich.console import Console

# Photographs inside the wheels of scikit-image and scikit-learn.
SKIMAGE_PHOTOGRAPHS = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "chelsea.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "retina.jpg",
    "rocket.jpg",
)
SKLEARN_PHOTOGRAPHS = ("china.jpg", "flower.jpg")
TILE = 64  # pixels
BLOCKS = 4  # a photograph is cut into BLOCKS x BLOCKS blocks, a tile never leaves its block
TRAIN_TILES, TEST_TILES = 180, 60  # a photograph
# Over what `auto` chooses for tiles of this size. The photographs differ in colour and texture, so the crops of a
# tile keep most of both; with a narrow backbone and small crops a step is a fifth of the work (benchmarks/README.md).
DEMO = {
    "run.steps": 450,
    "model.width": 128,
    "model.num_heads": 2,
    "teacher.momentum": 0.97,
    "optimizer.lr": 7e-4,
    "crops.global_size": 32,
    "crops.local_size": 16,
    "crops.brightness": 0.2,
    "crops.contrast": 0.2,
    "crops.saturation": 0.05,
    "crops.hue": 0.0,
    "crops.grey": 0.0,
    "crops.solarise": 0.0,
}


def demo_tiles(folder: Path) -> tuple[Path, Path]:
    """Cut the photographs into tiles, as folders of PNG files by photograph.

    Of the blocks of a photograph every fourth along each diagonal is for testing, the others for training: no pixel
    is in both. The same tiles are made every time.

    Args:
        folder: where train/ and test/ are made, unless they are there.

    Returns:
        The two folders, each a DATA source with labels.
    """
    train, test = folder / "train", folder / "test"
    if train.is_dir() and test.is_dir():
        return train, test
    from PIL import Image

    partial = folder / ".partial"
    shutil.rmtree(partial, ignore_errors=True)
    for path in photographs():
        with Image.open(path) as opened:
            photograph = np.asarray(opened.convert("RGB"))
        for name, count in (("train", TRAIN_TILES), ("test", TEST_TILES)):
            target = partial / name / path.stem
            target.mkdir(parents=True)
            height, width = photograph.shape[:2]
            places = tile_places(height, width, test=name == "test")
            for number in np.linspace(0, len(places) - 1, min(count, len(places))).astype(int):
                top, left = places[number]
                tile = photograph[top : top + TILE, left : left + TILE]
                Image.fromarray(tile).save(target / f"{top:04d}_{left:04d}.png", compress_level=1)
    for name in ("train", "test"):
        (partial / name).replace(folder / name)
    partial.rmdir()
    return train, test


def tile_places(height: int, width: int, test: bool) -> list[tuple[int, int]]:
    """(top, left) of every tile of the training or the test blocks of a photograph of that size."""
    places = []
    for row in range(BLOCKS):
        for column in range(BLOCKS):
            if ((row + 2 * column) % 4 == 0) != test:
                continue
            top, bottom = height * row // BLOCKS, height * (row + 1) // BLOCKS
            left, right = width * column // BLOCKS, width * (column + 1) // BLOCKS
            places += [
                (y, x) for y in range(top, bottom - TILE + 1, 4) for x in range(left, right - TILE + 1, 4)
            ]
    return places


def photographs() -> list[Path]:
    """The photographs, as they lie in the installed packages."""
    import skimage
    import sklearn

    skimage_folder = Path(str(skimage.__file__)).parent / "data"
    sklearn_folder = Path(str(sklearn.__file__)).parent / "datasets" / "images"
    found = [skimage_folder / name for name in SKIMAGE_PHOTOGRAPHS]
    found += [sklearn_folder / name for name in SKLEARN_PHOTOGRAPHS]
    return [path for path in found if path.exists()]


def demo_recipe() -> Recipe:
    """Three minutes on two cores with AVX2; the number of steps is the same everywhere."""
    from unlabeled.pretrain.auto import small_images

    return override(replace(small_images(TILE), name="demo"), DEMO, "the demo")


def run_demo(
    out: str | Path,
    *,
    seed: int = 0,
    device: str = "auto",
    console: Console | None = None,
    overrides: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Pretrain on the tiles, and compare k-NN of raw pixels, the untrained and the trained backbone.

    Args:
        out: the run folder to make; the tiles go beside the run, into out/tiles.
        seed: of everything random.
        device: auto, cpu, cuda, mps.
        console: where the report goes.
        overrides: recipe fields, over the demo's.

    Returns:
        {"knn": {"pixels", "untrained", "trained"}, "run", "seconds"}; seconds are those of training.
    """
    import torch
    from rich.console import Console as RichConsole
    from rich.table import Table

    from unlabeled.evaluate.knn import knn_accuracy
    from unlabeled.features.extract import extract, pixels_of
    from unlabeled.images.sources import open_source
    from unlabeled.pretrain.loop import pretrain
    from unlabeled.pretrain.method import Network
    from unlabeled.pretrain.pictures import write_pictures
    from unlabeled.vit import VisionTransformer

    console = console or RichConsole()
    folder = Path(out)
    train_path, test_path = demo_tiles(folder / "tiles")
    train, test = open_source(train_path), open_source(test_path)
    console.print(
        f"{len(train)} training and {len(test)} test tiles of {len(train.class_names or [])} photographs: "
        f"{folder / 'tiles'}",
        highlight=False,
    )
    begun = time.perf_counter()
    run = pretrain(
        train_path,
        folder,
        recipe=demo_recipe(),
        seed=seed,
        device=device,
        overrides=overrides,
        console=console,
    )
    seconds = time.perf_counter() - begun

    def accuracy(train_features: NDArray[Any], test_features: NDArray[Any]) -> float:
        labels = train.labels(), test.labels()
        assert labels[0] is not None and labels[1] is not None
        return knn_accuracy(train_features, labels[0], test_features, labels[1])

    def features(model: VisionTransformer) -> tuple[NDArray[Any], NDArray[Any]]:
        found = [extract(model, source, resize=TILE, crop=TILE).features for source in (train, test)]
        return found[0], found[1]

    pixels, test_pixels = pixels_of(train, TILE)[0], pixels_of(test, TILE)[0]
    mean = pixels.mean(0)
    torch.manual_seed(seed)
    knn = {
        "pixels": accuracy(pixels - mean, test_pixels - mean),
        "untrained": accuracy(*features(Network(run.recipe, drop_path=0.0).backbone.eval())),
        "trained": accuracy(*features(run.model())),
    }
    pictures = write_pictures(folder, train_path, side=TILE)
    table = Table("features", "k-NN accuracy (k = 20)", title="Which photograph is this tile of?")
    for name, text in (
        ("pixels", "raw pixels"),
        ("untrained", "untrained backbone"),
        ("trained", "trained backbone"),
    ):
        table.add_row(text, f"{knn[name]:.1%}")
    console.print(table)
    console.print(f"run:      {folder}", highlight=False)
    console.print(f"pictures: {', '.join(str(path) for path in pictures)}", highlight=False)
    console.print("next:     unlabeled pretrain YOUR_PHOTOS --out runs/mine", highlight=False)
    return {"knn": knn, "run": str(folder), "seconds": seconds}
