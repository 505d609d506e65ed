"""Hierarchical k-means with resampling (Vo et al. 2024, section 3.2): clusters of clusters.

Level t clusters the centroids of level t - 1. Plain k-means spends its centroids where images are many; a few rounds
on only the images nearest to each centroid spread them evenly over what there is.

Shape suffixes: N rows, D width, K centroids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unlabeled.curate.blocks import Floats, Integers, Resources, Rows, load_arrays, save_arrays
from unlabeled.curate.kmeans import NO_LIMITS, assign, train, without_work
from unlabeled.errors import UserError

STARTED_ON = (
    32  # rows for each cluster that the first centroids are found with, where rounds of resampling follow
)


@dataclass(frozen=True)
class Level:
    """Clusters of one level.

    Attributes:
        centroids_KD: float32.
        labels_N: int32, the cluster of each row, or of each cluster of the level below.
        similarities_N: float32, cosine to its centroid if spherical, else minus the squared distance.
    """

    centroids_KD: Floats
    labels_N: NDArray[np.int32]
    similarities_N: Floats

    @property
    def k(self) -> int:
        """Number of clusters."""
        return len(self.centroids_KD)


@dataclass(frozen=True)
class Hierarchy:
    """A tree of clusters, the smallest ones first.

    Attributes:
        levels: from those of images to those of the clusters below the root.
    """

    levels: list[Level]

    def clusters_of(self, level: int) -> NDArray[np.int32]:
        """Cluster of each image at a level, (N,); 0 is the level of the smallest."""
        labels = self.levels[0].labels_N
        for above in self.levels[1 : level + 1]:
            labels = above.labels_N[labels]
        return labels


def hierarchical_kmeans(
    vectors: Any,
    clusters: Sequence[int],
    *,
    rounds: int = 2,
    keep: int = 10,
    iterations: int = 20,
    spherical: bool = True,
    resources: Resources = NO_LIMITS,
) -> Hierarchy:
    """Cluster rows, then the centroids, and so on.

    vectors: (N, D). clusters: of each level, falling, such as (10000, 1000, 100). rounds: of resampling at each level.
        keep: rows of each cluster that a round keeps, the nearest to its centroid. iterations: of each k-means.
    Raises UserError where the numbers of clusters do not fall from below N.
    """
    sizes = [len(vectors), *clusters]
    if len(sizes) < 2 or any(above < 1 or below < above for below, above in pairwise(sizes)):
        raise UserError(
            f"Levels of {', '.join(map(str, clusters))} clusters for {len(vectors)} vectors: they must fall, "
            "from at most that many."
        )
    identity = {
        "rows": Rows(vectors, unit=spherical).fingerprint(),
        "clusters": [int(k) for k in clusters],
        "rounds": rounds,
        "keep": keep,
        "iterations": iterations,
        "spherical": spherical,
        "seed": resources.seed,
        "memory": resources.memory,
    }
    levels: list[Level] = []
    with resources.folder("hierarchy", identity) as folder:
        below = vectors
        for number, k in enumerate(clusters):
            step = replace(resources, work=folder / f"level-{number}", seed=resources.seed + number)
            levels.append(_level(below, k, rounds, keep, iterations, spherical, step))
            below = levels[-1].centroids_KD
    return Hierarchy(levels)


def _level(
    vectors: Any, k: int, rounds: int, keep: int, iterations: int, spherical: bool, resources: Resources
) -> Level:
    assert resources.work is not None
    rows = Rows(vectors, unit=spherical)
    level: Level | None = None
    for number in range(rounds + 1):
        file = Path(resources.work) / f"round-{number}.npz"
        if not file.is_file():
            if level is None:
                sample = STARTED_ON * k if rounds else None
                found = train(
                    vectors, k, iterations=iterations, spherical=spherical, sample=sample, resources=resources
                )
            else:
                kept = closest(level.labels_N, level.similarities_N, keep)
                some = rows.at(kept)
                once = replace(without_work(resources), seed=resources.seed + 1000 * number)
                if len(kept) < k:
                    break  # clusters of copies: there are no more different rows to spread over
                found = train(some, k, iterations=iterations, spherical=spherical, resources=once)
            labels, similarities = assign(
                vectors, found.centroids_KD, spherical=spherical, resources=resources
            )
            save_arrays(file, centroids=found.centroids_KD, labels=labels, similarities=similarities)
        held = load_arrays(file)
        level = Level(held["centroids"], held["labels"], held["similarities"])
    assert level is not None
    return level


def closest(labels_N: NDArray[np.int32], similarities_N: Floats, keep: int) -> Integers:
    """Return the `keep` rows of each cluster with the highest similarity, ascending."""
    order = np.lexsort((np.arange(len(labels_N)), -similarities_N, labels_N))
    counts = np.bincount(labels_N)
    starts = np.concatenate(([0], np.cumsum(counts)[:-1]))
    rank = np.arange(len(order)) - starts[labels_N[order]]
    return np.sort(order[rank < keep])
