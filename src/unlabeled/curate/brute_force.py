"""The k nearest rows of a pool for each query, by comparing it with all of them.

Shape suffixes: N rows of the pool, Q queries, D width, k neighbours, n m rows of a product.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from unlabeled.curate.blocks import Floats, Integers, Resources, Rows, spans
from unlabeled.curate.cells import TILE
from unlabeled.curate.products import ROUNDING
from unlabeled.curate.recall import Recall


@dataclass(frozen=True)
class Nearest:
    """Neighbours of queries.

    Attributes:
        rows_Qk: int64, nearest first; -1 where there is none.
        cosines_Qk: float32; -inf where there is none.
        recall: of them, on a sample; of all where all were compared.
    """

    rows_Qk: Integers
    cosines_Qk: Floats
    recall: Recall


def by_brute_force(rows: Rows, queries: Rows, k: int, above: float, resources: Resources) -> Nearest:
    """Compare each query with all rows."""
    size = resources.block_rows(4 * rows.shape[1])
    items = [(one, other) for one in spans(len(queries), 8192) for other in spans(len(rows), size)]
    held = 4 * rows.shape[1] * (size + 8192) + 12 * 8192 * (TILE + k)
    best = Best(len(queries), k)
    for found in resources.map(_compare, (rows, queries, k, above), items, held):
        best.add(*found)
    return best.sorted()


class Best:
    """The k best rows of each query so far."""

    def __init__(self, count: int, k: int) -> None:
        self.rows = np.full((count, k), -1, np.int64)
        self.cosines = np.full((count, k), -np.inf, np.float32)

    def add(self, queries: Integers, rows: Integers, cosines: Floats) -> None:
        """Offer rows (n, m) with cosines (n, m) to the queries (n,), each of them once."""
        k = self.rows.shape[1]
        cosines = np.concatenate((self.cosines[queries], cosines), axis=1)
        rows = np.concatenate((self.rows[queries], rows), axis=1)
        self.rows[queries], self.cosines[queries] = _top(rows, cosines, k)

    def sorted(self) -> Nearest:
        """Nearest first, the smaller row of equal ones."""
        order = np.lexsort((self.rows, -self.cosines), axis=1)
        rows = np.take_along_axis(self.rows, order, 1)
        return Nearest(rows, np.take_along_axis(self.cosines, order, 1), Recall(0, 0, 0))


def _top(rows: Integers, cosines: Floats, k: int) -> tuple[Integers, Floats]:
    if cosines.shape[1] <= k:
        return rows, cosines
    top = cosines.argmax(axis=1)[:, None] if k == 1 else np.argpartition(-cosines, k - 1, axis=1)[:, :k]
    return np.take_along_axis(rows, top, 1), np.take_along_axis(cosines, top, 1)


def search(block_nD: Floats, targets_mD: Floats, k: int, above: float) -> tuple[Integers, Floats]:
    """Places in targets and cosines of the k best, (n, k or m if that is less); -1 and -inf for those below `above`."""
    found, best = [], []
    for first, last in spans(len(block_nD), TILE):
        rows = np.empty((last - first, 0), np.int64)
        cosines = np.empty((last - first, 0), np.float32)
        for start, stop in spans(len(targets_mD), TILE):
            scores = block_nD[first:last] @ targets_mD[start:stop].T
            places, values = _top(np.broadcast_to(np.arange(start, stop), scores.shape), scores, k)
            rows, cosines = _top(
                np.concatenate((rows, places), axis=1), np.concatenate((cosines, values), axis=1), k
            )
        low = cosines < above - ROUNDING
        found.append(np.where(low, -1, rows))
        best.append(np.where(low, np.float32(-np.inf), cosines))
    return np.concatenate(found), np.concatenate(best)


def _compare(
    context: tuple[Rows, Rows, int, float], item: tuple[tuple[int, int], tuple[int, int]]
) -> tuple[Integers, Integers, Floats]:
    rows, queries, k, above = context
    (first, last), (start, stop) = item
    places, cosines = search(queries.between(first, last), rows.between(start, stop), k, above)
    rows.release()
    queries.release()
    return np.arange(first, last), np.where(places < 0, -1, places + start), cosines
