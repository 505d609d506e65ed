"""Cells of coded vectors, and which vectors probe which cells: what a join of millions goes by.

Centroids are found in two steps, as a k-means of thousands of them would take longer than the join: regions, and in
each region cells. A vector lies in the cell of the nearest centroid of its nearest regions, which need not be the
nearest of all: it probes those that are nearer. It also probes the cells from which a plane at most so far away
divides it (`Reach`), but none whose centroid is far from that of its own: those are most of all, and have few of the
pairs. No list of probes is kept, as it would be larger than the vectors' codes: products of codes say it again.

Shape suffixes: N vectors, D width of them, W width of the codes, K cells, R regions, n rows of a block, P pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from unlabeled.curate.blocks import (
    LARGEST_BLOCK,
    Floats,
    Integers,
    Resources,
    Rows,
    grouped,
    load_arrays,
    save_arrays,
    spans,
)
from unlabeled.curate.cells import FEW
from unlabeled.curate.codes import LARGEST, Codes, Queries, Targets, codes_of_rows, near
from unlabeled.curate.kmeans import assign, train

DENSITY = 0.8  # cells are so many times N^(2/3): of 58 vectors where there are 100,000, of 125 of a million
CELLS_OF_A_REGION = 128
TRAINED_ON = 16  # vectors for each cell that centroids are found with
ROWS_OF_A_REGION = 256  # that regions are found with
COMPARED = 1024  # centroids that are compared with all together
ITERATIONS = 6  # of finding them
PASSES = 2  # in which vectors may go to cells of other regions
TOGETHER = 8192  # vectors that look for their cells
NEAREST = (
    5  # a vector may lie in cells of one in so many regions, the nearest ones: means of regions tell little
)
LEAST = 4  # of them
TASKS = 8  # of a join at least
ROWS_OF_A_TASK = 1 << 18  # at most, where cells are small
LOOKED_AT = 4096  # cells that the rows of a task are compared with together
VISITS = 1 << 23  # of cells by rows that a task holds


class Reach(NamedTuple):
    """Which cells a vector probes, by distances.

    Attributes:
        plane: of the vector from the plane that divides it from the cell, at most.
        centroid: of the cell's centroid from that of the vector's own cell, at most.
    """

    plane: float
    centroid: float


@dataclass(frozen=True)
class Centroids:
    """Of cells, those of a region one after the other.

    Attributes:
        vectors_KD: float32, of length 1.
        starts: where each region begins, (R + 1,).
    """

    vectors_KD: Floats
    starts: Integers

    @property
    def regions(self) -> Floats:
        """Means of the regions, (R, D)."""
        sums: Floats = np.add.reduceat(self.vectors_KD, self.starts[:-1])
        sums /= np.diff(self.starts)[:, None]
        return sums


@dataclass(frozen=True)
class CodedCells:
    """The rows of a matrix by cells: a stored row is a place in this order.

    Attributes:
        order_N: number of each stored row in the matrix.
        cells_N: int32, cell of each stored row.
        best_N: float32, its product with the centroid of its cell, by codes.
        codes: of the stored rows.
        starts: where each cell begins, (K + 1,).
        centers: codes of the centroids.
        slack: scales that a product may be off by; 0 where some pairs may be lost.
    """

    order_N: Integers
    cells_N: NDArray[np.int32]
    best_N: Floats
    codes: Codes
    starts: Integers
    centers: Codes
    slack: float

    @property
    def count(self) -> int:
        """Number of cells."""
        return len(self.starts) - 1

    @property
    def tasks(self) -> list[tuple[int, int]]:
        """Spans of cells, a task each."""
        return spans(self.count, -(-self.count // max(TASKS, len(self.order_N) // ROWS_OF_A_TASK)))

    def members(self, cell: int) -> Integers:
        """Stored rows of a cell."""
        return np.arange(self.starts[cell], self.starts[cell + 1])

    def cell_of(self, stored_P: Integers) -> Integers:
        """Return the cell of each stored row."""
        return self.cells_N[stored_P].astype(np.int64)

    def places(self) -> Integers:
        """Return the stored row of each row of the matrix, (N,)."""
        places = np.empty(len(self.order_N), np.int64)
        places[self.order_N] = np.arange(len(places))
        return places

    def probing(self, span: tuple[int, int], reach: Reach) -> Iterator[tuple[int, Integers]]:
        """Give cells, and stored rows of the cells of a span that probe them without lying in them.

        A cell comes up several times where many rows probe it, each time with other rows.
        """
        inverse, own = self.centers.inverse_N, np.arange(*span)
        integers = self.centers.codes_NW.astype(np.float32) - LARGEST
        for start, stop in spans(len(inverse), LOOKED_AT):
            products, held = integers[slice(*span)] @ integers[start:stop].T, 0
            between = self._between(own[:, None], np.arange(start, stop), products)
            columns: list[tuple[NDArray[np.uint16], NDArray[np.int32]]] = []
            for cell in own.tolist():
                members = self.members(cell)
                some = start + np.flatnonzero(between[cell - span[0]] <= reach.centroid)
                less = between[cell - span[0], some - start] * inverse[some]
                queries = Queries(self.centers.codes_NW, some, inverse[some], less)
                scale, weight = self._limits(members, reach)
                for left, right in near(queries, Targets(self.codes.codes_NW, members, scale, weight)):
                    cells = some[left]
                    other = cells != cell
                    right = right[other] + members[0]
                    columns.append(((cells[other] - start).astype(np.uint16), right.astype(np.int32)))
                    held += len(right)
                    if held > VISITS:
                        yield from _by_cell(columns, start)
                        columns, held = [], 0
            yield from _by_cell(columns, start)

    def has_probe(self, stored_P: Integers, cells_P: Integers, reach: Reach) -> NDArray[np.bool_]:
        """Return whether each stored row probes the cell, as `probing` says."""
        products, between = self._products(stored_P, cells_P)
        inverse = self.centers.inverse_N[cells_P]
        scale, weight = self._limits(stored_P, reach)
        is_near = (products >= inverse * scale - between * inverse * weight) & (between <= reach.centroid)
        is_other: NDArray[np.bool_] = self.cell_of(stored_P) != cells_P
        return is_near & is_other

    def distances(self, stored_P: Integers, cells_P: Integers) -> tuple[Floats, Floats]:
        """How far each stored row is from the plane that divides it from a cell, and the centroids; 0 for its own."""
        products, between = self._products(stored_P, cells_P)
        scores = products / self.codes.inverse_N[stored_P] / self.centers.inverse_N[cells_P]
        gap = (self.best_N[stored_P] - scores) / np.maximum(between, 1e-6)
        is_other = self.cells_N[stored_P] != cells_P
        return np.maximum(gap, 0) * is_other, between * is_other

    def _limits(self, stored: Integers, reach: Reach) -> tuple[Floats, Floats]:
        """What a product is compared with: best - (plane + slack / inverse) between, times both inverse scales."""
        inverse = self.codes.inverse_N[stored]
        return self.best_N[stored] * inverse, np.float32(reach.plane) * inverse + np.float32(self.slack)

    def _products(self, stored_P: Integers, cells_P: Integers) -> tuple[Floats, Floats]:
        """Products of rows with cells, and distances of these cells from the rows' own."""
        own = self.cell_of(stored_P)
        between = self._between(own, cells_P, self.centers.products(own, self.centers, cells_P))
        return self.codes.products(stored_P, self.centers, cells_P), between

    def _between(self, left: Integers, right: Integers, products: Floats) -> Floats:
        """Distances of the centroids that the codes stand for, from products of their integers."""
        inverse, squares = self.centers.inverse_N, self._squares
        cosines = products / inverse[left] / inverse[right]
        result: Floats = np.sqrt(np.maximum(squares[left] + squares[right] - 2 * cosines, 0))
        return result

    @cached_property
    def _squares(self) -> Floats:
        every = np.arange(len(self.centers.inverse_N))
        return self.centers.products(every, self.centers, every) / self.centers.inverse_N**2


