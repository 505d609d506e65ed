"""How far cells are probed, chosen on a sample, and the recall, measured on another.

Shape suffixes: Q queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unlabeled.curate.blocks import LARGEST_BLOCK, Floats, Integers, Resources, Rows, spans
from unlabeled.curate.brute_force import by_brute_force
from unlabeled.curate.coded_cells import CodedCells, Reach
from unlabeled.curate.codes import ROOM, Codes
from unlabeled.curate.products import LOOKED_AT, ROUNDING, cosines_of
from unlabeled.curate.recall import Recall, is_enough, lower_bounds

EXACT = 0.5  # share of the distance at which no pair is missed
BEYOND = 0.3  # share of the pairs that may be missed that are so as their centroids are far from each other
QUERIES = (512, 512, 1024, 2048, 2048)  # of the sample, in turns until it has PAIRS
PAIRS = 6000  # half of them choose the reach, half measure
PAIRS_OF_A_QUERY = 64  # that count, so that one large group does not decide


def drawn_pairs(
    rows: Rows,
    short: Rows,
    cells: CodedCells,
    threshold: float,
    recall: float,
    resources: Resources,
) -> dict[str, NDArray[Any]]:
    """Return pairs of rows drawn at random with all others: those above the threshold.

    Where they are too few to choose a reach for the recall by (`chosen_reach`), also of each row that has none the
    pair with its nearest.

    rows: in full. short: what the cells are of, the rows or sketches of them.
    left, right: stored rows. is_above: whether the pair is above the threshold. needed: the least share of its
    distance, or of that of the threshold where it is above, at which the pair is found. between: distance of the
    centroids of its cells. query: number of the draw.
    """
    generator = np.random.default_rng([resources.seed, 2])
    places = cells.places()
    drawn = generator.permutation(len(rows))[: sum(QUERIES) if cells.count > 1 else 0]
    drawn = places[drawn]
    query, right, cosine = np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32)
    done = 0
    for more in QUERIES:
        if done >= len(drawn) or len(query) >= PAIRS:
            break
        found = _pairs_above(rows, cells, drawn[done : done + more], threshold, resources)
        kept = _some(found[0], generator)
        query = np.concatenate((query, found[0][kept] + done))
        right, cosine = np.concatenate((right, found[1][kept])), np.concatenate((cosine, found[2][kept]))
        done = min(len(drawn), done + more)
    above = len(query)
    if done and recall < 1 and not is_enough(int((query % 2 == 0).sum()), recall):
        alone = np.setdiff1d(np.arange(done), query)
        numbers = cells.order_N[drawn[alone]]
        nearest = _nearest_others(short, numbers, resources)
        query, right = np.concatenate((query, alone)), np.concatenate((right, places[nearest]))
        cosine = np.concatenate((cosine, cosines_of(rows, numbers, nearest)))
    left = drawn[query]
    distance = np.sqrt(np.maximum(2 - 2 * np.minimum(cosine, threshold), 1e-12))
    one, other = cells.cell_of(left), cells.cell_of(right)
    from_left, between = cells.distances(left, other)
    needed = np.minimum(from_left, cells.distances(right, one)[0]) / distance
    return {
        "left": left,
        "right": right,
        "is_above": np.arange(len(left)) < above,
        "needed": needed,
        "between": between,
        "query": query,
        "queries": np.array(done),
    }


def _pairs_above(
    rows: Rows, cells: CodedCells, queries: Integers, threshold: float, resources: Resources
) -> tuple[Integers, Integers, Floats]:
    """Pairs of some stored rows with all others: place among the rows, other stored row, cosine."""
    context = _Queries(rows, cells.order_N, cells.codes, queries, threshold)
    held = 24 * ROOM + 8 * LOOKED_AT * rows.shape[1]
    found = resources.map(_compare_block, context, spans(len(rows), LARGEST_BLOCK), held)
    place, other, cosine = (np.concatenate(column) for column in zip(*found, strict=True))
    return place, other, cosine


def _some(query: Integers, generator: np.random.Generator) -> NDArray[np.bool_]:
    """Whether each pair is of the sample: PAIRS_OF_A_QUERY of a query at most, at random."""
    order = np.lexsort((generator.random(len(query)), query))
    _, starts, counts = np.unique(query[order], return_index=True, return_counts=True)
    kept = np.zeros(len(query), bool)
    kept[order] = np.arange(len(order)) - np.repeat(starts, counts) < PAIRS_OF_A_QUERY
    return kept


def _nearest_others(short: Rows, queries: Integers, resources: Resources) -> Integers:
    """The row nearest to each of some rows that is not itself."""
    two = by_brute_force(short, Rows(short.at(queries), is_ready=True), 2, -2.0, resources).rows_Qk
    return np.where(two[:, 0] == queries, two[:, 1], two[:, 0])


def chosen_reach(sample: dict[str, NDArray[Any]], threshold: float, recall: float) -> Reach:
    """Return the least reach that finds enough of the sample's pairs.

    Of the first half of the queries, as the other half measures (`measured_recall`). Enough are so many that the recall
    of all pairs is the wanted one at 95% confidence. Where too few pairs are above the threshold to say so, those of
    rows with their nearest stand in for them: they are farther apart, so more of them lie in different cells.
    """
    distance = float(np.sqrt(2 - 2 * threshold))
    chooses = sample["query"] % 2 == 0
    if recall == 1 or not chooses.any():
        return Reach(EXACT * distance, np.inf)
    if is_enough(int((chooses & sample["is_above"]).sum()), recall):
        chooses &= sample["is_above"]
    needed, between = sample["needed"][chooses], sample["between"][chooses]
    missed = np.arange(len(needed))
    most = max(0, int((lower_bounds(len(needed) - missed, len(needed)) >= recall).sum()) - 1)
    beyond = int(BEYOND * most)
    farthest = float(np.sort(between)[len(between) - 1 - beyond])
    needed = np.sort(needed[between <= farthest])[::-1]
    return Reach(min(EXACT, float(needed[most - beyond])) * distance, farthest)


def measured_recall(cells: CodedCells, sample: dict[str, NDArray[Any]], reach: Reach) -> Recall:
    """Return the recall of the second half of the sample's pairs: whether either vector is compared with the other."""
    held_out = sample["is_above"] & (sample["query"] % 2 == 1)
    left, right = sample["left"][held_out], sample["right"][held_out]
    one, other = cells.cell_of(left), cells.cell_of(right)
    found = (one == other) | cells.has_probe(left, other, reach) | cells.has_probe(right, one, reach)
    return Recall(int(found.sum()), len(found), int(sample["queries"]) // 2)


@dataclass(frozen=True)
class _Queries:
    rows: Rows
    order_N: Integers
    codes: Codes
    numbers_Q: Integers
    threshold: float


def _compare_block(context: _Queries, span: tuple[int, int]) -> tuple[Integers, Integers, Floats]:
    """Pairs of queries with a block of stored rows: place among the queries, stored row and cosine."""
    columns = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))]
    queries, order = context.numbers_Q, context.order_N
    counts_Q = np.zeros(len(queries), np.int64)
    for row, place in context.codes.near(np.arange(*span), queries, context.threshold):
        row = row + span[0]
        # Of thousands of copies a block gives some: all of them, of every query, would not fit into memory.
        kept = (row != queries[place]) & (counts_Q[place] < PAIRS_OF_A_QUERY)
        row, place = row[kept], place[kept]
        cosine = cosines_of(context.rows, order[queries[place]], order[row])
        above = cosine >= context.threshold - ROUNDING
        columns.append((place[above], row[above], cosine[above]))
        counts_Q += np.bincount(place[above], minlength=len(queries))
    context.rows.release()
    places, rows, cosines = (np.concatenate(column) for column in zip(*columns, strict=True))
    return places, rows, cosines
