"""The most similar rows of a table of any size, by exact cosine.

On a CPU each block of the table is read from the disk, brought to length 1 and multiplied once with all queries by
faiss, on every core; memory is that of the queries, of one block and of the neighbours so far.

Shape suffixes: N rows, M queries, D width, k neighbours.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional as F

from unlabeled.search.scan import scan

BLOCK = 32768  # rows at once on a device
CHUNK = 2048  # queries at once on a device


class Neighbours(NamedTuple):
    """The nearest rows of each query, best first: cosines (M, k) float32, and row numbers (M, k) int64."""

    similarities: NDArray[np.float32]
    rows: NDArray[np.int64]


class _UnitRows:
    """Rows of length 1; zeros stay zeros."""

    def __init__(self, vectors: Any) -> None:
        self.vectors = vectors

    def __len__(self) -> int:
        return len(self.vectors)

    def __getitem__(self, wanted: slice) -> NDArray[np.float32]:
        return unit(self.vectors[wanted])


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
        return Neighbours(*scan(queries, _UnitRows(train_ND), k))
    return _nearest_on(torch.device(device), train_ND, queries, k)


def _nearest_on(device: torch.device, train_ND: Any, queries: NDArray[np.float32], k: int) -> Neighbours:
    """`nearest` by torch; queries are of length 1."""
    best: list[tuple[torch.Tensor, torch.Tensor]] = []
    parts = torch.from_numpy(queries).to(device).split(CHUNK)
    for start in range(0, len(train_ND), BLOCK):
        rows = torch.from_numpy(np.ascontiguousarray(train_ND[start : start + BLOCK], np.float32)).to(device)
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
