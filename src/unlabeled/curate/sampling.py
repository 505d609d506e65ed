"""Balanced sampling from a tree of clusters (Vo et al. 2024, section 3.3).

The budget is shared top-down, at every node as evenly as the sizes of its children allow.

Shape suffixes: N images, K clusters of a level, C children of a node.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from unlabeled.errors import UserError

if TYPE_CHECKING:
    from unlabeled.curate.hierarchy import Hierarchy

Integers = NDArray[np.int64]


def share(budget: int, sizes_C: Integers, generator: np.random.Generator) -> Integers:
    """Return how many to take of each child, (C,): their sum is the budget, or all there is if that is less.

    Each gives what is below a common cap, found by bisection; what is left is handed out one each, at random,
    among those that have more.
    """
    budget = min(budget, int(sizes_C.sum()))
    low, high = 0, int(sizes_C.max(initial=0))  # the largest cap that the budget pays
    while low < high:
        middle = (low + high + 1) // 2
        if np.minimum(sizes_C, middle).sum() <= budget:
            low = middle
        else:
            high = middle - 1
    taken = np.minimum(sizes_C, low)
    left = budget - int(taken.sum())
    if left:
        taken[generator.choice(np.flatnonzero(sizes_C > low), left, replace=False)] += 1
    return taken


def balanced_sample(tree: Hierarchy, budget: int, *, within: str = "random", seed: int = 0) -> Integers:
    """Return `budget` images, evenly from the clusters of every level, ascending; all where there are no more.

    within: "random" images of each smallest cluster, or those "closest" to its centroid.
    Raises UserError for a budget below 1 or another `within`.
    """
    if budget < 1:
        raise UserError(f"A sample of {budget} images; it takes one at least.")
    if within not in ("random", "closest"):
        raise UserError(f"Images of a cluster are taken at random or closest first, not {within!r}.")
    generator = np.random.default_rng([seed, 3])
    parents = [level.labels_N for level in tree.levels]
    sizes = [np.bincount(parents[0], minlength=tree.levels[0].k).astype(np.int64)]
    for level, parent in zip(tree.levels[1:], parents[1:], strict=True):
        sizes.append(np.bincount(parent, weights=sizes[-1], minlength=level.k).astype(np.int64))
    taken = share(budget, sizes[-1], generator)
    for size, parent in zip(sizes[-2::-1], parents[:0:-1], strict=True):
        below = np.zeros(len(size), np.int64)
        for node, children in enumerate(_members(parent, len(taken))):
            below[children] = share(int(taken[node]), size[children], generator)
        taken = below
    first = tree.levels[0]
    order = generator.permutation(len(first.labels_N))
    if within == "closest":
        order = order[np.argsort(-first.similarities_N[order], kind="stable")]
    order = order[np.argsort(first.labels_N[order], kind="stable")]
    starts = np.concatenate(([0], np.cumsum(sizes[0])[:-1]))
    rank = np.arange(len(order)) - starts[first.labels_N[order]]
    return np.sort(order[rank < taken[first.labels_N[order]]])


def _members(parent_K: NDArray[np.int32], count: int) -> list[Integers]:
    order = np.argsort(parent_K, kind="stable")
    return np.split(order, np.cumsum(np.bincount(parent_K, minlength=count))[:-1])
