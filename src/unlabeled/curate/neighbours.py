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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

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
from unlabeled.curate.components import UnionFind, forest
from unlabeled.curate.kmeans import NO_LIMITS, kmeans
from unlabeled.errors import UserError
from unlabeled.weights.files import replacing

FEW = 8192  # vectors of which all pairs are compared
TILE = 2048  # vectors on either side of one matrix product
TRAINED_ON = 64  # vectors for each cell that the centroids are found with
ROUNDING = 1e-6  # what the cosine of a vector with itself may lack
EXACT = 0.5  # share of the distance at which no pair is missed
QUERIES = (64, 448, 512, 512, 512)  # of the sample, in turns until it has PAIRS
PAIRS = 4000
CELLS_OF_A_TASK = 8


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
        stored: the rows, of length 1, in the order of `order`.
        order_N: number of each stored row in the matrix.
        starts: where each cell's members begin in `members`, (K + 1,).
        members_N: stored rows by cell.
        probing_starts, probing: the same for vectors of other cells that probe the cell.
        probes_starts, probes: cells that each stored row probes, without its own.
        cells_N: cell of each stored row.
        threshold: cosine.
        recall: of the pairs above it.
        margin: share of the distance within which a cell is probed.
    """

    stored: Rows
    order_N: Integers
    starts: Integers
    members_N: Integers
    probing_starts: Integers
    probing: Integers
    probes_starts: Integers
    probes: NDArray[np.int32]
    cells_N: NDArray[np.int32]
    threshold: float
    recall: Recall
    margin: float

    @property
    def compared(self) -> int:
        """Number of cosines computed."""
        sizes = np.diff(self.starts)
        return int((sizes * (sizes + 1) // 2 + sizes * np.diff(self.probing_starts)).sum())


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
        items = spans(len(join.starts) - 1, CELLS_OF_A_TASK)
        yield from resources.map(_join_cells, join, items, held_bytes(join))


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
    identity = {
        "rows": rows.fingerprint(),
        "threshold": threshold,
        "recall": recall,
        "seed": resources.seed,
        "memory": resources.memory,
    }
    with resources.folder("neighbours", identity) as folder:
        yield _lay_out(rows, threshold, recall, folder, resources), folder


def held_bytes(join: Join) -> int:
    """Return the bytes that a task holds."""
    width = join.stored.shape[1]
    largest = int(np.diff(join.starts).max(initial=0))
    return 4 * TILE * TILE * 2 + 4 * width * (min(largest, TILE) + TILE) * 2


def cell_count(size: int) -> int:
    """Return the number of cells for N vectors: what makes assigning and comparing cost about the same."""
    return 1 if size <= FEW else round((2 * size) ** 0.5)


def _lay_out(rows: Rows, threshold: float, recall: float, folder: Path, resources: Resources) -> Join:
    centroids = _cells(rows, folder, resources)
    reach = float(np.sqrt(2 - 2 * min(threshold, 1.0)))
    state = folder / "recall.json"
    sample_file = folder / "sample.npz"
    if not state.is_file():
        sample = _sample(rows, centroids, threshold, resources)
        margin = _margin(sample, recall)
        save_arrays(sample_file, **sample)
        with replacing(state) as temporary:
            temporary.write_text(json.dumps({"margin": margin}))
    margin = json.loads(state.read_text())["margin"]
    size = resources.block_rows(4 * (rows.shape[1] + 2 * len(centroids)))
    blocks = list(enumerate(spans(len(rows), size)))
    context = _Cells(rows, centroids, reach * margin, folder)
    left = [item for item in blocks if not (folder / f"cells-{item[0]:06d}.npz").is_file()]
    held = size * (12 * rows.shape[1] + 8 * len(centroids))
    for _ in resources.map(_store_block, context, left, held):
        pass
    stored, parts = [], []
    for number, _ in blocks:
        parts.append(load_arrays(folder / f"cells-{number:06d}.npz"))
        stored.append(np.load(folder / f"cells-{number:06d}.npy", mmap_mode="r"))
    join = _joined(rows, stored, parts, len(centroids), threshold, margin)
    return replace(join, recall=_measured(join, load_arrays(sample_file)))


def _joined(
    rows: Rows,
    stored: list[NDArray[Any]],
    parts: list[dict[str, NDArray[Any]]],
    k: int,
    threshold: float,
    margin: float,
) -> Join:
    order = np.concatenate([part["rows"] for part in parts])
    cells = np.concatenate([part["cells"] for part in parts])
    counts = np.concatenate([part["probe_counts"] for part in parts])
    probes = np.concatenate([part["probes"] for part in parts])
    by_probe = np.argsort(probes, kind="stable")
    return Join(
        stored=Rows(_Several(stored, rows)),
        order_N=order,
        starts=_starts(np.bincount(cells, minlength=k)),
        members_N=np.argsort(cells, kind="stable"),
        probing_starts=_starts(np.bincount(probes, minlength=k)),
        probing=np.repeat(np.arange(len(counts)), counts)[by_probe],
        probes_starts=_starts(counts),
        probes=probes,
        cells_N=cells,
        threshold=threshold,
        recall=Recall(0, 0, 0),
        margin=margin,
    )


class _Several:
    """Parts as `Rows` takes them."""

    def __init__(self, parts: list[NDArray[Any]], rows: Rows) -> None:
        self.parts, self.shape, self.dtype = parts, rows.shape, rows.dtype

    def __len__(self) -> int:
        return self.shape[0]


def _starts(counts: NDArray[Any]) -> Integers:
    return np.concatenate(([0], np.cumsum(counts, dtype=np.int64)))


def _cells(rows: Rows, folder: Path, resources: Resources) -> Floats:
    """Return centroids, (K, D)."""
    file = folder / "centroids.npy"
    if not file.is_file():
        k = cell_count(len(rows))
        generator = np.random.default_rng([resources.seed, 1])
        if k == 1:
            centroids = np.zeros((1, rows.shape[1]), np.float32)
        else:
            most = max(2 * k, resources.memory // 4 // (4 * rows.shape[1]))
            drawn = generator.choice(len(rows), min(len(rows), TRAINED_ON * k, most), replace=False)
            some = rows.at(np.sort(drawn))
            once = replace(resources, work=None)
            centroids = kmeans(some, k, iterations=8, init="random", resources=once).centroids_KD
        save_array(file, centroids)
    return np.asarray(np.load(file), np.float32)


def _sample(rows: Rows, centroids: Floats, threshold: float, resources: Resources) -> dict[str, NDArray[Any]]:
    """Return pairs above the threshold by brute force, of rows drawn at random with all others.

    left, right: rows. needed: the least share of the distance at which the pair is found. query: number of the draw.
    """
    generator = np.random.default_rng([resources.seed, 2])
    drawn = generator.permutation(len(rows))[: sum(QUERIES)] if len(centroids) > 1 else np.empty(0, np.int64)
    size = resources.block_rows(4 * (rows.shape[1] + 1024))
    left: list[Integers] = []
    right: list[Integers] = []
    done = 0
    for count in QUERIES:
        queries = drawn[done : done + count]
        if not len(queries) or sum(len(part) for part in left) >= PAIRS:
            break
        done += len(queries)
        context = _Queries(rows, rows.at(queries), threshold)
        blocks = spans(len(rows), size)
        for which, row, _ in resources.map(_search_block, context, blocks, 4 * size * (rows.shape[1] + 1024)):
            different = queries[which] != row
            left.append(queries[which][different])
            right.append(row[different])
    pairs_left = np.concatenate(left) if left else np.empty(0, np.int64)
    pairs_right = np.concatenate(right) if right else np.empty(0, np.int64)
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
    places = {int(row): number for number, row in enumerate(drawn[:done])}
    query = np.array([places[int(row)] for row in pairs_left], np.int64)
    return {
        "left": pairs_left,
        "right": pairs_right,
        "needed": needed,
        "query": query,
        "queries": np.array(done),
    }


def _margin(sample: dict[str, NDArray[Any]], recall: float) -> float:
    """Return the share of the distance at which the recall is halfway between what is wanted and all.

    The first half of the queries decides; the others measure (`_measured`).
    """
    needed = np.sort(sample["needed"][sample["query"] % 2 == 0])
    if not len(needed) or recall == 1:
        return EXACT
    place = int(np.ceil((1 + recall) / 2 * len(needed))) - 1
    return min(EXACT, float(needed[min(place, len(needed) - 1)]) + 1e-4)


def _measured(join: Join, sample: dict[str, NDArray[Any]]) -> Recall:
    """Return the recall of the second half of the sample's pairs: whether either vector is compared with the other."""
    held_out = sample["query"] % 2 == 1
    places = np.empty(len(join.order_N), np.int64)
    places[join.order_N] = np.arange(len(places))
    left, right = places[sample["left"][held_out]], places[sample["right"][held_out]]
    same = join.cells_N[left] == join.cells_N[right]
    found = same | _probes(join, left, join.cells_N[right]) | _probes(join, right, join.cells_N[left])
    return Recall(int(found.sum()), len(found), int(sample["queries"]) // 2)


def _probes(join: Join, stored: Integers, cells: NDArray[np.int32]) -> NDArray[np.bool_]:
    """Return whether each stored row probes the cell."""
    result = np.zeros(len(stored), bool)
    starts, ends = join.probes_starts[stored], join.probes_starts[stored + 1]
    for place in range(int((ends - starts).max(initial=0))):
        there = starts + place < ends
        result[there] |= join.probes[starts[there] + place] == cells[there]
    return result


@dataclass(frozen=True)
class _Queries:
    rows: Rows
    queries_QD: Floats
    threshold: float


def _search_block(context: _Queries, span: tuple[int, int]) -> tuple[Integers, Integers, Floats]:
    """Numbers of queries, rows and cosines of the pairs above the threshold, of a block of rows."""
    block = context.rows.between(*span)
    found = []
    for start, stop in spans(len(context.queries_QD), TILE):
        for first, last in spans(len(block), TILE):
            query, row, cosines = _above(context.queries_QD[start:stop], block[first:last], context.threshold)
            found.append((query + start, row + first + span[0], cosines))
    context.rows.release()
    query, row, cosines = (np.concatenate(column) for column in zip(*found, strict=True))
    return query, row, cosines


def _above(left_nD: Floats, right_nD: Floats, threshold: float) -> tuple[Integers, Integers, Floats]:
    """Return places in left, places in right and cosines of the pairs above the threshold."""
    cosines = left_nD @ right_nD.T
    places = np.flatnonzero(cosines >= threshold - ROUNDING)
    left, right = np.divmod(places, cosines.shape[1])
    return left, right, cosines.ravel()[places]


@dataclass(frozen=True)
class _Cells:
    rows: Rows
    centroids_KD: Floats
    reach: float
    folder: Path


def _store_block(context: _Cells, item: tuple[int, tuple[int, int]]) -> None:
    """Write a block of rows in the order of their cells, with the cells that each probes."""
    number, (start, stop) = item
    block = context.rows.between(start, stop)
    centroids = context.centroids_KD
    table = centroids @ centroids.T
    cells = np.empty(len(block), np.int32)
    who, probed = [], []
    for first, last in spans(len(block), TILE):
        scores = block[first:last] @ centroids.T
        here = np.arange(len(scores))
        own = scores.argmax(axis=1)
        cells[first:last] = own
        if context.reach > 0:
            # The distance of two centroids is 2 at most, so a lower score cannot be within reach.
            near = np.flatnonzero(scores >= (scores[here, own] - 2 * context.reach)[:, None])
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
    save_array(context.folder / f"cells-{number:06d}.npy", block[order].astype(context.rows.dtype))
    save_arrays(
        context.folder / f"cells-{number:06d}.npz",
        rows=order + start,
        cells=cells[order],
        probe_counts=np.bincount(places[rows], minlength=len(block)),
        probes=probes[by_place].astype(np.int32),
    )
    context.rows.release()


def _cell_pairs(join: Join, cell: int) -> Iterator[Pairs]:
    """Give pairs of stored rows: a cell's members with each other and with those that probe it."""
    members = join.members_N[join.starts[cell] : join.starts[cell + 1]]
    probing = join.probing[join.probing_starts[cell] : join.probing_starts[cell + 1]]
    for first, last in spans(len(members), TILE):
        targets = join.stored.at(members[first:last])
        for start, stop in spans(last, TILE):
            queries = targets if start == first else join.stored.at(members[start:stop])
            left, right, cosines = _above(queries, targets, join.threshold)
            once = left + start < right + first
            yield Pairs(members[left[once] + start], members[right[once] + first], cosines[once])
        for start, stop in spans(len(probing), TILE):
            left, right, cosines = _above(join.stored.at(probing[start:stop]), targets, join.threshold)
            a, b = probing[left + start], members[right + first]
            # Where each probes the cell of the other, the pair comes up twice.
            once = (a < b) | ~_probes(join, b, join.cells_N[a])
            yield Pairs(a[once], b[once], cosines[once])


def _join_cells(join: Join, span: tuple[int, int]) -> Pairs:
    """All pairs of rows that some cells have."""
    found = [pairs for cell in range(*span) for pairs in _cell_pairs(join, cell)]
    join.stored.release()
    if not found:
        return Pairs(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))
    left, right, cosines = (np.concatenate(column) for column in zip(*found, strict=True))
    a, b = join.order_N[left], join.order_N[right]
    return Pairs(np.minimum(a, b), np.maximum(a, b), cosines)


