"""k-NN and RankMe against plain float64 loops."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unlabeled.errors import UserError
from unlabeled.evaluate.health import rankme
from unlabeled.evaluate.knn import knn_accuracy, knn_predict, split_knn
from unlabeled.features.extract import extract, pixels_of
from unlabeled.images.sources import open_source
from unlabeled.vit import VisionTransformer, vit_config


def plain_knn(train: np.ndarray, labels: np.ndarray, test: np.ndarray, k: int) -> list[dict[int, float]]:
    """Votes of each test row, by label."""
    result = []
    for row in test.astype(np.float64):
        norm = math.sqrt(row @ row)
        similarity = [row @ other / norm / math.sqrt(other @ other) for other in train.astype(np.float64)]
        votes: dict[int, float] = {}
        for index in sorted(range(len(train)), key=lambda i: -similarity[i])[:k]:
            votes[labels[index]] = votes.get(labels[index], 0) + math.exp(similarity[index] / 0.07)
        result.append(votes)
    return result


@settings(max_examples=30, deadline=None)
@given(
    train=st.integers(1, 30), test=st.integers(1, 10), width=st.integers(2, 6), k=st.integers(1, 30),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_knn_is_the_plain_loop(train: int, test: int, width: int, k: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(train, width)).astype(np.float32)
    labels = rng.integers(0, 4, train)
    queries = rng.normal(size=(test, width)).astype(np.float32)
    if k > train:
        with pytest.raises(UserError, match=f"k = {k}"):
            knn_predict(features, labels, queries, k)
        return
    found = knn_predict(features, labels, queries, k)
    for label, votes in zip(found, plain_knn(features, labels, queries, k), strict=True):
        assert votes[int(label)] >= max(votes.values()) * (1 - 1e-4)  # ties in float32 may fall either way


def test_chunks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    data = rng.normal(size=(100, 8)), rng.integers(0, 3, 100), rng.normal(size=(50, 8))
    whole = knn_predict(*data, k=5)
    monkeypatch.setattr(sys.modules[knn_predict.__module__], "CHUNK_BYTES", 1)
    assert (knn_predict(*data, k=5) == whole).all()


def test_rankme_is_the_plain_formula() -> None:
    features = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
    singular = np.linalg.svd(features.numpy().astype(np.float64), compute_uv=False)
    share = singular / singular.sum() + 1e-7
    assert rankme(features) == pytest.approx(math.exp(-(share * np.log(share)).sum()), rel=1e-4)
    assert rankme(torch.ones(20, 6)) == pytest.approx(1, abs=1e-3)
    assert rankme(torch.eye(6)) == pytest.approx(6, rel=1e-4)


def test_extraction_leaves_out_bad_files_and_names_them(tile_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "data"
    for path in tile_folder.rglob("*.*"):
        target = folder / path.parent.name / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    (folder / "left" / "bad.png").write_bytes(b"no image")
    model = VisionTransformer(vit_config("vit_tiny", depth=1, patch_size=8, image_size=32)).eval()
    found = extract(model, open_source(folder), kind="cls+mean", resize=32, crop=32, batch_size=5)
    assert found.features.shape == (24, 2 * 192)
    assert found.bad == [("left/bad.png", "not an image, or of a kind that is not supported")]
    alone = extract(model, open_source(folder), kind="cls+mean", indices=[3], resize=32, crop=32)
    row = found.keys.index(alone.keys[0])
    np.testing.assert_allclose(found.features[row], alone.features[0], atol=1e-5)
    assert 0 <= split_knn(model, open_source(folder), k=3, crop=32) <= 1


def test_raw_pixels_of_cifar10(shared_data: Path) -> None:
    """45.8% is what raw pixels give with all 50,000 training images; a fifth of them is enough to see it coming."""
    train, test = (open_source(shared_data / f"cifar10-{name}.parquet") for name in ("train", "test"))
    features, labels = pixels_of(train, 32, range(10_000))
    queries, answers = pixels_of(test, 32, range(1000))
    mean = features.mean(0)
    assert 0.34 < knn_accuracy(features - mean, labels, queries - mean, answers) < 0.46
