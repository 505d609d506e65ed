"""The k nearest rows of a pool for many queries: exact products inside the nearest cells of a k-means.

Few queries, or a small pool, are compared with all of it. Else each query probes the p cells with the nearest
centroids; p is chosen on a sample by the recall wanted, and the recall is measured on another sample.

Shape suffixes: N rows of the pool, Q queries, D width, K cells, k neighbours, p probes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unlabeled.atomic import replacing
from unlabeled.curate.blocks import Floats, Integers, Resources, Rows, load_arrays, save_arrays, spans
from unlabeled.curate.brute_force import Best, Nearest, by_brute_force, search
from unlabeled.curate.cells import (
    FEW,
    TILE,
    Cells,
    cell_count,
    check_memory,
    find_centroids,
    lay_out,
    stored_by_cell,
)
from unlabeled.curate.kmeans import NO_LIMITS
from unlabeled.curate.products import ROUNDING
from unlabeled.curate.recall import Recall, is_enough, lower_bounds
from unlabeled.errors import UserError

SAMPLE = 1024  # queries: the first half chooses the number of probes, the second measures


def nearest_rows(
    pool: Any,
    queries: Any,
    k: int,
    *,
    above: float = -1.0,
    recall: float = 0.99,
    resources: Resources = NO_LIMITS,
) -> Nearest:
    """Find the k rows of a pool nearest to each query.

    pool: (N, D). queries: (Q, D). above: cosine; what is below it does not count. recall: wanted.
    Raises UserError for a k below 1, a recall that is not above 0 and up to 1, or other widths.
    """
    rows, others = Rows(pool), Rows(queries)
    if k < 1:
        raise UserError(f"{k} neighbours of each image; it takes one at least.")
    if not 0 < recall <= 1:
        raise UserError(f"A recall is above 0 and up to 1, not {recall:g}.")
    if rows.shape[1] != others.shape[1]:
        raise UserError(
            f"Vectors of {rows.shape[1]} and of {others.shape[1]} values; both must be of the same model."
        )
    k = min(k, len(rows))
    if len(rows) <= FEW or len(others) <= 2 * cell_count(len(rows)) or recall == 1:
        best = by_brute_force(rows, others, k, above, resources)
        count = int((best.rows_Qk >= 0).sum())
        return Nearest(best.rows_Qk, best.cosines_Qk, Recall(count, count, len(others)))
    check_memory(len(rows), resources)
    identity = {
        "pool": rows.fingerprint(),
        "queries": others.fingerprint(),
        "k": int(k),
        "above": float(above),
        "recall": float(recall),
        "seed": resources.seed,
        "memory": resources.memory,
    }
    with resources.folder("nearest", identity) as folder:
        return _in_cells(rows, others, k, above, recall, folder, resources)


def _in_cells(
    rows: Rows, queries: Rows, k: int, above: float, recall: float, folder: Path, resources: Resources
) -> Nearest:
    centroids = find_centroids(rows, folder, resources)
    cells = lay_out(rows, centroids, folder, resources)
    file = folder / "probes.json"
    if not file.is_file():
        probes, found, pairs, count = _chosen(rows, queries, cells, centroids, k, above, recall, resources)
        with replacing(file) as temporary:
            temporary.write_text(
                json.dumps({"probes": probes, "found": found, "pairs": pairs, "queries": count})
            )
    chosen = json.loads(file.read_text())
    check_memory(len(queries), resources, 24 * chosen["probes"] + 12 * k)
    size = resources.block_rows(4 * (rows.shape[1] + 2 * len(centroids)))
    held = 12 * TILE * len(centroids) + 4 * rows.shape[1] * size
    probed = resources.map(_probe, (queries, centroids, chosen["probes"]), spans(len(queries), size), held)
    probes_Qp = np.concatenate(list(probed))
    order = np.argsort(probes_Qp.ravel(), kind="stable")
    ends = np.cumsum(np.bincount(probes_Qp.ravel(), minlength=len(centroids)))
    starts = np.concatenate(([0], ends))
    stored = stored_by_cell(rows, cells, folder, resources)
    context = _InCells(cells, stored, queries, order // chosen["probes"], starts, k, above, folder)
    largest = min(FEW, int(np.diff(cells.starts).max(initial=0)))
    held = 12 * TILE * TILE + 8 * rows.shape[1] * (largest + TILE)
    files = resources.written(_search_cells, context, folder, "nearest-{:06d}.npz", cells.tasks, held)
    best = Best(len(queries), k)
    for file in files:
        part = load_arrays(file)
        for number in range(int(part["count"])):
            best.add(part[f"queries{number}"], part[f"rows{number}"], part[f"cosines{number}"])
    result = best.sorted()
    measured = Recall(chosen["found"], chosen["pairs"], chosen["queries"])
    return Nearest(result.rows_Qk, result.cosines_Qk, measured)


def _chosen(
    rows: Rows,
    queries: Rows,
    cells: Cells,
    centroids_KD: Floats,
    k: int,
    above: float,
    recall: float,
    resources: Resources,
) -> tuple[int, int, int, int]:
    """Return the number of cells to probe, and on other queries how many of how many neighbours that finds.

    It is the smallest that finds so many of the first queries' neighbours that the recall of all is the wanted one at
    95% confidence. Where too few are near enough to say so, the nearest of every query stand in for them.
    """
    generator = np.random.default_rng([resources.seed, 6])
    drawn = np.sort(generator.choice(len(queries), min(SAMPLE, len(queries)), replace=False))
    sample = queries.at(drawn)
    best = by_brute_force(rows, Rows(sample), k, -2.0, resources)
    cell_of = np.empty(len(rows), np.int32)
    cell_of[cells.order_N] = cells.cells_N
    scores = sample @ centroids_KD.T
    query, place = np.nonzero(best.rows_Qk >= 0)
    is_near = best.cosines_Qk[query, place] >= above - ROUNDING
    own = scores[query, cell_of[best.rows_Qk[query, place]]]
    ranks = np.concatenate(
        [
            (scores[query[start:stop]] > own[start:stop, None]).sum(axis=1)
            for start, stop in spans(len(query), TILE)
        ]
    )
    chooses = query % 2 == 0
    chosen = ranks[chooses & is_near]
    if not is_enough(len(chosen), recall):
        chosen = ranks[chooses]
    chosen = np.sort(chosen)[::-1]
    hits = len(chosen) - np.arange(len(chosen))
    missed = int((lower_bounds(hits, len(chosen)) >= recall).sum()) - 1
    probes = int(chosen[max(0, missed)]) + 1
    measures = ~chooses & is_near
    return probes, int((ranks[measures] < probes).sum()), int(measures.sum()), len(drawn) // 2


def _probe(context: tuple[Rows, Floats, int], span: tuple[int, int]) -> NDArray[np.int32]:
    """The cells that each query of a block probes, (n, p)."""
    queries, centroids, probes = context
    block = queries.between(*span)
    queries.release()
    parts = []
    for start, stop in spans(len(block), TILE):
        scores = block[start:stop] @ centroids.T
        parts.append(np.argpartition(-scores, probes - 1, axis=1)[:, :probes].astype(np.int32))
    return np.concatenate(parts)


@dataclass(frozen=True)
class _InCells:
    """What a task needs; starts: where the queries of each cell begin in `probing`."""

    cells: Cells
    stored: Rows
    queries: Rows
    probing: Integers
    starts: Integers
    k: int
    above: float
    folder: Path


def _search_cells(context: _InCells, item: tuple[int, tuple[int, int]]) -> None:
    """Write for each of some cells: the queries that probe it, and their best rows and cosines."""
    number, span = item
    written: dict[str, Any] = {}
    count = 0
    for queries, rows, cosines in _cell_results(context, span):
        written |= {f"queries{count}": queries, f"rows{count}": rows, f"cosines{count}": cosines}
        count += 1
    context.stored.release()
    context.queries.release()
    save_arrays(context.folder / f"nearest-{number:06d}.npz", count=count, **written)


def _cell_results(context: _InCells, span: tuple[int, int]) -> Iterator[tuple[Integers, Integers, Floats]]:
    cells = context.cells
    for cell in range(*span):
        begin, end = cells.starts[cell : cell + 2].tolist()
        probing = context.probing[context.starts[cell] : context.starts[cell + 1]]
        for first, last in spans(end - begin, FEW):
            targets = context.stored.between(begin + first, begin + last)
            for start, stop in spans(len(probing), TILE):
                queries = probing[start:stop]
                places, cosines = search(context.queries.at(queries), targets, context.k, context.above)
                some = (places >= 0).any(axis=1)
                rows = np.where(places < 0, -1, cells.order_N[begin + first + places])
                yield queries[some], rows[some], cosines[some]
