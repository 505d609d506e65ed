"""Connected components by union-find over one integer array, and their split into groups that do not chain.

Shape suffixes: N images, E edges, M images that have a neighbour at all.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

Integers = NDArray[np.int64]


class UnionFind:
    """Sets of 0 to N - 1, joined by edges a batch at a time.

    Holds one int64 for each element: its parent, never larger than itself, so the root of a set is its smallest
    element whatever the order of the edges.
    """

    def __init__(self, size: int) -> None:
        self.parents: Integers = np.arange(size, dtype=np.int64)

    def find(self, elements: Integers) -> Integers:
        """Return the root of each element; their paths are shortened."""
        roots = self.parents[elements]
        while True:
            above = self.parents[roots]
            if np.array_equal(above, roots):
                break
            roots = self.parents[above]
        self.parents[elements] = roots
        return roots

    def union(self, left_E: Integers, right_E: Integers) -> None:
        """Join the sets of left_E[i] and right_E[i], for each i."""
        left, right = self.find(left_E), self.find(right_E)
        while True:
            apart = left != right
            if not apart.any():
                return
            left, right = left[apart], right[apart]
            # Every larger root goes below the smallest root that it has an edge to.
            higher = np.maximum(left, right)
            np.minimum.at(self.parents, higher, np.minimum(left, right))
            # Paths are made of such roots alone; each turn halves them all.
            while not np.array_equal(above := self.parents[self.parents[higher]], self.parents[higher]):
                self.parents[higher] = above
            left, right = self.parents[left], self.parents[right]

    def labels(self) -> Integers:
        """Return for each element the smallest one of its set, (N,)."""
        return self.find(np.arange(len(self.parents), dtype=np.int64))


def forest(left_E: Integers, right_E: Integers) -> tuple[Integers, Integers]:
    """Return fewer edges with the same connected components: each node of E edges with the first of its component."""
    if not len(left_E):
        return left_E, right_E
    nodes, places = np.unique(np.concatenate((left_E, right_E)), return_inverse=True)
    count = len(left_E)
    graph = coo_array((np.ones(count, np.int8), (places[:count], places[count:])), shape=(len(nodes),) * 2)
    _, component = connected_components(graph, directed=False)
    _, first = np.unique(component, return_index=True)
    roots = nodes[first[component]]
    other = roots != nodes
    return roots[other], nodes[other]
