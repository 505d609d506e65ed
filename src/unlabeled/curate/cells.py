"""A matrix laid out by the cells of a k-means, in blocks on disk: what joins and searches read.

Shape suffixes: N vectors, D width, K cells, n rows of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unlabeled.curate.blocks import (
    Floats,
    Integers,
    Resources,
    Rows,
    load_arrays,
    save_array,
    save_arrays,
    spans,
)
from unlabeled.curate.kmeans import train, without_work
from unlabeled.errors import UserError

FEW = 8192  # vectors that make one cell
TILE = 2048  # vectors on either side of one matrix product
TRAINED_ON = 32  # vectors for each cell that the centroids are found with
ITERATIONS = 6  # of finding them
CELLS_OF_A_TASK = 8
LEAST_MEMORY = 1 << 27
BYTES_OF_A_ROW = 1000  # in memory for each vector, whatever its width: numbers, cell, set, some 50 probes


@dataclass(frozen=True)
class Cells:
    """A matrix laid out by cells.

    Attributes:
        stored: the rows in the order of `order_N`.
        order_N: number of each stored row in the matrix.
        cells_N: cell of each stored row.
        starts: where each cell's members begin in `members_N`, (K + 1,).
        members_N: stored rows by cell.
        probes_starts, probes: other cells that each stored row probes.
        probing_starts, probing: stored rows of other cells that probe each cell.
    """

    stored: Rows
    order_N: Integers
    cells_N: NDArray[np.int32]
    starts: Integers
    members_N: Integers
    probes_starts: Integers
    probes: NDArray[np.int32]
    probing_starts: Integers
    probing: NDArray[Any]

    @property
    def compared(self) -> int:
        """Number of cosines that a join of the matrix with itself computes."""
        sizes = np.diff(self.starts)
        return int((sizes * (sizes + 1) // 2 + sizes * np.diff(self.probing_starts)).sum())

    @property
    def tasks(self) -> list[tuple[int, int]]:
        """Spans of cells, a task each."""
        return spans(len(self.starts) - 1, CELLS_OF_A_TASK)

    @property
    def task_bytes(self) -> int:
        """Bytes that a task holds."""
        largest = int(np.diff(self.starts).max(initial=0))
        return 4 * TILE * TILE * 3 + 4 * self.stored.shape[1] * (min(largest, TILE) + TILE) * 2

    def has_probe(self, stored: Integers, cells: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Return whether each stored row probes the cell."""
        result = np.zeros(len(stored), bool)
        starts, ends = self.probes_starts[stored], self.probes_starts[stored + 1]
        for place in range(int((ends - starts).max(initial=0))):
            there = starts + place < ends
            result[there] |= self.probes[starts[there] + place] == cells[there]
        return result


def cell_count(size: int) -> int:
    """Return the number of cells for N vectors: what makes assigning and comparing cost about the same."""
    return 1 if size <= FEW else round(4 * size**0.5)


def check_memory(size: int, resources: Resources, row_bytes: int = BYTES_OF_A_ROW) -> None:
    """Raise UserError where the memory is too little for so many vectors, of which each takes so much."""
    needed = max(LEAST_MEMORY, 2 * row_bytes * size)
    if needed > resources.memory:
        raise UserError(
            f"{resources.memory / 2**30:.2g} GB of memory for {size} vectors; "
            f"{needed / 2**30:.2g} GB at least are needed."
        )


def find_centroids(rows: Rows, folder: Path, resources: Resources) -> Floats:
    """Return centroids (K, D) of a sample of the rows; they are kept in the folder."""
    file = folder / "centroids.npy"
    if not file.is_file():
        k = cell_count(len(rows))
        centroids = np.zeros((1, rows.shape[1]), np.float32)
        if k > 1:
            once = without_work(resources)
            found = train(
                rows, k, iterations=ITERATIONS, init="random", sample=TRAINED_ON * k, resources=once
            )
            centroids = found.centroids_KD
        save_array(file, centroids)
    return np.asarray(np.load(file), np.float32)


