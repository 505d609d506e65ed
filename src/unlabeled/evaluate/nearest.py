"""The most similar rows of a table of any size, by exact cosine.

On a CPU blocks of the table are read from the disk, brought to length 1 and multiplied with all queries; of the
products only those above the k-th best so far are looked at again, which are few. Memory is that of the queries, of a
block and of the neighbours. `benchmarks/knn.py` compares it with faiss, whose heaps take longer than the products.

Shape suffixes: N rows, M queries, D width, k neighbours, n rows of a block, c candidates.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

BLOCK, CHUNK = 8192, 1024  # rows and queries that are multiplied at once
DEVICE_BLOCK, DEVICE_CHUNK = 32768, 2048  # the same on a GPU


class Neighbours(NamedTuple):
    """The nearest rows of each query, best first: cosines (M, k) float32, and row numbers (M, k) int64."""

    similarities: NDArray[np.float32]
    rows: NDArray[np.int64]


def unit(vectors_ND: NDArray[Any]) -> NDArray[np.float32]:
    """Vectors at length 1, float32; zeros stay zeros."""
    vectors = np.ascontiguousarray(vectors_ND, np.float32)
    lengths = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))
    scaled: NDArray[np.float32] = vectors / np.maximum(lengths, 1e-12)[:, None]
    return scaled


def nearest(train_ND: Any, test_MD: Any, k: int, device: str | torch.device = "cpu") -> Neighbours:
    """The k rows of train with the largest cosine to each row of test; k is at most N.

    train, test: features of any norm, float32 or float16: arrays, or whatever reads a slice of rows.
    """
    queries = unit(test_MD[:])
    if torch.device(device).type == "cpu":
        return _nearest_here(train_ND, queries, k)
    return _nearest_on(torch.device(device), train_ND, queries, k)


def _nearest_here(train_ND: Any, queries: NDArray[np.float32], k: int) -> Neighbours:
    """`nearest` by numpy; queries are of length 1."""
    parts = [queries[first : first + CHUNK] for first in range(0, len(queries), CHUNK)]
    best = [_Best(len(part), k) for part in parts]
    # One buffer for all products: memory that is new costs a tenth of the time.
    buffer = np.empty(len(parts[0]) * min(BLOCK, len(train_ND)), np.float32)
    for start in range(0, len(train_ND), BLOCK):
        block = unit(train_ND[start : start + BLOCK])
        for part, one in zip(parts, best, strict=True):
            products = buffer[: len(part) * len(block)].reshape(len(part), len(block))
            one.add(np.matmul(part, block.T, out=products), start)
    found = [one.sorted() for one in best]
    return Neighbours(*(np.concatenate(column) for column in zip(*found, strict=True)))


class _Best:
    """The k best rows so far of some queries, and candidates that may be better."""

    def __init__(self, num_queries: int, k: int) -> None:
        self.k = k
        self.similarities = np.empty((num_queries, 0), np.float32)
        self.rows = np.empty((num_queries, 0), np.int64)
        self.pending: list[tuple[NDArray[np.int64], NDArray[np.float32], NDArray[np.int64]]] = []
        self.num_pending = 0

    def add(self, similarities_Mn: NDArray[np.float32], start: int) -> None:
        """Take in the similarities of rows start to start + n."""
        num_queries, n = similarities_Mn.shape
        if self.rows.shape[1] < self.k:
            similarities = np.concatenate((self.similarities, similarities_Mn), 1)
            rows = np.concatenate((self.rows, np.tile(np.arange(start, start + n), (num_queries, 1))), 1)
            best = torch.from_numpy(similarities).topk(min(self.k, rows.shape[1]))
            self._keep(best.values.numpy(), np.take_along_axis(rows, best.indices.numpy(), 1))
            return
        places_c = np.flatnonzero(similarities_Mn > self.least)
        queries_c, columns_c = np.divmod(places_c, n)
        self.pending.append((queries_c, similarities_Mn.ravel()[places_c], columns_c + start))
        self.num_pending += len(places_c)
        if self.num_pending > num_queries * self.k:
            self._merge()

    def sorted(self) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Similarities and rows (M, k), the best first; of equal ones the lower row."""
        self._merge()
        order = np.lexsort((self.rows, -self.similarities), axis=1)
        return np.take_along_axis(self.similarities, order, 1), np.take_along_axis(self.rows, order, 1)

    def _merge(self) -> None:
        if not self.pending:
            return
        queries_c, similarities_c, rows_c = (
            np.concatenate(column) for column in zip(*self.pending, strict=True)
        )
        queries = np.concatenate((np.repeat(np.arange(len(self.rows)), self.k), queries_c))
        similarities = np.concatenate((self.similarities.ravel(), similarities_c))
        rows = np.concatenate((self.rows.ravel(), rows_c))
        order = np.lexsort((-similarities, queries))
        counts = np.bincount(queries)
        first = np.cumsum(counts) - counts
        chosen = order[first[:, None] + np.arange(self.k)]
        self._keep(similarities[chosen], rows[chosen])
        self.pending, self.num_pending = [], 0

    def _keep(self, similarities: NDArray[np.float32], rows: NDArray[np.int64]) -> None:
        self.similarities, self.rows = similarities, rows
        self.least = similarities.min(1, keepdims=True)


def _nearest_on(device: torch.device, train_ND: Any, queries: NDArray[np.float32], k: int) -> Neighbours:
    """`nearest` by torch; queries are of length 1."""
    best: list[tuple[torch.Tensor, torch.Tensor]] = []
    parts = torch.from_numpy(queries).to(device).split(DEVICE_CHUNK)
    for start in range(0, len(train_ND), DEVICE_BLOCK):
        rows = torch.from_numpy(np.ascontiguousarray(train_ND[start : start + DEVICE_BLOCK], np.float32)).to(
            device
        )
        rows = F.normalize(rows, dim=1)
        for place, part in enumerate(parts):
            similarities, places = (part @ rows.T).topk(min(k, len(rows)))
            if start:
                similarities = torch.cat((best[place][0], similarities), 1)
                places = torch.cat((best[place][1], places + start), 1)
                similarities, chosen = similarities.topk(min(k, similarities.shape[1]))
                best[place] = similarities, places.gather(1, chosen)
            else:
                best.append((similarities, places))
    columns = (torch.cat([pair[side] for pair in best]).cpu().numpy() for side in (0, 1))
    return Neighbours(*columns)
