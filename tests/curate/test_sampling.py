"""Balanced sampling: the sum is the budget, and no share is more even."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unlabeled.curate.hierarchy import Hierarchy, Level, hierarchical_kmeans
from unlabeled.curate.sampling import balanced_sample, share
from unlabeled.errors import UserError

from .made import clustered


@given(st.lists(st.integers(0, 4), min_size=1, max_size=5), st.integers(1, 25), st.integers(0, 3))
def test_shares_are_as_even_as_any(sizes, budget, seed):
    taken = share(budget, np.array(sizes), np.random.default_rng(seed))
    assert taken.sum() == min(budget, sum(sizes))
    assert (taken <= sizes).all()
    ways = [way for way in product(*(range(size + 1) for size in sizes)) if sum(way) == taken.sum()]
    most_even = min(
        sorted(way, reverse=True) for way in ways
    )  # leximax: the largest as small as can be, and so on
    assert sorted(taken.tolist(), reverse=True) == most_even


def test_the_remainder_goes_to_any():
    drawn = [tuple(share(4, np.array([9, 9, 9]), np.random.default_rng(seed))) for seed in range(50)]
    assert set(drawn) == {(2, 1, 1), (1, 2, 1), (1, 1, 2)}


@pytest.fixture(scope="module")
def tree():
    return hierarchical_kmeans(clustered(5000)[0], (100, 10), rounds=1, iterations=5)


@pytest.mark.parametrize("within", ["random", "closest"])
@pytest.mark.parametrize("budget", [1, 777, 4999, 5000, 9000])
def test_the_sum_is_the_budget(tree, budget, within):
    images = balanced_sample(tree, budget, within=within)
    assert len(images) == len(set(images.tolist())) == min(budget, 5000)
    assert (images == balanced_sample(tree, budget, within=within)).all()


def test_every_level_is_even():
    """One top cluster has a hundred leaves and the other one: both give half; the leaves give evenly."""
    leaves = np.repeat(np.arange(101), 50).astype(np.int32)
    similarity = np.tile(np.arange(50), 101).astype(np.float32)
    top = np.array([0] * 100 + [1], np.int32)
    none = np.zeros((101, 2), np.float32)
    tree = Hierarchy([Level(none, leaves, similarity), Level(none[:2], top, none[:, 0])])
    images = balanced_sample(tree, 80, within="closest")
    taken = np.bincount(leaves[images], minlength=101)
    assert taken[100] == 40
    assert set(taken[:100].tolist()) == {0, 1}
    assert (images[leaves[images] == 100] == 100 * 50 + np.arange(10, 50)).all()


def test_mistakes_are_named():
    tree = Hierarchy([Level(np.zeros((1, 2), np.float32), np.zeros(3, np.int32), np.zeros(3, np.float32))])
    with pytest.raises(UserError, match="one at least"):
        balanced_sample(tree, 0)
    with pytest.raises(UserError, match="closest first"):
        balanced_sample(tree, 1, within="best")