def _by_cell(
    columns: list[tuple[NDArray[np.uint16], NDArray[np.int32]]], first: int
) -> Iterator[tuple[int, Integers]]:
    if not columns:
        return
    cells, rows = (np.concatenate(column) for column in zip(*columns, strict=True))
    for cell, places in grouped(cells):
        yield first + cell, rows[places].astype(np.int64)


def cell_count(size: int) -> int:
    """Return the number of cells for N vectors: what makes finding and comparing cost about the same."""
    return 1 if size <= FEW else round(DENSITY * size ** (2 / 3))


def find_centroids(rows: Rows, threshold: float, folder: Path, resources: Resources) -> Centroids:
    """Return centroids of a sample of the rows, none as near to another as half the threshold's angle.

    Thousands of copies of one image draw many centroids, and copies in different cells would probe all of them.
    They are kept in the folder.
    """
    file = folder / "centroids.npz"
    if not file.is_file():
        k = cell_count(len(rows))
        centroids = Centroids(np.zeros((1, rows.shape[1]), np.float32), np.array([0, 1]))
        if k > 1:
            centroids = _trained(rows, k, float(np.sqrt((1 + threshold) / 2)), resources)
        save_arrays(file, vectors=centroids.vectors_KD, starts=centroids.starts)
    held = load_arrays(file)
    return Centroids(held["vectors"], held["starts"])