def lay_out(rows: Rows, centroids_KD: Floats, reach: float, folder: Path, resources: Resources) -> Cells:
    """Write the rows by cells into the folder, what is not yet there, and return them.

    reach: a row also probes the cells from which a plane at most this far away divides it; 0 for none.
    """
    k = len(centroids_KD)
    size = resources.block_rows(4 * (rows.shape[1] + 2 * k))
    blocks = list(enumerate(spans(len(rows), size)))
    left = [item for item in blocks if not (folder / f"cells-{item[0]:06d}.npz").is_file()]
    held = 12 * size * rows.shape[1] + 12 * TILE * k
    for _ in resources.map(_store_block, _Layout(rows, centroids_KD, reach, folder), left, held):
        pass
    stored, parts = [], []
    for number, _ in blocks:
        parts.append(load_arrays(folder / f"cells-{number:06d}.npz"))
        stored.append(np.load(folder / f"cells-{number:06d}.npy", mmap_mode="r"))
    order, cells, counts, probes = (
        np.concatenate([part[name] for part in parts]) for name in ("rows", "cells", "probe_counts", "probes")
    )
    by_probe = np.argsort(probes, kind="stable")
    narrow: Any = np.int32 if len(rows) < 2**31 else np.int64
    return Cells(
        stored=Rows(_Several(stored, rows)),
        order_N=order,
        cells_N=cells,
        starts=_starts(np.bincount(cells, minlength=k)),
        members_N=np.argsort(cells, kind="stable"),
        probes_starts=_starts(counts),
        probes=probes,
        probing_starts=_starts(np.bincount(probes, minlength=k)),
        probing=np.repeat(np.arange(len(counts), dtype=narrow), counts)[by_probe],
    )


class _Several:
    """Parts as `Rows` takes them."""

    def __init__(self, parts: list[NDArray[Any]], rows: Rows) -> None:
        self.parts, self.shape, self.dtype = parts, rows.shape, rows.dtype

    def __len__(self) -> int:
        return self.shape[0]


def _starts(counts: NDArray[Any]) -> Integers:
    return np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))


@dataclass(frozen=True)
class _Layout:
    rows: Rows
    centroids_KD: Floats
    reach: float
    folder: Path


def _store_block(context: _Layout, item: tuple[int, tuple[int, int]]) -> None:
    """Write a block of rows in the order of their cells, with the cells that each probes."""
    number, (start, stop) = item
    block = context.rows.between(start, stop)
    centroids = context.centroids_KD
    table = centroids @ centroids.T
    farthest = np.sqrt(np.maximum(2 - 2 * table.min(axis=1), 0))
    cells = np.empty(len(block), np.int32)
    who, probed = [], []
    for first, last in spans(len(block), TILE):
        scores = block[first:last] @ centroids.T
        here = np.arange(len(scores))
        own = scores.argmax(axis=1)
        cells[first:last] = own
        if context.reach > 0:
            # What is lower than this is beyond reach whatever the distance of the two centroids.
            lowest = scores[here, own] - context.reach * farthest[own]
            near = np.flatnonzero(scores >= lowest[:, None])
            row, cell = np.divmod(near, len(centroids))
            i = own[row]
            between = np.sqrt(np.maximum(2 - 2 * table[i, cell], 0))
            gap = scores[row, i] - scores[row, cell]
            kept = (gap <= context.reach * between) & (cell != i)
            who.append(row[kept] + first)
            probed.append(cell[kept])
    rows = np.concatenate(who) if who else np.empty(0, np.int64)
    probes = np.concatenate(probed) if probed else np.empty(0, np.int64)
    order = np.argsort(cells, kind="stable")
    places = np.empty(len(order), np.int64)
    places[order] = np.arange(len(order))
    by_place = np.argsort(places[rows], kind="stable")
    save_array(context.folder / f"cells-{number:06d}.npy", context.rows.as_stored(start, stop)[order])
    save_arrays(
        context.folder / f"cells-{number:06d}.npz",
        rows=order + start,
        cells=cells[order],
        probe_counts=np.bincount(places[rows], minlength=len(block)),
        probes=probes[by_place].astype(np.int32),
    )
    context.rows.release()
