"""A matrix by the cells of a k-means: what searches go by.

Shape suffixes: N vectors, D width, K cells, n rows of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from unlabeled.curate.blocks import (
    LEAST_MEMORY,
    Floats,
    Integers,
    Parts,
    Resources,
    Rows,
    save_array,
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
BYTES_OF_A_ROW = 200  # in memory for each vector: numbers, cell, set; codes are beside them


@dataclass(frozen=True)
class Cells:
    """The rows of a matrix by cells.

    Attributes:
        order_N: number of each row in the matrix, by cell: a stored row is a place in this order.
        cells_N: cell of each stored row.
        starts: where each cell begins in the order, (K + 1,).
    """

    order_N: Integers
    cells_N: NDArray[np.int32]
    starts: Integers

    @property
    def tasks(self) -> list[tuple[int, int]]:
        """Spans of cells, a task each."""
        return spans(len(self.starts) - 1, CELLS_OF_A_TASK)


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


def lay_out(rows: Rows, centroids_KD: Floats, folder: Path, resources: Resources) -> Cells:
    """Find the cell of each row; what is found is kept in the folder."""
    k, width = centroids_KD.shape
    size = resources.block_rows(4 * width + 256)
    blocks = spans(len(rows), size)
    held = 12 * size * width + SCORES
    context = (rows, centroids_KD, folder)
    files = resources.written(_assign_block, context, folder, "labels-{:06d}.npy", blocks, held)
    labels = np.concatenate([np.load(file) for file in files])
    order = np.argsort(labels, kind="stable")
    starts = np.concatenate(([0], np.cumsum(np.bincount(labels, minlength=k))))
    return Cells(order, labels[order], starts)


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


def _assign_block(context: tuple[Rows, Floats, Path], item: tuple[int, tuple[int, int]]) -> None:
    """Write the cell of each row of a block."""
    rows, centroids, folder = context
    number, (start, stop) = item
    block = rows.between(start, stop)
    rows.release()
    tiles = spans(len(block), max(1, SCORES // 4 // len(centroids)))
    labels = [(block[first:last] @ centroids.T).argmax(axis=1) for first, last in tiles]
    save_array(folder / f"labels-{number:06d}.npy", np.concatenate(labels).astype(np.int32))


def _store_block(context: tuple[Rows, Integers, Path], item: tuple[int, tuple[int, int]]) -> None:
    """Write a block of the rows in the order of their cells."""
    rows, order, folder = context
    number, (start, stop) = item
    save_array(folder / f"cells-{number:06d}.npy", rows.at_as_stored(order[start:stop]))
    rows.release()
