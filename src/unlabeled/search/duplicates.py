"""Groups of near-duplicates: images joined by similarities over a threshold.

Shape suffixes: N vectors, D width, E pairs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from unlabeled.errors import UserError
from unlabeled.search.scan import Nearest, unit

FIRST_K, LAST_K = (
    8,
    512,
)  # neighbours looked at; more than the first only where all of those are over the threshold
BLOCK = 1024  # images looked up at once
# What the cosine of a vector with itself may lack, by how it is stored.
ROUNDING = {"float32": 1e-6, "float16": 2e-4}


class Group(NamedTuple):
    """Images that hang together, best connected first, then by similarity to that one.

    keys; rows: their numbers in the index; similarities: cosines to the first, lower than the threshold where an
    image came by way of others.
    """

    keys: list[str]
    rows: list[int]
    similarities: list[float]


def find_groups(
    nearest: Callable[[NDArray[np.float32], int], Nearest],
    vectors_ND: Any,
    rows: NDArray[np.int64],
    similarity: float,
    seen: Callable[[int, int], None],
) -> list[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Return groups as (rows, similarities to the first of them), largest first; see `Group`.

    Two rows are in one group where a chain of pairs over the threshold joins them.

    nearest: from vectors and k to the nearest of `rows`. vectors_ND: of length 1. seen: called with the number of
        rows done, and of all.
    Raises UserError for a similarity that is not above 0 and up to 1.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    if not 0 < similarity <= 1:
        raise UserError(f"Duplicates have a similarity above 0 and up to 1, not {similarity:g}.")
    threshold = similarity - ROUNDING[np.dtype(vectors_ND.dtype).name]
    found = []
    for start in range(0, len(rows), BLOCK):
        found.append(_pairs(nearest, vectors_ND, rows[start : start + BLOCK], threshold, len(rows)))
        seen(min(len(rows), start + BLOCK), len(rows))
    pairs_E2 = np.concatenate(found) if found else np.empty((0, 2), np.int64)
    members, numbers = np.unique(pairs_E2, return_inverse=True)  # rows that have a duplicate at all
    a, b = numbers.reshape(-1, 2).T
    count, component = connected_components(
        coo_array((np.ones(len(a)), (a, b)), shape=(len(members),) * 2), directed=False
    )
    degrees = np.bincount(a, minlength=len(members))
    by_component = np.split(np.argsort(component, kind="stable"), np.cumsum(np.bincount(component))[:-1])
    groups = []
    for part in by_component if count else []:
        first = part[degrees[part].argmax()]
        vectors = unit(vectors_ND[members[part]])
        similarities = vectors @ unit(vectors_ND[members[first : first + 1]])[0]
        order = np.lexsort((members[part], -similarities, part != first))
        groups.append((members[part][order], similarities[order]))
    return sorted(groups, key=lambda group: (-len(group[0]), group[0][0]))


def _pairs(
    nearest: Callable[[NDArray[np.float32], int], Nearest],
    vectors_ND: Any,
    rows: NDArray[np.int64],
    threshold: float,
    most: int,
) -> NDArray[np.int64]:
    """Return (row, neighbour) of some rows and their neighbours over the threshold, (E, 2)."""
    k, found = FIRST_K, []
    while len(rows):
        k = min(k, most)
        similarities, neighbours = nearest(unit(vectors_ND[rows]), k)
        over = (similarities >= threshold) & (neighbours >= 0)
        # One that has more of them than that is looked at again, farther.
        again = over.sum(axis=1) == (k if k < min(LAST_K, most) else -1)
        kept = over & ~again[:, None] & (neighbours != rows[:, None])
        found.append(np.stack((np.broadcast_to(rows[:, None], kept.shape)[kept], neighbours[kept]), 1))
        rows, k = rows[again], k * 4
    return np.concatenate(found) if found else np.empty((0, 2), np.int64)
