"""Exact search: every allowed vector is compared. Also the truth that the approximate search is measured by.

Shape suffixes: B queries, N vectors, D width, k neighbours.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import faiss
import numpy as np
from numpy.typing import NDArray

BLOCK = 32768  # vectors compared at once: 48 MB of them at D = 384


class Nearest(NamedTuple):
    """The most similar vectors of each query, best first.

    similarities: (B, k) float32, cosines. rows: (B, k) int64. Where fewer than k were found: -inf and -1.
    """

    similarities: NDArray[np.float32]
    rows: NDArray[np.int64]


def scan(
    queries_BD: NDArray[np.float32], vectors_ND: Any, k: int, rows: NDArray[np.int64] | None = None
) -> Nearest:
    """Compare each query with all vectors, or with those of some rows; all of length 1, so products are cosines.

    vectors_ND: float32 or float16; an array, or anything that a slice or an array of row numbers reads.
    """
    heap = faiss.ResultHeap(len(queries_BD), k, keep_max=True)
    count = len(vectors_ND) if rows is None else len(rows)
    for start in range(0, count, BLOCK):
        end = min(count, start + BLOCK)
        wanted = slice(start, end) if rows is None else rows[start:end]
        block = np.ascontiguousarray(vectors_ND[wanted], np.float32)
        similarities, places = faiss.knn(
            queries_BD, block, min(k, len(block)), metric=faiss.METRIC_INNER_PRODUCT
        )
        heap.add_result(similarities, places + start if rows is None else rows[start:end][places])
    heap.finalize()
    missing = heap.I < 0
    heap.D[missing] = -np.inf
    return Nearest(heap.D, heap.I)


def unit(vectors_BD: NDArray[Any]) -> NDArray[np.float32]:
    """Return vectors at length 1, float32 and contiguous; all of one that is 0 or not finite becomes NaN."""
    vectors = np.ascontiguousarray(vectors_BD, np.float32)
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        lengths = np.sqrt(np.einsum("bd,bd->b", vectors, vectors, dtype=np.float64, casting="same_kind"))
        scaled: NDArray[np.float32] = vectors / lengths[:, None].astype(np.float32)
    scaled[~np.isfinite(lengths) | (lengths == 0)] = np.nan
    return scaled
