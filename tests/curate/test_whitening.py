"""Whitening, and what a background has to be for normalised scores."""

import numpy as np
import pytest

from unlabeled.curate.copy_scores import background_normalised, copy_scores, wrong_pair_surprise
from unlabeled.curate.whitening import fit_whitening
from unlabeled.errors import UserError


def test_whitened_vectors_have_no_mean_and_the_same_variance_everywhere() -> None:
    rng = np.random.default_rng(0)
    vectors = 7 + rng.standard_normal((4000, 6)) @ rng.standard_normal((6, 6))
    vectors = np.concatenate((vectors, vectors[:, :1] * 2), axis=1)  # a direction without variance
    fitted = fit_whitening(vectors)
    white = (vectors - fitted.mean_D) @ fitted.matrix_DK
    assert white.shape == (4000, 6)
    np.testing.assert_allclose(white.T @ white / len(white), np.eye(6), atol=1e-9)
    np.testing.assert_allclose(np.linalg.norm(fitted(vectors), axis=1), 1, rtol=1e-6)
    with pytest.raises(UserError, match="cannot be whitened"):
        fit_whitening(np.ones((5, 3)))


def test_whitening_finds_copies_that_cosines_near_1_hide() -> None:
    rng = np.random.default_rng(1)
    spread = np.array([20.0, 10.0] + [1.0] * 14)  # two directions decide of all, far from the origin
    images = 30 + spread * rng.standard_normal((600, 16))
    references, background = images[:200], images[200:]
    queries = references[:100] + 0.4 * spread * rng.standard_normal((100, 16)) * (spread > 1)
    raw = [vectors / np.linalg.norm(vectors, axis=1, keepdims=True) for vectors in (queries, references)]
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
