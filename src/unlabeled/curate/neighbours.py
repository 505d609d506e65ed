"""All pairs of vectors above a cosine: exact products inside the few nearest cells of a k-means.

Each vector lies in the cell of its nearest centroid, and is compared with all of that cell. Two vectors of different
cells i and j lie on either side of the plane midway between the centroids, so one of them is no farther from it than
half their distance, which is sqrt(2 - 2 cosine) at most. A vector therefore also probes those cells whose plane is
nearer than a share of that: with a share of 1/2 every pair is found; the difference of two neighbours has many
directions, so a far smaller one finds nearly all. The share is chosen on a sample by the recall that is wanted, and
the recall is measured on another sample against brute force.

Shape suffixes: N vectors, D width, K cells, n rows of a block, P pairs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from unlabeled.curate.blocks import Floats, Integers, Resources, Rows, load_arrays, save_arrays, spans
from unlabeled.curate.cells import TILE, Cells, check_memory, find_centroids, lay_out
from unlabeled.curate.components import UnionFind, forest
from unlabeled.curate.kmeans import NO_LIMITS
from unlabeled.errors import UserError
from unlabeled.weights.files import replacing

ROUNDING = 1e-6  # what the cosine of a vector with itself may lack
EXACT = 0.5  # share of the distance at which no pair is missed
QUERIES = (64, 448, 512, 512, 512)  # of the sample, in turns until it has PAIRS
PAIRS = 4000
PAIRS_OF_A_QUERY = 64  # that count, so that one large group does not decide
SAFETY = 1.1
BALLS = 8  # of a large cell


class Pairs(NamedTuple):
    """Pairs of rows above the threshold.

    left_P, right_P: int64, left < right, each pair once; cosines_P: float32.
    """

    left_P: Integers
    right_P: Integers
    cosines_P: Floats


@dataclass(frozen=True)
class Recall:
    """Recall of an approximate step, measured on a sample against brute force.

    Attributes:
        found: of the sample's pairs, how many the step found.
        pairs: that brute force found.
        queries: vectors of the sample.
    """

    found: int
    pairs: int
    queries: int

    @property
    def value(self) -> float:
        """Share found; 1 where there was none to find."""
        return self.found / self.pairs if self.pairs else 1.0

    @property
    def bound(self) -> float:
        """What the recall is at least, at 95% confidence (Clopper-Pearson); 0 where there was no pair."""
        return lower_bound(self.found, self.pairs)

    def __str__(self) -> str:
        return f"{self.value:.4f} ({self.found} of {self.pairs} pairs of {self.queries} vectors)"


def lower_bound(hits: int, trials: int) -> float:
    """Return what a share is at least, at 95% confidence, one-sided (Clopper-Pearson)."""
    from scipy.stats import beta

    return float(beta.ppf(0.05, hits, trials - hits + 1)) if hits else 0.0


@dataclass(frozen=True)
class Join:
    """A matrix laid out by cells, ready to be joined with itself.

    Attributes:
        cells: of it.
        threshold: cosine.
        recall: of the pairs above it.
        margin: share of the distance within which a cell is probed.
    """

    cells: Cells
    threshold: float
    recall: Recall
    margin: float


@dataclass(frozen=True)
class Components:
    """Connected components of the pairs above a threshold.

    Attributes:
        labels_N: int64, the smallest row of each row's component.
        pairs: above the threshold that were found.
        compared: cosines computed.
        recall: of the pairs.
    """

    labels_N: Integers
    pairs: int
    compared: int
    recall: Recall


def pairs_above(
    vectors: Any, threshold: float, *, recall: float = 0.99, resources: Resources = NO_LIMITS
) -> Iterator[Pairs]:
    """Give all pairs of rows with at least this cosine, some at a time; each pair once, in no order.

    vectors: (N, D), float16 or float32, of any length. threshold: above 0, up to 1. recall: wanted.
    Raises UserError for a threshold that is out of range or vectors that are not finite.
    """
    with prepared(vectors, threshold, recall, resources) as (join, _):
        yield from resources.map(_join_cells, join, join.cells.tasks, join.cells.task_bytes)


def components(
    vectors: Any, threshold: float, *, recall: float = 0.99, resources: Resources = NO_LIMITS
) -> Components:
    """Return the connected components of all pairs above a cosine; the pairs themselves are never held.

    vectors, threshold, recall, raises: see `pairs_above`.
    """
    if not len(vectors):
        return Components(np.empty(0, np.int64), 0, 0, Recall(0, 0, 0))
    with prepared(vectors, threshold, recall, resources) as (join, folder):
        items = list(enumerate(join.cells.tasks))
        files = [folder / f"connected-{number:06d}.npz" for number, _ in items]
        left = [item for item, file in zip(items, files, strict=True) if not file.is_file()]
        for _ in resources.map(_connect_cells, (join, folder), left, join.cells.task_bytes):
            pass
        sets, pairs = UnionFind(len(vectors)), 0
        for file in files:
            held = load_arrays(file)
            sets.union(held["left"], held["right"])
            pairs += int(held["count"])
        return Components(sets.labels(), pairs, join.cells.compared, join.recall)


@contextmanager
def prepared(
    vectors: Any, threshold: float, recall: float, resources: Resources
) -> Iterator[tuple[Join, Path]]:
    """Give a matrix laid out by cells, and the folder where it is."""
    if not 0 < threshold <= 1:
        raise UserError(f"A threshold of near-duplicates is a cosine above 0 and up to 1, not {threshold:g}.")
    if not 0 < recall <= 1:
        raise UserError(f"A recall is above 0 and up to 1, not {recall:g}.")
    rows = Rows(vectors)
    check_memory(len(rows), resources)
    identity = {
        "rows": rows.fingerprint(),
        "threshold": float(threshold),
        "recall": float(recall),
        "seed": resources.seed,
        "memory": resources.memory,
    }
    with resources.folder("neighbours", identity) as folder:
        centroids = find_centroids(rows, folder, resources)
        file, sample_file = folder / "margin.json", folder / "sample.npz"
        if not file.is_file():
            sample = _sample(rows, centroids, threshold, resources)
            save_arrays(sample_file, **sample)
            with replacing(file) as temporary:
                temporary.write_text(json.dumps({"margin": _margin(sample, recall)}))
        margin = json.loads(file.read_text())["margin"]
        reach = margin * float(np.sqrt(2 - 2 * threshold))
        cells = lay_out(rows, centroids, reach, folder, resources)
        measured = _measured(cells, load_arrays(sample_file))
        yield Join(cells, threshold, measured, margin), folder


def _sample(rows: Rows, centroids: Floats, threshold: float, resources: Resources) -> dict[str, NDArray[Any]]:
    """Return pairs above the threshold by brute force, of rows drawn at random with all others.

    left, right: rows. needed: the least share of the distance at which the pair is found. query: number of the draw.
    """
    generator = np.random.default_rng([resources.seed, 2])
    drawn = generator.permutation(len(rows))[: sum(QUERIES)] if len(centroids) > 1 else np.empty(0, np.int64)
    size = resources.block_rows(4 * (rows.shape[1] + 1024))
    left: list[Integers] = []
    right: list[Integers] = []
    done = count = 0
    for more in QUERIES:
        queries = drawn[done : done + more]
        if not len(queries) or count >= PAIRS:
            break
        context = _Queries(rows, rows.at(queries), threshold)
        blocks = spans(len(rows), size)
        held = 4 * size * (rows.shape[1] + 1024)
        which, row = (
            np.concatenate(column)
            for column in zip(*resources.map(_search_block, context, blocks, held), strict=True)
        )
        different = queries[which] != row
        which, row = _some(which[different] + done, row[different], generator)
        left.append(which)
        right.append(row)
        done += len(queries)
        count += len(row)
    query = np.concatenate(left) if left else np.empty(0, np.int64)
    pairs_right = np.concatenate(right) if right else np.empty(0, np.int64)
    pairs_left = drawn[query]
    needed = np.empty(len(pairs_left), np.float32)
    reach = max(float(np.sqrt(2 - 2 * threshold)), 1e-6)
    table = centroids @ centroids.T
    for start, stop in spans(len(needed), 4096):
        a = rows.at(pairs_left[start:stop]) @ centroids.T
        b = rows.at(pairs_right[start:stop]) @ centroids.T
        i, j, here = a.argmax(axis=1), b.argmax(axis=1), np.arange(len(a))
        between = np.sqrt(np.maximum(2 - 2 * table[i, j], 1e-12))
        either = np.minimum(a[here, i] - a[here, j], b[here, j] - b[here, i]) / between
        needed[start:stop] = np.where(i == j, 0, either / reach)
    return {
        "left": pairs_left,
        "right": pairs_right,
        "needed": needed,
        "query": query,
        "queries": np.array(done),
    }


def _some(query: Integers, row: Integers, generator: np.random.Generator) -> tuple[Integers, Integers]:
    """Return at most PAIRS_OF_A_QUERY pairs of each query, drawn at random."""
    order = np.lexsort((generator.random(len(query)), query))
    _, starts, counts = np.unique(query[order], return_index=True, return_counts=True)
    kept = order[np.arange(len(order)) - np.repeat(starts, counts) < PAIRS_OF_A_QUERY]
    return query[kept], row[kept]


def _margin(sample: dict[str, NDArray[Any]], recall: float) -> float:
    """Return the share of the distance at which cells are probed.

    A tenth more than what gives a recall halfway between the wanted one and 1 on the first half of the queries, as
    the tail of a sample is uncertain; the other half measures (`_measured`).
    """
    needed = np.sort(sample["needed"][sample["query"] % 2 == 0])
    if not len(needed) or recall == 1:
        return EXACT
    place = int(np.ceil((1 + recall) / 2 * len(needed))) - 1
    return min(EXACT, SAFETY * float(needed[place]))


def _measured(cells: Cells, sample: dict[str, NDArray[Any]]) -> Recall:
    """Return the recall of the second half of the sample's pairs: whether either vector is compared with the other."""
    held_out = sample["query"] % 2 == 1
    places = np.empty(len(cells.order_N), np.int64)
    places[cells.order_N] = np.arange(len(places))
    left, right = places[sample["left"][held_out]], places[sample["right"][held_out]]
    same = cells.cells_N[left] == cells.cells_N[right]
    from_left = cells.has_probe(left, cells.cells_N[right])
    found = same | from_left | cells.has_probe(right, cells.cells_N[left])
    return Recall(int(found.sum()), len(found), int(sample["queries"]) // 2)


@dataclass(frozen=True)
class _Queries:
    rows: Rows
    queries_QD: Floats
    threshold: float


def _search_block(context: _Queries, span: tuple[int, int]) -> tuple[Integers, Integers]:
    """Numbers of queries and rows of the pairs above the threshold, of a block of rows."""
    block = context.rows.between(*span)
    context.rows.release()
    queries, rows = [], []
    for first, last in spans(len(block), TILE):
        query, row, _ = _above(context.queries_QD, block[first:last], context.threshold)
        queries.append(query)
        rows.append(row + first + span[0])
    return np.concatenate(queries), np.concatenate(rows)


def _above(left_nD: Floats, right_nD: Floats, threshold: float) -> tuple[Integers, Integers, Floats]:
    """Return places in left, places in right and cosines of the pairs above the threshold."""
    cosines = left_nD @ right_nD.T
    places = np.flatnonzero(cosines >= threshold - ROUNDING)
    left, right = np.divmod(places, cosines.shape[1])
    return left, right, cosines.ravel()[places]


def _join_cells(join: Join, span: tuple[int, int]) -> Pairs:
    """All pairs of rows that some cells have."""
    found = [pairs for cell in range(*span) for pairs in _cell_pairs(join, cell)]
    join.cells.stored.release()
    if not found:
        return Pairs(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
    left, right, cosines = (np.concatenate(column) for column in zip(*found, strict=True))
    a, b = join.cells.order_N[left], join.cells.order_N[right]
    return Pairs(np.minimum(a, b), np.maximum(a, b), cosines)


def _connect_cells(context: tuple[Join, Path], item: tuple[int, tuple[int, int]]) -> None:
    """Write as few pairs of rows as connect what all pairs of some cells would, and the number of those."""
    join, folder = context
    number, span = item
    order = join.cells.order_N
    left, right, count = np.empty(0, np.int64), np.empty(0, np.int64), 0
    for cell in range(*span):
        balls = _balls(join, cell)
        for ball in range(int(balls.max(initial=-1)) + 1):
            inside = order[join.cells.members_N[join.cells.starts[cell] + np.flatnonzero(balls == ball)]]
            count += len(inside) * (len(inside) - 1) // 2
            left, right = np.append(left, np.full(len(inside) - 1, inside[0])), np.append(right, inside[1:])
        for pairs in _cell_pairs(join, cell, balls):
            count += len(pairs.left_P)
            left, right = forest(
                np.concatenate((left, order[pairs.left_P])), np.concatenate((right, order[pairs.right_P]))
            )
    join.cells.stored.release()
    save_arrays(folder / f"connected-{number:06d}.npz", left=left, right=right, count=count)


def _balls(join: Join, cell: int) -> Integers:
    """Return a number for those members of a large cell that are all near enough to each other; -1 for the others.

    Two vectors within half the threshold's angle of a third are within the whole of each other, so thousands of
    copies of one image need no comparison with one another.
    """
    cells = join.cells
    members = cells.members_N[cells.starts[cell] : cells.starts[cell + 1]]
    balls = np.full(len(members), -1, np.int64)
    if len(members) <= 2 * TILE:
        return balls
    half = float(np.sqrt((1 + join.threshold) / 2))  # cos(a / 2) from cos(a)
    generator = np.random.default_rng([cell, len(members)])
    number = 0
    for _ in range(BALLS):
        free = np.flatnonzero(balls < 0)
        if not len(free):
            break
        pivot = cells.stored.at(members[generator.choice(free, 1)])[0]
        near = np.concatenate(
            [
                cells.stored.at(members[free[start:stop]]) @ pivot >= half + 2 * ROUNDING
                for start, stop in spans(len(free), TILE)
            ]
        )
        if near.sum() >= TILE // 4:
            balls[free[near]] = number
            number += 1
    return balls


def _cell_pairs(join: Join, cell: int, balls: Integers | None = None) -> Iterator[Pairs]:
    """Give pairs of stored rows: a cell's members with each other and with those that probe it.

    balls: of members with the same number but -1 no pair is given, see `_balls`.
    """
    cells, stored = join.cells, join.cells.stored
    members = cells.members_N[cells.starts[cell] : cells.starts[cell + 1]]
    probing = cells.probing[cells.probing_starts[cell] : cells.probing_starts[cell + 1]]
    ball = np.full(len(members), -1, np.int64) if balls is None else np.sort(balls)
    if balls is not None:
        members = members[np.argsort(balls, kind="stable")]
    for first, last in spans(len(members), TILE):
        targets = stored.at(members[first:last])
        for start, stop in spans(last, TILE):
            if ball[start] >= 0 and ball[start] == ball[last - 1]:
                continue  # all of one ball, as they are sorted by it
            queries = targets if start == first else stored.at(members[start:stop])
            left, right, cosines = _above(queries, targets, join.threshold)
            left, right = left + start, right + first
            once = (left < right) & ((ball[left] < 0) | (ball[left] != ball[right]))
            yield Pairs(members[left[once]], members[right[once]], cosines[once])
        for start, stop in spans(len(probing), TILE):
            left, right, cosines = _above(stored.at(probing[start:stop]), targets, join.threshold)
            a, b = probing[left + start], members[right + first]
            # Where each probes the cell of the other, the pair comes up twice.
            once = (a < b) | ~cells.has_probe(b, cells.cells_N[a])
            yield Pairs(a[once], b[once], cosines[once])
