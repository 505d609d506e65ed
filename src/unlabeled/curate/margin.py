"""The share of the distance at which cells are probed, chosen on a sample, and its recall, measured on another.

Shape suffixes: N vectors, D width, K cells, Q queries, n m rows of a product, P pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unlabeled.curate.blocks import Floats, Integers, Resources, Rows, spans
from unlabeled.curate.cells import TILE, Cells
from unlabeled.curate.products import ROUNDING, Room, cosines_of
from unlabeled.curate.sketch import SLACK

EXACT = 0.5  # share of the distance at which no pair is missed
QUERIES = (512, 512, 1024, 2048)  # of the sample, in turns until it has PAIRS
PAIRS = 2000  # half of them choose the margin, half measure
PAIRS_OF_A_QUERY = 64  # that count, so that one large group does not decide
SEARCHED = 1024  # queries of the sample in one product


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
        return float(lower_bounds(np.array([self.found]), self.pairs)[0])

    def __str__(self) -> str:
        counts = f"{self.found} of {self.pairs} pairs of {self.queries} vectors"
        return f"{self.value:.4f} (at least {self.bound:.4f} at 95% confidence; {counts})"


def lower_bounds(hits: Integers, trials: int) -> NDArray[np.float64]:
    """Return what a share is at least, at 95% confidence, one-sided (Clopper-Pearson), for numbers of hits."""
    from scipy.stats import beta

    result: NDArray[np.float64] = np.nan_to_num(beta.ppf(0.05, hits, trials - hits + 1))
    return result


def drawn_pairs(
    rows: Rows, exact: Rows | None, centroids: Floats, threshold: float, resources: Resources
) -> dict[str, NDArray[Any]]:
    """Return pairs of rows drawn at random with all others, by brute force.

    All pairs above the threshold, and of each row that has none the one with its nearest.
    left, right: rows. is_above: whether the pair is above the threshold. needed: the least share of its distance, or of
    that of the threshold where it is above, at which the pair is found. query: number of the draw.
    """
    generator = np.random.default_rng([resources.seed, 2])
    drawn = generator.permutation(len(rows))[: sum(QUERIES)] if len(centroids) > 1 else np.empty(0, np.int64)
    size = resources.block_rows(4 * rows.shape[1] + 4096)
    columns: list[tuple[Integers, Integers, Floats]] = []
    done = count = 0
    for more in QUERIES:
        queries = drawn[done : done + more]
        if not len(queries) or count >= PAIRS:
            break
        context = _Queries(rows, exact, queries, rows.at(queries), threshold)
        blocks = spans(len(rows), size)
        held = 8 * size * rows.shape[1] + 8 * TILE * SEARCHED
        query, row, cosine = (
            np.concatenate(column)
            for column in zip(*resources.map(_search_block, context, blocks, held), strict=True)
        )
        kept = _some(query, cosine, threshold, generator)
        columns.append((query[kept] + done, row[kept], cosine[kept]))
        done += len(queries)
        count += int((cosine[kept] >= threshold - ROUNDING).sum())
    if not columns:
        columns = [(drawn, drawn, np.empty(0, np.float32))]
    query, right, cosine = (np.concatenate(column) for column in zip(*columns, strict=True))
    left = drawn[query]
    needed = np.empty(len(left), np.float32)
    distance = np.sqrt(np.maximum(2 - 2 * np.minimum(cosine, threshold), 1e-12))
    table = centroids @ centroids.T
    for start, stop in spans(len(needed), 4096):
        a = rows.at(left[start:stop]) @ centroids.T
        b = rows.at(right[start:stop]) @ centroids.T
        i, j, here = a.argmax(axis=1), b.argmax(axis=1), np.arange(len(a))
        between = np.sqrt(np.maximum(2 - 2 * table[i, j], 1e-12))
        either = np.minimum(a[here, i] - a[here, j], b[here, j] - b[here, i]) / between
        needed[start:stop] = np.where(i == j, 0, either / distance[start:stop])
    return {
        "left": left,
        "right": right,
        "is_above": cosine >= threshold - ROUNDING,
        "needed": needed,
        "query": query,
        "queries": np.array(done),
    }


def _some(
    query: Integers, cosine: Floats, threshold: float, generator: np.random.Generator
) -> NDArray[np.bool_]:
    """Whether each pair is of the sample: PAIRS_OF_A_QUERY above the threshold at most, at random, or else the nearest.

    Pairs of a query that are below the threshold are those nearest to it in each block.
    """
    above = cosine >= threshold - ROUNDING
    order = np.lexsort((generator.random(len(query)), np.where(above, 0, -cosine), ~above, query))
    _, starts, counts = np.unique(query[order], return_index=True, return_counts=True)
    rank = np.arange(len(order)) - np.repeat(starts, counts)
    kept = np.zeros(len(query), bool)
    kept[order] = (rank < PAIRS_OF_A_QUERY) & above[order] | (rank == 0)
    return kept


def chosen_margin(sample: dict[str, NDArray[Any]], recall: float) -> float:
    """Return the share of the distance at which cells are probed: the least that finds enough of the sample's pairs.

    Of the first half of the queries, as the other half measures (`measured_recall`). Enough are so many that the recall
    of all pairs is the wanted one at 95% confidence. Where too few pairs are above the threshold to say so, those of
    rows with their nearest stand in for them: they are farther apart, so more of them lie in different cells.
    """
    chooses = sample["query"] % 2 == 0
    needed = sample["needed"][chooses & sample["is_above"]]
    if recall == 1 or not chooses.any():
        return EXACT
    if lower_bounds(np.array([len(needed)]), len(needed))[0] < recall:
        needed = sample["needed"][chooses]
    needed = np.sort(needed)[::-1]
    missed = np.arange(len(needed))
    most = int((lower_bounds(len(needed) - missed, len(needed)) >= recall).sum()) - 1
    return min(EXACT, float(needed[max(0, most)]))


def measured_recall(cells: Cells, sample: dict[str, NDArray[Any]]) -> Recall:
    """Return the recall of the second half of the sample's pairs: whether either vector is compared with the other."""
    held_out = sample["is_above"] & (sample["query"] % 2 == 1)
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
    exact: Rows | None
    numbers_Q: Integers
    queries_QD: Floats
    threshold: float


