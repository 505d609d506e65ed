"""A matrix laid out by the cells of a k-means, in blocks on disk: what joins and searches read.

Shape suffixes: N vectors, D width, K cells, n rows of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csc_array, csr_array

from unlabeled.curate.blocks import (
    Floats,
    Integers,
    Parts,
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
SCORES = 1 << 23  # bytes of one product with all centroids: what a cache holds
TRAINED_ON = 32  # vectors for each cell that the centroids are found with
ITERATIONS = 6  # of finding them
CELLS_OF_A_TASK = 8
LEAST_MEMORY = 1 << 27
BYTES_OF_A_ROW = 1000  # in memory for each vector, whatever its width: numbers, cell, set, some 50 probes


@dataclass(frozen=True)
class Cells:
    """A matrix laid out by cells.

    Attributes:
        stored: the rows by cell, in the order of `order_N`.
        order_N: number of each stored row in the matrix.
        cells_N: cell of each stored row.
        starts: where each cell begins in `stored`, (K + 1,).
        probes_NK: true where a stored row probes another cell, by rows.
        probing_NK: the same by cells.
    """

    stored: Rows
    order_N: Integers
    cells_N: NDArray[np.int32]
    starts: Integers
    probes_NK: csr_array
    probing_NK: csc_array

    @property
    def compared(self) -> int:
        """Number of cosines that a join of the matrix with itself computes."""
        sizes = np.diff(self.starts)
        return int((sizes * (sizes + 1) // 2 + sizes * np.diff(self.probing_NK.indptr)).sum())

    def probing(self, cell: int) -> Integers:
        """Stored rows of other cells that probe a cell, ascending."""
        rows: Integers = self.probing_NK.indices[
            self.probing_NK.indptr[cell] : self.probing_NK.indptr[cell + 1]
        ].astype(np.int64)
        return rows

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
        if not len(stored):
            return np.empty(0, bool)
        result: NDArray[np.bool_] = np.asarray(self.probes_NK[stored, cells], bool).reshape(-1)
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
    k, width = centroids_KD.shape
    size = resources.block_rows(4 * width + 256)
    blocks = spans(len(rows), size)
    between_KK = np.sqrt(np.maximum(2 - 2 * (centroids_KD @ centroids_KD.T), 0))
    layout = _Layout(rows, centroids_KD, between_KK, reach, folder)
    held = 12 * size * width + 6 * SCORES
    files = resources.written(_assign_block, layout, folder, "assigned-{:06d}.npz", blocks, held)
    parts = [load_arrays(file) for file in files]
    labels, counts, probes = (
        np.concatenate([part[name] for part in parts]) for name in ("labels", "counts", "probes")
    )
    order = np.argsort(labels, kind="stable")
    by_row = csr_array((np.ones(len(probes), bool), probes, _starts(counts)), shape=(len(rows), k))[order]
    held = 2 * size * width * rows.dtype.itemsize
    files = resources.written(_store_block, (rows, order, folder), folder, "cells-{:06d}.npy", blocks, held)
    stored = Parts([np.load(file, mmap_mode="r") for file in files])
    stays = len(rows) * width * rows.dtype.itemsize <= resources.memory // 4
    return Cells(
        stored=Rows(stored, rows.unit, rows.is_ready, stays),
        order_N=order,
        cells_N=labels[order],
        starts=_starts(np.bincount(labels, minlength=k)),
        probes_NK=by_row,
        probing_NK=by_row.tocsc(),
    )


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
    """Write the cell of each row of a block, and the other cells that it probes."""
    number, (start, stop) = item
    block = context.rows.between(start, stop)
    context.rows.release()
    centroids = context.centroids_KD
    k = len(centroids)
    between_KK, farthest_K = context.between_KK, context.between_KK.max(axis=1)
    labels, counts = np.empty(len(block), np.int32), np.zeros(len(block), np.int32)
    probed = []
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
            counts[first:last] = np.bincount(row[kept], minlength=last - first)
            probed.append(cell[kept].astype(np.int32))
    probes = np.concatenate(probed) if probed else np.empty(0, np.int32)
    save_arrays(context.folder / f"assigned-{number:06d}.npz", labels=labels, counts=counts, probes=probes)


def _store_block(context: tuple[Rows, Integers, Path], item: tuple[int, tuple[int, int]]) -> None:
    """Write a block of the rows in the order of their cells."""
    rows, order, folder = context
    number, (start, stop) = item
    save_array(folder / f"cells-{number:06d}.npy", rows.at_as_stored(order[start:stop]))
    rows.release()
