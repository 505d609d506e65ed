"""Retrieval: the images of a pool that are like the seeds (DINOv2, appendix A.4).

Shape suffixes: N images of the pool, S seeds, R retrieved images, k neighbours, K clusters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from unlabeled.curate.blocks import Floats, Integers, Resources, Rows, spans
from unlabeled.curate.hierarchy import Level
from unlabeled.curate.kmeans import NO_LIMITS, Clusters, assign
from unlabeled.curate.neighbours import TILE, Recall
from unlabeled.errors import UserError


@dataclass(frozen=True)
class Retrieved:
    """Images of a pool, each once, and why.

    Attributes:
        images_R: int64, rows of the pool, ascending.
        sources_R: int64, the seed that each is most similar to, or the cluster it was drawn from.
        similarities_R: float32, cosine to that seed, or to the centroid.
        recall: of the neighbours, measured against brute force; None where none were searched for.
        exact: whether all were compared.
    """

    images_R: Integers
    sources_R: Integers
    similarities_R: Floats
    recall: Recall | None


def nearest_to_seeds(
    pool: Any, seeds: Any, k: int, *, recall: float = 0.99, resources: Resources = NO_LIMITS
) -> Retrieved:
    """Retrieve the k images nearest to each seed; their union, each with the seed it is most similar to.

    pool: (N, D). seeds: (S, D). recall: wanted, of the neighbours.
    Raises UserError for a k below 1 or other widths.
    """
    rows, cosines = nearest_rows(pool, seeds, k, resources=resources)
    which = np.repeat(np.arange(len(rows)), rows.shape[1])
    flat, values = rows.ravel(), cosines.ravel()
    order = np.lexsort((which, -values, flat))
    images, first = np.unique(flat[order], return_index=True)
    return Retrieved(
        images, which[order][first], values[order][first], Recall(rows.size, rows.size, len(rows))
    )


def nearest_rows(
    pool: Any, seeds: Any, k: int, *, resources: Resources = NO_LIMITS
) -> tuple[Integers, Floats]:
    """Return the k rows of the pool nearest to each seed, nearest first, (S, k), and their cosines, by brute force."""
    rows, queries = Rows(pool), Rows(seeds)
    if k < 1:
        raise UserError(f"{k} neighbours of each seed; it takes one at least.")
    if rows.shape[1] != queries.shape[1]:
        raise UserError(
            f"The pool's vectors have {rows.shape[1]} values and the seeds' {queries.shape[1]}: another model."
        )
    k = min(k, len(rows))
    found, best = np.empty((len(queries), k), np.int64), np.empty((len(queries), k), np.float32)
    blocks = spans(len(queries), 1024)
    held = 4 * TILE * 1024 * 3
    for (start, stop), (row, cosine) in zip(
        blocks, resources.map(_search, (rows, queries, k), blocks, held), strict=True
    ):
        found[start:stop], best[start:stop] = row, cosine
    return found, best


def _search(context: tuple[Rows, Rows, int], span: tuple[int, int]) -> tuple[Integers, Floats]:
    rows, queries, k = context
    block = queries.between(*span)
    best = np.empty((len(block), 0), np.float32)
    found = np.empty((len(block), 0), np.int64)
    for start, stop in spans(len(rows), TILE):
        best = np.concatenate((best, block @ rows.between(start, stop).T), axis=1)
        found = np.concatenate(
            (found, np.broadcast_to(np.arange(start, stop), (len(block), stop - start))), axis=1
        )
        if best.shape[1] > k:
            top = np.argpartition(-best, k - 1, axis=1)[:, :k]
            best, found = np.take_along_axis(best, top, 1), np.take_along_axis(found, top, 1)
    rows.release()
    order = np.lexsort((found, -best), axis=1)
    return np.take_along_axis(found, order, 1), np.take_along_axis(best, order, 1)


def from_seed_clusters(
    clusters: Clusters | Level,
    seeds: Any,
    *,
    per_cluster: int = 10_000,
    more_than: int = 3,
    most: int = 1_000_000,
    resources: Resources = NO_LIMITS,
) -> Retrieved:
    """Retrieve images at random from the clusters of the pool that hold more than `more_than` seeds.

    clusters: spherical ones, of the pool. seeds: (S, D). per_cluster: images drawn from each. most: of all together;
        what is more is left out at random.
    Raises UserError for numbers below 1.
    """
    if per_cluster < 1 or most < 1:
        raise UserError(f"{per_cluster} images of a cluster, {most} of all; it takes one of each at least.")
    labels, _ = assign(seeds, clusters.centroids_KD, resources=resources)
    chosen = np.flatnonzero(np.bincount(labels, minlength=len(clusters.centroids_KD)) > more_than)
    generator = np.random.default_rng([resources.seed, 4])
    order = generator.permutation(len(clusters.labels_N))
    order = order[np.isin(clusters.labels_N[order], chosen)]
    order = order[np.argsort(clusters.labels_N[order], kind="stable")]
    label = clusters.labels_N[order]
    _, starts, counts = np.unique(label, return_index=True, return_counts=True)
    rank = np.arange(len(order)) - np.repeat(starts, counts)
    images = order[rank < per_cluster]
    if len(images) > most:
        images = generator.choice(images, most, replace=False)
    images = np.sort(images)
    return Retrieved(
        images, clusters.labels_N[images].astype(np.int64), clusters.similarities_N[images], None
    )
