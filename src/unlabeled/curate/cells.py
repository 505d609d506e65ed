"""A matrix by the cells of a k-means: what joins and searches go by.

Shape suffixes: N vectors, D width, K cells, n rows of a block.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unlabeled.curate.blocks import (
    LEAST_MEMORY,
    Floats,
    Integers,
    Parts,
    Resources,
    Rows,
    load_arrays,
    load_one,
    save_array,
    save_arrays,
    spans,
)
from unlabeled.curate.kmeans import train, without_work
from unlabeled.errors import UserError

FEW = 8192  # vectors that make one cell
TILE = 2048  # vectors on either side of one matrix product
SCORES = 1 << 23  # bytes of one product with all centroids: what a cache holds
TRAINED_ON = 32  # vectors for each cell that the centroids are found with
ITERATIONS = 6  # of finding them
CELLS_OF_A_TASK = 8
BYTES_OF_A_ROW = 500  # in memory for each vector: numbers, cell, set, some 50 probes; codes are beside them


@dataclass(frozen=True)
class Cells:
    """The rows of a matrix by cells.

    Attributes:
        order_N: number of each row in the matrix, by cell: a stored row is a place in this order.
        cells_N: cell of each stored row.
        starts: where each cell begins in the order, (K + 1,).
        probing_P: int32, the stored rows that probe each cell without lying in it, ascending, one cell after the other.
        bounds: where each cell begins in `probing_P`, (K + 1,).
    """

    order_N: Integers
    cells_N: NDArray[np.int32]
    starts: Integers
    probing_P: NDArray[np.int32]
    bounds: Integers

    @property
    def compared(self) -> int:
        """Number of cosines that a join of the matrix with itself computes."""
        sizes = np.diff(self.starts)
        return int((sizes * (sizes + 1) // 2 + sizes * np.diff(self.bounds)).sum())

    def probing(self, cell: int) -> Integers:
        """Stored rows of other cells that probe a cell, ascending."""
        return self.probing_P[self.bounds[cell] : self.bounds[cell + 1]].astype(np.int64)

    @property
    def tasks(self) -> list[tuple[int, int]]:
        """Spans of cells, a task each."""
        return spans(len(self.starts) - 1, CELLS_OF_A_TASK)

    def has_probe(self, stored: Integers, cells: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Return whether each stored row probes the cell, by bisection."""
        low, high = self.bounds[cells], self.bounds[cells + 1]
        last = len(self.probing_P) - 1
        while (low < high).any():
            middle = (low + high) // 2
            is_before = self.probing_P[np.minimum(middle, last)] < stored
            low, high = np.where(is_before & (low < high), middle + 1, low), np.where(is_before, high, middle)
        inside = low < self.bounds[cells + 1]
        inside[inside] = self.probing_P[low[inside]] == stored[inside]
        return inside


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
    """Find the cell of each row, and the cells that it probes; what is found is kept in the folder.

    reach: a row also probes the cells from which a plane at most this far away divides it; 0 for none.
    """
    k, width = centroids_KD.shape
    size = resources.block_rows(4 * width + 256)
    blocks = spans(len(rows), size)
    between_KK = np.sqrt(np.maximum(2 - 2 * (centroids_KD @ centroids_KD.T), 0))
    layout = _Layout(rows, centroids_KD, between_KK, reach, folder)
    held = 12 * size * width + 6 * SCORES
    files = resources.written(_assign_block, layout, folder, "probing-{:06d}.npz", blocks, held)
    labels = np.concatenate([load_one(file, "labels") for file in files])
    order = np.argsort(labels, kind="stable")
    probing, bounds = _probing(files, order, k)
    return Cells(order, labels[order], _starts(np.bincount(labels, minlength=k)), probing, bounds)


