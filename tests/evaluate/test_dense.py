"""Patch k-NN, on pictures whose classes are known."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from unlabeled.dense.labelled import Pair, matched
from unlabeled.errors import UserError
from unlabeled.evaluate.dense import _patch_classes, patch_knn
from unlabeled.vit import VisionTransformer, vit_config


def pairs_of(folder: Path) -> list[Pair]:
    return matched(folder, "labels")[0]


COLOURS = np.array([(200, 30, 30), (30, 200, 30), (30, 30, 200)], np.uint8)


class MeanColour(nn.Module):
    """Patch tokens are the mean colours of the patches."""

    config = SimpleNamespace(patch_size=8)

    def forward(self, images: Tensor) -> SimpleNamespace:
        return SimpleNamespace(patches=F.avg_pool2d(images, 8).flatten(2).transpose(1, 2))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Ten pictures of 3 x 4 squares, 16 pixels each; a stripe of label 9 counts as nothing."""
    rng = np.random.default_rng(0)
    for name in ("images", "labels"):
        (tmp_path / name).mkdir()
    for number in range(10):
        classes = rng.integers(0, 3, (3, 4)).repeat(16, 0).repeat(16, 1).astype(np.uint8)
        pixels = COLOURS[classes].astype(int) + rng.integers(-20, 20, (48, 64, 3))
        classes[:, :8] = 9
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / "images" / f"{number}.png")
        Image.fromarray(classes).save(tmp_path / "labels" / f"{number}.png")
    return tmp_path


def test_good_features_find_every_class(folder: Path) -> None:
    found = patch_knn(MeanColour(), pairs_of(folder), 48, ignore=9)  # type: ignore[arg-type]
    assert found == {"patch_knn_miou": 1.0, "patch_knn_accuracy": 1.0}


def test_a_backbone_and_other_sizes(folder: Path) -> None:
    torch.manual_seed(0)
    model = VisionTransformer(vit_config("vit_tiny", depth=1, patch_size=8, image_size=32, layer_scale=1.0))
    found = patch_knn(model.train(), pairs_of(folder), 40, ignore=9)
    assert model.training
    assert 0.3 < found["patch_knn_miou"] <= found["patch_knn_accuracy"] <= 1


def test_a_patch_is_of_the_class_of_most_of_its_pixels() -> None:
    labels = np.random.default_rng(1).integers(0, 4, (24, 36)).astype(np.uint8)
    found = _patch_classes(labels, 4, 6)
    blocks = labels.reshape(4, 6, 6, 6).transpose(0, 2, 1, 3).reshape(24, -1)
    expected = [np.bincount(block, minlength=4).argmax() for block in blocks]
    assert found.tolist() == expected


def test_bad_folders_are_one_line(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(UserError, match="has no images/"):
        pairs_of(tmp_path_factory.mktemp("empty"))
    colour = folder / "labels" / "0.png"
    Image.fromarray(np.zeros((48, 64, 3), np.uint8)).save(colour)
    with pytest.raises(UserError, match="3 channels"):
        patch_knn(MeanColour(), pairs_of(folder), 48)  # type: ignore[arg-type]
    colour.write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read"):
        patch_knn(MeanColour(), pairs_of(folder), 48)  # type: ignore[arg-type]
    for path in list((folder / "labels").iterdir()):
        path.unlink()
    with pytest.raises(UserError, match="has a file of the same name"):
        pairs_of(folder)
