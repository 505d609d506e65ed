"""Union-find against a plain one, whatever the order and the batches of the edges."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from unlabeled.curate.components import UnionFind, forest


def plain(size, edges):
    """The smallest element of each element's set, by looking until nothing changes."""
    labels = list(range(size))
    changed = True
    while changed:
        changed = False
        for a, b in edges:
            low = min(labels[a], labels[b])
            if labels[a] != low or labels[b] != low:
                labels[a] = labels[b] = low
                changed = True
    return labels


@st.composite
def graphs(draw):
    size = draw(st.integers(1, 40))
    element = st.integers(0, size - 1)
    return size, draw(st.lists(st.tuples(element, element), max_size=60)), draw(st.integers(1, 10))


@given(graphs())
def test_sets_are_those_of_a_plain_search(graph):
    size, edges, batch = graph
    sets = UnionFind(size)
    for start in range(0, len(edges), batch):
        left, right = np.array(edges[start : start + batch], np.int64).T
        sets.union(left, right)
    assert sets.labels().tolist() == plain(size, edges)


@given(graphs())
def test_a_forest_connects_the_same_with_fewer_edges(graph):
    size, edges, _ = graph
    left, right = np.array(edges, np.int64).reshape(-1, 2).T
    a, b = forest(left, right)
    assert len(a) < max(1, len({*left.tolist(), *right.tolist()}))
    assert plain(size, list(zip(a.tolist(), b.tolist(), strict=True))) == plain(size, edges)


def test_a_long_chain_in_any_order():
    size = 20_000
    order = np.random.default_rng(0).permutation(size - 1)
    sets = UnionFind(size)
    sets.union(order, order + 1)
    assert not sets.labels().any()
