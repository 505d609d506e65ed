"""Copy detection's figures against plain loops."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score

from unlabeled.curate.copy_scores import background_normalised, copy_scores


def plain(scores: np.ndarray, original: np.ndarray, wanted: float) -> tuple[float, float, float, float]:
    """Micro-AP, recall at a precision, its threshold, recall@1: pair by pair, wrong pairs first among equals."""
    pairs = [
        (float(scores[q, r]), original[q] == r) for q in range(len(scores)) for r in range(scores.shape[1])
    ]
    pairs.sort(key=lambda pair: (-pair[0], pair[1]))
    total = sum(right for _, right in pairs)
    hits, summed, recall, threshold = 0, 0.0, 0.0, np.inf
    for rank, (score, right) in enumerate(pairs, 1):
        hits += right
        summed += hits / rank if right else 0
        if hits / rank >= wanted:
            recall, threshold = hits / total, score
    first = []
    for q, own in enumerate(original):
        if own >= 0:
            first.append(all(scores[q, own] > scores[q, r] for r in range(scores.shape[1]) if r != own))
    return summed / total, recall, threshold, float(np.mean(first))


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 8), st.integers(2, 9), st.integers(0, 2**32), st.integers(2, 30))
def test_figures_are_those_of_a_plain_loop(queries: int, references: int, seed: int, levels: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, levels, (queries, references)).astype(np.float32)  # with ties
    original = rng.integers(-1, references, queries)
    original[0] = max(original[0], 0)
    found = copy_scores(scores, original)
    expected = plain(scores, original, 0.9)
    assert (found.micro_ap, found.recall, found.threshold, found.recall_at_1) == pytest.approx(expected)
    if np.isfinite(found.threshold):
        own = scores[np.arange(queries), original] >= found.threshold
        np.testing.assert_array_equal(found.found_Q, own & (original >= 0))
        assert found.found_Q.sum() / (original >= 0).sum() == pytest.approx(found.recall)


def test_without_ties_it_is_scikit_learns_average_precision() -> None:
    rng = np.random.default_rng(1)
    scores, original = rng.standard_normal((40, 30)), rng.integers(-1, 30, 40)
    right = original[:, None] == np.arange(30)
    scores[right] += 1.5
    expected = average_precision_score(right.ravel(), scores.ravel())
    assert copy_scores(scores, original).micro_ap == pytest.approx(expected)


def test_equal_scores_are_worth_nothing() -> None:
    """A score that says the same of all pairs finds copies at their share among the pairs at most."""
    found = copy_scores(np.zeros((10, 50)), np.arange(10))
    assert found.recall_at_1 == 0 and found.recall == 0 and found.micro_ap < 0.02


def test_normalisation_takes_the_mean_of_the_nearest_of_the_background() -> None:
    background = np.array([[0.1, 0.9, 0.5, 0.7], [0.0, 0.0, 0.3, 0.0]])
    found = background_normalised(np.zeros((2, 3)), background, nearest=3)
    np.testing.assert_allclose(found, [[-0.7] * 3, [-0.1] * 3])
