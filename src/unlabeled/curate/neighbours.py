"""All pairs of vectors above a cosine: exact products inside the few nearest cells of a k-means.

Each vector lies in the cell of a centroid near to it, and is compared with all of that cell. Two vectors of different
cells i and j lie on either side of the plane midway between the centroids, so one of them is no farther from it than
half their distance, which is sqrt(2 - 2 cosine) at most. A vector therefore also probes those cells whose plane is
nearer than a share of that: with a share of 1/2 every pair is found; the difference of two neighbours has many
directions, so a far smaller one finds nearly all. The share is chosen on a sample by the recall that is wanted, and
the recall is measured on another sample against brute force.

All this is done with short sketches of the vectors, whose cosines are upper bounds (`unlabeled.curate.sketch`), and
with small integers in place of those (`unlabeled.curate.codes`); pairs that are near by these are looked at in full.

Shape suffixes: N vectors, D width, K cells, n rows of a block, P pairs.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from unlabeled.atomic import replacing
from unlabeled.curate.blocks import Floats, Integers, Resources, Rows, load_arrays, save_arrays, spans
from unlabeled.curate.cells import BYTES_OF_A_ROW, FEW, TILE, check_memory
from unlabeled.curate.coded_cells import VISITS, CodedCells, Reach, find_centroids, lay_out
from unlabeled.curate.codes import ROOM, coded
from unlabeled.curate.components import UnionFind, forest
from unlabeled.curate.kmeans import NO_LIMITS
from unlabeled.curate.margin import chosen_reach, drawn_pairs, measured_recall
from unlabeled.curate.products import LOOKED_AT, ROUNDING, cosines_of
from unlabeled.curate.recall import Recall
from unlabeled.curate.sketch import sketched
from unlabeled.errors import UserError

JOINED = 1 << 20  # pairs of a task that are held before only those that connect are kept
BALLS = 8  # of a large cell
FORMAT = 3  # of the files that a run leaves, so that none of an older version is taken


class Pairs(NamedTuple):
    """Pairs of rows above the threshold.

    left_P, right_P: int64, left < right, each pair once; cosines_P: float32.
    """

    left_P: Integers
    right_P: Integers
    cosines_P: Floats


@dataclass(frozen=True)
class Join:
    """A matrix laid out by cells, ready to be joined with itself.

    Attributes:
        rows: of it, in full.
        cells: of it, or of sketches of its rows.
        threshold: cosine.
        recall: of the pairs above it.
        reach: within which cells are probed.
    """

    rows: Rows
    cells: CodedCells
    threshold: float
    recall: Recall
    reach: Reach

    @property
    def task_bytes(self) -> int:
        """Bytes that a task holds."""
        return 8 * LOOKED_AT * self.rows.shape[1] + 32 * JOINED + 24 * ROOM + 32 * VISITS


@dataclass
class Tally:
    """Cosines computed by a task."""

    compared: int = 0


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
        yield from resources.map(_join_cells, join, join.cells.tasks, join.task_bytes)


def components(
    vectors: Any, threshold: float, *, recall: float = 0.99, resources: Resources = NO_LIMITS
) -> Components:
    """Return the connected components of all pairs above a cosine; the pairs themselves are never held.

    vectors, threshold, recall, raises: see `pairs_above`.
    """
    if not len(vectors):
        return Components(np.empty(0, np.int64), 0, 0, Recall(0, 0, 0))
    with prepared(vectors, threshold, recall, resources) as (join, folder):
        name = "connected-{:06d}.npz"
        tasks, held = join.cells.tasks, join.task_bytes
        files = resources.written(_connect_cells, (join, folder), folder, name, tasks, held)
        sets, pairs, compared = UnionFind(len(vectors)), 0, 0
        for file in files:
            found = load_arrays(file)
            sets.union(found["left"], found["right"])
            pairs += int(found["count"])
            compared += int(found["compared"])
        return Components(sets.labels(), pairs, compared, join.recall)


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
    check_memory(len(rows), resources, BYTES_OF_A_ROW + rows.shape[1])
    identity = {
        "rows": rows.fingerprint(),
        "threshold": float(threshold),
        "recall": float(recall),
        "seed": resources.seed,
        "memory": resources.memory,
        "format": FORMAT,
    }
    with resources.folder("neighbours", identity) as folder:
        short = sketched(rows, threshold, folder, resources) if len(rows) > FEW else None
        near = rows if short is None else short
        is_exact = recall == 1
        centroids = find_centroids(near, threshold, folder, resources)
        cells = lay_out(
            near, coded(near, is_exact, folder, resources), centroids, is_exact, folder, resources
        )
        file, sample_file = folder / "reach.json", folder / "sample.npz"
        if not file.is_file():
            sample = drawn_pairs(rows, near, cells, threshold, recall, resources)
            save_arrays(sample_file, **sample)
            with replacing(file) as temporary:
                temporary.write_text(json.dumps(chosen_reach(sample, threshold, recall)))
        reach = Reach(*json.loads(file.read_text()))
        measured = measured_recall(cells, load_arrays(sample_file), reach)
        yield Join(rows, cells, threshold, measured, reach), folder


def _join_cells(join: Join, span: tuple[int, int]) -> Pairs:
    """All pairs of rows that some cells have."""
    found = list(_pairs_of(join, span))
    join.rows.release()
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
    left, right, count, held = [np.empty(0, np.int64)], [np.empty(0, np.int64)], 0, 0
    balls, tally = {cell: _balls(join, cell) for cell in range(*span)}, Tally()
    for cell, numbers in balls.items():
        for ball in range(int(numbers.max(initial=-1)) + 1):
            inside = order[join.cells.starts[cell] + np.flatnonzero(numbers == ball)]
            count += len(inside) * (len(inside) - 1) // 2
            left.append(np.full(len(inside) - 1, inside[0]))
            right.append(inside[1:])
    for pairs in _pairs_of(join, span, balls, tally):
        count += len(pairs.left_P)
        held += len(pairs.left_P)
        left.append(order[pairs.left_P])
        right.append(order[pairs.right_P])
        if held > JOINED:
            left, right = ([part] for part in forest(np.concatenate(left), np.concatenate(right)))
            held = 0
    join.rows.release()
    fewest = forest(np.concatenate(left), np.concatenate(right))
    file = folder / f"connected-{number:06d}.npz"
    save_arrays(file, left=fewest[0], right=fewest[1], count=count, compared=tally.compared)


def _balls(join: Join, cell: int) -> Integers:
    """Return a number for those members of a large cell that are all near enough to each other; -1 for the others.

    Two vectors within half the threshold's angle of a third are within the whole of each other, so thousands of
    copies of one image need no comparison with one another.
    """
    cells = join.cells
    begin, end = cells.starts[cell : cell + 2].tolist()
    balls = np.full(end - begin, -1, np.int64)
    if len(balls) <= 2 * TILE:
        return balls
    rows, members = join.rows, cells.order_N[begin:end]
    half = float(np.sqrt((1 + join.threshold) / 2))  # cos(a / 2) from cos(a)
    generator = np.random.default_rng([cell, len(members)])
    number = 0
    for _ in range(BALLS):
        free = np.flatnonzero(balls < 0)
        if not len(free):
            break
        pivot = rows.at(members[generator.choice(free, 1)])[0]
        near = np.concatenate(
            [
                rows.at(members[free[start:stop]]) @ pivot >= half + 2 * ROUNDING
                for start, stop in spans(len(free), TILE)
            ]
        )
        if near.sum() >= TILE // 4:
            balls[free[near]] = number
            number += 1
    return balls


def _pairs_of(
    join: Join,
    span: tuple[int, int],
    balls: Mapping[int, Integers] | None = None,
    tally: Tally | None = None,
) -> Iterator[Pairs]:
    """Give pairs of stored rows: members of cells with each other, and those that probe a cell with its members.

    balls: of each cell; of members with the same number but -1 no pair is given, see `_balls`.
    """
    tally, balls = tally or Tally(), balls or {}
    within = (pair for cell in range(*span) for pair in _pairs_within(join, cell, balls.get(cell), tally))
    across = (_once(join, *some) for some in _gathered(_pairs_across(join, span, tally)))
    for left, right in _gathered(itertools.chain(within, across)):
        yield _in_full(join, left, right)


def _gathered(pairs: Iterable[tuple[Integers, Integers]]) -> Iterator[tuple[Integers, Integers]]:
    """Give the same pairs, more than LOOKED_AT at a time but for the last ones."""
    columns: list[tuple[Integers, Integers]] = []
    held = 0
    for left, right in pairs:
        columns.append((left, right))
        held += len(left)
        if held > LOOKED_AT:
            yield _joined(columns)
            columns, held = [], 0
    if held:
        yield _joined(columns)


def _joined(columns: list[tuple[Integers, Integers]]) -> tuple[Integers, Integers]:
    left, right = (np.concatenate(column) for column in zip(*columns, strict=True))
    return left, right


def _in_full(join: Join, left: Integers, right: Integers) -> Pairs:
    """Those of some pairs of stored rows that are above the threshold in full."""
    order = join.cells.order_N
    cosines = cosines_of(join.rows, order[left], order[right])
    above = cosines >= join.threshold - ROUNDING
    return Pairs(left[above], right[above], cosines[above])


def _pairs_within(
    join: Join, cell: int, balls: Integers | None, tally: Tally
) -> Iterator[tuple[Integers, Integers]]:
    """Give pairs of a cell's members whose codes are above the threshold, each once; see `_pairs_of`."""
    members = join.cells.members(cell)
    tally.compared += len(members) * (len(members) + 1) // 2
    ball = np.full(len(members), -1, np.int64) if balls is None else np.sort(balls)
    if balls is not None:
        members = members[np.argsort(balls, kind="stable")]
    for first, last in spans(len(members), TILE):
        for start, stop in spans(last, TILE):
            if ball[start] >= 0 and ball[start] == ball[last - 1]:
                continue  # all of one ball, as they are sorted by it
            for left, right in join.cells.codes.near(
                members[start:stop], members[first:last], join.threshold
            ):
                left, right = left + start, right + first
                once = (left < right) & ((ball[left] < 0) | (ball[left] != ball[right]))
                yield members[left[once]], members[right[once]]


def _pairs_across(join: Join, span: tuple[int, int], tally: Tally) -> Iterator[tuple[Integers, Integers]]:
    """Give pairs of rows of some cells with members of those that they probe, by codes; some of them twice."""
    for cell, probing in join.cells.probing(span, join.reach):
        members = join.cells.members(cell)
        tally.compared += len(probing) * len(members)
        for left, right in join.cells.codes.near(probing, members, join.threshold):
            yield probing[left], members[right]


def _once(join: Join, left: Integers, right: Integers) -> tuple[Integers, Integers]:
    """Leave out the second of pairs that come up twice, as each row probes the cell of the other."""
    once = left < right
    later = np.flatnonzero(~once)
    once[later] = ~join.cells.has_probe(right[later], join.cells.cell_of(left[later]), join.reach)
    return left[once], right[once]
