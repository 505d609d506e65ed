"""Exact search against a sort of all cosines in float64."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unlabeled.search import scan as module
from unlabeled.search.scan import scan, unit

from .conftest import cosines


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(0, 50),
    queries=st.integers(1, 4),
    k=st.integers(1, 12),
    block=st.integers(1, 60),
    half=st.booleans(),
    seed=st.integers(0, 10),
    share=st.floats(0, 1) | st.none(),
)
def test_the_nearest_are_those_of_a_plain_sort(
    count: int, queries: int, k: int, block: int, half: bool, seed: int, share: float | None
) -> None:
    generator = np.random.default_rng(seed)
    vectors = unit(generator.standard_normal((count, 6))).astype(np.float16 if half else np.float32)
    asked = unit(generator.standard_normal((queries, 6)))
    rows = None if share is None else (generator.random(count) < share).nonzero()[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "BLOCK", block)
        found = scan(asked, vectors, k, rows)
    assert found.similarities.shape == found.rows.shape == (queries, k)
    every = np.arange(count) if rows is None else rows
    expected = asked.astype(np.float64) @ vectors[every].astype(np.float64).T
    best = np.sort(expected, axis=1)[:, ::-1][:, :k]
    there = best.shape[1]
    np.testing.assert_allclose(found.similarities[:, :there], best, atol=2e-6)
    assert (found.rows[:, there:] == -1).all() and np.isneginf(found.similarities[:, there:]).all()
    for query, line in enumerate(found.rows[:, :there]):
        assert len(set(line)) == there and set(line) <= set(every.tolist())
        own = [expected[query, np.flatnonzero(every == row)[0]] for row in line]
        np.testing.assert_allclose(own, best[query], atol=2e-6)


def test_lengths_become_one_and_what_has_none_is_told() -> None:
    vectors = np.array([[3, 4], [0, 0], [1e-30, 0], [1e30, 0], [np.nan, 1], [np.inf, 1]], np.float32)
    with np.errstate(over="ignore"):
        scaled = unit(vectors)
    np.testing.assert_allclose(scaled[[0, 2, 3]], [[0.6, 0.8], [1, 0], [1, 0]], rtol=1e-6)
    assert np.isnan(scaled[[1, 4, 5]]).all()
    assert cosines(vectors[:1], vectors[:1])[0, 0] == pytest.approx(1)
