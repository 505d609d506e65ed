"""Health of features against plain formulas, and on tables that are sick in a known way."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.evaluate.conftest import MakeTable, clusters
from unlabeled.errors import UserError
from unlabeled.evaluate.health import alignment, health, lidar, patch_norms, uniformity
from unlabeled.features.embed import embed
from unlabeled.vit import VisionTransformer, vit_config


def test_uniformity_and_alignment_are_the_plain_loops() -> None:
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(30, 5)).astype(np.float32), np.arange(30) % 4
    unit = [row / math.sqrt(row @ row) for row in features.astype(np.float64)]
    distances = {(i, j): ((unit[i] - unit[j]) ** 2).sum() for i in range(30) for j in range(i)}
    assert uniformity(features) == pytest.approx(
        math.log(np.mean([math.exp(-2 * d) for d in distances.values()]))
    )
    classes = [
        np.mean([d for (i, j), d in distances.items() if labels[i] == labels[j] == number])
        for number in range(4)
    ]
    assert alignment(features, labels) == pytest.approx(np.mean(classes))


def test_lidar_is_the_plain_formula() -> None:
    """exp of the entropy of the eigenvalues of W^-1/2 B W^-1/2, by matrix powers."""
    rng = np.random.default_rng(0)
    features, labels = rng.normal(size=(60, 5)), np.repeat(np.arange(4), 15)
    features[:, :2] += 3 * rng.normal(size=(4, 2))[labels]
    means = np.array([features[labels == number].mean(0) for number in range(4)])
    within = np.mean([np.outer(row, row) for row in features - means[labels]], 0)
    within += 1e-4 * np.trace(within) / 5 * np.eye(5)
    between = np.cov(means.T)
    values, vectors = np.linalg.eigh(within)
    power = vectors @ np.diag(values**-0.5) @ vectors.T
    share = np.linalg.eigvalsh(power @ between @ power).clip(1e-300)
    share /= share.sum()
    assert lidar(features.astype(np.float32), labels) == pytest.approx(
        math.exp(-(share * np.log(share)).sum()), rel=1e-3
    )


def test_healthy_and_sick_tables(make_table: MakeTable) -> None:
    vectors, labels = clusters(400, 16, 8, 0.5, 0)
    good = health(make_table("good", vectors, labels))
    assert good.figures["dead_dimensions"] == 0
    assert good.figures["rankme"] > 8
    assert 3 < good.figures["lidar"] <= 7
    assert set(good.figures) == set(good.meanings)
    sick = vectors.copy()
    sick[:, 4:] = 1e-4 * sick[:, 4:]
    found = health(make_table("dead", sick, labels)).figures
    assert found["dead_dimensions"] == 0.75
    assert found["rankme"] < 4.1
    collapsed = 1 + 1e-3 * vectors
    found = health(make_table("collapsed", collapsed, [None] * 400))
    assert found.figures["rankme"] < 2
    assert "collapsed" in found.meanings["rankme"]
    assert found.figures["uniformity"] > -0.01
    assert found.figures["centred_rank"] > 8
    assert "lidar" not in found.figures
    assert health(make_table("zeros", np.zeros((5, 4)), [None] * 5)).figures["dead_dimensions"] == 1
    with pytest.raises(UserError, match="has 1 image"):
        health(make_table("one", vectors[:1], labels[:1]))


def test_patch_norms_find_artefacts() -> None:
    rng = np.random.default_rng(0)
    patches = rng.normal(size=(1000, 64)).astype(np.float32)
    assert patch_norms(patches)["patch_norm_outliers"] == 0
    patches[:20] *= 6
    found = patch_norms(patches)
    assert found["patch_norm_outliers"] == pytest.approx(0.02)
    norms = np.sqrt((patches.astype(np.float64) ** 2).sum(1))
    assert found["patch_norm_ratio"] == pytest.approx(norms.max() / np.median(norms))


def test_a_table_of_patches(tile_folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = VisionTransformer(
        vit_config("vit_tiny", depth=1, width=24, num_heads=2, patch_size=8, image_size=32)
    ).eval()
    found = health(embed(tile_folder, model, tmp_path / "patches", kind="patches"))
    assert found.counts == {"images": 24, "patches": 24 * 16}
    assert {"patch_norm_outliers", "patch_norm_ratio", "rankme"} <= set(found.figures)
    with pytest.raises(UserError, match="holds attention"):
        health(embed(tile_folder, model, tmp_path / "attention", kind="attention"))
