"""Small backbones and small labelled data."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from unlabeled.cli import main
from unlabeled.features.preprocessing import default_preprocessing
from unlabeled.finetune.examples import ClassExamples
from unlabeled.images.sources import open_source
from unlabeled.vit import VisionTransformer, VitConfig
from unlabeled.weights.huggingface import save_huggingface


class Result(NamedTuple):
    status: int
    out: str
    err: str


def small_model(depth: int = 3, seed: int = 0) -> VisionTransformer:
    torch.manual_seed(seed)
    config = VitConfig(width=32, depth=depth, num_heads=2, patch_size=8, image_size=32, layer_scale=0.5)
    model = VisionTransformer(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.copy_(0.15 * torch.randn_like(parameter))
            elif name.endswith("bias"):
                parameter.copy_(0.05 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A MODEL of 32 pixels and patches of 8."""
    folder = tmp_path_factory.mktemp("backbone")
    save_huggingface(small_model(), folder)
    return folder


@pytest.fixture(scope="session")
def colour_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 images in three class folders, each class a colour with noise."""
    folder = tmp_path_factory.mktemp("colours")
    rng = np.random.default_rng(0)
    for name, colour in (("blue", (40, 60, 200)), ("green", (50, 180, 60)), ("red", (200, 50, 40))):
        (folder / name).mkdir()
        for number in range(20):
            noise = rng.normal(0, 40, (36 + number, 40, 3))
            pixels = np.clip(noise + np.array(colour), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number:02d}.png")
    return folder


@pytest.fixture(scope="session")
def dense_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10 images with labels/ (0 dark, 1 bright; a border of 255) and depth/ (metres by brightness)."""
    folder = tmp_path_factory.mktemp("dense")
    rng = np.random.default_rng(0)
    for part in ("images", "labels", "depth"):
        (folder / part).mkdir()
    for number in range(10):
        height, width = (48, 64) if number % 2 else (40, 40)
        bright = np.zeros((height, width), bool)
        top, left = rng.integers(0, height - 24), rng.integers(0, width - 24)
        bright[top : top + 24, left : left + 24] = True
        pixels = np.where(bright[..., None], 200, 60) + rng.normal(0, 12, (height, width, 3))
        labels = bright.astype(np.uint8)
        labels[:2] = 255
        depth = np.where(bright, 2000, 6000).astype(np.uint16)
        depth[:, :2] = 0
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / "images" / f"{number}.png")
        Image.fromarray(labels).save(folder / "labels" / f"{number}.png")
        Image.fromarray(depth).save(folder / "depth" / f"{number}.png")
    return folder


def examples_of(folder: Path) -> ClassExamples:
    """All images of class folders, as small_model takes them."""
    source = open_source(folder)
    labels = source.labels()
    assert labels is not None
    return ClassExamples(source, np.arange(len(source)), labels, default_preprocessing(small_model().config))


@pytest.fixture
def run_main(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """Run `unlabeled` in this process; returns its status, what it printed, and what it said."""

    def run(*arguments: object) -> Result:
        monkeypatch.setattr(sys, "argv", ["unlabeled", *map(str, arguments)])
        status = 0
        try:
            main()
        except SystemExit as stop:
            status = int(stop.code or 0)
        captured = capsys.readouterr()
        return Result(status, captured.out, captured.err)

    return run
