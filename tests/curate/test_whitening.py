"""Whitening, and what a background has to be for normalised scores."""

from pathlib import Path

import numpy as np
import pytest

from unlabeled.curate import whitening
from unlabeled.curate.blocks import Resources
from unlabeled.curate.copy_scores import background_normalised, copy_scores, wrong_pair_surprise
from unlabeled.curate.whitening import fit_whitening, write_whitened
from unlabeled.errors import UserError


def unit(vectors: np.ndarray) -> np.ndarray:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def uneven(count: int, seed: int = 0) -> np.ndarray:
    """Vectors far from the origin, float32 (N, 7), the last value twice the first: a direction without variance."""
    rng = np.random.default_rng(seed)
    vectors = 7 + rng.standard_normal((count, 6)) @ rng.standard_normal((6, 6))
    return unit(np.concatenate((vectors, vectors[:, :1] * 2), axis=1)).astype(np.float32)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_blocks_are_whitened_as_the_whole_in_float64(
    workers: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(whitening, "BLOCK", 300)
    vectors = uneven(4000)
    exact = unit(vectors.astype(np.float64))
    mean = exact.mean(0)
    variances, directions = np.linalg.eigh((exact - mean).T @ (exact - mean) / 4000)
    expected = unit((exact - mean) @ directions[:, 1:] / np.sqrt(variances[1:]))
    resources = Resources(workers=workers, memory=1 << 24)
    fitted = fit_whitening(vectors, resources=resources)
    white = fitted(vectors * np.float32(3))
    assert white.shape == (4000, 6)
    np.testing.assert_allclose(white @ white[:200].T, expected @ expected[:200].T, atol=2e-5)
    spread = (exact - fitted.mean_D) @ fitted.matrix_DK
    np.testing.assert_allclose(spread.T @ spread / 4000, np.eye(6), atol=1e-4)
    once = fit_whitening(vectors, resources=Resources(workers=1))
    assert np.array_equal(once.matrix_DK, fitted.matrix_DK) and np.array_equal(once.mean_D, fitted.mean_D)
    write_whitened(tmp_path / "white.npy", fitted, vectors.astype(np.float16), resources=resources)
    written = np.load(tmp_path / "white.npy")
    assert written.dtype == np.float16 and np.array_equal(
        written, fitted(vectors.astype(np.float16)).astype(np.float16)
    )


def test_a_sample_of_many_is_drawn_by_the_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    vectors = uneven(3000)
    whole = fit_whitening(vectors)
    monkeypatch.setattr(whitening, "FITTED_ON", 1500)
    some, again, other = (fit_whitening(vectors, resources=Resources(seed=seed)) for seed in (0, 0, 1))
    assert np.array_equal(some.matrix_DK, again.matrix_DK)
    assert not np.array_equal(some.mean_D, other.mean_D)
    np.testing.assert_allclose(some.mean_D, whole.mean_D, atol=0.01)


def test_too_few_or_equal_vectors_are_refused() -> None:
    with pytest.raises(UserError, match="7 values take 14 images to be whitened, not 13"):
        fit_whitening(uneven(13))
    with pytest.raises(UserError, match="without a difference"):
        fit_whitening(np.arange(1, 61).reshape(60, 1) * np.ones((60, 3), np.float32))


def test_whitening_finds_copies_that_cosines_near_1_hide() -> None:
    rng = np.random.default_rng(1)
    spread = np.array([20.0, 10.0] + [1.0] * 14)  # two directions decide of all, far from the origin
    images = 30 + spread * rng.standard_normal((600, 16))
    references, background = images[:200], images[200:]
    queries = references[:100] + 0.4 * spread * rng.standard_normal((100, 16)) * (spread > 1)
    raw = [unit(vectors) for vectors in (queries, references)]
    white = [fit_whitening(background)(vectors) for vectors in (queries, references)]
    found = [copy_scores(one @ other.T, np.arange(100)).micro_ap for one, other in (raw, white)]
    assert found[0] < 0.8 < 0.95 < found[1]


def test_a_background_of_one_kind_alone_lifts_the_queries_of_the_other() -> None:
    # Photographs (0) and thumbnails (1): those of a kind are alike by 0.3 and 0.6, of two kinds by 0. Only photographs
    # have copies among the references, alike by 0.78.
    rng = np.random.default_rng(2)
    query, reference, background = (np.repeat((0, 1), counts) for counts in ((60, 200), (60, 300), (50, 50)))
    alike = np.array([[0.3, 0.0], [0.0, 0.6]])
    scores, beside = (
        alike[query[:, None], other] + 0.05 * rng.standard_normal((len(query), len(other)))
        for other in (reference, background)
    )
    scores[np.arange(60), np.arange(60)] = 0.78
    originals = np.concatenate((np.arange(60), np.full(200, -1)))
    plain = copy_scores(scores, originals).micro_ap
    photographs = copy_scores(background_normalised(scores, beside[:, :50]), originals).micro_ap
    both = copy_scores(background_normalised(scores, beside), originals).micro_ap
    assert photographs < 0.1 < plain < 0.99 < both


def test_surprise_counts_wrong_pairs_at_or_above() -> None:
    background = np.array([[0.0, 1.0], [2.0, 2.0]])
    found = wrong_pair_surprise(np.array([[-1.0, 2.0, 3.0]]), background)
    np.testing.assert_allclose(np.exp(-found), [[1.0, 3 / 5, 1 / 5]])