def _trained(rows: Rows, k: int, nearest: float, resources: Resources) -> Centroids:
    """Return up to k centroids, none nearer to another than a cosine."""
    generator = np.random.default_rng([resources.seed, k])
    most = max(k, resources.memory // 4 // (4 * rows.shape[1]))
    count, r = min(len(rows), TRAINED_ON * k, most), -(-k // CELLS_OF_A_REGION)
    sample = rows.at(np.sort(generator.choice(len(rows), count, replace=False)))
    rows.release()
    alone = Resources(1, resources.memory, seed=resources.seed)  # nothing kept
    some = sample[generator.choice(count, min(count, ROWS_OF_A_REGION * r), replace=False)]
    regions = train(some, r, iterations=ITERATIONS, init="random", resources=alone).centroids_KD
    labels, _ = assign(sample, regions, resources=resources)
    items = [inside for _, inside in grouped(labels)]
    found = list(resources.map(_cells_of_a_region, (sample, count / k, alone), items))
    vectors = np.concatenate(found)
    free = _apart(vectors, nearest)
    counts = np.add.reduceat(free, np.cumsum([0, *map(len, found[:-1])]), dtype=np.int64)
    centroids = Centroids(vectors[free], np.concatenate(([0], np.cumsum(counts[counts > 0]))))
    codes = codes_of_rows(sample, resources.seed)
    for _ in range(PASSES):
        centroids = _moved(centroids, sample, codes, resources)
    return centroids


def _cells_of_a_region(context: tuple[Floats, float, Resources], rows: Integers) -> Floats:
    """Centroids of some of a sample's rows."""
    sample, rows_of_a_cell, alone = context
    inside = sample[rows]
    k = max(1, round(len(inside) / rows_of_a_cell))
    return train(inside, k, iterations=ITERATIONS, init="random", resources=alone).centroids_KD


def _apart(vectors_KD: Floats, nearest: float) -> NDArray[np.bool_]:
    """Whether each centroid is none of those as near to an earlier one as a cosine."""
    free = np.ones(len(vectors_KD), bool)
    with threadpool_limits(1):  # the same to the last bit on any number of cores
        for start, stop in spans(len(vectors_KD), COMPARED):
            near = vectors_KD[start:stop] @ vectors_KD[start:].T >= nearest
            for number in range(stop - start):
                if free[start + number]:
                    free[start + number + 1 :] &= ~near[number, number + 1 :]
    return free


def _moved(centroids: Centroids, sample: Floats, codes: Codes, resources: Resources) -> Centroids:
    """Move centroids to the means of those rows of a sample that lie in their cells."""
    centers = codes_of_rows(centroids.vectors_KD, resources.seed)
    blocks = spans(len(sample), LARGEST_BLOCK)
    found = resources.map(_nearest_cells, (centroids, centers, sample, codes), blocks)
    labels = np.concatenate([some for some, _ in found])
    order = np.argsort(labels, kind="stable")
    cells, starts = np.unique(labels[order], return_index=True)
    vectors = centroids.vectors_KD.copy()
    sums = np.add.reduceat(sample[order], starts)
    lengths = np.linalg.norm(sums, axis=1, keepdims=True)
    vectors[cells] = np.where(lengths > 0, sums / np.maximum(lengths, 1e-30), vectors[cells])
    return Centroids(vectors, centroids.starts)


def lay_out(
    rows: Rows, codes: Codes, centroids: Centroids, is_exact: bool, folder: Path, resources: Resources
) -> CodedCells:
    """Find the cell of each row; what is found is kept in the folder.

    codes: of the rows. is_exact: no pair at all may be lost by them.
    """
    width = rows.shape[1]
    centers = codes_of_rows(centroids.vectors_KD, resources.seed)
    size = resources.block_rows(16 * width)
    blocks, held = spans(len(rows), size), size * (16 * width + 64)
    context = (rows, codes, centroids, centers, folder)
    files = resources.written(_assign_block, context, folder, "cells-{:06d}.npz", blocks, held)
    parts = [load_arrays(file) for file in files]
    labels, best = (np.concatenate([part[name] for part in parts]) for name in ("labels", "best"))
    order = np.argsort(labels, kind="stable")
    starts = np.concatenate(([0], np.cumsum(np.bincount(labels, minlength=len(centroids.vectors_KD)))))
    slack = codes.slack if is_exact else 0.0
    # Comparing is a fourth faster where rows of a cell lie together.
    return CodedCells(order, labels[order], best[order], codes.taken(order), starts, centers, slack)


def _assign_block(
    context: tuple[Rows, Codes, Centroids, Codes, Path], item: tuple[int, tuple[int, int]]
) -> None:
    """Write the cell of each row of a block, and its product with the centroid."""
    rows, codes, centroids, centers, folder = context
    number, span = item
    block = rows.between(*span)
    rows.release()
    labels, best = _nearest_cells((centroids, centers, block, codes.between(*span)), (0, len(block)))
    save_arrays(folder / f"cells-{number:06d}.npz", labels=labels.astype(np.int32), best=best)


def _nearest_cells(
    context: tuple[Centroids, Codes, Floats, Codes], span: tuple[int, int]
) -> tuple[Integers, Floats]:
    """Return for some rows of a block the nearest cell, of those of their nearest regions, and its cosine by codes.

    First of the nearest region alone, then by codes what is nearer elsewhere.
    """
    centroids, centers, block, codes = context
    regions = centroids.regions
    count = min(len(regions), max(LEAST, len(regions) // NEAREST))
    found = []
    for start, stop in spans(span[1] - span[0], TOGETHER):
        rows = np.arange(span[0] + start, span[0] + stop)
        part = block[rows[0] : rows[-1] + 1]
        scores = part @ regions.T
        labels = np.empty(len(rows), np.int64)
        for region, inside in grouped(scores.argmax(axis=1)):
            begin, end = centroids.starts[region : region + 2].tolist()
            labels[inside] = begin + (part[inside] @ centroids.vectors_KD[begin:end].T).argmax(axis=1)
        best = codes.cosines(rows, centers, labels)
        chosen = np.argpartition(-scores, count - 1, axis=1)[:, :count]
        for region, places in grouped(chosen.ravel()):
            inside = places // count
            begin, end = centroids.starts[region : region + 2].tolist()
            nearer, cells, cosines = _nearer(codes, rows[inside], best[inside], centers, (begin, end))
            labels[inside[nearer]], best[inside[nearer]] = cells, cosines
        found.append((labels, best))
    labels, best = (np.concatenate(column) for column in zip(*found, strict=True))
    return labels, best


def _nearer(
    codes: Codes, rows_P: Integers, best_P: Floats, centers: Codes, cells: tuple[int, int]
) -> tuple[Integers, Integers, Floats]:
    """Return which of some rows have one of some cells nearer than `best_P`, the nearest of these, and its cosine."""
    some = np.arange(*cells)
    queries = Queries(codes.codes_NW, rows_P, best_P * codes.inverse_N[rows_P], np.zeros_like(best_P))
    inverse = centers.inverse_N[some]
    pairs = list(near(queries, Targets(centers.codes_NW, some, inverse, np.zeros_like(inverse))))
    if not pairs:
        return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32)
    place, cell = (np.concatenate(column) for column in zip(*pairs, strict=True))
    cosines = codes.cosines(rows_P[place], centers, some[cell])
    order = np.lexsort((cell, -cosines, place))
    order = order[np.diff(place[order], prepend=-1) > 0]  # the nearest of each row
    order = order[cosines[order] > best_P[place[order]]]
    return place[order], some[cell[order]], cosines[order]
