"""Retrieval: the images of a pool that are like the seeds (DINOv2, appendix A.4).

Shape suffixes: N images of the pool, S seeds, R retrieved images, k neighbours, K clusters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from unlabeled.curate.blocks import Floats, Integers, Resources
from unlabeled.curate.hierarchy import Level
from unlabeled.curate.kmeans import NO_LIMITS, Clusters, assign
from unlabeled.curate.nearest import nearest_rows
from unlabeled.curate.recall import Recall
from unlabeled.errors import UserError


@dataclass(frozen=True)
class Retrieved:
    """Images of a pool, each once, and why.

    Attributes:
        images_R: int64, rows of the pool, ascending.
        sources_R: int64, the seed that each is most similar to, or the cluster it was drawn from.
        similarities_R: float32, cosine to that seed, or to the centroid.
        recall: of the neighbours, measured against brute force; None where none were searched for.
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
    found = nearest_rows(pool, seeds, k, recall=recall, resources=resources)
    flat, values = found.rows_Qk.ravel(), found.cosines_Qk.ravel()
    which = np.repeat(np.arange(len(found.rows_Qk)), found.rows_Qk.shape[1])
    order = np.lexsort((which, -values, flat))
    order = order[flat[order] >= 0]
    images, first = np.unique(flat[order], return_index=True)
    return Retrieved(images, which[order][first], values[order][first], found.recall)


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