def _connect_cells(context: tuple[Join, Path], item: tuple[int, tuple[int, int]]) -> None:
    """Write as few pairs of rows as connect what all pairs of some cells would, and the number of those."""
    join, folder = context
    number, span = item
    left, right, count = np.empty(0, np.int64), np.empty(0, np.int64), 0
    for cell in range(*span):
        for pairs in _cell_pairs(join, cell):
            count += len(pairs.left_P)
            left, right = forest(
                np.concatenate((left, join.order_N[pairs.left_P])),
                np.concatenate((right, join.order_N[pairs.right_P])),
            )
    join.stored.release()
    save_arrays(folder / f"connected-{number:06d}.npz", left=left, right=right, count=count)


def components(
    vectors: Any, threshold: float, *, recall: float = 0.99, resources: Resources = NO_LIMITS
) -> Components:
    """Return the connected components of all pairs above a cosine; the pairs themselves are never held.

    vectors, threshold, recall, raises: see `pairs_above`.
    """
    with prepared(vectors, threshold, recall, resources) as (join, folder):
        items = list(enumerate(spans(len(join.starts) - 1, CELLS_OF_A_TASK)))
        files = [folder / f"connected-{number:06d}.npz" for number, _ in items]
        left = [item for item, file in zip(items, files, strict=True) if not file.is_file()]
        for _ in resources.map(_connect_cells, (join, folder), left, held_bytes(join)):
            pass
        sets, pairs = UnionFind(len(join.order_N)), 0
        for file in files:
            held = load_arrays(file)
            sets.union(held["left"], held["right"])
            pairs += int(held["count"])
        return Components(sets.labels(), pairs, join.compared, join.recall)