def _search_block(context: _Queries, span: tuple[int, int]) -> tuple[Integers, Integers, Floats]:
    """Pairs of queries with a block of rows, above the threshold and the nearest: number, row and cosine."""
    block = context.rows.between(*span)
    context.rows.release()
    rows, numbers, count = context.exact or context.rows, context.numbers_Q, len(context.queries_QD)
    columns = []
    room = Room(TILE * SEARCHED)
    for start, stop in spans(count, SEARCHED):
        top, best = np.full(stop - start, span[0]), np.full(stop - start, -np.inf, np.float32)
        inside = np.flatnonzero((numbers[start:stop] >= span[0]) & (numbers[start:stop] < span[1]))
        for first, last in spans(len(block), TILE):
            bounds = room.product(context.queries_QD[start:stop], block[first:last])
            place = numbers[start:stop][inside] - span[0] - first
            here = (place >= 0) & (place < last - first)
            bounds[inside[here], place[here]] = -2
            row = bounds.argmax(axis=1)
            value = bounds[np.arange(stop - start), row]
            top, best = np.where(value > best, row + first + span[0], top), np.maximum(value, best)
            query, row = room.above(context.threshold)
            columns.append((query + start, row + first + span[0]))
        lower = np.flatnonzero(best < context.threshold - SLACK)
        columns.append((lower + start, top[lower]))
    query, row = (np.concatenate(column) for column in zip(*columns, strict=True))
    cosine = cosines_of(rows, numbers[query], row)
    rows.release()
    return query, row, cosine