def _probing(files: list[Path], order_N: Integers, k: int) -> tuple[NDArray[np.int32], Integers]:
    """Join what blocks say of the rows that probe each cell."""
    places = np.empty(len(order_N), np.int32)
    places[order_N] = np.arange(len(order_N), dtype=np.int32)
    counts = np.zeros(k, np.int64)
    for file in files:
        counts += load_one(file, "counts")
    bounds = _starts(counts)
    probing = np.empty(bounds[-1], np.int32)
    row, free = 0, bounds[:-1].copy()
    for file in files:
        part = load_arrays(file)
        inside = np.arange(len(part["probing"])) - np.repeat(_starts(part["counts"])[:-1], part["counts"])
        probing[np.repeat(free, part["counts"]) + inside] = places[row + part["probing"]]
        row, free = row + len(part["labels"]), free + part["counts"]
    for start, stop in itertools.pairwise(bounds.tolist()):
        probing[start:stop].sort()
    return probing, bounds


def stored_by_cell(rows: Rows, cells: Cells, folder: Path, resources: Resources) -> Rows:
    """Write the rows in the order of their cells into the folder, what is not yet there, and return them."""
    row_bytes = rows.shape[1] * rows.dtype.itemsize
    size = resources.block_rows(2 * row_bytes)
    context, blocks = (rows, cells.order_N, folder), spans(len(rows), size)
    held = 2 * size * row_bytes
    files = resources.written(_store_block, context, folder, "cells-{:06d}.npy", blocks, held)
    stored = Parts([np.load(file, mmap_mode="r") for file in files])
    stays = len(rows) * row_bytes <= resources.memory // 4
    return Rows(stored, rows.unit, rows.is_ready, stays)


def _starts(counts: NDArray[Any]) -> Integers:
    return np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))


@dataclass(frozen=True)
class _Layout:
    rows: Rows
    centroids_KD: Floats
    between_KK: Floats  # distances of the centroids
    reach: float
    folder: Path


def _assign_block(context: _Layout, item: tuple[int, tuple[int, int]]) -> None:
    """Write the cell of each row of a block, and for each cell the rows that probe it without lying in it."""
    number, (start, stop) = item
    block = context.rows.between(start, stop)
    context.rows.release()
    centroids = context.centroids_KD
    k = len(centroids)
    between_KK, farthest_K = context.between_KK, context.between_KK.max(axis=1)
    labels = np.empty(len(block), np.int32)
    probing = [np.empty(0, np.int32)]
    probed = [np.empty(0, np.int32)]
    tile = max(1, SCORES // 4 // k)
    out, near = np.empty((tile, k), np.float32), np.empty((tile, k), bool)
    for first, last in spans(len(block), tile):
        scores = np.matmul(block[first:last], centroids.T, out=out[: last - first])
        own = scores.argmax(axis=1)
        labels[first:last] = own
        if context.reach > 0:
            best = scores[np.arange(last - first), own]
            # What is lower than this is beyond reach whatever the distance of the two centroids.
            lowest = best - context.reach * farthest_K[own]
            places = np.flatnonzero(np.greater_equal(scores, lowest[:, None], out=near[: last - first]))
            row, cell = np.divmod(places, k)
            gap = best[row] - scores.ravel()[places]
            kept = (gap <= context.reach * between_KK[own[row], cell]) & (cell != own[row])
            probing.append((row[kept] + first).astype(np.int32))
            probed.append(cell[kept].astype(np.int32))
    cells = np.concatenate(probed)
    by_cell = np.argsort(cells, kind="stable")
    file = context.folder / f"probing-{number:06d}.npz"
    save_arrays(
        file,
        labels=labels,
        probing=np.concatenate(probing)[by_cell],
        counts=np.bincount(cells, minlength=k),
    )


def _store_block(context: tuple[Rows, Integers, Path], item: tuple[int, tuple[int, int]]) -> None:
    """Write a block of the rows in the order of their cells."""
    rows, order, folder = context
    number, (start, stop) = item
    save_array(folder / f"cells-{number:06d}.npy", rows.at_as_stored(order[start:stop]))
    rows.release()
